"""CPS: two networks teach each other by their hard predictions.

Paper: X. Chen, Y. Yuan, G. Zeng, J. Wang, "Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision", CVPR 2021,
    https://arxiv.org/abs/2106.01226
Family: co-training
Needs: two networks
Cost: x3.7
Idea: Two networks of one architecture and different initial weights see the same patches. Each learns from the labels where
    there are any, and from the other's hard predictions everywhere.
Algorithm:
    z_A = A(x), z_B = B(x) with x = [x_l; x_u];  A starts from kaiming weights, B from xavier weights
    y_A = argmax z_A, y_B = argmax z_B                          no gradient, no threshold
    L_sup = CE(z_A, y) + Dice(p_A, y) + CE(z_B, y) + Dice(p_B, y) on the labelled patches
    L_cps = CE(z_A, y_B) + CE(z_B, y_A) on all patches
    L = L_sup + lambda L_cps,  lambda = 0.1 exp(-5 (1 - epoch / epochs)^2)
    prediction: softmax((z_A + z_B) / 2)
Constants: train_cps.py of github.com/xmed-lab/DHC (commit b3dee97), the 3D re-implementation that DHC and its rivals compare
    with; the CVPR paper is 2D, with CE in both terms and a constant weight.
Deviations: none. The DHC paper writes the losses as CE (supervised) and (CE + Dice) / 2 (pseudo), its code has the above:
    sup=ce with unsup=half_ce_dice are the paper's. sup=ga with unsup=ga are those of GALoss; the method galoss has its ramp.
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
class CPS(Method):
    """cps_weight: of the pseudo-labels, after the ramp. ramp: whether it rises every epoch or every step.
    weighter_a, weighter_b: class weights of either network. sup: loss on labels. unsup: loss on pseudo-labels."""

    def __init__(
        self,
        task: Task,
        build: BuildNetwork,
        *,
        cps_weight: float = 0.1,
        ramp: Unit = "epoch",
        weighter_a: WeighterSpec = "none",
        weighter_b: WeighterSpec = "none",
        sup: Literal["ce_dice", "ce", "ga"] = "ce_dice",
        unsup: Literal["ce", "half_ce_dice", "ga"] = "ce",
    ) -> None:
        super().__init__(task)
        self.net_a, self.net_b = build(init="kaiming"), build(init="xavier")
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
