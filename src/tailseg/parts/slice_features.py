"""The features that DINOv3 gives of whole slices, made once, as another view of the teacher than slices of the patches.

A slice (H, W) is resized so that a patch (h, w) in it gets the places that it would get alone: g = slice_size / 16 along
either side, so (round(H g / h), round(W g / w)) for the slice, at least one. A patch that is the whole slice sees what it
would see alone; any other sees what surrounds it, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tailseg.parts.dense_teacher import DINOv3, slice_positions, slices_as_rgb

VERSION = 1
"""Part of every key; raised whenever the same options would give other arrays."""

AT_ONCE = 8  # slices


@final
class SliceFeatures:
    """A tailseg.core.Companion. teacher: source of a DINOv3. patch_size: (d, h, w), or (h, w) for patches of single slices,
    which show no neighbours. slices: k, of a patch. slice_size: what the teacher would see of a patch alone, in pixels.
    context: see slices_as_rgb. Raises TeacherError if the weights are not there."""

    def __init__(
        self,
        teacher: str,
        patch_size: tuple[int, ...],
        *,
        slices: int,
        slice_size: int,
        context: Literal["neighbours", "repeat"],
    ) -> None:
        self.teacher, self.slices = teacher, slices
        self.sides = patch_size[-2:]
        self.context: Literal["neighbours", "repeat"] = context if len(patch_size) == 3 else "repeat"
        self.pixels = DINOv3(teacher).patch_size  # of a place
        self.places = slice_size // self.pixels
        made_of: dict[str, Any] = {
            "version": VERSION,
            "teacher": DINOv3(teacher).fingerprint(),
            "sides": self.sides,
            "places": self.places,
            "context": self.context,
        }
        self.key = f"features-{hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]}"

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Places of a whole slice."""
        down, across = (
            max(1, round(size * self.places / side)) for size, side in zip((height, width), self.sides, strict=True)
        )
        return down, across

    def encode(self, scans: Iterable[Tensor]) -> Iterator[np.ndarray]:
        """Scans (C, D, H, W) -> (D, g_y, g_x, C_t) float16, in float32 arithmetic whatever the run's precision."""
        dino = DINOv3(self.teacher)  # here, so that no memory of the device holds it when the last scan is done
        for scan in scans:
            dino.to(scan.device)
            size = [places * self.pixels for places in self.grid(*scan.shape[2:])]
            images = slices_as_rgb(scan[None], range(scan.shape[1]), self.context)  # (D, 3, H, W)
            features = [
                dino(F.interpolate(some, size=size, mode="bilinear", antialias=True)).permute(0, 2, 3, 1).half().cpu()
                for some in images.split(AT_ONCE)
            ]
            yield torch.cat(features).numpy()

    def cut(
        self, array: np.ndarray, shape: tuple[int, ...], start: tuple[int, ...], patch_size: tuple[int, ...]
    ) -> Tensor:
        """array: of a scan (D, H, W) = shape. Returns (C_t, k, g, g) float16, read bilinearly at the slices and places that the
        teacher sees of the patch alone. What lies outside of the scan is zero, a feature that teaches nothing."""
        slices = [start[0] + z for z in slice_positions(patch_size[0], self.slices)]
        rows, columns = (
            _weights(start[axis], patch_size[axis], self.places, shape[axis], array.shape[axis]) for axis in (1, 2)
        )
        near = (_span(rows), _span(columns))  # all that has to be read
        inside = [min(max(z, 0), shape[0] - 1) for z in slices]
        read = torch.from_numpy(np.array(array[(inside, *near)], np.float32))  # (k, y, x, C_t)
        read[[at for at, z in enumerate(slices) if not 0 <= z < shape[0]]] = 0
        read = torch.einsum("iy,kyxc->kixc", rows[:, near[0]], read)
        return torch.einsum("jx,kixc->kijc", columns[:, near[1]], read).half().permute(3, 0, 1, 2)


def _weights(start: int, side: int, places: int, size: int, cells: int) -> Tensor:
    """(places, cells) weights that read places spread over a side of a patch linearly from cells spread over the scan's."""
    at = start + (torch.arange(places) + 0.5) * side / places  # voxels
    cell = (at * cells / size - 0.5).clamp(0, cells - 1)
    weights = (1 - (cell[:, None] - torch.arange(cells)).abs()).clamp_min(0)
    return weights * ((at >= 0) & (at <= size))[:, None]


def _span(weights: Tensor) -> slice:
    """The cells that any place reads."""
    used = weights.any(0).nonzero().flatten().tolist()
    return slice(used[0], used[-1] + 1) if used else slice(0, 1)
