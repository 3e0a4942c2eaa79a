"""What the networks share: layers in 2D or 3D, initial weights, checks of options and input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tailseg.core import Init
from tailseg.networks.batch_norm import BatchNorm2d, BatchNorm3d

Norm = Literal["batch", "instance"]


@dataclass(frozen=True)
class Layers:
    """Makes the layers of one network. negative_slope: of its ReLU; 0 is the plain one. affine: whether instance
    normalisation learns a scale and a shift; batch normalisation always does."""

    spatial_dims: Literal[2, 3]
    norm: Norm
    negative_slope: float = 0.0
    affine: bool = True

    def __post_init__(self) -> None:
        if self.spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims is {self.spatial_dims!r}; a network has 2 or 3.")
        if self.norm not in get_args(Norm):
            raise ValueError(f"network.norm is {self.norm!r}; use one of: {', '.join(get_args(Norm))}.")

    def conv(self, c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Module:
        """Odd kernels keep the size; kernel 2 with stride 2 halves it."""
        make = Conv3d if self.spatial_dims == 3 else nn.Conv2d
        return make(c_in, c_out, kernel, stride, padding=(kernel - 1) // 2)

    def up_conv(self, c_in: int, c_out: int) -> nn.Module:
        """A transposed convolution that doubles the size."""
        make = ConvTranspose3d if self.spatial_dims == 3 else ConvTranspose2d
        return make(c_in, c_out, 2, stride=2)

    def upsample(self, *, align_corners: bool) -> nn.Module:
        """Doubles the size by linear interpolation. align_corners: keep the corner voxels in place, else the image's edges."""
        mode = "trilinear" if self.spatial_dims == 3 else "bilinear"
        return nn.Upsample(scale_factor=2, mode=mode, align_corners=align_corners)

    def max_pool(self) -> nn.Module:
        return nn.MaxPool3d(2) if self.spatial_dims == 3 else nn.MaxPool2d(2)

    def channel_dropout(self, p: float) -> nn.Module:
        return nn.Dropout3d(p) if self.spatial_dims == 3 else nn.Dropout2d(p)

    def norm_act(self, channels: int) -> list[nn.Module]:
        """Normalisation and activation, to follow a convolution."""
        # autograd keeps the input of a normalisation and the output of an activation: the latter may work in place
        act = nn.LeakyReLU(self.negative_slope, inplace=True) if self.negative_slope else nn.ReLU(inplace=True)
        return [self._norm(channels), act]

    def _norm(self, channels: int) -> nn.Module:
        if self.norm == "batch":
            return BatchNorm3d(channels) if self.spatial_dims == 3 else BatchNorm2d(channels)
        make = nn.InstanceNorm3d if self.spatial_dims == 3 else nn.InstanceNorm2d
        return make(channels, affine=self.affine)


class Conv3d(nn.Conv3d):
    """nn.Conv3d with a gradient that can be trusted in bfloat16 on a CPU, and a fast 1x1x1 kernel on one of its threads.

    In bfloat16 oneDNN's weight gradient of a 3x3x3 convolution over an input two slices deep takes in uninitialised memory
    (seen with torch 2.13.0 on an AVX-512 BF16 processor), so that a run turns NaN or, worse, silently wrong. The deepest
    stage of a 32 voxel deep patch is such an input; it is cheap, so it runs in float32.

    On one thread torch leaves oneDNN for a 1x1x1 kernel in float32 and takes several times as long as the matrix
    product that it is.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.kernel_size[0] == 1 and self.bias is not None and _on_one_thread_in_float32(input):
            weight = self.weight.flatten(1).expand(len(input), -1, -1)  # image by image, whatever else is in the batch
            return torch.baddbmm(self.bias[:, None], weight, input.flatten(2)).unflatten(2, input.shape[2:])
        if input.device.type != "cpu" or input.shape[2] != 2 or self.kernel_size[0] != 3:
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float())


class ConvTranspose2d(nn.ConvTranspose2d):
    """nn.ConvTranspose2d for kernel = stride = 2, whose gradients take half the time on a CPU."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _doubled(self, input) if _learns_on_a_cpu(input) else super().forward(input, output_size)


class ConvTranspose3d(nn.ConvTranspose3d):
    """nn.ConvTranspose3d for kernel = stride = 2, whose gradients take half the time on a CPU."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _doubled(self, input) if _learns_on_a_cpu(input) else super().forward(input, output_size)


def _learns_on_a_cpu(x: Tensor) -> bool:
    """Whether gradients will be asked for, x lies in channels_last memory, and nobody traces the network."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and x.stride(1) == 1 and not torch.compiler.is_compiling()


