"""Class weighters: one interface, so that any co-training method takes any of them on either network.

`method.weighter_a=diff method.weighter_b=dist` on CPS is DHC. A weighter with options is a mapping:
`method.weighter_a={name: diff, tau: 20}`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tailseg.core import Task
from tailseg.options import OptionError, check_options, suggest
from tailseg.parts.counts import count_classes, hard_dice_counts
from tailseg.parts.ranks import sum_over_ranks

EPS = 1e-8  # of the authors' code, in every ratio below


class ClassWeighter(nn.Module, ABC):
    """Weights (K,) for the losses of one network; its statistics are buffers, summed over all ranks."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.num_classes = task.num_classes

    @abstractmethod
    def update(self, pseudo_labels: Tensor, y_l: Tensor) -> Tensor:
        """The weights (K,) of this step, after taking in this step's predictions.

        pseudo_labels: (B_l + B_u, *S) int64, argmax of the weighter's own network, labelled patches first.
        y_l: (B_l, *S) int64.
        """


class NoWeights(ClassWeighter):
    """All classes alike."""

    def update(self, pseudo_labels: Tensor, y_l: Tensor) -> Tensor:
        return torch.ones(self.num_classes, device=y_l.device)


class DistDW(ClassWeighter):
    """Distribution-aware debiased weighting: rare among the network's own pseudo-labels means heavy.

    The most frequent class weighs 0, the rarest K, the others by the log of their rarity; averaged over time with decay
    beta, starting from the labelled ground truth. Without unlabelled patches the weights stay there.
    Source: Wang & Li, MICCAI 2023; github.com/xmed-lab/DHC, code/train_dhc.py.
    """

    def __init__(self, task: Task, *, beta: float = 0.99) -> None:
        super().__init__(task)
        self.beta = beta
        self.weights: Tensor
        self.register_buffer("weights", self.rarity(torch.tensor(task.class_voxels)))

    @staticmethod
    def rarity(counts: Tensor) -> Tensor:
        """dist(N): K ln P / max ln P with P_k = max N / N_k; all K where every class is equally frequent."""
        counts = counts.float()
        log_ratio = ((counts.max() + EPS) / (counts + EPS)).log()
        largest = log_ratio.max()
        return len(counts) * torch.where(largest > 0, log_ratio / largest, torch.ones_like(log_ratio))

    def update(self, pseudo_labels: Tensor, y_l: Tensor) -> Tensor:
        unlabelled = pseudo_labels[len(y_l) :]
        if len(unlabelled):
            counts = sum_over_ranks(count_classes(unlabelled, self.num_classes))
            self.weights.lerp_(self.rarity(counts), 1 - self.beta)
        return self.weights.clone()


class DiffDW(ClassWeighter):
    """Difficulty-aware debiased weighting: classes learnt slowly or badly on the labelled patches weigh more.

    lambda is the network's hard Dice on the labelled half of the batch; psi its population stability index against the step
    before, collected apart for steps up (learnt) and down (unlearnt). w = K (unlearnt / learnt)^alpha * (1 - lambda), over
    its maximum. The first step compares with lambda = 1e-8 and so counts as one large step up.

    accumulate "ema": running means with decay (tau - 1) / tau, as the authors' code. "window": sums over the last tau steps,
    as the paper's eq. 5-7. absent "half": a class in neither prediction nor target scores 0.5, as the authors' code, so that
    its comings and goings dominate psi; "skip": it keeps its statistics.
    Source: Wang & Li, MICCAI 2023; github.com/xmed-lab/DHC, code/train_dhc.py.
    """

    def __init__(
        self,
        task: Task,
        *,
        tau: int = 50,
        alpha: float = 0.2,
        accumulate: Literal["ema", "window"] = "ema",
        absent: Literal["half", "skip"] = "half",
    ) -> None:
        super().__init__(task)
        self.tau, self.alpha, self.accumulate, self.absent = tau, alpha, accumulate, absent
        k = task.num_classes
        length = 1 if accumulate == "ema" else tau
        self.last_dice: Tensor
        self.learnt: Tensor
        self.unlearnt: Tensor
        self.reversed_dice: Tensor
        self.steps: Tensor
        self.register_buffer("last_dice", torch.full((k,), EPS))
        self.register_buffer("learnt", torch.zeros(length, k))
        self.register_buffer("unlearnt", torch.zeros(length, k))
        self.register_buffer("reversed_dice", torch.ones(1, k) if accumulate == "ema" else torch.zeros(tau, k))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def update(self, pseudo_labels: Tensor, y_l: Tensor) -> Tensor:
        hits, sizes = hard_dice_counts(pseudo_labels[: len(y_l)], y_l, self.num_classes)
        hits, sizes = sum_over_ranks(torch.stack([hits, sizes])).unbind()
        dice = (2 * hits + EPS) / (sizes + 2 * EPS)  # (K,)
        change = dice - self.last_dice
        psi = change * (dice / self.last_dice).log()  # >= 0
        seen = sizes > 0 if self.absent == "skip" else torch.ones_like(sizes, dtype=torch.bool)
        self._collect(self.learnt, psi * (change > 0), seen)
        self._collect(self.unlearnt, psi * (change <= 0), seen)
        self._collect(self.reversed_dice, 1 - dice, seen)
        self.last_dice.copy_(torch.where(seen, dice, self.last_dice))
        self.steps += 1
        speed = ((self.unlearnt.sum(0) + EPS) / (self.learnt.sum(0) + EPS)) ** self.alpha
        difficulty = speed * self.reversed_dice.sum(0)
        return self.num_classes * difficulty / difficulty.max().clamp_min(torch.finfo(torch.float32).tiny)

    def _collect(self, statistic: Tensor, value: Tensor, seen: Tensor) -> None:
        if self.accumulate == "ema":
            followed = statistic.lerp(value[None], 1 / self.tau)
            statistic.copy_(torch.where(seen, followed, statistic))
        else:
            row = (self.steps % self.tau).reshape(1, 1).expand(1, self.num_classes)
            statistic.scatter_(0, row, (value * seen)[None])


