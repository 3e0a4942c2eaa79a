"""Changes of intensity: the formulas behind them, and that the same parameters mean the same everywhere."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from tailseg.parts.intensity import (
    bias_field_and_gamma,
    change_some,
    gaussian_blur,
    gaussian_noise,
    unit_range,
)


@pytest.mark.parametrize("shape", [(12, 14, 16), (90, 3, 70), (80, 33)])
def test_blur_is_the_gaussian_filter_of_scipy_rescaled_at_the_border(shape: tuple[int, ...]):
    x = torch.rand(2, 3, *shape)
    sigma = torch.tensor([[0.7, 0.7, 0.7], [1.5, 0.4, 2.0]])[:, : len(shape)]
    blurred = gaussian_blur(x, sigma)
    for sample, width in zip((0, 1), sigma.tolist(), strict=True):
        inside = gaussian_filter(np.ones(shape), width, mode="constant", truncate=20)
        expected = gaussian_filter(x[sample, 2].double().numpy(), width, mode="constant", truncate=20) / inside
        assert np.abs(blurred[sample, 2].numpy() - expected).max() < 1e-6


def test_blur_of_no_width_changes_nothing_and_of_a_large_one_leaves_the_mean():
    x = torch.rand(1, 1, 40, 40)
    assert torch.equal(gaussian_blur(x, torch.tensor([[0.0, 0.01]])), x)
    assert torch.allclose(gaussian_blur(x, torch.tensor([[1e4, 1e4]])), x.mean(), atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 4, 5), (6, 5)])
def test_bias_field_is_a_cubic_polynomial_under_an_exponential_and_gamma_a_power(shape: tuple[int, ...]):
    dims, generator = len(shape), torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, *shape, generator=generator)
    coefficients = torch.rand(2, *(4,) * dims, generator=generator) - 0.5
    gamma = torch.tensor([0.7, 1.5])
    at = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij")
    for sample in (0, 1):
        exponent = np.zeros(shape)
        for powers in np.ndindex(*(4,) * dims):
            if sum(powers) <= 3:
                exponent += float(coefficients[sample][powers]) * np.prod(
                    [a**p for a, p in zip(at, powers, strict=True)], axis=0
                )
        expected = (x[sample].double().numpy() * np.exp(exponent)) ** float(gamma[sample])
        changed = bias_field_and_gamma(x[sample : sample + 1].clone(), coefficients[sample][None], gamma[sample][None])
        assert np.allclose(changed[0].numpy(), expected, rtol=1e-5, atol=1e-6)
        both = bias_field_and_gamma(x.clone(), coefficients, gamma)
        assert torch.allclose(both[sample], changed[0])


def test_gamma_leaves_black_and_white_where_they_are():
    x = torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2)
    assert bias_field_and_gamma(x, torch.zeros(1, 4, 4), torch.tensor([1.7])).flatten().tolist() == [0.0, 1.0]


def test_unit_range_is_that_of_an_image_or_of_each_of_its_channels_and_leads_back():
    x = torch.randn(2, 2, 5, 5) * 100
    x[1, 1] = 7.0
    for per_channel in (False, True):
        unit, low, extent = unit_range(x, per_channel=per_channel)
        assert torch.allclose(unit * extent + low, x, atol=1e-4)
        whole = unit if per_channel else unit.flatten(1)
        axes = tuple(range(2 if per_channel else 1, whole.dim()))
        assert torch.equal(whole[:1].amin(axes), torch.zeros_like(whole[:1].amin(axes)))
        assert torch.allclose(whole[:1].amax(axes), torch.ones(()))
    assert unit_range(x, per_channel=True)[0][1, 1].abs().max() == 0


def test_noise_is_normal_and_another_with_another_seed_and_at_another_place():
    noise = gaussian_noise(torch.tensor([1, 2, 2**32 - 1]), torch.zeros(3, 1, 64, 64, 16))
    flat = noise.flatten(1)
    assert flat.mean(1).abs().max() < 0.02 and (flat.std(1) - 1).abs().max() < 0.02
    assert ((flat.abs() > 3).float().mean(1) - 0.0027).abs().max() < 0.001
    assert (torch.corrcoef(flat) - torch.eye(3)).abs().max() < 0.02
    for lag in (1, 16, 64 * 16):  # neighbours along every axis
        assert abs(float((flat[:, lag:] * flat[:, :-lag]).mean())) < 0.02


def test_noise_is_a_hash_of_seed_and_place_and_of_nothing_else():
    def hashed(value: int) -> int:
        for _ in range(2):
            value = ((value ^ (value >> 16)) * 0x45D9F3B) % 2**32
        return value ^ (value >> 16)

    noise = gaussian_noise(torch.tensor([12345, 4000000000]), torch.zeros(2, 2, 3, 3))
    for row, seed in enumerate((12345, 4000000000)):
        for place in range(18):
            share = ((hashed(hashed(place) ^ seed) >> 8) + 0.5) / 2**24
            assert float(noise[row].flatten()[place]) == pytest.approx(NormalDist().inv_cdf(share), abs=1e-4)


@pytest.mark.parametrize("rows", [[], [1], [0, 2], [0, 1, 2]])
@pytest.mark.parametrize("in_place", [True, False])
def test_only_some_are_changed_each_with_its_own_parameter(rows: list[int], *, in_place: bool):
    x = torch.ones(3, 1, 2, 2)
    factors = torch.tensor([2.0, 3.0, 4.0])

    def times(some: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        factor = factor.reshape(-1, 1, 1, 1)
        return some.mul_(factor) if in_place else some * factor

    assert change_some(x, torch.tensor(rows, dtype=torch.int64), times, factors) is x
    assert x[:, 0, 0, 0].tolist() == [float(factors[row]) if row in rows else 1.0 for row in range(3)]
