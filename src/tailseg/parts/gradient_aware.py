"""GALoss: cross-entropy and Dice whose gradients are not biased towards frequent or present classes.

Both leave IGNORE voxels out, compute in float32, and take sums, presence of classes and the largest losses over the batch of
all ranks. Class weights multiply the share of each class; without them these are the published losses.
Source: W. Qi, J. Wu, S. C. Chan, "Gradient-Aware for Class-Imbalanced Semi-supervised Medical Image Segmentation",
ECCV 2024, https://doi.org/10.1007/978-3-031-73001-6_27; GALoss.py of github.com/cicailalala/GALoss (commit dff0493).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tailseg.core import IGNORE
from tailseg.parts.counts import count_classes, sum_per_class
from tailseg.parts.ranks import gather_over_ranks, num_ranks, rank, sum_over_ranks

EPS = 1e-10  # of the authors' Dice


def _target_log_probs(log_probs: Tensor, target: Tensor) -> Tensor:
    """(B, *S) log-probability of the target class; IGNORE voxels read some class."""
    return log_probs.gather(1, target.clamp(max=log_probs.shape[1] - 1).unsqueeze(1)).squeeze(1)


def _hardest(losses: Tensor, target: Tensor, percent: float) -> Tensor:
    """target (B, *S) with IGNORE wherever the loss (B, *S) is not among the largest percent of the batch of all ranks.

    Of equal losses at the border some are kept. No host sync: how many voxels are annotated is known on the device alone.
    """
    annotated = target != IGNORE
    wanted = sum_over_ranks(annotated.sum()) * round(percent * 1000) // 100_000  # int(N k / 100)
    flat = torch.where(annotated, losses.detach(), -1.0).flatten()
    ranks = num_ranks()
    most = min(int(ranks * len(flat) * percent / 100), len(flat))  # candidates of this rank
    largest, where = flat.topk(most)  # descending
    place = torch.arange(ranks * most, device=flat.device)
    if ranks > 1:
        order = gather_over_ranks(largest).argsort(descending=True, stable=True)
        place = torch.empty_like(order).scatter_(0, order, place)  # of each candidate in the order of all
    place = place.view(ranks, most)[rank()]
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(0, where, place < wanted)
    return target.masked_fill(~kept.view_as(target), IGNORE)


def ga_ce(
    log_probs: Tensor, target: Tensor, weight: Tensor | None = None, *, percent: float = 100.0, gamma: float = 0.5
) -> Tensor:
    """Sum over classes of S_c / (N_c^(1 - gamma) N^gamma): S_c is the negative log-likelihood summed over the N_c kept voxels
    of the class, N counts all kept ones; the largest `percent` of the losses of the whole batch are kept.

    gamma 1 is the mean over the kept voxels, gamma 0 the sum of the means over each class; in between rare classes get more
    than their share of voxels. Not bounded by the cross-entropy: about sqrt(K) times it with gamma 0.5 and K classes equally
    frequent. log_probs: (B, K, *S). target: (B, *S) int64. weight: (K,), default 1.
    """
    num_classes = log_probs.shape[1]
    losses = -_target_log_probs(log_probs, target)  # (B, *S)
    kept = target if percent >= 100 else _hardest(losses, target, percent)
    sums = sum_per_class(losses, kept, num_classes)
    sums, counts = sum_over_ranks(torch.stack([sums, count_classes(kept, num_classes).float()])).unbind()
    # the sum of an absent class is 0; the power of a count of 0 would be too
    shares = sums / (counts.clamp_min(1) ** (1 - gamma) * counts.sum().clamp_min(1) ** gamma)  # (K,)
    return (shares if weight is None else weight * shares).sum()


def ga_dice(log_probs: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over all K classes of 1 - 2 S(p t) / (S(p^2) + S(t^2)) where the class is in the batch, and elsewhere of
    S(sg(p / N) p), N voxels: a false positive of an absent class is pushed down the harder the surer it is.

    Plain Dice gives an absent class a constant without gradient. log_probs: (B, K, *S). target: (B, *S) int64. weight: (K,),
    default 1.
    """
    num_classes = log_probs.shape[1]
    annotated = (target != IGNORE).unsqueeze(1)  # (B, 1, *S)
    spatial = (0, *range(2, log_probs.dim()))
    hits = sum_per_class(_target_log_probs(log_probs, target).exp(), target, num_classes)  # (K,) S(p t)
    mass = ((2 * log_probs).exp() * annotated).sum(spatial)  # (K,) S(p^2)
    size = count_classes(target, num_classes).float()  # (K,) S(t^2)
    hits, mass, size = sum_over_ranks(torch.stack([hits, mass, size])).unbind()
    present = 1 - (2 * hits + EPS) / (mass + size + EPS)
    # the value of S(sg(p) p) and its gradient p, which is half that of S(p^2)
    absent = (mass + mass.detach()) / 2 / size.sum().clamp_min(1)
    per_class = torch.where(size > 0, present, absent)
    return (per_class if weight is None else weight * per_class).mean()


def ga_loss(log_probs: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """ga_ce over the hardest tenth of the voxels + ga_dice: the supervised loss of GA-CPS."""
    return ga_ce(log_probs, target, weight, percent=10.0) + ga_dice(log_probs, target, weight)
