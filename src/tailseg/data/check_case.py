"""Read every file of one case once, and say all that is wrong with it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tailseg.data.cases import Case, RawDataset
from tailseg.data.errors import ImageError
from tailseg.data.image import (
    Image,
    Shape,
    canonical_orientation,
    read_channels,
    read_image,
    same_place,
    spacing_of,
)
from tailseg.data.problems import Problem

ORTHOGONAL = 0.01
"""Cosine of the angle between two axes of a scan beyond which it counts as sheared: about half a degree."""
_SHOWN_VALUES = 6
_REPLACE = "replace them, or leave the case out"


@dataclass(frozen=True)
class CaseFacts:
    """One case, read.

    shape, spacing: of the first channel that could be read, (D, H, W) turned to superior, anterior, right; None if there
    was none. digests: file -> of its voxels, without files of one value. label_digest: None without a foreground.
    voxels: of every class in the label, None without one. ignored: its voxels that are read as IGNORE.
    """

    case: str
    problems: tuple[Problem, ...]
    shape: Shape | None = None
    spacing: tuple[float, float, float] | None = None
    digests: tuple[tuple[str, str], ...] = ()
    label_digest: str | None = None
    voxels: tuple[int, ...] | None = None
    ignored: int = 0


@dataclass(frozen=True)
class _Grid:
    file: str
    shape: Shape
    affine: np.ndarray


def examine_case(case: Case, dataset: RawDataset) -> CaseFacts:
    """Holds one file at a time, so about one scan."""
    problems: list[Problem] = []
    grids: list[_Grid] = []
    digests: list[tuple[str, str]] = []
    channels = 0
    for path in case.images:
        image = _read(read_channels, path, case, dataset, problems)
        if image is not None:
            grids.append(_grid(path, image, dataset))
            digests += _examine_image(grids[-1].file, image, case.id, problems)
            channels += len(image.array)
            del image
    if len(grids) == len(case.images) and channels != len(dataset.channels):
        problems.append(_other_channels(grids, channels, case, dataset))
    voxels, ignored, label_digest = None, 0, None
    if case.label is not None and (label := _read(read_image, case.label, case, dataset, problems)) is not None:
        grids.append(_grid(case.label, label, dataset))
        voxels, ignored = _examine_label(grids[-1].file, label, case, dataset, problems)
        label_digest = _digest(label) if sum(voxels[1:]) else None
        if not sum(voxels[1:]) and not any(each.rule == "label-value" for each in problems):
            text, way_out = "holds background alone", "if something was annotated there, the file lost it"
            problems.append(Problem("empty-label", text, way_out, grids[-1].file, case.id))
    problems += _compare_grids(grids, case.id)
    shape, spacing = _turned(grids[0]) if grids else (None, None)
    return CaseFacts(case.id, tuple(problems), shape, spacing, tuple(digests), label_digest, voxels, ignored)


def relative(path: Path, root: Path) -> str:
    """As a person would name it: within the data set where it lies there."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _read(
    read: Callable[[Path], Image], path: Path, case: Case, dataset: RawDataset, problems: list[Problem]
) -> Image | None:
    try:
        return read(path)
    except ImageError as error:
        text = str(error).removeprefix(f"{path} ")
        if "no usable spacing" in text:
            rule, way_out = "affine", "correct its header, or convert it again from the original"
        elif error.__cause__ is not None:
            text = text.split(" Is it whole?")[0].rstrip(".")
            rule, way_out = "unreadable", "the file is not whole: copy or convert it again"
        else:
            text, _, way_out = text.partition("; ")
            rule, way_out = "unreadable", way_out.rstrip(".") or "add it, or take the case out"
        problems.append(Problem(rule, text.rstrip("."), way_out, relative(path, dataset.root), case.id))
        return None


def _grid(path: Path, image: Image, dataset: RawDataset) -> _Grid:
    d, h, w = image.array.shape[-3:]
    return _Grid(relative(path, dataset.root), (d, h, w), image.affine)


def _turned(grid: _Grid) -> tuple[Shape, tuple[float, float, float]]:
    axes, _ = canonical_orientation(grid.affine)
    spacing = spacing_of(grid.affine)
    a, b, c = axes
    return (grid.shape[a], grid.shape[b], grid.shape[c]), (spacing[a], spacing[b], spacing[c])


def _examine_image(file: str, image: Image, case: str, problems: list[Problem]) -> list[tuple[str, str]]:
    """The digest of the file, unless it has one value. image: (C, D, H, W)."""
    broken, constants = 0, []
    for channel in image.array:
        low, high = np.inf, -np.inf
        for plane in channel:  # by plane: masks of a whole scan would cost as much as the scan
            if plane.dtype.kind == "f" and (wrong := int(np.count_nonzero(~np.isfinite(plane)))):
                broken += wrong
                plane = plane[np.isfinite(plane)]
            if plane.size:
                low, high = min(low, float(plane.min())), max(high, float(plane.max()))
        if low == high:
            constants.append(low)
    if broken:
        problems.append(Problem("nan", f"{_count(broken)} are NaN or infinite", _REPLACE, file, case))
    if constants:
        which = "" if len(image.array) == 1 else f" in {len(constants)} of its {len(image.array)} channels"
        text = f"is {constants[0]:g} everywhere{which}"
        problems.append(Problem("constant", text, "it teaches nothing: was it exported rightly?", file, case))
    return [] if len(constants) == len(image.array) else [(file, _digest(image))]


def _other_channels(grids: list[_Grid], found: int, case: Case, dataset: RawDataset) -> Problem:
    names = len(dataset.channels)
    text = f"{found} channel{'s' if found != 1 else ''} in all, dataset.json names {names}"
    return Problem("channel", text, "correct channel_names, or the files", grids[0].file, case.id)


