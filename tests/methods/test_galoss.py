"""GA-CPS: the authors' worked numbers through its own step, its ramp, and where the gradients go."""

from __future__ import annotations

import pytest
import torch
from methods.fixed_networks import build_fixed
from parts.test_gradient_aware import LABELS, PROBS, TEN, TEN_LABELS

from tailseg.checks import LATER_STEP, example_task, make_example
from tailseg.checks import example_batch as noise
from tailseg.core import Batch, Progress, Task
from tailseg.methods.cps import CPS
from tailseg.methods.galoss import GALoss
from tailseg.parts.ramps import gaussian_ramp

TASK = Task(("background", "a", "b"), 1, 2, (1.0, 1.0), (100, 10, 1))
SURE = 20 * torch.nn.functional.one_hot(TEN_LABELS, 3).movedim(3, 1).float()  # logits whose argmax is TEN_LABELS
TEN_BATCH = Batch(torch.zeros(1, 1, 2, 5), TEN_LABELS, torch.zeros(0, 1, 2, 5))


def at_epoch(epoch: int) -> Progress:
    return Progress(16 * epoch, 17000, 16)  # Synapse: 1063 epochs


def test_dice_of_both_networks_is_that_of_the_authors():
    batch = Batch(torch.zeros(1, 1, 2, 2), LABELS, torch.zeros(0, 1, 2, 2))
    losses = GALoss(TASK, build_fixed(PROBS.log(), PROBS.log())).step(batch, at_epoch(0)).losses
    assert losses["ga_dice"].item() == pytest.approx(2 * 0.1034782, abs=2e-7)


@pytest.mark.parametrize(
    ("percent", "gamma", "loss"),
    [(100, 0.5, 1.2104543), (50, 0.5, 1.5025563), (30, 0.5, 1.7024188), (100, 0, 2.3148522)],
)
def test_cross_entropy_is_that_of_the_authors(percent: float, gamma: float, loss: float):
    method = GALoss(TASK, build_fixed(TEN, SURE), sup_percent=percent, gamma=gamma)
    losses = method.step(TEN_BATCH, at_epoch(0)).losses
    assert losses["ga_ce"].item() == pytest.approx(loss, abs=2e-6)  # B is sure and right: its loss is 0


def test_a_tenth_of_the_voxels_is_kept_on_labelled_patches():
    default = GALoss(TASK, build_fixed(TEN, SURE)).step(TEN_BATCH, at_epoch(0)).losses["ga_ce"]
    assert default.item() == pytest.approx(1.407606, abs=1e-6)  # the hardest of ten


@pytest.mark.parametrize(("epoch", "weight"), [(0, 0.000674), (265, 0.005974), (531, 0.028583), (1062, 0.1)])
def test_each_network_learns_from_all_voxels_of_the_other_with_the_weight_of_the_epoch(epoch: int, weight: float):
    cps = GALoss(TASK, build_fixed(TEN, SURE)).step(TEN_BATCH, at_epoch(epoch)).losses["cps"].item()
    # A towards the labels of B is the worked example; B towards A's argmax is the rest
    one_way = GALoss(TASK, build_fixed(SURE, SURE)).step(TEN_BATCH, at_epoch(epoch)).losses["cps"].item()
    assert one_way == pytest.approx(0, abs=1e-6)
    wrong = [guess != true for guess, true in zip(TEN.argmax(1).flatten(), TEN_LABELS.flatten(), strict=True)]
    counts = TEN.argmax(1).flatten().bincount(minlength=3).clamp(min=1)
    other = sum(
        20.0 / (counts[guess] * 10) ** 0.5 for guess, bad in zip(TEN.argmax(1).flatten(), wrong, strict=True) if bad
    )
    assert cps / (1.2104543 + float(other)) == pytest.approx(weight, abs=6e-7)


def test_the_ramp_may_move_every_step():
    halfway = Progress(8508, 17000, 16)
    by_step = GALoss(TASK, build_fixed(TEN, SURE), ramp="step").step(TEN_BATCH, halfway).losses["cps"]
    by_epoch = GALoss(TASK, build_fixed(TEN, SURE)).step(TEN_BATCH, halfway).losses["cps"]
    ratio = gaussian_ramp(8508 / 17000) / gaussian_ramp(531 / 1063)
    assert by_step.item() / by_epoch.item() == pytest.approx(ratio)


def test_it_has_the_losses_of_cps_with_ga():
    batch = noise(example_task())
    own = make_example(GALoss, example_task()).step(batch, LATER_STEP).losses
    cps = make_example(CPS, example_task(), sup="ga", unsup="ga").step(batch, LATER_STEP).losses
    assert (own["ga_ce"] + own["ga_dice"]).item() == pytest.approx(cps["sup"].item(), rel=1e-5)
    raw_own, raw_cps = own["cps"] / gaussian_ramp(5 / 10), cps["cps"] / gaussian_ramp(4 / 10)  # epochs differ by one
    assert raw_own.item() == pytest.approx(raw_cps.item(), rel=1e-5)


def test_pseudo_labels_are_detached():
    method = GALoss(TASK, build_fixed(TEN, SURE))
    method.step(TEN_BATCH, at_epoch(0)).losses["cps"].backward()
    a, b = (net.decoders[0].logits.grad for net in (method.net_a, method.net_b))
    assert a is not None and b is not None
    both = GALoss(TASK, build_fixed(TEN, 30 * SURE))  # the same pseudo-labels from other logits
    both.step(TEN_BATCH, at_epoch(0)).losses["cps"].backward()
    torch.testing.assert_close(both.net_a.decoders[0].logits.grad, a)
