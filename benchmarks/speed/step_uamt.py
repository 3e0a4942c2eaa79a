"""One whole training step of UA-MT as on the left atrium: a V-Net, 2 labelled and 2 unlabelled patches, 8 teacher passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from peers import load, on_cpu
from suite import Benchmark, Settings
from torch import Tensor, nn
from training_step import (
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
from tailseg.methods.uamt import UAMT
from tailseg.parts.losses import cross_entropy, soft_dice_loss
from tailseg.train.fit import TrainOptions

SIDES = (32, 32, 32) if SMALL else (112, 112, 80)
WIDTH = 16
PASSES = 8
DECAY = 0.99
WEIGHT = 0.1  # of the consistency at the end of its ramp
STEP, STEPS = 3000, 6000  # half way, where a weight that moves every 150 steps, as theirs, is what ours is
RAMP = math.exp(-5 * (1 - STEP / STEPS) ** 2)
OPTIONS = TrainOptions(lr=0.01, weight_decay=1e-4)


def blobs(sides: Sequence[int], count: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """(count, 1, *S) scans of mean 0 and variance 1 with bright blobs, one in the other, in noise; (count, *S) int64 labels."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, side) for side in sides), indexing="ij"))
    centre = (torch.rand(count, len(sides), *(1 for _ in sides), generator=generator) - 0.5) * 0.6
    distance = (grid - centre).square().sum(1)
    labels = torch.stack([distance < 0.3 / k for k in range(1, num_classes)]).sum(0)
    images = 2 * labels + torch.randn(labels.shape, generator=generator)
    images = (images - images.mean()) / images.std()
    return images.unsqueeze(1), labels


def sharpen(net: SegNet, factor: float) -> None:
    """Make fresh logits larger, so that the network is sure of many voxels, as a trained one is, and not of others."""
    with torch.no_grad():
        for parameter in cast(nn.Module, net.decoders[0].head).parameters():
            parameter.mul_(factor)


def half_ce_foreground_dice(log_probs: Tensor, target: Tensor) -> Tensor:
    return (cross_entropy(log_probs, target) + soft_dice_loss(log_probs, target, include_background=False)) / 2


def trainee(settings: Settings, precision: Precision) -> Trainee:
    """The method as a run has it, with what the authors' loop counts, and with their Dice of the foreground alone."""
    images, labels = blobs(SIDES, 4, 2)
    task = Task(("background", "left atrium"), 1, 3, (0.625,) * 3, tuple(labels[:2].flatten().bincount().tolist()))
    torch.manual_seed(0)
    method = UAMT(
        task,
        make_build("vnet", {"width": WIDTH}, task),
        consistency_weight=WEIGHT,
        ramp="step",
        ema_step="step",
        ema_decay=DECAY,
        passes=PASSES,
    )
    method.sup_loss = half_ce_foreground_dice
    sharpen(method.net, 4)
    method.teacher.copy_from(method.net)
    batch = Batch(images[:2], labels[:2], images[2:])
    made = Trainee(method, batch, OPTIONS, settings, precision, logs=("kept", "uncertainty"))
    for group in made.optimizer.param_groups:
        group["nesterov"] = False  # as they do
    return made


