"""Mean Teacher: a network agrees with the running average of itself on noisy unlabelled images.

Paper: A. Tarvainen, H. Valpola, "Mean teachers are better role models", NeurIPS 2017, https://arxiv.org/abs/1703.01780
Family: mean teacher
Needs: an EMA teacher (no gradients)
Cost: x2.3
Idea: A teacher whose weights are the exponential average of the student's predicts the unlabelled patches under input noise.
    The student matches its probabilities by mean squared error, with a weight that rises over the run.
Algorithm:
    z = f([x_l; x_u]), p = softmax z
    t = softmax g(x_u + n), n = clip(0.1 N(0, 1), -0.2, 0.2)     no gradient; dropout on, statistics of the batch
    L_sup = (CE(z_l, y) + Dice(p_l, y)) / 2
    L_con = mean over samples, classes and voxels of (p_u - t)^2
    L = L_sup + 0.1 exp(-5 (1 - step / T_max)^2) L_con
    optimiser step, then g <- a g + (1 - a) f with a = min(1 - 1 / (step + 1), 0.99), parameters only
Constants: github.com/HiLab-git/SSL4MIS, train_mean_teacher_2D.py and train_mean_teacher_3D.py (ACDC: start=1000); those of
    github.com/yulequan/UA-MT for LA are the same, but for a Dice of the foreground alone.
Deviations: the ramp spans the run, as the authors' 200 * 150 steps did theirs, and moves every step; ramp_hold=150
    restores their stairs. The mean over classes makes L_con shrink as 1 / K, and the noise is meant for z-scored images
    and strong for images in [0, 1] (ACDC, CT): both kept, see noise_std. teacher_mode=eval is ours: the teacher
    predicts with averaged running statistics and without dropout.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from tailseg.core import Batch, BuildNetwork, Method, Progress, StepOutput, Task
from tailseg.options import OptionError
from tailseg.parts.counts import count_classes
from tailseg.parts.gradient_aware import ga_loss
from tailseg.parts.losses import ce_soft_dice, log_softmax
from tailseg.parts.perturb import add_noise
from tailseg.parts.pseudo_labels import likeliest
from tailseg.parts.ramps import ramp_over
from tailseg.parts.ranks import num_ranks, sum_over_ranks
from tailseg.parts.teachers import Teacher


@final
class MeanTeacher(Method):
    """consistency_weight: at the end of the ramp. ramp: share of the run over which the consistency weight rises, 0 for
    none. ramp_hold: steps for which the weight stays (150 in the authors' code). start: steps before the consistency
    counts (1000 for ACDC). noise_std: of the teacher's images, clipped at twice as much. ema_decay: of the teacher's
    weights, per step. teacher_mode: "train" normalises with the batch and keeps dropout on, "eval" neither. sup: the
    supervised loss, "ga" the gradient-aware one of GALoss.
    """

    def __init__(
        self,
        task: Task,
        build: BuildNetwork,
        *,
        consistency_weight: float = 0.1,
        ramp: float = 1.0,
        ramp_hold: int = 1,
        start: int = 0,
        noise_std: float = 0.1,
        ema_decay: float = 0.99,
        teacher_mode: Literal["train", "eval"] = "train",
        predict_with: Literal["student", "teacher"] = "student",
        sup: Literal["ce_soft_dice", "ga"] = "ce_soft_dice",
    ) -> None:
        super().__init__(task)
        if ramp < 0 or ramp_hold < 1:
            raise OptionError(f"method.ramp is {ramp}, at least 0; method.ramp_hold is {ramp_hold}, at least 1 step.")
        self.net = build(init="default")
        self.teacher = Teacher(self.net, decay=ema_decay, warm_up="step", mode=teacher_mode)
        self.consistency_weight, self.ramp, self.ramp_hold, self.start = consistency_weight, ramp, ramp_hold, start
        self.noise_std = noise_std
        self.predict_with = predict_with
        self.sup_loss = ce_soft_dice if sup == "ce_soft_dice" else ga_loss

    def check_batch(self, labelled: int, unlabelled: int, patch_size: tuple[int, ...]) -> None:
        if self.predict_with == "teacher" and not unlabelled:
            raise ValueError(
                f"method 'mean_teacher' with predict_with=teacher needs unlabelled patches: data.batch [{labelled}, 0] never "
                f"shows the teacher an image; try [{labelled}, {labelled}], or predict_with=student."
            )

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        logits, n = self.net(batch.x).logits, len(batch.x_l)  # (B_l + B_u, K, *S)
        log_probs = log_softmax(logits)
        losses = {"sup": self.sup_loss(log_probs[:n], batch.y_l)}
        logs = {}
        if len(batch.x_u):
            noisy = add_noise(batch.x_u, self.noise_std, 2 * self.noise_std)
            target = log_softmax(self.teacher(noisy).logits).exp()  # (B_u, K, *S)
            mse = (log_probs[n:].exp() - target).square().mean()
            mse = sum_over_ranks(mse) / num_ranks()
            weight = self.consistency_weight * ramp_over(progress, self.ramp, hold=self.ramp_hold)
            losses["consistency"] = (weight if progress.step >= self.start else 0.0) * mse
            logs["agreement"] = (likeliest(log_probs[n:]) == likeliest(target)).float().mean()
        predicted = count_classes(likeliest(logits), self.task.num_classes)
        return StepOutput(losses, predicted, logs)

    def after_step(self, progress: Progress) -> None:
        self.teacher.follow(self.net, progress)

    def predict(self, x: Tensor) -> Tensor:
        net = self.net if self.predict_with == "student" else self.teacher
        return torch.softmax(net(x).logits.float(), 1)
