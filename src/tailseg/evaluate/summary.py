"""What the scores of many cases say: per class, over the classes, and against another set of scores."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from tailseg.evaluate.metrics import METRICS
from tailseg.evaluate.scores import ScoreError, Scores
from tailseg.evaluate.statistics import (
    RESAMPLES,
    Interval,
    PairedTest,
    bootstrap_interval,
    class_mean_interval,
    holm,
    mean_of_class_means,
    paired_test,
)
from tailseg.files import write_json

ALL_CLASSES = "mean over classes"
_SHOWN = ("dice", "nsd", "hd95", "asd")  # the first three that there are fit 80 columns beside long names
_METHOD = (
    "mean and std (ddof=0) over the cases that the protocol counts; interval: 95 % BCa bootstrap over cases "
    f"({RESAMPLES} resamples, seed 0); mean over classes: of the class means, resampling cases with all their classes."
)


@dataclass(frozen=True)
class MetricSummary:
    """One metric of one class over cases, or of all classes.

    counted: values in the mean; left_out: NaN, by the protocol or for want of a surface outside IGNORE. Over all classes,
    both count classes. std: over cases with ddof=0, None over classes. All numbers are NaN if nothing is counted.
    """

    mean: float
    std: float | None
    low: float
    high: float
    counted: int
    left_out: int


@dataclass(frozen=True)
class ClassSummary:
    """cases: all of them. missed, invented, absent: cases (see Scores). share: of the reference's foreground voxels."""

    name: str
    rare: bool
    share: float
    cases: int
    missed: int
    invented: int
    absent: int
    metrics: dict[str, MetricSummary]


@dataclass(frozen=True)
class Summary:
    """overall: metric -> mean over the classes. caveat: what the numbers must not be shown without, if anything."""

    scores: Scores
    classes: tuple[ClassSummary, ...]
    overall: dict[str, MetricSummary]
    caveat: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN becomes None."""
        protocol = self.scores.protocol
        return without_nan(
            {
                "protocol": asdict(protocol) | {"text": protocol.describe()},
                "caveat": self.caveat,
                "method": _METHOD,
                "cases": self.scores.cases,
                "predictions_without_reference": self.scores.unmatched,
                "units": {name: protocol.unit(name) for name in protocol.metrics},
                "classes": [asdict(one) for one in self.classes],
                "mean_over_classes": {name: asdict(metric) for name, metric in self.overall.items()},
            }
        )


def summarise(scores: Scores, caveat: str = "") -> Summary:
    """Means over cases with their intervals. The rarest third of the classes by voxels in the reference is marked."""
    voxels = scores.ref_voxels.sum(0)  # (classes,)
    shares = voxels / max(int(voxels.sum()), 1)
    rare = set(np.argsort(voxels, kind="stable")[: len(scores.classes) // 3].tolist())
    classes = tuple(
        ClassSummary(
            name=name,
            rare=k in rare,
            share=float(shares[k]),
            cases=len(scores.cases),
            missed=int(scores.missed[:, k].sum()),
            invented=int(scores.invented[:, k].sum()),
            absent=int(scores.absent[:, k].sum()),
            metrics={metric: _over_cases(scores.metric(metric)[:, k]) for metric in scores.protocol.metrics},
        )
        for k, name in enumerate(scores.classes)
    )
    overall = {metric: _over_classes(scores.metric(metric)) for metric in scores.protocol.metrics}
    return Summary(scores, classes, overall, caveat)


def write_summary(path: Path, summary: Summary) -> None:
    write_json(path, summary.to_dict())


def summary_table(summary: Summary) -> Table:
    """For the terminal: classes in the order of the data set, the rarest marked, the protocol's rules beneath.

    Shows Dice and some surface metrics; write_summary holds them all.
    """
    scores, protocol = summary.scores, summary.scores.protocol
    shown = [name for name in _SHOWN if name in protocol.metrics][:3]
    notes = [
        *([f"CAVEAT: {summary.caveat}"] if summary.caveat else []),
        f"{len(scores.cases)} cases. Class: mean ± std (ddof=0) over cases; last row: mean and 95 % interval over cases.",
        "* among the rarest third of the classes, by voxels in the reference.",
    ]
    if scores.unmatched:
        notes.append(f"Predictions without a reference, not scored: {', '.join(scores.unmatched)}.")
    caption = escape("\n".join([*notes, protocol.describe()]))
    table = Table(caption=caption, caption_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("class", no_wrap=True)
    table.add_column("missed\ninvented\nabsent", justify="right", no_wrap=True)
    for name in shown:
        table.add_column("\n".join((METRICS[name].title, protocol.unit(name))), justify="right", no_wrap=True)
    for one in summary.classes:
        counts = f"{one.missed}/{one.invented}/{one.absent}"
        cells = [_cell(one.metrics[name], 2 if protocol.unit(name) else 3) for name in shown]
        table.add_row(escape(one.name) + " *" * one.rare, counts, *cells)
    table.add_section()
    totals = "/".join(str(int(state.sum())) for state in (scores.missed, scores.invented, scores.absent))
    cells = [_cell(summary.overall[name], 2 if protocol.unit(name) else 3) for name in shown]
    table.add_row(ALL_CLASSES, totals, *cells)
    return table


@dataclass(frozen=True)
class ComparedClass:
    """adjusted_p: the permutation test's p, adjusted by Holm for testing every class; the overall row is its own test."""

    name: str
    test: PairedTest
    adjusted_p: float


