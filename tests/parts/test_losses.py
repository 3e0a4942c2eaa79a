"""Losses: the specs' worked numbers, what IGNORE and zero weights do, and the plain formula."""

from __future__ import annotations

import pytest
import torch
from parts.worked_example import LOGITS_A, LOGITS_B, TARGET
from torch import Tensor

from tailseg.core import IGNORE
from tailseg.parts.losses import cross_entropy, dice_ce, dice_loss, half_ce_dice, log_softmax

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
