"""How well one mask matches another: overlap, surface distances, volumes.

hd95, asd and assd measure between border voxels: the mask minus its erosion with face neighbours, where outside the
image counts as background. That is MedPy's definition, and the values are MedPy's (assd: MedPy >= 0.5, both directions
pooled). nsd weights the elements of a smoother surface by area, as DeepMind's surface-distance does. Other libraries
define a surface otherwise and give other numbers for the same masks.

A voxel whose reference is IGNORE takes no part: what is predicted there changes nothing, no overlap counts it, and no
surface runs along it, for nobody knows whether the class ends there. A surface voxel close by may find its counterpart
only further away, on the annotated side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from scipy.ndimage import find_objects

from tailseg.evaluate.surfaces import Spacing, areas_near, border_distances

IGNORE = 255
"""The value of tailseg.core.IGNORE, repeated because importing that module means importing torch."""

State = Literal["found", "missed", "invented", "absent"]
Box = tuple[slice, ...]


class Voxels(NamedTuple):
    """Voxels of the prediction, of the reference and of both at once."""

    pred: int
    ref: int
    both: int


@dataclass(eq=False)
class Comparison:
    """Two masks of one class in one case, from which every metric is made.

    pred, ref: (D, H, W) or (H, W) bool, cropped to both. unknown: the voxels left out, None if there are none.
    spacing: mm per voxel in the same order. voxel_ml: volume of a voxel.
    """

    pred: np.ndarray
    ref: np.ndarray
    unknown: np.ndarray | None
    spacing: Spacing
    voxel_ml: float
    voxels: Voxels = field(init=False)
    _distances: tuple[np.ndarray, np.ndarray] | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        self.voxels = Voxels(*(int(np.count_nonzero(mask)) for mask in (self.pred, self.ref, self.pred & self.ref)))

    @property
    def state(self) -> State:
        """missed: only the reference has the class. invented: only the prediction. absent: neither."""
        if self.voxels.ref:
            return "found" if self.voxels.pred else "missed"
        return "invented" if self.voxels.pred else "absent"

    @property
    def distances(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each border voxel of pred to the nearest one of ref, and the other way round, in units of spacing.

        Both are empty when either mask is, or when all of its border lies along unknown voxels.
        """
        # not a cached_property: before Python 3.12 its lock lets one thread work at a time, whatever the comparison
        if self._distances is None:
            self._distances = border_distances(self.pred, self.ref, self.unknown, self.spacing)
        return self._distances


def compare(
    pred: np.ndarray, ref: np.ndarray, spacing: Sequence[float], ignored: np.ndarray | None = None
) -> Comparison:
    """Compare two masks of bool, (D, H, W) or (H, W); spacing: mm per voxel, in that order; ignored: voxels left out.

    Raises ValueError if shapes or spacing do not fit.
    """
    labels = ref.astype(np.uint8)
    if ignored is not None:
        labels[ignored] = IGNORE
    return compare_classes(pred.astype(np.uint8), labels, 2, spacing)[0]


def compare_classes(
    pred: np.ndarray, ref: np.ndarray, num_classes: int, spacing: Sequence[float]
) -> tuple[Comparison, ...]:
    """Compare two label maps of uint8, (D, H, W) or (H, W): one Comparison for each class 1 .. num_classes - 1.

    ref may hold IGNORE. A volume of one slice is compared as that slice.
    Raises ValueError if shapes or spacing do not fit, or if a map holds a label that is no class.
    """
    _check(pred, ref, spacing)
    mm, voxel_ml = tuple(map(float, spacing)), float(np.prod(spacing)) / 1000
    if pred.ndim == 3 and len(pred) == 1:
        # with nothing above and below, all of it would be border and every distance too short
        pred, ref, mm = pred[0], ref[0], mm[1:]
    window = _bounding_box(np.maximum(pred, ref))
    pred, ref = pred[window], ref[window]
    ignored = ref == IGNORE
    has_ignored = bool(ignored.any())
    if has_ignored:
        pred, ref = np.where(ignored, 0, pred), np.where(ignored, 0, ref)
    _check_labels("the prediction", pred, num_classes)
    _check_labels("the reference", ref, num_classes)
    boxes = zip(find_objects(pred, num_classes - 1), find_objects(ref, num_classes - 1), strict=True)
    comparisons = []
    for index, found in enumerate(boxes, start=1):
        box = _joint([one for one in found if one])
        unknown = ignored[box] if has_ignored else None
        comparisons.append(Comparison(pred[box] == index, ref[box] == index, unknown, mm, voxel_ml))
    return tuple(comparisons)


def dice(c: Comparison) -> float:
    """Of 0 .. 1; NaN if both masks are empty."""
    return _ratio(2 * c.voxels.both, c.voxels.pred + c.voxels.ref)


def iou(c: Comparison) -> float:
    """Intersection over union, the Jaccard index, of 0 .. 1; NaN if both masks are empty."""
    return _ratio(c.voxels.both, c.voxels.pred + c.voxels.ref - c.voxels.both)


