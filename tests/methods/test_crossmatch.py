"""CrossMatch: its worked example, who teaches whom, its threshold and its boxes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods.scripted_networks import build_scripted, logits_of, script
from torch import Tensor

from tailseg.checks import LATER_STEP, example_batch, example_task, make_example
from tailseg.core import Batch, Progress, Task
from tailseg.methods import crossmatch
from tailseg.methods.crossmatch import CrossMatch
from tailseg.parts.pseudo_labels import PseudoLabels

TASK = Task(("background", "a", "b", "c"), 1, 2, (1.0, 1.0), (1000, 100, 10, 10))
BINARY = example_task(2)
LA: dict[str, Any] = {"tau": "la", "kappa": 1.0, "smooth": 1e-5, "include_background": False}


def constant(label: int) -> Tensor:
    """(1, K, 2, 2) logits that are sure of the label."""
    return logits_of(torch.full((1, 2, 2), label), 4)


def scripted(**options: Any) -> CrossMatch:
    """Clean, weak, strong decodes say 3, 2, 1 of v and 0, 1, 2 of u; of strong views nothing. Of x: class 0."""
    of_v = torch.cat([constant(3), constant(2), constant(1)])
    of_u = torch.cat([constant(0), constant(0), constant(1), constant(2)])
    return CrossMatch(TASK, build_scripted(of_v, of_u, torch.zeros(4, 4, 2, 2)), **options)


def batch_of_three() -> Batch:
    """x is 0, u is 1, v is 2 everywhere."""
    image = torch.ones(1, 1, 2, 2)
    return Batch(image * 0, torch.zeros(1, 2, 2, dtype=torch.int64), torch.cat([image, image * 2]))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Strong views are the images; the box of the first views is the left column, of the second the right one."""
    boxes = torch.tensor([[[True, False]] * 2, [[False, True]] * 2])
    monkeypatch.setattr(crossmatch, "strong_view", lambda x: x)
    monkeypatch.setattr(crossmatch, "cutmix_boxes", lambda count, sides, device: boxes)
    return monkeypatch


@pytest.mark.parametrize(("tau", "expected"), [(0.5, 0.1282048), (0.75, 0.1705062), (0.99, 0.0)])
def test_binary_dice_of_the_worked_example(tau: float, expected: float):
    foreground = torch.tensor([0.9, 0.8, 0.3, 0.6])
    log_probs = torch.stack([1 - foreground, foreground]).log().reshape(1, 2, 1, 1, 4)
    labels = torch.tensor([1, 1, 0, 0]).reshape(1, 1, 1, 4)
    confidence = torch.tensor([0.9, 0.6, 0.7, 0.95]).reshape(1, 1, 1, 4)
    method = CrossMatch(BINARY, build_scripted(), **LA)
    assert method._unsup_loss(log_probs, PseudoLabels(labels, confidence >= tau)).item() == pytest.approx(
        expected, abs=1e-6
    )


@pytest.mark.parametrize(("tau", "expected"), [(0.2, 0.2554469), (0.5, 0.3417329)])
def test_dice_over_classes_of_the_worked_example(tau: float, expected: float):
    probs = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.2, 0.6, 0.1, 0.1], [0.1, 0.2, 0.6, 0.1], [0.25] * 4])
    kept = probs.amax(1).reshape(1, 2, 2) >= tau
    target = PseudoLabels(torch.arange(4).reshape(1, 2, 2), kept)
    loss = scripted()._unsup_loss(probs.T.reshape(1, 4, 2, 2).log(), target)
    assert loss.item() == pytest.approx(expected, abs=2e-7)


@pytest.mark.parametrize(("kappa", "expected"), [(1.0, 0.82875), (0.5, 0.683125)])
def test_the_total_of_the_worked_example(kappa: float, expected: float, monkeypatch: pytest.MonkeyPatch):
    method, parts = scripted(kappa=kappa), iter([0.5, 0.6, 0.4, 0.7, 0.45, 0.75, 0.3, 0.9])
    monkeypatch.setattr(crossmatch, "cross_entropy", lambda *_: torch.tensor(0.8))
    monkeypatch.setattr(method, "_dice", lambda *_: torch.tensor(0.8))
    monkeypatch.setattr(method, "_unsup_loss", lambda *_: torch.tensor(next(parts)))
    losses = method.step(batch_of_three(), LATER_STEP).losses
    assert torch.stack([*losses.values()]).sum().item() == pytest.approx(expected, abs=1e-6)
    assert (losses["tkd"] + losses["dkd"]).item() == pytest.approx(0.5 * kappa * 0.5825, abs=1e-6)


def test_passes_modes_and_images_are_those_of_the_algorithm(plain: pytest.MonkeyPatch):
    method = scripted(weak_dropout=0.0, strong_dropout=1.0)
    method.step(batch_of_three(), LATER_STEP)
    (v, v_training, v_grad), (joint, _, _), (strong, _, _) = script(method).asked
    assert v[:, 0, 0, 0].tolist() == [2, 2, 0]  # clean, weak, strong
    assert v_training and not v_grad
    assert joint[:, 0, 0, 0].tolist() == [0, 1, 1, 0]  # x, u clean, weak, strong
    assert strong[:, 0, 0].tolist() == [[2, 1], [1, 2], [1, 2], [0, 0]]  # u_1, u_2, u_2 weak, strong