def _doubled(layer: nn.ConvTranspose2d | nn.ConvTranspose3d, x: Tensor) -> Tensor:
    """The transposed convolution as a product: every voxel of x (B, C, *S) makes a block of 2^dims voxels of its own."""
    assert layer.bias is not None
    channels, *kernel = layer.weight.shape[1:]
    weight, bias = layer.weight.movedim(1, -1).flatten(1), layer.bias.repeat(2 ** len(kernel))
    voxels = x.movedim(1, -1).flatten(1, -2)  # a view
    made = torch.baddbmm(bias, voxels, weight.expand(len(x), -1, -1))  # image by image, as in Conv3d
    blocks = made.unflatten(1, x.shape[2:]).unflatten(-1, (*kernel, channels))  # (B, *S, *kernel, channels)
    dims = len(kernel)
    beside = [axis for s in range(dims) for axis in (1 + s, 1 + dims + s)]  # each axis of S and that of its block
    return blocks.permute(0, *beside, -1).reshape(len(x), *(2 * side for side in x.shape[2:]), channels).movedim(-1, 1)


def _on_one_thread_in_float32(x: Tensor) -> bool:
    """Of a CPU; and nobody traces the network, who would want a convolution to be one."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.get_num_threads() == 1
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class Dropout(nn.Dropout):
    """nn.Dropout with a cheaper mask on a CPU, where torch draws one Bernoulli number after the other.

    There p is cut to a multiple of 2^-16, so that one draw of 64 bits decides on four elements. It saves 7 % of the CPU
    time of a U-Net's step, and more of the wall time: neither torch's draws nor these use a second thread.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or not self.training or not 0 < self.p < 1:
            return super().forward(input)
        dropped = int(self.p * 2**16)  # of the 2^16 values of a draw
        draws = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        dense = torch.empty_like(input)  # only its strides: the draws take the layout of the input
        keep = draws[: input.numel()].as_strided(input.shape, dense.stride()) >= dropped - 2**15
        return input * (keep.to(input.dtype) / (1 - dropped / 2**16))


def init_convs(net: nn.Module, init: Init) -> None:
    """Draw the weights of all convolutions; transposed ones, biases and normalisations keep torch's start.

    kaiming: normal, fan_in, gain sqrt(2). xavier: normal. default: leaves everything as torch made it.
    """
    if init == "default":
        return
    draw = {"kaiming": nn.init.kaiming_normal_, "xavier": nn.init.xavier_normal_}.get(init)
    if draw is None:
        raise ValueError(f"init is {init!r}; use one of: {', '.join(get_args(Init))}.")
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            draw(module.weight)


def check_options(width: int, dropout: float, num_decoders: int) -> None:
    """Raises ValueError for what no network can be built of."""
    if width < 1:
        raise ValueError(f"network.width is {width}; it counts the channels of the finest stage and starts at 1.")
    if not 0 <= dropout < 1:
        raise ValueError(f"network.dropout is {dropout}; it is a probability below 1, and 0 switches it off.")
    if num_decoders < 1:
        raise ValueError(f"num_decoders is {num_decoders}; a network needs at least one decoder.")


def check_input(x: Tensor, layers: Layers, size_divisor: int) -> None:
    """Raises ValueError unless x is (B, C, *S) with every side of S a multiple of size_divisor, and its deepest features have
    more than one voxel where each image is normalised by itself."""
    sides, spatial_dims = tuple(x.shape[2:]), layers.spatial_dims
    if len(sides) != spatial_dims:  # torch would take (C, D, H, W) for one image without its batch axis
        raise ValueError(f"a {spatial_dims}D network takes (B, C, *S) with {spatial_dims} sides, got {tuple(x.shape)}.")
    if any(side % size_divisor for side in sides):
        near = tuple(max(1, math.ceil(side / size_divisor)) * size_divisor for side in sides)
        raise ValueError(f"patch_size {sides} must have sides that are multiples of {size_divisor}; try {near}.")
    if layers.norm == "instance" and all(side == size_divisor for side in sides):
        near = (*sides[:-1], 2 * size_divisor)
        raise ValueError(
            f"patch_size {sides} leaves one voxel at the deepest stage, which instance normalisation makes 0 whatever it "
            f"was; try {near}."
        )


def coarse_logits(heads: nn.ModuleList, features: list[Tensor]) -> tuple[Tensor, ...]:
    """What the heads make of a decoder's features after its finest; () of a decoder without such heads.

    features: finest first, as many as heads and one more where there are heads.
    """
    return tuple(head(coarse) for head, coarse in zip(heads, features[1:], strict=True)) if heads else ()
