"""Teachers: the running averages of the published recipes, and which statistics a teacher normalises with."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from tailseg.core import Progress, SegNet, SegOutput
from tailseg.parts.teachers import Teacher


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv3d(2, 2, 1)

    def forward(self, features: Tensor) -> SegOutput:
        return SegOutput(self.head(features), features)


def small_net(dropout: float = 0.0) -> SegNet:
    encoder = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2), nn.Dropout(dropout))
    return SegNet(encoder, nn.ModuleList([_Decoder()]), size_divisor=1, feature_channels=(2,), embedding_channels=2)


def fill(net: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)


def the_value(net: nn.Module) -> float:
    """What all parameters are filled with."""
    (value,) = {value for parameter in net.parameters() for value in parameter.flatten().tolist()}
    return value


def images(count: int = 2, seed: int = 0) -> Tensor:
    return 3 + 2 * torch.randn(count, 1, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


def at(step: int, steps_per_epoch: int = 1) -> Progress:
    return Progress(step, 1000, steps_per_epoch)


def test_counting_steps_from_zero_gives_a_running_mean():
    student = small_net()
    teacher = Teacher(student, warm_up="step")
    fill(teacher.net, 0)
    seen = []
    for step in range(4):
        fill(student, step + 1)
        teacher.follow(student, at(step))
        seen.append(the_value(teacher.net))
    assert seen == pytest.approx([1, 1.5, 2, 2.5], abs=1e-6)
    assert [teacher.momentum(at(step)) for step in range(4)] == pytest.approx([0, 0.5, 0.66667, 0.75], abs=1e-5)
    assert teacher.momentum(at(200)) == 0.99


@pytest.mark.parametrize(("epoch", "share"), [(0, 1.0), (1, 0.5), (3, 0.25), (99, 0.01), (200, 0.01)])
def test_counting_epochs_every_step_of_an_epoch_moves_alike(epoch: int, share: float):
    student = small_net()
    teacher = Teacher(student, warm_up="epoch")
    for step in (4 * epoch, 4 * epoch + 3):
        fill(student, 1)
        fill(teacher.net, 0)
        teacher.follow(student, at(step, steps_per_epoch=4))
        assert the_value(teacher.net) == pytest.approx(share, abs=1e-6)


def test_without_warm_up_the_first_step_already_follows_slowly():
    student = small_net()
    teacher = Teacher(student, decay=0.996, warm_up=None)
    fill(student, 1)
    fill(teacher.net, 0)
    teacher.follow(student, at(0))
    assert the_value(teacher.net) == pytest.approx(0.004, abs=1e-6)


def test_it_gets_no_gradients_and_gives_none():
    student = small_net()
    teacher = Teacher(student)
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(images().requires_grad_()).logits.requires_grad
    teacher.follow(student, at(5))
    assert all(parameter.grad is None and parameter.grad_fn is None for parameter in teacher.parameters())


def test_it_starts_as_a_copy_that_shares_no_memory_with_the_student():
    student = small_net()
    teacher = Teacher(student)
    mine, theirs = teacher.net.state_dict(), student.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert not {value.data_ptr() for value in mine.values()} & {value.data_ptr() for value in theirs.values()}


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_it_is_in_its_own_mode_from_the_start_and_heeds_the_methods_eval(mode: Literal["train", "eval"]):
    student = small_net()
    teacher = Teacher(student, mode=mode)
    method = nn.ModuleList([student, teacher])
    assert {module.training for module in teacher.net.modules()} == {mode == "train"}
    method.eval()
    assert not any(module.training for module in method.modules())
    method.train()
    assert {module.training for module in teacher.net.modules()} == {mode == "train"}
    assert all(module.training for module in student.modules())


def test_a_train_mode_teacher_takes_its_running_statistics_from_its_own_passes():
    student = small_net()
    teacher = Teacher(student, mode="train")
    student(images())
    teacher.follow(student, at(0))
    assert teacher.net.encoder[1].running_mean.tolist() == [0, 0]
    assert teacher.net.encoder[1].num_batches_tracked == 0
    teacher(images(seed=1))
    assert teacher.net.encoder[1].num_batches_tracked == 1
    assert not torch.equal(teacher.net.encoder[1].running_mean, student.encoder[1].running_mean)


def test_an_eval_mode_teacher_averages_the_students_running_statistics():
    student = small_net()
    teacher = Teacher(student, mode="eval")
    student(images())
    teacher.follow(student, at(1))
    mine, theirs = teacher.net.encoder[1], student.encoder[1]
    assert torch.allclose(mine.running_mean, theirs.running_mean / 2)
    assert torch.allclose(mine.running_var, (theirs.running_var + 1) / 2)
    assert mine.num_batches_tracked == 1
    before = copy.deepcopy(teacher.state_dict())
    teacher(images(seed=1))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_dropout_is_on_in_a_train_mode_teacher_alone():
    x = images()
    stochastic, fixed = Teacher(small_net(0.5), mode="train"), Teacher(small_net(0.5), mode="eval")
    assert not torch.equal(stochastic(x).logits, stochastic(x).logits)
    assert torch.equal(fixed(x).logits, fixed(x).logits)
    stochastic.eval()
    assert torch.equal(stochastic(x).logits, stochastic(x).logits)


def test_copy_from_takes_weights_and_statistics():
    student = small_net()
    teacher = Teacher(student)
    student(images())
    fill(student, 0.3)
    teacher.copy_from(student)
    mine, theirs = teacher.net.state_dict(), student.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("how", ["state dict", "deepcopy"])
def test_a_copy_goes_on_identically(how: str):
    student = small_net()
    teacher = Teacher(student)
    fill(student, 0.7)
    teacher.follow(student, at(3))
    teacher(images())
    if how == "deepcopy":
        twin = copy.deepcopy(teacher)
    else:
        twin = Teacher(small_net())
        twin.load_state_dict(teacher.state_dict())
    for model in (teacher, twin):
        fill(student, 0.1)
        model.follow(student, at(4))
        model(images(seed=1))
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in teacher.state_dict().items())
