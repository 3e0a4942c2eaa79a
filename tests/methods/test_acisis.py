"""ACISIS: the worked example, the rates that it samples with, and the mistake that made the published tables."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from methods.fixed_networks import build_fixed
from torch import Tensor

from tailseg.checks import check_method, example_batch, example_task
from tailseg.core import IGNORE, Batch, Progress, Task
from tailseg.methods.acisis import ACISIS
from tailseg.options import OptionError

PROBS = torch.tensor(  # (4, 6)
    [
        [0.7, 0.5, 0.5, 0.1, 0.3, 0.25],
        [0.1, 0.3, 0.3, 0.2, 0.2, 0.2],
        [0.1, 0.1, 0.1, 0.4, 0.3, 0.3],
        [0.1, 0.1, 0.1, 0.3, 0.2, 0.25],
    ]
)
LABELS = torch.tensor([0, 0, 1, 2, 3, 2])
REORDERED = PROBS[[1, 0, 2, 3]], LABELS.flip(0)  # the second sample, where there are two
TASK = Task(("background", "a", "b", "c"), 1, 2, (1.0, 1.0), (100, 10, 10, 10))
ONE_STEP = Progress(step=0, total_steps=300, steps_per_epoch=1)
LAST = Progress(step=301, total_steps=300, steps_per_epoch=1)  # full weight

CC = [1, 0.828756, 0.875592, 0.819748]


def labelled(*samples: tuple[Tensor, Tensor], **options: Any) -> tuple[ACISIS, Batch]:
    """The method on networks that answer with these probabilities, and the batch of their labels."""
    probs = torch.stack([p.reshape(4, 2, 3) for p, _ in samples])
    y = torch.stack([y.reshape(2, 3) for _, y in samples])
    method = ACISIS(TASK, build_fixed(probs.log()), top=3, **options)
    return method, Batch(torch.zeros(len(y), 1, 2, 3), y, torch.zeros(0, 1, 2, 3))


def unlabelled(logits: Tensor, teacher: Tensor | None = None) -> tuple[ACISIS, Batch]:
    """One labelled voxel and unlabelled ones with these logits (4, V); the teacher's are the same unless given."""
    v = logits.shape[1]
    row = logits.reshape(1, 4, 1, v)
    method = ACISIS(TASK, build_fixed(torch.cat([row, row])))
    method.teacher.net.decoders[0].logits.data = row if teacher is None else teacher.reshape(1, 4, 1, v)
    images = torch.zeros(1, 1, 1, v)
    return method, Batch(images, torch.zeros(1, 1, v, dtype=torch.int64), images)


def test_indicators_of_the_worked_example():
    method, batch = labelled((PROBS, LABELS))
    method.step(batch, ONE_STEP)
    entropy, confidence, margin = method.indicators.tolist()
    assert entropy == pytest.approx([-4.168123, -1.950687, -2.044357, -1.125364], abs=1e-6)
    assert confidence == pytest.approx([0.6, 0.3, 0.35, 0.2], abs=1e-6)
    assert margin == pytest.approx([0, 0.2, 0, 0.1], abs=1e-6)
    assert method.records == 1


def test_rates_of_the_worked_example():
    method, batch = labelled((PROBS, LABELS))
    method.step(batch, ONE_STEP)
    method.after_step(ONE_STEP)
    assert method.confidence.tolist() == pytest.approx([0.01 * cc for cc in CC], abs=1e-8)
    assert method.rate.tolist() == pytest.approx([0.995463, 0.999773, 0.998593, 1], abs=1e-6)


def test_rates_of_the_worked_example_without_memory():
    method, batch = labelled((PROBS, LABELS), confidence_decay=0.0)
    method.step(batch, ONE_STEP)
    method.after_step(ONE_STEP)
    assert method.confidence.tolist() == pytest.approx(CC, abs=1e-6)
    assert method.rate.tolist() == pytest.approx([0, 0.879701, 0.395748, 1], abs=2e-6)


