"""SimiS: the weights of one step, and that it is CPS with its weighter on both networks."""

from __future__ import annotations

import pytest
from methods.fixed_networks import EXAMPLE_TASK, HALFWAY, build_fixed, example_batch

from tailseg.methods.cps import CPS
from tailseg.methods.simis import SimiS


def test_weights_of_the_first_step_follow_all_of_each_networks_predictions():
    logs = SimiS(EXAMPLE_TASK, build_fixed()).step(example_batch(), HALFWAY).logs
    start = [0.99 * 3 + 0.01 * 3 * (1000 - n) / 1110 for n in (1000, 100, 10)]
    # A predicts 4, 2, 2 of 8 voxels and B 2, 4, 2
    assert logs["weights_a"].tolist() == pytest.approx(
        [0.99 * w + 0.01 * 3 * (4 - n) / 8 for w, n in zip(start, (4, 2, 2), strict=True)], abs=1e-6
    )
    assert logs["weights_b"].tolist() == pytest.approx(
        [0.99 * w + 0.01 * 3 * (4 - n) / 8 for w, n in zip(start, (2, 4, 2), strict=True)], abs=1e-6
    )


def test_it_is_cps_with_simis_on_both_networks():
    simis = SimiS(EXAMPLE_TASK, build_fixed(), beta=0.9).step(example_batch(), HALFWAY)
    weighter = {"name": "simis", "beta": 0.9}
    cps = CPS(EXAMPLE_TASK, build_fixed(), weighter_a=weighter, weighter_b=weighter).step(example_batch(), HALFWAY)
    assert {name: loss.item() for name, loss in simis.losses.items()} == {
        name: loss.item() for name, loss in cps.losses.items()
    }
