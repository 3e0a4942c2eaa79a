from __future__ import annotations

import pytest
import torch
from torch import nn

from tailseg.networks.unet import UNet


@pytest.mark.parametrize(("in_channels", "num_classes", "parameters"), [(1, 4, 1_813_764), (3, 2, 1_813_762)])
def test_parameters_are_as_many_as_in_the_published_networks(in_channels, num_classes, parameters):
    with torch.device("meta"):
        net = UNet(in_channels, num_classes, 2)
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_dropout_grows_in_the_encoder_and_is_absent_from_the_decoder():
    net = UNet(1, 4, 2)
    assert [m.p for m in net.encoder.modules() if isinstance(m, nn.Dropout)] == pytest.approx(
        [0.05, 0.1, 0.2, 0.3, 0.5]
    )
    assert not [m for m in net.decoders.modules() if isinstance(m, nn.Dropout)]


def test_activations_leak_a_hundredth():
    slopes = {m.negative_slope for m in UNet(1, 4, 2).modules() if isinstance(m, nn.LeakyReLU)}
    assert slopes == {0.01}


@pytest.mark.parametrize(("spatial_dims", "mode"), [(2, "bilinear"), (3, "trilinear")])
def test_upsampling_is_a_1x1_convolution_then_interpolation_with_aligned_corners(spatial_dims, mode):
    torch.manual_seed(0)
    up = UNet(1, 4, spatial_dims, width=2).get_submodule("decoders.0.ups.0")
    conv = up.get_submodule("0")
    x = torch.randn(1, 4, *[4] * spatial_dims)
    expected = nn.functional.interpolate(conv(x), scale_factor=2, mode=mode, align_corners=True)
    torch.testing.assert_close(up(x), expected)
    assert conv.kernel_size == (1,) * spatial_dims


def test_skips_are_concatenated_before_what_comes_from_below():
    net = UNet(1, 2, 2, width=2).eval()
    features = net.encoder(torch.randn(1, 1, 32, 32))
    seen = []
    net.get_submodule("decoders.0.blocks.3").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net.decoders[0](features)
    below = net.get_submodule("decoders.0.ups.3")(features[4])
    torch.testing.assert_close(seen[0], torch.cat([features[3], below], 1))
