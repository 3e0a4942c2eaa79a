"""U-Net of URPC: instance norm, trilinear upsampling, channel dropout in the decoder, heads on its coarser stages.

Paper: X. Luo et al., MICCAI 2021, https://arxiv.org/abs/2012.07042
It is the network `unet_3D_ds` of the authors' code and of github.com/xmed-lab/DHC (models/unet_ds.py), whose flag "batchnorm"
builds instance normalisation. In 2D all of it has one axis less.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from tailseg.core import Init, SegNet, SegOutput
from tailseg.networks.layers import Layers, check_options, coarse_logits, init_convs
from tailseg.networks.unet import UNetEncoder, double_conv

_DROPOUT_SHARES = (0.2, 0.4, 0.6, 1.0)  # of the deepest stage's dropout, finest first; .1 to .5 at the default


class URPCUNet(SegNet):
    """dropout: of the decoder's deepest stage, 0 for none. num_decoders: on one encoder, sharing no weight. pyramid: heads on
    the coarser stages of the decoder too."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        spatial_dims: Literal[2, 3],
        *,
        width: int = 16,
        dropout: float = 0.5,
        num_decoders: int = 1,
        pyramid: bool = False,
        init: Init = "default",
    ) -> None:
        check_options(width, dropout, num_decoders)
        layers = Layers(spatial_dims, "instance", affine=False)
        super().__init__(
            UNetEncoder(in_channels, layers, width, dropout=0.0),
            nn.ModuleList(URPCUNetDecoder(num_classes, layers, width, dropout, pyramid) for _ in range(num_decoders)),
            size_divisor=16,
            feature_channels=tuple(width * 2**i for i in range(5)),
            embedding_channels=width,
        )
        init_convs(self, init)


class URPCUNetDecoder(nn.Module):
    """Features -> logits. The embedding (B, width, *S) is what the last stage made; the head drops channels of it first."""

    def __init__(self, num_classes: int, layers: Layers, width: int, dropout: float, pyramid: bool) -> None:
        super().__init__()
        channels = [width * 2**i for i in range(len(_DROPOUT_SHARES))]
        drops = [layers.channel_dropout(dropout * share) for share in _DROPOUT_SHARES]
        self.up = layers.upsample(align_corners=False)
        self.blocks = nn.ModuleList(double_conv(layers, 3 * c, c) for c in channels)
        self.drops = nn.ModuleList([nn.Identity(), *drops[1:]])
        self.head = nn.Sequential(drops[0], layers.conv(width, num_classes, 1))
        self.coarse_heads = nn.ModuleList(layers.conv(c, num_classes, 1) for c in channels[1:] if pyramid)

    def forward(self, features: list[Tensor]) -> SegOutput:
        *skips, x = features
        made: list[Tensor] = []  # finest first
        for block, drop, skip in zip(reversed(self.blocks), reversed(self.drops), reversed(skips), strict=True):
            x = drop(block(torch.cat([skip, self.up(x)], 1)))
            made.insert(0, x)
        return SegOutput(self.head(x), x, coarse_logits(self.coarse_heads, made))