def compare_scores(first: Scores, second: Scores, metric: str = "dice") -> tuple[ComparedClass, ...]:
    """Paired tests of two sets of scores of the same cases: one for each class, and last the mean over the classes.

    That last one compares, case by case, the mean over the classes counted on both sides.
    Raises ScoreError if protocol, classes or cases differ.
    """
    if first.protocol != second.protocol:
        raise ScoreError(
            f"Scores of protocol {first.protocol.name} and of {second.protocol.name} do not compare; "
            "score both under one."
        )
    if first.classes != second.classes:
        raise ScoreError(f"Scores of the classes {first.classes} and {second.classes} do not compare.")
    if differing := sorted(set(first.cases) ^ set(second.cases)):
        raise ScoreError(f"Cases scored on one side only: {', '.join(differing)}; score the same cases on both.")
    order = [second.cases.index(case) for case in first.cases]
    a, b = first.metric(metric), second.metric(metric)[order]  # (cases, classes)
    tests = [paired_test(a[:, k], b[:, k]) for k in range(len(first.classes))]
    adjusted = holm([test.permutation_p for test in tests]).tolist()
    rows = [ComparedClass(*row) for row in zip(first.classes, tests, adjusted, strict=True)]
    neither = np.isnan(a) | np.isnan(b)
    sides = [np.where(neither, np.nan, side) for side in (a, b)]
    overall = paired_test(*(np.array([mean_of_class_means(case[None]) for case in side]) for side in sides))
    return (*rows, ComparedClass(ALL_CLASSES, overall, overall.permutation_p))


def _over_cases(values: np.ndarray) -> MetricSummary:
    kept = values[~np.isnan(values)]
    mean, std = (float(kept.mean()), float(kept.std())) if kept.size else (float("nan"), float("nan"))
    return _metric_summary(mean, std, bootstrap_interval(kept), kept.size, values.size)


def _over_classes(values: np.ndarray) -> MetricSummary:
    counted = int((~np.isnan(values)).any(axis=0).sum())
    return _metric_summary(mean_of_class_means(values), None, class_mean_interval(values), counted, values.shape[1])


def _metric_summary(mean: float, std: float | None, interval: Interval, counted: int, of: int) -> MetricSummary:
    return MetricSummary(mean, std, *interval, counted, of - counted)


def _cell(metric: MetricSummary, digits: int) -> str:
    if math.isnan(metric.mean):
        return "-"
    if metric.std is None:
        return f"{metric.mean:.{digits}f}\n{metric.low:.{digits}f}-{metric.high:.{digits}f}"
    return f"{metric.mean:.{digits}f} ±{metric.std:.{digits}f}"


def without_nan(value: Any) -> Any:
    """Plain values for JSON: NaN becomes None, tuples become lists."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
