"""Weak augmentation of whole batches, on the device they are on.

Parameters are drawn from torch's CPU generator (whose state is in the checkpoint) and then applied to image and label
alike. By default nothing is done: the published abdominal runs used no augmentation.

A teacher's features of the patch are mirrored with it. That is not quite what the teacher says of a mirrored patch: no vision
transformer is equivariant, and along d the slices that were read may end up one off. They cannot be turned.
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
        n = len(batch.x_l)
        features = (None, None) if batch.features is None else (batch.features[:n], batch.features[n:])
        x_l, y_l, features_l = self._apply(batch.x_l, batch.y_l, features[0])
        # unlabelled images bring a label nobody reads, so that both halves go one way
        x_u, _, features_u = self._apply(batch.x_u, torch.zeros_like(batch.x_u[:, 0]).long(), features[1])
        if features_l is None or features_u is None:
            return Batch(x_l, y_l, x_u)
        return Batch(x_l, y_l, x_u, torch.cat([features_l, features_u]))

    @property
    def turns(self) -> bool:
        return self.rot90 or self.rotate > 0

    def _apply(self, x: Tensor, y: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """x: (B, C, *S). y: (B, *S). features: (B, C_t, k, g, g), whose last axes are those of S."""
        assert features is None or not self.turns, "features cannot be turned"
        names = "dhw"[-(x.dim() - 2) :]
        images: list[Tensor] = []
        labels: list[Tensor] = []
        told: list[Tensor] = []
        for index in range(len(x)):
            image, label = x[index], y[index]
            axes = [names.index(axis) - len(names) for axis in self.flip if torch.rand(()) < 0.5]
            turns = int(torch.randint(4, ())) if self.rot90 else 0
            angle = float(torch.empty(()).uniform_(-self.rotate, self.rotate)) if self.rotate else 0.0
            angle = angle if torch.rand(()) < 0.5 else 0.0
            images.append(_rotate(torch.rot90(image.flip(axes), turns, (-2, -1)), angle, "bilinear"))
            labels.append(_rotate_label(torch.rot90(label.flip(axes), turns, (-2, -1)), angle))
            if features is not None:
                told.append(features[index].flip(axes))
        if not images:
            return x, y, features
        memory_format = torch.channels_last_3d if x.dim() == 5 else torch.channels_last
        keep = memory_format if len(x) and x.is_contiguous(memory_format=memory_format) else torch.contiguous_format
        moved = torch.stack(images).contiguous(memory_format=keep), torch.stack(labels)
        return *moved, torch.stack(told) if told else None


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
