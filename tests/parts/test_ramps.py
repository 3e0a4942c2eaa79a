"""Ramp-ups: the published values, by epoch and by step."""

from __future__ import annotations

import pytest

from tailseg.core import Progress
from tailseg.parts.ramps import gaussian_ramp, ramp_over, ramp_up


def test_values_of_the_protocol():
    assert 0.1 * gaussian_ramp(0) == pytest.approx(0.1 * 0.00673795, abs=1e-9)
    assert gaussian_ramp(150 / 300) == pytest.approx(0.28650480, abs=1e-8)
    assert gaussian_ramp(1) == gaussian_ramp(2) == 1 and gaussian_ramp(-1) == gaussian_ramp(0)


def test_by_epoch_it_is_held_and_set_at_the_epochs_end():
    values = [ramp_up(Progress(step, 24, 8)) for step in range(24)]
    assert len(set(values[:16])) == 1  # epochs 0 and 1 both use the first value
    assert set(values[16:]) == {gaussian_ramp(1 / 3)}


def test_by_step_it_moves_every_step():
    values = [ramp_up(Progress(step, 24, 8), "step") for step in range(24)]
    assert sorted(set(values)) == values


@pytest.mark.parametrize(
    ("total", "step", "weight"),
    [
        (30000, 0, 0.000673795),
        (30000, 1500, 0.001097100),
        (30000, 3000, 0.001742237),
        (30000, 6000, 0.004076220),
        (30000, 15000, 0.028650480),
        (30000, 30000, 0.1),
        (6000, 1500, 0.006005466),
        (6000, 3000, 0.028650480),
        (6000, 6000, 0.1),
    ],
)
def test_over_the_run_it_takes_the_values_of_mean_teacher(total: int, step: int, weight: float):
    progress = Progress(step, total, 100)
    assert 0.1 * ramp_over(progress) == pytest.approx(weight, abs=1e-9)
    assert 0.1 * ramp_over(progress, hold=150) == pytest.approx(weight, abs=1e-9)


def test_over_a_share_of_the_run_it_is_1_from_there_on():
    assert ramp_over(Progress(100, 1000, 10), 0.2) == gaussian_ramp(0.5)
    assert ramp_over(Progress(200, 1000, 10), 0.2) == ramp_over(Progress(999, 1000, 10), 0.2) == 1
    assert ramp_over(Progress(0, 1000, 10), 0) == 1


def test_held_it_rises_in_stairs():
    values = [ramp_over(Progress(step, 600, 10), hold=150) for step in range(600)]
    assert values[0] == values[149] < values[150] == values[299] == gaussian_ramp(0.25)
    assert len(set(values)) == 4
