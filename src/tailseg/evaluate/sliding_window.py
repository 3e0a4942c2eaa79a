"""Predict an image larger than a patch: overlapping windows, weighted and averaged, finished slab by slab.

A window's probabilities are added in float32; where windows overlap, the sum is divided by the sum of their weights.
Windows come in depth order, so everything above the next window's first slice is finished: the probabilities of a whole
image are never held, which at 14 classes and 160x384x384 would take 1.3 GB.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH_VOXELS = 2**19
"""Of the windows of a batch, where nobody said how many they are: more at a time are no faster, and take more memory."""
SLAB_VALUES = 2**24
"""Probabilities of a slab (64 MiB)."""

Predict = Callable[[Tensor], Tensor]
Window = tuple[tuple[int, ...], Tensor]  # where its patch starts (z, y, x); probs (K, *patch)


def sliding_window(
    predict: Predict,
    image: Tensor,
    patch_size: tuple[int, ...],
    *,
    overlap: float = 0.5,
    weighting: Literal["uniform", "gaussian"] = "uniform",
    batch_size: int | None = None,
    device: torch.device | str,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first slice, probs (K, d, H, W) float32 on device): slabs in depth order that together cover the image.

    image: (C, D, H, W), on any device, of any float type. patch_size: three sides for 3D windows; two, (H, W), for
    windows in every slice. predict: (B, C, *patch) float32 on device -> probs (B, K, *patch); called without gradients.
    The slabs have the memory layout of predict's probs.
    overlap: share of a patch that the next one covers again, in [0, 1). Windows start at min(i * stride, size - patch).
    batch_size: B at most, None is batch_for(patch_size); batches are of one size but for a window.
    weighting: gaussian trusts a window's centre more (sigma = patch / 8); its weights never reach 0.
    An image smaller than the patch is padded with zeros on both sides, and its probabilities are cropped back.
    """
    if len(patch_size) not in (2, 3) or min(patch_size) < 1:
        raise ValueError(f"patch_size {patch_size} must have two or three sides of at least one voxel.")
    if image.ndim != 4:
        raise ValueError(f"sliding_window takes an image (C, D, H, W), got the shape {tuple(image.shape)}.")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}; it is the share of a patch seen twice, at least 0 and below 1.")
    if weighting not in ("uniform", "gaussian"):
        raise ValueError(f"weighting is {weighting!r}; use uniform or gaussian.")
    batch_size = batch_for(patch_size) if batch_size is None else batch_size
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; at least one window has to be predicted at a time.")
    patch = (1, *patch_size)[-3:]  # a 2D patch is one slice deep
    axes = [_axis(size, side, overlap, weighting) for size, side in zip(image.shape[1:], patch, strict=True)]
    device = torch.device(device)
    windows = _predicted_windows(predict, image, axes, batch_size, device, planar=len(patch_size) == 2)
    return _stitched_slabs(windows, axes, device)


