"""Counts and sums per class, without one-hot tensors and without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from tailseg.core import IGNORE


def sum_per_class(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(K,) sum of values over the voxels of each class; IGNORE counts nowhere. Gradients flow to values.

    values: (B, *S). labels: (B, *S) int64.
    Summed line by line of the grid first, so that float32 keeps its precision over millions of voxels.
    """
    lines = labels.flatten(0, -2).clamp(max=num_classes)  # (B * S0 * ..., last axis); IGNORE falls into bin K
    sums = values.new_zeros(lines.shape[0], num_classes + 1)
    return sums.scatter_add(1, lines, values.flatten(0, -2)).sum(0)[:num_classes]


def count_classes(labels: Tensor, num_classes: int) -> Tensor:
    """(K,) int64 voxels of each class in labels (B, *S) int64; IGNORE counts nowhere."""
    return sum_per_class(torch.ones_like(labels), labels, num_classes)


def hard_dice_counts(prediction: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """(K,) true positives and (K,) 2TP + FP + FN, over all voxels whose target is not IGNORE. Both (B, *S) int64."""
    seen = prediction.masked_fill(target == IGNORE, IGNORE)
    hit = seen.masked_fill(prediction != target, IGNORE)
    sizes = count_classes(seen, num_classes) + count_classes(target, num_classes)
    return count_classes(hit, num_classes), sizes
