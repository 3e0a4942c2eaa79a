"""CLD: cross pseudo supervision with class weights and voxels sampled by how poorly a class is known.

Paper: Y. Lin, H. Yao, Z. Li, G. Zheng, X. Li, "Calibrating Label Distribution for Class-Imbalanced Barely-Supervised Knee
    Segmentation", MICCAI 2022, https://arxiv.org/abs/2205.03644
Family: class balancing
Needs: two networks
Cost: x4.0
Idea: fixed weights make up for the few voxels of rare classes in the labelled scans. Each network learns from a random part
    of the other's predictions, and the larger a part of a class, the less confident the network is on its labelled voxels.
Algorithm:
    w_k = (max N / N_k)^(1/3), N_k = voxels of class k in the labelled scans
    conf_A = conf_B ~ U(0, 1)^K
    each step, with N in {A, B} and z_N = N([x_l; x_u]), p_N = argmax z_N:
        S_N,k += sum of softmax(z_N_l)_k over voxels with y = k;  n_k += their number
        every 8th step: c_k = S_N,k / n_k;  conf_N = c (first time) or 0.999 conf_N + 0.001 c;  S_N = n = 0
        r_N,k = ((1 - conf_N,k) / max (1 - conf_N))^gamma
        m_N(v) = 1[u_v > 1 - r_N[p_N(v)]], u ~ U(0, 1)
        sup = DC(z_A_l, y; w) + DC(z_B_l, y; w)
        cps = mean over all voxels of m_A w[p_B] CE(z_A, p_B) + m_B w[p_A] CE(z_B, p_A)
        loss = sup + lambda(t) cps
    predict softmax of the mean logit of A and B
Constants: code/train_cld.py, github.com/xmed-lab/DHC; the authors' own code (github.com/xmed-lab/CLD-Semi) has period=2
Deviations: a class without a labelled voxel counts as having one in w, where the code divides by zero. A class absent from
    a period's labelled patches is recorded with confidence 0, as the code does; absent=keep leaves its confidence alone.
    As in the port, patches are not cropped along the axis by the odds of the classes.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from tailseg.core import Batch, BuildNetwork, Method, Progress, StepOutput, Task, Unit
from tailseg.parts.class_weights import CLDWeights
from tailseg.parts.counts import count_classes, sum_per_class
from tailseg.parts.losses import dice_ce, log_softmax, masked_cross_entropy
from tailseg.parts.ramps import ramp_up
from tailseg.parts.ranks import sum_over_ranks
from tailseg.parts.two_networks import mean_and_each


@final
class CLD(Method):
    def __init__(
        self,
        task: Task,
        build: BuildNetwork,
        *,
        cps_weight: float = 0.1,
        ramp: Unit = "epoch",
        weight_exponent: float = 1 / 3,
        gamma: float = 0.5,
        period: int = 8,
        momentum: float = 0.999,
        absent: Literal["zero", "keep"] = "zero",
    ) -> None:
        super().__init__(task)
        self.net_a, self.net_b = build(init="kaiming"), build(init="xavier")
        self.weighter = CLDWeights(task, exponent=weight_exponent)
        self.cps_weight = cps_weight
        self.ramp: Unit = ramp
        self.gamma, self.period, self.momentum, self.absent = gamma, period, momentum, absent
        k = task.num_classes
        self.confidence: Tensor
        self.sums: Tensor
        self.voxels: Tensor
        self.records: Tensor
        # rows: A, B; both start from the same draw, and sample at random until the first period is over
        self.register_buffer("confidence", torch.rand(k).repeat(2, 1))
        self.register_buffer("sums", torch.zeros(2, k))
        self.register_buffer("voxels", torch.zeros(k, dtype=torch.int64))
        self.register_buffer("records", torch.zeros((), dtype=torch.int64))

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        x, n, w = batch.x, len(batch.x_l), self.weighter.weights
        logits_a, logits_b = self.net_a(x).logits, self.net_b(x).logits  # (B_l + B_u, K, *S)
        log_probs_a, log_probs_b = log_softmax(logits_a), log_softmax(logits_b)
        pseudo_a, pseudo_b = logits_a.argmax(1), logits_b.argmax(1)  # (B_l + B_u, *S)
        self._record([log_probs_a[:n], log_probs_b[:n]], batch.y_l)
        rates_a, rates_b = self._rates().unbind()
        mask_a, mask_b = self._sample(rates_a, pseudo_a), self._sample(rates_b, pseudo_b)

        sup = dice_ce(log_probs_a[:n], batch.y_l, w) + dice_ce(log_probs_b[:n], batch.y_l, w)
        # a network learns where its own prediction was sampled, and what the other one predicts there
        cps = masked_cross_entropy(log_probs_a, pseudo_b, mask_a, w)
        cps = cps + masked_cross_entropy(log_probs_b, pseudo_a, mask_b, w)
        weight = self.cps_weight * ramp_up(progress, self.ramp)
        k = self.task.num_classes
        return StepOutput(
            losses={"sup": sup, "cps": weight * cps},
            predicted=count_classes(pseudo_a, k) + count_classes(pseudo_b, k),
            logs={
                "agreement": (pseudo_a == pseudo_b).float().mean(),
                "kept_a": mask_a.float().mean(),
                "kept_b": mask_b.float().mean(),
                "rates_a": rates_a,
                "rates_b": rates_b,
            },
        )

    @torch.no_grad()
    def _record(self, log_probs: list[Tensor], y_l: Tensor) -> None:
        """Take in what each network (of A and B) makes of the labelled patches; every period-th time, move confidence."""
        k = self.task.num_classes
        target = y_l.clamp(max=k - 1).unsqueeze(1)  # IGNORE reads some class, and counts in none
        sums = [sum_per_class(each.gather(1, target).squeeze(1).exp(), y_l, k) for each in log_probs]
        self.sums += sum_over_ranks(torch.stack(sums))
        self.voxels += sum_over_ranks(count_classes(y_l, k))
        self.records += 1
        recorded = self.sums / (self.voxels + 1e-12)  # (2, K)
        if self.absent == "keep":
            recorded = torch.where(self.voxels > 0, recorded, self.confidence)
        first, due = self.records == self.period, self.records % self.period == 0
        followed = torch.where(first, recorded, self.confidence.lerp(recorded, 1 - self.momentum))
        self.confidence.copy_(torch.where(due, followed, self.confidence))
        self.sums *= ~due
        self.voxels *= ~due

    def _rates(self) -> Tensor:
        """(2, K) share of the voxels of each predicted class that A and B learn from; 1 for the least confident class."""
        doubt = (1 - self.confidence).clamp_min(0)
        return (doubt / (doubt.amax(1, keepdim=True) + 1e-12)) ** self.gamma

    @staticmethod
    def _sample(rates: Tensor, pseudo_labels: Tensor) -> Tensor:
        """(B, *S) bool: voxels drawn at the rate of their predicted class."""
        return torch.rand(pseudo_labels.shape, device=rates.device) > (1 - rates)[pseudo_labels]

    def predict(self, x: Tensor) -> Tensor:
        return torch.softmax((self.net_a(x).logits.float() + self.net_b(x).logits.float()) / 2, 1)

    def predict_each(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return mean_and_each(self.net_a(x).logits, self.net_b(x).logits)
