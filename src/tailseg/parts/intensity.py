"""Changes of intensity, batched, with given parameters: nothing is drawn here, and no device is waited for.

The same parameters give the same images on every device, to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

FIELD_TERMS = 4
"""Powers of a position in a bias field, 0 to 3: a cubic polynomial."""
_BLOCK = 16  # voxels blurred by one matrix; shorter ones are launched too often, longer ones are mostly zeros
_REACH = 5.0  # deviations; what a Gaussian weighs beyond is below 1e-6
_LEAST = 0.05  # sigma in voxels whose neighbours weigh 0 in float32, and which can still be divided by
_ODD = 0x45D9F3B  # T. Mueller's integer hash: of 27 bits, so that its product with 32 bits never overflows


def column(values: Tensor, like: Tensor) -> Tensor:
    """(B,) on the CPU -> (B, 1, 1, ...) float32 on the device of like (B, ...), which is not waited for."""
    return values.to(like.device, torch.float32, non_blocking=True).reshape(-1, *(1 for _ in like.shape[1:]))


def change_some(x: Tensor, rows: Tensor, change: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """x (B, ...) with change(x[rows], *parameters[rows]) at rows, in place.

    rows: (R,) on the CPU, where their number is known. parameters: (B, ...) each, also there.
    """
    if not len(rows):
        return x
    if len(rows) == len(x):
        changed = change(x, *parameters)
        return x if changed is x else x.copy_(changed)  # in the layout of x
    at = rows.to(x.device, non_blocking=True)
    return x.index_copy_(0, at, change(x.index_select(0, at), *(parameter[rows] for parameter in parameters)))


def unit_range(x: Tensor, *, per_channel: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, C, *S) brought to [0, 1] by the extremes of each image or of each of its channels; a constant becomes 0.

    Returns (unit, low, extent), float32: x is unit * extent + low. unit is a new tensor.
    """
    axes = tuple(range(2 if per_channel else 1, x.dim()))
    x = x.float()
    low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
    extent = high - low
    return (x - low).div_(torch.where(extent > 0, extent, 1.0)), low, extent


def bias_field_and_gamma(x: Tensor, coefficients: Tensor, gamma: Tensor) -> Tensor:
    """(x * exp(P))^gamma, in place. x: (B, C, *S), not negative.

    P: a polynomial of the position, from -1 to 1 along every axis, whose terms of an order above 3 are left out.
    coefficients: (B, 4, 4[, 4]) of the powers along each axis. gamma: (B,) above 0. Both on the CPU.
    """
    dims = x.dim() - 2
    order = sum(torch.arange(FIELD_TERMS).reshape(-1, *(1 for _ in range(dims - 1 - axis))) for axis in range(dims))
    # of the logarithm, so that the power costs a product: pow takes twice as long as log and exp together
    field = coefficients * (order < FIELD_TERMS) * gamma.reshape(-1, *(1 for _ in range(dims)))
    field = field.to(x.device, torch.float32, non_blocking=True)
    exponents = torch.arange(FIELD_TERMS, device=x.device)[:, None]
    for side in x.shape[2:]:  # a sum of products of powers: one axis at a time, each moving to the end
        at = torch.linspace(-1, 1, side, device=x.device)
        field = torch.einsum("bi...,is->b...s", field, at**exponents)
    return x.log_().mul_(column(gamma, x)).add_(field.unsqueeze(1)).exp_()


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of x (B, C, *S), rescaled at the border. sigma: (B, dims) voxels, on the CPU; up to .05 it does nothing.

    One axis after the other, a block of it by one product with the matrix of the weights that reach it: no slower than a
    convolution anywhere, much faster on a CPU, and the border costs nothing. Every product leaves the axis it blurred in
    front, so that after all of them the channels are last and the axes are in order again.
    """
    shape = x.shape
    for side, width in zip(reversed(shape[2:]), reversed(sigma.unbind(1)), strict=True):
        reach = math.ceil(_REACH * float(width.max()))
        at = torch.arange(side, device=x.device, dtype=x.dtype)
        steepness = (-0.5 / width.clamp_min(_LEAST).square()).float().to(x.device, non_blocking=True).reshape(-1, 1, 1)
        lines = x.reshape(shape[0], -1, side).transpose(1, 2)  # (B, side, the rest)
        x = x.new_empty(lines.shape)
        for start in range(0, side, _BLOCK):
            stop = start + _BLOCK
            around = slice(max(start - reach, 0), stop + reach)
            weights = ((at[start:stop, None] - at[around]).square() * steepness).exp_()
            weights /= weights.sum(2, keepdim=True)  # a constant stays one up to the border
            torch.bmm(weights, lines[:, around], out=x[:, start:stop])
    return x.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def gaussian_noise(seeds: Tensor, like: Tensor) -> Tensor:
    """(B, *) standard normal noise of the shape and on the device of like (B, *), the same on every device.

    seeds: (B,) int64 in [0, 2^32), on the CPU. A voxel's value is a hash of its seed and its place, and of no generator.
    """
    place = _hash(torch.arange(like[0].numel(), device=like.device))
    mixed = _hash(place ^ seeds.to(like.device, non_blocking=True)[:, None])
    # the upper 24 bits as the middles of 2^24 equal parts of (-1, 1), which float32 holds exactly
    uniform = (mixed >> 8).mul_(2).add_(1 - 2**24).float().mul_(2**-24)
    return uniform.erfinv_().mul_(math.sqrt(2)).reshape(like.shape)


def _hash(x: Tensor) -> Tensor:
    """32 bits of int64 -> 32 bits, one to one."""
    for _ in range(2):
        x = (x ^ (x >> 16)).mul_(_ODD).bitwise_and_(0xFFFFFFFF)
    return x ^ (x >> 16)