def test_every_stream_learns_from_the_right_teacher(plain: pytest.MonkeyPatch):
    method, targets = scripted(), []
    plain.setattr(method, "_unsup_loss", lambda log_probs, target: targets.append(target) or log_probs.sum() * 0)
    method.step(batch_of_three(), LATER_STEP)
    assert all(target.kept.all() for target in targets)
    assert [target.labels[0, 0].tolist() for target in targets] == [
        [3, 0],  # p_n1: clean labels, those of v in the left column
        [0, 3],  # p_n2
        [0, 0],  # p_w: not mixed
        [0, 0],  # p_s
        [0, 3],  # p_w2 and p_s2 from the clean teacher
        [0, 3],
        [1, 2],  # p_w2 from the weak one
        [2, 1],  # p_s2 from the strong one
    ]


def test_each_label_counts_by_its_own_confidence(plain: pytest.MonkeyPatch):
    method, targets = scripted(), []
    answers = script(method).answers
    answers[1].data[2] /= 100  # the weakly dropped decode of u is not sure
    answers[0].data[0] /= 100  # nor the clean one of v
    plain.setattr(method, "_unsup_loss", lambda log_probs, target: targets.append(target) or log_probs.sum() * 0)
    output = method.step(batch_of_three(), LATER_STEP)
    yes, no = True, False
    assert [target.kept[0, 0].tolist() for target in targets] == [
        *([no, yes], [yes, no], [yes, yes], [yes, yes], [yes, no], [yes, no]),
        *([no, yes], [yes, yes]),
    ]
    assert output.logs["kept"] == 1 and output.logs["kept_mix"] == 0


def taught(answer: Tensor) -> list[bool]:
    """Which samples of a pass got a gradient; none for a pass without."""
    return [] if answer.grad is None else [bool(sample.any()) for sample in answer.grad]


def test_targets_get_no_gradient(plain: pytest.MonkeyPatch):
    method = scripted()
    losses = method.step(batch_of_three(), LATER_STEP).losses
    of_v, joint, strong = script(method).answers
    losses["dkd"].backward(retain_graph=True)
    assert taught(of_v) == [] and not any(taught(joint))
    assert taught(strong) == [False, False, True, True]
    losses["strong"].backward(retain_graph=True)
    losses["tkd"].backward()
    assert taught(of_v) == []
    assert taught(joint) == [False, False, True, True]
    assert taught(strong) == [True] * 4


def test_the_schedule_of_la_is_a_bound_on_the_entropy_used_on_a_probability():
    method = CrossMatch(BINARY, build_scripted(), **LA)
    bounds = [method.threshold(Progress(step, 14000, 4)) for step in (0, 1, 5000, 9000, 13999)]
    assert bounds == pytest.approx([0.75, 0.521, 0.534, 0.577, 0.668], abs=6e-4)
    assert scripted(tau=0.6).threshold(LATER_STEP) == 0.6


@pytest.mark.parametrize("mix_eval", [True, False])
def test_labels_of_v_move_the_running_statistics_only_in_training_mode(mix_eval: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(crossmatch, "cutmix_boxes", lambda n, sides, device: torch.zeros(n, *sides, dtype=torch.bool))
    task = example_task(3, 1, 2)
    batch = example_batch(task, 2, 4)
    states = []
    for shift in (0.0, 3.0):  # of v, of which nothing is pasted
        other = Batch(batch.x_l, batch.y_l, torch.cat([batch.x_u[:2], batch.x_u[2:] + shift]))
        model = make_example(CrossMatch, task, mix_eval=mix_eval)
        torch.manual_seed(0)
        model.step(other, LATER_STEP)
        states.append({name: value for name, value in model.state_dict().items() if "running" in name})
        assert model.net.training
    assert mix_eval == all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def boxes_of(count: int, sides: tuple[int, ...], **options: Any) -> Tensor:
    torch.manual_seed(0)
    boxes = CrossMatch(BINARY, build_scripted(), **options)._boxes(count, torch.zeros(count, 1, *sides))
    return boxes[boxes.flatten(1).any(1)]


def test_boxes_in_2d_cover_a_fifth_of_the_image():
    assert boxes_of(600, (128, 128)).float().mean().item() == pytest.approx(0.207, abs=0.012)


def test_the_authors_boxes_in_3d_miss_the_end_of_the_first_axis_and_are_cut_on_the_last():
    sides = (56, 56, 40)
    own, official = boxes_of(400, sides), boxes_of(400, sides, box_axes="official")
    assert own[:, 40:].any()
    assert official.shape[1:] == sides and not official[:, 40:].any() and official[..., -1].any()
    assert official.float().mean().item() == pytest.approx(0.170, abs=0.015)
    assert own.float().mean().item() > official.float().mean().item() + 0.02


def test_in_2d_the_axes_of_the_boxes_are_right_either_way():
    assert torch.equal(boxes_of(8, (20, 30)), boxes_of(8, (20, 30), box_axes="official"))


@pytest.mark.parametrize(("unlabelled", "way_out"), [(0, 2), (1, 2), (3, 4), (5, 6)])
def test_an_odd_number_of_unlabelled_patches_is_refused_with_the_way_out(unlabelled: int, way_out: int):
    with pytest.raises(ValueError, match=rf"data\.batch \[2, {unlabelled}\].*try \[2, {way_out}\]"):
        scripted().check_batch(2, unlabelled, (16, 16))
    scripted().check_batch(2, way_out, (16, 16))