@pytest.mark.parametrize(
    ("official", "expected"), [(False, [0.4, 0.2, 0.225, 0.15]), (True, [0.6375, 0.55, 0.45, 0.3])]
)
def test_confidence_of_two_samples(official: bool, expected: list[float]):
    method, batch = labelled((PROBS, LABELS), REORDERED, official_broadcast=official)
    method.step(batch, ONE_STEP)
    assert method.indicators[1].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("official", [True, False])
def test_one_sample_knows_no_other(official: bool):
    method, batch = labelled((PROBS, LABELS), official_broadcast=official)
    method.step(batch, ONE_STEP)
    assert method.indicators[1].tolist() == pytest.approx([0.6, 0.3, 0.35, 0.2], abs=1e-6)


def test_the_official_indicators_are_those_of_the_broadcast_product():
    probs = torch.randn(3, 4, 2, 3, 5, generator=torch.Generator().manual_seed(0)).softmax(1)
    y = torch.randint(0, 4, (3, 1, 2, 3, 5), generator=torch.Generator().manual_seed(1))
    method = ACISIS(example_task(), build_fixed(probs))
    method.record(probs.log(), y[:, 0])
    for k in range(4):
        mask, p = y == k, probs[:, k]
        voxels = mask.sum() + 1e-12
        entropy = (p.unsqueeze(1) * torch.log(probs + 1e-12) * mask.unsqueeze(1)).sum() / voxels
        confidence = (p * mask).sum() / voxels
        margin = ((probs.amax(1) - p) * mask).sum() / voxels
        expected = [entropy.item(), confidence.item(), margin.item()]
        assert method.indicators[:, k].tolist() == pytest.approx(expected, rel=1e-5)


def test_voxels_nobody_annotated_count_in_no_indicator():
    reference, _ = labelled((PROBS, LABELS))
    reference.record(PROBS.log()[None, :, :4].reshape(1, 4, 2, 2), LABELS[:4].reshape(1, 2, 2))
    method, _ = labelled((PROBS, LABELS))
    y = LABELS.clone()
    y[4:] = IGNORE
    method.record(PROBS.log().reshape(1, 4, 2, 3), y.reshape(1, 2, 3))
    assert torch.allclose(method.indicators, reference.indicators)


def test_an_absent_class_adds_nothing():
    method, _ = labelled((PROBS, LABELS))
    method.record(PROBS.log().reshape(1, 4, 2, 3), torch.zeros(1, 2, 3, dtype=torch.int64))
    assert (method.indicators[:, 1:] == 0).all()


def test_indicators_are_averaged_over_an_epoch_and_fused_at_its_end():
    method, batch = labelled((PROBS, LABELS))
    for step in range(3):
        progress = Progress(step, 300, 3)
        assert (method.rate == 1).all()
        method.step(batch, progress)
        method.after_step(progress)
    assert method.rate.tolist() == pytest.approx([0.995463, 0.999773, 0.998593, 1], abs=1e-6)
    assert (method.indicators == 0).all() and method.records == 0


def test_accumulated_gradients_are_more_records_of_one_step():
    method, batch = labelled((PROBS, LABELS))
    for _ in range(4):
        method.step(batch, ONE_STEP)
    method.after_step(ONE_STEP)
    assert method.rate.tolist() == pytest.approx([0.995463, 0.999773, 0.998593, 1], abs=1e-6)


def test_without_a_fusion_every_voxel_is_sampled():
    method, batch = unlabelled(torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)))
    assert method.step(batch, LAST).logs["sampled"] > 0.999


@pytest.mark.parametrize(("label", "rate"), [(0, 0.3), (1, 1.0), (2, 0.6), (3, 0.9)])
def test_voxels_are_sampled_at_the_rate_of_the_class_the_student_predicts(label: int, rate: float):
    logits = torch.zeros(4, 100_000)
    logits[label] = 2.0
    method, batch = unlabelled(logits, teacher=logits.roll(1, 0))
    method.rate.copy_(torch.tensor([0.3, 1, 0.6, 0.9]))
    torch.manual_seed(0)
    assert method.step(batch, LAST).logs["sampled"].item() == pytest.approx(rate, abs=0.005)


