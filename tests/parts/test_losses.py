"""Losses: the specs' worked numbers, what IGNORE and zero weights do, and the plain formula."""

from __future__ import annotations

import pytest
import torch
from parts.worked_example import LOGITS_A, LOGITS_B, TARGET, Z1, logits
from torch import Tensor

from tailseg.core import IGNORE
from tailseg.parts.losses import (
    ce_soft_dice,
    cross_entropy,
    dice_ce,
    dice_loss,
    half_ce_dice,
    log_softmax,
    masked_cross_entropy,
    soft_dice_loss,
)

LOG_PROBS = log_softmax(LOGITS_A[:1])


def test_losses_match_the_worked_example_of_the_supervised_spec():
    assert cross_entropy(LOG_PROBS, TARGET).item() == pytest.approx(0.496309, abs=1e-6)
    assert dice_loss(LOG_PROBS, TARGET).item() == pytest.approx(-0.731912, abs=1e-6)
    assert dice_ce(LOG_PROBS, TARGET).item() == pytest.approx(-0.235603, abs=1e-6)
    assert half_ce_dice(LOG_PROBS, TARGET).item() == pytest.approx(-0.235603 / 2, abs=1e-6)


def test_weighted_losses_match_the_worked_example_of_the_supervised_spec():
    weight = torch.tensor([0, 1.5, 3])
    assert cross_entropy(LOG_PROBS, TARGET, weight).item() == pytest.approx(0.520439, abs=1e-6)
    assert dice_loss(LOG_PROBS, TARGET, weight).item() == pytest.approx(-1.683369, abs=1e-6)
    assert dice_ce(LOG_PROBS, TARGET, weight).item() == pytest.approx(-1.162930, abs=1e-6)


def test_second_network_of_the_cps_example():
    log_probs = log_softmax(LOGITS_B[:1])
    assert cross_entropy(log_probs, TARGET).item() == pytest.approx(0.473470, abs=1e-6)
    assert dice_loss(log_probs, TARGET).item() == pytest.approx(-0.735609, abs=1e-6)


@pytest.mark.parametrize(("smooth", "dice"), [(1.0, 1.0), (1e-8, 0.5)])
def test_dice_of_a_class_absent_from_both_depends_on_smooth(smooth: float, dice: float):
    log_probs = log_softmax(torch.tensor([100.0, -100.0]).reshape(1, 2, 1, 1, 1))
    target = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    assert dice_loss(log_probs, target, smooth=smooth).item() == pytest.approx(-dice, abs=1e-6)


