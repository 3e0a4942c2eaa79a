"""DHC: one full iteration of its spec, digit for digit, and where its weights come from."""

from __future__ import annotations

import pytest
import torch
from methods.fixed_networks import EXAMPLE_TASK, HALFWAY, build_fixed, example_batch
from parts.worked_example import LOGITS_A, LOGITS_B, TARGET

from tailseg.methods.dhc import DHC


def test_one_iteration_of_the_spec():
    output = DHC(EXAMPLE_TASK, build_fixed()).step(example_batch(), HALFWAY)
    assert output.logs["weights_a"].tolist() == pytest.approx([3, 3, 2.735429], abs=1e-6)
    assert output.logs["weights_b"].tolist() == pytest.approx([0.03, 1.485, 3], abs=1e-6)
    assert output.losses["sup"].item() == pytest.approx(-2.733910, abs=2e-6)
    assert output.losses["cps"].item() == pytest.approx(0.1 * 0.28650480 * 1.544304, abs=1e-6)
    assert sum(output.losses.values()).item() == pytest.approx(-2.689665, abs=2e-6)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(("a", "b"), [("dist", "dist"), ("diff", "diff"), ("none", "dist"), ("dist", "diff")])
def test_either_network_takes_any_weighter(a: str, b: str):
    logs = DHC(EXAMPLE_TASK, build_fixed(), weighter_a=a, weighter_b=b).step(example_batch(), HALFWAY).logs
    maximum = {"none": 1.0, "dist": 3.0, "diff": 3.0}
    assert logs["weights_a"].max().item() == pytest.approx(maximum[a])
    assert logs["weights_b"].max().item() == pytest.approx(maximum[b])


def test_its_weights_go_into_the_losses_of_galoss():
    from tailseg.parts.gradient_aware import ga_ce, ga_loss
    from tailseg.parts.losses import log_softmax

    losses = DHC(EXAMPLE_TASK, build_fixed(), sup="ga", unsup="ga").step(example_batch(), HALFWAY).losses
    a, b = log_softmax(LOGITS_A), log_softmax(LOGITS_B)
    w_a, w_b = torch.tensor([3, 3, 2.735429]), torch.tensor([0.03, 1.485, 3])
    sup = ga_loss(a[:1], TARGET, w_a) + ga_loss(b[:1], TARGET, w_b)
    cps = ga_ce(a, LOGITS_B.argmax(1), w_a) + ga_ce(b, LOGITS_A.argmax(1), w_b)
    assert losses["sup"].item() == pytest.approx(sup.item(), rel=1e-6)
    assert losses["cps"].item() == pytest.approx(0.1 * 0.28650480 * cps.item(), rel=1e-6)
