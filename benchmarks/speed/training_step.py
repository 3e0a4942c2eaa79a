"""What the benchmarks of training steps share: a step as a run makes it, and networks as a textbook has them."""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import torch
from shares import step_facts
from suite import Contestant, Settings
from torch import Tensor, nn

from tailseg.core import Batch, Method, Progress, SegNet
from tailseg.networks import layers
from tailseg.runtime import Runtime, RuntimeOptions, computes_in_bf16
from tailseg.train.fit import TrainOptions, make_optimizer

HALF_WAY = Progress(step=5000, total_steps=10_000, steps_per_epoch=50)
"""Past every warm-up, so that no term of a loss is left out: epoch 100 of 200, whose ramps the authors' loops set after 99."""
RAMP_EPOCH, EPOCHS = 99, 200
SMALL = "TAILSEG_SPEED_SMALL" in os.environ
"""Everything a fraction of its size: to try things out."""


class Stepper(Protocol):
    def step(self, *, gradients: bool) -> Mapping[str, Tensor]:
        """One whole training step, and what it found. gradients: their norm too, which no run asks for."""
        ...


class Ours(Stepper, Protocol):
    method: Method


S = TypeVar("S", bound=Ours)
Precision = Literal["fp32", "bf16"]
BF16_ROUNDING = 0.1
"""By how much losses, statistics and the gradients' norm of a step in bf16 may differ from those in fp32: a fresh network's
gradients differ far more than its losses."""


def contestants(
    settings: Settings,
    ours: Callable[[Precision], S],
    plain: Callable[[S], Stepper],
    authors: Mapping[str, Callable[[Path, S], Stepper]],
) -> list[Contestant]:
    """TailSeg's step as a run has it here; where that is in bf16, the one in fp32 too, with which all must agree; the plain
    one; and the step of every peer whose checkout was given."""
    exact = ours("fp32")
    made = [Contestant("tailseg, fp32", turns(exact)), Contestant("plain", turns(plain(exact)), own_allocator=True)]
    if default_precision(settings) == "bf16":
        made.insert(0, Contestant("tailseg, bf16", turns(ours("bf16")), rounding=BF16_ROUNDING))
    for name, step in authors.items():
        if folder := settings.peers.get(name):
            made.append(Contestant(name, turns(step(folder, exact)), own_allocator=True))
    return made


def default_precision(settings: Settings) -> Precision:
    """What `train.precision: auto` takes where the benchmarks run."""
    return "bf16" if computes_in_bf16(torch.device(settings.device)) else "fp32"


def facts(settings: Settings, ours: Callable[[Precision], Ours]) -> dict[str, str]:
    precision = default_precision(settings)
    made = ours(precision)
    work = turns(made)
    work()  # the one that is compared, which no run makes
    return step_facts(made.method, work, settings.device, precision)


def turns(stepper: Stepper) -> Callable[[], Mapping[str, Tensor]]:
    """The work of a contestant. All draw the same dropout, and go on from where their last step brought them."""
    count = itertools.count()

    def work() -> Mapping[str, Tensor]:
        turn = next(count)
        torch.manual_seed(turn)
        return stepper.step(gradients=turn == 0)

    return work


class Trainee:
    """A method, placed and trained as train.fit does it, on one batch over and over. logs: of its output, which are told."""

    def __init__(
        self,
        method: Method,
        batch: Batch,
        options: TrainOptions,
        settings: Settings,
        precision: Precision,
        logs: Sequence[str] = (),
    ) -> None:
        self.logs, device = logs, settings.device
        self.runtime = Runtime(torch.device(device), RuntimeOptions(device=device, precision=precision))
        self.runtime.place(method)
        self.method = method.train()
        self.optimizer = make_optimizer(method, options)
        self.batch = batch.to(self.runtime.device, self.runtime.memory_format(method.task.spatial_dims))

    def step(self, *, gradients: bool = False) -> dict[str, Tensor]:
        with self.runtime.autocast():
            output = self.method(self.batch, HALF_WAY)
            total = torch.stack([*output.losses.values()]).sum()
        total.backward()
        found = {name: value.detach() for name, value in output.losses.items()}
        found |= {name: output.logs[name] for name in self.logs}
        assert all(math.isfinite(loss.item()) for loss in output.losses.values())
        if gradients:
            found["gradients"] = gradient_norm(self.method)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(HALF_WAY)
        return found


def gradient_norm(*modules: nn.Module) -> Tensor:
    """Of all their parameters together, without those that have none."""
    gradients = [p.grad for module in modules for p in module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def as_made(tensor: Tensor) -> Tensor:
    """A copy in contiguous memory, with the strides that torch gives a new tensor: those of one channel alone may say
    channels_last too, and a convolution then takes them at their word."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def contiguous(batch: Batch) -> Batch:
    return Batch(as_made(batch.x_l), batch.y_l, as_made(batch.x_u))


def textbook(network: SegNet) -> SegNet:
    """A copy of the network out of torch's own layers, in contiguous memory."""
    made = copy.deepcopy(network)
    for tensor in (*made.parameters(), *made.buffers()):
        tensor.data = as_made(tensor.data)
    for module in made.modules():
        if type(module).__module__ == layers.__name__ and isinstance(module, TORCH_LAYERS):
            module.__class__ = next(layer for layer in TORCH_LAYERS if isinstance(module, layer))
    return made


TORCH_LAYERS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Dropout)


def copy_weights(source: nn.Module, target: nn.Module, x: Tensor) -> None:
    """Give target the weights of source; layers correspond in the order in which a pass over x meets them."""
    pairs = zip(_layers_met(source, x), _layers_met(target, x), strict=True)
    for given, taking in pairs:
        taking.load_state_dict(given.state_dict())


@torch.no_grad()
def _layers_met(network: nn.Module, x: Tensor) -> list[nn.Module]:
    met: list[nn.Module] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, _: met.append(module))
        for module in network.modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    training = network.training
    network.eval()(x)  # so that no statistic moves
    network.train(training)
    for hook in hooks:
        hook.remove()
    return met
