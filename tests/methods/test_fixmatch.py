"""FixMatch: its worked example, what is kept, and mixers."""

from __future__ import annotations

import pytest
import torch
from methods.scripted_networks import build_scripted, logits_of, script
from torch import Tensor

from tailseg.checks import example_batch, example_task, make_example
from tailseg.core import IGNORE, Batch, Progress, Task
from tailseg.methods import fixmatch
from tailseg.methods.fixmatch import FixMatch
from tailseg.parts.losses import ce_soft_dice, log_softmax

TASK = Task(("background", "a", "b"), 1, 3, (1.0, 1.0, 1.0), (1000, 100, 10))
DONE = Progress(step=40, total_steps=100, steps_per_epoch=10)  # the end of the ramp
WEAK = [[4, 0, 0], [1, 0.5, 0], [0, 3.5, 0]]
STRONG = [[1, 0, 0], [2, 0, 1], [0.5, 0.5, 0]]


def rows(voxels: list[list[float]]) -> Tensor:
    """(1, K, 1, 1, V) logits."""
    return torch.tensor(voxels).T[None, :, None, None]


def images(count: int, voxels: int = 3) -> Tensor:
    return torch.randn(count, 1, 1, 1, voxels)


def labelled_three(labels: tuple[int, int, int] = (0, 1, 2)) -> Tensor:
    return torch.tensor(labels).reshape(1, 1, 1, 3)


def example(tau: float | None, weak: Tensor | None = None) -> FixMatch:
    joint = torch.cat([torch.zeros(1, 3, 1, 1, 3), rows(WEAK) if weak is None else weak])
    return FixMatch(TASK, build_scripted(joint, rows(STRONG)), tau=tau)


def batch_of_one() -> Batch:
    return Batch(images(1), labelled_three(), images(1))


@pytest.mark.parametrize(("tau", "expected"), [(0.95, 0.1838149), (0.8, 0.5031549)])
def test_unsupervised_loss_of_the_worked_example(tau: float, expected: float):
    losses = example(tau).step(batch_of_one(), DONE).losses
    assert losses["unsup"].item() == pytest.approx(expected, abs=1e-6)


def test_the_loss_is_divided_by_all_voxels_not_by_those_kept():
    losses = example(0.8).step(batch_of_one(), DONE).losses
    assert losses["unsup"].item() == pytest.approx(0.7547324 * 2 / 3, abs=1e-6)


def test_nothing_kept_is_no_loss():
    assert example(0.99).step(batch_of_one(), DONE).losses["unsup"].item() == 0


def test_a_voxel_that_is_not_sure_is_left_out_and_does_not_become_background():
    weak = rows([[0, 0.5, 0.2]] * 3)  # probabilities .2584, .4260, .3156
    method = example(0.4, weak)
    output = method.step(batch_of_one(), DONE)
    expected = -log_softmax(rows(STRONG))[:, 1].mean()
    assert output.losses["unsup"].item() == pytest.approx(expected.item(), abs=1e-6)
    assert example(0.8, weak).step(batch_of_one(), DONE).losses["unsup"].item() == 0


def test_kept_is_reported_per_class():
    output = example(0.95).step(batch_of_one(), DONE)
    assert output.logs["kept"].tolist() == [0.5, 0.0, 0.0]
    assert output.predicted.tolist() == [3 + 2, 1, 0]


def test_the_threshold_is_lower_in_3d():
    build = build_scripted()
    assert FixMatch(TASK, build).tau == 0.85
    assert FixMatch(example_task(3, 1, 2), build).tau == 0.95
    assert FixMatch(TASK, build, tau=0.0).tau == 0.0


def test_the_weight_climbs_from_a_tenth_to_all_over_two_fifths_of_the_run():
    method = FixMatch(TASK, build_scripted(), weight=2.0)
    weights = [method.unsup_weight(Progress(step, 100, 10)) for step in (0, 20, 40, 99)]
    assert weights == pytest.approx([0.2121, 2 * (0.1 + 0.9 * 0.2865048), 2, 2], abs=1e-4)
    assert FixMatch(TASK, build_scripted(), ramp=0.0).unsup_weight(Progress(0, 100, 10)) == 1


