"""GA-CPS: cross pseudo supervision with gradient-aware cross-entropy and Dice.

Paper: W. Qi, J. Wu, S. C. Chan, "Gradient-Aware for Class-Imbalanced Semi-supervised Medical Image Segmentation", ECCV 2024,
    https://doi.org/10.1007/978-3-031-73001-6_27
Family: class balancing
Needs: two networks (the authors': V-Net, width 16, batch norm, dropout 0)
Cost: x3.6
Idea: Imbalance shows in the gradients: plain Dice gives none to a class that is absent from the patch, so that its false
    positives are free, and cross-entropy lets large classes dominate. Two losses repair this in cross pseudo supervision.
Algorithm:
    GADice(p, y) = mean over classes of D_c, sums over the batch:
        class present: D_c = 1 - 2 S(p_c t_c) / (S(p_c^2) + S(t_c^2));  absent: D_c = S(stop(p_c / N) p_c), N voxels
    GACE_k(z, y) = sum_c S_c / (N_c^(1/2) n^(1/2)):  S_c the losses of the N_c voxels of class c among the n largest k % of all
    z_A = A(x), z_B = B(x) with x = [x_l; x_u];  A starts from kaiming weights, B from xavier weights
    L_sup = sum over A, B of GACE_10(z, y) + GADice(p, y) on the labelled patches
    L_cps = GACE_100(z_A, argmax z_B) + GACE_100(z_B, argmax z_A) on all patches, no gradient through the argmax
    L = L_sup + w L_cps,  w = .1 exp(-5 (1 - epoch / epochs)^2)
    prediction: softmax((z_A + z_B) / 2)
Constants: GALoss.py and train_Synapse_CPS.py of github.com/cicailalala/GALoss (commit dff0493), for Synapse and AMOS. Its
    GA-MagicNet is the method magicnet with losses=ga.
Deviations: none. Beware when comparing with CPS: GACE is about sqrt(K) times the cross-entropy, at the same learning rate.
"""

from __future__ import annotations

from functools import partial
from typing import final

import torch
from torch import Tensor

from tailseg.core import Batch, BuildNetwork, Method, Progress, StepOutput, Task, Unit
from tailseg.parts.counts import count_classes
from tailseg.parts.gradient_aware import ga_ce, ga_dice
from tailseg.parts.losses import log_softmax
from tailseg.parts.ramps import gaussian_ramp
from tailseg.parts.two_networks import mean_and_each


@final
class GALoss(Method):
    """cps_weight: of the pseudo-labels, after the ramp. ramp: whether it rises every epoch or every step.
    sup_percent, cps_percent: share of the voxels that count on labels and on pseudo-labels, the hardest first.
    gamma: from 0, where every class has the same say in the cross-entropy, to 1, where every voxel has."""

    def __init__(
        self,
        task: Task,
        build: BuildNetwork,
        *,
        cps_weight: float = 0.1,
        ramp: Unit = "epoch",
        sup_percent: float = 10.0,
        cps_percent: float = 100.0,
        gamma: float = 0.5,
    ) -> None:
        super().__init__(task)
        self.net_a, self.net_b = build(init="kaiming"), build(init="xavier")
        self.cps_weight = cps_weight
        self.ramp: Unit = ramp
        self.sup_ce = partial(ga_ce, percent=sup_percent, gamma=gamma)
        self.cps_ce = partial(ga_ce, percent=cps_percent, gamma=gamma)

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        x, y, n = batch.x, batch.y_l, len(batch.x_l)
        logits_a, logits_b = self.net_a(x).logits, self.net_b(x).logits  # (B_l + B_u, K, *S)
        log_probs_a, log_probs_b = log_softmax(logits_a), log_softmax(logits_b)
        pseudo_a, pseudo_b = logits_a.argmax(1), logits_b.argmax(1)  # (B_l + B_u, *S)

        ce = self.sup_ce(log_probs_a[:n], y) + self.sup_ce(log_probs_b[:n], y)
        dice = ga_dice(log_probs_a[:n], y) + ga_dice(log_probs_b[:n], y)
        # no hard mining here: the hardest voxels of a pseudo-label are its noise
        cps = self.cps_ce(log_probs_a, pseudo_b) + self.cps_ce(log_probs_b, pseudo_a)
        k = self.task.num_classes
        return StepOutput(
            losses={"ga_ce": ce, "ga_dice": dice, "cps": self.cps_weight * self._ramp(progress) * cps},
            predicted=count_classes(pseudo_a, k) + count_classes(pseudo_b, k),
            logs={"agreement": (pseudo_a == pseudo_b).float().mean()},
        )

    def _ramp(self, progress: Progress) -> float:
        # these authors set the weight at the start of an epoch, those of DHC at its end (Progress.fraction)
        by_epoch = progress.epoch / progress.total_epochs
        return gaussian_ramp(by_epoch if self.ramp == "epoch" else progress.fraction("step"))

    def predict(self, x: Tensor) -> Tensor:
        return torch.softmax((self.net_a(x).logits.float() + self.net_b(x).logits.float()) / 2, 1)

    def predict_each(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return mean_and_each(self.net_a(x).logits, self.net_b(x).logits)
