"""UA-MT: the worked example, where the mask comes from, and what its options change."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from methods.fixed_networks import EXAMPLE_TASK, HALFWAY, build_fixed, example_batch
from parts.worked_example import LOGITS_A, logits
from torch import Tensor, nn

from tailseg.checks import accepted_batch, check_method, example_task, make_example
from tailseg.core import Batch, Progress, SegOutput
from tailseg.methods.uamt import UAMT
from tailseg.options import OptionError

TEACHER = logits([[1, 3, 0, 6], [4, 0, 0, 0], [0, 0, 2, 0]])
EPOCH_150 = Progress(step=150, total_steps=300, steps_per_epoch=1)


class Answers(nn.Module):
    """Answers its calls with one set of logits after the other, for as many samples as it sees; the last one for ever."""

    def __init__(self, *answers: Tensor) -> None:
        super().__init__()
        self.left = list(answers)
        self.sizes: list[int] = []

    def forward(self, features: Tensor) -> SegOutput:
        self.sizes.append(len(features))
        answer = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        return SegOutput(answer.expand(len(features), *answer.shape[1:]), features)


def with_teacher(*answers: Tensor, **options: Any) -> UAMT:
    method = UAMT(EXAMPLE_TASK, build_fixed(LOGITS_A), **options)
    method.teacher.net.decoders[0] = Answers(*answers)
    return method


def test_one_step_of_the_worked_example():
    losses = with_teacher(TEACHER).step(example_batch(), HALFWAY).losses
    assert losses["sup"].item() == pytest.approx(-0.068841, abs=1e-6)
    assert losses["consistency"].item() == pytest.approx(0.02865048 * 0.089462, abs=1e-7)
    assert sum(losses.values()).item() == pytest.approx(-0.066278, abs=1e-6)  # pyright: ignore[reportAttributeAccessIssue]


def test_uncertainty_and_mask_of_the_worked_example():
    method = with_teacher(TEACHER)
    uncertainty = method.uncertainty(torch.zeros(1, 1, 1, 1, 4)).flatten()
    assert uncertainty.tolist() == pytest.approx([0.274310, 0.366591, 0.665570, 0.034540], abs=1e-6)
    assert method.threshold(EPOCH_150) == pytest.approx(0.569508, abs=1e-6)
    logs = method.step(example_batch(), HALFWAY).logs
    assert logs["kept"].item() == 0.75
    assert logs["uncertainty"].item() == pytest.approx(uncertainty.mean().item())


@pytest.mark.parametrize(("step", "bound"), [(0, 0.521028), (3000, 0.569508), (6000, 0.693147)])
def test_the_bound_rises_to_its_maximum(step: int, bound: float):
    method = with_teacher(TEACHER, ramp="step")
    assert method.threshold(Progress(step, 6000, 10)) == pytest.approx(bound, abs=1e-6)


def test_the_bound_may_follow_the_number_of_classes():
    method = with_teacher(TEACHER, max_entropy="lnK")
    assert method.threshold(EPOCH_150) == pytest.approx(0.902649, abs=1e-6)
    assert method.step(example_batch(), HALFWAY).logs["kept"] == 1


def test_the_divisor_may_be_the_number_of_classes():
    by_two, by_three = (
        with_teacher(TEACHER, divisor=divisor).step(example_batch(), HALFWAY).losses["consistency"].item()
        for divisor in (2, "K")
    )
    assert by_three == pytest.approx(by_two * 2 / 3)


def test_the_mask_comes_from_the_mean_of_all_passes_and_the_target_from_a_pass_of_its_own():
    batch = example_batch()
    sure, other = TEACHER * 10, TEACHER.roll(1, 1) * 10
    agreeing = with_teacher(sure)
    assert agreeing.step(batch, HALFWAY).logs["kept"] == 1
    # each pass is certain, but half of them of one class and half of another: entropy ln 2
    torn = with_teacher(sure, sure, other, sure, other)
    logs = torn.step(batch, HALFWAY).logs
    assert logs["uncertainty"].item() == pytest.approx(math.log(2), abs=1e-3)
    assert logs["kept"] == 0
    assert torn.teacher.net.decoders[0].sizes == [1, 2, 2, 2, 2]


def test_where_nothing_is_certain_the_teacher_teaches_nothing():
    method = with_teacher(torch.zeros_like(TEACHER))
    loss = method.step(example_batch(), HALFWAY).losses["consistency"]
    assert loss == 0
    loss.backward()
    assert (method.net.decoders[0].logits.grad == 0).all()


def test_the_student_learns_in_certain_voxels_of_unlabelled_patches_alone():
    method = with_teacher(TEACHER)
    method.step(example_batch(), HALFWAY).losses["consistency"].backward()
    gradient = method.net.decoders[0].logits.grad  # (2, 3, 1, 1, 4)
    assert gradient is not None
    assert (gradient[0] == 0).all()
    assert (gradient[1] != 0).any(0).flatten().tolist() == [True, True, False, True]


def test_every_pass_draws_noise_of_its_own():
    method = make_example(UAMT, example_task())
    batch, seen = accepted_batch(method), []
    method.teacher.net.register_forward_pre_hook(lambda net, args: seen.append(args[0]))
    method.step(batch, HALFWAY)
    views = torch.cat(seen)
    assert len(views) == (1 + 8) * len(batch.x_u)
    distinct = views.flatten(1).unique(dim=0)
    assert len(distinct) == len(views)
    assert (views - batch.x_u.repeat(9, 1, 1, 1, 1)).abs().max().item() == pytest.approx(0.2, abs=1e-6)


def test_fewer_passes_cost_fewer_forwards_and_odd_ones_are_refused():
    method = with_teacher(TEACHER, passes=2)
    method.step(example_batch(), HALFWAY)
    assert method.teacher.net.decoders[0].sizes == [1, 2]
    with pytest.raises(OptionError, match=r"method.passes is 5; it must be even"):
        with_teacher(TEACHER, passes=5)


@pytest.mark.parametrize(
    ("count", "step", "share"), [("epoch", 9, 1.0), ("epoch", 10, 0.5), ("epoch", 995, 0.01), ("step", 9, 0.1)]
)
def test_the_teacher_counts_epochs_or_steps(count: str, step: int, share: float):
    options: dict[str, Any] = {"ema_step": count}
    method = UAMT(EXAMPLE_TASK, build_fixed(torch.ones(2, 3, 1, 1, 4)), **options)
    method.teacher.net.decoders[0].logits.data.zero_()
    method.after_step(Progress(step, 3000, 10))
    moved = method.teacher.net.decoders[0].logits.flatten().tolist()
    assert moved == pytest.approx([share] * 24, abs=1e-6)


def test_the_dice_of_ssl4mis_is_an_option():
    port = with_teacher(TEACHER).step(example_batch(), HALFWAY).losses["sup"]
    original = with_teacher(TEACHER, sup="ce_soft_dice").step(example_batch(), HALFWAY).losses["sup"]
    assert port < 0 < original


def test_either_network_predicts_and_a_teacher_that_does_needs_unlabelled_patches():
    x = torch.zeros(1, 1, 1, 1, 4)
    assert torch.equal(with_teacher(TEACHER).predict(x), LOGITS_A.softmax(1))
    method = with_teacher(TEACHER, predict_with="teacher")
    assert torch.equal(method.predict(x), TEACHER.softmax(1))
    with pytest.raises(ValueError, match=r"data.batch \[2, 0\]"):
        method.check_batch(2, 0, (16, 16, 16))


def test_without_unlabelled_patches_it_is_supervised():
    batch = example_batch()
    alone = UAMT(EXAMPLE_TASK, build_fixed(LOGITS_A[:1]))
    losses = alone.step(Batch(batch.x_l, batch.y_l, batch.x_u[:0]), HALFWAY).losses
    assert {name: loss.item() for name, loss in losses.items()} == {"sup": pytest.approx(-0.068841, abs=1e-6)}


def test_the_original_recipe_keeps_the_contract():
    options = {"ema_step": "step", "ramp": "step", "sup": "ce_soft_dice", "passes": 2, "divisor": "K"}
    check_method(UAMT, example_task(2, 1, 2), **options, max_entropy="lnK", predict_with="teacher")
