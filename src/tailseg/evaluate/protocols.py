"""Named sets of rules for scoring, so that a number never stands without what it means.

`native` is the one to trust: mm, the scan's own grid, and an organ that was missed counts at its worst. The others
repeat what published tables did, quirks included, and are only for standing beside those tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tailseg.evaluate.metrics import METRICS, Comparison, nsd
from tailseg.options import OptionError, suggest

Rule = float | Literal["diagonal", "exclude"]


@dataclass(frozen=True)
class EmptyRule:
    """What a metric counts as when a mask is empty: a number on the reported scale, "diagonal" of the grid the masks
    are scored on (in units of spacing), or "exclude": NaN, left out of every mean and counted.

    missed: only the reference has the class. invented: only the prediction. absent: neither.
    """

    missed: Rule
    invented: Rule
    absent: Rule


@dataclass(frozen=True)
class Protocol:
    """The rules of one way of scoring. Make another with dataclasses.replace.

    metrics: names in METRICS. spacing: whether distances are in mm or count voxels as 1. grid: (D, H, W) to which both
    masks are resized first; None is the scan's own. percent: overlap metrics times 100. tolerance: of nsd, in the unit
    of the distances. overlap, distance: the empty rules of either kind of metric. origin: where the rules come from.
    """

    name: str
    metrics: tuple[str, ...]
    overlap: EmptyRule
    distance: EmptyRule
    spacing: Literal["mm", "voxels"] = "mm"
    grid: tuple[int, int, int] | None = None
    percent: bool = False
    tolerance: float = 2.0
    origin: str = ""

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in METRICS:
                raise OptionError(f"protocol '{self.name}': no metric is called '{name}'. {suggest(name, METRICS)}")
            if METRICS[name].kind == "volume" and self.spacing != "mm":
                raise OptionError(f"protocol '{self.name}': {name} is in ml and needs spacing 'mm', not 'voxels'.")

    def unit(self, metric: str) -> str:
        """Of a metric's values: '%', 'mm', 'voxels', 'ml', or '' for a share of 1."""
        kind = METRICS[metric].kind
        if kind == "overlap":
            return "%" if self.percent else ""
        return self.spacing if kind == "distance" else "ml"

    def to_grid(
        self, pred: np.ndarray, ref: np.ndarray, spacing: Sequence[float]
    ) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
        """Both label maps on the grid they are scored on, and its spacing in the unit of the distances."""
        scored = tuple(map(float, spacing))
        if self.grid is not None:
            scored = tuple(s * old / new for s, old, new in zip(scored, ref.shape, self.grid, strict=True))
            pred, ref = resize_nearest(pred, self.grid), resize_nearest(ref, self.grid)
        return pred, ref, scored if self.spacing == "mm" else (1.0,) * ref.ndim

    def values(self, comparison: Comparison, diagonal: float) -> tuple[float, ...]:
        """The value of each metric for one class of one case. diagonal: of the grid, in the unit of the distances."""
        return tuple(self._value(name, comparison, diagonal) for name in self.metrics)

    def _value(self, name: str, comparison: Comparison, diagonal: float) -> float:
        metric = METRICS[name]
        state = comparison.state
        if state != "found" and metric.kind != "volume":
            rule = getattr(self.overlap if metric.kind == "overlap" else self.distance, state)
            if rule == "exclude":
                return float("nan")
            return diagonal if rule == "diagonal" else rule
        value = nsd(comparison, self.tolerance) if name == "nsd" else metric.compute(comparison)
        return value * 100 if self.percent and metric.kind == "overlap" else value

    def describe(self) -> str:
        """The rules in plain words; goes with every output."""
        titles = {
            kind: ", ".join(METRICS[name].title for name in self.metrics if METRICS[name].kind == kind)
            for kind in ("overlap", "distance")
        }
        grid = "the scan's own grid"
        if self.grid is not None:
            grid = f"both masks resized to {' x '.join(map(str, self.grid))} (D, H, W) by floor-index nearest neighbour"
        unit = "mm" if self.spacing == "mm" else "voxels, whatever their size in mm"
        lines = [f"Protocol {self.name}: {grid}."]
        if self.origin:
            lines.append(self.origin)
        if titles["overlap"]:
            lines.append(f"Overlaps ({titles['overlap']}): 0 to {100 if self.percent else 1}.")
        if titles["distance"]:
            lines.append(f"Distances ({titles['distance']}): {unit}.")
        lines += [_MEANING[name] for name in self.metrics if name in _MEANING]
        if "nsd" in self.metrics:
            lines.append(
                f"NSD: share of the area of both surfaces within {self.tolerance:g} {self.spacing} of the other."
            )
        lines += [f"{words}: {self._empty_text(state)}." for state, words in _STATES.items()]
        lines.append("Voxels whose reference is IGNORE are left out.")
        return "\n".join(lines)

    def _empty_text(self, state: str) -> str:
        overlap, distance = getattr(self.overlap, state), getattr(self.distance, state)
        if overlap == distance == "exclude":
            return "left out of every mean, and counted"
        return f"overlaps {self._rule_text(overlap)}, distances {self._rule_text(distance)}"

    def _rule_text(self, rule: Rule) -> str:
        if rule == "exclude":
            return "left out"
        return f"the diagonal of the grid in {self.spacing}" if rule == "diagonal" else f"{rule:g}"


