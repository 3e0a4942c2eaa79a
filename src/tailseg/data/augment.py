"""Weak augmentation of whole batches, on the device they are on.

Parameters are drawn from torch's CPU generator (whose state is in the checkpoint) and then applied to image and label
alike. By default nothing is done: the published abdominal runs used no augmentation.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from tailseg.core import IGNORE, Batch

Axis = Literal["d", "h", "w"]


class Augment(BaseModel):
    """flip: axes mirrored, each with probability 1/2; w is the patient's left-right, so do not flip it where classes have
    sides. rot90: a quarter turn in the (h, w) plane drawn evenly from four; needs square patches. rotate: degrees; every
    second patch is turned in the plane by an angle within +- that."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    flip: tuple[Axis, ...] = ()
    rot90: bool = False
    rotate: float = Field(default=0.0, ge=0.0, le=180.0)

    def __call__(self, batch: Batch) -> Batch:
        if not (self.flip or self.rot90 or self.rotate):
            return batch
        x_l, y_l = self._apply(batch.x_l, batch.y_l)
        # unlabelled images bring a label nobody reads, so that both halves go one way
        x_u, _ = self._apply(batch.x_u, torch.zeros_like(batch.x_u[:, 0]).long())
        return Batch(x_l, y_l, x_u)

    def _apply(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, C, *S). y: (B, *S)."""
        names = "dhw"[-(x.dim() - 2) :]
        images: list[Tensor] = []
        labels: list[Tensor] = []
        for index in range(len(x)):
            image, label = x[index], y[index]
            axes = [names.index(axis) - len(names) for axis in self.flip if torch.rand(()) < 0.5]
            turns = int(torch.randint(4, ())) if self.rot90 else 0
            angle = float(torch.empty(()).uniform_(-self.rotate, self.rotate)) if self.rotate else 0.0
            angle = angle if torch.rand(()) < 0.5 else 0.0
            images.append(_rotate(torch.rot90(image.flip(axes), turns, (-2, -1)), angle, "bilinear"))
            labels.append(_rotate_label(torch.rot90(label.flip(axes), turns, (-2, -1)), angle))
        if not images:
            return x, y
        memory_format = torch.channels_last_3d if x.dim() == 5 else torch.channels_last
        keep = memory_format if len(x) and x.is_contiguous(memory_format=memory_format) else torch.contiguous_format
        return torch.stack(images).contiguous(memory_format=keep), torch.stack(labels)


def _rotate(image: Tensor, degrees: float, mode: str) -> Tensor:
    """Turn (C, *S) about the centre of the (h, w) plane; what comes from outside is 0."""
    if degrees == 0.0:
        return image
    planes = image.reshape(1, -1, *image.shape[-2:])  # every slice and channel turns alike
    height, width = image.shape[-2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = image.new_tensor([[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]])
    grid = F.affine_grid(matrix[None], list(planes.shape), align_corners=False)
    return F.grid_sample(planes, grid, mode=mode, align_corners=False).reshape(image.shape)


def _rotate_label(label: Tensor, degrees: float) -> Tensor:
    """Turn (*S) likewise, nearest; what comes from outside is IGNORE."""
    if degrees == 0.0:
        return label
    shifted = _rotate((label + 1).float()[None], degrees, "nearest")[0].long()  # 0 is now the outside
    return torch.where(shifted == 0, IGNORE, shifted - 1)
