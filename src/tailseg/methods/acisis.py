"""ACISIS: pseudo-labelled voxels of classes that the network masters are sampled less often.

Paper: H. Basak, S. Ghosal, R. Sarkar, "Addressing Class Imbalance in Semi-supervised Image Segmentation: A Study on Cardiac
    MRI", MICCAI 2022, https://arxiv.org/abs/2209.00123
Family: class balancing
Needs: an EMA teacher (no gradients)
Cost: x2.2
Idea: Entropy, confidence and margin of each class on the labelled patches are fused, once per epoch, by a fuzzy-rank rule
    into one confidence per class. The student learns the teacher's hard labels in a random part of the unlabelled voxels,
    the smaller the more confident their class is.
Algorithm:
    z = f([x_l; x_u]), p = softmax z; y_hat = argmax g(x_u)      no noise, no gradient; dropout on, statistics of the batch
    over an epoch, mean over the voxels of class k in y, summed:
        E_k += p_k sum over c of log p_c,  C_k += p_k,  M_k += max p - p_k
    at its end, R = [E; C; M] / steps, r = softmax of each row over classes, G = 1 - exp(-exp(-2 r))
        per row, all but the m = 12 smallest G: G = 0.632, r = 0
        cc = (1 - mean over rows of r) * (sum over rows of G), over its maximum
        CC = 0.99 CC + 0.01 cc;  s = 1 - CC;  s = (s / max s)^2.5      s = 1 before
    a = argmax z_u;  map = 1[u > 1 - s_a] (max p_u)^1.5, u ~ U(0, 1)
    L = CE(z_l, y) + Dice(p_l, y) + 0.1 ramp(epoch) mean over voxels of map CE(z_u, y_hat)
    optimiser step, then g <- a g + (1 - a) f with a = min(1 - 1 / (epoch + 1), 0.99), parameters only
Constants: the 3D re-implementation in github.com/xmed-lab/DHC, train_acisis.py; the paper's own formulas were not compared.
Deviations: that code scores the probabilities of every labelled patch also with the labels of every other one;
    that made the published tables and stays the default (within each process), official_broadcast=false scores each
    with its own. New rates act from the first step of the next epoch, not from the last of this one, so that
    accumulated gradients see one rate. The teacher starts as a copy of the student, not from weights of its own; in
    epoch 0 each step copies the student anyway.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from tailseg.core import Batch, BuildNetwork, Method, Progress, StepOutput, Task, Unit
from tailseg.options import OptionError
from tailseg.parts.counts import count_classes, sum_per_class
from tailseg.parts.losses import dice_ce, log_softmax, masked_cross_entropy
from tailseg.parts.ramps import ramp_up
from tailseg.parts.ranks import sum_over_ranks
from tailseg.parts.teachers import Teacher


@final
class ACISIS(Method):
    """unsup_weight: at the end of the ramp. ramp: what it rises by, over the whole run. top: m of the fuzzy ranks, at
    most the number of classes. rate_power: exponent of s. confidence_power: of max p. confidence_decay: of CC, per
    epoch. official_broadcast: score every labelled patch with the labels of all, as published.
    """

    def __init__(
        self,
        task: Task,
        build: BuildNetwork,
        *,
        unsup_weight: float = 0.1,
        ramp: Unit = "epoch",
        top: int = 12,
        rate_power: float = 2.5,
        confidence_power: float = 1.5,
        confidence_decay: float = 0.99,
        ema_decay: float = 0.99,
        official_broadcast: bool = True,
    ) -> None:
        super().__init__(task)
        if top < 1:
            raise OptionError(f"method.top is {top}; it counts the classes kept in each fuzzy rank, at least 1.")
        k = task.num_classes
        self.net = build(init="kaiming")
        # a copy, where DHC's code draws weights of its own that the first step overwrites
        self.teacher = Teacher(self.net, decay=ema_decay, warm_up="epoch", mode="train")
        self.unsup_weight, self.top, self.official_broadcast = unsup_weight, min(top, k), official_broadcast
        self.ramp: Unit = ramp
        self.rate_power, self.confidence_power, self.confidence_decay = rate_power, confidence_power, confidence_decay
        self.indicators: Tensor
        self.records: Tensor
        self.confidence: Tensor
        self.rate: Tensor
        self.register_buffer("indicators", torch.zeros(3, k))  # E, C, M, summed over this epoch
        self.register_buffer("records", torch.zeros(()))
        self.register_buffer("confidence", torch.zeros(k))  # CC
        self.register_buffer("rate", torch.ones(k))  # s

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        logits, n = self.net(batch.x).logits, len(batch.x_l)  # (B_l + B_u, K, *S)
        log_probs, labels = log_softmax(logits), logits.argmax(1)
        self.record(log_probs[:n].detach(), batch.y_l)
        losses = {"sup": dice_ce(log_probs[:n], batch.y_l)}
        logs = {"rate": self.rate.clone()}
        if len(batch.x_u):
            pseudo_labels = self.teacher(batch.x_u).logits.argmax(1)  # (B_u, *S)
            sampled = torch.rand_like(log_probs[n:, 0]) > 1 - self.rate[labels[n:]]
            peak = log_probs[n:].detach().amax(1).exp()  # (B_u, *S)
            unsup = masked_cross_entropy(log_probs[n:], pseudo_labels, sampled * peak**self.confidence_power)
            losses["unsup"] = self.unsup_weight * ramp_up(progress, self.ramp) * unsup
            logs["sampled"] = sampled.float().mean()
        return StepOutput(losses, count_classes(labels, self.task.num_classes), logs)

    @torch.no_grad()
    def record(self, log_probs: Tensor, y: Tensor) -> None:
        """Add the indicators of labelled patches; a class without voxels adds 0. log_probs: (B, K, *S). y: (B, *S)."""
        k = self.task.num_classes
        probs = log_probs.exp()
        spread = (probs + 1e-12).log().sum(1, keepdim=True)  # over all classes, as in DHC's code; no minus sign
        margin = probs.amax(1, keepdim=True) - probs
        sums = torch.stack([self.sum_at_labels(values, y) for values in (probs * spread, probs, margin)])  # (3, K)
        sums, counts = sum_over_ranks(torch.cat([sums, count_classes(y, k)[None].float()])).split([3, 1])
        self.indicators += sums / (counts + 1e-12)
        self.records += 1

    def sum_at_labels(self, values: Tensor, y: Tensor) -> Tensor:
        """(K,) sum of values (B, K, *S) at the voxels' own classes."""
        if self.official_broadcast:  # each sample's values at the labels of every sample of this process
            values = values.sum(0, keepdim=True).expand_as(values)
        k = self.task.num_classes
        return sum_per_class(values.gather(1, y.clamp(max=k - 1).unsqueeze(1)).squeeze(1), y, k)

    def after_step(self, progress: Progress) -> None:
        self.teacher.follow(self.net, progress)
        # DHC's code fuses before the last step of an epoch samples; here after it, so that all batches of one step see one rate
        if (progress.step + 1) % progress.steps_per_epoch == 0:
            self.fuse()

    def fuse(self) -> None:
        """The epoch's indicators become confidences CC and rates s."""
        r = torch.softmax(self.indicators / self.records.clamp_min(1), 1)  # (3, K)
        kept = r >= r.topk(self.top, 1).values[:, -1:]  # the smallest G belong to the largest r; ties are all kept
        rank = torch.where(kept, 1 - torch.exp(-torch.exp(-2 * r)), 0.632)  # G
        cc = (1 - torch.where(kept, r, 0.0).mean(0)) * rank.sum(0)
        self.confidence.lerp_(cc / cc.max(), 1 - self.confidence_decay)
        rate = 1 - self.confidence
        self.rate.copy_((rate / (rate.max() + 1e-12)) ** self.rate_power)
        self.indicators.zero_()
        self.records.zero_()

    def predict(self, x: Tensor) -> Tensor:
        return torch.softmax(self.net(x).logits.float(), 1)