class Plain:
    """The algorithm as the paper has it, every probability map of the teacher kept, out of torch's own functions."""

    def __init__(self, like: Trainee) -> None:
        method = cast(UAMT, like.method)
        self.net, self.teacher = textbook(method.net), textbook(method.teacher.net)
        self.optimizer = torch.optim.SGD(
            self.net.parameters(),
            lr=OPTIONS.lr,
            momentum=OPTIONS.momentum,
            weight_decay=OPTIONS.weight_decay,
            foreach=False,
        )
        self.batch = contiguous(like.batch)

    def step(self, *, gradients: bool) -> Mapping[str, Tensor]:
        n, y = len(self.batch.x_l), self.batch.y_l
        logits = self.net(self.batch.x).logits
        probs, truth = torch.softmax(logits[:n], 1), F.one_hot(y, 2).movedim(-1, 1).float()
        hits, mass, size = (part[:, 1].sum() for part in (probs * truth, probs**2, truth**2))
        sup = (F.cross_entropy(logits[:n], y) + 1 - (2 * hits + 1e-5) / (mass + size + 1e-5)) / 2
        with torch.no_grad():
            x_u = self.batch.x_u
            target = self._teach(x_u)
            maps = torch.cat([self._teach(torch.cat([x_u, x_u])) for _ in range(PASSES // 2)])
            mean = maps.view(PASSES, *target.shape).mean(0)
            uncertainty = -(mean * torch.log(mean + 1e-6)).sum(1)
            certain = (uncertainty < (0.75 + 0.25 * RAMP) * math.log(2)).float()
        distance = ((torch.softmax(logits[n:], 1) - target) ** 2).sum(1)
        consistency = WEIGHT * RAMP * (certain * distance).sum() / (2 * certain.sum() + 1e-16)
        self.optimizer.zero_grad()
        (sup + consistency).backward()
        found = {"sup": sup.detach(), "consistency": consistency.detach()}
        found |= {"kept": certain.mean(), "uncertainty": uncertainty.mean()}
        if gradients:
            found["gradients"] = gradient_norm(self.net)
        self.optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                mine.copy_(DECAY * mine + (1 - DECAY) * theirs)
        return found

    def _teach(self, x: Tensor) -> Tensor:
        noise = torch.clamp(0.1 * torch.randn_like(x), -0.2, 0.2)
        return torch.softmax(self.teacher(x + noise).logits, 1)


class Authors:
    """Networks, losses and ramps of train_LA_meanteacher_certainty_unlabel.py, called in the order of its loop."""

    def __init__(self, folder: Path, like: Trainee) -> None:
        code = folder / "code"
        self.vnet, self.losses, self.ramps = (
            load(code, name) for name in ("networks.vnet", "utils.losses", "utils.ramps")
        )
        method = cast(UAMT, like.method)
        self.batch = contiguous(like.batch)
        self.model, self.ema_model = (self._network(net) for net in (method.net, method.teacher.net))
        for parameter in self.ema_model.parameters():
            parameter.detach_()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=OPTIONS.lr, momentum=0.9, weight_decay=0.0001)

    def _network(self, ours: SegNet) -> nn.Module:
        made = self.vnet.VNet(n_channels=1, n_classes=2, normalization="batchnorm", has_dropout=True)
        made.to(self.batch.x_l.device)
        copy_weights(textbook(ours), made, self.batch.x_l[..., :16, :16, :16])
        return made.train()

    def step(self, *, gradients: bool) -> Mapping[str, Tensor]:
        with on_cpu():
            return self._step(gradients)

    def _step(self, gradients: bool) -> Mapping[str, Tensor]:
        label = self.batch.y_l
        volume = torch.cat([self.batch.x_l, self.batch.x_u])
        n, unlabelled = len(label), self.batch.x_u
        outputs = self.model(volume)  # they draw the first noise before it; so everybody's draws are the same
        noise = torch.clamp(torch.randn_like(unlabelled) * 0.1, -0.2, 0.2)
        with torch.no_grad():
            ema_output = self.ema_model(unlabelled + noise)
        repeated = unlabelled.repeat(2, 1, 1, 1, 1)
        stride = len(repeated) // 2
        preds = torch.zeros([stride * PASSES, 2, *SIDES], device=volume.device)
        for i in range(PASSES // 2):
            noisy = repeated + torch.clamp(torch.randn_like(repeated) * 0.1, -0.2, 0.2)
            with torch.no_grad():
                preds[2 * stride * i : 2 * stride * (i + 1)] = self.ema_model(noisy)
        preds = F.softmax(preds, dim=1).reshape(PASSES, stride, 2, *SIDES)
        preds = torch.mean(preds, dim=0)
        uncertainty = -1.0 * torch.sum(preds * torch.log(preds + 1e-6), dim=1, keepdim=True)

        loss_ce = F.cross_entropy(outputs[:n], label)
        soft = F.softmax(outputs, dim=1)
        sup = 0.5 * (loss_ce + self.losses.dice_loss(soft[:n, 1], label == 1))
        distance = self.losses.softmax_mse_loss(outputs[n:], ema_output)
        threshold = (0.75 + 0.25 * self.ramps.sigmoid_rampup(STEP, STEPS)) * math.log(2)
        mask = (uncertainty < threshold).float()
        distance = torch.sum(mask * distance) / (2 * torch.sum(mask) + 1e-16)
        consistency = WEIGHT * self.ramps.sigmoid_rampup(STEP // 150, STEPS // 150) * distance
        loss = sup + consistency
        self.optimizer.zero_grad()
        loss.backward()
        found = {"gradients": gradient_norm(self.model)} if gradients else {}
        self.optimizer.step()
        alpha = min(1 - 1 / (STEP + 1), DECAY)
        for slow, fast in zip(self.ema_model.parameters(), self.model.parameters(), strict=True):
            slow.data.mul_(alpha).add_(fast.data, alpha=1 - alpha)
        _ = loss.item(), distance.item()  # for its log
        found |= {"kept": mask.mean(), "uncertainty": uncertainty.mean()}
        return {"sup": sup.detach(), "consistency": consistency.detach(), **found}


BENCHMARKS = (
    Benchmark(
        "step-uamt",
        f"One training step of UA-MT: a V-Net of width {WIDTH}, 2 + 2 patches of {'x'.join(map(str, SIDES))}, {PASSES} passes "
        "of the teacher, SGD.",
        ">= 5x uamt",
        lambda settings: contestants(settings, partial(trainee, settings), Plain, {"uamt": Authors}),
        {"plain": 1e-5, "uamt": 1e-4},
        lambda settings: facts(settings, partial(trainee, settings)),
        loose={"gradients": 5e-3},
        remark="Dropout and noise are on, and the same for all: the student's pass is first, so that one seed gives all "
        "the same.",
    ),
)
