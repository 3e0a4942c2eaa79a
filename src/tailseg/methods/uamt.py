"""UA-MT: mean teacher that is trusted only where its predictions are certain.

Paper: L. Yu, S. Wang, X. Li, C.-W. Fu, P.-A. Heng, "Uncertainty-aware Self-ensembling Model for Semi-supervised 3D Left
    Atrium Segmentation", MICCAI 2019, https://arxiv.org/abs/1907.07034
Family: mean teacher
Needs: an EMA teacher (no gradients); a network with dropout, else only the input noise makes its passes differ
Cost: x4.1
Idea: The student matches the probabilities of an EMA teacher on noisy unlabelled patches, but only in voxels where the mean
    of several passes of the teacher, with dropout and noise, has low entropy. The bound on the entropy rises over the run.
Algorithm:
    z = f([x_l; x_u]), p = softmax z
    t = softmax g(x_u + n), n = clip(0.1 N(0, 1), -0.2, 0.2)     no gradient; dropout on, statistics of the batch
    pbar = mean over T = 8 of softmax g(x_u + n), fresh noise and dropout each
    U = -sum over k of pbar_k log(pbar_k + 1e-6)
    m = 1[U < (0.75 + 0.25 ramp(e)) ln 2]
    L_sup = (CE(z_l, y) + Dice(p_l, y)) / 2                      Dice is minus the soft Dice of the foreground
    L_con = sum over b, k, v of m (p_u - t)^2 / (2 sum of m + 1e-16)
    L = L_sup + 0.1 ramp(e) L_con
    optimiser step, then g <- a g + (1 - a) f with a = min(1 - 1 / (e + 1), 0.99), parameters only
Constants: the 3D re-implementation in github.com/xmed-lab/DHC, train_uamt.py, where e is the epoch. The original for LA,
    github.com/yulequan/UA-MT, and SSL4MIS count steps and take another Dice: ema_step=step ramp=step sup=ce_soft_dice.
Deviations: the teacher starts as a copy of the student, not from weights of its own; at e = 0 each step copies the
    student anyway, so only the first one differs. Quirks of the binary original, kept: the bound is below ln 2, strict
    for many classes (max_entropy=lnK follows their number), and the squared differences of all K classes are divided by
    2 (divisor=K by K).
"""

from __future__ import annotations

import math
from typing import Literal, final

import torch
from torch import Tensor

from tailseg.core import Batch, BuildNetwork, Method, Progress, StepOutput, Task, Unit
from tailseg.options import OptionError
from tailseg.parts.counts import count_classes
from tailseg.parts.losses import ce_soft_dice, cross_entropy, dice_loss, log_softmax
from tailseg.parts.perturb import add_noise
from tailseg.parts.pseudo_labels import likeliest
from tailseg.parts.ramps import gaussian_ramp, ramp_up
from tailseg.parts.ranks import sum_over_ranks
from tailseg.parts.teachers import Teacher


def half_ce_plain_dice(log_probs: Tensor, target: Tensor) -> Tensor:
    """Half the sum of cross-entropy and minus the foreground Dice, which here is not smoothed."""
    return (cross_entropy(log_probs, target) + dice_loss(log_probs, target, smooth=1e-8)) / 2


