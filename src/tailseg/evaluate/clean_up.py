"""Two repairs of predicted labels, applied to a class only where validation cases say that they help it.

largest_component   of the pieces of a class (voxels that touch by face, edge or corner) only the largest stays; what goes
                    becomes background
fill_holes          background that the class encloses becomes the class; what another class holds stays
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from scipy import ndimage

from tailseg.core import IGNORE

Operation = Literal["largest_component", "fill_holes"]
Operations = tuple[Operation, ...]
OPERATIONS: Operations = get_args(Operation)
CANDIDATES: tuple[Operations, ...] = (("largest_component",), ("fill_holes",), OPERATIONS)
HAIR = 0.001
"""What the mean Dice must rise by at least, and no single case may fall by."""


@dataclass(frozen=True)
class CleanUp:
    """What helped on these cases. classes: foreground class -> operations, in their order; the others are left alone.

    gain: of each of these classes, how much its mean Dice over the cases rose.
    """

    classes: dict[str, Operations]
    gain: dict[str, float]
    cases: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "classes": {name: list(each) for name, each in self.classes.items()},
            "cases": list(self.cases),
            "gain": self.gain,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CleanUp:
        """Raises ValueError for what to_dict did not make."""
        classes = {str(name): tuple(each) for name, each in values["classes"].items()}
        if unknown := {operation for each in classes.values() for operation in each} - set(OPERATIONS):
            raise ValueError(f"there is no clean-up '{sorted(unknown)[0]}'; there are {', '.join(OPERATIONS)}")
        return cls(classes, {str(name): float(gain) for name, gain in values["gain"].items()}, tuple(values["cases"]))


class Judged(NamedTuple):
    """pred, ref: (D, H, W) uint8 class indices, ref with IGNORE where nobody looked. left_out: classes nobody looked for."""

    case: str
    pred: np.ndarray
    ref: np.ndarray
    left_out: Collection[str] = ()


def clean_up(labels: np.ndarray, classes: Sequence[str], chosen: Mapping[str, Sequence[str]]) -> None:
    """Repair labels (D, H, W) uint8 class indices in place. First every class loses its smaller pieces, then holes are
    filled, in the order of the classes. chosen: class -> operations."""
    for operation in OPERATIONS:
        for index, name in enumerate(classes):
            if index and operation in chosen.get(name, ()):
                _repair(labels, index, operation, _flat(labels))


def choose_clean_up(cases: Iterable[Judged], classes: Sequence[str]) -> CleanUp:
    """What each class gains from, over cases of which one is held at a time. classes: background first.

    Every candidate is tried on one class alone. Dice counts as the protocol `native` has it: 0 where only one of the two has
    the class, left out where neither has. A candidate is taken if the mean rises by more than HAIR and no case falls by more;
    of several, the one with the best mean, and the shorter one of equals.
    """
    names: list[str] = []
    rows: list[np.ndarray] = []  # (classes - 1, 1 + candidates) each
    for case, pred, ref, left_out in cases:
        names.append(case)
        dice = np.array([_dice_of_candidates(pred, ref, index) for index in range(1, len(classes))])
        dice[[name in left_out for name in classes[1:]]] = np.nan
        rows.append(dice)
    chosen: dict[str, Operations] = {}
    gains: dict[str, float] = {}
    for name, dice in zip(classes[1:], np.stack(rows, 1), strict=True):  # (cases, 1 + candidates)
        dice = dice[~np.isnan(dice).any(1)]
        if not len(dice):
            continue
        gain = dice[:, 1:] - dice[:, :1]
        mean = gain.mean(0)
        helps = (mean > HAIR) & (gain.min(0) >= -HAIR)
        if helps.any():
            best = int(np.argmax(np.where(helps, mean, -np.inf)))
            chosen[name], gains[name] = CANDIDATES[best], float(mean[best])
    return CleanUp(chosen, gains, tuple(names))


def merged(chosen: Sequence[CleanUp]) -> dict[str, Operations]:
    """Of several runs that are averaged: what every one of them chose."""
    first, *others = chosen
    common: dict[str, Operations] = {}
    for name, operations in first.classes.items():
        kept: Operations = tuple(each for each in operations if _in_all(each, name, others))
        if kept:
            common[name] = kept
    return common


def _in_all(operation: Operation, name: str, chosen: Sequence[CleanUp]) -> bool:
    return all(operation in one.classes.get(name, ()) for one in chosen)


def _dice_of_candidates(pred: np.ndarray, ref: np.ndarray, index: int) -> list[float]:
    """Without any clean-up, and with each candidate."""
    flat = _flat(pred)
    box = _box((pred == index) | (ref == index))
    if box is None:
        return [float("nan")] * (1 + len(CANDIDATES))
    pred, ref = pred[box], ref[box]
    target, known = ref == index, ref != IGNORE
    values = [_dice((pred == index) & known, target)]
    for candidate in CANDIDATES:
        repaired = pred.copy()
        for operation in candidate:
            _repair(repaired, index, operation, flat)
        values.append(_dice((repaired == index) & known, target))
    return values


def _dice(pred: np.ndarray, ref: np.ndarray) -> float:
    total = int(np.count_nonzero(pred)) + int(np.count_nonzero(ref))
    return 2 * int(np.count_nonzero(pred & ref)) / total if total else float("nan")


def _flat(labels: np.ndarray) -> tuple[int, ...]:
    """Axes of a single voxel: what has one is a slice, and has its holes within it."""
    return tuple(axis for axis, size in enumerate(labels.shape) if size == 1)


def _repair(labels: np.ndarray, index: int, operation: str, flat: tuple[int, ...]) -> None:
    box = _box(labels == index)
    if box is None:
        return
    inside = labels[box]
    mask = inside == index
    if operation == "largest_component":
        inside[mask & ~_largest(mask)] = 0
    else:
        filled = np.asarray(ndimage.binary_fill_holes(mask.squeeze(flat))).reshape(mask.shape)
        inside[filled & (inside == 0)] = index


def _box(mask: np.ndarray) -> tuple[slice, ...] | None:
    """Around the voxels of the mask (D, H, W); None if there are none."""
    box: list[slice] = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if not hit.size:
            return None
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)


def _largest(mask: np.ndarray) -> np.ndarray:
    """The largest piece of the mask; of equals the first in the order of the array."""
    pieces, count = _pieces(mask)
    if count < 2:
        return mask
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return pieces == sizes.argmax()


def _pieces(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Voxels that touch by face, edge or corner share a number from 1 on."""
    return ndimage.label(mask, structure=np.ones((3,) * mask.ndim))  # pyright: ignore[reportReturnType]
