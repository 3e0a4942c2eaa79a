from __future__ import annotations

import pytest
import torch
from torch import nn

from tailseg.networks.vnet import VNet


@pytest.mark.parametrize(
    ("num_classes", "width", "parameters"),
    [(14, 32, 37_778_126), (16, 32, 37_778_192), (2, 16, 9_448_866), (14, 16, 9_449_070)],
)
def test_parameters_are_as_many_as_in_the_published_networks(num_classes, width, parameters):
    with torch.device("meta"):
        net = VNet(1, num_classes, 3, width=width)
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_stages_have_1_2_3_3_3_and_3_3_2_1_convolutions():
    net = VNet(1, 2, 3, width=2)

    def convs(path: str) -> list[int]:
        return [sum(isinstance(m, nn.Conv3d) for m in stage.modules()) for stage in net.get_submodule(path).children()]

    assert convs("encoder.stages") == [1, 2, 3, 3, 3]
    assert convs("decoders.0.stages") == [1, 2, 3, 3]  # finest first
    assert sum(isinstance(m, nn.ConvTranspose3d) for m in net.modules()) == 4


def test_training_drops_whole_channels_of_the_deepest_feature_only():
    torch.manual_seed(0)
    net = VNet(1, 2, 3, width=4, dropout=0.5)
    features = net.encoder(torch.randn(2, 1, 32, 32, 32))
    dropped = [(f.flatten(2) == 0).all(2).float().mean().item() for f in features]
    assert dropped[:4] == [0, 0, 0, 0]
    assert 0.3 < dropped[4] < 0.7


def test_embedding_is_the_map_before_the_last_dropout():
    torch.manual_seed(0)
    net = VNet(1, 2, 2, width=64, dropout=0.5)
    embedding = net(torch.randn(2, 1, 32, 32)).embedding
    assert not (embedding.flatten(2) == 0).all(2).any()


def test_skips_are_added():
    net = VNet(1, 2, 2, width=2).eval()
    features = net.encoder(torch.randn(1, 1, 32, 32))
    seen = []
    net.get_submodule("decoders.0.stages.3").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net.decoders[0](features)
    torch.testing.assert_close(seen[0], net.get_submodule("decoders.0.ups.3")(features[4]) + features[3])
