"""Class weighters: their worked numbers, where their statistics come from, and what happens to absent classes."""

from __future__ import annotations

import pytest
import torch
from methods.fixed_networks import EXAMPLE_TASK, HALFWAY, build_fixed, example_batch
from parts.worked_example import LOGITS_A, LOGITS_B

from tailseg.components import find
from tailseg.core import IGNORE, Task
from tailseg.options import OptionError
from tailseg.parts.class_weights import (
    WEIGHTERS,
    CLDWeights,
    CReSTWeights,
    DiffDW,
    DistDW,
    SimiSWeights,
    make_weighter,
)


def task(*class_voxels: int) -> Task:
    names = ("background", *(f"organ{i}" for i in range(1, len(class_voxels))))
    return Task(names, 1, 3, (1.0, 1.0, 1.0), class_voxels)


def labels(*values: int) -> torch.Tensor:
    return torch.tensor(values).reshape(1, 1, 1, -1)


def test_dist_of_the_spec():
    assert DistDW.rarity(torch.tensor([1000, 100, 10, 1])).tolist() == pytest.approx([0, 4 / 3, 8 / 3, 4], abs=1e-6)
    assert DistDW.rarity(torch.tensor([8, 4, 4, 0])).tolist() == pytest.approx([0, 0.135247, 0.135247, 4], abs=1e-6)
    counts = [9e6, 2e5, 1.5e5, 3e4, 2e4, 1.6e6, 4e5, 1e5, 9e4, 4e4, 8e4, 4e3, 5e3, 4.5e3]
    expected = [0, 0.493175, 0.530446, 0.738958, 0.791488, 0.223771, 0.403374]
    expected += [0.582976, 0.596626, 0.701687, 0.611886, 1, 0.971090, 0.984741]
    assert (DistDW.rarity(torch.tensor(counts)) / 14).tolist() == pytest.approx(expected, abs=1e-6)


def test_dist_of_equal_counts_weighs_all_alike():
    assert DistDW.rarity(torch.tensor([5, 5, 5])).tolist() == [3, 3, 3]


def test_dist_follows_the_unlabelled_pseudo_labels():
    weighter = DistDW(task(1000, 100, 10, 1))
    labelled, unlabelled = [3] * 16, [0] * 8 + [1] * 4 + [2] * 4
    pseudo_labels = torch.tensor([labelled, unlabelled]).reshape(2, 1, 1, 16)
    weights = weighter.update(pseudo_labels, torch.zeros(1, 1, 1, 16, dtype=torch.int64))
    assert weights.tolist() == pytest.approx([0, 1.321352, 2.641353, 4], abs=1e-6)


def test_dist_without_unlabelled_patches_keeps_the_labelled_ground_truth():
    weighter = DistDW(task(1000, 100, 10, 1))
    weights = weighter.update(labels(0, 1), labels(0, 1))
    assert weights.tolist() == pytest.approx([0, 4 / 3, 8 / 3, 4], abs=1e-6)


def test_diff_over_three_steps_of_the_spec():
    weighter, y = DiffDW(task(4, 4, 0)), labels(0, 0, 0, 0, 1, 1, 1, 1)
    first = weighter.update(labels(0, 0, 0, 0, 0, 0, 1, 1), y)
    assert weighter.last_dice.tolist() == pytest.approx([0.8, 0.666667, 0.5], abs=1e-6)
    assert weighter.learnt[0].tolist() == pytest.approx([0.291161, 0.240203, 0.177275], abs=1e-6)
    assert weighter.unlearnt[0].tolist() == [0, 0, 0]
    assert weighter.reversed_dice[0].tolist() == pytest.approx([0.984, 0.986667, 0.99], abs=1e-6)
    assert first.tolist() == pytest.approx([2.700128, 2.813653, 3], abs=1e-6)
    second = weighter.update(labels(0, 0, 0, 0, 0, 1, 1, 1), y)
    assert second.tolist() == pytest.approx([2.678388, 2.790911, 3], abs=1e-6)
    third = weighter.update(labels(0, 0, 0, 0, 0, 0, 2, 1), y)
    assert weighter.unlearnt[0].tolist() == pytest.approx([0.000187, 0.006968, 0.177275], abs=1e-6)
    assert weighter.reversed_dice[0].tolist() == pytest.approx([0.951211, 0.962395, 0.980596], abs=1e-6)
    assert third.tolist() == pytest.approx([0.669176, 1.449238, 3], abs=1e-6)


def test_diff_window_sums_the_last_tau_steps():
    weighter, y = DiffDW(task(4, 4, 0), tau=2, accumulate="window"), labels(0, 0, 1, 1)
    for prediction in ((0, 0, 0, 1), (0, 0, 1, 1), (0, 0, 1, 1)):
        weighter.update(labels(*prediction), y)
    # the last two predictions are perfect, so what is left of the reversed Dice is the absent class alone
    assert weighter.reversed_dice.sum(0).tolist() == pytest.approx([0, 0, 1.0], abs=1e-6)


def test_diff_can_skip_absent_classes():
    weighter, y = DiffDW(task(4, 4, 1), absent="skip"), labels(0, 0, 1, 1)
    weighter.update(labels(0, 0, 0, 1), y)
    assert weighter.learnt[0, 2] == 0 and weighter.reversed_dice[0, 2] == 1 and weighter.last_dice[2] < 1e-7


def test_crest_of_the_worked_example():
    rates = CReSTWeights(task(1000, 100, 10, 1)).rates
    assert rates(torch.tensor([1000, 100, 10, 1])).tolist() == pytest.approx([0.1, 0.215443, 0.464159, 1], abs=1e-6)
    # of the two classes with 7 voxels the lower index counts as the more frequent one
    assert rates(torch.tensor([500, 7, 60, 7])).tolist() == pytest.approx([0.241014, 0.493242, 0.241014, 1], abs=1e-6)
    assert rates(torch.tensor([8, 4, 4, 0])).tolist() == pytest.approx([0.001077, 0.793701, 0.793701, 1], abs=1e-6)


