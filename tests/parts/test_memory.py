"""The largest tensor that statistics and losses make on the way to their few numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from methods.syncs import DEVICE, waits_of
from torch import Tensor

from tailseg.checks import example_task
from tailseg.parts import gradient_aware, losses
from tailseg.parts.class_weights import WEIGHTERS
from tailseg.parts.counts import count_classes, hard_dice_counts, sum_per_class

CLASSES, BATCH, SIDES = 14, 4, (64, 128, 128)
VOXELS = BATCH * SIDES[0] * SIDES[1] * SIDES[2]
LABEL_MAP, CLASS_MAP = 8 * VOXELS, 4 * CLASSES * VOXELS
"""Bytes of int64 labels (B, *S), and of float32 values (B, K, *S)."""


def labels() -> Tensor:
    return torch.zeros(BATCH, *SIDES, dtype=torch.int64, device=DEVICE)


def log_probs() -> Tensor:
    return torch.zeros(BATCH, CLASSES, *SIDES, device=DEVICE)


def largest(work: Callable[[], object]) -> int:
    waits = waits_of(work)
    assert waits.found == []
    return waits.largest


STATISTICS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "count_classes": lambda predicted, y: count_classes(y, CLASSES),
    "hard_dice_counts": lambda predicted, y: hard_dice_counts(predicted, y, CLASSES),
    "sum_per_class": lambda predicted, y: sum_per_class(predicted.float(), y, CLASSES),
}
LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": losses.cross_entropy,
    "dice_loss": losses.dice_loss,
    "dice_ce": losses.dice_ce,
    "half_ce_dice": losses.half_ce_dice,
    "masked_cross_entropy": losses.masked_cross_entropy,
    "soft_dice_loss": losses.soft_dice_loss,
    "ce_soft_dice": losses.ce_soft_dice,
    "ga_ce": gradient_aware.ga_ce,
    "ga_dice": gradient_aware.ga_dice,
    "ga_loss": gradient_aware.ga_loss,
}


@pytest.mark.parametrize("name", STATISTICS)
def test_a_statistic_makes_nothing_larger_than_its_labels(name: str):
    predicted, y = labels(), labels()
    assert largest(lambda: STATISTICS[name](predicted, y)) <= LABEL_MAP


@pytest.mark.parametrize("name", WEIGHTERS)
def test_a_class_weighter_makes_nothing_larger_than_its_labels(name: str):
    weighter, predicted, y = WEIGHTERS[name](example_task(CLASSES)).to(DEVICE), labels(), labels()[: BATCH // 2]
    assert largest(lambda: weighter.update(predicted, y)) <= LABEL_MAP


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_makes_nothing_larger_than_its_log_probabilities(name: str):
    given, y = log_probs().requires_grad_(), labels()
    assert largest(lambda: LOSSES[name](given, y).backward()) <= CLASS_MAP


def test_log_softmax_makes_nothing_larger_than_its_result():
    logits = log_probs().to(torch.bfloat16, memory_format=torch.channels_last_3d)
    assert largest(lambda: losses.log_softmax(logits)) <= CLASS_MAP


def test_every_loss_is_looked_at():
    public = {
        name
        for module in (losses, gradient_aware)
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")
    }
    assert public == {*LOSSES, "log_softmax"}
