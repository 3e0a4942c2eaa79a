"""Which scans the page shows, and why: the worst and the best of the scored ones, and some of those without a reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tailseg.data.cases import Case, RawDataset
from tailseg.data.errors import ImageError
from tailseg.report.collect import SET_TITLES, CaseSet, Group, Material, Run, Scored
from tailseg.report.numbers import factor, fixed
from tailseg.report.slices import Slice, SliceError, case_slice

WORST, BEST = 4, 2
"""Scored cases that are shown at once; the others are folded."""


@dataclass(frozen=True)
class Found:
    """What is to be told of one class of one case, where it went wrong."""

    text: str
    css: str


@dataclass(frozen=True)
class CaseView:
    """scores: (run, mean Dice in %). found: the worst classes. maps: names of the drawn label maps, the reference first where
    there is one. cut: None where it could not be drawn; then why says so."""

    case: str
    scores: tuple[tuple[str, str], ...]
    found: tuple[Found, ...]
    maps: tuple[str, ...]
    cut: Slice | None
    why: str = ""


@dataclass(frozen=True)
class Gallery:
    """folded: cases that are shown on demand."""

    title: str
    text: str
    shown: tuple[CaseView, ...]
    folded: tuple[CaseView, ...] = ()


@dataclass(frozen=True)
class Shown:
    """A scan that the page shows, for the 3D viewer. score: mean Dice of 1; None without one."""

    case: str
    cases_of: CaseSet
    images: tuple[Path, ...]
    prediction: Path
    reference: Path | None
    score: float | None
    label_values: Mapping[str, int]


@dataclass(frozen=True)
class Galleries:
    galleries: tuple[Gallery, ...]
    shown: tuple[Shown, ...]


def galleries(material: Material, limit: int, progress: Callable[[int, int, str], None]) -> Galleries:
    """limit: scans in all. Where there are both kinds, scored ones get two thirds of them, and what the others leave."""
    if material.dataset is None:
        return Galleries((), ())
    plan = _plan(material, limit)
    total, done = sum(len(cases) for _, cases in plan), 0
    made: list[Gallery] = []
    shown: list[Shown] = []
    for source, cases in plan:
        views = []
        for case in cases:
            progress(done, total, case)
            done += 1
            if isinstance(source, Group):
                view, one = _scored_view(source, case, material.dataset)
            else:
                view, one = _unlabelled_view(source, case, material.dataset, material.classes)
            views.append(view)
            shown += [one] if one and view.cut else []
        if isinstance(source, Group):
            made.append(_scored_gallery(source, views))
        else:
            text = (
                "Nobody labelled these scans: what you see was predicted, and only looking tells whether it is right."
            )
            title = f"Unlabelled scans, predicted by {source.name}"
            made.append(Gallery(title, text, tuple(views[: WORST + BEST]), tuple(views[WORST + BEST :])))
    progress(total, total, "")
    return Galleries(tuple(made), tuple(shown))


def _plan(material: Material, limit: int) -> list[tuple[Group | Run, list[str]]]:
    """Which cases of which scores and predictions are shown."""
    scored = [(group, _ranked(group)) for group in material.groups]
    unlabelled = [(run, list(run.unlabelled.files)) for run in material.runs if run.unlabelled]
    count = sum(len(cases) for _, cases in unlabelled)
    left = max(limit - min(count, limit // 3), 0)
    plan: list[tuple[Group | Run, list[str]]] = []
    for group, ranked in scored:
        plan.append((group, _ends(ranked, left)))
        left -= len(plan[-1][1])
    left = limit - sum(len(cases) for _, cases in plan)
    for run, cases in unlabelled:
        plan.append((run, cases[:left]))
        left -= len(plan[-1][1])
    return [(source, cases) for source, cases in plan if cases]


def _main(group: Group) -> tuple[Run, Scored]:
    """The run that the cases are ranked by: the first that learnt from unlabelled scans."""
    run = next((run for run in group.runs if not run.labelled_only), group.runs[0])
    assert run.scored is not None
    return run, run.scored


def _mean_dice(scored: Scored, case: str) -> float:
    """Of 1: mean over the classes that are in the case, or predicted there."""
    dice = _dice(scored, case)
    return float(np.nanmean(dice)) if np.isfinite(dice).any() else math.nan


def _dice(scored: Scored, case: str) -> np.ndarray:
    """(classes,) of 1; NaN where the class is neither there nor predicted, whatever the protocol counts that as."""
    scores = scored.scores
    at = scores.cases.index(case)
    dice = scores.metric("dice")[at] * factor(scores.protocol, "dice") / 100
    return np.where(scores.absent[at] | ~scores.looked_for[at], np.nan, dice)


def _ranked(group: Group) -> list[str]:
    """Worst first; of those that still have label files."""
    _, scored = _main(group)
    told = [(case, _mean_dice(scored, case)) for case in scored.scores.cases if case in scored.files]
    return [case for case, _ in sorted(told, key=lambda one: (math.isnan(one[1]), one[1]))]


def _ends(ranked: list[str], count: int) -> list[str]:
    """The worst two thirds of count, and the best of the rest."""
    worst = math.ceil(count * 2 / 3)
    return ranked if count >= len(ranked) else [*ranked[:worst], *ranked[len(ranked) - (count - worst) :]]


def _scored_gallery(group: Group, views: Sequence[CaseView]) -> Gallery:
    run, scored = _main(group)
    worst, best = views[:WORST], views[WORST:][-BEST:]
    which = f"The {len(worst)} worst and the {len(best)} best" if best else "The worst first,"
    text = (
        f"{which} by mean Dice of {run.name} over the classes. Each is cut where most of its rare and failed classes are in "
        "sight. Solid: predicted; dashed: the reference."
    )
    title = f"Scored scans ({SET_TITLES[scored.cases_of]} cases)"
    return Gallery(title, text, (*worst, *best), tuple(views[len(worst) : len(views) - len(best)]))


def _scored_view(group: Group, case: str, dataset: RawDataset) -> tuple[CaseView, Shown | None]:
    scores = tuple((run.name, fixed(100 * _mean_dice(run.scored, case))) for run in group.runs if run.scored)
    _, scored = _main(group)
    classes, dice = scored.scores.classes, _dice(scored, case)
    found = _found(scored, case, dice)
    raw = dataset.cases.get(case)
    if raw is None:
        return CaseView(case, scores, found, (), None, f"{case} is no longer in {dataset.root}."), None
    labels: dict[str, Path] = {}
    values: dict[str, list[int]] = {}
    if raw.label is not None:
        by_name = dict(zip(dataset.classes, dataset.label_values, strict=True))
        labels["reference"], values["reference"] = raw.label, [by_name.get(name, 0) for name in classes]
    for run in group.runs:
        if run.scored and case in run.scored.files:
            labels[run.name] = run.scored.files[case]
            values[run.name] = [run.scored.label_values.get(name, 0) for name in classes]
    rare = np.array([one.rare for one in scored.summary.classes])
    weights = np.where(np.isnan(dice), 0.0, 0.15 + (1 - np.nan_to_num(dice)) + 0.6 * rare).tolist()
    cut, why = _cut(raw, labels, values, weights)
    mean = _mean_dice(scored, case)
    shown = Shown(
        case, scored.cases_of, raw.images, scored.files[case], raw.label,
        mean if math.isfinite(mean) else None, scored.label_values,
    )  # fmt: skip
    return CaseView(case, scores, found, tuple(labels), cut, why), shown


def _found(scored: Scored, case: str, dice: np.ndarray) -> tuple[Found, ...]:
    scores = scored.scores
    at = scores.cases.index(case)
    missed = [name for name, gone in zip(scores.classes, scores.missed[at], strict=True) if gone]
    invented = [name for name, made in zip(scores.classes, scores.invented[at], strict=True) if made]
    found = [Found(f"missed: {name}", "hurt") for name in missed]
    found += [Found(f"invented: {name}", "hurt") for name in invented]
    for k in np.argsort(np.where(np.isnan(dice), np.inf, dice), kind="stable"):
        if len(found) >= 5 or not np.isfinite(dice[k]):
            break
        if scores.classes[k] not in (*missed, *invented):
            found.append(Found(f"{scores.classes[k]} {fixed(100 * float(dice[k]), 0)} %", ""))
    return tuple(found[:6])


def _unlabelled_view(run: Run, case: str, dataset: RawDataset, classes: Sequence[str]) -> tuple[CaseView, Shown | None]:
    assert run.unlabelled is not None
    told, file, raw = run.unlabelled.label_values, run.unlabelled.files[case], dataset.cases.get(case)
    if raw is None:
        return CaseView(case, (), (), (), None, f"{case} is no longer in {dataset.root}."), None
    values = {run.name: [told.get(name, 0) for name in classes]}
    cut, why = _cut(raw, {run.name: file}, values, _rarity(run, classes))
    return CaseView(case, (), (), (run.name,), cut, why), Shown(case, "unlabelled", raw.images, file, None, None, told)


def _rarity(run: Run, classes: Sequence[str]) -> list[float]:
    """Rarer classes weigh more: by the rank of their voxels among the labelled scans."""
    trained = run.members[0].trained
    if trained is None or tuple(trained.classes[1:]) != tuple(classes):
        return [1.0] * len(classes)
    ranks = np.argsort(np.argsort(trained.class_voxels[1:], kind="stable"), kind="stable")
    return (1.5 - ranks / max(len(classes) - 1, 1)).tolist()


def _cut(
    raw: Case, labels: Mapping[str, Path], values: Mapping[str, Sequence[int]], weights: Sequence[float]
) -> tuple[Slice | None, str]:
    try:
        return case_slice(raw.images, labels, values, weights), ""
    except (SliceError, ImageError) as error:
        return None, str(error)
