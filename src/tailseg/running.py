"""The verb run: from a folder to a trained model, predictions, the verdict on the unlabelled scans, and a report.

Every stage leaves its files behind and is skipped when they are there, so a run that was stopped goes on where it was:

run.json                        what was asked for, and what was decided on the way
check.json                      what `tailseg check` found
plan.yaml, plan_splits.json     the recipe, with its reasons
<fold>/                         the run of the method (recipe.yaml, best.pt, metrics.jsonl, ...)
<fold>_labelled_only/           the run of the reference: one network, as many patches and steps, the method's class weights,
                                no unlabelled scans
<fold>*/predictions/<set>/      the scored cases: label files, <protocol>.csv and .json
predictions/                    every unlabelled scan
verdict.json, report.html       what came out
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tailseg import app, planning
from tailseg.data.check import CheckReport
from tailseg.data.plan import FOLDS, PlanError
from tailseg.data.raw import DataError, RawDataset, read_raw
from tailseg.data.splits import Split, read_split
from tailseg.evaluate.scores import Scores, joined, read_scores
from tailseg.evaluate.verdict import Scored, Verdict, make_verdict
from tailseg.files import write_json, write_text
from tailseg.options import OptionError
from tailseg.parts.class_weights import WeighterSpec
from tailseg.recipe import Recipe, load_recipe
from tailseg.train.metrics_log import read_metrics

RUN_FILE, CHECK_FILE, PLAN_FILE, VERDICT_FILE = app.RUN_FILE, "check.json", "plan.yaml", "verdict.json"
REFERENCE = "supervised"
REFERENCE_SUFFIX = "_labelled_only"
TRIAL_STEPS = 6  # timed before the number of steps is settled; the first is left out
TRAINING_SHARE = 0.92  # of the time that is left after timing and predicting
VALIDATION_SHARE = 0.1  # of the time of a training
PREDICTION_FACTOR = 2.5  # time of a scan's prediction on its own grid, to its validation on the prepared one
REFERENCE_COST = 0.75  # of the method's training, until both are timed

Progress = Callable[[str], AbstractContextManager[app.Report]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class RunSettings:
    """What `tailseg run` was asked for. A folder keeps to the settings it was begun with.

    recipe: a YAML file in place of a plan. hours: for everything, where the recipe is planned. folds: how many of the planned
    folds are trained; with more than one, every labelled case of theirs is scored once. reference: whether labelled-only
    training is run beside the method.
    """

    data: str
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    hours: float = 8.0
    device: str = "auto"
    method: str | None = None
    split: str | None = None
    test: tuple[str, ...] = ()
    folds: int | Literal["all"] = 1
    reference: bool = True
    store: str = "stores"


@dataclass(frozen=True)
class Finished:
    """Where everything lies. members: the method's runs, one for each fold. verdict: None without a reference, or where nothing
    could be scored."""

    folder: Path
    members: tuple[Path, ...]
    predictions: Path | None
    verdict: Verdict | None
    report: Path
    seconds: float


class Stopped(KeyboardInterrupt):
    """The run was stopped by a signal; its state is on the disk."""


class CheckFailed(OptionError):
    """The data set holds errors that keep it from being trained on."""

    def __init__(self, report: CheckReport) -> None:
        first = report.of("error")[0]
        count = len(report.of("error"))
        super().__init__(
            f"{report.root} holds {count} error{'s' * (count != 1)}; the first: {first.text} Run `tailseg check` for all of "
            "them, correct the data, and call `tailseg run` again."
        )
        self.report = report


def run(
    settings: RunSettings,
    out: Path,
    *,
    workers: int = 1,
    say: Say = lambda text: None,
    progress: Progress = lambda what: contextlib.nullcontext(app.silent),
) -> Finished:
    """Check, plan, prepare, train with and without the unlabelled scans, predict, evaluate, and report, in out.

    Called again on the same folder it goes on where it was. Raises OptionError for a folder begun with other settings,
    CheckFailed for data with errors, Stopped on a signal while training.
    """
    return _Job(settings, out, workers, say, progress).run()


class _Job:
    def __init__(self, settings: RunSettings, out: Path, workers: int, say: Say, progress: Progress) -> None:
        self.settings, self.out, self.workers, self.say, self.progress = settings, out, workers, say, progress
        self.root = Path(settings.data)
        self.began = time.monotonic()

    def run(self) -> Finished:
        self._refuse()
        state = self._claim()
        self._check(state)
        recipe = self._plan()
        dataset = read_raw(self.root)
        splits = self._splits(dataset, recipe)
        with_unlabelled = bool(splits[0].unlabelled) and recipe.data.batch[1] > 0
        reference = self.settings.reference and with_unlabelled
        if self.settings.reference and not reference:
            self.say(
                "The method looks at no unlabelled scans: labelled-only training is what it is, and there is no verdict."
            )
        recipe = self._fit_hours(state, recipe, splits, reference)
        scored: Scored | None = "test" if splits[0].test else "val" if splits[0].val else None
        self._update(
            state,
            folds=[split.name for split in splits],
            reference=reference,
            protocol=recipe.evaluate.protocols[0],
            scored=scored,
        )
        for split in splits:
            for suffix, each in self._sides(recipe, split, reference):
                self._train(each, self.out / f"{split.name}{suffix}")
        verdict = None
        if scored:
            for split in splits:
                for suffix, _ in self._sides(recipe, split, reference):
                    self._score(self.out / f"{split.name}{suffix}", scored, recipe)
            verdict = self._verdict(splits, recipe, scored) if reference else None
        else:
            self.say("There is nothing to score on: no labelled case is left for validation or test.")
        predictions = self._predict(splits)
        page = self._report()
        return Finished(
            self.out, tuple(app.member_runs(self.out)), predictions, verdict, page, time.monotonic() - self.began
        )

    # ------------------------------------------------------------------------------------------------ before training

    def _refuse(self) -> None:
        settings = self.settings
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise OptionError(
                "`tailseg run` is one process. For several GPUs plan first (tailseg plan), then start `tailseg train` with "
                "torchrun."
            )
        if not self.root.exists():
            raise OptionError(f"No data set at {self.root}: it does not exist.")
        if self.out.resolve().is_relative_to(self.root.resolve()):
            raise OptionError(f"{self.out} lies in the data set, which is never written to; choose another --out.")
        if settings.recipe and (settings.method or settings.split or settings.test):
            raise OptionError(
                "--method, --split and --test choose what is planned; with --recipe, write method.name=..., data.split=..."
            )
        if settings.folds != 1 and (settings.test or settings.split or settings.recipe):
            raise OptionError(
                "--folds trains the planned folds, so that every labelled case is scored once; --test, --split and --recipe "
                "bring cases of their own to score. Leave one of them out."
            )

    def _claim(self) -> dict[str, Any]:
        """run.json as it is, or begun. Raises OptionError where other settings began it."""
        asked = json.loads(json.dumps(asdict(self.settings) | {"data": str(self.root.resolve())}))
        path = self.out / RUN_FILE
        if path.exists():
            state = json.loads(path.read_text(encoding="utf-8"))
            if changed := sorted(key for key in asked if state["settings"].get(key) != asked[key]):
                was = ", ".join(f"{key} {state['settings'].get(key)!r}" for key in changed)
                raise OptionError(f"{self.out} was begun with {was}; call it so again, or choose another --out.")
            return state
        if self.out.is_dir() and any(self.out.iterdir()):
            raise OptionError(f"{self.out} holds other files; choose another --out.")
        state = {"tailseg_run": 1, "data": asked["data"], "settings": asked, "versions": app.versions()}
        write_json(path, state)
        return state

    def _update(self, state: dict[str, Any], **values: Any) -> None:
        state |= values
        write_json(self.out / RUN_FILE, state)

    def _check(self, state: dict[str, Any]) -> None:
        """Once for the files as they are: a changed file is checked again."""
        files = _files_digest(self.root)
        if state.get("checked") == files and (self.out / CHECK_FILE).exists():
            return
        with self.progress("checking") as report:
            found = app.check(self.root, report, self.workers)
        write_json(self.out / CHECK_FILE, found.to_dict())
        if not found.ok:
            raise CheckFailed(found)
        warnings = len(found.of("warning"))
        self.say(
            f"checked: no errors, {warnings} warning{'s' * (warnings != 1)} (`tailseg check {self.root}` shows them)"
        )
        self._update(state, checked=files)

    def _plan(self) -> Recipe:
        """The recipe with the person's overrides; planned unless there is one."""
        path = self.out / PLAN_FILE
        settings = self.settings
        if not path.exists():
            if settings.recipe:
                recipe = load_recipe(Path(settings.recipe), settings.overrides)
                if recipe.data.root.resolve() != self.root.resolve():
                    raise OptionError(
                        f"{settings.recipe} is for {recipe.data.root}, not for {self.root}; add data.root={self.root}, or "
                        "run that folder."
                    )
                write_text(path, recipe.to_yaml())
            else:
                planned = self._planned(path)
                for note in planned.plan.notes:
                    self.say(f"note: {note}")
                self.say(f"planned: {path} says why for every choice")
        return load_recipe(path, () if settings.recipe else settings.overrides)

    def _planned(self, path: Path) -> planning.Planned:
        settings = self.settings
        trainings = (FOLDS if settings.folds == "all" else settings.folds) * (1 + REFERENCE_COST * settings.reference)
        hours = 0.9 * settings.hours / trainings
        try:
            with self.progress("looking at the data") as report:
                return planning.plan(
                    self.root,
                    path,
                    split=settings.split,
                    test=settings.test,
                    hours=hours,
                    device=settings.device,
                    method=settings.method,
                    store=Path(settings.store),
                    force=True,
                    workers=self.workers,
                    report=report,
                )
        except PlanError as error:
            told = f"Of the {settings.hours:g} hours, {hours:.2g} are for a training of the method: "
            raise OptionError(f"{told if hours < settings.hours else ''}{error}") from error

    def _splits(self, dataset: RawDataset, recipe: Recipe) -> list[Split]:
        """The folds to train."""
        names = [recipe.data.split]
        if self.settings.folds != 1:
            assert recipe.data.split_file is not None
            found = list(json.loads(recipe.data.split_file.read_text(encoding="utf-8")))
            wanted = len(found) if self.settings.folds == "all" else self.settings.folds
            if wanted > len(found):
                raise OptionError(f"--folds {wanted}: the plan has {len(found)} of them; ask for at most so many.")
            names = found[:wanted]
        return [read_split(dataset, name, recipe.data.split_file) for name in names]

    def _fit_hours(self, state: dict[str, Any], recipe: Recipe, splits: Sequence[Split], reference: bool) -> Recipe:
        """The planned number of steps is a guess of the speed: time a few, and take as many as the hours allow."""
        named = {each.partition("=")[0] for each in self.settings.overrides}
        if self.settings.recipe or named & {"train.epochs", "train.steps_per_epoch"}:
            return recipe
        if "timing" not in state:
            sides = self._sides(recipe, splits[0], reference)
            timed = [self._time(each, self.out / f".trial{suffix}") for suffix, each in sides]
            left = self.settings.hours * 3600 - (time.monotonic() - self.began)
            timing = _steps_for(recipe, splits, timed, left)
            self._update(state, timing=timing)
            self.say(timing["why"])
        return load_recipe(recipe.to_dict(), state["timing"]["overrides"])

    def _time(self, recipe: Recipe, folder: Path) -> _Timed:
        """How long a step and a validation of a recipe take here, by doing a few."""
        self.say(f"timing {TRIAL_STEPS} steps of {recipe.method.name}")
        trial = load_recipe(
            recipe.to_dict(), ["train.epochs=1", f"train.steps_per_epoch={TRIAL_STEPS}", "train.log_every=1"]
        )
        shutil.rmtree(folder, ignore_errors=True)
        with self.progress("preparing") as report:
            app.train(trial, folder, report=report, workers=self.workers)
        lines = read_metrics(folder / "metrics.jsonl")
        steps = [line["seconds_per_step"] for line in lines if line["kind"] == "train" and line["seconds_per_step"]]
        validations = [line["seconds"] for line in lines if line["kind"] == "validation"]
        done, of = app.trained_steps(folder)
        shutil.rmtree(folder, ignore_errors=True)
        if done < of:
            raise Stopped
        return _Timed(sum(steps) / len(steps), validations[-1] if validations else 0.0)

    # ------------------------------------------------------------------------------------------------------ training

    def _sides(self, recipe: Recipe, split: Split, reference: bool) -> list[tuple[str, Recipe]]:
        """(suffix of the folder, recipe): the method, and the reference on as many patches in as many steps. It weighs the
        classes as the method's first network does, so that this is not taken for help by unlabelled scans."""
        tree = recipe.to_dict()
        sides = [("", load_recipe(tree, [f"data.split={split.name}"]))]
        if reference:
            alone = {**tree, "method": {"name": REFERENCE, "weighter": _weighter(recipe)}}
            batch = f"data.batch=[{sum(recipe.data.batch)}, 0]"
            sides.append((REFERENCE_SUFFIX, load_recipe(alone, [f"data.split={split.name}", batch])))
        return sides

    def _train(self, recipe: Recipe, folder: Path) -> None:
        begun = (folder / "last.pt").exists()
        if begun:
            done, of = app.trained_steps(folder)
            if done == of:
                return
            self.say(f"going on with {folder} at step {done} of {of}")
        else:
            self.say(f"training {recipe.method.name} in {folder}")
        with self.progress("preparing") as report:
            app.train(recipe, folder, resume=begun, report=report, workers=self.workers)
        done, of = app.trained_steps(folder)
        if done < of:
            raise Stopped

    # ------------------------------------------------------------------------------------------------ after training

    def _score(self, run: Path, scored: Scored, recipe: Recipe) -> None:
        folder = run / "predictions" / scored
        if all((folder / f"{name}.json").exists() for name in recipe.evaluate.protocols):
            return
        with self.progress(f"predicting {run.name}:") as report:
            checkpoint = _checkpoint(run)
            app.predict(
                run, scored, folder, checkpoint=checkpoint, device=recipe.train.device, resume=True, report=report
            )
        with self.progress("scoring") as report:
            app.evaluate(folder, self.root, recipe.evaluate.protocols, workers=max(1, self.workers), report=report)

    def _verdict(self, splits: Sequence[Split], recipe: Recipe, scored: Scored) -> Verdict:
        protocol = recipe.evaluate.protocols[0]

        def scores(suffix: str) -> Scores:
            folders = [self.out / f"{split.name}{suffix}" / "predictions" / scored for split in splits]
            return joined([read_scores(folder / f"{protocol}.csv") for folder in folders])

        verdict = make_verdict(
            scores(""),
            scores(REFERENCE_SUFFIX),
            scored=scored,
            method=recipe.method.name,
            reference=REFERENCE,
            notes=[self._what_differs(splits[0], recipe)],
        )
        write_json(self.out / VERDICT_FILE, verdict.to_dict())
        return verdict

    def _what_differs(self, split: Split, recipe: Recipe) -> str:
        """Besides the unlabelled scans."""
        runs = [app.load_run(self.out / name, _checkpoint(self.out / name)) for name in (
            split.name, f"{split.name}{REFERENCE_SUFFIX}"
        )]  # fmt: skip
        ours, one = (sum(weight.numel() for weight in run.method.parameters() if weight.requires_grad) for run in runs)
        weighter = _weighter(recipe)
        weights = weighter if isinstance(weighter, str) else weighter["name"]
        average = f", the average of its {networks} networks included" if (networks := round(ours / one)) > 1 else ""
        return (
            f"The reference is one network on the labelled scans alone, with class weights '{weights}'. Whatever else "
            f"{recipe.method.name} does counts as help here{average}."
        )

    def _predict(self, splits: Sequence[Split]) -> Path | None:
        """Every unlabelled scan, by the networks of all folds together, cleaned up as validation told."""
        if not splits[0].unlabelled:
            return None
        members, folder = app.member_runs(self.out), self.out / "predictions"
        with self.progress("predicting the unlabelled scans:") as report:
            app.predict(
                members,
                "unlabelled",
                folder,
                checkpoint=_checkpoint(members[0]),
                device=self.settings.device,
                clean_up=bool(splits[0].val),
                resume=True,
                report=report,
            )
        return folder

    def _report(self) -> Path:
        self.say("writing the report")
        return app.report([self.out])


