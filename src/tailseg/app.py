"""The verbs: each puts the parts together for one job. The command line calls these, and so can a notebook.

from tailseg.app import evaluate, predict, train
from tailseg.recipe import load_recipe

run = train(load_recipe(Path("recipes/synapse_mini/dhc_20p.yaml"), ["seed=1"]), Path("runs/dhc"))
predict(run, "test", Path("runs/dhc/predictions"))
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tailseg.components import make_build, make_method, method_cards
from tailseg.core import Method, Task
from tailseg.data.check import CheckReport, check_dataset
from tailseg.data.companions import CompanionStore
from tailseg.data.prepare import prepare_dataset
from tailseg.data.raw import Case, DataError, RawDataset, load_images, load_label, read_raw
from tailseg.data.splits import Split, read_split
from tailseg.data.store import Store, TrainingStore
from tailseg.data.stream import PatchSampler, PatchStream
from tailseg.evaluate.clean_up import CleanUp, Judged, merged
from tailseg.evaluate.clean_up import choose_clean_up as choose_clean_up_on
from tailseg.evaluate.mirror import Mirror
from tailseg.evaluate.predict import Ensemble, FileFormat, Maker, Output, Predictor, find_cases, predict_cases
from tailseg.evaluate.protocols import protocol_named
from tailseg.evaluate.scores import find_label_files, read_caveat, score_folder, write_scores
from tailseg.evaluate.summary import Summary, summarise, write_summary
from tailseg.evaluate.validate import Validator
from tailseg.files import write_json, write_text
from tailseg.options import OptionError, suggest
from tailseg.recipe import Recipe, load_recipe
from tailseg.runtime import Precision, Runtime, RuntimeOptions, choose_device, start_runtime
from tailseg.train.checkpoint import dump_task, load_checkpoint, load_task
from tailseg.train.fit import Trainer
from tailseg.train.metrics_log import read_metrics
from tailseg.train.watch import Watch

if TYPE_CHECKING:
    from tailseg.export.write import Exported
    from tailseg.report.collect import Card, Trained

Report = Callable[[int, int, str], None]
"""Told (done, total, case) after every case of a long job."""

MAY_CHANGE_ON_RESUME = {"train.epochs", "train.device", "train.threads", "train.compile", "data.workers", "data.store"}


METRICS_FILE = "metrics.jsonl"
CLEAN_UP_FILE = "clean_up.json"
RUN_FILE = "run.json"
"""Written by `tailseg run` into its folder, which holds the runs of several folds and of the reference."""


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


def trained_steps(folder: Path) -> tuple[int, int]:
    """(steps done at the last checkpoint, steps of the whole run). Raises CheckpointError or OptionError."""
    recipe = load_recipe(folder / "recipe.yaml")
    split = Split.from_dict(json.loads((folder / "split.json").read_text(encoding="utf-8")))
    return load_checkpoint(folder / "last.pt")["step"], recipe.train.epochs * steps_per_epoch(recipe, split)


def member_runs(folder: Path) -> list[Path]:
    """The run itself; or, of a folder that `tailseg run` made, the method's run of every fold. Raises OptionError."""
    if not (folder / RUN_FILE).exists():
        return [folder]
    folds = json.loads((folder / RUN_FILE).read_text(encoding="utf-8")).get("folds", [])
    members = [folder / fold for fold in folds]
    if not folds or not all((member / "last.pt").exists() for member in members):
        raise OptionError(f"The run in {folder} is not trained yet; call `tailseg run` again, which goes on with it.")
    return members


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
    checkpoint: Path

    @property
    def digest(self) -> str:
        """sha256 of the checkpoint file."""
        with self.checkpoint.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


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
    return TrainedRun(folder, recipe, task, method, split, tuple(state["label_values"]), state["step"], path)


