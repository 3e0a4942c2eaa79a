"""DHC: two networks teach each other, each with class weights of its own.

Paper: H. Wang, X. Li, "DHC: Dual-debiased Heterogeneous Co-training Framework for Class-imbalanced Semi-supervised Medical
    Image Segmentation", MICCAI 2023, https://arxiv.org/abs/2307.11960
Family: class balancing
Needs: two networks
Cost: x3.8
Idea: Cross pseudo supervision in which the two networks weigh the classes differently: A by how hard a class is to learn
    (DiffDW, measured on the labelled patches), B by how rare it is among its own pseudo-labels (DistDW, on the unlabelled
    ones). The weights fight the imbalance, their difference keeps the networks apart.
Algorithm:
    z_A = A(x), z_B = B(x) with x = [x_l; x_u];  both start from kaiming weights
    y_A = argmax z_A, y_B = argmax z_B                          no gradient
    W_A = K d r / max(d r):  r the running 1 - Dice of A on the labelled patches, d = (unlearnt / learnt)^(1/5)
    W_B = .99 W_B + .01 dist(voxels of y_B per class on the unlabelled patches):  0 for the most frequent, K for the rarest
    L_sup = CE(z_A, y; W_A) + Dice(p_A, y; W_A) + CE(z_B, y; W_B) + Dice(p_B, y; W_B) on the labelled patches
    L_cps = CE(z_A, y_B; W_A) + CE(z_B, y_A; W_B) on all patches
    L = L_sup + lambda L_cps,  lambda = 0.1 exp(-5 (1 - epoch / epochs)^2)
    prediction: softmax((z_A + z_B) / 2)
Constants: train_dhc.py of github.com/xmed-lab/DHC (commit b3dee97), which made the tables.
Deviations: where every voxel's class weighs nothing the cross-entropy is 0; the authors' is 0/0, and their loss scaler skips
    the step of B. Paper and code differ: sup=ce with unsup=half_ce_dice are the paper's losses,
    weighter_a={name: diff, accumulate: window} its accumulation. Unlike those of CPS both networks start with kaiming weights.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from tailseg.core import Batch, BuildNetwork, Method, Progress, StepOutput, Task, Unit
from tailseg.parts.class_weights import WeighterSpec, make_weighter
from tailseg.parts.counts import count_classes
from tailseg.parts.gradient_aware import ga_ce, ga_loss
from tailseg.parts.losses import cross_entropy, dice_ce, half_ce_dice, log_softmax
from tailseg.parts.ramps import ramp_up
from tailseg.parts.two_networks import mean_and_each


@final
class DHC(Method):
    """cps_weight: of the pseudo-labels, after the ramp. ramp: whether it rises every epoch or every step.
    weighter_a, weighter_b: class weights of either network. sup: loss on labels. unsup: loss on pseudo-labels."""

    def __init__(
        self,
        task: Task,
        build: BuildNetwork,
        *,
        cps_weight: float = 0.1,
        ramp: Unit = "epoch",
        weighter_a: WeighterSpec = "diff",
        weighter_b: WeighterSpec = "dist",
        sup: Literal["ce_dice", "ce", "ga"] = "ce_dice",
        unsup: Literal["ce", "half_ce_dice", "ga"] = "ce",
    ) -> None:
        super().__init__(task)
        self.net_a, self.net_b = build(init="kaiming"), build(init="kaiming")
        self.weighter_a, self.weighter_b = make_weighter(weighter_a, task), make_weighter(weighter_b, task)
        self.cps_weight = cps_weight
        self.ramp: Unit = ramp
        self.sup_loss = {"ce_dice": dice_ce, "ce": cross_entropy, "ga": ga_loss}[sup]
        self.cps_loss = {"ce": cross_entropy, "half_ce_dice": half_ce_dice, "ga": ga_ce}[unsup]

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        x, n = batch.x, len(batch.x_l)
        logits_a, logits_b = self.net_a(x).logits, self.net_b(x).logits  # (B_l + B_u, K, *S)
        log_probs_a, log_probs_b = log_softmax(logits_a), log_softmax(logits_b)
        pseudo_a, pseudo_b = logits_a.argmax(1), logits_b.argmax(1)  # (B_l + B_u, *S)
        # each network's weights come from its own predictions of this very step, and serve both of its losses
        w_a, w_b = self.weighter_a.update(pseudo_a, batch.y_l), self.weighter_b.update(pseudo_b, batch.y_l)

        sup = self.sup_loss(log_probs_a[:n], batch.y_l, w_a) + self.sup_loss(log_probs_b[:n], batch.y_l, w_b)
        cps = self.cps_loss(log_probs_a, pseudo_b, w_a) + self.cps_loss(log_probs_b, pseudo_a, w_b)
        weight = self.cps_weight * ramp_up(progress, self.ramp)
        k = self.task.num_classes
        return StepOutput(
            losses={"sup": sup, "cps": weight * cps},
            predicted=count_classes(pseudo_a, k) + count_classes(pseudo_b, k),
            logs={"agreement": (pseudo_a == pseudo_b).float().mean(), "weights_a": w_a, "weights_b": w_b},
        )

    def predict(self, x: Tensor) -> Tensor:
        return torch.softmax((self.net_a(x).logits.float() + self.net_b(x).logits.float()) / 2, 1)

    def predict_each(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return mean_and_each(self.net_a(x).logits, self.net_b(x).logits)
