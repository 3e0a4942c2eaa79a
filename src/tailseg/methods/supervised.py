"""Supervised segmentation: cross-entropy and soft Dice on the labelled patches alone.

Paper: F. Milletari, N. Navab, S.-A. Ahmadi, "V-Net", 3DV 2016, https://arxiv.org/abs/1606.04797
Idea: with every training scan labelled it is the upper bound; with the few labelled scans of a split it is the lower bound
that every semi-supervised method must beat.
Constants: github.com/xmed-lab/DHC, train_fully.py (default initialisation, one network, no ramp). Repeating the labelled
scans to the length of an epoch of the semi-supervised methods is ours, for equal step counts.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from tailseg.core import Batch, BuildNetwork, Method, Progress, StepOutput, Task
from tailseg.parts.class_weights import WeighterSpec, make_weighter
from tailseg.parts.counts import count_classes
from tailseg.parts.losses import dice_ce, log_softmax


@final
class Supervised(Method):
    def __init__(self, task: Task, build: BuildNetwork, *, weighter: WeighterSpec = "none") -> None:
        super().__init__(task)
        self.net = build(init="default")
        self.weighter = make_weighter(weighter, task)

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        logits = self.net(batch.x_l).logits  # (B_l, K, *S)
        labels = logits.argmax(1)
        weights = self.weighter.update(labels, batch.y_l)
        return StepOutput(
            losses={"sup": dice_ce(log_softmax(logits), batch.y_l, weights)},
            predicted=count_classes(labels, self.task.num_classes),
            logs={"weights": weights},
        )

    def predict(self, x: Tensor) -> Tensor:
        return torch.softmax(self.net(x).logits.float(), 1)
