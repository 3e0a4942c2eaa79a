"""DePL: cross pseudo supervision with pseudo-labels freed of the networks' running bias.

Paper: X. Wang, Z. Wu, L. Lian, S. X. Yu, "Debiased Learning from Naturally Imbalanced Pseudo-Labels", CVPR 2022,
    https://arxiv.org/abs/2201.01490
Family: pseudo-labels
Needs: two networks
Cost: x4.0
Idea: a network that has come to prefer some classes on unlabelled patches hands this preference on in its pseudo-labels.
    The log of the running mean of its predictions is subtracted from its logits before they become pseudo-labels, and only
    confident ones of these are learnt.
Algorithm:
    q_A = q_B = 1 / K
    each step, with N in {A, B} and z_N = N([x_l; x_u]):
        pi_N = softmax(z_N - tau log q_N)
        p_N, conf_N = argmax pi_N, max pi_N;  m_N = 1[conf_N >= threshold]
        q_N = momentum q_N + (1 - momentum) mean softmax(z_N_u)
        margin: z_A_u += tau log q_B;  z_B_u += tau log q_A
        sup = DC(z_A_l, y) + DC(z_B_l, y)
        cps = mean over all voxels of m_B CE(z_A, p_B) + m_A CE(z_B, p_A)
        loss = sup + lambda(t) cps
    predict softmax of the mean logit of A and B
Constants: code/train_depl.py, github.com/xmed-lab/DHC; the authors' own code (github.com/frank-xwang/debiased-pseudo-labeling)
    has momentum=0.999, and tau=0.4 with threshold=0.8 on ImageNet
Deviations: q is one distribution over classes, as in the paper. The port keeps one for each voxel of the patch, although
    patches lie anywhere in the body, and so is tied to one patch size: qhat=[64, 128, 128], the value of data.patch_size,
    reproduces it and the published rows. q is kept above 1e-8 (by voxel 1.2e-38) under the log, where the port runs into
    log 0 = -inf. The adaptive margin of the paper is computed but not used in the port: margin=true uses it.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from tailseg.core import Batch, BuildNetwork, Method, Progress, StepOutput, Task, Unit
from tailseg.parts.counts import count_classes
from tailseg.parts.losses import dice_ce, log_softmax, masked_cross_entropy
from tailseg.parts.ramps import ramp_up
from tailseg.parts.ranks import num_ranks, sum_over_ranks
from tailseg.parts.two_networks import mean_and_each


@final
class DePL(Method):
    def __init__(
        self,
        task: Task,
        build: BuildNetwork,
        *,
        cps_weight: float = 0.1,
        ramp: Unit = "epoch",
        tau: float = 1.0,
        threshold: float = 0.9,
        momentum: float = 0.99,
        qhat: Literal["global"] | tuple[int, ...] = "global",
        margin: bool = False,
    ) -> None:
        super().__init__(task)
        self.net_a, self.net_b = build(init="kaiming"), build(init="xavier")
        self.cps_weight = cps_weight
        self.ramp: Unit = ramp
        self.tau, self.threshold, self.momentum, self.margin = tau, threshold, momentum, margin
        # deviation: the port has one distribution per voxel of the patch, which means nothing where patches lie anywhere
        self.by_voxel = None if qhat == "global" else tuple(qhat)
        self.floor = 1e-8 if self.by_voxel is None else torch.finfo(torch.float32).tiny
        shape = (task.num_classes, *(self.by_voxel or (1,) * task.spatial_dims))
        self.qhat_a: Tensor
        self.qhat_b: Tensor
        self.register_buffer("qhat_a", torch.full(shape, 1 / task.num_classes))
        self.register_buffer("qhat_b", torch.full(shape, 1 / task.num_classes))

    def check_batch(self, labelled: int, unlabelled: int, patch_size: tuple[int, ...]) -> None:
        if self.by_voxel not in (None, tuple(patch_size)):
            raise ValueError(
                f"method 'depl' keeps one distribution per voxel of patches of qhat {list(self.by_voxel or ())}, but "
                f"data.patch_size is {list(patch_size)}; set method.qhat={list(patch_size)} or method.qhat=global."
            )

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        x, n = batch.x, len(batch.x_l)
        logits_a, logits_b = self.net_a(x).logits, self.net_b(x).logits  # (B_l + B_u, K, *S)
        log_probs_a, log_probs_b = log_softmax(logits_a), log_softmax(logits_b)
        sup = dice_ce(log_probs_a[:n], batch.y_l) + dice_ce(log_probs_b[:n], batch.y_l)
        pseudo_a, confidence_a = self._debias(log_probs_a, self.qhat_a)  # (B_l + B_u, *S)
        pseudo_b, confidence_b = self._debias(log_probs_b, self.qhat_b)
        mask_a, mask_b = confidence_a >= self.threshold, confidence_b >= self.threshold

        self._follow(self.qhat_a, log_probs_a[n:])
        self._follow(self.qhat_b, log_probs_b[n:])
        if self.margin:
            log_probs_a, log_probs_b = (
                torch.cat([log_probs_a[:n], (log_probs_a[n:] + self._bias(self.qhat_b)).log_softmax(1)]),
                torch.cat([log_probs_b[:n], (log_probs_b[n:] + self._bias(self.qhat_a)).log_softmax(1)]),
            )
        cps = masked_cross_entropy(log_probs_a, pseudo_b, mask_b) + masked_cross_entropy(log_probs_b, pseudo_a, mask_a)
        weight = self.cps_weight * ramp_up(progress, self.ramp)
        k = self.task.num_classes
        return StepOutput(
            losses={"sup": sup, "cps": weight * cps},
            predicted=count_classes(logits_a.argmax(1), k) + count_classes(logits_b.argmax(1), k),
            logs={
                "agreement": (pseudo_a == pseudo_b).float().mean(),
                "kept_a": mask_a.float().mean(),
                "kept_b": mask_b.float().mean(),
                "qhat_a": self.qhat_a.flatten(1).mean(1),
                "qhat_b": self.qhat_b.flatten(1).mean(1),
            },
        )

    def _bias(self, qhat: Tensor) -> Tensor:
        return self.tau * qhat.clamp_min(self.floor).log()  # deviation: the port has no floor

    @torch.no_grad()
    def _debias(self, log_probs: Tensor, qhat: Tensor) -> tuple[Tensor, Tensor]:
        """Debiased pseudo-labels and their probability, both (B, *S)."""
        debiased = log_probs - self._bias(qhat)
        top, labels = debiased.max(1)
        return labels, (top - debiased.logsumexp(1)).exp()

    @torch.no_grad()
    def _follow(self, qhat: Tensor, log_probs: Tensor) -> None:
        """Move towards the mean prediction on the unlabelled patches of all ranks; without any, stay."""
        if not len(log_probs):
            return
        mean = log_probs.exp().mean(0)  # (K, *S)
        if self.by_voxel is None:
            mean = mean.flatten(1).mean(1).view_as(qhat)
        qhat.lerp_(sum_over_ranks(mean) / num_ranks(), 1 - self.momentum)

    def predict(self, x: Tensor) -> Tensor:
        return torch.softmax((self.net_a(x).logits.float() + self.net_b(x).logits.float()) / 2, 1)

    def predict_each(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return mean_and_each(self.net_a(x).logits, self.net_b(x).logits)
