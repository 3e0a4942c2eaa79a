"""No method makes the host wait for the device in a step, makes a one-hot of the batch, or takes labels through numpy."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from methods.examples import METHODS, OPTIONS
from methods.syncs import DEVICE, waits_of
from torch import Tensor

from tailseg.checks import accepted_batch, example_task, make_example
from tailseg.components import Option, component_options, find
from tailseg.core import Batch, Progress, SegNet, SegOutput
from tailseg.parts.class_weights import WEIGHTERS
from tailseg.parts.dense_teacher import DINOv3
from tailseg.parts.mixing import MIXERS
from tailseg.parts.teachers import Teacher

RUN = 1000
LAST_OF_EPOCH = 599
STEPS = (0, 117, LAST_OF_EPOCH)
"""Of RUN: the first, the last of BCP's pretraining, and the last of an epoch. Without values, all between are alike."""

PASSES = {
    "crossmatch": {"net": 3},  # weak, mixed and strong images, each with its own batch statistics, as published
    "fixmatch": {"net": 2},  # weak and strong images
    "magicnet": {"net": 3},  # images, exchanged cubes, single cubes
    "ssnet": {"net": 4},  # the second gives the target of the third, whose gradient gives the input of the fourth
    "uamt": {"teacher.net": 5},  # one that teaches, and four of two samples each for the uncertainty
    "unimatch": {"net": 3},  # the mixed images in evaluation mode, weak and strong ones
}
"""method -> network -> its passes in a step, where one is not enough. Whatever can be one batch is."""

CHOICES = {"weighter": list(WEIGHTERS), "weighter_a": ["dist"], "weighter_b": ["dist"], "mixer": list(MIXERS)}
"""Of options whose type does not name them. Every weighter by itself is looked at in parts/test_memory.py."""

SYNCS = {
    ("bcp", "largest_component=True"): "connected components are labelled on the CPU, as the authors do",
}
"""(method, option) -> why it waits by design. What is named here must wait."""


def choices(option: Option) -> list[Any]:
    """All values of an option that has a closed set of them; units of time concern the host alone."""
    if option.name in CHOICES:
        return CHOICES[option.name]
    words = [word for word in option.type.split(" | ") if word != "null"]
    if words == ["bool"]:
        return [True, False]
    if words == ["epoch", "step"] or {"[", "float", "int", "str"} & {*words, *option.type}:
        return []
    return [yaml.safe_load(word) for word in words]


def variants() -> Iterator[Any]:
    """Every method with every choice that is not its default."""
    for name in METHODS:
        for option in component_options("methods", name):
            for value in choices(option):
                if value != yaml.safe_load(option.default or "null"):
                    yield pytest.param(name, {option.name: value}, id=f"{name}-{option.name}={value}")


@dataclass
class Look:
    """found: the waits and one-hots of some steps. passes: of each network, in the last of them. traced: whether autograd
    follows what a teacher said."""

    found: list[str] = field(default_factory=list)
    passes: Counter[str] = field(default_factory=Counter)
    traced: list[bool] = field(default_factory=list)


def look_at(name: str, spatial_dims: int, steps: tuple[int, ...], **options: Any) -> Look:
    """Steps of the method on DEVICE, the last one with its backward pass."""
    model = make_example(find("methods", name), example_task(4, 1, spatial_dims), **OPTIONS.get(name, {}) | options)
    batch = accepted_batch(model)
    look, features = Look(), torch.zeros(len(batch.x), 32, 2, 2, 2)  # as OPTIONS makes DINO-Mix cache them
    batch = Batch(batch.x_l, batch.y_l, batch.x_u, features if name == "dinomix" else None).to(DEVICE)
    for path, part in model.named_modules():
        if isinstance(part, DINOv3):
            part.load().to(DEVICE)  # once, before the first step
        if isinstance(part, SegNet):
            part.encoder.register_forward_hook(lambda *_, path=path: look.passes.update([path]))
        if isinstance(part, Teacher | DINOv3):
            part.register_forward_hook(lambda *call: look.traced.append(is_traced(call[-1])))
    model.to(DEVICE).train()
    for step in steps:
        progress, outputs = Progress(step, RUN, 10), []
        look.passes.clear()
        one_hot_size = model.task.num_classes * batch.y_l.numel()
        look.found += waits_of(lambda: outputs.append(model(batch, progress)), one_hot_size=one_hot_size).found  # noqa: B023
        for output in outputs if step == steps[-1] else []:  # there is none where the step could not go on
            look.found += waits_of(torch.stack([*output.losses.values()]).sum().backward).found
        look.found += waits_of(lambda: model.after_step(progress)).found  # noqa: B023
    return look


def is_traced(output: Tensor | SegOutput) -> bool:
    outputs = [output] if isinstance(output, Tensor) else [output.logits, output.embedding, *output.pyramid]
    return any(one.requires_grad for one in outputs)


