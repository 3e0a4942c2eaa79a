"""CLD: its worked example, when confidence moves, and which voxels each network learns from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods.fixed_networks import EXAMPLE_TASK, HALFWAY, build_fixed, example_batch
from parts.worked_example import LOGITS_A, LOGITS_B, Z1, logits
from torch import Tensor

from tailseg.core import IGNORE, Batch
from tailseg.methods.cld import CLD
from tailseg.parts.losses import dice_ce, log_softmax
from tailseg.parts.ramps import ramp_up

PROBS = torch.tensor([[0.9, 0.6, 0.3, 0.2], [0.05, 0.3, 0.6, 0.3], [0.05, 0.1, 0.1, 0.5]])[None, :, None, None, :]
LATER = [[0.8, 0.8, 0.1, 0.10008], [0.1, 0.1, 0.79992, 0.1], [0.1, 0.1, 0.10008, 0.79992]]
LATER_PROBS = torch.tensor(LATER)[None, :, None, None, :]
ALL_WEIGHT = 1 / ramp_up(HALFWAY)  # the cps loss as such
NOWHERE = torch.ones(3)  # confidence of a network that samples nothing


def labelled_batch(*y_l: int) -> Batch:
    images = torch.zeros(1, 1, 1, 1, 4)
    return Batch(images, torch.tensor(y_l).reshape(1, 1, 1, 4), images[:0])


def make(*answers: Tensor, **options: Any) -> CLD:
    torch.manual_seed(0)
    return CLD(EXAMPLE_TASK, build_fixed(*answers), **options)


def answer_of_b(*classes: int) -> Tensor:
    return 5 * torch.eye(3)[list(classes)].T[None, :, None, None, :]


def test_rates_of_the_worked_example():
    method = make(PROBS.log(), PROBS.log(), period=1)
    logs = method.step(labelled_batch(0, 0, 1, 2), HALFWAY).logs
    for row in method.confidence:
        assert row.tolist() == pytest.approx([0.75, 0.6, 0.5], abs=1e-6)
    assert logs["rates_a"].tolist() == pytest.approx([0.707107, 0.894427, 1], abs=1e-6)
    for net in (method.net_a, method.net_b):
        net.decoders[0].logits.data = LATER_PROBS.log()
    method.step(labelled_batch(0, 0, 1, 2), HALFWAY)
    for row in method.confidence:
        assert row.tolist() == pytest.approx([0.75005, 0.600200, 0.500300], abs=1e-6)


def test_cross_supervision_of_the_worked_example():
    """The map is that of the network being trained, the target is the other's, and all voxels count below the line."""
    method = make(logits(Z1), answer_of_b(0, 1, 2, 1), cps_weight=ALL_WEIGHT)
    method.weighter.weights.copy_(torch.tensor([1.0, 2.0, 3.0]))
    method.confidence.copy_(torch.stack([torch.tensor([0.0, 1.0, 0.0]), NOWHERE]))  # A predicts 0, 1, 2, 0: not voxel 1
    losses = method.step(labelled_batch(0, 1, 2, 1), HALFWAY).losses
    assert losses["cps"].item() == pytest.approx(0.741026, abs=1e-6)


def test_sampling_keeps_the_rate_of_each_class():
    torch.manual_seed(0)
    labels = torch.arange(3).repeat_interleave(100_000).reshape(3, 10, 100, 100)
    kept = CLD._sample(torch.tensor([0.5, 0.8, 1.0]), labels).flatten(1).float().mean(1)
    assert kept.tolist() == pytest.approx([0.5, 0.8, 1.0], abs=0.005)
    assert not CLD._sample(torch.zeros(3), labels).any()


def test_supervised_loss_weighs_cross_entropy_and_dice():
    method, batch = make(), example_batch()
    weights = torch.tensor([1000 / 1000, 1000 / 100, 1000 / 10]) ** (1 / 3)
    expected = sum(dice_ce(log_softmax(z[:1]), batch.y_l, weights).item() for z in (LOGITS_A, LOGITS_B))
    assert method.step(batch, HALFWAY).losses["sup"].item() == pytest.approx(expected, abs=1e-5)


def test_confidence_is_one_random_draw_for_both_until_the_first_period_ends():
    method = make()
    start = method.confidence.clone()
    assert torch.equal(start[0], start[1]) and start.unique().numel() == 3
    for step in range(1, 9):
        method.step(example_batch(), HALFWAY)
        assert torch.equal(method.confidence, start) == (step < 8)
    assert method.sums.abs().max() == 0 and method.voxels.sum() == 0
    assert not torch.equal(method.confidence[0], method.confidence[1])


@pytest.mark.parametrize("absent", ["zero", "keep"])
def test_a_class_absent_from_a_period_is_recorded_as_unknown_or_left_alone(absent: Any):
    method = make(period=1, absent=absent)
    before = method.confidence.clone()
    method.step(labelled_batch(0, 0, 1, IGNORE), HALFWAY)
    assert method.confidence[:, 2].tolist() == ([0, 0] if absent == "zero" else before[:, 2].tolist())
    assert (method.confidence[:, :2] > 0).all() and not torch.equal(method.confidence[:, :2], before[:, :2])