def batch_for(patch_size: tuple[int, ...]) -> int:
    """Windows to predict at once; two or more, because torch convolves one small 3D patch on a CPU without oneDNN, three times
    as slowly as each of two."""
    return max(2, BATCH_VOXELS // math.prod(patch_size))


@dataclass(frozen=True)
class _Axis:
    """One axis of the windows. A window's weight is the product of its axes', and so is the sum of all weights."""

    patch: int
    stride: int
    pad: tuple[int, int]
    inside: slice  # the image within its padding
    starts: list[int]  # of the windows, in the padded image
    weight: Tensor  # (patch,) of a window
    total: Tensor  # (padded size,) sum of the windows' weights


def _axis(size: int, patch: int, overlap: float, weighting: str) -> _Axis:
    missing = max(0, patch - size)
    before, padded = missing // 2, size + missing
    stride = max(1, round(patch * (1 - overlap)))
    starts = [min(i * stride, padded - patch) for i in range(math.ceil((padded - patch) / stride) + 1)]
    weight = torch.ones(patch)
    if weighting == "gaussian":
        distance = torch.arange(patch) - (patch - 1) / 2
        weight = torch.exp(-0.5 * (distance / (patch / 8)) ** 2)  # at least exp(-8), so no voxel is left without weight
    total = torch.zeros(padded)
    for start in starts:
        total[start : start + patch] += weight
    return _Axis(patch, stride, (before, missing - before), slice(before, before + size), starts, weight, total)


def _predicted_windows(
    predict: Predict, image: Tensor, axes: list[_Axis], batch_size: int, device: torch.device, *, planar: bool
) -> Iterator[Window]:
    """Every window in depth order. planar: predict takes windows without a depth axis."""
    pad = [side for axis in reversed(axes) for side in axis.pad]
    padded = F.pad(image, pad) if any(pad) else image
    places = itertools.product(*(axis.starts for axis in axes))
    for size in _batch_sizes(math.prod(len(axis.starts) for axis in axes), batch_size):
        batch = list(itertools.islice(places, size))
        crops = [padded[:, *(slice(s, s + axis.patch) for s, axis in zip(place, axes, strict=True))] for place in batch]
        x = torch.stack(crops).to(device, torch.float32)  # (B, C, *patch)
        # around the call alone: a generator that yields inside inference_mode leaves its caller in it
        with torch.inference_mode():
            probs = predict(x.squeeze(2)).unsqueeze(2) if planar else predict(x)
        if probs.ndim != 5 or (len(probs), *probs.shape[2:]) != (len(x), *x.shape[2:]):
            raise ValueError(f"predict made {tuple(probs.shape)} of {tuple(x.shape)}; it must make (B, K, *patch).")
        yield from zip(batch, probs, strict=True)
        del probs  # not beside those of the next batch


def _batch_sizes(windows: int, most: int) -> list[int]:
    """As few batches as can be, none more than a window larger than another: 5 windows, 4 at most, are 3 and 2."""
    batches = -(-windows // most)
    return [windows // batches + (index < windows % batches) for index in range(batches)]


def _stitched_slabs(windows: Iterator[Window], axes: list[_Axis], device: torch.device) -> Iterator[tuple[int, Tensor]]:
    depth = axes[0]
    sums: _Sums | None = None
    for (z, y, x), probs in windows:
        if sums is None:
            sums = _Sums(probs, axes, device)
        if z > sums.top:
            yield from sums.finish(z)
        sums.add(y, x, probs)
        del probs
    assert sums is not None  # every axis has a window
    yield from sums.finish(len(depth.total))


class _Sums:
    """Weighted sums of probabilities (K, patch depth, H, W) for the slices from top on."""

    def __init__(self, first: Tensor, axes: list[_Axis], device: torch.device) -> None:
        """first: the first window's probs, whose K and layout the sums take."""
        self.depth, self.rows, self.columns = axes
        num_classes, shape = len(first), (self.depth.patch, len(self.rows.total), len(self.columns.total))
        # networks in channels_last make probs with the classes side by side; adding across layouts is eight times slower
        if first.stride(0) == 1:
            self.sums = torch.zeros((*shape, num_classes), device=device).movedim(-1, 0)
        else:
            self.sums = torch.zeros((num_classes, *shape), device=device)
        self.top = 0
        weight = _outer(*(axis.weight for axis in axes)).to(device)  # (*patch)
        self.weight = None if all(bool((axis.weight == 1).all()) for axis in axes) else weight
        self.total = _outer(*(axis.total[axis.inside] for axis in axes[1:])).to(device)  # (H, W)

    def add(self, y: int, x: int, probs: Tensor) -> None:
        """Add a window that starts at slice top."""
        window = self.sums[:, :, y : y + self.rows.patch, x : x + self.columns.patch]
        if self.weight is None:
            window += probs
        else:
            window.addcmul_(probs.float(), self.weight)

    def finish(self, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Hand out the slices above stop, at most a stride of them at a time, and make stop the top."""
        inside, plane = self.depth.inside, len(self.sums) * self.total.numel()
        thick = min(self.depth.stride, max(1, SLAB_VALUES // plane))
        for first in range(max(self.top, inside.start), min(stop, inside.stop), thick):
            last = min(first + thick, stop, inside.stop)
            slab = self.sums[:, first - self.top : last - self.top, self.rows.inside, self.columns.inside]
            total = self.depth.total[first:last].to(slab.device).view(-1, 1, 1) * self.total
            yield first - inside.start, slab / total
        done = stop - self.top
        # piece by piece, because source and target of one copy must not overlap
        for first in range(done, self.depth.patch, done):
            piece = self.sums[:, first : first + done]
            self.sums[:, first - done : first - done + piece.shape[1]] = piece
        self.sums[:, max(0, self.depth.patch - done) :] = 0
        self.top = stop


def _outer(*axes: Tensor) -> Tensor:
    """The product of vectors, each along an axis of its own."""
    product = torch.ones(())
    for axis in axes:
        product = product.unsqueeze(-1) * axis
    return product
