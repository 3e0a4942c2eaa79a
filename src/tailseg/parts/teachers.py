"""Mean teachers: networks that follow a student as the exponential average of its weights.

Source: A. Tarvainen, H. Valpola, NeurIPS 2017, https://arxiv.org/abs/1703.01780. Published code disagrees on what is
averaged and on the teacher's mode, so both are arguments.
"""

from __future__ import annotations

import copy
from typing import Literal, Self

import torch
from torch import Tensor, nn

from tailseg.core import Progress, SegNet, SegOutput, Unit


class Teacher(nn.Module):
    """A copy of the student that gets no gradients and follows it: g <- a g + (1 - a) f, a = min(1 - 1 / (t + 1), decay).

    warm_up: what t counts, steps or epochs done; None follows with `decay` from the start. At t = 0 the student is copied.
    mode: "train" normalises with the statistics of the batch and keeps dropout on, as SSL4MIS, UA-MT and DHC do; its running
    statistics then come from its own passes. "eval" uses running statistics, and averages the student's. The method's .eval()
    puts either into evaluation.
    """

    def __init__(
        self,
        student: SegNet,
        *,
        decay: float = 0.99,
        warm_up: Unit | None = "step",
        mode: Literal["train", "eval"] = "train",
    ) -> None:
        super().__init__()
        self.net = copy.deepcopy(student).requires_grad_(False)
        self.decay, self.warm_up, self.mode = decay, warm_up, mode
        self.train(self.training)  # the copy came in the student's mode

    def train(self, mode: bool = True) -> Self:
        """As called by the method around it; a teacher of mode "eval" stays in evaluation."""
        return super().train(mode and self.mode == "train")

    @torch.no_grad()
    def forward(self, x: Tensor) -> SegOutput:
        """The network's output, without gradients."""
        return self.net(x)

    def momentum(self, progress: Progress) -> float:
        """a of the update after the step that progress describes: 0, 1/2, 2/3, 3/4, ... up to decay."""
        if self.warm_up is None:
            return self.decay
        t = progress.step if self.warm_up == "step" else progress.epoch
        return min(1 - 1 / (t + 1), self.decay)

    @torch.no_grad()
    def follow(self, student: SegNet, progress: Progress) -> None:
        """Move towards the student; to be called in after_step."""
        share = 1 - self.momentum(progress)
        # one kernel for all parameters; the optimisers of torch use it too
        torch._foreach_lerp_(list(self.net.parameters()), list(student.parameters()), share)  # pyright: ignore[reportPrivateImportUsage]
        if self.mode == "eval":
            for mine, theirs in zip(self.net.buffers(), student.buffers(), strict=True):
                if mine.is_floating_point():
                    mine.lerp_(theirs, share)
                else:
                    mine.copy_(theirs)

    @torch.no_grad()
    def copy_from(self, student: SegNet) -> None:
        """Take over all weights and buffers of the student."""
        self.net.load_state_dict(student.state_dict())
