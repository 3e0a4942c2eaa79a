from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tailseg.networks.batch_norm import BatchNorm2d, BatchNorm3d, batch_statistics

LAYERS = {
    4: (BatchNorm2d, torch.channels_last, (3, 4, 300, 200)),
    5: (BatchNorm3d, torch.channels_last_3d, (2, 4, 40, 50, 60)),
}
IDS = ["2D", "3D"]


def example(dims: int) -> tuple[nn.Module, Tensor]:
    """A layer with weights of its own, and what it is given: channels of several means and variances."""
    layer, memory_format, shape = LAYERS[dims]
    generator = torch.Generator().manual_seed(0)
    norm = layer(shape[1])
    with torch.no_grad():
        norm.weight.copy_(torch.rand(shape[1], generator=generator) + 0.5)
        norm.bias.copy_(torch.rand(shape[1], generator=generator))
    scale = torch.tensor([0.1, 1.0, 3.0, 10.0]).view(-1, *(1 for _ in shape[2:]))
    x = (torch.randn(shape, generator=generator) + 1) * scale
    return norm, x.contiguous(memory_format=memory_format)


def run(norm: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and running statistics of one training step, in float64 and contiguous memory."""
    norm, x = copy.deepcopy(norm).train(), x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = norm(x)
    y.square().mul(0.5).add(y.sin()).mean().backward()
    assert x.grad is not None
    found = {"y": y, "x": x.grad, **{name: p.grad for name, p in norm.named_parameters()}, **dict(norm.named_buffers())}
    return {name: value.detach().double().contiguous() for name, value in found.items() if value is not None}


@pytest.mark.parametrize("dims", LAYERS, ids=IDS)
def test_a_step_over_channels_last_is_that_of_float64(dims: int):
    norm, x = example(dims)
    expected = run(norm.double(), x.double().contiguous())
    found = run(norm.float(), x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 2e-6 * value.abs().max(), name


@pytest.mark.parametrize("dims", LAYERS, ids=IDS)
def test_statistics_are_a_hundred_times_nearer_than_those_of_torch(dims: int):
    _, x = example(dims)
    voxels = x.movedim(1, -1).flatten(0, -2).double()
    mean, variance = batch_statistics(x)
    torchs = torch.batch_norm_update_stats(x, None, None, 0.0)[1].double()
    exact = voxels.var(0, correction=0)
    torch.testing.assert_close(mean, voxels.mean(0), rtol=1e-6, atol=0)
    assert (variance / exact - 1).abs().max() < 2e-6
    if torch.get_num_threads() == 1 and torch.backends.cpu.get_cpu_capability() == "AVX2":
        # where this fails, torch has repaired it, and the layer can go
        assert (torchs / exact - 1).abs().max() > 1e-5


@pytest.mark.parametrize("dims", LAYERS, ids=IDS)
def test_bfloat16_is_normalised_with_statistics_of_float32(dims: int):
    norm, x = example(dims)
    x = x.bfloat16()
    expected, found = run(norm.double(), x.double().contiguous()), run(norm.float(), x)
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(found["running_var"], expected["running_var"], rtol=2e-6, atol=0)
    torch.testing.assert_close(found["y"], expected["y"], rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("dims", LAYERS, ids=IDS)
def test_float64_keeps_its_digits(dims: int):
    _, x = example(dims)
    mean, variance = batch_statistics(x.double())
    voxels = x.movedim(1, -1).flatten(0, -2).double()
    torch.testing.assert_close((mean, variance), (voxels.mean(0), voxels.var(0, correction=0)), rtol=1e-12, atol=0)


def test_evaluation_and_contiguous_memory_are_left_to_torch():
    norm, x = example(5)
    plain = nn.BatchNorm3d(4)
    plain.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x.contiguous()), plain(x.contiguous()))
    assert torch.equal(norm.eval()(x), plain.eval()(x))


def test_the_output_may_be_changed_in_place_and_keeps_its_layout():
    norm, x = example(5)
    y = norm(x.requires_grad_())
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    torch.relu_(y).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_without_running_statistics_none_move():
    norm, x = example(4)
    assert isinstance(norm, nn.BatchNorm2d)
    norm.track_running_stats = False
    norm(x)
    assert norm.running_mean is not None and norm.num_batches_tracked is not None
    assert not norm.running_mean.any() and norm.num_batches_tracked == 0
