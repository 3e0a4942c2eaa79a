"""Boxes cut from one image and pasted into another, for images, labels and confidences alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def cutmix_boxes(
    count: int,
    sides: Sequence[int],
    *,
    probability: float = 0.5,
    area: tuple[float, float] = (0.02, 0.4),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    device: torch.device | None = None,
) -> Tensor:
    """(count, *S) bool, true inside one box per sample; a box is there with the given probability.

    sides: S. area: range of the share of the image (volume) that the box covers, before rounding down; aspect: range of the
    ratio of its last two sides. Drawn from torch's CPU generator. Source: UniMatch's and CrossMatch's released code (2D and
    3D; in 3D the first side is the cube root of the volume); the box lies anywhere fully inside.
    """
    dims = len(sides)
    total = math.prod(sides)
    boxes = torch.zeros(count, *sides, dtype=torch.bool)
    draws = torch.rand(count, 3 + dims, dtype=torch.float64).tolist()
    for box, (there, size, ratio, *place) in zip(boxes, draws, strict=True):
        if there >= probability:
            continue
        size = total * (area[0] + size * (area[1] - area[0]))
        ratio = aspect[0] + ratio * (aspect[1] - aspect[0])
        edges = [(size * ratio) ** (1 / dims), (size / ratio) ** (1 / dims)]
        edges = [size ** (1 / dims)] * (dims - 2) + edges
        # the field draws again until the box fits; cutting an edge to its side keeps the draw and the position uniform
        whole = [min(int(edge), side) for edge, side in zip(edges, sides, strict=True)]
        starts = [int(at * (side - edge + 1)) for at, side, edge in zip(place, sides, whole, strict=True)]
        box[tuple(slice(start, start + edge) for start, edge in zip(starts, whole, strict=True))] = True
    return boxes.to(device)


def paste(inside: Tensor, outside: Tensor, boxes: Tensor) -> Tensor:
    """inside where boxes is true, outside elsewhere. boxes: (B, *S) bool. The others: (B, C, *S) or (B, *S)."""
    return torch.where(boxes.unsqueeze(1) if inside.dim() > boxes.dim() else boxes, inside, outside)
