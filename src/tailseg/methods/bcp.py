"""BCP: bidirectional copy-paste between labelled and unlabelled images, labelled by a mean teacher.

Paper: Y. Bai, D. Chen, Q. Li, W. Shen, Y. Wang, "Bidirectional Copy-Paste for Semi-Supervised Medical Image Segmentation",
    CVPR 2023, https://arxiv.org/abs/2305.00673
Family: mixing
Needs: an EMA teacher (no gradients); data.batch with an even number of labelled patches and as many unlabelled ones
Cost: x2.7
Idea: one box of an unlabelled image is filled from a labelled one and the other way round, so that the network never sees
    the two kinds of images apart. Labels are mixed alike; where the image is unlabelled they are the teacher's, and weigh less.
Algorithm:
    B = a box of 2/3 of each side, anywhere in the patch; M = outside of B
    a, b = halves of the labelled patches; u, v = halves of the unlabelled patches
    mix(z, y, w_M, w_B) = (w_M [Dice_M(z, y) + CE_M(z, y)] + w_B [Dice_B(z, y) + CE_B(z, y)]) / 2
    in the first `pretrain` share of the run:
        x, y = a outside and b inside B
        L = (CE(f(x), y) + Dice(f(x), y)) / 2
    then the teacher g starts as a copy of the student f, and
        y_u, y_v = argmax g(u), argmax g(v), of each foreground class only its largest piece if `largest_component`
        x_in, y_in = a outside and u inside B;  x_out, y_out = v outside and b inside B
        L = mix(f(x_in), y_in, 1, alpha) + mix(f(x_out), y_out, alpha, 1)
        after the step: g <- decay g + (1 - decay) f
Constants: LA_BCP_train.py, ACDC_BCP_train.py and utils/BCP_utils.py of github.com/DeepMed-Lab-ECNU/BCP (commit 7879f98).
    LA: the defaults of two classes, data.batch [4, 4]. ACDC: those of more, with pretrain=0.25, largest_component=true and
    data.batch [12, 12].
Deviations: the authors' second stage starts from the first one's best checkpoint, chosen on the test list in LA, with a new
    optimiser; here training goes on from the last step of the first. The four images are mixed and forwarded as one batch,
    and so are u and v in the teacher: batch statistics are of all of them, not of each half. The box may also lie at the
    far end of an axis, which the authors' draw leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from tailseg.core import IGNORE, Batch, BuildNetwork, Method, Progress, StepOutput, Task
from tailseg.options import OptionError
from tailseg.parts.counts import count_classes, sum_per_class
from tailseg.parts.losses import cross_entropy, log_softmax, soft_dice_loss
from tailseg.parts.mixing import paste
from tailseg.parts.ranks import num_ranks, sum_over_ranks
from tailseg.parts.teachers import Teacher


@final
class BCP(Method):
    """pretrain: share of the run, in [0, 1). box: share of each side. dice: "sample" averages over samples and does not square
    its denominator (LA), "batch" sums over the batch and squares it (ACDC). pretrain_loss: on the "whole" mixed image
    (LA) or on its two "regions" apart (ACDC). largest_component: keep the largest piece of each class. None of these three
    is LA's way for two classes and, but for the pieces, ACDC's for more."""

    def __init__(
        self,
        task: Task,
        build: BuildNetwork,
        *,
        pretrain: float = 2 / 17,
        alpha: float = 0.5,
        box: float = 2 / 3,
        dice: Literal["sample", "batch"] | None = None,
        pretrain_loss: Literal["whole", "regions"] | None = None,
        largest_component: bool | None = None,
        decay: float = 0.99,
        teacher_mode: Literal["train", "eval"] = "train",
    ) -> None:
        super().__init__(task)
        if not 0 <= pretrain < 1:
            raise OptionError(f"method.pretrain is {pretrain}; it is a share of the run, from 0 to below 1.")
        if not 0 < box <= 1:
            raise OptionError(f"method.box is {box}; it is the box's share of each side, above 0 and at most 1.")
        self.net = build(init="default")
        self.teacher = Teacher(self.net, decay=decay, warm_up=None, mode=teacher_mode)
        self.pretrain, self.alpha, self.box = pretrain, alpha, box
        # LA's losses are made for two classes: their Dice of each sample by itself punishes every trace of a class that this
        # sample lacks, and on slices of ACDC it drove the foreground out of all predictions
        self.dice = dice or ("sample" if task.num_classes == 2 else "batch")
        self.pretrain_loss = pretrain_loss or ("whole" if task.num_classes == 2 else "regions")
        # one heart or pancreas is one piece; organs of many classes may be in several (vessels, pairs), and each class costs
        # the CPU a labelling of every patch while the device waits: two classes as the authors did, more on request
        self.largest_component = task.num_classes == 2 if largest_component is None else largest_component

    def check_batch(self, labelled: int, unlabelled: int, patch_size: tuple[int, ...]) -> None:
        if labelled % 2 or labelled < 2 or unlabelled != labelled:
            even = max(labelled + labelled % 2, 2)
            raise ValueError(
                f"method 'bcp' pastes half of the labelled patches into unlabelled ones, and as many the other way round: "
                f"data.batch [{labelled}, {unlabelled}] must hold an even number of labelled patches and as many unlabelled "
                f"ones; try [{even}, {even}]."
            )

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        box = draw_box(batch.x_l.shape[2:], self.box, batch.x_l.device)  # (1, *S), one for all samples
        (a, b), (y_a, y_b) = batch.x_l.chunk(2), batch.y_l.chunk(2)
        if progress.step < self._pretrain_steps(progress):
            return self._pretrain_step(paste(b, a, box), paste(y_b, y_a, box), box)
        labels = self.teacher(batch.x_u).logits.argmax(1)  # (B_u, *S)
        if self.largest_component:
            labels = keep_largest_components(labels, self.task.num_classes)
        (u, v), (y_u, y_v) = batch.x_u.chunk(2), labels.chunk(2)
        # no source serves twice: what the box hides of a and v, and what it leaves of u and b, is seen by nobody
        x = torch.cat(
            [paste(u, a, box), paste(b, v, box)]
        )  # inward, outward: one batch, where the authors forward each
        logits = self.net(x).logits
        log_probs_in, log_probs_out = log_softmax(logits).chunk(2)
        inward = self._mix_loss(log_probs_in, paste(y_u, y_a, box), box, outside=1.0, inside=self.alpha)
        outward = self._mix_loss(log_probs_out, paste(y_b, y_v, box), box, outside=self.alpha, inside=1.0)
        return StepOutput(
            losses={"inward": inward, "outward": outward},
            predicted=count_classes(logits.argmax(1), self.task.num_classes),
            logs={"pseudo_foreground": (labels > 0).float().mean()},
        )

    def _pretrain_step(self, x: Tensor, y: Tensor, box: Tensor) -> StepOutput:
        logits = self.net(x).logits
        log_probs = log_softmax(logits)
        if self.pretrain_loss == "whole":
            sup = (cross_entropy(log_probs, y) + self._dice_loss(log_probs, y)) / 2
        else:
            sup = self._mix_loss(log_probs, y, box, outside=1.0, inside=1.0)
        return StepOutput({"sup": sup}, count_classes(logits.argmax(1), self.task.num_classes))

    def _mix_loss(self, log_probs: Tensor, target: Tensor, box: Tensor, *, outside: float, inside: float) -> Tensor:
        """Half the sum over both regions of weight (Dice + CE), each over the annotated voxels of its region alone."""
        out, in_ = target.masked_fill(box, IGNORE), target.masked_fill(~box, IGNORE)
        return 0.5 * (
            outside * (self._dice_loss(log_probs, out) + cross_entropy(log_probs, out))
            + inside * (self._dice_loss(log_probs, in_) + cross_entropy(log_probs, in_))
        )

    def _dice_loss(self, log_probs: Tensor, target: Tensor) -> Tensor:
        if self.dice == "batch":
            return soft_dice_loss(log_probs, target, smooth=1e-10)
        return sample_dice_loss(log_probs, target)

    def _pretrain_steps(self, progress: Progress) -> int:
        return round(self.pretrain * progress.total_steps)

    def after_step(self, progress: Progress) -> None:
        done = progress.step + 1
        if done == self._pretrain_steps(progress):
            self.teacher.copy_from(self.net)  # the authors take the best checkpoint so far
        elif done > self._pretrain_steps(progress):
            self.teacher.follow(self.net, progress)

    def predict(self, x: Tensor) -> Tensor:
        return torch.softmax(self.net(x).logits.float(), 1)


def draw_box(sides: Sequence[int], share: float, device: torch.device) -> Tensor:
    """(1, *S) bool, true inside a box of int(share * side) voxels per axis, anywhere in it with equal odds."""
    box = torch.zeros(1, *sides, dtype=torch.bool, device=device)
    edges = [int(share * side) for side in sides]
    draws = torch.rand(len(sides), dtype=torch.float64).tolist()
    # the authors never draw the last start
    starts = [int(draw * (side - edge + 1)) for draw, side, edge in zip(draws, sides, edges, strict=True)]
    box[:, *(slice(start, start + edge) for start, edge in zip(starts, edges, strict=True))] = True
    return box


def sample_dice_loss(log_probs: Tensor, target: Tensor, smooth: float = 1e-5) -> Tensor:
    """1 minus the mean over samples and classes of (2 S(p t) + smooth) / (S(p) + S(t) + smooth); IGNORE counts nowhere.

    A class that a sample's target lacks scores about 0 where it is predicted, 1 where nothing is annotated.
    log_probs: (B, K, *S). target: (B, *S) int64.
    """
    k = log_probs.shape[1]
    mass = (log_probs.exp() * (target != IGNORE).unsqueeze(1)).flatten(2).sum(2)  # (B, K)
    target_probs = log_probs.gather(1, target.clamp(max=k - 1).unsqueeze(1)).squeeze(1).exp()  # (B, *S)
    hits = torch.stack([sum_per_class(p[None], t[None], k) for p, t in zip(target_probs, target, strict=True)])
    sizes = torch.stack([count_classes(t[None], k) for t in target])  # (B, K)
    dice = (2 * hits + smooth) / (mass + sizes + smooth)
    return 1 - sum_over_ranks(dice.mean()) / num_ranks()


def keep_largest_components(labels: Tensor, num_classes: int) -> Tensor:
    """labels with all but the largest piece of each foreground class of each sample set to 0; touching corners connect.

    labels: (B, *S) int64. Computed on the CPU: the host waits for the device. Of equal pieces the first stays.
    """
    samples = labels.to("cpu", torch.uint8).numpy()
    for sample in samples:
        for index, place in enumerate(ndimage.find_objects(sample, num_classes - 1), start=1):
            if place is None:  # the class is not there
                continue
            inside = sample[place]  # a view
            pieces = np.zeros(inside.shape, np.int32)
            ndimage.label(inside == index, np.ones((3,) * inside.ndim), pieces)
            largest = np.bincount(pieces.ravel())[1:].argmax() + 1
            inside[(pieces > 0) & (pieces != largest)] = 0
    return torch.from_numpy(samples).to(labels)
