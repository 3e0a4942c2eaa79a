"""Mirrored views of a scan: which axes of a prepared scan they turn, and which classes change places in them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from tailseg.data.geometry import Geometry
from tailseg.data.image import canonical_orientation
from tailseg.data.sides import sided_pairs
from tailseg.options import OptionError, suggest

ALL = "all"
PATIENT_AXES = ("si", "ap", "lr")
"""Superior-inferior, anterior-posterior, left-right: the order of a canonical grid (D, H, W)."""
PICTURE_AXES = ("h", "w")
"""The rows of a picture upside down, its columns from right to left."""


@dataclass(frozen=True)
class View:
    """dims: dimensions of a window (B, C, *S) that are reversed, counted from the end. classes: where the probability of
    each class stands in what a network says of the view; None leaves them in place."""

    dims: tuple[int, ...] = ()
    classes: tuple[int, ...] | None = None

    def of(self, x: Tensor) -> Tensor:
        """The view of windows (B, C, *S)."""
        return torch.flip(x, self.dims) if self.dims else x

    def back(self, probs: Tensor) -> Tensor:
        """Probabilities (B, K, *S) of the view, as probabilities of what it is a view of."""
        if self.dims:
            probs = torch.flip(probs, self.dims)
        return probs if self.classes is None else probs[:, list(self.classes)]


PLAIN = View()


@dataclass(frozen=True)
class Mirror:
    """Which axes are mirrored, in every combination: one axis makes two views, three make eight.

    axes: of PATIENT_AXES for scans, of PICTURE_AXES for pictures, or ("all",). Which axis of the array is the patient's
    left-right is told by each scan's own header, whatever its orientation. In a view that is mirrored along it, classes of
    which the names tell a left and a right one (tailseg.data.sides) have changed places, and their probabilities are put back.
    """

    axes: tuple[str, ...]
    classes: tuple[str, ...]
    spatial_dims: int

    def __post_init__(self) -> None:
        known = (ALL, *PATIENT_AXES, *PICTURE_AXES)
        for axis in self.axes:
            if axis not in known:
                raise OptionError(f"There is no axis '{axis}' to mirror along. {suggest(axis, known)}")
        if ALL in self.axes and len(self.axes) > 1:
            raise OptionError(
                f"To mirror along '{ALL}' leaves nothing for {', '.join(self.axes)}; give one or the other."
            )

    def views(self, geometry: Geometry, *, picture: bool = False) -> tuple[View, ...]:
        """The plain view first. Raises OptionError as check does, and for an axis that runs across single slices."""
        self.check(picture=picture)
        names = _names_of_axes(geometry, picture)  # of D, H, W
        seen = names[3 - self.spatial_dims :]
        wanted = tuple(filter(None, seen)) if self.axes == (ALL,) else self.axes
        for axis in wanted:
            if axis not in seen:
                raise OptionError(
                    f"The networks see slices, and '{axis}' runs from slice to slice in this scan: mirroring along it changes "
                    f"nothing. Mirror along {' and '.join(seen)}."
                )
        dims = {axis: names.index(axis) - 3 for axis in seen if axis in wanted}
        return tuple(
            View(tuple(dims[axis] for axis in chosen), self._swapped() if "lr" in chosen else None)
            for count in range(len(dims) + 1)
            for chosen in combinations(dims, count)
        )

    def check(self, *, picture: bool) -> None:
        """Raises OptionError where these axes mean nothing in a scan, or in a picture."""
        if not self.axes:
            return
        if picture and self._swapped() is not None:
            left, right = self._pairs()[0]
            raise OptionError(
                f"A mirrored picture shows {left} where {right} was, and a picture does not say which way the patient's left "
                "is; predict pictures of these classes without mirroring."
            )
        known = PICTURE_AXES if picture else PATIENT_AXES
        for axis in self.axes:
            if axis != ALL and axis not in known:
                what = "A picture does not say how the patient lay: it" if picture else "A scan"
                raise OptionError(f"{what} is mirrored along {', '.join(known)} or {ALL}, not along '{axis}'.")

    def untrained(self, flips: Collection[str]) -> tuple[str, ...]:
        """Of the axes d, h, w of canonical scans and of pictures: those along which training never mirrored, but this does.

        flips: data.augment.flip.
        """
        letters: dict[str, str] = dict(zip((*PATIENT_AXES, *PICTURE_AXES), "dhwhw", strict=True))
        wanted = "dhw"[3 - self.spatial_dims :] if self.axes == (ALL,) else [letters[axis] for axis in self.axes]
        return tuple(letter for letter in wanted if letter not in flips)

    def _pairs(self) -> list[tuple[str, str]]:
        return sided_pairs(self.classes[1:])

    def _swapped(self) -> tuple[int, ...] | None:
        order = list(range(len(self.classes)))
        for left, right in self._pairs():
            a, b = self.classes.index(left), self.classes.index(right)
            order[a], order[b] = b, a
        return tuple(order) if order != sorted(order) else None


def _names_of_axes(geometry: Geometry, picture: bool) -> Sequence[str]:
    """What the axes D, H, W of the prepared grid are in the patient, or in the picture."""
    if picture:
        return ("", *PICTURE_AXES)
    turned, _ = canonical_orientation(np.array(geometry.source_affine))  # source axis of S, A, R
    return tuple(PATIENT_AXES[turned.index(axis)] for axis in geometry.axes)
