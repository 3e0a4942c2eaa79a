"""Ramp-ups: the published values, by epoch and by step."""

from __future__ import annotations

import pytest

from tailseg.core import Progress
from tailseg.parts.ramps import gaussian_ramp, ramp_up


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
