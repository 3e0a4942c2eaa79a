"""UniMatch: its worked example, who teaches whom, and its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods.scripted_networks import build_scripted, logits_of, script
from torch import Tensor

from tailseg.checks import LATER_STEP, example_batch, example_task, make_example
from tailseg.core import Batch, Task
from tailseg.methods import unimatch
from tailseg.methods.unimatch import UniMatch
from tailseg.parts.pseudo_labels import PseudoLabels

TASK = Task(("background", "a", "b", "c"), 1, 2, (1.0, 1.0), (1000, 100, 10, 10))
PROBS = [[0.7, 0.1, 0.1, 0.1], [0.2, 0.6, 0.1, 0.1], [0.1, 0.2, 0.6, 0.1], [0.25] * 4]
CONFIDENCE = torch.tensor([0.7, 0.6, 0.6, 0.25]).reshape(1, 2, 2)
LABELS = torch.arange(4).reshape(1, 2, 2)


def pixels(rows: list[list[float]]) -> Tensor:
    """(1, K, 2, 2) logs."""
    return torch.tensor(rows).T.reshape(1, len(rows[0]), 2, 2).log()


def scripted(**options: Any) -> UniMatch:
    """Of v: sure of class 2. Of [x; u; dropped u]: class 0, class 1, nothing. Of [u_1; u_2]: nothing."""
    sure = [logits_of(torch.full((1, 2, 2), label), 4) for label in (2, 0, 1)]
    nothing = torch.zeros(1, 4, 2, 2)
    answers = (sure[0], torch.cat([sure[1], sure[2], nothing]), torch.cat([nothing, nothing]))
    return UniMatch(TASK, build_scripted(*answers), **options)


def batch_of_three() -> Batch:
    """x is 0, u is 1, v is 2 everywhere."""
    image = torch.ones(1, 1, 2, 2)
    return Batch(image * 0, torch.zeros(1, 2, 2, dtype=torch.int64), torch.cat([image, image * 2]))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Strong views are the images; the box of the first views is the left column, of the second the right one."""
    boxes = torch.tensor([[[True, False]] * 2, [[False, True]] * 2])
    monkeypatch.setattr(unimatch, "strong_view", lambda x: x)
    monkeypatch.setattr(unimatch, "cutmix_boxes", lambda count, sides, device: boxes)
    return monkeypatch


@pytest.mark.parametrize(("tau", "expected"), [(0.2, 0.2554653), (0.5, 0.3424860), (0.65, 0.7643514), (0.95, 0.0)])
def test_dice_of_the_worked_example(tau: float, expected: float):
    loss = scripted()._unsup_loss(pixels(PROBS), PseudoLabels(LABELS, tau <= CONFIDENCE))
    assert loss.item() == pytest.approx(expected, abs=1e-7)


def test_a_target_is_kept_where_its_largest_probability_reaches_tau():
    target = PseudoLabels.of(pixels(PROBS), 0.5)
    assert target.labels[0, :, :].flatten().tolist()[:3] == [0, 1, 2]
    assert target.kept.flatten().tolist() == [True, True, True, False]
    assert PseudoLabels.of(pixels([[0.125, 0.125, 0.5, 0.25]] * 4), 0.5).kept.all()  # as sure as tau is sure enough


def test_the_total_of_the_worked_example(monkeypatch: pytest.MonkeyPatch):
    method, parts = scripted(), iter([0.5, 0.6, 0.4])
    monkeypatch.setattr(unimatch, "cross_entropy", lambda *_: torch.tensor(0.8))
    monkeypatch.setattr(method, "_dice", lambda *_: torch.tensor(0.8))
    monkeypatch.setattr(method, "_unsup_loss", lambda *_: torch.tensor(next(parts)))
    losses = method.step(batch_of_three(), LATER_STEP).losses
    assert torch.stack([*losses.values()]).sum().item() == pytest.approx(0.6375, abs=1e-6)
    assert losses["strong"].item() == pytest.approx(0.1375, abs=1e-6)


