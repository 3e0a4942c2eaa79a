"""Mean Teacher: the worked example, who learns from whom, and what its options change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods.fixed_networks import EXAMPLE_TASK, build_fixed, example_batch
from parts.worked_example import LOGITS_A, LOGITS_B
from torch import Tensor

from tailseg.checks import accepted_batch, check_method, example_task, make_example
from tailseg.core import Batch, Progress, Task
from tailseg.methods.mean_teacher import MeanTeacher
from tailseg.options import OptionError

LAST = Progress(step=6000, total_steps=6000, steps_per_epoch=10)
START = Progress(step=0, total_steps=6000, steps_per_epoch=10)


def answer(method: MeanTeacher, logits: Tensor) -> MeanTeacher:
    """The method with a teacher that answers with these logits."""
    method.teacher.net.decoders[0].logits.data = logits
    return method


def two_voxels() -> tuple[MeanTeacher, Batch]:
    task = Task(("background", "a"), 1, 2, (1.0, 1.0), (10, 1))
    student = torch.tensor([[2.0, 0.0], [0.0, 1.0]]).T.reshape(1, 2, 1, 2)
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).T.reshape(1, 2, 1, 2)
    method = answer(MeanTeacher(task, build_fixed(torch.cat([student, student]))), teacher)
    return method, Batch(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 2, dtype=torch.int64), torch.zeros(1, 1, 1, 2))


def test_consistency_is_the_mean_square_over_samples_classes_and_voxels():
    method, batch = two_voxels()
    assert method.step(batch, LAST).losses["consistency"].item() == pytest.approx(0.1 * 0.1179869, abs=1e-8)


@pytest.mark.parametrize(("step", "weight"), [(0, 0.000673795), (1500, 0.006005466), (3000, 0.028650480), (6000, 0.1)])
def test_its_weight_rises_over_the_run(step: int, weight: float):
    method, batch = two_voxels()
    loss = method.step(batch, Progress(step, 6000, 10)).losses["consistency"]
    assert loss.item() == pytest.approx(weight * 0.1179869, abs=1e-8)


def test_without_ramp_it_counts_in_full_and_before_its_start_not_at_all():
    method, batch = two_voxels()
    method.ramp, method.start = 0.0, 1000
    early, late = (method.step(batch, Progress(step, 6000, 10)).losses["consistency"] for step in (999, 1000))
    assert early == 0
    assert late.item() == pytest.approx(0.1 * 0.1179869, abs=1e-8)


def test_the_supervised_loss_is_half_of_ce_and_soft_dice():
    method = MeanTeacher(EXAMPLE_TASK, build_fixed())
    probs = LOGITS_A[:1].softmax(1)[0, :, 0, 0]  # (3, 4)
    target = torch.eye(3)[:, [0, 1, 2, 1]]  # (3, 4)
    ce = -(target * probs.log()).sum() / 4
    dice = (2 * (probs * target).sum(1) + 1e-5) / ((probs**2).sum(1) + target.sum(1) + 1e-5)
    losses = method.step(example_batch(), START).losses
    assert ce.item() == pytest.approx(0.496309, abs=1e-6)
    assert losses["sup"].item() == pytest.approx(((ce + 1 - dice.mean()) / 2).item(), abs=1e-6)


def test_the_gradient_aware_loss_takes_its_place():
    plain = MeanTeacher(EXAMPLE_TASK, build_fixed()).step(example_batch(), START)
    aware = MeanTeacher(EXAMPLE_TASK, build_fixed(), sup="ga").step(example_batch(), START)
    assert aware.losses["sup"] != plain.losses["sup"]
    assert aware.losses["consistency"] == plain.losses["consistency"]


def test_only_the_student_learns_and_only_unlabelled_patches_from_the_teacher():
    method = answer(MeanTeacher(EXAMPLE_TASK, build_fixed()), LOGITS_B[1:])
    method.step(example_batch(), LAST).losses["consistency"].backward()
    gradient = method.net.decoders[0].logits.grad
    assert gradient is not None
    assert (gradient[:1] == 0).all() and (gradient[1:] != 0).any()
    assert method.teacher.net.decoders[0].logits.grad is None


def test_after_the_first_step_the_teacher_is_the_student():
    method = answer(MeanTeacher(EXAMPLE_TASK, build_fixed()), LOGITS_B.clone())
    teacher = method.teacher.net.decoders[0]
    method.step(example_batch(), START)
    assert teacher.logits.tolist() == LOGITS_B.tolist()  # it never moves in a step
    method.after_step(START)
    assert teacher.logits.tolist() == LOGITS_A.tolist()


def test_only_the_teachers_image_is_noisy_and_the_noise_is_clipped():
    method = make_example(MeanTeacher, example_task())
    assert isinstance(method, MeanTeacher)
    batch, seen = accepted_batch(method), {}
    method.net.register_forward_pre_hook(lambda net, args: seen.update(student=args[0]))
    method.teacher.net.register_forward_pre_hook(lambda net, args: seen.update(teacher=args[0]))
    method.step(batch, START)
    noise = seen["teacher"] - batch.x_u
    assert torch.equal(seen["student"], batch.x)
    assert noise.abs().max().item() == pytest.approx(0.2, abs=1e-6)
    assert 0.08 < noise.std() < 0.1


def test_without_noise_a_teacher_equal_to_the_student_teaches_nothing():
    method = MeanTeacher(EXAMPLE_TASK, build_fixed(torch.cat([LOGITS_A[1:], LOGITS_A[1:]])), noise_std=0.0)
    assert method.step(example_batch(), LAST).losses["consistency"] == 0


def test_either_network_predicts():
    x = torch.zeros(1, 1, 1, 1, 4)
    student = answer(MeanTeacher(EXAMPLE_TASK, build_fixed(), predict_with="student"), LOGITS_B)
    teacher = answer(MeanTeacher(EXAMPLE_TASK, build_fixed(), predict_with="teacher"), LOGITS_B)
    assert torch.equal(student.predict(x), LOGITS_A.softmax(1))
    assert torch.equal(teacher.predict(x), LOGITS_B.softmax(1))


def test_a_teacher_that_predicts_needs_unlabelled_patches():
    MeanTeacher(EXAMPLE_TASK, build_fixed()).check_batch(2, 0, (16, 16, 16))
    method = MeanTeacher(EXAMPLE_TASK, build_fixed(), predict_with="teacher")
    method.check_batch(2, 2, (16, 16, 16))
    with pytest.raises(ValueError, match=r"data.batch \[2, 0\]"):
        method.check_batch(2, 0, (16, 16, 16))


@pytest.mark.parametrize("options", [{"teacher_mode": "eval"}, {"predict_with": "teacher", "ramp": 0.0, "sup": "ga"}])
def test_its_variants_keep_the_contract(options: dict[str, Any]):
    check_method(MeanTeacher, example_task(3, 1, 2), **options)


@pytest.mark.parametrize("options", [{"ramp": -1.0}, {"ramp_hold": 0}])
def test_an_impossible_ramp_is_refused(options: dict[str, Any]):
    with pytest.raises(OptionError, match=r"method.ramp"):
        make_example(MeanTeacher, example_task(), **options)