def test_a_sampled_voxel_weighs_as_the_power_of_the_students_confidence():
    logits = torch.tensor([[2.0, 0, 0, 0]] * 3).T
    teacher = torch.tensor([[0.0, 0, 3, 0]] * 3).T
    method, batch = unlabelled(logits, teacher)
    peak = math.exp(2) / (math.exp(2) + 3)
    assert peak == pytest.approx(0.711235, abs=1e-6)
    nll = 2 - math.log(peak)  # of class 2, which the teacher says
    loss = method.step(batch, LAST).losses["unsup"]
    assert loss.item() == pytest.approx(0.1 * 0.599818 * nll, abs=1e-6)


def test_only_unlabelled_patches_learn_from_the_teacher_and_not_through_the_map():
    logits = torch.tensor([[2.0, 0, 0, 0]] * 3).T
    teacher = torch.tensor([[0.0, 0, 3, 0]] * 3).T
    method, batch = unlabelled(logits, teacher)
    method.step(batch, LAST).losses["unsup"].backward()
    gradient = method.net.decoders[0].logits.grad  # (2, 4, 1, 3)
    assert gradient is not None
    plain = logits.softmax(0) - torch.tensor([0.0, 0, 1, 0])[:, None]  # of cross-entropy, (4, 3)
    assert (gradient[0] == 0).all()
    assert torch.allclose(gradient[1, :, 0], 0.1 * 0.599818 * plain / 3, atol=1e-6)
    assert method.teacher.net.decoders[0].logits.grad is None


def test_the_teacher_sees_the_unlabelled_patches_as_they_are():
    seen = []
    method, batch = unlabelled(torch.zeros(4, 3))
    method.teacher.net.register_forward_pre_hook(lambda net, args: seen.append(args[0]))
    method.step(batch, LAST)
    assert len(seen) == 1 and seen[0] is batch.x_u


@pytest.mark.parametrize(("step", "share"), [(9, 1.0), (10, 0.5), (30, 0.25), (995, 0.01)])
def test_the_teacher_counts_epochs(step: int, share: float):
    method = ACISIS(TASK, build_fixed(torch.ones(1, 4, 1, 3)))
    method.teacher.net.decoders[0].logits.data.zero_()
    method.after_step(Progress(step, 3000, 10))
    moved = method.teacher.net.decoders[0].logits.flatten().tolist()
    assert moved == pytest.approx([share] * 12, abs=1e-6)


def test_of_few_classes_all_are_kept_and_none_is_refused():
    assert ACISIS(TASK, build_fixed()).top == 4
    with pytest.raises(OptionError, match=r"method.top is 0"):
        ACISIS(TASK, build_fixed(), top=0)


def test_rates_survive_a_resume():
    method, batch = labelled((PROBS, LABELS), confidence_decay=0.0)
    method.step(batch, ONE_STEP)
    method.after_step(ONE_STEP)
    method.step(batch, Progress(1, 300, 2))
    twin, _ = labelled((PROBS, LABELS))
    twin.load_state_dict(method.state_dict())
    assert torch.equal(twin.rate, method.rate) and torch.equal(twin.indicators, method.indicators)
    assert twin.records == 1


def test_its_intended_formula_keeps_the_contract():
    check_method(ACISIS, example_task(3, 1, 2), official_broadcast=False, top=2)


def test_a_long_run_stays_finite_where_nothing_is_annotated():
    task = example_task(3, 1, 2)
    batch = example_batch(task)
    nothing = Batch(batch.x_l, torch.full_like(batch.y_l, IGNORE), batch.x_u)
    method = ACISIS(task, build_fixed(torch.randn(4, 3, 16, 16)))
    method.teacher.net.decoders[0].logits.data = torch.randn(2, 3, 16, 16)
    for step in range(3):
        method.step(nothing, Progress(step, 300, 1))
        method.fuse()
    assert torch.isfinite(method.rate).all()