def test_passes_modes_and_images_are_those_of_the_algorithm(plain: pytest.MonkeyPatch):
    method = scripted()
    method.step(batch_of_three(), LATER_STEP)
    (v, v_training, v_grad), (joint, training, grad), (strong, strong_training, _) = script(method).asked
    assert (v == 2).all() and not v_training and not v_grad
    assert (joint[0] == 0).all() and (joint[1] == 1).all() and set(joint[2].unique().tolist()) <= {0.0, 2.0}
    assert training and grad and strong_training
    assert strong[0, 0].tolist() == [[2, 1], [2, 1]]
    assert strong[1, 0].tolist() == [[1, 2], [1, 2]]
    assert method.net.training


def test_strong_views_learn_the_labels_of_v_inside_the_box(plain: pytest.MonkeyPatch):
    targets: list[PseudoLabels] = []
    method = scripted()
    plain.setattr(method, "_unsup_loss", lambda log_probs, target: targets.append(target) or log_probs.sum() * 0)
    method.step(batch_of_three(), LATER_STEP)
    first, second, dropped = (target.labels[0].tolist() for target in targets)
    assert first == [[2, 1], [2, 1]]
    assert second == [[1, 2], [1, 2]]
    assert dropped == [[1, 1], [1, 1]]
    assert all(target.kept.all() for target in targets)


def test_confidence_is_mixed_like_the_labels(plain: pytest.MonkeyPatch):
    method, targets = scripted(), []
    answers = script(method).answers
    answers[0].data /= 100  # no longer sure of v
    plain.setattr(method, "_unsup_loss", lambda log_probs, target: targets.append(target) or log_probs.sum() * 0)
    output = method.step(batch_of_three(), LATER_STEP)
    assert targets[0].kept[0].tolist() == [[False, True], [False, True]]
    assert targets[2].kept.all()
    assert output.logs["kept"] == 1 and output.logs["kept_mix"] == 0


def test_targets_get_no_gradient(plain: pytest.MonkeyPatch):
    method = scripted()
    losses = method.step(batch_of_three(), LATER_STEP).losses
    (losses["strong"] + losses["feature"]).backward()
    of_v, joint, strong = script(method).answers
    assert of_v.grad is None
    assert not joint.grad[:2].any() and joint.grad[2].any()
    assert strong.grad[0].any() and strong.grad[1].any()


def test_labels_of_v_leave_the_running_statistics_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unimatch, "cutmix_boxes", lambda n, sides, device: torch.zeros(n, *sides, dtype=torch.bool))
    task = example_task(3, 1, 2)
    batch = example_batch(task, 2, 4)
    states = []
    for shift in (0.0, 3.0):  # of v, of which nothing is pasted
        other = Batch(batch.x_l, batch.y_l, torch.cat([batch.x_u[:2], batch.x_u[2:] + shift]))
        model = make_example(UniMatch, task)
        torch.manual_seed(0)
        model.step(other, LATER_STEP)
        states.append({name: value for name, value in model.state_dict().items() if "running" in name})
    assert states[0] and all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_cross_entropy_can_replace_the_dice_on_unlabelled_images(plain: pytest.MonkeyPatch):
    losses = scripted(unsup="ce").step(batch_of_three(), LATER_STEP).losses
    assert losses["strong"].item() == pytest.approx(0.25 * torch.tensor(4.0).log().item(), abs=1e-6)
    assert losses["feature"].item() == pytest.approx(0.25 * torch.tensor(4.0).log().item(), abs=1e-6)


def test_the_background_can_be_left_out_of_every_dice():
    target = PseudoLabels(LABELS, CONFIDENCE >= 0.2)
    with_background = scripted()._unsup_loss(pixels(PROBS), target)
    without = scripted(include_background=False)._unsup_loss(pixels(PROBS), target)
    background = 1 - 2 * 0.7 / (0.49 + 0.04 + 0.01 + 0.0625 + 1)
    assert without.item() == pytest.approx((4 * with_background.item() - background) / 3, abs=1e-5)


@pytest.mark.parametrize(("unlabelled", "way_out"), [(0, 2), (1, 2), (3, 4), (5, 6)])
def test_an_odd_number_of_unlabelled_patches_is_refused_with_the_way_out(unlabelled: int, way_out: int):
    with pytest.raises(ValueError, match=rf"data\.batch \[2, {unlabelled}\].*try \[2, {way_out}\]"):
        scripted().check_batch(2, unlabelled, (16, 16))
    scripted().check_batch(2, way_out, (16, 16))
