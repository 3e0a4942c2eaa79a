"""Losses on log-probabilities, so that one log-softmax per network serves them all.

All of them leave IGNORE voxels out, compute in float32, and normalise over the batch of all ranks together, so that a run
on several processes minimises what one process with the same batch would.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tailseg.core import IGNORE
from tailseg.parts.counts import count_classes, sum_per_class
from tailseg.parts.ranks import sum_over_ranks


def log_softmax(logits: Tensor) -> Tensor:
    """float32 log-probabilities (B, K, *S) of logits (B, K, *S) in any precision and memory layout."""
    # over contiguous classes the log-softmax and what follows run four times as fast on a CPU as over channels_last
    return logits.contiguous().float().log_softmax(1)


def _target_log_probs(log_probs: Tensor, target: Tensor) -> Tensor:
    """(B, *S) log-probability of the target class; IGNORE voxels read some class and must get weight 0."""
    return log_probs.gather(1, target.clamp(max=log_probs.shape[1] - 1).unsqueeze(1)).squeeze(1)


def _voxel_weights(target: Tensor, weight: Tensor) -> Tensor:
    """(B, *S) weight of each voxel's target class, 0 where the target is IGNORE."""
    table = weight.new_zeros(IGNORE + 1)
    table[: len(weight)] = weight
    return table[target]


def _mean_nll(target_log_probs: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    voxel_weights = _voxel_weights(target, weight)
    nll_sum = -(voxel_weights * target_log_probs).sum()
    nll_sum, weight_sum = sum_over_ranks(torch.stack([nll_sum, voxel_weights.sum()])).unbind()
    # torch would give 0/0 where every target has weight 0, e.g. an all-background batch under DistDW
    return nll_sum / torch.where(weight_sum > 0, weight_sum, 1.0)


def cross_entropy(log_probs: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum of w[y] * nll over sum of w[y] (torch's weighted mean: a common factor of w cancels); 0 where that sum is 0.

    log_probs: (B, K, *S). target: (B, *S) int64. weight: (K,), default 1.
    """
    weight = log_probs.new_ones(log_probs.shape[1]) if weight is None else weight
    return _mean_nll(_target_log_probs(log_probs, target), target, weight)


def _dice_loss(log_probs: Tensor, target_log_probs: Tensor, target: Tensor, weight: Tensor, smooth: float) -> Tensor:
    num_classes = log_probs.shape[1]
    annotated = (target != IGNORE).unsqueeze(1)  # (B, 1, *S)
    spatial = (0, *range(2, log_probs.dim()))
    hits = sum_per_class(target_log_probs.exp(), target, num_classes)  # (K,) TP
    mass = (log_probs.exp() * annotated).sum(spatial)  # (K,) TP + FP
    hits, mass, size = sum_over_ranks(torch.stack([hits, mass, count_classes(target, num_classes).float()])).unbind()
    dice = (2 * hits + smooth) / (mass + size + smooth + 1e-8)  # (K,)
    return -(weight * dice)[1:].mean()


def dice_loss(log_probs: Tensor, target: Tensor, weight: Tensor | None = None, *, smooth: float = 1.0) -> Tensor:
    """Minus the mean over foreground classes of w_k times the soft Dice of the whole batch; in [-max w, 0].

    A class absent from target and prediction scores 1 (smooth over smooth). log_probs: (B, K, *S). target: (B, *S) int64.
    weight: (K,), not normalised, default 1. Source: DHC's DC_and_CE_loss.
    """
    weight = log_probs.new_ones(log_probs.shape[1]) if weight is None else weight
    return _dice_loss(log_probs, _target_log_probs(log_probs, target), target, weight, smooth)


def dice_ce(log_probs: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """cross_entropy + dice_loss under the same class weights: the supervised loss of every CPS-type method."""
    weight = log_probs.new_ones(log_probs.shape[1]) if weight is None else weight
    target_log_probs = _target_log_probs(log_probs, target)
    ce = _mean_nll(target_log_probs, target, weight)
    return ce + _dice_loss(log_probs, target_log_probs, target, weight, smooth=1.0)


def half_ce_dice(log_probs: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """dice_ce / 2: the unsupervised loss as the DHC paper writes it."""
    return 0.5 * dice_ce(log_probs, target, weight)


def masked_cross_entropy(
    log_probs: Tensor, target: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Sum of mask * w[y] * nll over the number of all voxels whose target is not IGNORE, kept or not: a factor of w does not
    cancel, and a step that keeps few voxels takes a small step.

    log_probs: (B, K, *S). target: (B, *S) int64. mask: (B, *S) bool or float, default 1. weight: (K,), default 1.
    """
    weight = log_probs.new_ones(log_probs.shape[1]) if weight is None else weight
    voxel_weights = _voxel_weights(target, weight)
    kept = voxel_weights if mask is None else voxel_weights * mask
    nll_sum = -(kept * _target_log_probs(log_probs, target)).sum()
    nll_sum, voxels = sum_over_ranks(torch.stack([nll_sum, (target != IGNORE).sum().float()])).unbind()
    return nll_sum / voxels.clamp_min(1.0)


def soft_dice_loss(
    log_probs: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    smooth: float = 1e-5,
    include_background: bool = True,
) -> Tensor:
    """1 minus the mean over classes of (2 S(p t) + smooth) / (S(p^2) + S(t^2) + smooth), sums over the kept voxels of the
    whole batch; in [0, 1], and 0 where nothing is kept. The Dice of SSL4MIS and its descendants.

    A class that is kept nowhere but predicted scores about 0, a constant that teaches nothing. log_probs: (B, K, *S).
    target: (B, *S) int64. mask: (B, *S) bool or float, default 1.
    """
    num_classes = log_probs.shape[1]
    kept = (target != IGNORE).float() if mask is None else (target != IGNORE) * mask.float()  # (B, *S)
    spatial = (0, *range(2, log_probs.dim()))
    hits = sum_per_class(_target_log_probs(log_probs, target).exp() * kept, target, num_classes)
    mass = ((2 * log_probs).exp() * kept.unsqueeze(1)).sum(spatial)
    size = sum_per_class(kept, target, num_classes)
    hits, mass, size = sum_over_ranks(torch.stack([hits, mass, size])).unbind()
    dice = (2 * hits + smooth) / (mass + size + smooth)  # (K,)
    return 1 - (dice if include_background else dice[1:]).mean()


def ce_soft_dice(log_probs: Tensor, target: Tensor, *, smooth: float = 1e-5) -> Tensor:
    """(cross_entropy + soft_dice_loss) / 2: the supervised loss of SSL4MIS and its descendants."""
    return (cross_entropy(log_probs, target) + soft_dice_loss(log_probs, target, smooth=smooth)) / 2