def precision(c: Comparison) -> float:
    """Share of the predicted voxels that are right; NaN if there are none."""
    return _ratio(c.voxels.both, c.voxels.pred)


def recall(c: Comparison) -> float:
    """Share of the reference's voxels that are predicted; NaN if there are none."""
    return _ratio(c.voxels.both, c.voxels.ref)


def pred_ml(c: Comparison) -> float:
    """Volume of the prediction in ml, of a mask (D, H, W) with spacing in mm."""
    return c.voxels.pred * c.voxel_ml


def ref_ml(c: Comparison) -> float:
    """Volume of the reference in ml, of a mask (D, H, W) with spacing in mm."""
    return c.voxels.ref * c.voxel_ml


def hd95(c: Comparison) -> float:
    """95th percentile of the directed distances of both directions pooled; NaN without distances."""
    pooled = np.concatenate(c.distances)
    return float(np.percentile(pooled, 95)) if pooled.size else float("nan")


def asd(c: Comparison) -> float:
    """Mean distance from the border of pred to that of ref, one-sided; NaN without distances."""
    return float(c.distances[0].mean()) if c.distances[0].size else float("nan")


def assd(c: Comparison) -> float:
    """Mean of the directed distances of both directions pooled; NaN without distances."""
    pooled = np.concatenate(c.distances)
    return float(pooled.mean()) if pooled.size else float("nan")


def nsd(c: Comparison, tolerance: float = 2.0) -> float:
    """Normalised surface Dice: share of the area of both surfaces within tolerance (in units of spacing) of the other.

    A surface element lies between the 2 x 2 x 2 voxels (2 x 2 in 2D) around each corner; NaN if either mask has none.
    Values agree with DeepMind's surface-distance to about 0.002: elements that are not flat get a little less area.
    Source: Nikolov et al., Clinically applicable segmentation of head and neck anatomy, J. Med. Internet Res. 2021.
    """
    areas = areas_near(c.pred, c.ref, c.unknown, c.spacing, tolerance)
    return float("nan") if areas is None else areas[0] / areas[1]


@dataclass(frozen=True)
class Metric:
    """A metric by name. kind decides how an empty mask counts (see protocols)."""

    title: str
    kind: Literal["overlap", "distance", "volume"]
    better: Literal["higher", "lower"] | None
    compute: Callable[[Comparison], float]


METRICS: dict[str, Metric] = {
    "dice": Metric("Dice", "overlap", "higher", dice),
    "iou": Metric("IoU", "overlap", "higher", iou),
    "precision": Metric("Precision", "overlap", "higher", precision),
    "recall": Metric("Recall", "overlap", "higher", recall),
    "nsd": Metric("NSD", "overlap", "higher", nsd),
    "hd95": Metric("HD95", "distance", "lower", hd95),
    "asd": Metric("ASD", "distance", "lower", asd),
    "assd": Metric("ASSD", "distance", "lower", assd),
    "pred_ml": Metric("Volume", "volume", None, pred_ml),
    "ref_ml": Metric("Ref. volume", "volume", None, ref_ml),
}


def _check(pred: np.ndarray, ref: np.ndarray, spacing: Sequence[float]) -> None:
    if pred.shape != ref.shape or pred.ndim not in (2, 3) or not pred.size:
        raise ValueError(
            f"prediction {pred.shape} and reference {ref.shape} must be of one shape, (D, H, W) or (H, W); "
            "resample the prediction onto the reference's grid."
        )
    if pred.dtype != np.uint8 or ref.dtype != np.uint8:
        raise ValueError(f"label maps must be uint8, got {pred.dtype} and {ref.dtype}; convert them.")
    if len(spacing) != pred.ndim or not all(np.isfinite(side) and side > 0 for side in spacing):
        raise ValueError(f"spacing {tuple(spacing)} must be {pred.ndim} positive numbers, one for each axis.")


def _check_labels(name: str, labels: np.ndarray, num_classes: int) -> None:
    if labels.max() >= num_classes:
        raise ValueError(
            f"{name} holds label {labels.max()}, which is none of the {num_classes} classes; check how it was written."
        )


def _bounding_box(labels: np.ndarray) -> Box:
    """The smallest box around everything that is not 0; one voxel if nothing is."""
    box = []
    for axis in range(labels.ndim):
        others = tuple(other for other in range(labels.ndim) if other != axis)
        used = np.flatnonzero(labels.max(axis=others))
        box.append(slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 1))
    return tuple(box)


def _joint(boxes: Sequence[Box]) -> Box:
    """The smallest box around all, one voxel wider where it can be: a border must see whether IGNORE follows."""
    if not boxes:
        return (slice(0, 0),)
    return tuple(
        slice(max(0, min(side.start for side in sides) - 1), max(side.stop for side in sides) + 1)
        for sides in zip(*boxes, strict=True)
    )


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
