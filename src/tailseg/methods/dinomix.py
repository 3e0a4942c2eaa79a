"""DINO-Mix (our re-design): a frozen DINOv3 teaches the features, CutMix goes from rare classes to all.

Paper: after X. Liu, G. Sun, "DINO-Mix: Distilling Foundational Knowledge with Cross-Domain CutMix for Semi-supervised
    Class-imbalanced Medical Image Segmentation", arXiv 2026 (re-designed), https://arxiv.org/abs/2602.07819
Family: distillation
Needs: DINOv3 weights (gated) and an EMA teacher (no gradients); see `tailseg teacher check`
Cost: x3.0
Idea: Semi-supervised learning recycles its own bias: a class that it fails to see never enters its pseudo-labels. Features
    of a foundation model that knows nothing of this data set (FKD) and boxes pasted around rare classes first and around
    all classes later (PIC) come from outside of that circle.
Algorithm:
    y^ = argmax g(x_u), c = max softmax g(x_u)                   # EMA teacher g, no gradient
    (x_l', y_l'), (x_u', y^', c') = PIC((x_l, y_l), (x_u, y^, c), t)
    features of [x_l; x_u; x_l'; strong_view(x_u')] = encoder of f, in one pass
    L_sup = (CE + Dice)(f(x_l'), y_l') / 2
    L_u = (CE + Dice)(f(strong_view(x_u')), y^') / 2 over voxels with c' >= 0.75
    f_T = DINOv3 features (g x g) of K axial slices of the clean [x_l; x_u]
    f_S = projector(features of stride 8 of the clean [x_l; x_u], read at the same places)
    L_FKD = mean over places of w ||f_S / |f_S| - f_T / |f_T| ||^2
    L = L_sup + w_u(t) L_u + 0.5 L_FKD, w_u rising from 0.1 to 1 over 40 % of the run
    optimiser step, then g <- 0.99 g + 0.01 f
Constants: ours; the paper's formulas, layers, weights and schedules are not public. The transform of the images is DINOv3's
Deviations: everything but the two ideas is our design, and no result of it is a result of the paper. Known of the paper are a
    frozen DINOv3, a normalised feature distance, and a CutMix that turns from the tail to uniform on both subsets. Cached
    features are another view of the teacher than live ones: it sees whole slices of the scan, so what surrounds a patch, once
    and before any augmentation; their range is the scan's, their flips are approximate, and padding teaches nothing.
"""

from __future__ import annotations

import math
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from tailseg.core import Batch, BuildNetwork, Companion, Method, Progress, StepOutput, Task
from tailseg.options import OptionError
from tailseg.parts.counts import count_classes
from tailseg.parts.dense_teacher import (
    HOW_TO_GET,
    RANDOM_TINY,
    DenseTeacher,
    DINOv3,
    Projector,
    TeacherError,
    feature_distance,
    read_slices,
    slice_positions,
    slices_as_rgb,
)
from tailseg.parts.losses import ce_soft_dice, log_softmax, masked_cross_entropy, soft_dice_loss
from tailseg.parts.mixing import MixerSpec, Samples, make_mixer
from tailseg.parts.perturb import strong_view
from tailseg.parts.ramps import ramp_over
from tailseg.parts.slice_features import SliceFeatures
from tailseg.parts.teachers import Teacher


