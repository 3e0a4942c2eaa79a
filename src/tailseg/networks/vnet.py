"""V-Net as semi-supervised segmentation uses it: no residuals, skips added; in 2D or 3D.

Paper: F. Milletari, N. Navab, S.-A. Ahmadi, 3DV 2016, https://arxiv.org/abs/1606.04797
This is the field's variant (UA-MT, DHC and their descendants), not the paper's network: 3x3x3 convolutions in place of
5x5x5, batch normalisation and ReLU in place of PReLU, no residual inside a stage, skips added in place of concatenated,
channel dropout after the deepest stage and before the last convolution. Width is 32 on Synapse and AMOS, 16 on LA and
Pancreas.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from tailseg.core import Init, SegNet, SegOutput
from tailseg.networks.layers import Layers, Norm, check_input, check_options, coarse_logits, init_convs

_SIZE_DIVISOR = 16
_ENCODER_CONVS = (1, 2, 3, 3, 3)  # per stage, finest first
_DECODER_CONVS = (1, 2, 3, 3)


class VNet(SegNet):
    """dropout: probability of dropping a channel, 0 for none. num_decoders: on one encoder, sharing no weight. pyramid: heads
    on the coarser stages of the decoder too; no paper gives the V-Net such heads, they are ours."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        spatial_dims: Literal[2, 3],
        *,
        width: int = 32,
        norm: Norm = "batch",
        dropout: float = 0.5,
        num_decoders: int = 1,
        pyramid: bool = False,
        init: Init = "default",
    ) -> None:
        check_options(width, dropout, num_decoders)
        layers = Layers(spatial_dims, norm)
        super().__init__(
            VNetEncoder(in_channels, layers, width, dropout),
            nn.ModuleList(VNetDecoder(num_classes, layers, width, dropout, pyramid) for _ in range(num_decoders)),
            size_divisor=_SIZE_DIVISOR,
            feature_channels=tuple(width * 2**i for i in range(len(_ENCODER_CONVS))),
            embedding_channels=width,
        )
        init_convs(self, init)


class VNetEncoder(nn.Module):
    """(B, C, *S) -> features (B, width * 2^i, *S / 2^i) for i = 0..4; dropout has touched the last one only."""

    def __init__(self, in_channels: int, layers: Layers, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = layers
        channels = [width * 2**i for i in range(len(_ENCODER_CONVS))]
        firsts = [in_channels, *channels[1:]]
        self.stages = nn.ModuleList(map(_stage, [layers] * len(channels), firsts, channels, _ENCODER_CONVS))
        self.downs = nn.ModuleList(
            nn.Sequential(layers.conv(c, 2 * c, 2, stride=2), *layers.norm_act(2 * c)) for c in channels[:-1]
        )
        self.dropout = layers.channel_dropout(dropout)

    def forward(self, x: Tensor) -> list[Tensor]:
        check_input(x, self.layers, _SIZE_DIVISOR)
        features = [self.stages[0](x)]
        for down, stage in zip(self.downs, self.stages[1:], strict=True):
            features.append(stage(down(features[-1])))
        features[-1] = self.dropout(features[-1])
        return features


class VNetDecoder(nn.Module):
    """Features -> logits. The embedding (B, width, *S) is what the last stage made; the head drops channels of it first."""

    def __init__(self, num_classes: int, layers: Layers, width: int, dropout: float, pyramid: bool) -> None:
        super().__init__()
        channels = [width * 2**i for i in range(len(_DECODER_CONVS))]
        self.ups = nn.ModuleList(nn.Sequential(layers.up_conv(2 * c, c), *layers.norm_act(c)) for c in channels)
        self.stages = nn.ModuleList(map(_stage, [layers] * len(channels), channels, channels, _DECODER_CONVS))
        self.head = nn.Sequential(layers.channel_dropout(dropout), layers.conv(width, num_classes, 1))
        self.coarse_heads = nn.ModuleList(layers.conv(c, num_classes, 1) for c in channels[1:] if pyramid)

    def forward(self, features: list[Tensor]) -> SegOutput:
        *skips, x = features
        made: list[Tensor] = []  # finest first
        for up, stage, skip in zip(reversed(self.ups), reversed(self.stages), reversed(skips), strict=True):
            x = stage(up(x) + skip)
            made.insert(0, x)
        return SegOutput(self.head(x), x, coarse_logits(self.coarse_heads, made))


def _stage(layers: Layers, c_in: int, c_out: int, convs: int) -> nn.Sequential:
    made: list[nn.Module] = []
    for i in range(convs):
        made += [layers.conv(c_out if i else c_in, c_out, 3), *layers.norm_act(c_out)]
    return nn.Sequential(*made)
