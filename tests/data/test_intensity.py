from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from tailseg.data.intensity import MinMax, Percentiles, Window, ZScore


def scan(low: float = -1000, high: float = 1500) -> np.ndarray:
    return np.random.default_rng(0).uniform(low, high, (6, 7, 8)).astype(np.float32)


def test_volume_rescaling_uses_the_extremes_of_the_clipped_volume() -> None:
    channel = scan(-20, 60)  # reaches neither bound of the window
    expected = np.clip(channel, -75, 275)
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    assert not Window(low=-75, high=275, rescale="volume").apply(channel)
    np.testing.assert_array_equal(channel, expected)
    assert channel.min() == 0 and channel.max() == 1


def test_volume_rescaling_of_a_scan_wider_than_the_window_is_that_of_the_window() -> None:
    by_volume, by_window = scan(), scan()
    Window(low=-75, high=275, rescale="volume").apply(by_volume)
    Window(low=-75, high=275, rescale="window").apply(by_window)
    np.testing.assert_array_equal(by_volume, by_window)


def test_window_rescaling_uses_its_bounds() -> None:
    channel = np.array([-500, -160, 40, 240, 900], np.float32).reshape(1, 1, 5)
    Window(low=-160, high=240, rescale="window").apply(channel)
    np.testing.assert_array_equal(channel.ravel(), [0, 0, 0.5, 1, 1])


def test_zscore_has_mean_zero_and_variance_one() -> None:
    channel = scan() + 3e4
    ZScore().apply(channel)
    assert channel.mean(dtype=np.float64) == pytest.approx(0, abs=1e-5)
    assert channel.std(dtype=np.float64) == pytest.approx(1, abs=1e-5)


def test_zscore_of_nonzero_voxels_leaves_zeros_and_ignores_them() -> None:
    channel = scan(100, 900)
    outside = np.random.default_rng(1).random(channel.shape) < 0.4
    channel[outside] = 0
    ZScore(nonzero=True).apply(channel)
    np.testing.assert_array_equal(channel[outside], 0)
    assert channel[~outside].mean(dtype=np.float64) == pytest.approx(0, abs=1e-6)
    assert channel[~outside].std(dtype=np.float64) == pytest.approx(1, abs=1e-6)


def test_percentiles_clip_and_then_standardise() -> None:
    channel = scan()
    channel[0, 0, 0] = 1e6
    low, high = np.percentile(channel, [0.5, 99.5])
    clipped = np.clip(channel, low, high).astype(np.float64)
    Percentiles().apply(channel)
    np.testing.assert_allclose(channel, (clipped - clipped.mean()) / clipped.std(), atol=1e-5)


def test_minmax_reaches_zero_and_one() -> None:
    channel = scan()
    MinMax().apply(channel)
    assert channel.min() == 0 and channel.max() == 1


@pytest.mark.parametrize(
    "intensity", [Window(low=-75, high=275, rescale="volume"), Percentiles(), ZScore(), ZScore(nonzero=True), MinMax()]
)
@pytest.mark.parametrize("value", [0, 0.1, 5000])
def test_a_constant_channel_becomes_zero_and_is_told(intensity: MinMax, value: float) -> None:
    channel = np.full((3, 4, 5), value, np.float32)
    assert intensity.apply(channel)
    np.testing.assert_array_equal(channel, 0)


def test_a_constant_channel_keeps_its_place_in_a_window() -> None:
    channel = np.full((3, 4, 5), 40, np.float32)
    assert Window(low=-160, high=240, rescale="window").apply(channel)
    np.testing.assert_array_equal(channel, 0.5)


def test_bounds_out_of_order_are_refused() -> None:
    with pytest.raises(ValidationError, match="low 5 must be below high 5"):
        Window(low=5, high=5, rescale="volume")
    with pytest.raises(ValidationError, match="low 99 must be below high 1"):
        Percentiles(low=99, high=1)
    with pytest.raises(ValidationError, match="less than or equal to 100"):
        Percentiles(high=101)
