"""One telling slice of a scan, with contours of reference and predictions that stay sharp at any size.

A slice is shown as radiologists hang it: the patient's right on the left, front or top up. A picture is shown as it is.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from contourpy import LineType, contour_generator
from PIL import Image as Pillow

from tailseg.data.image import canonical_orientation, read_channels, read_image, same_place, spacing_of, turned_onto
from tailseg.data.pictures import PICTURE_ENDINGS

WIDTH = 300
"""Pixels of the longer side of a slice; contours are finer."""
_QUALITY = 78
_MARGIN = 0.12
_THICK = 2.0  # slices so much thicker than the others' are cut along themselves, not across


class SliceError(ValueError):
    """A scan and a label file that do not fit each other."""


@dataclass(frozen=True)
class Drawn:
    """One class in one label map. path: of an SVG, in pixels of the slice."""

    index: int
    path: str


@dataclass(frozen=True)
class Slice:
    """image: a data URI. width, height: its pixels. maps: the drawn classes of each label map, by name. place: which slice, in
    words. left, top: what the edges are, empty for a picture. classes: indices of those in sight."""

    image: str
    width: int
    height: int
    maps: Mapping[str, tuple[Drawn, ...]]
    place: str
    left: str
    top: str
    classes: tuple[int, ...]


def case_slice(
    images: Sequence[Path],
    labels: Mapping[str, Path],
    values: Mapping[str, Sequence[int]],
    weights: Sequence[float],
) -> Slice:
    """The slice in which most of what has weight is in sight.

    images: of the case; the first channel is shown, or the colours of a picture. labels: name -> label file. values: name ->
    value of each foreground class in it. weights: of each foreground class. Raises SliceError, or ImageError.
    """
    image = read_channels(images[0])
    d, h, w = image.array.shape[1:]
    maps: dict[str, np.ndarray] = {}
    for name, path in labels.items():
        found = turned_onto(read_image(path), image.affine, (d, h, w))
        if found.array.shape != (d, h, w):
            raise SliceError(
                f"{path} has the shape {found.array.shape}, {images[0]} has {(d, h, w)}; predict it again."
            )
        if not same_place(image.affine, found.affine, (d, h, w)):
            raise SliceError(
                f"{path} lies elsewhere in the patient than {images[0]}: their affines differ. Predict it again."
            )
        maps[name] = _indices(found.array, values[name])
    is_picture = images[0].name.endswith(PICTURE_ENDINGS)
    channels = image.array
    if is_picture:
        turned, spacing, axis = channels, (1.0, 1.0, 1.0), 0
    else:
        channels, maps, spacing = _hung(channels, maps, image.affine)
        turned, axis = channels, _cut_along(spacing, channels.shape[1:])
    chosen = _tell_most(maps, weights, axis)
    planes = {name: np.take(each, chosen, axis) for name, each in maps.items()}
    plane = np.take(turned, chosen, axis + 1)  # (C, H, W)
    box = _around(planes, plane.shape[1:])
    sides = [side for index, side in enumerate(spacing) if index != axis]
    shown = _grey(plane, turned) if not (is_picture and len(plane) >= 3) else _colours(plane)
    shown, planes = shown[box], {name: each[box] for name, each in planes.items()}
    scale = WIDTH / max(size * side for size, side in zip(shown.shape[:2], sides, strict=True))
    height, width = (max(1, round(size * side * scale)) for size, side in zip(shown.shape[:2], sides, strict=True))
    drawn = {
        name: tuple(
            Drawn(index, path)
            for index in range(1, len(weights) + 1)
            if (path := _outline(each == index, width / each.shape[1], height / each.shape[0]))
        )
        for name, each in planes.items()
    }
    in_sight = tuple(sorted({one.index - 1 for each in drawn.values() for one in each}))
    directions = ("axial", "coronal", "sagittal")
    place = "picture" if is_picture else f"{directions[axis]} slice {chosen + 1} of {turned.shape[axis + 1]}"
    left, top = ("", "") if is_picture else (("R", "A"), ("R", "S"), ("A", "S"))[axis]
    return Slice(_jpeg(shown, width, height), width, height, drawn, place, left, top, in_sight)


def _indices(array: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """(D, H, W) uint8: 1 for the first foreground class; everything else is 0."""
    table = np.zeros(256, np.uint8)
    table[list(values)] = range(1, len(values) + 1)
    return table[np.clip(array, 0, 255).astype(np.uint8)]


def _hung(
    channels: np.ndarray, maps: Mapping[str, np.ndarray], affine: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray], tuple[float, float, float]]:
    """Axes (S, A, R), each walked from the edge that is drawn first: superior, anterior and the patient's right."""
    axes, flips = canonical_orientation(affine)
    own = spacing_of(affine)
    spacing = (own[axes[0]], own[axes[1]], own[axes[2]])
    # canonical walks towards S, A and R: the other way puts S and A on top and R on the left
    flipped = tuple(axis for axis in range(3) if not flips[axis])

    def turn(array: np.ndarray) -> np.ndarray:
        return np.flip(array.transpose(axes), flipped)

    return np.stack([turn(channel) for channel in channels]), {name: turn(each) for name, each in maps.items()}, spacing


