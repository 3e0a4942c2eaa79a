"""Supervised: the loss of the spec, and indifference to unlabelled images."""

from __future__ import annotations

import pytest
import torch
from methods.fixed_networks import EXAMPLE_TASK, HALFWAY, build_fixed, example_batch
from parts.worked_example import LOGITS_A

from tailseg.core import Batch, SegNet, SegOutput, Task
from tailseg.methods.supervised import Supervised
from tailseg.options import OptionError


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


def test_the_loss_of_galoss_is_an_option():
    from tailseg.parts.gradient_aware import ga_loss
    from tailseg.parts.losses import log_softmax

    task = Task(("background", "a", "b"), 1, 2, (1.0, 1.0), (100, 10, 1))
    y = torch.randint(0, 3, (2, 4, 5))
    logits = torch.randn(2, 3, 4, 5)
    batch = Batch(torch.zeros(2, 1, 4, 5), y, torch.zeros(0, 1, 4, 5))
    loss = Supervised(task, build_fixed(logits), loss="ga").step(batch, HALFWAY).losses["sup"]
    assert loss.item() == pytest.approx(ga_loss(log_softmax(logits), y).item())


def test_a_mixer_moves_boxes_between_labelled_patches_only():
    torch.manual_seed(0)
    y = torch.arange(2).reshape(2, 1, 1).expand(2, 8, 8).clone()
    y[0, 2, 2] = 2
    x_l = torch.arange(2.0).reshape(2, 1, 1, 1).expand(2, 1, 8, 8)
    task = Task(("background", "a", "b"), 1, 2, (1.0, 1.0), (100, 10, 1))
    method = Supervised(task, build_fixed(torch.zeros(2, 3, 8, 8)), mixer={"name": "pic", "probability": 1.0})
    seen: list[torch.Tensor] = []
    method.net.encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    method.step(Batch(x_l, y, torch.full((2, 1, 8, 8), 9.0)), HALFWAY)
    assert not torch.equal(seen[0], x_l)
    assert set(seen[0].unique().tolist()) == {0.0, 1.0}


def test_a_mixer_that_is_unknown_is_named():
    with pytest.raises(OptionError, match="pic"):
        Supervised(EXAMPLE_TASK, build_fixed(), mixer="pik")