@final
class UAMT(Method):
    """consistency_weight: at the end of the ramp. ramp: what the consistency weight and the bound on the entropy rise
    by, over the whole run. ema_step: what the teacher's momentum counts, up to ema_decay. passes: T, even. noise_std:
    of the teacher's images, clipped at twice as much. max_entropy: the bound that the run ends with. divisor: of the
    squared differences, which are summed over the classes. sup: "ce_soft_dice" is the supervised loss of SSL4MIS.
    """

    def __init__(
        self,
        task: Task,
        build: BuildNetwork,
        *,
        consistency_weight: float = 0.1,
        ramp: Unit = "epoch",
        ema_step: Unit = "epoch",
        ema_decay: float = 0.99,
        passes: int = 8,
        noise_std: float = 0.1,
        max_entropy: Literal["ln2", "lnK"] = "ln2",
        divisor: Literal[2, "K"] = 2,
        predict_with: Literal["student", "teacher"] = "student",
        sup: Literal["ce_dice", "ce_soft_dice"] = "ce_dice",
    ) -> None:
        super().__init__(task)
        if passes < 2 or passes % 2:
            raise OptionError(
                f"method.passes is {passes}; it must be even and at least 2, as the teacher makes two at once."
            )
        self.net = build(init="default")
        # a copy, where DHC's code draws weights of its own that the first step overwrites
        self.teacher = Teacher(self.net, decay=ema_decay, warm_up=ema_step, mode="train")
        self.consistency_weight, self.passes, self.noise_std = consistency_weight, passes, noise_std
        self.ramp: Unit = ramp
        self.max_entropy = math.log(2 if max_entropy == "ln2" else task.num_classes)
        self.divisor = task.num_classes if divisor == "K" else 2
        self.predict_with = predict_with
        self.sup_loss = half_ce_plain_dice if sup == "ce_dice" else ce_soft_dice

    def check_batch(self, labelled: int, unlabelled: int, patch_size: tuple[int, ...]) -> None:
        if self.predict_with == "teacher" and not unlabelled:
            raise ValueError(
                f"method 'uamt' with predict_with=teacher needs unlabelled patches: data.batch [{labelled}, 0] never shows "
                f"the teacher an image; try [{labelled}, {labelled}], or predict_with=student."
            )

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        logits, n = self.net(batch.x).logits, len(batch.x_l)  # (B_l + B_u, K, *S)
        log_probs = log_softmax(logits)
        losses = {"sup": self.sup_loss(log_probs[:n], batch.y_l)}
        logs = {}
        if len(batch.x_u):
            target = self.teacher_probs(batch.x_u)
            uncertainty = self.uncertainty(batch.x_u)
            certain = (uncertainty < self.threshold(progress)).float()  # (B_u, *S)
            distance = (log_probs[n:].exp() - target).square().sum(1)  # (B_u, *S)
            distance, kept = sum_over_ranks(torch.stack([(certain * distance).sum(), certain.sum()])).unbind()
            weight = self.consistency_weight * ramp_up(progress, self.ramp)
            losses["consistency"] = weight * distance / (self.divisor * kept + 1e-16)
            logs = {"kept": certain.mean(), "uncertainty": uncertainty.mean()}
        return StepOutput(losses, count_classes(likeliest(logits), self.task.num_classes), logs)

    def teacher_probs(self, x: Tensor) -> Tensor:
        """(B, K, *S) of one pass over x with noise."""
        return log_softmax(self.teacher(add_noise(x, self.noise_std, 2 * self.noise_std)).logits).exp()

    def uncertainty(self, x_u: Tensor) -> Tensor:
        """(B_u, *S) entropy of the mean probabilities over all passes, in nats."""
        twice = torch.cat([x_u, x_u])  # two passes at once; their batch statistics are shared
        mean = x_u.new_zeros((len(x_u), self.task.num_classes, *x_u.shape[2:]), dtype=torch.float32)
        for _ in range(self.passes // 2):
            for probs in self.teacher_probs(twice).chunk(2):
                mean.add_(probs, alpha=1 / self.passes)
        return -(mean * (mean + 1e-6).log()).sum(1)

    def threshold(self, progress: Progress) -> float:
        # DHC's loop moves the weight at the end of an epoch, this bound at its start
        epochs = progress.epoch / progress.total_epochs
        t = epochs if self.ramp == "epoch" else progress.fraction("step")
        return (0.75 + 0.25 * gaussian_ramp(t)) * self.max_entropy

    def after_step(self, progress: Progress) -> None:
        self.teacher.follow(self.net, progress)

    def predict(self, x: Tensor) -> Tensor:
        net = self.net if self.predict_with == "student" else self.teacher
        return torch.softmax(net(x).logits.float(), 1)