@final
class DINOMix(Method):
    """teacher: DINOv3 weights, as `tailseg teacher check` takes them. fkd_weight: of L_FKD; with 0 no DINOv3 is needed, and it
    is a Mean Teacher with PIC. fkd_schedule: cosine lets L_FKD fall to 0 over the run. features: live shows DINOv3 the patches
    of every step; cached shows it every slice of the scans once, before training, and keeps its features in the store.
    slices: K, of each patch. slice_size: sides of what DINOv3 sees of a patch, a multiple of 16. context: channels of a grey
    slice z, [z - 1, z, z + 1] or thrice z. stage: of the encoder, 1 is the finest, 4 has stride 8. uniqueness: places weigh by
    how unlike the rest of their slice DINOv3 finds them. mixer: none, cutmix or pic. confidence: of the pseudo-labels that
    teach. start: w_u at the start of the run. ramp: share of the run over which w_u rises to 1. ema_mode: of the EMA teacher,
    see tailseg.parts.teachers.Teacher."""

    def __init__(
        self,
        task: Task,
        build: BuildNetwork,
        *,
        teacher: str = "",
        fkd_weight: float = 0.5,
        fkd_schedule: Literal["constant", "cosine"] = "constant",
        features: Literal["live", "cached"] = "live",
        slices: int = 8,
        slice_size: int = 224,
        context: Literal["neighbours", "repeat"] = "neighbours",
        stage: int = 4,
        uniqueness: bool = False,
        mixer: MixerSpec = "pic",
        confidence: float = 0.75,
        start: float = 0.1,
        ramp: float = 0.4,
        ema_decay: float = 0.99,
        ema_mode: Literal["train", "eval"] = "train",
    ) -> None:
        super().__init__(task)
        self.net = build(init="default")
        self.ema = Teacher(self.net, decay=ema_decay, mode=ema_mode)
        self.mixer = make_mixer(mixer, task)
        self.confidence, self.start, self.ramp = confidence, start, ramp
        self.fkd_weight, self.fkd_schedule, self.uniqueness = fkd_weight, fkd_schedule, uniqueness
        self.cached, self.slices, self.slice_size = features == "cached", slices, slice_size
        self.context: Literal["neighbours", "repeat"] = context
        self.stage = stage - 1
        channels = self.net.feature_channels
        if not 1 <= stage <= len(channels):
            raise OptionError(f"method.stage is {stage}; the encoder has stages 1 to {len(channels)}.")
        if slices < 1 or slice_size < 16 or slice_size % 16:
            raise OptionError(
                f"method.slices {slices} must be 1 or more, method.slice_size {slice_size} a multiple of 16."
            )
        self.dino = DINOv3(teacher) if fkd_weight > 0 else None
        if self.dino is not None:
            if not teacher:
                raise TeacherError(f"method 'dinomix' needs method.teacher, the weights of a DINOv3. {HOW_TO_GET}")
            self.projector = Projector(channels[self.stage], self.dino.known_width())

    def check_batch(self, labelled: int, unlabelled: int, patch_size: tuple[int, ...]) -> None:
        if self.dino is not None:
            self.dino.check()  # not at construction: a trained run predicts where the weights are not

    def companion(self, patch_size: tuple[int, ...]) -> Companion | None:
        if self.dino is None or not self.cached:
            return None
        return SliceFeatures(
            self.dino.source, patch_size, slices=self.slices, slice_size=self.slice_size, context=self.context
        )

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        x, n = batch.x, len(batch.x_l)
        labelled, unlabelled = Samples.annotated(batch.x_l, batch.y_l), self._pseudo_labelled(batch.x_u)
        labelled, unlabelled = self.mixer(labelled, unlabelled, progress)
        mixed = torch.cat([labelled.x, strong_view(unlabelled.x)])

        # what is distilled is seen unmixed: a place inside a pasted box would be taught what lay there before
        clean = x if self.dino is not None else x[:0]
        features = self.net.encoder(torch.cat([clean, mixed]))  # one pass, one set of batch statistics
        logits = self.net.decoders[0]([feature[len(clean) :] for feature in features]).logits  # (B_l + B_u, K, *S)
        log_probs = log_softmax(logits)

        losses = {"sup": ce_soft_dice(log_probs[:n], labelled.labels)}
        logs: dict[str, Tensor] = {}
        if len(unlabelled):
            target, kept = unlabelled.labels, unlabelled.confidence >= self.confidence
            unsup = masked_cross_entropy(log_probs[n:], target, kept) + soft_dice_loss(log_probs[n:], target, kept)
            weight = self.unsup_weight(progress)
            losses["unsup"] = weight * unsup / 2
            logs |= {"kept": kept.float().mean(), "unsup_weight": unsup.new_full((), weight)}
        if self.dino is not None:
            taught = self._cached_features(batch) if self.cached else self._live_features(self.dino, x)
            distance = self._feature_distance(taught, features[self.stage][: len(x)], x)
            losses["fkd"] = self.distillation_weight(progress) * distance
            logs["feature_distance"] = distance.detach()  # about 2 at first; distrust a run where it stays above 1
            if self.dino.is_random:
                logs["random_teacher"] = distance.new_ones(())
        return StepOutput(losses, count_classes(logits.argmax(1), self.task.num_classes), logs)

    def _pseudo_labelled(self, x_u: Tensor) -> Samples:
        if not len(x_u):
            return Samples.annotated(x_u, x_u[:, 0].long())
        logits = self.ema(x_u).logits  # (B_u, K, *S)
        return Samples(x_u, logits.argmax(1), log_softmax(logits).amax(1).exp())

    def _positions(self, x: Tensor) -> list[int]:
        return slice_positions(x.shape[2] if self.task.spatial_dims == 3 else 1, self.slices)

    def _live_features(self, dino: DenseTeacher, x: Tensor) -> Tensor:
        """(B * slices, C_t, g, g)"""
        images = slices_as_rgb(x, self._positions(x), self.context)  # (B * slices, 3, H, W)
        size = (self.slice_size, self.slice_size)
        return dino(F.interpolate(images, size=size, mode="bilinear", antialias=True))

    def _cached_features(self, batch: Batch) -> Tensor:
        """(B * slices, C_t, g, g)"""
        if batch.features is None:
            raise ValueError("method.features=cached learns from Batch.features, which tailseg train fills; take live.")
        return batch.features.transpose(1, 2).flatten(0, 1)

    def _feature_distance(self, taught: Tensor, features: Tensor, x: Tensor) -> Tensor:
        """taught: (B * slices, C_t, g, g). features: (B, C_s, *s) of the student, of the patches x."""
        depth = x.shape[2] if self.task.spatial_dims == 3 else 1
        # a projection of every place commutes with reading between places, and reading is cheaper in fewer channels
        seen = read_slices(features, self._positions(x), depth, taught.shape[2:])  # (B * slices, C_s, g, g)
        learnt = self.projector(seen.flatten(2).transpose(1, 2))  # (B * slices, g * g, C_t)
        return feature_distance(learnt, taught.flatten(2).transpose(1, 2), uniqueness=self.uniqueness)

    def unsup_weight(self, progress: Progress) -> float:
        return self.start + (1 - self.start) * ramp_over(progress, self.ramp)

    def distillation_weight(self, progress: Progress) -> float:
        falling = (1 + math.cos(math.pi * progress.fraction("step"))) / 2
        return self.fkd_weight * (falling if self.fkd_schedule == "cosine" else 1.0)

    def caveat(self) -> str:
        told = "DINO-Mix (our re-design): its numbers are not those of the paper's method, which is not public."
        if self.dino is not None and self.dino.is_random:
            told += f" RANDOM TEACHER: it learnt from random features ({RANDOM_TINY}), and no result of it counts."
        return told

    def after_step(self, progress: Progress) -> None:
        self.ema.follow(self.net, progress)

    def predict(self, x: Tensor) -> Tensor:
        return torch.softmax(self.net(x).logits.float(), 1)
