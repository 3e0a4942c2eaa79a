"""The verbs: each puts the parts together for one job. The command line calls these, and so can a notebook.

from tailseg.app import evaluate, predict, train
from tailseg.recipe import load_recipe

run = train(load_recipe(Path("recipes/synapse_mini/dhc_20p.yaml"), ["seed=1"]), Path("runs/dhc"))
predict(run, "test", Path("runs/dhc/predictions"))
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tailseg.components import make_build, make_method
from tailseg.core import Method, Task
from tailseg.data.check import CheckReport, check_dataset
from tailseg.data.companions import CompanionStore
from tailseg.data.prepare import prepare_dataset
from tailseg.data.raw import Case, RawDataset, read_raw
from tailseg.data.splits import Split, read_split
from tailseg.data.store import Store, TrainingStore
from tailseg.data.stream import PatchSampler, PatchStream
from tailseg.evaluate.predict import Predictor, find_cases, predict_cases
from tailseg.evaluate.protocols import protocol_named
from tailseg.evaluate.scores import find_label_files, read_caveat, score_folder, write_scores
from tailseg.evaluate.summary import Summary, summarise, write_summary
from tailseg.evaluate.validate import Validator
from tailseg.files import write_json, write_text
from tailseg.options import OptionError
from tailseg.recipe import Recipe, load_recipe
from tailseg.runtime import Precision, Runtime, RuntimeOptions, choose_device, start_runtime
from tailseg.train.checkpoint import dump_task, load_checkpoint, load_task
from tailseg.train.fit import Trainer
from tailseg.train.watch import Watch

Report = Callable[[int, int, str], None]
"""Told (done, total, case) after every case of a long job."""

MAY_CHANGE_ON_RESUME = {"train.epochs", "train.device", "train.threads", "train.compile", "data.workers", "data.store"}


def silent(done: int, total: int, case: str) -> None:
    """A Report that says nothing."""


def check(root: Path, report: Report = silent, workers: int = 1) -> CheckReport:
    """All that is wrong with a raw data set, and what it holds; nothing is written."""
    return check_dataset(root, workers=workers, progress=report)


def prepare(recipe: Recipe, report: Report = silent, workers: int = 1) -> tuple[Store, RawDataset, Split]:
    """The prepared store of all cases that training may see; reused where it is up to date. Test scans stay out of it."""
    dataset = read_raw(recipe.data.root)
    split = read_split(dataset, recipe.data.split, recipe.data.split_file)
    folder = recipe.data.store / dataset.root.name
    store = prepare_dataset(
        dataset, recipe.data.prepare, folder, cases=split.training, workers=workers, progress=report
    )
    return store, dataset, split


def make_task(recipe: Recipe, store: TrainingStore, dataset: RawDataset, split: Split) -> Task:
    voxels = [store.class_voxels(case) for case in split.labelled]
    spacings = sorted(store.spacing(case) for case in split.labelled)
    return Task(
        classes=dataset.classes,
        in_channels=len(dataset.channels),
        spatial_dims=recipe.data.spatial_dims,
        spacing=tuple(spacings[len(spacings) // 2]),
        class_voxels=tuple(int(sum(counts)) for counts in zip(*voxels, strict=True)),
    )


def train(recipe: Recipe, folder: Path, *, resume: bool = False, report: Report = silent, workers: int = 1) -> Path:
    """Prepare and train; returns folder, which then holds recipe.yaml, split.json, last.pt, best.pt and metrics.jsonl.

    resume: go on from folder/last.pt; the recipe must be the run's own but for keys that leave its arithmetic alone, and
    train.epochs. Raises OptionError when folder holds another run.
    """
    with start_runtime(recipe.train, recipe.seed) as runtime, ExitStack() as stack:
        _claim(folder, recipe, resume)
        store, dataset, split = _prepare_once(recipe, runtime, report, workers)
        training = store.for_training(split)
        task = make_task(recipe, training, dataset, split)
        _check_patch_size(recipe, task)
        build = make_build(recipe.network.name, recipe.network.options, task)
        method = make_method(recipe.method.name, recipe.method.options, task, build)
        labelled, unlabelled = (count // runtime.ranks for count in recipe.data.batch)
        method.check_batch(labelled, unlabelled if split.unlabelled else 0, recipe.data.patch_size)
        companions = _companions_once(recipe, runtime, method, training, split, report)
        sampler = PatchSampler(
            training,
            {case: training.shape(case) for case in split.training},
            split.labelled,
            split.unlabelled,
            recipe.data.patch_size,
            recipe.data.batch,
            seed=recipe.seed,
            foreground=recipe.data.foreground,
            pad=recipe.data.pad,
            class_odds=method.class_sampling,
        )
        stream = PatchStream(
            sampler,
            workers=recipe.data.workers,
            rank=runtime.rank,
            ranks=runtime.ranks,
            companion=companions.cut if companions else None,
        )
        stack.callback(stream.close)
        watch = stack.enter_context(
            Watch(
                folder,
                task,
                log_every=recipe.train.log_every,
                alarm_after=recipe.train.alarm_after,
                enabled=runtime.is_main,
            )
        )
        trainer = Trainer(
            method,
            stream,
            recipe.train,
            runtime,
            watch,
            folder,
            steps_per_epoch=steps_per_epoch(recipe, split),
            seed=recipe.seed,
            meta={
                "recipe": recipe.to_dict(),
                "task": dump_task(task),
                "split": split.digest,
                "label_values": list(dataset.label_values),
                "versions": versions(),
            },
            augment=recipe.data.augment,
            validate=_validator(recipe, training, split, runtime),
        )
        if caveat := method.caveat():
            watch.say(caveat)
        if resume:
            trainer.resume(folder / "last.pt")
        if runtime.is_main:
            write_text(folder / "recipe.yaml", recipe.to_yaml())
            write_json(folder / "split.json", split.to_dict())
        trainer.fit()
    return folder


def steps_per_epoch(recipe: Recipe, split: Split) -> int:
    """An epoch passes once over the unlabelled cases. A batch without unlabelled patches counts as if half of it were, so
    that the labelled-only reference takes as many steps as the methods it is held against."""
    if recipe.train.steps_per_epoch:
        return recipe.train.steps_per_epoch
    labelled, unlabelled = recipe.data.batch
    if split.unlabelled:
        return -(-len(split.unlabelled) // (unlabelled or max(labelled // 2, 1)))
    return -(-len(split.labelled) // labelled)


def versions() -> dict[str, str]:
    return {"tailseg": version("tailseg"), "torch": str(torch.__version__), "python": platform.python_version()}


def _prepare_once(recipe: Recipe, runtime: Runtime, report: Report, workers: int) -> tuple[Store, RawDataset, Split]:
    """The first process prepares, the others find it done."""
    if runtime.ranks == 1:
        return prepare(recipe, report, workers)
    result = prepare(recipe, report, workers) if runtime.is_main else None
    torch.distributed.barrier()
    return result or prepare(recipe, silent, 1)


def _companions_once(
    recipe: Recipe, runtime: Runtime, method: Method, store: TrainingStore, split: Split, report: Report
) -> CompanionStore | None:
    """What the method wants to be told of every training case; the first process asks for it, the others find it done."""
    companion = method.companion(recipe.data.patch_size)
    if companion is None:
        return None
    if recipe.data.augment.turns:
        raise OptionError(
            "data.augment.rotate and data.augment.rot90 turn the patches, but not what was cached of whole scans; leave them"
            " at 0 and false, or let the teacher see the patches themselves (method.features=live)."
        )
    companions = CompanionStore(store, companion)
    cases = (*split.labelled, *(split.unlabelled if recipe.data.batch[1] else ()))
    if runtime.is_main:
        companions.build(cases, runtime.device, report)
    if runtime.ranks > 1:
        torch.distributed.barrier()
    return companions


def _validator(recipe: Recipe, store: TrainingStore, split: Split, runtime: Runtime) -> Validator | None:
    if not split.val:
        return None
    options = recipe.evaluate
    return Validator(
        store, split.val, recipe.data.patch_size, runtime, options.overlap, options.weighting, options.batch
    )


def _check_patch_size(recipe: Recipe, task: Task) -> None:
    build = make_build(recipe.network.name, recipe.network.options, task)
    with torch.device("meta"):
        divisor = build().size_divisor
    if any(side % divisor for side in recipe.data.patch_size):
        sides = list(recipe.data.patch_size)
        raise OptionError(
            f"data.patch_size {sides} must be multiples of {divisor} for network '{recipe.network.name}', e.g. "
            f"{[-(-side // divisor) * divisor for side in sides]}."
        )


def _claim(folder: Path, recipe: Recipe, resume: bool) -> None:
    """Refuse to overwrite a run, or to go on with another one."""
    saved, last = folder / "recipe.yaml", folder / "last.pt"
    if not resume:
        if last.exists():  # a run killed before its first checkpoint has nothing to lose
            raise OptionError(f"{folder} holds a run already; add --resume to go on with it, or choose another --out.")
        return
    if not last.exists():
        raise OptionError(f"{folder} holds no last.pt to resume from; train without --resume.")
    changed = _differences(load_recipe(saved).to_dict(), recipe.to_dict()) - MAY_CHANGE_ON_RESUME
    if changed:
        raise OptionError(
            f"{folder} was trained with another {', '.join(sorted(changed))}; resume with the same recipe "
            f"(tailseg train {saved} --resume --out {folder}), or start a run of its own."
        )


def _differences(first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for key in first.keys() | second.keys():
        a, b = first.get(key), second.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.add(prefix + key)
    return found


@dataclass(frozen=True)
class TrainedRun:
    """A run read back from its folder, ready to predict."""

    folder: Path
    recipe: Recipe
    task: Task
    method: Method
    split: Split
    label_values: tuple[int, ...]
    step: int


def load_run(folder: Path, checkpoint: str = "best") -> TrainedRun:
    """checkpoint: 'best' (on validation) or 'last'. Raises CheckpointError or OptionError."""
    if not folder.is_dir():
        raise OptionError(f"No run at {folder}; give the folder that `tailseg train --out` made.")
    path = folder / f"{checkpoint}.pt"
    if checkpoint == "best" and not path.exists() and (folder / "last.pt").exists():
        raise OptionError(f"{folder} has no best.pt: its split has no validation cases. Use --checkpoint last.")
    state = load_checkpoint(path)
    recipe, task = load_recipe(state["recipe"]), load_task(state["task"])
    build = make_build(recipe.network.name, recipe.network.options, task)
    method = make_method(recipe.method.name, recipe.method.options, task, build)
    method.load_state_dict(state["method"])
    split = Split.from_dict(json.loads((folder / "split.json").read_text(encoding="utf-8")))
    return TrainedRun(folder, recipe, task, method, split, tuple(state["label_values"]), state["step"])


def predict(
    run_folder: Path,
    source: str | Path,
    output: Path,
    *,
    checkpoint: str = "best",
    device: str = "auto",
    precision: Precision | None = None,
    save_probs: bool = False,
    report: Report = silent,
) -> list[Path]:
    """Segment scans on their own grid. source: a file, a folder of `<case>_0000.nii.gz`, or 'test', 'val' or 'unlabelled':
    that set of the run's split. Returns the written label files; labels.json beside them names the classes.
    """
    run = load_run(run_folder, checkpoint)
    cases = _cases_of(run, source)
    options = RuntimeOptions(
        device=device,
        precision=precision or run.recipe.train.precision,
        channels_last=run.recipe.train.channels_last,
        threads=run.recipe.train.threads,
    )
    runtime = Runtime(choose_device(options.device), options)
    runtime.place(run.method)
    predictor = Predictor(
        run.method,
        run.recipe.data.prepare,
        run.recipe.data.patch_size,
        runtime,
        overlap=run.recipe.evaluate.overlap,
        weighting=run.recipe.evaluate.weighting,
        batch_size=run.recipe.evaluate.batch,
    )
    return predict_cases(predictor, cases, output, label_values=run.label_values, save_probs=save_probs, report=report)


def _cases_of(run: TrainedRun, source: str | Path) -> Sequence[Case]:
    sets = {"test": run.split.test, "val": run.split.val, "unlabelled": run.split.unlabelled}
    if str(source) in sets:
        dataset = read_raw(run.recipe.data.root)
        if not sets[str(source)]:
            raise OptionError(f"The split '{run.split.name}' of this run has no {source} cases.")
        return [dataset.cases[case] for case in sets[str(source)]]
    return find_cases(Path(source), run.task.in_channels)


def _label_folder(reference: Path) -> Path:
    return reference / "labelsTr" if (reference / "labelsTr").is_dir() else reference


def unpredicted(predictions: Path, reference: Path) -> list[str]:
    """Cases with a reference and no prediction: what evaluate() says nothing about."""
    return sorted(find_label_files(_label_folder(reference)).keys() - find_label_files(predictions).keys())


def evaluate(
    predictions: Path,
    reference: Path,
    protocols: Sequence[str],
    output: Path | None = None,
    *,
    workers: int = 2,
    report: Report = silent,
) -> dict[str, Summary]:
    """Score every predicted label file against the reference of the same name, under each protocol.

    reference: a folder of label files, or a data set, whose labelsTr is taken. References without a prediction are not
    scored; unpredicted() tells how many. Writes <protocol>.csv and <protocol>.json into output, default predictions.
    """
    rules = [protocol_named(name) for name in protocols]
    folder = _label_folder(reference)
    cases = sorted(find_label_files(predictions))
    done: list[str] = []

    def count(case: str) -> None:
        done.append(case)
        report(len(done), len(cases), case)

    scores = score_folder(predictions, folder, rules, cases=cases, workers=workers, progress=count)
    caveat = read_caveat(predictions)
    summaries = {name: summarise(each, caveat) for name, each in scores.items()}
    for name, each in scores.items():
        write_scores((output or predictions) / f"{name}.csv", each)
        write_summary((output or predictions) / f"{name}.json", summaries[name])
    return summaries
