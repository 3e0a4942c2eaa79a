"""Charts as SVG that belongs to the page: its fonts, and its colours in light and dark.

Drawn with colours that stand for the page's own, which are put in their place afterwards. Sizes are in CSS pixels.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import blended_transform_factory

from tailseg.report.numbers import short

_TEXT, _MUTED, _GRID, _PAGE, _ALARM = "#010101", "#010102", "#010103", "#010104", "#010105"
_RUNS = tuple(f"#0102{index:02x}" for index in range(8))
_OF_THE_PAGE = {
    _TEXT: "var(--text)",
    _MUTED: "var(--muted)",
    _GRID: "var(--line)",
    _PAGE: "var(--page)",
    _ALARM: "var(--hurt)",
    **{colour: f"var(--run{index})" for index, colour in enumerate(_RUNS)},
}
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
RUNS = len(_RUNS)
"""Runs that look different; beyond, they repeat."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tailseg",
    "font.family": "DejaVu Sans",  # its widths are those that place text; the page's own font is drawn
    "font.size": 10.5,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.titlecolor": _TEXT,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": _TEXT,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "path.simplify_threshold": 0.3,
}
_LONGEST = 300  # points of a curve; more are averaged together
_NOISY = 40  # points below which a running mean would hide what there is
SMOOTHED = 0.05
"""Share of a noisy curve over which its running mean is taken."""
_LONG_NUMBER = re.compile(r"\d+\.\d{3,}")
_numbers = count()


@dataclass(frozen=True)
class Line:
    """A curve. x, y: of one length; NaN makes a gap. run: whose colour it has. noisy: drawn faintly, under its running mean."""

    x: Sequence[float]
    y: Sequence[float]
    run: int = 0
    noisy: bool = False


@dataclass(frozen=True)
class Points:
    """One run's value for each class, NaN where there is none. low, high: of its interval."""

    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    run: int


