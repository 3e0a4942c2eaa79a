"""DST: pseudo-labels made by one head and learned by another, features trained against a worst-case head.

Paper: B. Chen, J. Jiang, X. Wang, P. Wan, J. Wang, M. Long, "Debiased Self-Training for Semi-Supervised Learning",
    NeurIPS 2022, https://arxiv.org/abs/2202.07136
Family: co-training
Needs: three decoders on each of two networks
Cost: x6.2
Idea: One head makes pseudo-labels, another is trained with them, so that their errors do not feed themselves. A third head
    seeks the worst case, right on labelled and wrong on unlabelled images, and the encoder is trained against it.
Algorithm:
    (z, z^p, z^w) = f([x_l; x_u]) of A and of B; z^w sees the features through a gradient reversal of strength c(i)
    L_sup = DC(z_A[l], y) + DC(z_B[l], y)
    official: (conf, t) = max softmax z^p;  L_cps = CE(z_A, t_B where conf_B > 0.95) + CE(z_B, t_A where conf_A > 0.95)
    faithful: (conf, t) = max softmax z;    L_cps = the same on z^p_A and z^p_B
    a = argmax z[l];  b = argmax z[u]
    L_w = sum over A, B of 2 CE(z^w[l], a) - mean log(1 - softmax(z^w[u])_b)
    L = L_sup + lambda(t) (L_cps + L_w)
    c(i) = 2 * 0.1 / (1 + exp(-i / 500)) - 0.1 after i steps
    predict: softmax of the mean of z_A and z_B
Constants: github.com/xmed-lab/DHC, train_dst.py and models/vnet_dst.py (the authors' own library, thuml's, reverses over 1000
    steps and accepts above 0.7 in its example)
Deviations: variant=official, the default, is the segmentation code that made DHC's tables. It swaps two heads: the pseudo head
    makes the targets and no loss reaches it, so it stays as it was drawn and only its running statistics move. Here it is
    frozen and runs without autograd, which changes no number. variant=faithful is the paper's: main heads make the targets,
    pseudo heads learn from them. In both, as in that code, the reversal covers all features of the encoder (the authors'
    library: one vector) and lambda(t) weighs the worst case too.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor

from tailseg.core import Batch, BuildNetwork, Method, Progress, SegNet, StepOutput, Task, Unit
from tailseg.parts.counts import count_classes
from tailseg.parts.losses import cross_entropy, dice_ce, log_softmax, masked_cross_entropy
from tailseg.parts.ramps import ramp_up
from tailseg.parts.ranks import sum_over_ranks
from tailseg.parts.two_networks import mean_and_each


class Heads(NamedTuple):
    """(B, K, *S) each."""

    main: Tensor
    pseudo: Tensor
    worst: Tensor


@final
class DST(Method):
    """cps_weight: lambda at the end. ramp: what it grows with. threshold: confidence above which a pseudo-label counts.
    worst_labelled_weight: of the labelled half in the worst case. reversal: strength of the gradient reversal in the end.
    reversal_steps: N, after which it has reached almost half of that. variant: which head makes the targets.
    """

    def __init__(
        self,
        task: Task,
        build: BuildNetwork,
        *,
        cps_weight: float = 0.1,
        ramp: Unit = "epoch",
        threshold: float = 0.95,
        worst_labelled_weight: float = 2.0,
        reversal: float = 0.1,
        reversal_steps: int = 500,
        variant: Literal["official", "faithful"] = "official",
    ) -> None:
        super().__init__(task)
        self.net_a, self.net_b = build(init="kaiming", num_decoders=3), build(init="xavier", num_decoders=3)
        self.faithful = variant == "faithful"
        for net in (self.net_a, self.net_b):
            net.decoders[1].requires_grad_(self.faithful)
        self.cps_weight = cps_weight
        self.ramp: Unit = ramp
        self.threshold = threshold
        self.worst_labelled_weight = worst_labelled_weight
        self.reversal, self.reversal_steps = reversal, reversal_steps

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        x, n, k = batch.x, len(batch.x_l), self.task.num_classes
        strength = reversal_strength(progress.step, self.reversal, self.reversal_steps)
        a, b = self._heads(self.net_a, x, strength), self._heads(self.net_b, x, strength)
        log_probs_a, log_probs_b = log_softmax(a.main), log_softmax(b.main)
        sup = dice_ce(log_probs_a[:n], batch.y_l) + dice_ce(log_probs_b[:n], batch.y_l)

        taught_a, taught_b = log_probs_a, log_probs_b
        if self.faithful:
            taught_a, taught_b = log_softmax(a.pseudo), log_softmax(b.pseudo)
        pseudo_a, mask_a = self._pseudo_labels(a)  # (B_l + B_u, *S) each
        pseudo_b, mask_b = self._pseudo_labels(b)
        cps = masked_cross_entropy(taught_a, pseudo_b, mask_b) + masked_cross_entropy(taught_b, pseudo_a, mask_a)

        labels_a, labels_b = a.main.argmax(1), b.main.argmax(1)
        worst = self._worst_case(log_softmax(a.worst), labels_a, n) + self._worst_case(
            log_softmax(b.worst), labels_b, n
        )
        weight = self.cps_weight * ramp_up(progress, self.ramp)
        return StepOutput(
            losses={"sup": sup, "cps": weight * cps, "worst": weight * worst},
            predicted=count_classes(labels_a, k) + count_classes(labels_b, k),
            logs={
                "agreement": (labels_a == labels_b).float().mean(),
                "kept_a": mask_a.float().mean(),
                "kept_b": mask_b.float().mean(),
            },
        )

    def _heads(self, net: SegNet, x: Tensor, strength: float) -> Heads:
        main, pseudo, worst = net.decoders
        features = net.encoder(x)
        # the official code trains the pseudo head with nothing, nor the encoder through it
        apart = features if self.faithful else [feature.detach() for feature in features]
        against = [_ReverseGradient.apply(feature, strength) for feature in features]
        return Heads(main(features).logits, pseudo(apart).logits, worst(against).logits)

    def _pseudo_labels(self, heads: Heads) -> tuple[Tensor, Tensor]:
        """Labels (B, *S) int64, and where they are confident enough."""
        logits = heads.main if self.faithful else heads.pseudo
        confidence, labels = log_softmax(logits.detach()).exp().max(1)
        return labels, confidence > self.threshold

    def _worst_case(self, log_probs: Tensor, labels: Tensor, n: int) -> Tensor:
        """Low for a head that agrees with the main head's labels on the first n images and nowhere on the others."""
        agree = cross_entropy(log_probs[:n], labels[:n])
        return self.worst_labelled_weight * agree + error_loss(log_probs[n:], labels[n:])

    def predict(self, x: Tensor) -> Tensor:
        return torch.softmax((self.net_a(x).logits.float() + self.net_b(x).logits.float()) / 2, 1)

    def predict_each(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return mean_and_each(self.net_a(x).logits, self.net_b(x).logits)


def reversal_strength(step: int, maximum: float, steps: int) -> float:
    """c(i): 0 at first, near maximum after a few times `steps` steps; from the steps done, so there is no state to resume."""
    return 2 * maximum / (1 + math.exp(-step / steps)) - maximum


def error_loss(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Mean over voxels of -log(1 - probability of the label); 0 where there is no voxel.

    log_probs: (B, K, *S) float32. labels: (B, *S) int64.
    """
    probs = log_probs.gather(1, labels.unsqueeze(1)).exp()
    # without the clamp a probability of 0 would earn a loss below 0
    total = -(1 - probs + 1e-6).clamp(max=1.0).log().sum()
    total, voxels = sum_over_ranks(torch.stack([total, total.new_full((), labels.numel())])).unbind()
    return total / voxels.clamp_min(1.0)


class _ReverseGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by -strength."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grads[0], None
