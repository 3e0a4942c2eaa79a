"""Sums over the processes of a distributed run; with one process they return what they were given."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # every rank holds the same loss of the total, so each rank's share of the gradient is the sum of all of them;
        # DDP then averages parameter gradients over the ranks, which undoes that factor
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this process is, from 0."""
    return dist.get_rank() if num_ranks() > 1 else 0


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of x over all ranks, equal on each; gradients flow back to every rank's x."""
    if num_ranks() == 1:
        return x
    return _SumOverRanks.apply(x)  # pyright: ignore[reportReturnType] - apply is untyped


@torch.no_grad()
def gather_over_ranks(x: Tensor) -> Tensor:
    """All ranks' x, of one shape on all of them, one after the other along dim 0; equal on each rank, without gradient."""
    if num_ranks() == 1:
        return x.detach()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(num_ranks())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
