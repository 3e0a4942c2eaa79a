"""FixMatch: confident predictions on weak views are hard targets for strong views.

Paper: K. Sohn, D. Berthelot, C.-L. Li, et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and
    Confidence", NeurIPS 2020, https://arxiv.org/abs/2001.07685
Family: consistency
Needs: nothing but one network
Cost: x2.5
Idea: Where the network is sure of an unlabelled image, its prediction is a label for the same image with changed
    intensities. A threshold on its confidence starts with the easy voxels and lets the others in as the network learns.
Algorithm:
    z_l, z_w = f([x_l; x_u])                        # one pass in training mode
    q = softmax(z_w), no gradient
    y^ = argmax q, c = max q, m = [c >= tau]
    x_s = strong_view(x_u)
    x_s, y^, c = mixer(x_s, y^, c)                  # option; "pic" mixes x_l and y_l too
    L_u = sum_v m_v CE(f(x_s)_v, y^_v) / number of all unlabelled voxels
    w = weight (start + (1 - start) exp(-5 (1 - t / ramp)^2)), t = share of the run done, at most ramp
    L = (CE + Dice)(z_l, y_l) / 2 + w L_u
Constants: tau .95 and weight 1 of the paper; the lower threshold in 3D and the ramp are ours, for medical images
Deviations: the supervised loss has a Dice term, as in the field. The variant that circulates as FixMatch in SSL4MIS
    (train_fixmatch_standard_augs.py) rescales probabilities before the threshold and turns rejected voxels into
    background; it is not reproduced.
"""

from __future__ import annotations

import contextlib
from typing import Literal, final

import torch
from torch import Tensor

from tailseg.core import Batch, BuildNetwork, Method, Progress, StepOutput, Task
from tailseg.parts.counts import count_classes, sum_per_class
from tailseg.parts.losses import ce_soft_dice, log_softmax, masked_cross_entropy, soft_dice_loss
from tailseg.parts.mixing import PIC, MixerSpec, Samples, make_mixer
from tailseg.parts.perturb import strong_view
from tailseg.parts.pseudo_labels import likeliest
from tailseg.parts.ramps import ramp_over


@final
class FixMatch(Method):
    """tau: least confidence of a pseudo-label that counts, default .95 in 2D and .85 in 3D. weight: of the unsupervised loss
    at the end of its ramp. start: share of that weight at the start of the run. ramp: share of the run over which it climbs.
    unsup: masked cross-entropy, or the mean of that and a masked Dice. mixer: mixes the strong views.
    """

    def __init__(
        self,
        task: Task,
        build: BuildNetwork,
        *,
        tau: float | None = None,
        weight: float = 1.0,
        start: float = 0.1,
        ramp: float = 0.4,
        unsup: Literal["ce", "half_ce_dice"] = "ce",
        mixer: MixerSpec = "none",
    ) -> None:
        super().__init__(task)
        self.net = build(init="default")
        self.mixer = make_mixer(mixer, task)
        self.mixes_labelled = isinstance(self.mixer, PIC)
        self.tau = tau if tau is not None else 0.95 if task.spatial_dims == 2 else 0.85
        self.weight, self.start, self.ramp = weight, start, ramp
        self.unsup = unsup

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        n, k = len(batch.x_l), self.task.num_classes
        # mixed labelled images need a pass of their own, and then nothing is learnt from the weak views
        with torch.no_grad() if self.mixes_labelled else contextlib.nullcontext():
            weak = self.net(batch.x).logits  # (B_l + B_u, K, *S)
        p_l, p_w = log_softmax(weak).split([n, len(batch.x_u)])
        predicted = likeliest(weak)  # (B_l + B_u, *S)

        labelled = Samples.annotated(batch.x_l, batch.y_l)
        unlabelled = Samples(strong_view(batch.x_u), predicted[n:], p_w.detach().amax(1).exp())
        labelled, unlabelled = self.mixer(labelled, unlabelled, progress)
        p_s = p_w
        if self.mixes_labelled:
            mixed = self.net(torch.cat([labelled.x, unlabelled.x])).logits
            p_l, p_s = log_softmax(mixed).split([n, len(unlabelled)])
        elif len(unlabelled):
            p_s = log_softmax(self.net(unlabelled.x).logits)

        losses = {"sup": ce_soft_dice(p_l, labelled.labels)}
        weight = self.unsup_weight(progress)
        kept = unlabelled.confidence >= self.tau  # (B_u, *S)
        if len(unlabelled):
            losses["unsup"] = weight * self._unsup_loss(p_s, unlabelled.labels, kept)
        return StepOutput(
            losses=losses,
            predicted=count_classes(predicted, k),
            logs={"kept": _share_kept(unlabelled.labels, kept, k), "unsup_weight": p_l.new_full((), weight)},
        )

    def unsup_weight(self, progress: Progress) -> float:
        """From start to 1, times weight."""
        return self.weight * (self.start + (1 - self.start) * ramp_over(progress, self.ramp))

    def _unsup_loss(self, log_probs: Tensor, target: Tensor, kept: Tensor) -> Tensor:
        ce = masked_cross_entropy(log_probs, target, kept)
        return ce if self.unsup == "ce" else (ce + soft_dice_loss(log_probs, target, kept)) / 2

    def predict(self, x: Tensor) -> Tensor:
        return torch.softmax(self.net(x).logits.float(), 1)


def _share_kept(labels: Tensor, kept: Tensor, num_classes: int) -> Tensor:
    """(K,) share of the voxels of each pseudo-label that are sure enough; 0 for a class never predicted."""
    counts = count_classes(labels, num_classes)
    return sum_per_class(kept.float(), labels, num_classes) / counts.clamp_min(1)
