"""Supervised: one network learns from the labelled patches alone.

Paper: F. Milletari, N. Navab, S.-A. Ahmadi, "V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image
    Segmentation", 3DV 2016, https://arxiv.org/abs/1606.04797
Family: supervised
Needs: nothing but one network
Cost: x1.0
Idea: With every training scan labelled it is the upper bound. With the few labelled scans of a split it is the lower bound
    that every semi-supervised method must beat.
Algorithm:
    x_l, y = mix(x_l, y)                  only with a mixer, such as PIC
    z = f(x_l), p = softmax z             the unlabelled patches are not looked at
    w = weights of the classes            1 without a weighter
    L = CE(z, y; w) + Dice(p, y; w)       soft Dice of the foreground over the whole batch, smooth 1
    prediction: p
Constants: train_fully.py of github.com/xmed-lab/DHC (commit b3dee97): default initialisation, one network, no ramp.
Deviations: the labelled scans are repeated to the length of an epoch of the semi-supervised methods, for equal numbers of
    steps. The options are ours: loss=ga is the supervised part of GALoss, mixer=pic the labelled part of PIC.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from tailseg.core import Batch, BuildNetwork, Method, Progress, StepOutput, Task
from tailseg.parts.class_weights import WeighterSpec, make_weighter
from tailseg.parts.counts import count_classes
from tailseg.parts.gradient_aware import ga_loss
from tailseg.parts.losses import dice_ce, log_softmax
from tailseg.parts.mixing import MixerSpec, Samples, make_mixer


@final
class Supervised(Method):
    """weighter: class weights. loss: on the labels. mixer: what moves boxes between labelled patches."""

    def __init__(
        self,
        task: Task,
        build: BuildNetwork,
        *,
        weighter: WeighterSpec = "none",
        loss: Literal["ce_dice", "ga"] = "ce_dice",
        mixer: MixerSpec = "none",
    ) -> None:
        super().__init__(task)
        self.net = build(init="default")
        self.weighter, self.mixer = make_weighter(weighter, task), make_mixer(mixer, task)
        self.loss = dice_ce if loss == "ce_dice" else ga_loss

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        given = Samples.annotated(batch.x_l, batch.y_l)
        labelled, _ = self.mixer(given, given[:0], progress)
        logits = self.net(labelled.x).logits  # (B_l, K, *S)
        labels = logits.argmax(1)
        weights = self.weighter.update(labels, labelled.labels)
        return StepOutput(
            losses={"sup": self.loss(log_softmax(logits), labelled.labels, weights)},
            predicted=count_classes(labels, self.task.num_classes),
            logs={"weights": weights},
        )

    def predict(self, x: Tensor) -> Tensor:
        return torch.softmax(self.net(x).logits.float(), 1)