def curves(
    lines: Sequence[Line],
    title: str,
    *,
    limits: tuple[float, float] | None = None,
    log: bool = False,
    alarms: Sequence[tuple[float, float]] = (),
    size: tuple[int, int] = (300, 150),
) -> str:
    """Curves over steps. alarms: (from, to) steps that are marked."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(size, title)
        for first, last in alarms:
            axes.axvspan(first, last, color=_ALARM, alpha=0.14, linewidth=0)
        for line in lines:
            x, y = _thinned(np.asarray(line.x, float), np.asarray(line.y, float))
            colour, single = _RUNS[line.run % RUNS], np.count_nonzero(np.isfinite(y)) == 1
            if line.noisy and len(y) >= _NOISY:
                axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
                y = _running_mean(y)
            axes.plot(x, y, color=colour, linewidth=1.6, marker="o" if single else "", markersize=4)
        if log:
            axes.set_yscale("log")
            _plain_log(axes, "y")
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=(1, 2, 2.5, 5, 10)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        if limits:
            axes.set_ylim(*limits)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _steps(value)))
        return _svg(figure, f"{title}: {_spoken(lines)}")


def against_share(
    classes: Sequence[str],
    colours: Sequence[str],
    shares: Sequence[float],
    runs: Sequence[Points],
    names: Sequence[str],
    title: str,
    *,
    log: bool = False,
    limits: tuple[float, float] | None = None,
    size: tuple[int, int] = (720, 340),
) -> str:
    """A value of each class over its share of the foreground, on a logarithmic axis; one marker for each run, joined.

    shares: of 1; classes of share 0 stand at the left edge.
    """
    width, height = size
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        longest = min(max(map(len, classes), default=1), 22)
        top = (6.2 * longest + 30) / height
        axes = figure.add_axes((52 / width, 44 / height, 1 - 64 / width, max(0.35, 1 - 50 / height - top)))
        x = 100 * np.asarray(shares, float)
        present = x > 0
        least = x[present].min() if present.any() else 1.0
        x = np.where(present, x, least / 3)
        axes.set_xscale("log")
        axes.set_xlim(x.min() / 1.4, x.max() * 1.4)
        _plain_log(axes, "x")
        axes.grid(visible=False, axis="x")
        for index in range(len(classes)):
            means = [points.mean[index] for points in runs if np.isfinite(points.mean[index])]
            if len(means) > 1:
                axes.plot([x[index]] * 2, [min(means), max(means)], color=_GRID, linewidth=4, solid_capstyle="round")
        for points in runs:
            _markers(axes, x, points, len(runs))
        if log:
            axes.set_yscale("log")
            _plain_log(axes, "y")
        if limits:
            axes.set_ylim(*limits)
        axes.set_ylabel(title)
        axes.set_xlabel("share of the reference's foreground voxels (%)")
        _names_above(axes, classes, colours, x, size)
        told = "; ".join(
            f"{name} "
            + ", ".join(f"{short(points.mean[index])} ({run})" for points, run in zip(runs, names, strict=True))
            for index, name in enumerate(classes)
        )
        return _svg(figure, f"{title} against voxel share: {told}")


def volumes(
    classes: Sequence[str],
    colours: Sequence[str],
    values: Mapping[str, Sequence[tuple[str, float]]],
    outlying: set[tuple[str, str]],
    *,
    unit: str = "ml",
    size: tuple[int, int] = (720, 0),
) -> str:
    """A row of points for each class: the volume of every case. outlying: (case, class), drawn larger."""
    width, height = size[0], size[1] or 64 + 22 * len(classes)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        left = min(6.4 * max(map(len, classes), default=1) + 12, 0.36 * width)
        axes = figure.add_axes((left / width, 40 / height, 1 - (left + 14) / width, 1 - 48 / height))
        rng = np.random.default_rng(0)
        for row, (name, colour) in enumerate(zip(classes, colours, strict=True)):
            held = [(case, ml) for case, ml in values.get(name, ()) if ml > 0]
            away = [(case, name) in outlying for case, _ in held]
            y = row + rng.uniform(-0.18, 0.18, len(held))
            for chosen, style in (
                (False, {"s": 16, "alpha": 0.65}),
                (True, {"s": 46, "edgecolor": _TEXT, "linewidth": 1.2}),
            ):
                kept = [index for index, is_away in enumerate(away) if is_away == chosen]
                axes.scatter([held[index][1] for index in kept], y[kept], color=colour, **style)  # pyright: ignore[reportArgumentType]
        axes.set_xscale("log")
        _plain_log(axes, "x")
        axes.set_yticks(range(len(classes)), [_cut(name, int(left / 6.4)) for name in classes])
        axes.set_ylim(len(classes) - 0.5, -0.5)
        axes.tick_params(axis="y", labelcolor=_TEXT, length=0)
        axes.set_xlabel(f"predicted volume ({unit})")
        return _svg(
            figure,
            f"Predicted volume of each class on every unlabelled scan, in {unit}; the table below names outliers.",
        )


def _axes(size: tuple[int, int], title: str) -> tuple[Figure, Axes]:
    width, height = size
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    axes = figure.add_axes((40 / width, 22 / height, 1 - 50 / width, 1 - 48 / height))
    axes.set_title(_cut(title, int(width / 6.4)))
    return figure, axes


def _markers(axes: Axes, x: np.ndarray, points: Points, runs: int) -> None:
    mean, low, high = (np.asarray(values, float) for values in (points.mean, points.low, points.high))
    colour = _RUNS[points.run % RUNS]
    axes.vlines(x, low, high, color=colour, linewidth=1.2, alpha=0.55)
    marker = MARKERS[points.run % len(MARKERS)]
    axes.plot(
        x,
        mean,
        linestyle="",
        marker=marker,
        markersize=7,
        color=colour,
        markeredgecolor=_PAGE,
        markeredgewidth=1.2,
        zorder=3,
    )


def _names_above(
    axes: Axes, classes: Sequence[str], colours: Sequence[str], x: np.ndarray, size: tuple[int, int]
) -> None:
    """Upright names, pushed apart until none lies on another, each with a line down to its place."""
    step = 13.0
    width, height = size[0] * axes.get_position().width, size[1]
    low, high = np.log10(axes.get_xlim())
    places = (np.log10(x) - low) / (high - low) * width
    order = [int(index) for index in np.argsort(places, kind="stable")]
    order = order[: int(width / step)]  # the rarest, as many as there is room for
    spread = _pushed_apart(places[order], step, width)
    across = blended_transform_factory(axes.transAxes, axes.transAxes)
    pixels = height * axes.get_position().height
    for index, at in zip(order, spread, strict=True):
        where = places[index] / width, at / width
        axes.plot(
            [where[0], where[0], where[1]], [0, 1, 1 + 14 / pixels],
            transform=across, color=_GRID, linewidth=0.8, clip_on=False, zorder=0,
        )  # fmt: skip
        axes.plot(
            [where[1]],
            [1 + 18 / pixels],
            transform=across,
            marker="s",
            markersize=5,
            color=colours[index],
            clip_on=False,
        )
        axes.text(
            where[1], 1 + 25 / pixels, _cut(classes[index], 22),
            transform=across, rotation=90, ha="center", va="bottom", fontsize=10,
        )  # fmt: skip


def _pushed_apart(places: np.ndarray, step: float, width: float) -> list[float]:
    """places, rising, moved as little as is easy so that neighbours are step apart within 0 .. width."""
    groups: list[list[float]] = []  # [sum of wanted first places, members]
    for index, place in enumerate(places):
        groups.append([place - index * step, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, members = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += members
    firsts = [total / members for total, members in groups for _ in range(int(members))]
    last = (len(places) - 1) * step
    return [float(np.clip(first, 0, max(width - last, 0))) + index * step for index, first in enumerate(firsts)]


def _plain_log(axes: Axes, which: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    low, high = sorted(axes.get_xlim() if which == "x" else axes.get_ylim())
    if high < 20 * low:  # less than two powers of ten: one label would say nothing of the axis
        axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(x) <= _LONGEST:
        return x, y
    parts = np.array_split(np.arange(len(x)), _LONGEST)
    means = [np.nan if np.isnan(y[part]).all() else np.nanmean(y[part]) for part in parts]
    return np.array([x[part].mean() for part in parts]), np.array(means)


def _running_mean(y: np.ndarray) -> np.ndarray:
    """Over SMOOTHED of the curve around each point, fewer at the ends; NaN stays NaN."""
    window = np.ones(max(3, round(SMOOTHED * len(y))))
    held = np.isfinite(y)
    counts = np.convolve(held, window, "same")
    return np.where(held, np.convolve(np.where(held, y, 0), window, "same") / np.maximum(counts, 1), np.nan)


def _steps(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(length - 1, 1)] + "…"


def _spoken(lines: Sequence[Line]) -> str:
    """First and last value of every line, for who cannot see them."""
    told = []
    for line in lines:
        held = [value for value in line.y if np.isfinite(value)]
        if held:
            told.append(f"from {held[0]:.3g} to {held[-1]:.3g}")
    return "; ".join(told) or "no value"


def _svg(figure: Figure, label: str) -> str:
    """As an element of an HTML page: no width of its own, ids that no other chart has, the page's colours and font."""
    file = io.StringIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    width, height = (round(side * 72) for side in figure.get_size_inches())
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)
    unique = f"c{next(_numbers)}-"
    text = re.sub(r'\bid="(?:figure|axes|patch|line2d|matplotlib\.axis|text|xtick|ytick)_[^"]*"', "", text)
    text = re.sub(r'\bid="', f'id="{unique}', text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{unique}', text)
    text = text.replace("url(#", f"url(#{unique}")
    for stands_for, colour in _OF_THE_PAGE.items():
        text = text.replace(stands_for, colour)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.S)  # it would be the whole page's
    text = re.sub(r"\s*font-family: [^;\"]*;|\s*transform=\"rotate\(-?0 [^\"]*\"", "", text)
    text = re.sub(r"<[^>]+>", lambda tag: _LONG_NUMBER.sub(_rounded, tag[0]), text)  # not the texts between tags
    text = re.sub(r"\s*\n\s*", " ", text).replace("> <", "><").replace(" >", ">")
    told = _escaped(label)
    head = (
        f'<svg class="chart" viewBox="0 0 {width} {height}" style="max-width:{round(width * 1.15)}px" role="img" '
        f'aria-label="{told}">'
    )
    return re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.1f}".removesuffix(".0")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