def export(
    folder: Path,
    file_format: str,
    output: Path | None = None,
    *,
    fold: str | None = None,
    checkpoint: str = "best",
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Exported:
    """The trained network for others to use, described and checked against TailSeg's own prediction.

    folder: a run, or what `tailseg run` made: then the average over its folds, or the one named. output: default
    <folder>/export/<format>. say: told what is being done. Raises OptionError or ExportError.
    """
    from tailseg.export.trained import TrainedModel  # torch.export costs seconds that other verbs should not
    from tailseg.export.write import write_export

    members = member_runs(folder)
    if fold is not None:
        names = [member.name for member in members]
        if fold not in names:
            raise OptionError(f"{folder} has no {fold}. {suggest(fold, names)}")
        members = [members[names.index(fold)]]
    runs = [load_run(member, checkpoint) for member in members]
    dataset, unreachable = None, ""
    try:
        dataset = read_raw(runs[0].recipe.data.root)
    except (DataError, OSError) as error:
        unreachable = str(error)
    model = TrainedModel(
        source=folder,
        folders=tuple(members),
        recipes=tuple(run.recipe for run in runs),
        methods=tuple(run.method for run in runs),
        splits=tuple(run.split for run in runs),
        steps=tuple(run.step for run in runs),
        label_values=runs[0].label_values,
        checkpoint=checkpoint,
        versions=load_checkpoint(members[0] / f"{checkpoint}.pt")["versions"],
        dataset=dataset,
        unreachable=unreachable,
    )
    return write_export(model, file_format, output or folder / "export" / file_format, force=force, say=say)


def predict(
    run_folder: Path | Sequence[Path],
    source: str | Path,
    output: Path,
    *,
    checkpoint: str = "best",
    device: str = "auto",
    precision: Precision | None = None,
    save_probs: bool = False,
    mirror: Sequence[str] = (),
    uncertainty: bool = False,
    clean_up: bool = False,
    file_format: FileFormat = "nifti",
    resume: bool = False,
    force: bool = False,
    report: Report = silent,
) -> list[Path]:
    """Segment scans on their own grid. source: a file, a folder of `<case>_0000.nii.gz`, DICOM series or pictures, or 'test',
    'val' or 'unlabelled': that set of the runs' split. Returns the label files; labels.json beside them names the classes,
    volumes.csv says how much of each there is, prediction.json who made them.

    run_folder: a run, the folder of `tailseg run` (its folds), or several of either, whose probabilities are averaged.
    mirror: axes along which the scan is also seen mirrored (evaluate.mirror). uncertainty: also write entropy, and where
    several networks, runs or views are asked, their disagreement. clean_up: apply what choose_clean_up found for every run,
    finding it first where that was not done. file_format: 'dicom-seg' for DICOM series. resume: keep finished cases; force:
    replace predictions of other runs or options, which are otherwise refused (evaluate.prediction_folder).
    """
    runs = load_runs([run_folder] if isinstance(run_folder, Path) else run_folder, checkpoint)
    cases = _cases_of(runs, source)
    predictors = [_predictor(run, device, precision) for run in runs]
    task = runs[0].task
    mirrored = Mirror(tuple(mirror), task.classes, task.spatial_dims) if mirror else None
    chosen: Mapping[str, Sequence[str]] = {}
    if clean_up:
        chosen = merged([_clean_up_of(*pair, report) for pair in zip(runs, predictors, strict=True)])
    told = [
        {"folder": str(run.folder), "method": run.recipe.method.name, "checkpoint": run.checkpoint.stem}
        | {"step": run.step, "sha256": run.digest}
        for run in runs
    ]
    return predict_cases(
        Ensemble(tuple(predictors), mirrored),
        cases,
        output,
        label_values=runs[0].label_values,
        output=Output(save_probs, uncertainty, chosen, file_format),
        maker=Maker(
            runs=[each["sha256"] for each in told],
            options={"precision": precision},
            name=" + ".join(dict.fromkeys(run.recipe.method.name for run in runs)),
            about={"runs": told, "versions": versions()},
            notes=_notes_on_mirroring(runs, mirrored),
        ),
        resume=resume,
        force=force,
        report=report,
    )


def load_runs(folders: Sequence[Path], checkpoint: str = "best") -> list[TrainedRun]:
    """The runs in these folders; those of `tailseg run` hold several. Raises OptionError if they cannot be averaged."""
    members = [member for folder in folders for member in member_runs(folder)]
    for index, member in enumerate(members):
        if member.resolve() in [other.resolve() for other in members[:index]]:
            raise OptionError(f"The run {member} is given twice; give each once.")
    runs = [load_run(member, checkpoint) for member in members]
    first, *others = runs
    for other in others:
        for what, ours, theirs in (
            ("classes", first.task.classes, other.task.classes),
            ("values of the labels", first.label_values, other.label_values),
            ("number of channels", first.task.in_channels, other.task.in_channels),
            ("number of dimensions", first.task.spatial_dims, other.task.spatial_dims),
        ):
            if ours != theirs:
                raise OptionError(
                    f"Runs of different {what} cannot be averaged: {first.folder} has {ours}, {other.folder} has {theirs}; "
                    "predict with each alone."
                )
    return runs


def choose_clean_up(
    run_folder: Path,
    *,
    checkpoint: str = "best",
    device: str = "auto",
    precision: Precision | None = None,
    report: Report = silent,
) -> dict[str, Any]:
    """Find out on the run's validation cases which clean-up helps which class, write it to clean_up.json, and return it.

    Raises OptionError for a run without validation cases.
    """
    run = load_run(run_folder, checkpoint)
    return _choose_clean_up(run, _predictor(run, device, precision), report).to_dict()


def _clean_up_of(run: TrainedRun, predictor: Predictor, report: Report) -> CleanUp:
    """What was chosen for this very checkpoint, or is now."""
    path = run.folder / CLEAN_UP_FILE
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("sha256") == run.digest:
            return CleanUp.from_dict(values)
    return _choose_clean_up(run, predictor, report)


def _choose_clean_up(run: TrainedRun, predictor: Predictor, report: Report) -> CleanUp:
    if not run.split.val:
        raise OptionError(
            f"{run.folder} has no validation cases to choose a clean-up on; predict without clean_up (--clean-up)."
        )
    dataset = read_raw(run.recipe.data.root)

    def judged() -> Iterator[Judged]:
        for index, name in enumerate(run.split.val):
            report(index, len(run.split.val), name)
            case = dataset.cases[name]
            image = load_images(case, run.task.in_channels)
            # as in scoring: where none of the classes that were looked for is, they are known not to be
            ref = load_label(replace(case, annotated=None), dataset, image)
            known = run.task.classes if case.annotated is None else case.annotated
            left_out = [each for each in run.task.classes if each not in known]
            yield Judged(name, predictor.labels(image), ref, left_out)
            report(index + 1, len(run.split.val), name)

    chosen = choose_clean_up_on(judged(), run.task.classes)
    about = {"checkpoint": run.checkpoint.stem, "sha256": run.digest}
    write_json(run.folder / CLEAN_UP_FILE, chosen.to_dict() | about)
    return chosen


def _predictor(run: TrainedRun, device: str, precision: Precision | None) -> Predictor:
    """The run on the device, ready to predict."""
    options = RuntimeOptions(
        device=device,
        precision=precision or run.recipe.train.precision,
        channels_last=run.recipe.train.channels_last,
        threads=run.recipe.train.threads,
    )
    runtime = Runtime(choose_device(options.device), options)
    runtime.place(run.method)
    return Predictor(
        run.method,
        run.recipe.data.prepare,
        run.recipe.data.patch_size,
        runtime,
        overlap=run.recipe.evaluate.overlap,
        weighting=run.recipe.evaluate.weighting,
        batch_size=run.recipe.evaluate.batch,
    )


def _notes_on_mirroring(runs: Sequence[TrainedRun], mirror: Mirror | None) -> list[str]:
    if mirror is None:
        return []
    notes = []
    for run in runs:
        if unknown := mirror.untrained(run.recipe.data.augment.flip):
            axes = ", ".join(unknown)
            notes.append(
                f"{run.folder} never saw scans mirrored along {axes} while training (data.augment.flip): see on validation "
                "cases whether mirroring there helps it."
            )
    return notes


def _cases_of(runs: Sequence[TrainedRun], source: str | Path) -> Sequence[Case]:
    """Raises OptionError where a named set is not the same in all runs: what one validated on, another may have learnt."""
    if str(source) not in ("test", "val", "unlabelled"):
        return find_cases(Path(source), runs[0].task.in_channels)
    name, first = str(source), runs[0]
    cases = getattr(first.split, name)
    for other in runs[1:]:
        if set(getattr(other.split, name)) != set(cases) or not _same_data(first, other):
            raise OptionError(
                f"{first.folder} and {other.folder} differ in their {name} cases, of which one may have learnt what the other "
                "did not; predict with each alone, or give a folder of scans."
            )
    if not cases:
        raise OptionError(f"The split '{first.split.name}' of this run has no {name} cases.")
    dataset = read_raw(first.recipe.data.root)
    return [dataset.cases[case] for case in cases]


def _same_data(first: TrainedRun, second: TrainedRun) -> bool:
    return first.recipe.data.root.resolve() == second.recipe.data.root.resolve()


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


def report(
    folders: Sequence[Path],
    output: Path | None = None,
    *,
    protocol: str | None = None,
    cases: int = 30,
    progress: Report = silent,
) -> Path:
    """Write one offline HTML page about runs, side by side; returns its path, default <first folder>/report.html.

    folders: of runs, or of `tailseg run`. protocol: whose scores are shown; None takes native where there are such scores.
    cases: scans that are shown, as slices and in 3D. Raises ReportError for a folder that holds no run.
    """
    from tailseg.report.collect import collect, run_folders  # here: matplotlib costs half a second
    from tailseg.report.page import report_page

    members = run_folders(folders)
    material = collect(
        folders,
        protocol=protocol,
        trained={folder: trained for folder in members if (trained := _trained(folder)) is not None},
        lines={folder: read_metrics(folder / METRICS_FILE) for folder in members if (folder / METRICS_FILE).exists()},
        cards=_report_cards(),
    )
    path = output or folders[0] / "report.html"
    write_text(path, report_page(material, cases=cases, progress=progress))
    return path


def _trained(folder: Path) -> Trained | None:
    """What the run's checkpoint tells a report; None without one."""
    from tailseg.report.collect import Trained

    path = next((path for name in ("best.pt", "last.pt") if (path := folder / name).exists()), None)
    if path is None:
        return None
    run, state = load_run(folder, path.stem), load_checkpoint(path)
    parameters = sum(parameter.numel() for group in run.method.param_groups() for parameter in group["params"])
    return Trained(
        run.task.classes, run.task.class_voxels, run.step, parameters, state["versions"], run.method.caveat()
    )


def _report_cards() -> dict[str, Card]:
    from tailseg.report.collect import Card

    return {card.name: Card(card.title, card.paper, card.idea, card.needs, card.cost) for card in method_cards()}
