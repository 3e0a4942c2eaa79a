"""What a training step of every method costs beside one of `supervised`, on the same patches.

    python benchmarks/step_cost.py                  V-Nets of width 8, patches 32x64x64, 14 classes, 2 + 2 patches, this device
    python benchmarks/step_cost.py --write          also write the ratio into the Cost line of every method's file

Forward, backward and optimiser step; needs no data. All methods take turns, one step each a round, in one process; the ratio
is the median over the rounds of a method's time over that of supervised in the same round. On a CPU the time is the
processor's, so that other work on the machine hardly counts. How near a GPU's limits a step comes: `benchmarks/speed gpu-step`.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tailseg.checks import example_batch, example_task
from tailseg.components import builtin_names, make_build, make_method
from tailseg.core import Batch, Method, Progress
from tailseg.runtime import Runtime, RuntimeOptions, choose_device, keep_freed_memory
from tailseg.train.fit import TrainOptions, make_optimizer

METHODS = Path(__file__).parents[1] / "src" / "tailseg" / "methods"
OPTIONS = {"dinomix": {"teacher": "random-tiny"}, "magicnet": {"cubes": 2}}
NETWORKS = {"urpc": "urpc_unet"}
LATE = 0.75  # of the run: past every warm-up, so that no term of a loss is left out


@dataclass(frozen=True)
class Setting:
    """What a method trains on. patch: voxels, (D, H, W) or (H, W). labelled, unlabelled: patches of a batch."""

    network: str = "vnet"
    width: int = 8
    classes: int = 14
    patch: tuple[int, ...] = (32, 64, 64)
    labelled: int = 2
    unlabelled: int = 2

    def fit(self, method: str) -> Setting:
        """With the network and the batch that the method needs."""
        fitting = replace(self, network=NETWORKS.get(method, self.network))
        if method == "bcp":  # halves of both are pasted into each other
            return replace(fitting, labelled=2 * self.labelled, unlabelled=2 * self.unlabelled)
        if method in ("crossmatch", "unimatch"):  # mix two draws of unlabelled patches
            return replace(fitting, unlabelled=2 * self.unlabelled)
        return fitting


class Contender:
    """A method with its batch and optimiser."""

    def __init__(self, name: str, setting: Setting, runtime: Runtime) -> None:
        setting, dims = setting.fit(name), len(setting.patch)
        task = example_task(setting.classes, 1, dims)
        build = make_build(setting.network, {"width": setting.width}, task)
        self.method: Method = make_method(name, OPTIONS.get(name, {}), task, build)
        made = example_batch(task, setting.labelled, setting.unlabelled, side=max(setting.patch))
        cut = (..., *(slice(side) for side in setting.patch))
        batch = Batch(*(part[cut].contiguous() for part in (made.x_l, made.y_l, made.x_u)))
        self.method.check_batch(setting.labelled, setting.unlabelled, setting.patch)
        runtime.place(self.method)
        self.method.train()
        self.optimizer = make_optimizer(self.method, TrainOptions(lr=0.001))
        self.batch = batch.to(runtime.device, runtime.memory_format(dims))
        self.runtime = runtime
        self.steps = 0

    def step(self) -> None:
        """One whole training step."""
        progress = Progress(int(LATE * 10_000) + self.steps, 10_000, 10)
        with self.runtime.autocast():
            total = torch.stack([*self.method(self.batch, progress).losses.values()]).sum()
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.method.after_step(progress)
        self.steps += 1

    def seconds(self) -> float:
        """Of one step."""
        start = self._now()
        self.step()
        return self._now() - start

    def _now(self) -> float:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def measure(rounds: int, width: int, runtime: Runtime) -> dict[str, list[float]]:
    """Method -> its ratios to supervised, one a round, after one round to warm up."""
    contenders = {name: Contender(name, Setting(width=width), runtime) for name in builtin_names("methods")}
    ratios: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        seconds = {name: contender.seconds() for name, contender in contenders.items()}
        print(f"round {turn}: supervised takes {seconds['supervised']:.2f} s", flush=True)
        for name, time_ in seconds.items() if turn else ():
            ratios[name].append(time_ / seconds["supervised"])
    return ratios


def write_cost(name: str, ratio: float) -> None:
    path = METHODS / f"{name}.py"
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r"^Cost: .*$", f"Cost: x{ratio:.1f}", text, count=1, flags=re.MULTILINE), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="fp32")
    parser.add_argument("--write", action="store_true", help="into the Cost lines of src/tailseg/methods")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    options = RuntimeOptions(precision=arguments.precision)
    ratios = measure(arguments.rounds, arguments.width, Runtime(choose_device(arguments.device), options))
    print("\n| method | times supervised | lowest | highest |\n| --- | ---: | ---: | ---: |")
    for name, found in sorted(ratios.items(), key=lambda item: statistics.median(item[1])):
        print(f"| {name} | {statistics.median(found):.1f} | {min(found):.1f} | {max(found):.1f} |")
        if arguments.write:
            write_cost(name, statistics.median(found))


if __name__ == "__main__":
    main()
