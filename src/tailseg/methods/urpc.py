"""URPC: predictions at four scales are pulled to their mean, less where they disagree.

Paper: X. Luo et al., "Efficient Semi-supervised Gross Target Volume of Nasopharyngeal Carcinoma Segmentation via Uncertainty
    Rectified Pyramid Consistency", MICCAI 2021, https://arxiv.org/abs/2012.07042
Family: consistency
Needs: one network with heads on the coarser stages of its decoder
Cost: x5.6
Idea: The decoder predicts at four scales, all of them trained with the labels. On unlabelled images each scale learns from
    the mean of all four, and a voxel counts the less the further (in KL divergence) its scale is from that mean.
Algorithm:
    o_1 ... o_4 = f([x_l; x_u]), upsampled to the finest scale;  p_i = softmax o_i
    L_sup = 1/8 sum over i of CE(o_i[l], y) + Dice(p_i[l], y)
    on the unlabelled half:
        p = (p_1 + ... + p_4) / 4                   # not detached
        v_i = sum over classes of p log(p / p_i);  e_i = exp(-v_i)
        c_i = mean((p - p_i)^2 e_i) / mean(e_i) + mean(v_i)
    L = L_sup + lambda(t) (c_1 + ... + c_4) / 4
    predict: softmax o_1
Constants: github.com/xmed-lab/DHC, train_urpc.py (weight 0.1, ramp over the whole run; the re-implementation in SSL4MIS ramps
    over the first 60000 steps)
Deviations: KL is computed from a log-softmax and a log-sum-exp, equal to the authors' log(softmax) wherever that is finite.
    The network of the published numbers is network.name=urpc_unet; on another one the coarser heads are ours. On a batch
    without unlabelled patches only L_sup is left.
"""

from __future__ import annotations

import math
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from tailseg.core import Batch, BuildNetwork, Method, Progress, SegOutput, StepOutput, Task, Unit
from tailseg.parts.counts import count_classes
from tailseg.parts.losses import cross_entropy, dice_loss, log_softmax
from tailseg.parts.ramps import ramp_up
from tailseg.parts.ranks import sum_over_ranks


@final
class URPC(Method):
    """consistency_weight: lambda at the end. ramp: what it grows with."""

    def __init__(
        self, task: Task, build: BuildNetwork, *, consistency_weight: float = 0.1, ramp: Unit = "epoch"
    ) -> None:
        super().__init__(task)
        self.net = build(init="kaiming", pyramid=True)
        self.consistency_weight = consistency_weight
        self.ramp: Unit = ramp

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        n = len(batch.x_l)
        out = self.net(batch.x)
        scales = [log_softmax(logits) for logits in _full_size(out)]  # each (B_l + B_u, K, *S)

        sup = torch.stack([_supervised(scale[:n], batch.y_l) for scale in scales]).mean()
        consistency, variance = pyramid_consistency([scale[n:] for scale in scales])  # (scales,) each
        weight = self.consistency_weight * ramp_up(progress, self.ramp)
        return StepOutput(
            losses={"sup": sup, "consistency": weight * consistency.mean()},
            predicted=count_classes(out.logits.argmax(1), self.task.num_classes),
            logs={"variance": variance.mean().detach()},
        )

    def predict(self, x: Tensor) -> Tensor:
        return torch.softmax(self.net(x).logits.float(), 1)


def _supervised(log_probs: Tensor, target: Tensor) -> Tensor:
    return (cross_entropy(log_probs, target) + dice_loss(log_probs, target, smooth=1e-8)) / 2


def _full_size(out: SegOutput) -> list[Tensor]:
    """Logits (B, K, *S) of every scale, finest first."""
    size = out.logits.shape[2:]
    mode = "trilinear" if len(size) == 3 else "bilinear"
    return [out.logits, *(F.interpolate(coarse, size=size, mode=mode, align_corners=False) for coarse in out.pyramid)]


def pyramid_consistency(scales: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Consistency c_i and mean variance v_i of each scale, both (scales,); 0 where there is no voxel.

    scales: float32 log-probabilities (B_u, K, *S) of each.
    """
    # log(softmax) of the authors is -inf once logits are 104 apart
    log_mean = torch.logsumexp(torch.stack(scales), 0) - math.log(len(scales))
    mean = log_mean.exp()  # a target that learns: the authors do not detach it
    sums: list[Tensor] = []
    for scale in scales:
        variance = (mean * (log_mean - scale)).sum(1)  # (B_u, *S)
        trust = (-variance).exp()
        distance = (mean - scale.exp()).square().mean(1)
        sums.append(torch.stack([(distance * trust).sum(), trust.sum(), variance.sum()]))
    voxels = mean.new_full((), mean[:, 0].numel())
    distance, trust, variance, voxels = sum_over_ranks(
        torch.cat([torch.stack(sums), voxels.expand(len(scales), 1)], 1)
    ).unbind(1)
    voxels = voxels.clamp_min(1.0)
    variance = variance / voxels
    return (distance / voxels) / (trust / voxels + 1e-8) + variance, variance
