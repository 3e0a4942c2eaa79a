"""CPS: the worked example of its spec, digit for digit."""

from __future__ import annotations

import pytest
from methods.fixed_networks import EXAMPLE_TASK, HALFWAY, build_fixed, example_batch
from parts.worked_example import LOGITS_A, LOGITS_B, TARGET

from tailseg.methods.cps import CPS


def test_losses_of_the_spec():
    losses = CPS(EXAMPLE_TASK, build_fixed()).step(example_batch(), HALFWAY).losses
    assert losses["sup"].item() == pytest.approx(-0.497743, abs=1e-6)
    assert losses["cps"].item() == pytest.approx(0.1 * 0.28650480 * 1.758314, abs=1e-6)
    assert sum(losses.values()).item() == pytest.approx(-0.447366, abs=1e-6)  # pyright: ignore[reportAttributeAccessIssue]


def test_the_papers_losses_are_half_ce_plus_dice_on_pseudo_labels():
    method = CPS(EXAMPLE_TASK, build_fixed(), sup="ce", unsup="half_ce_dice")
    losses = method.step(example_batch(), HALFWAY).losses
    assert losses["sup"].item() == pytest.approx(0.496309 + 0.473470, abs=2e-6)
    assert losses["cps"].item() < 0.1 * 0.28650480 * 1.758314 / 2  # half the CE, minus half the Dice


def test_with_the_weighters_of_dhc_it_is_dhc():
    from tailseg.methods.dhc import DHC

    cps = CPS(EXAMPLE_TASK, build_fixed(), weighter_a="diff", weighter_b="dist").step(example_batch(), HALFWAY)
    dhc = DHC(EXAMPLE_TASK, build_fixed()).step(example_batch(), HALFWAY)
    assert {name: loss.item() for name, loss in cps.losses.items()} == {
        name: loss.item() for name, loss in dhc.losses.items()
    }


def test_the_losses_of_galoss_are_an_option():
    from tailseg.parts.gradient_aware import ga_ce, ga_loss
    from tailseg.parts.losses import log_softmax

    losses = CPS(EXAMPLE_TASK, build_fixed(), sup="ga", unsup="ga").step(example_batch(), HALFWAY).losses
    a, b = log_softmax(LOGITS_A), log_softmax(LOGITS_B)
    assert losses["sup"].item() == pytest.approx((ga_loss(a[:1], TARGET) + ga_loss(b[:1], TARGET)).item())
    cps = ga_ce(a, LOGITS_B.argmax(1)) + ga_ce(b, LOGITS_A.argmax(1))
    assert losses["cps"].item() == pytest.approx(0.1 * 0.28650480 * cps.item())
