"""One whole training step of cross pseudo supervision in 2D: two U-Nets, 4 classes, 12 labelled and 12 unlabelled slices."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from peers import load, on_cpu
from suite import Benchmark, Settings
from torch import Tensor, nn
from training_step import (
    EPOCHS,
    HALF_WAY,
    RAMP_EPOCH,
    SMALL,
    Precision,
    Trainee,
    contestants,
    contiguous,
    copy_weights,
    facts,
    gradient_norm,
    textbook,
)

from tailseg.components import make_build
from tailseg.core import Batch, SegNet, Task
from tailseg.methods.cps import CPS
from tailseg.parts.losses import ce_soft_dice, cross_entropy
from tailseg.parts.ramps import ramp_up
from tailseg.train.fit import TrainOptions

SIDE = 64 if SMALL else 256
N = 4 if SMALL else 12
"""Labelled slices, and as many unlabelled ones."""
K = 4
OPTIONS = TrainOptions(lr=0.01, weight_decay=1e-4)
CPS_WEIGHT = 0.1


def hearts() -> Batch:
    """Slices with a bright ventricle in a dark wall and another one beside it, in noise."""
    generator = torch.Generator().manual_seed(0)
    row, column = torch.meshgrid(*(torch.linspace(-1, 1, SIDE),) * 2, indexing="ij")
    centre = (torch.rand(2 * N, 2, 1, 1, generator=generator) - 0.5) * 0.4
    inner = torch.hypot(row - centre[:, 0], column - centre[:, 1])  # (2 N, *S) distance to the left ventricle
    outer = torch.hypot(row - centre[:, 0], column - centre[:, 1] + 0.35)  # to the right one
    labels = torch.zeros_like(inner, dtype=torch.int64)
    labels[outer < 0.22] = 1
    labels[inner < 0.25] = 2
    labels[inner < 0.15] = 3
    brightness = torch.tensor([0.2, 0.7, 0.4, 0.8])[labels]
    images = (brightness + 0.1 * torch.randn(labels.shape, generator=generator)).clamp(0, 1).unsqueeze(1)
    return Batch(images[:N], labels[:N], images[N:])


def trainee(settings: Settings, precision: Precision) -> Trainee:
    """The method as a run has it, with the losses of the authors of the 2D code: half of CE and Dice on labels, and
    pseudo-labels on unlabelled slices only."""
    batch = hearts()
    voxels = tuple(batch.y_l.flatten().bincount(minlength=K).tolist())
    task = Task(("background", "right ventricle", "wall", "left ventricle"), 1, 2, (1.0, 1.0), voxels)
    torch.manual_seed(0)
    method = CPS(task, make_build("unet", {}, task), cps_weight=CPS_WEIGHT)
    method.sup_loss = lambda log_probs, target, weight: ce_soft_dice(log_probs, target)
    method.cps_loss = lambda log_probs, target, weight: cross_entropy(log_probs[N:], target[N:])
    made = Trainee(method, batch, OPTIONS, settings, precision)
    for group in made.optimizer.param_groups:
        group["nesterov"] = False  # as they do
    return made


class Dropouts:
    """Of networks that draw different masks from one seed: off where they are compared, on where they are timed."""

    def __init__(self, *networks: nn.Module) -> None:
        modules = [module for net in networks for module in net.modules() if isinstance(module, nn.Dropout)]
        self.rates = [(module, module.p) for module in modules]

    def switch(self, on: bool) -> None:
        for module, rate in self.rates:
            module.p = rate if on else 0.0


class Tailseg:
    def __init__(self, settings: Settings, precision: Precision) -> None:
        self.trainee = trainee(settings, precision)
        self.method, self.batch = cast(CPS, self.trainee.method), self.trainee.batch
        self.dropouts = Dropouts(self.method)

    def step(self, *, gradients: bool) -> Mapping[str, Tensor]:
        self.dropouts.switch(on=not gradients)
        return self.trainee.step(gradients=gradients)


def soft_dice(logits: Tensor, target: Tensor) -> Tensor:
    probs, truth = torch.softmax(logits, 1), F.one_hot(target, K).movedim(-1, 1).float()
    hits, mass, size = ((part).sum((0, 2, 3)) for part in (probs * truth, probs**2, truth**2))
    return (1 - (2 * hits + 1e-5) / (mass + size + 1e-5)).mean()


class Plain:
    """Every term by itself, out of torch's own functions."""

    def __init__(self, like: Tailseg) -> None:
        self.nets = textbook(like.method.net_a), textbook(like.method.net_b)
        self.dropouts = Dropouts(*self.nets)
        parameters = [parameter for net in self.nets for parameter in net.parameters()]
        self.optimizer = torch.optim.SGD(
            parameters, lr=OPTIONS.lr, momentum=OPTIONS.momentum, weight_decay=OPTIONS.weight_decay, foreach=False
        )
        self.batch = contiguous(like.batch)

    def step(self, *, gradients: bool) -> Mapping[str, Tensor]:
        self.dropouts.switch(on=not gradients)
        y = self.batch.y_l
        logits_a, logits_b = (net(self.batch.x).logits for net in self.nets)
        sup = torch.zeros((), device=y.device)
        for logits in (logits_a, logits_b):
            sup = sup + (F.cross_entropy(logits[:N], y) + soft_dice(logits[:N], y)) / 2
        pseudo_a, pseudo_b = logits_a[N:].argmax(1), logits_b[N:].argmax(1)
        cps = F.cross_entropy(logits_a[N:], pseudo_b) + F.cross_entropy(logits_b[N:], pseudo_a)
        cps = CPS_WEIGHT * ramp_up(HALF_WAY) * cps
        self.optimizer.zero_grad()
        (sup + cps).backward()
        found = {"sup": sup.detach(), "cps": cps.detach()}
        if gradients:
            found["gradients"] = gradient_norm(*self.nets)
        self.optimizer.step()
        return found


