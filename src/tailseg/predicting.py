"""The verb predict: whole scans, by one run or several, and the clean-up that validation cases call for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tailseg.data.raw import Case, load_images, load_label, read_raw
from tailseg.evaluate.clean_up import CleanUp, Judged, merged
from tailseg.evaluate.clean_up import choose_clean_up as choose_clean_up_on
from tailseg.evaluate.mirror import Mirror
from tailseg.evaluate.predict import Ensemble, FileFormat, Maker, Output, Predictor, find_cases, predict_cases
from tailseg.files import write_json
from tailseg.options import OptionError
from tailseg.progress import Report, silent
from tailseg.runtime import Precision, Runtime, RuntimeOptions, choose_device
from tailseg.trained import TrainedRun, load_run, load_runs, versions

CLEAN_UP_FILE = "clean_up.json"


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
