from __future__ import annotations

import pytest
import torch
from torch import nn

from tailseg.networks.urpc_unet import URPCUNet


@pytest.mark.parametrize(("num_classes", "parameters"), [(14, 5_887_432), (16, 5_887_920)])
def test_parameters_are_as_many_as_in_the_published_network(num_classes, parameters):
    with torch.device("meta"):
        net = URPCUNet(1, num_classes, 3, pyramid=True)
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_normalisation_has_no_weights_and_no_running_statistics():
    net = URPCUNet(1, 2, 3, width=2)
    assert list(net.buffers()) == []
    norms = [m for m in net.modules() if isinstance(m, nn.InstanceNorm3d)]
    assert len(norms) == 18
    assert not any(m.affine for m in norms)
    assert not [m for m in net.modules() if isinstance(m, nn.LeakyReLU)]


def test_dropout_follows_the_stages_of_the_decoder_and_grows_with_depth():
    net = URPCUNet(1, 2, 3, width=2)
    drops = [net.get_submodule(f"decoders.0.{name}") for name in ("head.0", "drops.1", "drops.2", "drops.3")]
    assert [type(m) for m in drops] == [nn.Dropout3d] * 4
    assert [m.p for m in drops] == pytest.approx([0.1, 0.2, 0.3, 0.5])
    assert not [m for m in net.encoder.modules() if isinstance(m, nn.Dropout | nn.Dropout3d)]


def test_heads_are_single_voxel_convolutions():
    net = URPCUNet(1, 5, 3, width=2, pyramid=True)
    heads = [net.get_submodule("decoders.0.head.1"), *net.get_submodule("decoders.0.coarse_heads").children()]
    assert [(m.in_channels, m.out_channels, m.kernel_size) for m in heads] == [
        (channels, 5, (1, 1, 1)) for channels in (2, 4, 8, 16)
    ]


def test_what_a_stage_drops_is_dropped_for_its_head_and_for_the_stage_above():
    torch.manual_seed(0)
    net = URPCUNet(1, 2, 2, width=8, dropout=0.9, pyramid=True)
    seen = {}
    for name in ("coarse_heads.2", "blocks.2"):
        net.decoders[0].get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0])
        )
    net(torch.randn(2, 1, 32, 32))
    to_head, to_block = seen["coarse_heads.2"], seen["blocks.2"][:, 32:]
    dropped = (to_head == 0).flatten(2).all(2)
    assert 0.7 < dropped.float().mean() < 1
    assert torch.equal((to_block == 0).flatten(2).all(2), dropped)


@pytest.mark.parametrize(("spatial_dims", "mode"), [(2, "bilinear"), (3, "trilinear")])
def test_skips_are_concatenated_before_what_is_interpolated_from_below(spatial_dims, mode):
    net = URPCUNet(1, 2, spatial_dims, width=2).eval()
    features = net.encoder(torch.randn(1, 1, *[32] * spatial_dims))
    seen = []
    net.get_submodule("decoders.0.blocks.3").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net.decoders[0](features)
    below = nn.functional.interpolate(features[4], scale_factor=2, mode=mode, align_corners=False)
    torch.testing.assert_close(seen[0], torch.cat([features[3], below], 1))