def test_crest_ranks_a_tie_by_index():
    rates = CReSTWeights(task(1, 1, 1)).rates(torch.tensor([4, 4, 32]))
    assert rates.tolist() == pytest.approx([0.5, 1, 0.5], abs=1e-6)  # in order 2, 0, 1; ascending and flipped: 2, 1, 0


UNLABELLED = [0] * 8 + [1] * 4 + [2] * 4
BOTH_HALVES = torch.tensor([[3] * 16, UNLABELLED]).reshape(2, 1, 1, 16)  # labelled patches first


def test_crest_follows_the_unlabelled_pseudo_labels():
    weighter = CReSTWeights(task(1000, 100, 10, 1))
    weights = weighter.update(BOTH_HALVES, torch.zeros(1, 1, 1, 16, dtype=torch.int64))
    assert weights.tolist() == pytest.approx([0.099011, 0.221226, 0.467454, 1], abs=1e-6)


def test_crest_without_unlabelled_patches_keeps_the_labelled_ground_truth():
    weights = CReSTWeights(task(1000, 100, 10, 1)).update(labels(0, 1), labels(0, 1))
    assert weights.tolist() == pytest.approx([0.1, 0.215443, 0.464159, 1], abs=1e-6)


def test_simis_of_the_worked_example():
    gap = SimiSWeights.gap
    assert gap(torch.tensor([1000, 100, 10, 1])).tolist() == pytest.approx([0, 3.240324, 3.564356, 3.596760], abs=1e-6)
    assert gap(torch.tensor([8, 4, 4, 0])).tolist() == pytest.approx([0, 1, 1, 2], abs=1e-6)
    start = SimiSWeights(task(1000, 100, 10, 1)).weights
    assert start.tolist() == pytest.approx([3.96, 3.992403, 3.995644, 3.995968], abs=1e-6)


def test_simis_follows_the_pseudo_labels_of_both_halves():
    weighter = SimiSWeights(task(1000, 100, 10, 1))
    halves = torch.tensor(UNLABELLED).reshape(2, 1, 1, 8)
    weights = weighter.update(halves, torch.zeros(1, 1, 1, 8, dtype=torch.int64))
    assert weights.tolist() == pytest.approx([3.9204, 3.962479, 3.965687, 3.976008], abs=1e-6)


def test_simis_without_unlabelled_patches_follows_the_labelled_ones():
    weights = SimiSWeights(task(1000, 100, 10, 1)).update(labels(*UNLABELLED), labels(*[IGNORE] * 16))
    assert weights.tolist() == pytest.approx([3.9204, 3.962479, 3.965687, 3.976008], abs=1e-6)


def test_cld_of_the_worked_example_whatever_is_predicted():
    weighter = CLDWeights(task(1000, 100, 10, 1))
    for _ in range(2):
        weights = weighter.update(BOTH_HALVES, labels(*[0] * 16))
        assert weights.tolist() == pytest.approx([1, 2.154435, 4.641589, 10], abs=1e-6)


def test_cld_takes_a_class_without_labelled_voxels_for_one_with_a_single_voxel():
    assert CLDWeights(task(1000, 0)).weights.tolist() == pytest.approx([1, 10], abs=1e-6)


PAIRS_OF_THE_DHC_PAPER = [  # rows of its Table 3, network A and network B
    ("none", "none"),
    ("dist", "dist"),
    ("diff", "diff"),
    ("diff", "dist"),
    ("dist", "crest"),
    ("dist", "simis"),
    ("diff", "crest"),
    ("diff", "simis"),
]


@pytest.mark.parametrize("method", ["cps", "dhc"])
@pytest.mark.parametrize(("a", "b"), [*PAIRS_OF_THE_DHC_PAPER, ("crest", "diff"), ("cld", "simis")])
def test_each_network_of_a_pair_is_weighted_by_its_own_predictions(method: str, a: str, b: str):
    batch = example_batch()
    model = find("methods", method)(EXAMPLE_TASK, build_fixed(), weighter_a=a, weighter_b=b)
    logs = model.step(batch, HALFWAY).logs
    for weights, name, logits in ((logs["weights_a"], a, LOGITS_A), (logs["weights_b"], b, LOGITS_B)):
        alone = make_weighter(name, EXAMPLE_TASK).update(logits.argmax(1), batch.y_l)
        assert weights.tolist() == alone.tolist()


@pytest.mark.parametrize("name", list(WEIGHTERS))
def test_weights_stay_finite_on_empty_and_unannotated_batches(name: str):
    weighter = make_weighter(name, task(10, 0, 0))
    for y in (labels(0, 0, 0, 0), labels(IGNORE, IGNORE, IGNORE, IGNORE)):
        weights = weighter.update(torch.zeros(2, 1, 1, 4, dtype=torch.int64), y)
        assert torch.isfinite(weights).all() and weights.shape == (3,)


def test_weighters_are_made_by_name_and_options():
    made = make_weighter({"name": "diff", "tau": 20}, task(1, 1))
    assert isinstance(made, DiffDW) and made.tau == 20
    with pytest.raises(OptionError, match=r"No class weighter is called 'dits'\. Did you mean 'dist'\?"):
        make_weighter("dits", task(1, 1))
    with pytest.raises(OptionError, match=r"DiffDW has no option 'tua'\. Did you mean 'tau'\?"):
        make_weighter({"name": "diff", "tua": 20}, task(1, 1))