class CReSTWeights(ClassWeighter):
    """Class-rebalancing rates as weights: the i-th most frequent class weighs what the i-th rarest one's frequency is.

    mu_k = (N_k / max N)^alpha over the network's own unlabelled pseudo-labels; the rarest class weighs 1, the most frequent
    min mu > 0. Averaged over time with decay beta, starting from the labelled ground truth; without unlabelled patches the
    weights stay there. Not scaled by K as those of DistDW, DiffDW and SimiS are, and published so; paired with one of them
    each network keeps its own scale, which matters in the Dice term alone.
    A class that was not predicted has mu of about (1e-8 / max N)^alpha, which the most frequent class then weighs.
    Source: Wei et al., CVPR 2021, as ported in github.com/xmed-lab/DHC, code/train_crest.py.
    """

    def __init__(self, task: Task, *, alpha: float = 1 / 3, beta: float = 0.99) -> None:
        super().__init__(task)
        self.alpha, self.beta = alpha, beta
        self.weights: Tensor
        self.register_buffer("weights", self.rates(torch.tensor(task.class_voxels)))

    def rates(self, counts: Tensor) -> Tensor:
        """(K,) in (0, 1]: mu in descending order, dealt out in ascending order."""
        counts = counts.float()
        mu = ((counts + EPS) / (counts.max() + EPS)) ** self.alpha
        order = mu.argsort(descending=True, stable=True)  # of equally frequent classes the lower index first
        return torch.empty_like(mu).scatter(0, order, mu[order.flip(0)])

    def update(self, pseudo_labels: Tensor, y_l: Tensor) -> Tensor:
        unlabelled = pseudo_labels[len(y_l) :]
        if len(unlabelled):
            counts = sum_over_ranks(count_classes(unlabelled, self.num_classes))
            self.weights.lerp_(self.rates(counts), 1 - self.beta)
        return self.weights.clone()


class SimiSWeights(ClassWeighter):
    """Weights by the gap to the most frequent class: s_k = K (max P - P_k), P the shares of the network's pseudo-labels.

    The shares are those of all its predictions, labelled patches included (without unlabelled patches of these alone), and
    count unannotated voxels too, as predictions exist there. The most frequent class gets 0, all rare ones nearly K.
    Averaged over time with decay beta, starting from K for all and one step towards the labelled ground truth, so that the
    first 1 / (1 - beta) steps weigh the classes nearly alike.
    Source: Chen et al., arXiv 2211.11086, as ported in github.com/xmed-lab/DHC, code/train_simis.py.
    """

    def __init__(self, task: Task, *, beta: float = 0.99) -> None:
        super().__init__(task)
        self.beta = beta
        self.weights: Tensor
        start = torch.full((task.num_classes,), float(task.num_classes))
        self.register_buffer("weights", start.lerp(self.gap(torch.tensor(task.class_voxels)), 1 - beta))

    @staticmethod
    def gap(counts: Tensor) -> Tensor:
        """(K,) in [0, K]: K (max P - P_k) with P_k = N_k / sum N."""
        counts = counts.float()
        share = (counts + EPS) / (counts.sum() + EPS)
        return len(counts) * (share.max() - share)

    def update(self, pseudo_labels: Tensor, y_l: Tensor) -> Tensor:
        counts = sum_over_ranks(count_classes(pseudo_labels, self.num_classes))
        self.weights.lerp_(self.gap(counts), 1 - self.beta)
        return self.weights.clone()


class CLDWeights(ClassWeighter):
    """Static weights from the labelled ground truth: w_k = (max N / N_k)^exponent, 1 for the most frequent class.

    They look at no prediction, so unlabelled patches make no difference to them. A class without a labelled voxel counts as
    having one, where the authors' code divides by zero.
    Source: Lin et al., MICCAI 2022, as ported in github.com/xmed-lab/DHC, code/train_cld.py.
    """

    def __init__(self, task: Task, *, exponent: float = 1 / 3) -> None:
        super().__init__(task)
        counts = torch.tensor(task.class_voxels).clamp_min(1).float()  # deviation: the code divides by 0
        self.weights: Tensor
        self.register_buffer("weights", (counts.max() / counts) ** exponent)

    def update(self, pseudo_labels: Tensor, y_l: Tensor) -> Tensor:
        return self.weights.clone()


WEIGHTERS: Mapping[str, type[ClassWeighter]] = {
    "none": NoWeights,
    "dist": DistDW,
    "diff": DiffDW,
    "crest": CReSTWeights,
    "simis": SimiSWeights,
    "cld": CLDWeights,
}

WeighterSpec = str | dict[str, Any]


def make_weighter(spec: WeighterSpec, task: Task) -> ClassWeighter:
    """The weighter called by name, or by {name: ..., <options>}. Raises OptionError for unknown names and options."""
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = str(options.pop("name", None))
    if name not in WEIGHTERS:
        raise OptionError(f"No class weighter is called '{name}'. {suggest(name, WEIGHTERS)}")
    make = WEIGHTERS[name]
    return make(task, **check_options(make, options))
