"""One whole training step of DHC: two V-Nets, 14 classes, 2 labelled and 2 unlabelled patches."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from peers import load, on_cpu
from suite import Benchmark, Settings
from torch import Tensor
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

from tailseg.components import make_build, make_method
from tailseg.core import Batch, SegNet, Task
from tailseg.data.phantom import CLASSES, make_case
from tailseg.parts.ramps import ramp_up
from tailseg.train.fit import TrainOptions

SIDE, WIDTH = (32, 8) if SMALL else (64, 32)
K = len(CLASSES)
CPS_WEIGHT, TAU, BETA, EPS = 0.1, 50, 0.99, 1e-8  # of the authors' runs
OPTIONS = TrainOptions(lr=0.03)  # SGD with Nesterov momentum 0.9, weight decay 3e-5
EVERYWHERE = (0, 2, 3, 4)  # the axes that are not classes


def abdomens() -> Batch:
    """2 + 2 made-up scans, drawn onto the grid of a patch, so that all organs are in it."""
    spacing = (240 / SIDE, 320 / SIDE, 320 / SIDE)
    cases = [make_case(index, shape=(SIDE,) * 3, spacing=spacing) for index in range(4)]
    images = torch.stack([torch.from_numpy(scan.array.astype(np.float32)) for scan, _ in cases]).unsqueeze(1)
    labels = torch.stack([torch.from_numpy(label.array.astype(np.int64)) for _, label in cases])
    images = (images.clip(-75, 275) + 75) / 350
    return Batch(images[:2], labels[:2], images[2:])


def trainee(settings: Settings, precision: Precision = "fp32") -> Trainee:
    batch = abdomens()
    task = Task(CLASSES, 1, 3, (1.0, 1.0, 1.0), tuple(batch.y_l.flatten().bincount(minlength=K).tolist()))
    torch.manual_seed(0)
    method = make_method("dhc", {}, task, make_build("vnet", {"width": WIDTH}, task))
    return Trainee(method, batch, OPTIONS, settings, precision, logs=("weights_a", "weights_b"))


# --- plain


def one_hot(labels: Tensor) -> Tensor:
    """(B, *S) -> (B, K, *S) float32"""
    return F.one_hot(labels, K).movedim(-1, 1).float()


def supervised(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy and Dice under class weights."""
    probs, truth = torch.softmax(logits, 1), one_hot(target)
    hits = (probs * truth).sum(EVERYWHERE)
    missed, invented = ((1 - probs) * truth).sum(EVERYWHERE), (probs * (1 - truth)).sum(EVERYWHERE)
    dice = (2 * hits + 1) / (2 * hits + missed + invented + 1 + EPS)
    return F.cross_entropy(logits, target, weight) - (weight * dice)[1:].mean()


class Distribution:
    """DistDW: weights from how often a class is predicted on unlabelled patches. counts: (K,) of the labelled scans."""

    def __init__(self, counts: Tensor) -> None:
        self.weights = self._rarity(counts)

    def update(self, pseudo_labels: Tensor) -> Tensor:
        self.weights = BETA * self.weights + (1 - BETA) * self._rarity(one_hot(pseudo_labels).sum(EVERYWHERE))
        return self.weights

    @staticmethod
    def _rarity(counts: Tensor) -> Tensor:
        log_ratio = ((counts.max() + EPS) / (counts + EPS)).log()
        return K * log_ratio / log_ratio.max()


class Difficulty:
    """DiffDW: weights from how fast and how well a class is learnt on labelled patches."""

    def __init__(self, device: torch.device) -> None:
        self.last = torch.full((K,), EPS, device=device)
        self.learnt, self.unlearnt = torch.zeros(K, device=device), torch.zeros(K, device=device)
        self.wrong = torch.ones(K, device=device)

    def update(self, pseudo_labels: Tensor, target: Tensor) -> Tensor:
        predicted, truth = one_hot(pseudo_labels), one_hot(target)
        hits = (predicted * truth).sum(EVERYWHERE)
        missed = ((1 - predicted) * truth).sum(EVERYWHERE)
        invented = (predicted * (1 - truth)).sum(EVERYWHERE)
        dice = (2 * hits + EPS) / (2 * hits + missed + invented + 2 * EPS)
        change = dice - self.last
        stability = change * (dice / self.last).log()
        keep = (TAU - 1) / TAU
        self.learnt = keep * self.learnt + (1 - keep) * stability * (change > 0)
        self.unlearnt = keep * self.unlearnt + (1 - keep) * stability * (change <= 0)
        self.wrong = keep * self.wrong + (1 - keep) * (1 - dice)
        self.last = dice
        difficulty = ((self.unlearnt + EPS) / (self.learnt + EPS)) ** (1 / 5) * self.wrong
        return K * difficulty / difficulty.max()


