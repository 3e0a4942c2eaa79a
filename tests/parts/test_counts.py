"""Counts per class against numpy, and their precision on large volumes."""

from __future__ import annotations

import numpy as np
import torch

from tailseg.core import IGNORE
from tailseg.parts.counts import count_classes, hard_dice_counts, sum_per_class


def test_count_classes_equals_bincount_without_ignored_voxels():
    labels = torch.randint(0, 5, (2, 3, 4, 5), generator=torch.Generator().manual_seed(0))
    labels[0, 0] = IGNORE
    expected = np.bincount(labels[labels != IGNORE].numpy(), minlength=6)
    assert count_classes(labels, 6).tolist() == expected.tolist()


def test_count_classes_of_no_patches_is_zero():
    assert count_classes(torch.zeros(0, 4, 4, dtype=torch.int64), 3).tolist() == [0, 0, 0]


def test_hard_dice_counts_by_hand():
    prediction = torch.tensor([0, 0, 1, 1, 2, 1]).reshape(1, 1, 6)
    target = torch.tensor([0, 1, 1, IGNORE, 2, 2]).reshape(1, 1, 6)
    hits, sizes = hard_dice_counts(prediction, target, 3)
    assert hits.tolist() == [1, 1, 1]
    assert sizes.tolist() == [2 + 1, 2 + 2, 1 + 2]


def test_sum_per_class_keeps_precision_over_millions_of_voxels():
    labels = torch.zeros(1, 64, 256, 256, dtype=torch.int64)
    total = sum_per_class(torch.full(labels.shape, 0.9), labels, 2)[0].item()
    assert abs(total / (0.9 * labels.numel()) - 1) < 5e-6
