"""Perturbations: what they change, what they leave, and the formulas behind them."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch

from tailseg.parts import perturb
from tailseg.parts.perturb import add_noise, drop_channels, strong_view, unperturbed

SHAPES = [(3, 1, 20, 24), (3, 3, 20, 24), (2, 1, 10, 12, 14), (2, 3, 10, 12, 14), (2, 2, 20, 24)]


def test_noise_has_the_deviation_asked_for_and_stays_within_the_limit():
    torch.manual_seed(0)
    noise = add_noise(torch.full((1, 1, 100, 100), 7.0)) - 7
    assert noise.abs().max().item() == pytest.approx(0.2, abs=1e-6)
    # of a normal variable whose mass beyond two deviations is moved to there
    assert noise.std().item() == pytest.approx(0.0959, abs=0.002)
    assert add_noise(torch.zeros(1, 1, 8, 8), std=1.0, limit=0.01).abs().max() <= 0.01


def test_dropped_channels_are_all_zero_and_the_others_are_scaled_up():
    torch.manual_seed(0)
    features = [torch.full((4, 64, 4, 4, 4), 3.0), torch.full((4, 128, 2, 2), 3.0)]
    for dropped in drop_channels(features, 0.25):
        values = dropped.flatten(2)
        assert (values == values[..., :1]).all()
        assert set(values.unique().tolist()) == {0.0, 4.0}
        assert (values == 0).float().mean().item() == pytest.approx(0.25, abs=0.08)
    assert features[0].min() == 3.0


def test_no_channel_is_dropped_at_probability_zero():
    feature = torch.randn(2, 3, 4, 4)
    assert torch.equal(drop_channels([feature], 0.0)[0], feature)


def test_unperturbed_rests_dropout_and_statistics_and_then_goes_back_to_the_mode_before():
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Dropout(0.5))
    x = torch.randn(2, 1, 4, 4) + 5
    with unperturbed(net):
        assert torch.equal(net(x), net(x))
    assert net.training and net[1].training and net[0].num_batches_tracked == 0
    net.eval()
    with unperturbed(net):
        pass
    assert not net.training


def test_unperturbed_goes_back_after_an_error_too():
    net = torch.nn.Dropout()
    with pytest.raises(KeyError), unperturbed(net):
        raise KeyError
    assert net.training


@pytest.mark.parametrize("shape", SHAPES)
def test_strong_views_are_finite_float32_of_the_same_shape_and_leave_the_image_alone(shape: tuple[int, ...]):
    torch.manual_seed(0)
    x = torch.randn(shape)
    before = x.clone()
    view = strong_view(x)
    assert view.shape == x.shape and view.dtype == torch.float32
    assert view.isfinite().all()
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_generator_of_the_cpu_decides_alone(shape: tuple[int, ...]):
    x = torch.randn(shape)
    views = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        views.append(strong_view(x, intensity=1.0, blur=1.0))
    assert torch.equal(views[0], views[1])
    assert not torch.allclose(views[0], views[2], atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_samples_are_perturbed_each_on_its_own(shape: tuple[int, ...]):
    torch.manual_seed(0)
    x = torch.randn(1, *shape[1:]).expand(shape)
    views = strong_view(x, intensity=1.0, blur=1.0)
    assert not torch.allclose(views[0], views[1], atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_scale_and_offset_of_the_intensities_do_not_matter(shape: tuple[int, ...]):
    x = torch.rand(shape)
    torch.manual_seed(0)
    view = strong_view(x)
    torch.manual_seed(0)
    assert torch.allclose(strong_view(300 * x - 1000), 300 * view - 1000, atol=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_happens_at_probability_zero(shape: tuple[int, ...]):
    x = torch.randn(shape) * 3
    assert torch.allclose(strong_view(x, intensity=0.0, blur=0.0), x, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_constant_images_stay_as_they_are(shape: tuple[int, ...]):
    x = torch.full(shape, -1000.0)
    assert torch.equal(strong_view(x, intensity=1.0, blur=1.0), x)


def test_views_of_no_images_are_no_images():
    assert strong_view(torch.zeros(0, 1, 8, 8)).shape == (0, 1, 8, 8)


@pytest.mark.parametrize(("dims", "layout"), [(2, torch.channels_last), (3, torch.channels_last_3d)])
def test_the_memory_layout_is_kept(dims: int, layout: torch.memory_format):
    x = torch.randn(2, 3, *(8,) * dims)
    assert strong_view(x).is_contiguous()
    assert strong_view(x.contiguous(memory_format=layout)).is_contiguous(memory_format=layout)


def test_views_are_computed_in_float32_under_autocast():
    x = torch.randn(2, 1, 8, 8, 8)
    torch.manual_seed(0)
    view = strong_view(x, intensity=1.0, blur=1.0)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(strong_view(x, intensity=1.0, blur=1.0), view)


def test_no_gradient_flows_into_a_view():
    assert not strong_view(torch.randn(2, 1, 8, 8, requires_grad=True)).requires_grad


@pytest.mark.parametrize("shape", [(4, 1, 15, 15), (4, 1, 9, 11, 13)])
def test_a_bright_voxel_stays_where_it_is(shape: tuple[int, ...]):
    torch.manual_seed(0)
    x = torch.zeros(shape)
    middle = (..., *(side // 2 for side in shape[2:]))
    x[middle] = 1.0
    view = strong_view(x, intensity=1.0, blur=1.0)
    assert torch.equal(view.flatten(1).argmax(1), x.flatten(1).argmax(1))


def test_brightness_and_contrast_keep_the_order_of_grey_values():
    torch.manual_seed(0)
    x = torch.linspace(0, 1, 256).reshape(1, 1, 16, 16).repeat(20, 1, 1, 1)
    views = strong_view(x, intensity=1.0, blur=0.0).flatten(1)
    assert (views.diff(dim=1) >= 0).all()
    assert views.min() >= 0 and views.max() <= 1
    assert (views[:, -1] < 0.99).any() and (views[:, 200] > 0.99).any()


def test_the_bias_field_is_the_exponential_of_a_cubic_polynomial(monkeypatch: pytest.MonkeyPatch):
    drawn: list[torch.Tensor] = []

    def rand(*shape: int) -> torch.Tensor:
        drawn.append(torch.empty(shape).uniform_(generator=generator))
        return drawn[-1]

    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(perturb.torch, "rand", rand)
    image = torch.full((1, 1, 3, 4, 5), 0.5)
    result = perturb._field_and_gamma(image, 1.0)[0, 0]
    coefficients = (drawn[1] - 0.5).reshape(4, 4, 4)
    gamma = float((drawn[2][0, 0] - 0.5).exp())
    z, y, x = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in (3, 4, 5)), indexing="ij")
    exponent = torch.zeros(3, 4, 5)
    for i, j, k in np.ndindex(4, 4, 4):
        if i + j + k <= 3:
            exponent += coefficients[i, j, k] * z**i * y**j * x**k
    assert torch.allclose(result, (0.5 * exponent.exp()) ** gamma, atol=1e-6)


def test_turning_the_hue_is_what_colorsys_does():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 5, 5)
    x[0, :, 0, 0] = 0.4  # grey has no hue
    turned = perturb._turn_hue(x, torch.tensor([0.2, -0.15]).reshape(2, 1, 1, 1))
    for sample, turn in ((0, 0.2), (1, -0.15)):
        for row, column in np.ndindex(5, 5):
            hue, saturation, value = colorsys.rgb_to_hsv(*x[sample, :, row, column].tolist())
            expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
            assert turned[sample, :, row, column].tolist() == pytest.approx(expected, abs=1e-5)


def test_colour_images_change_their_colours_and_grey_ones_do_not_get_any():
    torch.manual_seed(0)
    colour = torch.rand(1, 3, 8, 8)
    grey = torch.rand(1, 1, 8, 8).expand(1, 3, 8, 8)
    view = strong_view(grey, intensity=1.0, blur=0.0)
    assert torch.allclose(view[:, 0], view[:, 1], atol=1e-6) and torch.allclose(view[:, 0], view[:, 2], atol=1e-6)
    view = strong_view(colour, intensity=1.0, blur=0.0)
    assert not torch.equal(view.argmax(1), colour.argmax(1))
