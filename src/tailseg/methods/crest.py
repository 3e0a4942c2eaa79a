"""CReST: cross pseudo supervision weighted by class-rebalancing rates.

Paper: C. Wei, K. Sohn, C. Mellina, A. Yuille, F. Yang, "CReST: A Class-Rebalancing Self-Training Framework for Imbalanced
    Semi-Supervised Learning", CVPR 2021, https://arxiv.org/abs/2102.09559
Family: class balancing
Needs: two networks
Cost: x3.6
Idea: the classes that are rare among the predictions deserve the rate at which the frequent ones are seen. Each network
    ranks the classes by the voxels it gives them on unlabelled patches and deals their rates out in reverse order, as the
    class weights of all its losses.
Algorithm:
    W_A = W_B = w(voxels of each class in the labelled scans)
    each step, with N in {A, B} and z_N = N([x_l; x_u]), p_N = argmax z_N:
        N_k = voxels of class k in p_N over x_u
        mu_k = ((N_k + 1e-8) / (max N + 1e-8))^alpha, in descending order mu_(1) >= ... >= mu_(K)
        w_(i) = mu_(K + 1 - i)
        W_N = beta W_N + (1 - beta) w
        sup = DC(z_A_l, y; W_A) + DC(z_B_l, y; W_B)
        cps = CE(z_A, p_B; W_A) + CE(z_B, p_A; W_B)
        loss = sup + lambda(t) cps
    predict softmax of the mean logit of A and B
Constants: code/train_crest.py, github.com/xmed-lab/DHC
Deviations: none from the code that made the published rows. That is a port: the paper samples pseudo-labelled images at
    these rates, taken from labelled counts alone, retrains from scratch over several generations and aligns distributions
    (CReST+); here the rates are loss weights, follow the predictions, and one network is trained once.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from tailseg.core import Batch, BuildNetwork, Method, Progress, StepOutput, Task, Unit
from tailseg.parts.class_weights import CReSTWeights
from tailseg.parts.counts import count_classes
from tailseg.parts.losses import cross_entropy, dice_ce, log_softmax
from tailseg.parts.ramps import ramp_up
from tailseg.parts.two_networks import mean_and_each


@final
class CReST(Method):
    def __init__(
        self,
        task: Task,
        build: BuildNetwork,
        *,
        cps_weight: float = 0.1,
        ramp: Unit = "epoch",
        alpha: float = 1 / 3,
        beta: float = 0.99,
    ) -> None:
        super().__init__(task)
        self.net_a, self.net_b = build(init="kaiming"), build(init="xavier")
        self.weighter_a = CReSTWeights(task, alpha=alpha, beta=beta)
        self.weighter_b = CReSTWeights(task, alpha=alpha, beta=beta)
        self.cps_weight = cps_weight
        self.ramp: Unit = ramp

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        x, n = batch.x, len(batch.x_l)
        logits_a, logits_b = self.net_a(x).logits, self.net_b(x).logits  # (B_l + B_u, K, *S)
        log_probs_a, log_probs_b = log_softmax(logits_a), log_softmax(logits_b)
        pseudo_a, pseudo_b = logits_a.argmax(1), logits_b.argmax(1)  # (B_l + B_u, *S)
        # each network's weights come from its own predictions of this very step, and serve both of its losses
        w_a, w_b = self.weighter_a.update(pseudo_a, batch.y_l), self.weighter_b.update(pseudo_b, batch.y_l)

        sup = dice_ce(log_probs_a[:n], batch.y_l, w_a) + dice_ce(log_probs_b[:n], batch.y_l, w_b)
        cps = cross_entropy(log_probs_a, pseudo_b, w_a) + cross_entropy(log_probs_b, pseudo_a, w_b)
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