def test_only_the_strong_view_learns_from_unlabelled_images():
    method = example(0.8)
    method.step(batch_of_one(), DONE).losses["unsup"].backward()
    joint, strong = script(method).answers
    assert joint.grad is None or not joint.grad.any()
    assert strong.grad.abs().sum(1).flatten().gt(0).tolist() == [True, False, True]


def test_the_network_sees_weak_views_as_they_are_and_then_strong_ones():
    torch.manual_seed(0)
    batch, method = batch_of_one(), example(0.8)
    method.step(batch, DONE)
    (weak, weak_mode, _), (strong, strong_mode, _) = script(method).asked
    assert torch.equal(weak, batch.x) and weak_mode and strong_mode
    assert not torch.equal(strong, batch.x_u)


def test_dice_can_join_the_cross_entropy():
    joint = torch.cat([torch.zeros(1, 3, 1, 1, 3), rows(WEAK)])
    method = FixMatch(TASK, build_scripted(joint, rows(STRONG)), tau=0.95, unsup="half_ce_dice")
    # class 0: p .5761 on one kept voxel; classes 1 and 2 are not there but predicted: nearly 1 each
    loss = method.step(batch_of_one(), DONE).losses["unsup"].item()
    dice = 1 - (2 * 0.576117 / (0.576117**2 + 1)) / 3
    assert loss == pytest.approx((0.1838149 + dice) / 2, abs=1e-4)


def test_without_unlabelled_images_it_is_supervised():
    logits = torch.randn(1, 3, 1, 1, 3)
    batch = Batch(images(1), labelled_three(), images(0))
    for mixer in ("none", "cutmix", "pic"):
        output = FixMatch(TASK, build_scripted(logits, logits), mixer=mixer).step(batch, DONE)
        assert list(output.losses) == ["sup"]
        assert output.losses["sup"].item() == pytest.approx(ce_soft_dice(log_softmax(logits), batch.y_l).item())


def test_cutmix_mixes_images_pseudo_labels_and_confidence_alike(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fixmatch, "strong_view", lambda x: x)
    labels = torch.stack([torch.full((1, 8, 8), 1), torch.full((1, 8, 8), 2)])
    weak = logits_of(labels, 3)
    weak[1] /= 20  # the second image is not sure, and must not be learnt from wherever it goes
    y_l = torch.full((1, 1, 8, 8), IGNORE)
    x_u = labels.unsqueeze(1).float()
    mixer = {"name": "cutmix", "probability": 1.0, "area": (0.3, 0.3)}
    torch.manual_seed(0)
    method = FixMatch(
        TASK,
        build_scripted(torch.cat([torch.zeros(1, 3, 1, 8, 8), weak]), torch.zeros(2, 3, 1, 8, 8)),
        tau=0.9,
        mixer=mixer,
    )
    output = method.step(Batch(torch.zeros(1, 1, 1, 8, 8), y_l, x_u), DONE)
    mixed = script(method).asked[1][0][:, 0]
    assert len(mixed[0].unique()) == 2
    kept = (mixed == 1).float().mean().item()
    assert output.losses["unsup"].item() == pytest.approx(kept * torch.tensor(3.0).log().item(), abs=1e-5)


def test_pic_trains_on_mixed_labelled_images_and_learns_nothing_from_weak_views():
    torch.manual_seed(0)
    task = example_task(3, 1, 2)
    batch = example_batch(task, 2, 2)
    method = make_example(FixMatch, task, mixer={"name": "pic", "probability": 1.0}, tau=0.5)
    seen: list[tuple[Tensor, bool]] = []
    method.net.encoder.register_forward_pre_hook(lambda _, args: seen.append((args[0], torch.is_grad_enabled())))
    losses = method.step(batch, DONE).losses
    (weak, weak_learns), (mixed, mixed_learns) = seen
    assert torch.equal(weak, batch.x) and not weak_learns
    assert len(mixed) == 4 and mixed_learns
    assert not torch.equal(mixed[:2], batch.x_l)
    assert set(losses) == {"sup", "unsup"}