class Authors:
    """Network, losses and ramp of train_cross_pseudo_supervision_2D.py, called in the order of its loop."""

    def __init__(self, folder: Path, like: Tailseg) -> None:
        code = folder / "code"
        network, losses, ramps = (load(code, name) for name in ("networks.unet", "utils.losses", "utils.ramps"))
        self.batch = contiguous(like.batch)
        self.models = [network.UNet(in_chns=1, class_num=K).to(self.batch.x_l.device) for _ in range(2)]
        for model, ours in zip(self.models, (like.method.net_a, like.method.net_b), strict=True):
            assert isinstance(ours, SegNet)
            copy_weights(textbook(ours), model, self.batch.x_l)
            model.train()
        self.dropouts = Dropouts(*self.models)
        self.optimizers = [
            torch.optim.SGD(model.parameters(), lr=OPTIONS.lr, momentum=0.9, weight_decay=0.0001)
            for model in self.models
        ]
        self.ce, self.dice = nn.CrossEntropyLoss(), losses.DiceLoss(K)
        self.weight = CPS_WEIGHT * ramps.sigmoid_rampup(RAMP_EPOCH, EPOCHS)

    def step(self, *, gradients: bool) -> Mapping[str, Tensor]:
        self.dropouts.switch(on=not gradients)
        with on_cpu():
            return self._step(gradients)

    def _step(self, gradients: bool) -> Mapping[str, Tensor]:
        volume, label = torch.cat([self.batch.x_l, self.batch.x_u]), self.batch.y_l
        outputs_1 = self.models[0](volume)
        soft_1 = torch.softmax(outputs_1, dim=1)
        outputs_2 = self.models[1](volume)
        soft_2 = torch.softmax(outputs_2, dim=1)
        sup_1 = 0.5 * (self.ce(outputs_1[:N], label.long()) + self.dice(soft_1[:N], label.unsqueeze(1)))
        sup_2 = 0.5 * (self.ce(outputs_2[:N], label.long()) + self.dice(soft_2[:N], label.unsqueeze(1)))
        pseudo_1 = torch.argmax(soft_1[N:].detach(), dim=1, keepdim=False)
        pseudo_2 = torch.argmax(soft_2[N:].detach(), dim=1, keepdim=False)
        cps_1, cps_2 = self.ce(outputs_1[N:], pseudo_2), self.ce(outputs_2[N:], pseudo_1)
        loss_1, loss_2 = sup_1 + self.weight * cps_1, sup_2 + self.weight * cps_2
        loss = loss_1 + loss_2
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        found = {"gradients": gradient_norm(*self.models)} if gradients else {}
        for optimizer in self.optimizers:
            optimizer.step()
        _ = loss_1.item(), loss_2.item()  # for its log
        sup, cps = (sup_1 + sup_2).detach(), (cps_1 + cps_2).detach()
        return {"sup": sup, "cps": self.weight * cps, **found}


BENCHMARKS = (
    Benchmark(
        "step-cps2d",
        f"One training step of CPS: two U-Nets of width 16, {N} + {N} slices of {SIDE}^2, {K} classes, SGD.",
        ">= 4.5x ssl4mis",
        lambda settings: contestants(settings, partial(Tailseg, settings), Plain, {"ssl4mis": Authors}),
        {"plain": 1e-5, "ssl4mis": 1e-4},
        lambda settings: facts(settings, partial(Tailseg, settings)),
        loose={"gradients": 5e-3},
        remark=(
            "Dropout is off in the first turn, where results are compared, as the networks draw their masks in different "
            "orders; it is on in the turns that are timed."
        ),
    ),
)
