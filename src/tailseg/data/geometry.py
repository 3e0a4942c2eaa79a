"""Where a prepared grid lies in its scan, and the way back: class probabilities to labels on the scan's own grid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor

from tailseg.data.image import Shape, canonical_orientation, spacing_of

Spacing = tuple[float, float, float]

CHUNK_VALUES = 2**22
"""Probabilities interpolated in plane at a time (16 MiB): they bound what restore_labels holds beside the slabs."""


@dataclass(frozen=True)
class Geometry:
    """One scan's way from its own grid (D, H, W) over the oriented and the cropped grid to the prepared one.

    source_affine: (i, j, k, 1) -> RAS+ mm, rows first. axes, flips: source axis of each oriented axis, and whether it is
    walked backwards. start, stop: crop box on the oriented grid. shape: of the prepared grid, over the crop's field of view.
    """

    source_shape: Shape
    source_affine: tuple[tuple[float, ...], ...]
    axes: Shape
    flips: tuple[bool, bool, bool]
    start: Shape
    stop: Shape
    shape: Shape

    @classmethod
    def whole(cls, shape: Shape, affine: np.ndarray, *, canonical: bool) -> Geometry:
        """The uncropped scan at its own resolution. canonical: turned to the nearest of right, anterior, superior."""
        axes, flips = canonical_orientation(affine) if canonical else ((0, 1, 2), (False, False, False))
        oriented = (shape[axes[0]], shape[axes[1]], shape[axes[2]])
        rows = tuple(tuple(float(value) for value in row) for row in affine)
        return cls(shape, rows, axes, flips, (0, 0, 0), oriented, oriented)

    def cropped(self, start: Shape, stop: Shape) -> Geometry:
        """start, stop: box on the oriented grid. Drops any resampling."""
        return replace(self, start=start, stop=stop, shape=_sides(start, stop))

    def resampled(self, shape: Shape) -> Geometry:
        return replace(self, shape=shape)

    @property
    def crop_shape(self) -> Shape:
        """Sides (D, H, W) of the crop in voxels of the scan."""
        return _sides(self.start, self.stop)

    @property
    def spacing(self) -> Spacing:
        """Exact mm per prepared voxel, (D, H, W)."""
        source = spacing_of(np.array(self.source_affine))
        d, h, w = (
            source[axis] * old / new for axis, old, new in zip(self.axes, self.crop_shape, self.shape, strict=True)
        )
        return d, h, w

    @property
    def prepared_affine(self) -> np.ndarray:
        """(4, 4): prepared voxel (i, j, k, 1) -> RAS+ mm of the patient."""
        to_source = np.zeros((4, 4))
        to_source[3, 3] = 1
        for axis, source_axis in enumerate(self.axes):
            scale = self.crop_shape[axis] / self.shape[axis]
            offset = self.start[axis] + scale / 2 - 0.5  # the edges of the field of view stay, so centres move
            row, column = 2 - source_axis, 2 - axis  # affines count (i, j, k), arrays (k, j, i)
            if self.flips[axis]:
                scale, offset = -scale, self.source_shape[source_axis] - 1 - offset
            to_source[row, column], to_source[row, 3] = scale, offset
        return np.array(self.source_affine) @ to_source

    def view(self, array: np.ndarray) -> np.ndarray:
        """The oriented and cropped part of array (..., D, H, W) on the scan's grid; writing into it writes into array."""
        lead = array.ndim - 3
        oriented = array.transpose(*range(lead), *(lead + axis for axis in self.axes))
        oriented = oriented[(..., *(slice(None, None, -1 if flip else 1) for flip in self.flips))]
        return oriented[(..., *(slice(a, b) for a, b in zip(self.start, self.stop, strict=True)))]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Geometry:
        """Raises ValueError if values is not what to_dict gave."""
        return _GEOMETRY.validate_python(values)


_GEOMETRY = TypeAdapter(Geometry)