def plain_dice_ce(log_probs: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The formula as the spec writes it, with one-hot targets and boolean indexing."""
    known = target != IGNORE
    columns = log_probs.movedim(1, -1)[known]  # (V, K)
    y = target[known]
    ce = torch.nn.functional.nll_loss(columns, y, weight)
    probs, onehot = columns.exp(), torch.nn.functional.one_hot(y, len(weight)).float()
    tp = (probs * onehot).sum(0)
    fp, fn = (probs * (1 - onehot)).sum(0), ((1 - probs) * onehot).sum(0)
    dice = (2 * tp + 1) / (2 * tp + fp + fn + 1 + 1e-8)
    return ce - (weight * dice)[1:].mean()


@pytest.mark.parametrize("shape", [(5, 6), (4, 5, 6)])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_dice_ce_equals_the_plain_formula_with_its_gradient(shape: tuple[int, ...], ignored: float):
    torch.manual_seed(0)
    logits = torch.randn(2, 4, *shape, requires_grad=True)
    target = torch.randint(0, 4, (2, *shape))
    target[torch.rand(target.shape) < ignored] = IGNORE
    weight = torch.tensor([0.1, 1.0, 2.0, 4.0])
    fast, plain = dice_ce(log_softmax(logits), target, weight), plain_dice_ce(log_softmax(logits), target, weight)
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (fast, plain)))


def test_cross_entropy_is_zero_not_nan_when_every_target_weighs_nothing():
    logits = LOGITS_A.clone().requires_grad_()
    loss = cross_entropy(log_softmax(logits), torch.zeros(2, 1, 1, 4, dtype=torch.int64), torch.tensor([0.0, 1.0, 3.0]))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None and logits.grad.abs().max() == 0


def test_an_unannotated_batch_gives_no_gradient():
    logits = LOGITS_A.clone().requires_grad_()
    dice_ce(log_softmax(logits), torch.full((2, 1, 1, 4), IGNORE)).backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all() and logits.grad.abs().max() == 0


def test_dice_loss_ignores_order_of_cases():
    torch.manual_seed(0)
    log_probs, target = log_softmax(torch.randn(3, 3, 2, 4, 4)), torch.randint(0, 3, (3, 2, 4, 4))
    torch.testing.assert_close(dice_loss(log_probs, target), dice_loss(log_probs.flip(0), target.flip(0)))


ROWS = [[0.7, 0.1, 0.1, 0.1], [0.2, 0.6, 0.1, 0.1], [0.1, 0.2, 0.6, 0.1], [0.25] * 4]  # of four pixels
FOUR = torch.tensor(ROWS).T.reshape(1, 4, 2, 2).log()
EACH_ITS_CLASS = torch.arange(4).reshape(1, 2, 2)


@pytest.mark.parametrize(("threshold", "loss"), [(0.2, 0.2554653), (0.5, 0.3424860), (0.65, 0.7643514), (0.95, 0.0)])
def test_soft_dice_over_confident_pixels_equals_that_of_unimatch(threshold: float, loss: float):
    confidence = FOUR.exp().amax(1)
    assert soft_dice_loss(FOUR, EACH_ITS_CLASS, confidence >= threshold).item() == pytest.approx(loss, abs=1e-6)


def test_soft_dice_equals_that_of_crossmatch_on_acdc():
    kept = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]])
    assert soft_dice_loss(FOUR, EACH_ITS_CLASS, smooth=1e-4).item() == pytest.approx(0.2554469, abs=1e-6)
    assert soft_dice_loss(FOUR, EACH_ITS_CLASS, kept, smooth=1e-4).item() == pytest.approx(0.3417329, abs=1e-6)


@pytest.mark.parametrize(("threshold", "loss"), [(0.5, 0.1282048), (0.75, 0.1705062), (0.99, 0.0)])
def test_soft_dice_of_the_foreground_equals_that_of_crossmatch_on_la(threshold: float, loss: float):
    foreground = torch.tensor([0.9, 0.8, 0.3, 0.6])
    log_probs = torch.stack([1 - foreground, foreground]).log().reshape(1, 2, 1, 1, 4)
    target = torch.tensor([1, 1, 0, 0]).reshape(1, 1, 1, 4)
    mask = torch.tensor([0.9, 0.6, 0.7, 0.95]).reshape(1, 1, 1, 4) >= threshold
    found = soft_dice_loss(log_probs, target, mask, include_background=False)
    assert found.item() == pytest.approx(loss, abs=1e-6)


def test_leaving_voxels_unannotated_is_masking_them():
    mask = torch.tensor([[[True, True], [False, True]]])
    unannotated = torch.where(mask, EACH_ITS_CLASS, IGNORE)
    assert soft_dice_loss(FOUR, unannotated).item() == pytest.approx(soft_dice_loss(FOUR, EACH_ITS_CLASS, mask).item())
    assert soft_dice_loss(FOUR, torch.full_like(EACH_ITS_CLASS, IGNORE)).item() == 0.0


def test_soft_dice_of_an_absent_but_predicted_class_is_a_constant_without_gradient():
    log_probs = FOUR.clone().requires_grad_()
    soft_dice_loss(log_probs, torch.zeros_like(EACH_ITS_CLASS)).backward()
    assert log_probs.grad is not None
    assert log_probs.grad[:, 1:].abs().max() < 1e-4 < log_probs.grad[:, 0].abs().max()


def test_masked_cross_entropy_divides_by_all_voxels():
    """Numbers of CLD, DST and FixMatch."""
    log_probs = log_softmax(logits(Z1))
    mask = torch.tensor([1.0, 0, 1, 1]).reshape(1, 1, 1, 4)
    weight = torch.tensor([1.0, 2, 3])
    assert masked_cross_entropy(log_probs, TARGET, mask, weight).item() == pytest.approx(0.741026, abs=1e-6)
    mask = torch.tensor([True, False, True, False]).reshape(1, 1, 1, 4)
    assert masked_cross_entropy(log_probs, TARGET, mask).item() == pytest.approx(0.109053, abs=1e-6)
    strong = torch.tensor([[1.0, 0, 0], [2, 0, 1], [0.5, 0.5, 0]]).T.reshape(1, 3, 1, 3)
    target, confidence = torch.tensor([[[0, 0, 1]]]), torch.tensor([[[0.9647, 0.5065, 0.9430]]])
    assert masked_cross_entropy(log_softmax(strong), target, confidence >= 0.95).item() == pytest.approx(
        0.1838149, abs=1e-6
    )
    assert masked_cross_entropy(log_softmax(strong), target, confidence >= 0.8).item() == pytest.approx(
        0.5031549, abs=1e-6
    )


def test_masked_cross_entropy_leaves_unannotated_voxels_out_of_its_mean():
    half = TARGET.clone()
    half[..., 2:] = IGNORE
    log_probs = log_softmax(logits(Z1))
    assert masked_cross_entropy(log_probs, half).item() == pytest.approx(cross_entropy(log_probs, half).item())
    assert masked_cross_entropy(log_probs, torch.full_like(half, IGNORE)).item() == 0.0


def test_ce_soft_dice_is_the_mean_of_both():
    expected = (cross_entropy(FOUR, EACH_ITS_CLASS) + soft_dice_loss(FOUR, EACH_ITS_CLASS)) / 2
    assert ce_soft_dice(FOUR, EACH_ITS_CLASS).item() == pytest.approx(expected.item())
