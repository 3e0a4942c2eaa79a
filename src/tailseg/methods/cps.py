"""CPS: cross pseudo supervision.

Paper: X. Chen, Y. Yuan, G. Zeng, J. Wang, CVPR 2021, https://arxiv.org/abs/2106.01226
Idea: two networks of one architecture and different initial weights see the same patches; each learns from the labels where
there are any, and from the other's hard predictions everywhere.
Constants: the 3D re-implementation in github.com/xmed-lab/DHC, train_cps.py, which is what DHC and its rivals compare with.
The DHC paper writes the losses as CE (supervised) and (CE + Dice) / 2 (pseudo): sup=ce, unsup=half_ce_dice.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from tailseg.core import Batch, BuildNetwork, Method, Progress, StepOutput, Task, Unit
from tailseg.parts.class_weights import WeighterSpec, make_weighter
from tailseg.parts.counts import count_classes
from tailseg.parts.losses import cross_entropy, dice_ce, half_ce_dice, log_softmax
from tailseg.parts.ramps import ramp_up


@final
class CPS(Method):
    def __init__(
        self,
        task: Task,
        build: BuildNetwork,
        *,
        cps_weight: float = 0.1,
        ramp: Unit = "epoch",
        weighter_a: WeighterSpec = "none",
        weighter_b: WeighterSpec = "none",
        sup: Literal["ce_dice", "ce"] = "ce_dice",
        unsup: Literal["ce", "half_ce_dice"] = "ce",
    ) -> None:
        super().__init__(task)
        self.net_a, self.net_b = build(init="kaiming"), build(init="xavier")
        self.weighter_a, self.weighter_b = make_weighter(weighter_a, task), make_weighter(weighter_b, task)
        self.cps_weight = cps_weight
        self.ramp: Unit = ramp
        self.sup_loss = dice_ce if sup == "ce_dice" else cross_entropy
        self.cps_loss = cross_entropy if unsup == "ce" else half_ce_dice

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