def restore_labels(slabs: Iterable[tuple[int, Tensor]], geometry: Geometry) -> np.ndarray:
    """Labels (D, H, W) uint8 on the scan's own grid, in its own orientation; background outside the crop.

    slabs: (start, probs (K, d, H, W)) in depth order, covering the prepared grid. The probabilities are interpolated
    trilinearly to the crop's own grid and the argmax is taken there, a few planes at a time.
    Raises ValueError if the slabs leave a gap, overlap or have other planes than the prepared grid.
    """
    labels = np.zeros(geometry.source_shape, np.uint8)
    crop = geometry.view(labels)
    for first, planes in native_planes(slabs, geometry):
        # max, since argmax over a middle axis takes four times as long on a CPU
        crop[first : first + len(planes)] = planes.max(1).indices.to(torch.uint8).cpu().numpy()
    return labels


def restore_probs(slabs: Iterable[tuple[int, Tensor]], geometry: Geometry) -> np.ndarray:
    """Probabilities (K, D, H, W) float32 on the scan's own grid, all of them held; outside the crop background is 1.

    slabs: as in restore_labels, whose result is the argmax of this.
    """
    probs: np.ndarray | None = None
    crop = np.empty(0)
    for first, planes in native_planes(slabs, geometry):
        if probs is None:
            probs = np.zeros((planes.shape[1], *geometry.source_shape), np.float32)
            probs[0] = 1
            crop = geometry.view(probs)
        crop[:, first : first + len(planes)] = planes.transpose(0, 1).cpu().numpy()
    assert probs is not None
    return probs


def native_planes(slabs: Iterable[tuple[int, Tensor]], geometry: Geometry) -> Iterator[tuple[int, Tensor]]:
    """(first plane, probs (n, K, H, W) float32) of the crop at the scan's resolution, in depth order.

    Trilinear interpolation is separable: along depth between two prepared planes, then within the plane. The only plane
    that two slabs need together is the last one of the former.
    """
    depth, *plane = geometry.shape
    native_depth, *native_plane = geometry.crop_shape
    lower, upper, weight = _depth_weights(depth, native_depth)
    carry: Tensor | None = None  # (K, H, W), plane end - 1
    done = end = 0
    for start, probs in slabs:
        if start != end or list(probs.shape[2:]) != plane or probs.shape[1] == 0:
            raise ValueError(
                f"slab {tuple(probs.shape)} at depth {start} does not follow depth {end} of the prepared grid {geometry.shape}"
            )
        end = start + probs.shape[1]
        planes = {start + n: probs[:, n] for n in range(probs.shape[1])}
        if carry is not None:
            planes[start - 1] = carry
        ready = int(np.searchsorted(upper, end))
        chunk = max(1, CHUNK_VALUES // (len(probs) * native_plane[0] * native_plane[1]))
        for first in range(done, ready, chunk):
            rows = range(first, min(first + chunk, ready))
            low = torch.stack([planes[lower[row]] for row in rows]).float()  # (n, K, H, W)
            high = torch.stack([planes[upper[row]] for row in rows]).float()
            mixed = torch.lerp(low, high, torch.from_numpy(weight[rows, None, None, None]).to(low.device))
            if native_plane != plane:
                mixed = F.interpolate(mixed, size=native_plane, mode="bilinear", align_corners=False)
            yield first, mixed
        done = max(done, ready)
        carry = probs[:, -1].clone()
    if end != depth:
        raise ValueError(f"the slabs end at depth {end} of the prepared grid {geometry.shape}")


def _depth_weights(old: int, new: int) -> tuple[list[int], list[int], np.ndarray]:
    """For each of new planes over old ones: the plane before, the plane after, and the share of the latter, (new,) float32.

    As F.interpolate(align_corners=False) reckons, in float32.
    """
    centre = np.maximum((np.arange(new, dtype=np.float32) + 0.5) * np.float32(old / new) - 0.5, 0).astype(np.float32)
    lower = np.minimum(np.floor(centre).astype(int), old - 1)
    return lower.tolist(), np.minimum(lower + 1, old - 1).tolist(), (centre - lower).astype(np.float32)


def _sides(start: Shape, stop: Shape) -> Shape:
    return stop[0] - start[0], stop[1] - start[1], stop[2] - start[2]
