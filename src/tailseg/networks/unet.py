"""U-Net as semi-supervised segmentation uses it on ACDC and ISIC: batch norm, leaky ReLU, bilinear upsampling.

Paper: O. Ronneberger, P. Fischer, T. Brox, MICCAI 2015, https://arxiv.org/abs/1505.04597
This is the field's variant (SSL4MIS and its descendants), not the paper's network: a quarter of the channels, padded
convolutions, batch normalisation, dropout inside the encoder's blocks that grows with depth, a 1x1 convolution and
bilinear upsampling in place of the up-convolution, a 3x3 head. In 3D all of it has one axis more.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from tailseg.core import Init, SegNet, SegOutput
from tailseg.networks.layers import Dropout, Layers, Norm, check_input, check_options, coarse_logits, init_convs

_SIZE_DIVISOR = 16
_DROPOUT_SHARES = (0.1, 0.2, 0.4, 0.6, 1.0)  # of the deepest block's dropout, finest first; .05 to .5 at the default


class UNet(SegNet):
    """dropout: of the deepest block, 0 for none. num_decoders: on one encoder, sharing no weight. pyramid: heads on
    the coarser stages of the decoder too."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        spatial_dims: Literal[2, 3],
        *,
        width: int = 16,
        norm: Norm = "batch",
        dropout: float = 0.5,
        num_decoders: int = 1,
        pyramid: bool = False,
        init: Init = "default",
    ) -> None:
        check_options(width, dropout, num_decoders)
        layers = Layers(spatial_dims, norm, negative_slope=0.01)
        super().__init__(
            UNetEncoder(in_channels, layers, width, dropout),
            nn.ModuleList(UNetDecoder(num_classes, layers, width, pyramid) for _ in range(num_decoders)),
            size_divisor=_SIZE_DIVISOR,
            feature_channels=tuple(width * 2**i for i in range(len(_DROPOUT_SHARES))),
            embedding_channels=width,
        )
        init_convs(self, init)


class UNetEncoder(nn.Module):
    """(B, C, *S) -> features (B, width * 2^i, *S / 2^i) for i = 0..4."""

    def __init__(self, in_channels: int, layers: Layers, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = layers
        channels = [in_channels, *(width * 2**i for i in range(len(_DROPOUT_SHARES)))]
        self.blocks = nn.ModuleList(
            double_conv(layers, channels[i], channels[i + 1], dropout * share)
            for i, share in enumerate(_DROPOUT_SHARES)
        )
        self.pool = layers.max_pool()

    def forward(self, x: Tensor) -> list[Tensor]:
        check_input(x, self.layers, _SIZE_DIVISOR)
        features = [self.blocks[0](x)]
        for block in self.blocks[1:]:
            features.append(block(self.pool(features[-1])))
        return features


class UNetDecoder(nn.Module):
    """Features -> logits. The embedding (B, width, *S) is what the last block made, before the head."""

    def __init__(self, num_classes: int, layers: Layers, width: int, pyramid: bool) -> None:
        super().__init__()
        channels = [width * 2**i for i in range(len(_DROPOUT_SHARES) - 1)]
        # 1x1 first, so that the interpolation moves half as many channels
        self.ups = nn.ModuleList(
            nn.Sequential(layers.conv(2 * c, c, 1), layers.upsample(align_corners=True)) for c in channels
        )
        self.blocks = nn.ModuleList(double_conv(layers, 2 * c, c) for c in channels)
        self.head = layers.conv(width, num_classes, 3)
        self.coarse_heads = nn.ModuleList(layers.conv(c, num_classes, 3) for c in channels[1:] if pyramid)

    def forward(self, features: list[Tensor]) -> SegOutput:
        *skips, x = features
        made: list[Tensor] = []  # finest first
        for up, block, skip in zip(reversed(self.ups), reversed(self.blocks), reversed(skips), strict=True):
            x = block(torch.cat([skip, up(x)], 1))
            made.insert(0, x)
        return SegOutput(self.head(x), x, coarse_logits(self.coarse_heads, made))


def double_conv(layers: Layers, c_in: int, c_out: int, dropout: float = 0.0) -> nn.Sequential:
    """Two 3x3 convolutions with normalisation and activation, and dropout between them."""
    between = [Dropout(dropout)] if dropout else []
    return nn.Sequential(
        layers.conv(c_in, c_out, 3),
        *layers.norm_act(c_out),
        *between,
        layers.conv(c_out, c_out, 3),
        *layers.norm_act(c_out),
    )
