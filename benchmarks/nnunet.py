"""Give nnU-Net v2 a wall time and a folder with a few labelled scans: plan, preprocess, train and predict the others within it.

    python benchmarks/nnunet.py my_scans work --environment ~/nnunet_env --minutes 30 --configuration 2d
    taskset -c 1 python benchmarks/nnunet.py ...        on one core

`--environment` is a virtual environment of its own, into which nnunetv2 was installed; TailSeg's is left alone. The length of
training is the only thing that is changed: how long an iteration and a prediction take is measured first, and that measuring
does not count. Network, patch, batch, loss, augmentation, learning rate and the form of its decay are nnU-Net's own. It trains
on all labelled scans (fold "all") and does not segment them once more at the end, which would take the time of as many scans.
Predictions are mirrored only with `--mirror`: nnU-Net does so by default, and needs four to eight times as long for it.

work/predictions holds the label files, work/nnunet.json what was planned and how long everything took.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tailseg.data.cases import Case
from tailseg.data.image import read_geometry, spacing_of
from tailseg.data.raw import DataError, read_raw
from tailseg.files import write_json, write_text

DATASET, TRAINER = "Dataset001_Own", "nnUNetTrainerOnBudget"
TRAINER_FILE = f'''\
"""nnU-Net's own trainer with another length."""

import os
import time

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

# nnU-Net takes a thread for each core of the machine, also where it may use fewer
torch.set_num_threads(len(os.sched_getaffinity(0)))


