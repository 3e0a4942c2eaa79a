"""CReST: the weights of one step, and that it is CPS with its weighter on both networks."""

from __future__ import annotations

import pytest
from methods.fixed_networks import EXAMPLE_TASK, HALFWAY, build_fixed, example_batch

from tailseg.methods.cps import CPS
from tailseg.methods.crest import CReST


def test_weights_of_the_first_step_follow_each_networks_unlabelled_half():
    logs = CReST(EXAMPLE_TASK, build_fixed()).step(example_batch(), HALFWAY).logs
    # labelled voxels 1000, 100, 10; A predicts 2, 1, 1 and B 1, 2, 1 unlabelled voxels
    start, share = [0.01 ** (1 / 3), 0.1 ** (1 / 3), 1], 0.5 ** (1 / 3)
    assert logs["weights_a"].tolist() == pytest.approx(
        [0.99 * w + 0.01 * new for w, new in zip(start, [share, share, 1], strict=True)], abs=1e-6
    )
    assert logs["weights_b"].tolist() == pytest.approx(
        [0.99 * w + 0.01 * new for w, new in zip(start, [share, share, 1], strict=True)], abs=1e-6
    )


def test_it_is_cps_with_crest_on_both_networks():
    options = {"alpha": 0.5, "beta": 0.9}
    crest = CReST(EXAMPLE_TASK, build_fixed(), alpha=0.5, beta=0.9).step(example_batch(), HALFWAY)
    weighter = {"name": "crest", **options}
    cps = CPS(EXAMPLE_TASK, build_fixed(), weighter_a=weighter, weighter_b=weighter).step(example_batch(), HALFWAY)
    assert {name: loss.item() for name, loss in crest.losses.items()} == {
        name: loss.item() for name, loss in cps.losses.items()
    }
