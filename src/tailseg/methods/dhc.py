"""DHC: dual-debiased heterogeneous co-training.

Paper: H. Wang, X. Li, MICCAI 2023, https://arxiv.org/abs/2307.11960
Idea: cross pseudo supervision in which the two networks weigh the classes differently: A by how hard a class is to learn
(DiffDW, measured on the labelled patches), B by how rare it is among its own pseudo-labels (DistDW, on the unlabelled ones).
The weights fight the imbalance, their difference keeps the networks apart.
Constants: github.com/xmed-lab/DHC, train_dhc.py (commit b3dee97). Where paper and code differ the default is the code, which
made the tables; sup=ce with unsup=half_ce_dice are the paper's losses, weighter_a={name: diff, accumulate: window} its
accumulation. Both networks start with kaiming weights, unlike those of CPS.
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
class DHC(Method):
    def __init__(
        self,
        task: Task,
        build: BuildNetwork,
        *,
        cps_weight: float = 0.1,
        ramp: Unit = "epoch",
        weighter_a: WeighterSpec = "diff",
        weighter_b: WeighterSpec = "dist",
        sup: Literal["ce_dice", "ce"] = "ce_dice",
        unsup: Literal["ce", "half_ce_dice"] = "ce",
    ) -> None:
        super().__init__(task)
        self.net_a, self.net_b = build(init="kaiming"), build(init="kaiming")
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
