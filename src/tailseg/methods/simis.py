"""SimiS: cross pseudo supervision weighted by the gap to the most frequent class.

Paper: H. Chen, Y. Fan, Y. Wang, J. Wang, B. Schiele, X. Xie, M. Savvides, B. Raj, "An Embarrassingly Simple Baseline for
    Imbalanced Semi-Supervised Learning", arXiv 2022 (withdrawn in 2024), https://arxiv.org/abs/2211.11086
Family: class balancing
Needs: two networks
Cost: x3.7
Idea: a class lacks what the most frequent one has more of. Each network weighs a class in all its losses by that gap in
    its own predictions, so that all rare classes weigh nearly the same.
Algorithm:
    W_A = W_B = beta K + (1 - beta) s(voxels of each class in the labelled scans)
    each step, with N in {A, B} and z_N = N([x_l; x_u]), p_N = argmax z_N:
        N_k = voxels of class k in p_N over x_l and x_u
        P_k = (N_k + 1e-8) / (sum N + 1e-8)
        s_k = K (max P - P_k)
        W_N = beta W_N + (1 - beta) s
        sup = DC(z_A_l, y; W_A) + DC(z_B_l, y; W_B)
        cps = CE(z_A, p_B; W_A) + CE(z_B, p_A; W_B)
        loss = sup + lambda(t) cps
    predict softmax of the mean logit of A and B
Constants: code/train_simis.py, github.com/xmed-lab/DHC
Deviations: none from the code that made the published rows, but that cross-entropy is 0 and not NaN once the weight of the
    background has shrunk to 0 (after about 10 500 steps) and a batch has no other target. The code is a port: the paper
    adds pseudo-labelled images to the labelled set according to the gap.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from tailseg.core import Batch, BuildNetwork, Method, Progress, StepOutput, Task, Unit
from tailseg.parts.class_weights import SimiSWeights
from tailseg.parts.counts import count_classes
from tailseg.parts.losses import cross_entropy, dice_ce, log_softmax
from tailseg.parts.ramps import ramp_up
from tailseg.parts.two_networks import mean_and_each


@final
class SimiS(Method):
    def __init__(
        self, task: Task, build: BuildNetwork, *, cps_weight: float = 0.1, ramp: Unit = "epoch", beta: float = 0.99
    ) -> None:
        super().__init__(task)
        self.net_a, self.net_b = build(init="kaiming"), build(init="xavier")
        self.weighter_a, self.weighter_b = SimiSWeights(task, beta=beta), SimiSWeights(task, beta=beta)
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
