"""The verbs: each puts the parts together for one job. The command line calls these, and so can a notebook.

from tailseg.app import evaluate, predict, train
from tailseg.recipe import load_recipe

run = train(load_recipe(Path("recipes/synapse_mini/dhc_20p.yaml"), ["seed=1"]), Path("runs/dhc"))
predict(run, "test", Path("runs/dhc/predictions"))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from tailseg.components import make_build, make_method
from tailseg.core import Method, Task
from tailseg.data.check import CheckReport, check_dataset
from tailseg.data.companions import CompanionStore
from tailseg.data.prepare import prepare_dataset
from tailseg.data.raw import RawDataset, read_raw
from tailseg.data.splits import Split, read_split
from tailseg.data.store import Store, TrainingStore
from tailseg.data.stream import PatchSampler, PatchStream
from tailseg.evaluate.protocols import protocol_named
from tailseg.evaluate.scores import find_label_files, read_caveat, score_folder, write_scores
from tailseg.evaluate.summary import Summary, summarise, write_summary
from tailseg.evaluate.validate import Validator
from tailseg.exporting import export
from tailseg.files import write_json, write_text
from tailseg.options import OptionError
from tailseg.predicting import choose_clean_up, predict
from tailseg.progress import Report, silent
from tailseg.recipe import Recipe, load_recipe
from tailseg.reporting import report
from tailseg.runtime import Runtime, start_runtime
from tailseg.train.checkpoint import dump_task
from tailseg.train.fit import Trainer
from tailseg.train.watch import Watch
from tailseg.trained import (
    RUN_FILE,
    TrainedRun,
    load_run,
    load_runs,
    member_runs,
    steps_per_epoch,
    trained_steps,
    versions,
)

__all__ = [
    "RUN_FILE",
    "Report",
    "TrainedRun",
    "check",
    "choose_clean_up",
    "evaluate",
    "export",
    "load_run",
    "load_runs",
    "make_task",
    "member_runs",
    "predict",
    "prepare",
    "report",
    "silent",
    "steps_per_epoch",
    "train",
    "trained_steps",
    "unpredicted",
    "versions",
]

MAY_CHANGE_ON_RESUME = {"train.epochs", "train.device", "train.threads", "train.compile", "data.workers", "data.store"}


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
            send=runtime.sender(task.spatial_dims),
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
            "data.augment.rotate, rot90 and scale move the voxels of a patch, but not what was cached of whole scans; leave"
            " them out, or let the teacher see the patches themselves (method.features=live)."
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