class Plain:
    """The algorithm as the paper's code has it, every term by itself, out of torch's own functions."""

    def __init__(self, like: Trainee) -> None:
        self.net_a, self.net_b = textbook(like.method.net_a), textbook(like.method.net_b)
        parameters = [*self.net_a.parameters(), *self.net_b.parameters()]
        self.optimizer = torch.optim.SGD(
            parameters,
            lr=OPTIONS.lr,
            momentum=OPTIONS.momentum,
            weight_decay=OPTIONS.weight_decay,
            nesterov=True,
            foreach=False,
        )
        self.batch = contiguous(like.batch)
        self.difficulty = Difficulty(self.batch.x_l.device)
        self.distribution = Distribution(one_hot(self.batch.y_l).sum(EVERYWHERE))

    def step(self, *, gradients: bool) -> Mapping[str, Tensor]:
        y, n = self.batch.y_l, len(self.batch.x_l)
        logits_a, logits_b = self.net_a(self.batch.x).logits, self.net_b(self.batch.x).logits
        pseudo_a, pseudo_b = logits_a.argmax(1), logits_b.argmax(1)
        weights_a = self.difficulty.update(pseudo_a[:n], y)
        weights_b = self.distribution.update(pseudo_b[n:])
        sup = supervised(logits_a[:n], y, weights_a) + supervised(logits_b[:n], y, weights_b)
        cps = F.cross_entropy(logits_a, pseudo_b, weights_a) + F.cross_entropy(logits_b, pseudo_a, weights_b)
        cps = CPS_WEIGHT * ramp_up(HALF_WAY) * cps
        self.optimizer.zero_grad()
        (sup + cps).backward()
        found = {"sup": sup.detach(), "cps": cps.detach(), "weights_a": weights_a, "weights_b": weights_b}
        if gradients:
            found["gradients"] = gradient_norm(self.net_a, self.net_b)
        self.optimizer.step()
        return found


# --- the authors' code


class Authors:
    """Networks, weights of classes, losses and optimisers of train_dhc.py, called in the order of its loop."""

    def __init__(self, folder: Path, like: Trainee) -> None:
        arguments = [
            "--exp",
            "speed",
            "--max_epoch",
            str(EPOCHS),
            "--base_lr",
            str(OPTIONS.lr),
            "--cps_w",
            str(CPS_WEIGHT),
        ]
        with patch.dict(os.environ):  # it chooses its GPU on import
            code = load(folder / "code", "train_dhc", stubs=("torchvision",), arguments=arguments)
        self.code, code.config.n_filters = code, WIDTH
        self.batch = contiguous(like.batch)
        with on_cpu():
            (self.net_a, self.optimizer_a), (self.net_b, self.optimizer_b) = (
                code.make_model_all(),
                code.make_model_all(),
            )
            self.diffdw, self.distdw = code.DiffDW(K, accumulate_iters=TAU), code.DistDW(K, momentum=BETA)
            start_a, start_b = self.diffdw.init_weights(), self.distdw.init_weights(_labelled(self.batch.y_l))
            made = code.make_loss_function
            self.sup_a, self.sup_b = made("w_ce+dice", start_a), made("w_ce+dice", start_b)
            self.cps_a, self.cps_b = made("wce", start_a), made("wce", start_b)
        for net, ours in ((self.net_a, like.method.net_a), (self.net_b, like.method.net_b)):
            assert isinstance(ours, SegNet)
            copy_weights(textbook(ours), net, self.batch.x_l[..., :16, :16, :16])
            net.train()
        self.weight = code.get_current_consistency_weight(RAMP_EPOCH)

    def step(self, *, gradients: bool) -> Mapping[str, Tensor]:
        with on_cpu():
            return self._step(gradients)

    def _step(self, gradients: bool) -> Mapping[str, Tensor]:
        self.optimizer_a.zero_grad()
        self.optimizer_b.zero_grad()
        label = self.batch.y_l.unsqueeze(1)
        image = torch.cat([self.batch.x_l, self.batch.x_u], dim=0)
        n = len(image) // 2
        output_a, output_b = self.net_a(image), self.net_b(image)
        max_a = torch.argmax(output_a.detach(), dim=1, keepdim=True).long()
        max_b = torch.argmax(output_b.detach(), dim=1, keepdim=True).long()
        weight_a = self.diffdw.cal_weights(output_a[:n].detach(), label)
        weight_b = self.distdw.get_ema_weights(output_b[n:].detach())
        for loss, weight in zip(
            (self.sup_a, self.cps_a, self.sup_b, self.cps_b), (weight_a,) * 2 + (weight_b,) * 2, strict=True
        ):
            loss.update_weight(weight)
        sup = self.sup_a(output_a[:n], label) + self.sup_b(output_b[:n], label)
        cps = self.cps_a(output_a, max_b) + self.cps_b(output_b, max_a)
        loss = sup + self.weight * cps
        loss.backward()
        found = {"gradients": gradient_norm(self.net_a, self.net_b)} if gradients else {}
        self.optimizer_a.step()
        self.optimizer_b.step()
        _ = loss.item(), sup.item(), cps.item()  # for its log
        return {
            "sup": sup.detach(),
            "cps": self.weight * cps.detach(),
            "weights_a": weight_a,
            "weights_b": weight_b,
            **found,
        }


def _labelled(labels: Tensor) -> Any:
    """What DistDW asks of the labelled data set."""
    volumes = labels.cpu().numpy()
    return SimpleNamespace(unlabeled=False, ids_list=range(len(volumes)), _get_data=lambda i: (i, None, volumes[i]))


# --- the benchmark


BENCHMARKS = (
    Benchmark(
        "step-dhc",
        f"One training step of DHC: two V-Nets of width {WIDTH}, 2 + 2 patches of {SIDE}^3, {K} classes, SGD.",
        ">= 3x dhc",
        lambda settings: contestants(settings, partial(trainee, settings), Plain, {"dhc": Authors}),
        {"plain": 1e-5, "dhc": 1e-4},
        lambda settings: facts(settings, partial(trainee, settings)),
        loose={"gradients": 5e-3, "cps": 1e-4, "weights_a": 1e-4, "weights_b": 1e-4},
        voxels_decide=frozenset({"weights_a"}),  # of a fresh network, which hits some classes in a voxel or none
    ),
)