@cache
def all_steps(name: str) -> Look:
    return look_at(name, 3, STEPS)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_in_3d_does_not_wait_for_the_device(name: str):
    assert all_steps(name).found == []


@pytest.mark.parametrize("name", METHODS)
def test_a_step_in_2d_does_not_wait_for_the_device(name: str):
    assert look_at(name, 2, (LAST_OF_EPOCH,)).found == []


@pytest.mark.parametrize(("name", "options"), list(variants()))
def test_no_choice_of_an_option_makes_a_step_wait(name: str, options: dict[str, Any]):
    ((key, value),) = options.items()
    found = look_at(name, 3, (LAST_OF_EPOCH,), **options).found
    assert bool(found) == ((name, f"{key}={value}") in SYNCS), found


def test_what_waits_by_design_is_a_choice_of_a_method():
    assert set(SYNCS) <= {(param.values[0], param.id.partition("-")[2]) for param in variants()}


@pytest.mark.parametrize("name", METHODS)
def test_a_network_is_passed_no_more_often_than_its_statistics_ask_for(name: str):
    passes = all_steps(name).passes
    assert passes == dict.fromkeys(passes, 1) | PASSES.get(name, {})


@pytest.mark.parametrize(
    "name", [name for name in METHODS if hasattr(inspect.getmodule(find("methods", name)), "Teacher")]
)
def test_a_teacher_leaves_nothing_to_autograd(name: str):
    traced = all_steps(name).traced
    assert traced and not any(traced)


# --- what the counter sees


def labels() -> Tensor:
    return torch.zeros(2, 8, 8, dtype=torch.int64, device=DEVICE)


def values() -> Tensor:
    return torch.rand(2, 8, 8, device=DEVICE)


@pytest.mark.parametrize(
    "work",
    [
        lambda: values().sum().item(),
        lambda: bool(values().sum() > 0),
        lambda: float(values().sum()),
        lambda: int(labels()[0, 0, 0]),
        lambda: values().tolist(),
        lambda: values().cpu(),
        lambda: values().to("cpu", torch.float16),
        lambda: values().numpy(),
        lambda: np.asarray(values()),
        lambda: values().nonzero(),
        lambda: torch.where(labels() > 0),
        lambda: values()[labels() > 0],
        lambda: values().masked_select(labels() > 0),
        lambda: values().index_put_((labels() > 0,), torch.zeros((), device=DEVICE)),
        lambda: values().masked_fill(labels() > 0, values().mean()),
        lambda: labels().unique(),
        lambda: labels().flatten().bincount(minlength=4),
        lambda: values().flatten(1).multinomial(2),
        lambda: torch.equal(labels(), labels()),
        lambda: values()[0, 0].repeat_interleave(labels()[0, 0]),
        lambda: values()[[1, 0]],
        lambda: values()[torch.tensor([1, 0])],
        lambda: torch.zeros(3).to(DEVICE),
        lambda: values()[0, 0].copy_(torch.zeros(8)),
        lambda: torch.tensor([1.0, 2.0], device=DEVICE),
        lambda: values().new_tensor([1.0, 2.0]),
        lambda: values().quantile(0.5).item(),
        lambda: torch.allclose(values(), values()),
        lambda: torch.linalg.inv(values()),
        lambda: values().new_full((), 2.0).copy_(torch.tensor(3.0)),
        lambda: F.one_hot(labels(), 4),
        lambda: values().new_zeros(2, 4, 8, 8).scatter_(1, labels()[:, None], 1.0),
        lambda: labels()[:, None] == torch.arange(4, device=DEVICE).view(1, 4, 1, 1),
    ],
)
def test_the_counter_sees(work: Callable[[], object]):
    assert waits_of(work, one_hot_size=4 * labels().numel()).found != []


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.rand(3).sum().item(),
        lambda: torch.rand(8)[torch.rand(8) < 0.5].tolist(),
        lambda: values() * torch.tensor(2.0),
        lambda: torch.rand(3).to(DEVICE, non_blocking=True),
        lambda: torch.where(labels() > 0, values(), 1.0),
        lambda: values().masked_fill(labels() > 0, 0.0),
        lambda: values()[labels()[0, 0]],
        lambda: values().mul_(2)[0].add_(1),
        lambda: torch.arange(4, device=DEVICE) + torch.full((4,), 0.5, device=DEVICE),
        lambda: values()[0, 0].repeat_interleave(labels()[0, 0], output_size=8),
    ],
)
def test_the_counter_lets_pass(work: Callable[[], object]):
    assert waits_of(work, one_hot_size=4 * labels().numel()).found == []


def test_a_wait_names_the_line_of_the_source():
    found = look_at("bcp", 2, (LAST_OF_EPOCH,), largest_component=True).found
    assert found[0].startswith("methods/bcp.py:")