def _cut_along(spacing: Sequence[float], shape: Sequence[int]) -> int:
    """Axial, unless the scan has thick slices in another direction, or only one."""
    thickest = int(np.argmax(spacing))
    others = [side for axis, side in enumerate(spacing) if axis != thickest]
    if 1 in shape:
        return list(shape).index(1)
    return thickest if spacing[thickest] >= _THICK * max(others) else 0


def _tell_most(maps: Mapping[str, np.ndarray], weights: Sequence[float], axis: int) -> int:
    """A class is in sight where its area reaches half of its largest, in any map."""
    across = tuple(other for other in range(3) if other != axis)
    told = np.zeros(next(iter(maps.values())).shape[axis])
    for index, weight in enumerate(weights, start=1):
        areas = [np.count_nonzero(each == index, axis=across) for each in maps.values()]
        largest = np.max([area / max(area.max(), 1) for area in areas], axis=0)
        told += weight * np.minimum(1, 2 * largest)
    best = np.flatnonzero(told >= told.max() - 1e-9)
    return int(best[len(best) // 2])


def _around(planes: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> tuple[slice, slice]:
    """What is labelled, with a margin; everything where nothing is."""
    anything = np.any([each > 0 for each in planes.values()], axis=0)
    box = []
    for axis, size in enumerate(shape):
        used = np.flatnonzero(anything.any(axis=1 - axis))
        if not used.size:
            return slice(0, shape[0]), slice(0, shape[1])
        margin = max(_MARGIN * (used[-1] - used[0] + 1), 0.06 * size, 8)
        box.append(slice(max(0, int(used[0] - margin)), min(size, int(used[-1] + margin) + 1)))
    return box[0], box[1]


def _grey(plane: np.ndarray, scan: np.ndarray) -> np.ndarray:
    """(H, W) uint8 of the first channel: between the 2nd and 99.5th percentile of what is not empty around the scan."""
    first = scan[0].astype(np.float32).ravel()[:: max(1, scan[0].size // 200_000)]
    kept = first[first > np.percentile(first, 5)] if np.ptp(first) else first
    kept = kept[kept > -300] if kept.size and kept.min() < -700 and (kept > -300).mean() > 0.1 else kept  # CT: no air
    low, high = np.percentile(kept, [2, 99.5]).tolist() if kept.size else (0.0, 0.0)
    if low >= high:  # all that is not empty has one value
        low, high = float(first.min()), float(first.max())
    return (255 * np.clip((plane[0] - low) / max(high - low, 1e-6), 0, 1)).astype(np.uint8)


def _colours(plane: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8."""
    rgb = np.moveaxis(plane[:3], 0, -1)
    return np.clip(rgb if rgb.max() > 1 else 255 * rgb, 0, 255).astype(np.uint8)


def _outline(mask: np.ndarray, across: float, down: float) -> str:
    """Closed curves around a mask, in pixels of the slice, rounded to half of one."""
    if not mask.any():
        return ""
    padded = np.pad(mask, 1).astype(np.float32)
    generator = contour_generator(z=padded, line_type=LineType.Separate)
    parts = []
    for line in generator.lines(0.5):
        assert isinstance(line, np.ndarray)
        points = np.rint((line - 0.5) * (across, down) * 2).astype(int)  # pixel centres lie half a pixel in
        steps = np.diff(points, axis=0)
        steps = steps[np.any(steps != 0, axis=1)]
        x, y = points[0] / 2
        moves = "".join(f"l{_half(a)} {_half(b)}" for a, b in _straightened(steps))
        parts.append(f"M{x:g} {y:g}{moves}z")
    return "".join(parts)


def _straightened(steps: np.ndarray) -> list[tuple[int, int]]:
    """Equal steps one after the other are one."""
    runs: list[tuple[int, int, int]] = []
    for a, b in steps.tolist():
        if runs and runs[-1][:2] == (a, b):
            runs[-1] = (a, b, runs[-1][2] + 1)
        else:
            runs.append((a, b, 1))
    return [(a * times, b * times) for a, b, times in runs]


def _half(value: int) -> str:
    return f"{value / 2:g}"


def _jpeg(shown: np.ndarray, width: int, height: int) -> str:
    file = io.BytesIO()
    picture = Pillow.fromarray(shown).resize((width, height), Pillow.Resampling.BICUBIC)
    picture.save(file, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