class {TRAINER}(nnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cpu")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = int(os.environ["ON_BUDGET_EPOCHS"])
        self.num_iterations_per_epoch = int(os.environ["ON_BUDGET_ITERATIONS"])
        self.num_val_iterations_per_epoch = 1  # the fewest it can do with; with fold "all" they tell of training scans
        self.ends = []

    def on_train_epoch_start(self):
        if self.ends:
            self.print_to_log_file(f"Seconds between epochs: {{time.perf_counter() - self.ends[-1]:.3f}}")
        self.ends = [time.perf_counter()]
        super().on_train_epoch_start()

    def train_step(self, batch):
        losses = super().train_step(batch)
        self.ends.append(time.perf_counter())
        return losses

    def on_train_epoch_end(self, train_outputs):
        seconds = [f"{{end - start:.3f}}" for start, end in zip(self.ends, self.ends[1:])]
        self.print_to_log_file("Seconds of iterations:", *seconds)
        super().on_train_epoch_end(train_outputs)

    def perform_actual_validation(self, save_probabilities=False):
        """With fold "all" it would segment the training scans."""
'''
EPOCHS, FEWEST = 10, 5  # epochs at most, of so many iterations at least: between them the learning rate falls
PROBE_EPOCHS, PROBE_ITERATIONS, PROBE_SCANS = 2, 2, 3
MARGIN = 0.97  # of the time that is left for training


@dataclass(frozen=True)
class Pace:
    """Seconds: iteration, the median; between two epochs; the rest of a training, start and end; a scan's prediction; the
    start of a prediction."""

    iteration: float
    between_epochs: float
    training_rest: float
    scan: float
    prediction_start: float


@dataclass(frozen=True)
class Facts:
    """What work/nnunet.json holds. plan: of nnU-Net; spacing in mm and patch in voxels, as its arrays are. seconds: of every
    stage that counts. threads: of torch, one for each core that the process may use."""

    version: str
    configuration: str
    minutes: float
    threads: int
    labelled: int
    predicted: int
    mirrored: bool
    plan: dict[str, Any]
    epochs: int
    iterations: int
    probed: Pace
    seconds_per_iteration: float
    seconds: dict[str, float]


@dataclass(frozen=True)
class NNUNet:
    """The commands of nnU-Net in an environment, on the data set in a work folder."""

    environment: Path
    work: Path
    configuration: str
    mirrored: bool
    cores: int

    def call(self, program: str, *arguments: str, results: str = "results", augmenters: int = 1, **more: int) -> float:
        """Run a command, with its output in work/logs; returns its seconds. Raises RuntimeError with the end of the output."""
        settings = {
            "nnUNet_raw": self.work / "raw",
            "nnUNet_preprocessed": self.work / "preprocessed",
            "nnUNet_results": self.work / results,
            "nnUNet_extTrainer": self.work / "trainer",
            "nnUNet_def_n_proc": self.cores,
            "nnUNet_n_proc_DA": augmenters,
            "nnUNet_compile": "f",
            "OMP_NUM_THREADS": self.cores,
        }
        environment = os.environ | {name: str(value) for name, value in (settings | more).items()}
        log = self.work / "logs" / f"{results}_{program}.txt"
        log.parent.mkdir(exist_ok=True)
        start = time.perf_counter()
        with log.open("w", encoding="utf-8") as file:
            command = [self.environment / "bin" / program, *arguments]
            done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            raise RuntimeError(f"{program} {' '.join(arguments)} failed; the end of {log}:\n{log.read_text()[-2000:]}")
        return time.perf_counter() - start

    def version(self) -> str:
        ask = "from importlib.metadata import version; print(version('nnunetv2'), 'with torch', version('torch'))"
        python = self.environment / "bin" / "python"
        return subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()

    def lay_out(self, cases: Sequence[Case], description: Path) -> None:
        """Labelled cases to imagesTr and labelsTr, the others to imagesTs; the trainer beside the data."""
        raw = self.work / "raw" / DATASET
        for case in cases:
            _copy(case.images, raw / ("imagesTr" if case.label else "imagesTs"))
            if case.label:
                _copy([case.label], raw / "labelsTr")
        shutil.copyfile(description, raw / "dataset.json")
        write_text(self.work / "trainer" / "on_budget.py", TRAINER_FILE)

    def prepare(self) -> float:
        """Fingerprint, plan and preprocess; returns the seconds."""
        workers = str(self.cores)
        options = ["-d", "1", "-c", self.configuration, "-npfp", workers, "-np", workers]
        return self.call("nnUNetv2_plan_and_preprocess", *options)

    def train(self, epochs: int, iterations: int, results: str = "results") -> float:
        """On all labelled scans, iterations in each epoch; returns the seconds."""
        return self.call(
            "nnUNetv2_train", "1", self.configuration, "all", "-tr", TRAINER, "-device", "cpu",
            results=results, augmenters=self.cores - 1, ON_BUDGET_EPOCHS=epochs, ON_BUDGET_ITERATIONS=iterations,
        )  # fmt: skip

    def predict(self, images: Path, output: Path, results: str = "results") -> float:
        """Returns the seconds."""
        workers = str(self.cores - 1)  # 0: one after the other, in one process
        return self.call(
            "nnUNetv2_predict", "-i", str(images), "-o", str(output), "-d", "1", "-c", self.configuration, "-f", "all",
            "-tr", TRAINER, "-device", "cpu", "-npp", workers, "-nps", workers, *([] if self.mirrored else ["--disable_tta"]),
            results=results, ON_BUDGET_EPOCHS=1, ON_BUDGET_ITERATIONS=1,
        )  # fmt: skip

    def logged(self, words: str, results: str = "results") -> list[float]:
        """The numbers that the trainer wrote behind these words."""
        (log,) = (self.work / results).rglob("training_log_*.txt")
        lines = re.findall(rf"{words}: ([\d. ]+)", log.read_text(encoding="utf-8"))
        return [float(number) for line in lines for number in line.split()]

    def probe(self, scans: Sequence[Case]) -> Pace:
        """How fast it is here, by a few iterations and the prediction of a few scans."""
        training = self.train(PROBE_EPOCHS, PROBE_ITERATIONS, "probe")
        iterations, (between,) = (self.logged(f"Seconds {of}", "probe") for of in ("of iterations", "between epochs"))
        images, output = self.work / "probe" / "images", self.work / "probe" / "predictions"
        _copy([image for case in scans for image in case.images], images)
        began = time.time()
        predicting = self.predict(images, output, "probe")
        start = (output / "plans.json").stat().st_mtime - began  # written right before the first scan
        return Pace(
            iteration=statistics.median(iterations[1:]),  # the first one warms up
            between_epochs=between,
            training_rest=training - sum(iterations) - PROBE_EPOCHS * between,
            scan=(predicting - start) / len(scans),
            prediction_start=start,
        )

    def plan(self) -> dict[str, Any]:
        plans = json.loads((self.work / "preprocessed" / DATASET / "nnUNetPlans.json").read_text(encoding="utf-8"))
        chosen = plans["configurations"][self.configuration]
        network = chosen["architecture"]["arch_kwargs"]
        return {name: chosen[name] for name in ("patch_size", "batch_size", "spacing")} | {
            "network": chosen["architecture"]["network_class_name"].rpartition(".")[2],
            "features": network["features_per_stage"],
        }


def length(seconds: float, pace: Pace, scans: int) -> tuple[int, int]:
    """Epochs, and iterations of each, that fill the seconds that planning left, after the prediction of scans.

    Raises DataError where there is no time for one.
    """
    predicting = pace.prediction_start + scans * pace.scan
    left = (seconds - predicting) * MARGIN - pace.training_rest
    epochs = max(1, min(EPOCHS, math.floor(left / (FEWEST * pace.iteration + pace.between_epochs))))
    iterations = math.floor((left / epochs - pace.between_epochs) / pace.iteration)
    if iterations < 1:
        raise DataError(
            f"No time for an iteration of {pace.iteration:.0f} s: of the {seconds:.0f} s after planning, the prediction of "
            f"{scans} scans takes {predicting:.0f}. Give more --minutes, --configuration 2d, or leave out --mirror."
        )
    return epochs, iterations


def give(nnunet: NNUNet, folder: Path, minutes: float, *, probe_only: bool = False) -> None:
    """Plan, preprocess, train and predict, and write work/nnunet.json."""
    dataset = read_raw(folder)
    labelled = [case for case in dataset.cases.values() if case.label]
    others = [case for case in dataset.cases.values() if not case.label]
    nnunet.lay_out([*labelled, *others], dataset.root / "dataset.json")
    seconds = {"planning and preprocessing": nnunet.prepare()}
    plan = nnunet.plan()
    print(f"planned and preprocessed in {seconds['planning and preprocessing']:.0f} s: {plan}", flush=True)
    by_size = sorted(others, key=_volume)
    scans = [by_size[(2 * k + 1) * len(by_size) // (2 * PROBE_SCANS)] for k in range(PROBE_SCANS)]
    pace = nnunet.probe(scans)
    print(f"measured: {pace}", flush=True)
    epochs, iterations = length(60 * minutes - seconds["planning and preprocessing"], pace, len(others))
    print(f"{minutes:g} minutes: {epochs} epochs of {iterations} iterations", flush=True)
    if probe_only:
        return
    seconds["training"] = nnunet.train(epochs, iterations)
    seconds["prediction"] = nnunet.predict(nnunet.work / "raw" / DATASET / "imagesTs", nnunet.work / "predictions")
    facts = Facts(
        version=nnunet.version(),
        configuration=nnunet.configuration,
        minutes=minutes,
        threads=nnunet.cores,
        labelled=len(labelled),
        predicted=len(others),
        mirrored=nnunet.mirrored,
        plan=plan,
        epochs=epochs,
        iterations=epochs * iterations,
        probed=pace,
        seconds_per_iteration=statistics.median(nnunet.logged("Seconds of iterations")),
        seconds=seconds,
    )
    write_json(nnunet.work / "nnunet.json", asdict(facts))
    print(f"{sum(seconds.values()) / 60:.1f} minutes: {', '.join(f'{what} {s:.0f} s' for what, s in seconds.items())}")


def _volume(case: Case) -> float:
    """Of the scan, in mm3: the time of a prediction goes with it, since all are resampled to one spacing."""
    shape, affine = read_geometry(case.images[0])
    return math.prod(shape) * math.prod(spacing_of(affine))


def _copy(files: Sequence[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="scans in nnU-Net's raw layout, of which a few have a label file")
    parser.add_argument("work", type=Path, help="folder to make, for everything nnU-Net writes")
    parser.add_argument("--environment", type=Path, required=True, help="a virtual environment that holds nnunetv2")
    parser.add_argument("--minutes", type=float, default=30.0, help="from planning to the last prediction")
    parser.add_argument("--configuration", choices=("2d", "3d_fullres"), default="3d_fullres")
    parser.add_argument("--mirror", action="store_true", help="average predictions over mirrored scans")
    parser.add_argument("--probe", action="store_true", help="stop after measuring how fast it is")
    given = parser.parse_args()
    try:
        if not (given.environment / "bin" / "nnUNetv2_train").exists():
            raise DataError(f"{given.environment} holds no bin/nnUNetv2_train; install nnunetv2 into one there.")
        if given.work.exists():
            raise DataError(f"{given.work} exists already; remove it, or name another folder.")
        cores = len(os.sched_getaffinity(0))
        nnunet = NNUNet(given.environment.absolute(), given.work.absolute(), given.configuration, given.mirror, cores)
        give(nnunet, given.folder, given.minutes, probe_only=given.probe)
    except (ValueError, RuntimeError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
