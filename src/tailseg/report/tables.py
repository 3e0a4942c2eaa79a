"""The verdict and the scores as rows of text, ready for the page: numbers rounded, intervals drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tailseg.evaluate.metrics import METRICS
from tailseg.evaluate.protocols import Protocol, protocol_named
from tailseg.evaluate.scores import Scores
from tailseg.evaluate.summary import ALL_CLASSES, ClassSummary, MetricSummary
from tailseg.evaluate.verdict import ClassVerdict, Verdict
from tailseg.report import charts
from tailseg.report.collect import Group, Run
from tailseg.report.numbers import NONE, factor, fixed, p_value, per_case, percent, signed, title, unit

_WIDTH, _HEIGHT = 148, 24
_CSS = {"helped": "helped", "hurt": "hurt", "can't tell": "unsure"}


@dataclass(frozen=True)
class VerdictRow:
    """share_value, difference_value: for sorting. forest: SVG of the difference with its interval."""

    name: str
    colour: str
    rare: bool
    share: str
    share_value: float
    reference: str
    method: str
    difference: str
    difference_value: float
    interval: str
    forest: str
    p: str
    answer: str
    css: str
    why: str


@dataclass(frozen=True)
class VerdictView:
    """rows: the rarest first. axis: SVG of the scale above the intervals. counts: answer -> classes."""

    sentence: str
    unit: str
    metric: str
    counts: Sequence[tuple[str, str, int]]
    overall: VerdictRow
    rows: tuple[VerdictRow, ...]
    axis: str
    notes: tuple[str, ...]
    scored: str
    cases: str


def verdict_view(verdict: Verdict, colours: Mapping[str, str]) -> VerdictView:
    protocol = protocol_named(verdict.protocol)
    scale = factor(protocol, verdict.metric)
    limit = _limit((*verdict.classes, verdict.overall), scale)
    rows = [_row(one, colours.get(one.name, "var(--text)"), scale, limit) for one in verdict.classes]
    rows.sort(key=lambda row: row.share_value)
    answers = ("helped", "hurt", "can't tell")
    return VerdictView(
        sentence=verdict.sentence,
        unit=unit(protocol, verdict.metric),
        metric=METRICS[verdict.metric].title,
        counts=tuple((answer, _CSS[answer], len(verdict.named(answer))) for answer in answers),
        overall=replace(_row(verdict.overall, "", scale, limit), share=""),
        rows=tuple(rows),
        axis=_axis(limit),
        notes=verdict.notes,
        scored="test" if verdict.scored == "test" else "validation",
        cases=per_case(verdict.cases, "case"),
    )


def _row(one: ClassVerdict, colour: str, scale: float, limit: float) -> VerdictRow:
    test = one.test
    first, second, difference, low, high = (
        scale * value for value in (test.first, test.second, test.difference, test.low, test.high)
    )
    css = _CSS[one.answer]
    return VerdictRow(
        name=one.name,
        colour=colour,
        rare=one.rare,
        share=percent(one.share),
        share_value=one.share,
        reference=fixed(second),
        method=fixed(first),
        difference=signed(difference),
        difference_value=difference if math.isfinite(difference) else -math.inf,
        interval=f"{signed(low)} to {signed(high)}" if test.cases > 1 else NONE,  # of one case there is none
        forest=_forest(difference, low, high, limit, css) if math.isfinite(difference) else "",
        p=p_value(one.adjusted_p),
        answer=one.answer,
        css=css,
        why=one.why[:1].upper() + one.why[1:] + ".",
    )


def _limit(classes: Sequence[ClassVerdict], scale: float) -> float:
    """Of the shared scale, a round number."""
    ends = [abs(scale * end) for one in classes for end in (one.test.low, one.test.high) if math.isfinite(end)]
    largest = max(ends, default=1.0) or 1.0
    power = 10 ** math.floor(math.log10(largest))
    return next(step * power for step in (1, 2, 3, 4, 5, 6, 8, 10) if step * power >= largest * 0.999)


def _x(value: float, limit: float) -> float:
    return round((value / limit + 1) / 2 * (_WIDTH - 16) + 8, 1)


def _forest(difference: float, low: float, high: float, limit: float, css: str) -> str:
    middle, y = _x(0, limit), _HEIGHT / 2
    label = f"difference {signed(difference)}, 95 % interval {signed(low)} to {signed(high)}"
    return (
        f'<svg class="forest {css}" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img" '
        f'aria-label="{label}"><line class="zero" x1="{middle}" x2="{middle}" y1="0" y2="{_HEIGHT}"/>'
        f'<line class="interval" x1="{_x(low, limit)}" x2="{_x(high, limit)}" y1="{y}" y2="{y}"/>'
        f'<circle cx="{_x(difference, limit)}" cy="{y}" r="4.5"/></svg>'
    )


def _axis(limit: float) -> str:
    ticks = "".join(
        f'<text x="{_x(value, limit)}" y="11" text-anchor="{anchor}">{signed(value, 0 if limit >= 2 else 1)}</text>'
        for value, anchor in ((-limit, "start"), (0.0, "middle"), (limit, "end"))
    )
    return f'<svg class="forest-axis" viewBox="0 0 {_WIDTH} 14" width="{_WIDTH}" height="14" aria-hidden="true">{ticks}</svg>'


@dataclass(frozen=True)
class Cell:
    """mean ± std, and the interval beneath."""

    value: str
    spread: str
    interval: str


@dataclass(frozen=True)
class RunRow:
    run: str
    style: int
    cells: tuple[Cell, ...]
    counts: tuple[str, str, str, str]


@dataclass(frozen=True)
class ClassRows:
    name: str
    colour: str
    rare: bool
    share: str
    runs: tuple[RunRow, ...]


@dataclass(frozen=True)
class GroupView:
    """charts: (wide, narrow) SVG of each metric against voxel share."""

    title: str
    metrics: tuple[str, ...]
    overall: ClassRows
    rows: tuple[ClassRows, ...]
    charts: tuple[tuple[str, str, str], ...]
    protocol: tuple[str, ...]
    runs: tuple[tuple[str, int], ...]


def shown_metrics(protocol: Protocol) -> tuple[str, ...]:
    """Columns of the table: overlaps first, volumes left out."""
    order = ("dice", "nsd", "hd95", "asd")
    return tuple(name for name in order if name in protocol.metrics)


def group_view(group: Group, colours: Mapping[str, str], styles: Mapping[str, int]) -> GroupView:
    scores = group.scored.scores
    protocol, metrics = scores.protocol, shown_metrics(scores.protocol)
    summaries = [(run, run.scored.summary) for run in group.runs if run.scored]
    # every run was scored against the same reference: the shares are those of any
    order = sorted(range(len(scores.classes)), key=lambda k: summaries[0][1].classes[k].share)
    rows = tuple(
        ClassRows(
            name=scores.classes[k],
            colour=colours.get(scores.classes[k], "var(--text)"),
            rare=summaries[0][1].classes[k].rare,
            share=percent(summaries[0][1].classes[k].share),
            runs=tuple(_run_row(run, summary.classes[k], protocol, metrics, styles) for run, summary in summaries),
        )
        for k in order
    )
    overall = ClassRows(
        ALL_CLASSES,
        "",
        False,
        "",
        tuple(
            RunRow(
                run.name,
                styles[run.name],
                tuple(_cell(summary.overall[name], protocol, name) for name in metrics),
                ("", *_totals(summary.scores)),
            )
            for run, summary in summaries
        ),
    )
    return GroupView(
        title=group.title,
        metrics=tuple(title(protocol, name) for name in metrics),
        overall=overall,
        rows=rows,
        charts=_charts(group, protocol, colours, styles),
        protocol=tuple(protocol.describe().splitlines()),
        runs=tuple((run.name, styles[run.name]) for run in group.runs),
    )


def _totals(scores: Scores) -> tuple[str, str, str]:
    return str(int(scores.missed.sum())), str(int(scores.invented.sum())), str(int(scores.absent.sum()))


def _run_row(
    run: Run, one: ClassSummary, protocol: Protocol, metrics: Sequence[str], styles: Mapping[str, int]
) -> RunRow:
    counted = max((one.metrics[name].counted for name in metrics), default=0)
    return RunRow(
        run.name,
        styles[run.name],
        tuple(_cell(one.metrics[name], protocol, name) for name in metrics),
        (str(counted), str(one.missed), str(one.invented), str(one.absent)),
    )


def _cell(metric: MetricSummary, protocol: Protocol, name: str) -> Cell:
    scale = factor(protocol, name)
    spread = "" if metric.std is None or metric.counted < 2 else f"±{fixed(scale * metric.std)}"
    interval = f"{fixed(scale * metric.low)} to {fixed(scale * metric.high)}" if metric.counted > 1 else ""
    return Cell(fixed(scale * metric.mean), spread, interval)


def _charts(
    group: Group, protocol: Protocol, colours: Mapping[str, str], styles: Mapping[str, int]
) -> tuple[tuple[str, str, str], ...]:
    scores = group.scored.scores
    summaries = [(run, run.scored.summary) for run in group.runs if run.scored]
    shares = [one.share for one in summaries[0][1].classes]
    drawn = []
    distance = next((name for name in ("hd95", "asd", "assd") if name in protocol.metrics), None)
    for name in ("dice", *([distance] if distance else [])):
        scale, is_distance = factor(protocol, name), METRICS[name].kind == "distance"
        points = []
        for run, summary in summaries:
            told = [one.metrics[name] for one in summary.classes]
            mean, low, high = ([scale * getattr(one, end) for one in told] for end in ("mean", "low", "high"))
            if is_distance:  # a logarithmic axis has no 0
                mean, low, high = ([max(value, 0.05) for value in ends] for ends in (mean, low, high))
            points.append(charts.Points(mean, low, high, styles[run.name]))
        told = [value for one in points for value in one.mean]
        if not np.isfinite(told).any():
            continue
        wide, narrow = (
            charts.against_share(
                scores.classes,
                [colours.get(one, "#888888") for one in scores.classes],
                shares,
                points,
                [run.name for run, _ in summaries],
                title(protocol, name),
                log=is_distance,
                limits=None if is_distance else (0, 102),
                size=size,
            )
            for size in ((860, 420), (350, 430))
        )
        drawn.append((title(protocol, name), wide, narrow))
    return tuple(drawn)