_STATES = {
    "missed": "Missed (only the reference has the class)",
    "invented": "Invented (only the prediction has it)",
    "absent": "Absent (neither has it)",
}
_MEANING = {
    "hd95": "HD95: 95th percentile of the border distances of both directions pooled.",
    "asd": "ASD: mean distance from the prediction's border to the reference's, one-sided.",
    "assd": "ASSD: mean border distance of both directions pooled.",
}


def resize_nearest(labels: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Resize by the index floor(i * old / new) in float32, as torch's mode "nearest" does (not "nearest-exact")."""
    indices = []
    for old, new in zip(labels.shape, shape, strict=True):
        scale = np.float32(old) / np.float32(new)
        indices.append(np.minimum(np.floor(np.arange(new, dtype=np.float32) * scale).astype(np.intp), old - 1))
    return labels[np.ix_(*indices)]


_NATIVE = Protocol(
    name="native",
    metrics=("dice", "iou", "precision", "recall", "nsd", "hd95", "assd", "asd", "pred_ml", "ref_ml"),
    overlap=EmptyRule(missed=0.0, invented=0.0, absent="exclude"),
    distance=EmptyRule(missed="diagonal", invented="diagonal", absent="exclude"),
)
_DHC = Protocol(
    name="dhc-p23",
    metrics=("dice", "asd"),
    overlap=EmptyRule(missed=0.0, invented=0.0, absent=1.0),
    distance=EmptyRule(missed=128.0, invented=128.0, absent=0.0),
    spacing="voxels",
    grid=(80, 160, 160),
    percent=True,
    origin="As in the tables of DHC (MICCAI 2023), whose predictions never left that grid.",
)
# The published scripts stop with an error when only the prediction has a class: they leave that rule to us.
_SSL4MIS = Protocol(
    name="ssl4mis",
    metrics=("dice", "iou", "hd95", "asd"),
    overlap=EmptyRule(missed=0.0, invented=0.0, absent=0.0),
    distance=EmptyRule(missed=0.0, invented="diagonal", absent=0.0),
    spacing="voxels",
    percent=True,
    origin="As in the LA tables after UA-MT and SSL4MIS: an empty prediction gets the best distance, 0.",
)

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        _NATIVE,
        replace(
            _NATIVE,
            name="native-voxels",
            metrics=tuple(name for name in _NATIVE.metrics if METRICS[name].kind != "volume"),
            spacing="voxels",
            origin="As native, for scans whose headers do not say how large a voxel is.",
        ),
        _DHC,
        replace(
            _DHC,
            name="dhc-p23-absent-100",
            overlap=replace(_DHC.overlap, absent=100.0),
            origin="As dhc-p23, but two empty masks count as right.",
        ),
        replace(
            _DHC,
            name="dhc-p23-absent-out",
            overlap=replace(_DHC.overlap, absent="exclude"),
            distance=replace(_DHC.distance, absent="exclude"),
            origin="As dhc-p23, but two empty masks do not count.",
        ),
        _SSL4MIS,
    )
}


def protocol_named(name: str) -> Protocol:
    """Raises OptionError, with the nearest name, when there is none of that name."""
    if name not in PROTOCOLS:
        raise OptionError(f"No protocol is called '{name}'. {suggest(name, PROTOCOLS)}")
    return PROTOCOLS[name]
