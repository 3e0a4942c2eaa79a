"""Batch normalisation whose statistics are exact in channels_last memory on a CPU.

There torch (seen with 2.13.0) adds up each channel in float32, one voxel after the other. Over four patches of 112x112x80 the
variance of one thread is then wrong by 0.4 %, and the running one that predictions go by with it; more threads share the error.
Here torch does the same over pieces that stay in the cache, and what it finds of them is put together in float64: the error is
below 1e-6, and the time the same. Backward is torch's own, whose sums are of both signs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_VOXELS = 2**12  # of a piece: as many as float32 adds up well
_ELEMENTS = 2**17  # of a piece: half a megabyte of float32


class BatchNorm2d(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return _forward(self, input) if _adds_up_badly(self, input) else super().forward(input)


class BatchNorm3d(nn.BatchNorm3d):
    def forward(self, input: Tensor) -> Tensor:
        return _forward(self, input) if _adds_up_badly(self, input) else super().forward(input)


def _adds_up_badly(norm: nn.BatchNorm2d | nn.BatchNorm3d, x: Tensor) -> bool:
    """Whether torch would add up more voxels of x, one after the other, than a piece holds."""
    channels_last = torch.channels_last_3d if x.dim() == 5 else torch.channels_last
    return (
        norm.training
        and norm.affine
        and norm.momentum is not None
        and x.device.type == "cpu"
        and x.numel() > x.shape[1] * _VOXELS
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=channels_last)
        and not torch.compiler.is_compiling()
    )


def _forward(norm: nn.BatchNorm2d | nn.BatchNorm3d, x: Tensor) -> Tensor:
    mean, variance = batch_statistics(x.detach())
    if norm.track_running_stats:
        assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
        assert norm.momentum is not None
        voxels = x.numel() // x.shape[1]
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
        norm.running_var.lerp_((variance * voxels / (voxels - 1)).to(norm.running_var.dtype), norm.momentum)
    return _Normalise.apply(x, norm.weight, norm.bias, mean.float(), variance.float(), norm.eps)  # pyright: ignore[reportReturnType]


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) mean and (C,) biased variance of x (B, C, *S) over B and *S, float64. x: in channels_last memory."""
    voxels = x.movedim(1, -1).flatten(0, -2)  # (B * S0 * ..., C), a view
    pieces = voxels.split(max(min(_VOXELS, _ELEMENTS // x.shape[1]), 1))
    # beside running statistics in float32 torch adds up in float32 whatever it is given; with momentum 0 they stay
    dtype = torch.promote_types(x.dtype, torch.float32)
    unused = torch.zeros(x.shape[1], dtype=dtype), torch.zeros(x.shape[1], dtype=dtype)
    found = [torch.batch_norm_update_stats(piece, *unused, 0.0) for piece in pieces]
    means, variances = (torch.stack(each).double() for each in zip(*found, strict=True))  # (pieces, C)
    share = torch.tensor([len(piece) for piece in pieces], dtype=torch.float64).unsqueeze(1) / len(voxels)
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0)


class _Normalise(torch.autograd.Function):
    """Training-mode batch normalisation with given statistics of the batch; their gradient is part of that of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        ctx.eps = eps
        return torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, mean, inverse_std = ctx.saved_tensors
        x_grad, weight_grad, bias_grad = torch.ops.aten.native_batch_norm_backward(
            grads[0], x, weight, None, None, mean, inverse_std, True, ctx.eps, ctx.needs_input_grad[:3]
        )
        return x_grad, weight_grad, bias_grad, None, None, None
