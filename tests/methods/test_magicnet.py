"""MagicNet: the blending and ramps worked out by hand, where cubes go, and what learns from what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tailseg.checks import LATER_STEP, accepted_batch, example_batch, example_task, make_example
from tailseg.components import make_build
from tailseg.core import BuildNetwork, Progress, SegNet, SegOutput
from tailseg.methods.magicnet import MagicNet, _blend, _halves, _location_head
from tailseg.parts.losses import cross_entropy, log_softmax, soft_dice_loss

BLENDING = Progress(step=101, total_steps=200, steps_per_epoch=10)


class _Same(nn.Module):
    """The embedding is the image in two channels, the logits are a 1x1 convolution of it: nothing looks beyond its voxel."""

    def __init__(self, num_classes: int, dims: int) -> None:
        super().__init__()
        self.head = (nn.Conv3d if dims == 3 else nn.Conv2d)(2, num_classes, 1)

    def forward(self, features: list[Tensor]) -> SegOutput:
        embedding = torch.cat([features[0], features[0] ** 2], 1)
        return SegOutput(self.head(embedding), embedding)


class _Features(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


def build_voxelwise(num_classes: int, dims: int) -> BuildNetwork:
    def build(**needs: object) -> SegNet:
        decoders = nn.ModuleList([_Same(num_classes, dims)])
        return SegNet(_Features(), decoders, size_divisor=1, feature_channels=(1,), embedding_channels=2)

    return build


def voxelwise(dims: int = 3, **options: Any) -> MagicNet:
    torch.manual_seed(0)
    return MagicNet(example_task(3, 1, dims), build_voxelwise(3, dims), **{"cubes": 2, **options})


@pytest.mark.parametrize("dims", [2, 3])
def test_a_network_without_context_sees_the_same_image_three_times(dims: int):
    method = voxelwise(dims)
    batch = example_batch(method.task)
    losses = method.step(batch, LATER_STEP).losses
    log_probs = log_softmax(method.net(batch.x_l).logits)
    dice = soft_dice_loss(log_probs, batch.y_l, smooth=1e-10)
    assert losses["sup"].item() == pytest.approx(
        ((cross_entropy(log_probs, batch.y_l) + 3 * dice) / 4).item(), abs=1e-6
    )


def test_the_authors_cube_order_spoils_the_within_image_dice():
    batch = example_batch(example_task(3))
    sup, transposed = (
        voxelwise(compat_cube_order=compat).step(batch, LATER_STEP).losses["sup"] for compat in (False, True)
    )
    assert sup != transposed


def test_locations_are_numbered_as_the_authors_do():
    method = make_example(MagicNet, example_task(3), cubes=3)
    assert method.places[:5].tolist() == [0, 9, 18, 3, 12]
    assert sorted(method.places.tolist()) == list(range(27))


def test_the_location_head_has_the_authors_size():
    head = _location_head(256 * 2**3, 27)
    assert sum(p.numel() for p in head.parameters()) == 8_511_515


@pytest.mark.parametrize("sides", [(2, 2, 2), (1, 1, 1), (3, 4, 5), (6, 1)])
def test_halves_are_adaptive_average_pooling_to_two(sides: tuple[int, ...]):
    features = torch.randn(2, 3, *sides)
    pool = nn.functional.adaptive_avg_pool3d if len(sides) == 3 else nn.functional.adaptive_avg_pool2d
    assert torch.allclose(_halves(features), pool(features, 2), atol=1e-6)


def test_class_shares_of_the_worked_example():
    method = voxelwise()
    assert method._shares().tolist() == [0, 0, 0]  # before there are counts the teacher decides alone
    method.counts.copy_(torch.tensor([900, 90, 10]))
    assert method._shares().tolist() == pytest.approx([1, 0.1, 0.0111111], abs=1e-7)


def column(*logits: float) -> Tensor:
    return torch.tensor(logits, dtype=torch.float32).view(1, 3, 1, 1, 1)


def blended(teacher: Tensor, cubes: Tensor, progress: Progress = BLENDING, **options: Any) -> int:
    method = voxelwise(**options)
    method.counts.copy_(torch.tensor([900, 90, 10]))
    head = method.teacher.net.decoders[0].head
    head.weight.data.zero_()
    head.bias.data = teacher.flatten()
    return int(method._pseudo_labels(torch.zeros(1, 1, 1, 1, 1), cubes, method._shares(), progress).item())


def test_blending_of_the_worked_example():
    shares = torch.tensor([1, 0.1, 0.0111111])
    frequent, rare = (column(1, 0.5, 0), column(0, 1.2, 0.3)), (column(0.2, 1, 0.9), column(0, 0, 2))
    assert _blend(*frequent, shares).flatten().tolist() == pytest.approx([0, 1.2, 0.3])
    probs = _blend(*frequent, shares).softmax(1)
    assert probs.flatten().tolist() == pytest.approx([0.1764, 0.5856, 0.2381], abs=5e-5)
    assert _blend(*rare, shares).flatten().tolist() == pytest.approx([0.18, 0.9, 1.01])
    assert [blended(*frequent), blended(*rare)] == [1, 2]


def test_the_teacher_labels_alone_in_the_first_steps():
    before = Progress(step=100, total_steps=200, steps_per_epoch=10)
    assert blended(column(1, 0.5, 0), column(0, 1.2, 0.3), before) == 0


def test_probabilities_can_be_blended_instead_of_logits():
    # logits: .1 40 outweighs .9 3, however sure the teacher is
    assert blended(column(0, 3, 0), column(0, 0, 40)) == 2
    assert blended(column(0, 3, 0), column(0, 0, 40), blend="prob") == 1


def test_counts_are_those_of_the_last_full_window_of_steps():
    method = voxelwise(refresh=3)
    batch = example_batch(method.task)
    voxels = batch.x_u[:, 0].numel()
    for step in range(8):
        progress = Progress(step, 100, 10)
        method.step(batch, progress)
        method.after_step(progress)
        windows = [step % 3 * voxels, (1 if step < 3 else 3) * voxels]
        assert [method.window.sum().item(), method.counts.sum().item()] == windows


@pytest.mark.parametrize(
    ("step", "weight"),
    [(0, 0.000674), (349, 0.000674), (3500, 0.001097), (17000, 0.005569), (35000, 0.028650), (70000, 0.1)],
)
def test_the_ramp_of_the_authors_is_one_over_the_run(step: int, weight: float):
    assert voxelwise()._con_weight(Progress(step, 70000, 10)) == pytest.approx(weight, abs=1e-6)
    assert voxelwise(ramp_steps=70000)._con_weight(Progress(step, 17000, 10)) == pytest.approx(weight, abs=1e-6)


def gradients(name: str) -> dict[str, float]:
    """Sum of absolute gradients per part that one loss gives."""
    method = make_example(MagicNet, example_task(3, 1, 2), cubes=2).train()
    method(accepted_batch(method), LATER_STEP).losses[name].backward()
    totals = {}
    for parent, child in (("net", method.net), ("teacher", method.teacher), ("location_head", method.location_head)):
        totals[parent] = sum(p.grad.abs().sum().item() for p in child.parameters() if p.grad is not None)
    totals["head"] = sum(p.grad.abs().sum().item() for p in method.net.decoders.parameters() if p.grad is not None)
    return totals


def test_the_location_loss_trains_the_encoder_and_the_location_head_alone():
    totals = gradients("location")
    assert totals["net"] > 0 and totals["location_head"] > 0
    assert totals["head"] == totals["teacher"] == 0


@pytest.mark.parametrize("name", ["sup", "con"])
def test_the_segmentation_losses_train_the_student_alone(name: str):
    totals = gradients(name)
    assert totals["net"] > 0 and totals["head"] > 0
    assert totals["location_head"] == totals["teacher"] == 0


def test_without_unlabelled_patches_cubes_are_exchanged_among_the_labelled():
    method = make_example(MagicNet, example_task(3, 1, 2), cubes=2)
    batch = example_batch(method.task, 2, 0, side=32)
    assert [*method.step(batch, LATER_STEP).losses] == ["sup", "location"]
    assert method.window.sum() == 0


def test_gradient_aware_losses_replace_those_of_the_authors():
    task = example_task(3, 1, 2)
    batch = example_batch(task, side=32)

    def losses(kind: str) -> Mapping[str, Tensor]:
        method = make_example(MagicNet, task, cubes=2, losses=kind)
        for net in (method.net, method.teacher.net):
            *_, (_, bias) = (each for each in net.named_parameters() if each[0].endswith("bias"))
            with torch.no_grad():
                bias[2] -= 10  # the two Dice losses differ where no pseudo-label has a class
        return method.step(batch, LATER_STEP).losses

    official, ga = losses("official"), losses("ga")
    assert official["location"] == ga["location"]
    assert official["sup"].item() != pytest.approx(ga["sup"].item(), rel=0.1)
    assert official["con"].item() != pytest.approx(ga["con"].item(), rel=0.1)


def test_patches_that_do_not_fall_into_cubes_are_refused():
    method = make_example(MagicNet, example_task(), cubes=3)
    method.check_batch(2, 2, (96, 48, 96))
    with pytest.raises(
        ValueError, match=r"data\.patch_size \[64, 128, 128\] must be multiples of 48; try \[48, 144, 144\]"
    ):
        method.check_batch(2, 2, (64, 128, 128))


def test_cubes_too_small_for_instance_normalisation_are_refused():
    torch.manual_seed(0)
    task = example_task()
    method = MagicNet(task, make_build("unet", {"width": 4, "norm": "instance"}, task), cubes=2)
    with pytest.raises(ValueError, match=r"data\.patch_size \[32, 32, 32\] .* try \[64, 64, 64\]"):
        method.check_batch(2, 2, (32, 32, 32))
    method.check_batch(2, 2, (32, 32, 64))


def test_one_cube_per_axis_is_no_cut():
    with pytest.raises(ValueError, match="at least 2 cubes"):
        voxelwise(cubes=1)
