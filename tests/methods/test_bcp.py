"""BCP: the mixing loss worked out by hand, the two stages, and which voxels of which image are seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods.fixed_networks import EXAMPLE_TASK, build_fixed
from torch import Tensor

from tailseg.checks import LATER_STEP, accepted_batch, example_task, make_example
from tailseg.core import IGNORE, Batch, Progress, Task
from tailseg.methods import bcp
from tailseg.methods.bcp import BCP, draw_box, keep_largest_components, sample_dice_loss
from tailseg.parts.losses import log_softmax
from tailseg.parts.mixing import paste

TASK = Task(("background", "heart"), 1, 3, (1.0, 1.0, 1.0), (10, 10))
LOGITS = torch.tensor([[0.0, 2, 0.5, -1], [1, -1, 0.5, 3]]).view(1, 2, 1, 1, 4)
BOX = torch.tensor([False, False, True, True]).view(1, 1, 1, 4)
FIRST_STAGE = Progress(step=5, total_steps=100, steps_per_epoch=10)


def row(*values: float) -> Tensor:
    return torch.tensor(values).view(1, 1, 1, -1)


def fixed_step(
    monkeypatch: pytest.MonkeyPatch, progress: Progress, *labels: Tensor, **options: Any
) -> dict[str, float]:
    monkeypatch.setattr(bcp, "draw_box", lambda *_: BOX)
    images = torch.zeros(2, 1, 1, 1, 4)
    logits = LOGITS if progress is FIRST_STAGE else torch.cat([LOGITS, LOGITS])
    method = BCP(TASK, build_fixed(logits), largest_component=False, **options)
    losses = method.step(Batch(images, torch.cat(labels).long(), images), progress).losses
    return {name: loss.item() for name, loss in losses.items()}


def test_the_mixing_loss_of_the_worked_example(monkeypatch: pytest.MonkeyPatch):
    # the teacher answers 1 0 0 1 too: as the labels of the example where the mixed image shows the unlabelled one
    losses = fixed_step(monkeypatch, LATER_STEP, row(1, 0, 1, 1), row(0, 0, 0, 1))
    assert losses["inward"] == pytest.approx(0.3281888, abs=1e-7)
    assert losses["outward"] == pytest.approx(0.4005736, abs=1e-7)


def test_what_is_not_annotated_counts_nowhere(monkeypatch: pytest.MonkeyPatch):
    losses = fixed_step(monkeypatch, LATER_STEP, row(IGNORE, IGNORE, 1, 1), row(0, 0, IGNORE, IGNORE))
    logits = LOGITS[..., 2:], LOGITS[..., :2]
    for name, part, labels in zip(("inward", "outward"), logits, (row(0, 1), row(1, 0)), strict=True):
        log_probs, target = log_softmax(part), labels.long()
        ce = torch.nn.functional.cross_entropy(part, target)
        assert losses[name] == pytest.approx((0.25 * (sample_dice_loss(log_probs, target) + ce)).item(), abs=1e-6)


def test_images_mix_like_the_worked_example():
    a, u = row(1, 2, 3, 4), row(10, 20, 30, 40)
    assert paste(u, a, BOX).flatten().tolist() == [1, 2, 30, 40]
    assert paste(a, u, BOX).flatten().tolist() == [10, 20, 3, 4]


def test_the_box_holds_two_thirds_of_each_side():
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    assert draw_box((112, 112, 80), 2 / 3, cpu).sum().item() == 74 * 74 * 53 == 290_228
    assert draw_box((256, 256), 2 / 3, cpu).sum().item() == 170 * 170
    starts = [draw_box((6,), 2 / 3, cpu).int().argmax().item() for _ in range(100)]
    assert set(starts) == {0, 1, 2}  # both ends of the axis are reached


def test_pretraining_sees_labelled_images_alone():
    method = make_example(BCP, example_task(2))
    batch = accepted_batch(method)
    torch.manual_seed(0)
    first = method.step(batch, FIRST_STAGE).losses
    torch.manual_seed(0)
    second = method.step(Batch(batch.x_l, batch.y_l, batch.x_u + 1), FIRST_STAGE).losses
    assert [*first] == ["sup"]
    assert first["sup"] == second["sup"]


def test_pretraining_as_in_la_and_as_in_acdc(monkeypatch: pytest.MonkeyPatch):
    labels = row(1, 0, 1, 1), row(0, 0, 0, 1)  # mixed: 1 0 0 1
    whole = fixed_step(monkeypatch, FIRST_STAGE, *labels)["sup"]
    target = row(1, 0, 0, 1).long()
    expected = torch.nn.functional.cross_entropy(LOGITS, target) + sample_dice_loss(log_softmax(LOGITS), target)
    assert whole == pytest.approx(expected.item() / 2, abs=1e-6)
    # each of the two mixing losses is L_M w_M + L_B w_B with weights 1 and .5 swapped, so that they add up to 1.5 (L_M + L_B)
    regions = fixed_step(monkeypatch, FIRST_STAGE, *labels, pretrain_loss="regions")["sup"]
    assert regions == pytest.approx((0.3281888 + 0.4005736) / 1.5, abs=1e-6)


def test_the_teacher_is_copied_once_and_then_follows():
    method = make_example(BCP, example_task(2), pretrain=0.5)
    student, teacher = method.net, method.teacher.net

    def distance() -> float:
        return (student.decoders[0].head.weight - teacher.decoders[0].head.weight).abs().max().item()

    def shift() -> None:
        with torch.no_grad():
            student.decoders[0].head.weight += 1

    shift()
    method.after_step(Progress(48, 100, 10))
    assert distance() == pytest.approx(1)
    method.after_step(Progress(49, 100, 10))
    assert distance() == 0
    shift()
    method.after_step(Progress(50, 100, 10))
    assert distance() == pytest.approx(0.99, abs=1e-6)  # no warm-up


def test_each_source_is_seen_on_its_side_of_the_box_only(monkeypatch: pytest.MonkeyPatch):
    method = make_example(BCP, example_task(2), largest_component=False)
    batch = accepted_batch(method)
    sides = batch.x_l.shape[2:]
    seen: list[Tensor] = []
    method.net.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    monkeypatch.setattr(bcp, "draw_box", lambda *_: box)
    box = torch.zeros(1, *sides, dtype=torch.bool)
    box[:, :8, :8, :8] = True
    method.step(batch, LATER_STEP)
    (inward, outward), (a, b), (u, v) = seen[0].chunk(2), batch.x_l.chunk(2), batch.x_u.chunk(2)
    inside = box.expand(len(a), 1, *sides)
    assert torch.equal(inward[~inside], a[~inside]) and torch.equal(inward[inside], u[inside])
    assert torch.equal(outward[~inside], v[~inside]) and torch.equal(outward[inside], b[inside])


def test_the_dice_of_samples_does_not_square_and_that_of_the_batch_does(monkeypatch: pytest.MonkeyPatch):
    labels = row(1, 0, 1, 1), row(0, 0, 0, 1)
    sample = fixed_step(monkeypatch, LATER_STEP, *labels)
    batch = fixed_step(monkeypatch, LATER_STEP, *labels, dice="batch")
    assert batch["inward"] < sample["inward"]  # p^2 < p in the denominator
    log_probs, target = log_softmax(torch.cat([LOGITS, -LOGITS])), torch.tensor([[1, 0, 0, 1]] * 2).view(2, 1, 1, 4)
    apart = [sample_dice_loss(log_probs[i : i + 1], target[i : i + 1]) for i in range(2)]
    assert sample_dice_loss(log_probs, target).item() == pytest.approx((sum(apart) / 2).item())  # pyright: ignore[reportAttributeAccessIssue]


def test_only_the_largest_piece_of_each_class_stays():
    labels = torch.tensor([[1, 1, 0, 2, 0], [0, 0, 0, 0, 2], [1, 0, 2, 0, 0]])
    expected = torch.tensor([[1, 1, 0, 2, 0], [0, 0, 0, 0, 2], [0, 0, 0, 0, 0]])  # corners connect
    kept = keep_largest_components(torch.stack([labels, torch.zeros_like(labels)]), 4)
    assert torch.equal(kept[0], expected)
    assert not kept[1].any()  # a sample without foreground stays one
    volume = torch.zeros(1, 4, 4, 4, dtype=torch.int64)
    volume[0, :2, :2, :2], volume[0, 3, 3, 3] = 1, 1
    assert keep_largest_components(volume, 2).sum() == 8
    assert volume.sum() == 9  # the input is left alone


def test_pieces_are_dropped_by_default_for_two_classes_only():
    assert make_example(BCP, example_task(2)).largest_component
    assert not make_example(BCP, example_task(4)).largest_component
    assert make_example(BCP, example_task(4), largest_component=True).largest_component


@pytest.mark.parametrize("counts", [(2, 3), (3, 3), (2, 0), (0, 0), (4, 2)])
def test_other_batches_are_refused(counts: tuple[int, int]):
    with pytest.raises(ValueError, match=r"data\.batch .* must hold an even number"):
        make_example(BCP, example_task(2)).check_batch(*counts, (16, 16, 16))


@pytest.mark.parametrize("options", [{"pretrain": 2000}, {"box": 0}, {"box": 64}])
def test_shares_out_of_range_are_refused(options: dict[str, float]):
    with pytest.raises(ValueError, match="share"):
        BCP(EXAMPLE_TASK, build_fixed(), **options)  # pyright: ignore[reportArgumentType]