def _examine_label(
    file: str, label: Image, case: Case, dataset: RawDataset, problems: list[Problem]
) -> tuple[tuple[int, ...], int]:
    """Voxels of every class, and those that carry no class: ignored, or of classes that nobody looked for."""
    values, counts = _values(label.array)
    known = np.isin(values, [*dataset.label_values, *dataset.ignore_values])
    finite = np.isfinite(values)
    whole = finite & (values == np.floor(values))
    if (broken := int(counts[~finite].sum())) > 0:
        problems.append(Problem("nan", f"{_count(broken)} are NaN or infinite", _REPLACE, file, case.id))
    for rule, wrong, way_out in (
        ("label-fraction", finite & ~whole, "resample labels by the nearest neighbour, and write integers"),
        ("label-value", whole & ~known, "name them under labels in dataset.json, or correct the file"),
    ):
        if wrong.any():
            problems.append(Problem(rule, _list_values(values[wrong], counts[wrong]), way_out, file, case.id))
    voxels = [int(counts[values == value].sum()) for value in dataset.label_values]
    ignored = int(counts[np.isin(values, list(dataset.ignore_values))].sum())
    if case.annotated is not None:
        unsought = [index for index, name in enumerate(dataset.classes) if name not in case.annotated]
        if strange := [dataset.classes[index] for index in unsought[1:] if voxels[index]]:
            text = f"holds {', '.join(strange)}, which annotated_classes leaves out"
            problems.append(Problem("unsought", text, "name them there, or nothing learns them here", file, case.id))
        ignored += sum(voxels[index] for index in unsought)
        voxels = [0 if index in unsought else count for index, count in enumerate(voxels)]
    return tuple(voxels), ignored


def _values(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values as float64 and how often each stands there."""
    with np.errstate(invalid="ignore"):  # what NaN becomes does not matter: it is unequal to anything
        small = array.astype(np.uint8)
    if (small == array).all():  # nearly always; counting is much faster than sorting
        counts = np.zeros(256, np.int64)
        for plane in small:  # bincount takes eight bytes a voxel
            counts += np.bincount(plane.ravel(), minlength=256)
        return np.flatnonzero(counts).astype(np.float64), counts[counts > 0]
    values, counts = np.unique(array, return_counts=True)
    return values.astype(np.float64), counts


def _list_values(values: np.ndarray, counts: np.ndarray) -> str:
    first = [f"{value:.10g} ({_count(int(n))})" for value, n in zip(values[:_SHOWN_VALUES], counts, strict=False)]
    more = [f"{len(values) - _SHOWN_VALUES} more"] if len(values) > _SHOWN_VALUES else []
    return f"holds {', '.join([*first, *more])}"


def _count(voxels: int) -> str:
    return f"{voxels:,} voxel{'s' if voxels != 1 else ''}"


def _compare_grids(grids: list[_Grid], case: str) -> list[Problem]:
    """Every file of a case against the first one."""
    found: list[Problem] = []
    for grid in grids:
        if (cosine := _shear(grid.affine)) > ORTHOGONAL:
            degrees = 90 - np.degrees(np.arccos(min(cosine, 1.0)))
            text = f"two axes are {degrees:.1f} degrees off a right angle"
            way_out = "distances in mm will be wrong: resample it onto a grid of right angles (gantry tilt?)"
            found.append(Problem("shear", text, way_out, grid.file, case))
    for grid in grids[1:]:
        first = grids[0]
        if grid.shape != first.shape:
            text = f"has {_by(grid.shape)} voxels (D, H, W), {first.file} has {_by(first.shape)}"
            found.append(Problem("shape", text, "resample one onto the other's grid", grid.file, case))
        elif not same_place(grid.affine, first.affine, first.shape):
            text = f"lies elsewhere than {first.file}: {_difference(grid, first)}"
            way_out = "correct the header, or resample one onto the other's grid"
            found.append(Problem("place", text, way_out, grid.file, case))
    return found


def _by(shape: Shape) -> str:
    return " x ".join(str(side) for side in shape)


def _difference(grid: _Grid, first: _Grid) -> str:
    """What of two affines differs, the first that explains it."""
    spacing, expected = (spacing_of(each.affine) for each in (grid, first))
    if not np.allclose(spacing, expected, rtol=1e-3):
        return "spacing {:.4g} x {:.4g} x {:.4g} mm (D, H, W), not {:.4g} x {:.4g} x {:.4g}".format(*spacing, *expected)
    if not np.allclose(grid.affine[:3, :3] / spacing[::-1], first.affine[:3, :3] / expected[::-1], atol=1e-3):
        return "its axes point elsewhere"
    away = float(np.linalg.norm(grid.affine[:3, 3] - first.affine[:3, 3]))
    return f"its origin is {away:.3g} mm away"


def _shear(affine: np.ndarray) -> float:
    """The largest cosine between two different axes."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.abs(axes.T @ axes - np.eye(3)).max())


def _digest(image: Image) -> str:
    """Of the voxels as training reads them, float32, turned to one orientation: a copy saved anew is still found."""
    axes, flips = canonical_orientation(image.affine)
    channels = image.array.reshape(-1, *image.array.shape[-3:])
    made = hashlib.blake2b(digest_size=16)
    for channel in channels:
        turned = np.flip(channel.transpose(axes), tuple(axis for axis in range(3) if flips[axis]))
        made.update(str(turned.shape).encode())
        for plane in turned:
            made.update(np.ascontiguousarray(plane, np.float32).data)
    return made.hexdigest()