@dataclass(frozen=True)
class _Timed:
    """Seconds of a training step, and of one validation."""

    step: float
    validation: float


def _steps_for(recipe: Recipe, splits: Sequence[Split], timed: Sequence[_Timed], left: float) -> dict[str, Any]:
    """Overrides that make the trainings fill the time that is left, in seconds, after the prediction of all scans.

    timed: of the method, and of the reference if there is one. Raises OptionError when the time is too short.
    """
    folds, split = len(splits), splits[0]
    scans = len(split.unlabelled) * folds
    scored = sum(len(each.test or each.val) for each in splits)
    if split.val:
        a_scan = PREDICTION_FACTOR * timed[0].validation / len(split.val)
        predicting = (
            a_scan * scans + sum(PREDICTION_FACTOR * each.validation / len(split.val) for each in timed) * scored
        )
    else:
        predicting = 0.15 * left  # nothing tells how long a scan takes
    for_training = TRAINING_SHARE * (left - predicting) / folds
    validation, step = sum(each.validation for each in timed), sum(each.step for each in timed)
    epochs = recipe.train.epochs
    rounds = min(
        epochs // recipe.train.validate_every, math.floor(VALIDATION_SHARE * for_training / max(validation, 1e-9))
    )
    rounds = max(1, rounds) if validation else 0
    per_epoch = math.floor((for_training - rounds * validation) / (step * epochs))
    if per_epoch < 1:
        needed = (folds * (epochs * step + rounds * validation) / TRAINING_SHARE + predicting) / 3600
        raise OptionError(
            f"--hours is too short: {left / 3600:.2g} hours are left, and even {epochs} steps of {step:.2g} s (all trainings "
            f"together) with {predicting:.0f} s for the predictions need about {needed:.2g}; give more --hours, a cheaper "
            "--method, or --no-reference."
        )
    overrides = [f"train.steps_per_epoch={per_epoch}"]
    if rounds:
        overrides.append(f"train.validate_every={max(1, epochs // rounds)}")
    told = " and ".join(f"{each.step:.2g} s" for each in timed)
    why = (
        f"timed here: {told} a step{' (method and reference)' if len(timed) > 1 else ''}; {epochs * per_epoch} steps a training"
        f" fill the time, with about {predicting / 60:.0f} min kept for the predictions"
    )
    return {"overrides": overrides, "why": why, "steps": epochs * per_epoch}


def _weighter(recipe: Recipe) -> WeighterSpec:
    """How the method's only or first network weighs the classes, where that is an option."""
    options = recipe.method.options
    return options.get("weighter_a", options.get("weighter", "none"))


def _checkpoint(run: Path) -> str:
    """The best on validation, or the last where nothing validated."""
    return "best" if (run / "best.pt").exists() else "last"


def _files_digest(root: Path) -> str:
    """Of names, sizes and times of change of all files of a data set, which says whether it has to be read again."""
    told = hashlib.sha256()
    for path in _files(root):
        if path.is_file():
            stat = path.stat()
            told.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return told.hexdigest()


def _files(root: Path) -> list[Path]:
    """Of a table those that it names, since other things may lie beside it."""
    if root.is_dir():
        return sorted(root.rglob("*"))
    beside = [root, root.with_name("dataset.json"), root.with_name("splits.json")]
    with contextlib.suppress(DataError):  # which the check tells about
        for case in read_raw(root).cases.values():
            named = [*case.images, *([case.label] if case.label else [])]
            beside += [file for path in named for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    return beside
