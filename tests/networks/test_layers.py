"""What holds for every network of the package."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import nn

from tailseg.core import Init, SegNet
from tailseg.networks.layers import Conv3d, Dropout, Layers
from tailseg.networks.unet import UNet
from tailseg.networks.urpc_unet import URPCUNet
from tailseg.networks.vnet import VNet

every = pytest.mark.parametrize("network", [VNet, UNet, URPCUNet])
every_norm = pytest.mark.parametrize(
    ("network", "options"),
    [*((network, {"norm": norm}) for network in (VNet, UNet) for norm in ("batch", "instance")), (URPCUNet, {})],
)
dims = pytest.mark.parametrize("spatial_dims", [2, 3])


def small(network: type[VNet | UNet | URPCUNet], spatial_dims: Literal[2, 3] = 2, **options: Any) -> SegNet:
    torch.manual_seed(0)
    return network(1, 3, spatial_dims, width=4, **options)


def image(spatial_dims: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 1, *(32, 48, 32)[:spatial_dims], generator=generator)


@every_norm
@dims
def test_shapes_of_logits_embedding_and_features(network, spatial_dims, options):
    net, x = small(network, spatial_dims, **options), image(spatial_dims)
    features = net.encoder(x)
    out = net(x)
    sides = x.shape[2:]
    assert [f.shape for f in features] == [(2, 4 * 2**i, *(s // 2**i for s in sides)) for i in range(5)]
    assert out.logits.shape == (2, 3, *sides)
    assert out.embedding.shape == (2, 4, *sides)
    assert out.pyramid == ()
    assert net.size_divisor == 16
    assert net.feature_channels == (4, 8, 16, 32, 64)
    assert net.embedding_channels == 4


@every
@dims
def test_every_parameter_learns_from_the_logits_alone(network, spatial_dims):
    net = small(network, spatial_dims)
    net(image(spatial_dims)).logits.square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


@every
@dims
def test_head_makes_the_logits_of_the_embedding_when_nothing_is_dropped(network, spatial_dims):
    net = small(network, spatial_dims).eval()
    out = net(image(spatial_dims))
    torch.testing.assert_close(net.head(out.embedding), out.logits)


@every
@dims
def test_a_pyramid_has_logits_at_a_half_a_quarter_and_an_eighth_of_the_size(network, spatial_dims):
    net, x = small(network, spatial_dims, pyramid=True), image(spatial_dims)
    out = net(x)
    sides = x.shape[2:]
    assert [coarse.shape for coarse in out.pyramid] == [(2, 3, *(s // 2**i for s in sides)) for i in (1, 2, 3)]
    # the top head too: a method that asks for a pyramid trains every scale
    torch.stack([logits.square().mean() for logits in (out.logits, *out.pyramid)]).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


@every
@dims
def test_the_head_of_a_scale_learns_from_that_scale_alone(network, spatial_dims):
    net = small(network, spatial_dims, pyramid=True)
    out = net(image(spatial_dims))
    heads = list(net.get_submodule("decoders.0.coarse_heads").children())
    for scale, logits in enumerate(out.pyramid):
        loss = logits.square().mean()
        gradients = [
            torch.autograd.grad(loss, list(head.parameters()), retain_graph=True, allow_unused=True) for head in heads
        ]
        assert [all(g is not None and g.any() for g in of_head) for of_head in gradients] == [
            i == scale for i in range(3)
        ]


@every
def test_a_pyramid_adds_its_heads_and_changes_nothing_else(network):
    without = {name: p.shape for name, p in small(network, num_decoders=2).named_parameters()}
    net = small(network, pyramid=True, num_decoders=2)
    with_heads = {name: p.shape for name, p in net.named_parameters()}
    added = with_heads.keys() - without.keys()
    assert {name.split(".", 2)[2].split(".")[0] for name in added} == {"coarse_heads"}
    assert {name: with_heads[name] for name in without} == without
    assert [len(list(decoder.get_submodule("coarse_heads").children())) for decoder in net.decoders] == [3, 3]
    plain = small(network).eval()
    plain.load_state_dict(small(network, pyramid=True).state_dict(), strict=False)
    assert torch.equal(plain(image(2)).logits, small(network, pyramid=True).eval()(image(2)).logits)


@every
def test_decoders_share_no_parameter_and_leave_the_features_alone(network):
    net, x = small(network, num_decoders=3).eval(), image(2)
    assert len({id(p) for p in net.parameters()}) == sum(len(list(part.parameters())) for part in net.children())
    features = net.encoder(x)
    before = [f.clone() for f in features]
    logits = [decoder(features).logits for decoder in net.decoders]
    assert all(torch.equal(a, b) for a, b in zip(features, before, strict=True))
    assert not torch.allclose(logits[0], logits[1]) and not torch.allclose(logits[1], logits[2])
    assert torch.equal(net(x).logits, logits[0])
    torch.stack(logits).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())


@every
@dims
def test_channels_last_stays_channels_last_and_changes_no_result(network, spatial_dims):
    memory_format = torch.channels_last if spatial_dims == 2 else torch.channels_last_3d
    net, x = small(network, spatial_dims), image(spatial_dims)
    expected = net.eval()(x).logits
    net.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(net(x).logits, expected, atol=1e-4, rtol=1e-4)
    if network is URPCUNet:
        return  # torch's instance normalisation answers in the plain layout
    net.train()
    # not the logits: on one thread torch takes 1x1 convolutions to a kernel that knows no channels_last
    assert all(t.is_contiguous(memory_format=memory_format) for t in (net(x).embedding, *net.encoder(x)))


@every
def test_dropout_acts_in_training_only_and_zero_switches_it_off(network):
    net, x = small(network, dropout=0.5), image(2)
    assert not torch.equal(net(x).logits, net(x).logits)
    assert torch.equal(net.eval()(x).logits, net(x).logits)
    net = small(network, dropout=0.0)
    assert torch.equal(net(x).logits, net(x).logits)


@every_norm
def test_state_dict_is_the_whole_network(network, options):
    net, other = small(network, **options), network(1, 3, 2, width=4, **options)
    net(image(2))  # moves the running statistics
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(image(2)).logits, net.eval()(image(2)).logits)


@every
@dims
@pytest.mark.parametrize(("init", "gain"), [("kaiming", "fan_in"), ("xavier", "both")])
def test_init_draws_the_weights_of_convolutions_only(network, spatial_dims, init: Init, gain):
    torch.manual_seed(0)
    default = network(1, 3, spatial_dims, width=16)
    torch.manual_seed(0)
    drawn = network(1, 3, spatial_dims, width=16, init=init)
    weights = {f"{name}.weight" for name, m in default.named_modules() if isinstance(m, nn.Conv2d | nn.Conv3d)}
    for (name, a), b in zip(default.named_parameters(), drawn.parameters(), strict=True):
        if name not in weights:
            # decoders are made after the encoder and init comes last, so nothing else may differ
            assert torch.equal(a, b), name
        elif a.numel() > 5000:
            fans = (a[0].numel(), a[:, 0].numel())
            variance = 2 / fans[0] if gain == "fan_in" else 2 / sum(fans)
            assert b.var().item() == pytest.approx(variance, rel=0.1), name
            assert b.abs().max() > 3 * variance**0.5, name  # normal, not uniform


@every
def test_an_input_that_the_network_cannot_halve_names_patch_size(network):
    with pytest.raises(ValueError, match=r"patch_size \(40, 32\).*multiples of 16; try \(48, 32\)"):
        small(network)(torch.zeros(1, 1, 40, 32))
    with pytest.raises(ValueError, match=r"3D network takes \(B, C, \*S\)"):
        small(network, 3)(torch.zeros(1, 16, 16, 16))


@every_norm
@dims
def test_one_voxel_at_the_bottom_is_too_few_for_instance_normalisation(network, options, spatial_dims):
    net, x = small(network, spatial_dims, **options), torch.randn(2, 1, *[16] * spatial_dims)
    if options == {"norm": "batch"}:
        assert net(x).logits.isfinite().all()
        return
    near = (*[16] * (spatial_dims - 1), 32)
    with pytest.raises(ValueError, match=r"patch_size .* leaves one voxel .*; try ") as error:
        net(x)
    assert str(near) in str(error.value)
    assert net(torch.randn(2, 1, *near)).logits.isfinite().all()


@every
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.0}, r"dropout is 1\.0"),
        ({"width": 0}, "width is 0"),
        ({"num_decoders": 0}, "num_decoders is 0"),
        ({"init": "he"}, "init is 'he'; use one of: default, kaiming, xavier"),
        ({"spatial_dims": 1}, "spatial_dims is 1"),
    ],
)
def test_options_that_make_no_network_are_refused(network, options, message):
    with pytest.raises(ValueError, match=message):
        network(1, 3, **({"spatial_dims": 2, "width": 4} | options))


@pytest.mark.parametrize("network", [VNet, UNet])
def test_a_norm_that_there_is_not_is_refused(network):
    with pytest.raises(ValueError, match="norm is 'layer'; use one of: batch, instance"):
        network(1, 3, 2, width=4, norm="layer")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_drops_a_share_p_of_the_elements_and_scales_the_rest_and_their_gradients(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(2, 5, 63, 65, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    out = Dropout(p)(x)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert (out == 0).float().mean().item() == pytest.approx(p, abs=0.01)
    assert (out == 0).float().mean((0, 2, 3)).tolist() == pytest.approx([p] * 5, abs=0.02)
    assert out.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-2)
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, out)  # x is 1, so the output is the noise


def test_neighbours_are_dropped_independently():
    torch.manual_seed(0)
    kept = (Dropout(0.3)(torch.ones(400_001)) > 0).float()
    correlations = [torch.corrcoef(torch.stack([kept[:-lag], kept[lag:]]))[0, 1].item() for lag in (1, 2, 3, 4, 8)]
    assert correlations == pytest.approx([0] * 5, abs=0.008)


def test_bf16_weight_gradients_of_two_slices_take_in_no_foreign_memory():
    conv = Layers(3, "batch").conv(16, 16, 3)
    weight = next(conv.parameters())
    x = torch.randn(2, 16, 2, 4, 4)
    for _ in range(8):
        poison = [torch.full((size,), math.nan) for size in (2**20, 2**16, 2**14, 2**12) * 4]
        del poison  # freed memory that a careless kernel would pick up
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(x)
        (gradient,) = torch.autograd.grad(y.float().square().mean(), weight)
        assert torch.isfinite(gradient).all()


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_on_one_thread_a_1x1x1_convolution_is_a_product_of_the_same_values():
    torch.manual_seed(0)
    conv = Layers(3, "batch").conv(8, 5, 1)
    assert isinstance(conv, Conv3d) and conv.bias is not None
    x = torch.randn(2, 8, 4, 6, 3).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    inputs = (x, conv.weight, conv.bias)
    expected = nn.functional.conv3d(*inputs)
    found = conv(x)
    assert found.is_contiguous() and expected.is_contiguous(), (
        "torch takes oneDNN, which answers in channels_last: drop ours"
    )
    torch.testing.assert_close(found, expected)
    assert torch.equal(conv(x[:1]), found[:1])
    upstream = torch.randn(found.shape)
    torch.testing.assert_close(*(torch.autograd.grad(out, inputs, upstream) for out in (found, expected)))
    assert "conv3d" in str(torch.export.export(conv, (x.detach(),)).graph)


@dims
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_learning_transposed_convolution_is_torchs_in_another_order(spatial_dims, dtype):
    torch.manual_seed(0)
    made = Layers(spatial_dims, "batch").up_conv(6, 4)
    make = nn.ConvTranspose3d if spatial_dims == 3 else nn.ConvTranspose2d
    plain = make(6, 4, 2, stride=2)
    plain.load_state_dict(made.state_dict())
    layout = torch.channels_last_3d if spatial_dims == 3 else torch.channels_last
    x = torch.randn(3, 6, *(5, 3, 4)[:spatial_dims]).to(dtype).to(memory_format=layout)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    with torch.autocast("cpu", enabled=dtype == torch.bfloat16):
        outputs = [layer(each) for layer, each in zip((made, plain), inputs, strict=True)]
    gradient = torch.randn(outputs[1].shape).to(dtype)
    for output in outputs:
        output.backward(gradient)
    assert outputs[0].dtype == dtype and outputs[0].is_contiguous(memory_format=layout)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(made.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=10 * tolerance)
    with torch.no_grad():
        assert torch.equal(made(x.float()), plain(x.float()))
    contiguous = x.float().contiguous()
    assert torch.equal(made(contiguous), plain(contiguous))
