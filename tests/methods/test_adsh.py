"""Adsh: thresholds of its worked example, exact and through the bank, what the grid costs, and the masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods.fixed_networks import EXAMPLE_TASK, HALFWAY, build_fixed, example_batch
from parts.worked_example import Z1, logits
from torch import Tensor

from tailseg.core import Batch
from tailseg.methods.adsh import STEPS, Adsh, grid_index, grid_values, ranked_values, shared_ranks
from tailseg.parts.losses import cross_entropy, log_softmax, masked_cross_entropy
from tailseg.parts.ramps import ramp_up

PROBS = [  # of three classes in eight voxels of two patches
    [0.95, 0.92, 0.97, 0.6, 0.85, 0.2, 0.3, 0.1],
    [0.03, 0.05, 0.02, 0.3, 0.1, 0.7, 0.6, 0.2],
    [0.02, 0.03, 0.01, 0.1, 0.05, 0.1, 0.1, 0.7],
    [0.99, 0.8, 0.91, 0.5, 0.1, 0.25, 0.1, 0.2],
    [0.005, 0.15, 0.05, 0.4, 0.85, 0.55, 0.3, 0.3],
    [0.005, 0.05, 0.04, 0.1, 0.05, 0.2, 0.6, 0.5],
]
BANK = torch.tensor(PROBS).reshape(2, 3, 1, 1, 8)
LABELLED = torch.zeros(1, 3, 1, 1, 8)
BATCH = Batch(torch.zeros(1, 1, 1, 1, 8), torch.zeros(1, 1, 1, 8, dtype=torch.int64), torch.zeros(2, 1, 1, 1, 8))
ALL_WEIGHT = 1 / ramp_up(HALFWAY)  # the cps loss as such
GRID = 1.01 / STEPS  # a threshold's largest error


def make(**options: Any) -> Adsh:
    answer = torch.cat([LABELLED, BANK.log()])
    return Adsh(EXAMPLE_TASK, build_fixed(answer, answer), **options)


def exact_histogram(bank: Tensor) -> tuple[Tensor, Tensor]:
    """How often each class has each of the values that occur, and these values."""
    values = bank.unique()
    columns = bank.movedim(1, 0).flatten(1)  # (K, V)
    return (columns.unsqueeze(2) == values).sum(1), values


@pytest.mark.parametrize(
    ("empty", "counts", "ranks", "thresholds"),
    [(0, [9, 4, 3], [5, 2, 1], [0.85, 0.60, 0.60]), (1, [17, 4, 3], [5, 1, 0], [0.85, 0.70, 0.70])],
)
def test_thresholds_of_the_worked_example(empty: int, counts: list[int], ranks: list[int], thresholds: list[float]):
    bank = torch.cat([BANK, torch.zeros(empty, *BANK.shape[1:])])
    predicted = torch.bincount(bank.argmax(1).flatten(), minlength=3)
    assert predicted.tolist() == counts
    found = shared_ranks(predicted, (bank > 0.9).sum((0, 2, 3, 4)))
    assert found.tolist() == ranks
    histogram, values = exact_histogram(bank)
    assert ranked_values(histogram, found, values).tolist() == pytest.approx(thresholds, abs=1e-7)


def test_where_everything_is_sure_background_the_last_voxel_is_taken():
    bank = torch.tensor([[0.95, 0.04, 0.01], [0.99, 0.005, 0.005]]).T[None, :, None, None, :]
    predicted, sure = torch.tensor([2, 0, 0]), torch.tensor([2, 0, 0])
    ranks = shared_ranks(predicted, sure)
    assert ranks.tolist() == [2, 0, 0]  # no entry 2 among two voxels: the authors' code fails
    assert ranked_values(exact_histogram(bank)[0], ranks, bank.unique()).tolist() == pytest.approx([0.95, 0.04, 0.01])


@pytest.mark.parametrize(
    ("options", "thresholds"),
    [
        ({"bank": 2}, [0.85, 0.60, 0.60]),
        ({"bank": 3}, [0.85, 0.70, 0.70]),
        ({"bank": 3, "empty_slots": "ignore"}, [0.85, 0.60, 0.60]),
        ({"bank": 1}, [0.85, 0.60, 0.60]),  # takes the two patches of a step all the same
    ],
)
def test_the_second_step_makes_the_thresholds_of_the_worked_example(options: dict[str, Any], thresholds: list[float]):
    method = make(**options)
    first = method.step(BATCH, HALFWAY).logs
    assert first["thresholds_a"].tolist() == [0, 0, 0] and first["kept_a"] == 1
    second = method.step(BATCH, HALFWAY).logs
    assert second["thresholds_a"].tolist() == pytest.approx(thresholds, abs=GRID)
    assert second["thresholds_b"].tolist() == second["thresholds_a"].tolist()


def test_masks_of_the_worked_example():
    mask = Adsh._class_mask(BANK[:1], torch.tensor([0.85, 0.60, 0.60]))[0, :, 0, 0].int().tolist()
    assert mask == [[1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]]


def test_the_grid_moves_a_threshold_by_less_than_its_bound():
    torch.manual_seed(0)
    probs = (5 * torch.randn(2, 6, 10, 20, 20)).softmax(1)
    columns = probs.movedim(1, 0).flatten(1)  # (K, V)
    histogram = torch.stack([torch.bincount(grid_index(column), minlength=STEPS + 1) for column in columns])
    for ranks in (torch.tensor([0, 1, 10, 500, 4000, 7999]), torch.tensor([2, 7999, 6000, 0, 100, 3])):
        exact = columns.sort(1, descending=True)[0].gather(1, ranks.unsqueeze(1)).squeeze(1)
        error = (ranked_values(histogram, ranks, grid_values()) - exact).abs()
        assert (error <= exact.sqrt() / STEPS + 1e-7).all()


@pytest.mark.parametrize(("bank", "steps"), [(4, 3), (3, 2), (53, 27), (48, 25)])
def test_thresholds_are_renewed_as_often_as_published(bank: int, steps: int):
    method = make(bank=bank)
    filled = []
    for _ in range(steps + 1):
        method.step(BATCH, HALFWAY)
        filled.append(int(method.filled))
    assert filled == [*range(2, 2 * steps, 2), 0, 2]
    assert method.histogram.sum().item() == 2 * 3 * 2 * 8  # of both networks, the last step's alone


def test_the_step_that_renews_is_not_in_the_bank():
    method = make(bank=2)
    method.step(BATCH, HALFWAY)
    for net in (method.net_a, method.net_b):
        net.decoders[0].logits.data[1:] = 0
    thresholds = method.step(BATCH, HALFWAY).logs["thresholds_a"]
    assert thresholds.tolist() == pytest.approx([0.85, 0.60, 0.60], abs=GRID)


def test_cross_entropy_of_masked_logits_of_the_worked_example():
    """The mask is that of the network that makes the pseudo-labels; it multiplies the logits of the one that learns."""
    probs_b = torch.tensor([[0.5, 0.48, 0.02], [0.3, 0.4, 0.3], [0.02, 0.48, 0.5], [0.02, 0.9, 0.08]]).T
    z_a, z_b = logits(Z1), probs_b.log()[None, :, None, None, :]
    method = Adsh(EXAMPLE_TASK, build_fixed(z_a, z_b), cps_weight=ALL_WEIGHT)
    method.thresholds[1] = torch.tensor([0.01, 0.45, 0.45])
    mask = Adsh._class_mask(z_b.softmax(1), method.thresholds[1])[0, :, 0, 0]
    assert mask.int().tolist() == [[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0]]
    batch = example_batch()
    loss = method.step(Batch(batch.x_l, batch.y_l, batch.x_u[:0]), HALFWAY).losses["cps"]
    unmasked = cross_entropy(log_softmax(z_b), z_a.argmax(1))  # A's thresholds are still 0
    assert loss.item() - unmasked.item() == pytest.approx(0.650525, abs=1e-6)
    loss.backward()
    gradient = method.net_a.decoders[0].logits.grad
    assert gradient is not None
    gradient = gradient[0, :, 0, 0]
    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).all()


def test_first_steps_are_plain_cps():
    method = Adsh(EXAMPLE_TASK, build_fixed(), cps_weight=ALL_WEIGHT)
    assert method.step(example_batch(), HALFWAY).losses["cps"].item() == pytest.approx(1.758314, abs=1e-6)


def test_faithful_thresholds_rank_the_voxels_predicted_as_the_class():
    method = make(bank=2, variant="faithful", cps_weight=ALL_WEIGHT)
    assert method.step(BATCH, HALFWAY).logs["thresholds_a"].tolist() == pytest.approx([0.9] * 3)
    output = method.step(BATCH, HALFWAY)
    # int(5/9 * 9) - 1 = 4th of .99 .97 .95 .92 .91 ...; int(5/9 * 4) - 1 = 1st of .85 .7 ...; 0th of .7 .6 .5
    assert output.logs["thresholds_a"].tolist() == pytest.approx([0.91, 0.70, 0.70], abs=GRID)
    answer = torch.cat([LABELLED, BANK.log()])
    confidence, pseudo_labels = answer.softmax(1).max(1)
    mask = confidence >= output.logs["thresholds_a"][pseudo_labels]
    expected = 2 * masked_cross_entropy(log_softmax(answer), pseudo_labels, mask)
    assert output.losses["cps"].item() == pytest.approx(expected.item(), abs=1e-6)


def test_faithful_keeps_the_threshold_of_a_class_that_nothing_was_predicted_as():
    method = make(bank=2, variant="faithful")
    for net in (method.net_a, method.net_b):
        net.decoders[0].logits.data[:, 2] -= 50
    method.step(BATCH, HALFWAY)
    thresholds = method.step(BATCH, HALFWAY).logs["thresholds_a"]
    assert thresholds[2].item() == pytest.approx(0.9) and abs(thresholds[1].item() - 0.9) > 0.01


def test_a_diverged_network_breaks_no_index():
    method = make(bank=2)
    method.net_a.decoders[0].logits.data.fill_(torch.nan)
    assert method.step(BATCH, HALFWAY).losses["cps"].isnan()
