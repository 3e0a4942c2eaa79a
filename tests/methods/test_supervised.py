"""Supervised: the loss of the spec, and indifference to unlabelled images."""

from __future__ import annotations

import pytest
import torch
from methods.fixed_networks import EXAMPLE_TASK, HALFWAY, build_fixed, example_batch
from parts.worked_example import LOGITS_A

from tailseg.core import SegNet, SegOutput
from tailseg.methods.supervised import Supervised


def test_loss_of_the_spec():
    method = Supervised(EXAMPLE_TASK, build_fixed())
    net = method.net
    assert isinstance(net, SegNet)
    net.forward = lambda x: SegOutput(LOGITS_A[: len(x)], LOGITS_A)  # the labelled sample alone
    assert method.step(example_batch(), HALFWAY).losses["sup"].item() == pytest.approx(-0.235603, abs=1e-6)


def test_unlabelled_images_change_nothing():
    from tailseg.checks import LATER_STEP, example_task, make_example
    from tailseg.checks import example_batch as noise

    batch = noise(example_task())
    model = make_example(Supervised, example_task())
    loss = model.step(batch, LATER_STEP).losses["sup"]
    other = type(batch)(batch.x_l, batch.y_l, torch.zeros_like(batch.x_u))
    assert loss == model.step(other, LATER_STEP).losses["sup"]
