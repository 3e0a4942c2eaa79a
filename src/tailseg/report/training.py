"""What happened while training, as small charts: losses, validation Dice, what was predicted, and what the method logs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tailseg.report import charts
from tailseg.report.collect import Run
from tailseg.report.numbers import percent

MOST_CLASSES = 24
"""Classes with charts of their own, the rarest; of more, nobody would look at any."""


@dataclass(frozen=True)
class Panel:
    """Charts that belong together. runs: those that have such logs. folded: looked at only when something is wrong."""

    title: str
    text: str
    charts: tuple[str, ...]
    folded: bool = False


@dataclass(frozen=True)
class Alarm:
    """A class that nothing was predicted as. last: None if it never came back."""

    run: str
    name: str
    first: int
    last: int | None
    steps: int


@dataclass(frozen=True)
class TrainingView:
    panels: tuple[Panel, ...]
    alarms: tuple[Alarm, ...]


_SMOOTH = f" Strong lines: mean over {100 * charts.SMOOTHED:.0f} % of the run."
Get = Callable[[Mapping[str, Any]], Any]


def training_view(
    runs: Sequence[Run], classes: Sequence[str], shares: Mapping[str, float], styles: Mapping[str, int]
) -> TrainingView:
    """classes: the foreground. shares: of each among all labelled voxels, where it is known."""
    drawing = _Drawing(runs, classes, {name: shares[name] for name in classes if name in shares}, styles, _alarms(runs))
    per_class = _names(runs, "logs", dict)
    panels = [
        Panel(
            "Validation Dice (%) over steps",
            f"The checkpoint with the best mean was kept.{drawing.note}",
            (
                *drawing.one("mean over classes", lambda line: line.get("mean"), 100, limits=(0, 102)),
                *drawing.by_class(lambda line: line.get("dice"), 100, limits=(0, 102)),
            ),
        ),
        Panel(
            "Share of the voxels predicted as each class (%) over steps",
            "In training patches, by the method's own account: its pseudo-labels where it has them. A rare class whose share "
            f"stays at 0 is not being learnt.{_SMOOTH}{drawing.note}",
            drawing.by_class(lambda line: line.get("predicted"), 100, noisy=True),
        ),
        Panel(
            "Losses and learning rate over steps",
            f"Losses as they enter the sum, weights included.{_SMOOTH}",
            (
                *(
                    chart
                    for name in _names(runs, "losses")
                    for chart in drawing.one(name, _in("losses", name), noisy=True)
                ),
                *drawing.one("learning rate", lambda line: line.get("lr")),
            ),
        ),
        Panel(
            "What the method logs, over steps",
            _SMOOTH.strip(),
            tuple(
                chart
                for name in _names(runs, "logs")
                if name not in per_class
                for chart in drawing.one(name, _in("logs", name), noisy=True)
            ),
        ),
        *(
            Panel(f"{name} of every class, over steps", "", drawing.by_class(_in("logs", name)), folded=True)
            for name in per_class
        ),
    ]
    return TrainingView(tuple(panel for panel in panels if panel.charts), drawing.alarms)


def _in(group: str, name: str) -> Get:
    return lambda line: (line.get(group) or {}).get(name)


@dataclass(frozen=True)
class _Drawing:
    """shares: of the classes for which it is known."""

    runs: Sequence[Run]
    classes: Sequence[str]
    shares: Mapping[str, float]
    styles: Mapping[str, int]
    alarms: tuple[Alarm, ...]

    @property
    def rarest(self) -> list[str]:
        return sorted(self.classes, key=lambda name: self.shares.get(name, math.inf))[:MOST_CLASSES]

    @property
    def note(self) -> str:
        shaded = " Shaded: the class was not predicted at all." if self.alarms else ""
        left_out = len(self.classes) - len(self.rarest)
        return shaded + (f" The {MOST_CLASSES} rarest of {len(self.classes)} classes are drawn." if left_out else "")

    def one(self, title: str, value: Get, factor: float = 1, *, noisy: bool = False, **style: Any) -> tuple[str, ...]:
        """A chart with a line for each run folder that has such values; none if none has."""
        lines = []
        for run in self.runs:
            for member in run.members:
                points = [(line["step"], value(line)) for line in member.lines]
                points = [(step, factor * number) for step, number in points if isinstance(number, int | float)]
                if points:
                    x, y = zip(*points, strict=True)
                    lines.append(charts.Line(x, y, self.styles[run.name], noisy))
        return (charts.curves(lines, title, **style),) if lines else ()

    def by_class(self, group: Get, factor: float = 1, **style: Any) -> tuple[str, ...]:
        """A chart for each class, of what group gives for it; the rarest first."""
        drawn: list[str] = []
        for name in self.rarest:
            share = f" ({percent(self.shares[name])} % of voxels)" if name in self.shares else ""
            marks = [(one.first, one.last or one.steps) for one in self.alarms if one.name == name]
            drawn += self.one(
                name + share, lambda line, name=name: (group(line) or {}).get(name), factor, alarms=marks, **style
            )
        return tuple(drawn)


def _names(runs: Iterable[Run], group: str, kind: type | None = None) -> list[str]:
    """Of losses or logs, in the order in which they first appear; kind: only those with such values."""
    return list(
        dict.fromkeys(
            name
            for run in runs
            for member in run.members
            for line in member.lines
            for name, value in (line.get(group) or {}).items()
            if kind is None or isinstance(value, kind)
        )
    )


def _alarms(runs: Iterable[Run]) -> tuple[Alarm, ...]:
    found = []
    for run in runs:
        for member in run.members:
            steps = max((line["step"] for line in member.lines), default=0)
            open_: dict[str, int] = {}
            for line in member.lines:
                if line.get("kind") == "alarm":
                    open_.setdefault(line["class"], line["step"] - line["absent_steps"])
                elif line.get("kind") == "alarm_cleared" and line["class"] in open_:
                    found.append(Alarm(run.name, line["class"], open_.pop(line["class"]), line["step"], steps))
            found += [Alarm(run.name, name, first, None, steps) for name, first in open_.items()]
    return tuple(found)
