"""Images cut into a grid of equal cubes (squares in 2D), exchanged between samples, and put together again.

The cubes of one sample are listed with the last axis of the grid running fastest. Source: MagicNet, CVPR 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cut_cubes(x: Tensor, per_axis: int) -> Tensor:
    """(B, C, *S) -> (B, N^d, C, *S / N) for N = per_axis, which divides every side of S."""
    dims = x.dim() - 2
    split = [part for side in x.shape[2:] for part in (per_axis, side // per_axis)]
    grid = x.reshape(*x.shape[:2], *split)  # (B, C, N, S_0 / N, N, S_1 / N, ...)
    return grid.permute(0, *range(2, 2 + 2 * dims, 2), 1, *range(3, 3 + 2 * dims, 2)).flatten(1, dims)


def join_cubes(cubes: Tensor, per_axis: int, *, transposed: bool = False) -> Tensor:
    """(B, N^d, C, *S / N) -> (B, C, *S), undoing cut_cubes. transposed: the grid's axes are taken in reverse order."""
    dims, sides = cubes.dim() - 3, cubes.shape[3:]
    grid = cubes.unflatten(1, (per_axis,) * dims)  # (B, N, N, ..., C, S_0 / N, S_1 / N, ...)
    axes = reversed(range(1, 1 + dims)) if transposed else range(1, 1 + dims)
    pairs = [axis for pair in zip(axes, range(2 + dims, 2 + 2 * dims), strict=True) for axis in pair]
    return grid.permute(0, 1 + dims, *pairs).reshape(len(cubes), cubes.shape[2], *(per_axis * side for side in sides))


def draw_orders(cubes: Tensor) -> Tensor:
    """(B, P) int64: for each of P places its own permutation of the samples 0..B-1; argsort(0) is its inverse."""
    return torch.rand(cubes.shape[:2], device=cubes.device).argsort(0)


def exchange(cubes: Tensor, order: Tensor) -> Tensor:
    """out[b, p] = cubes[order[b, p], p]: cubes change the sample and keep their place. cubes: (B, P, ...). order: (B, P)."""
    places = cubes.shape[1]
    rows = order * places + torch.arange(places, device=cubes.device)
    return cubes.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, order.shape)
