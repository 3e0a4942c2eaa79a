"""DINO-Mix, our re-design: what DINOv3 sees, where its gradient lands, and what the method does without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tailseg.checks import FIRST_STEP, LATER_STEP, example_batch, example_task, make_example
from tailseg.core import Batch, Progress
from tailseg.methods.dinomix import DINOMix
from tailseg.options import OptionError
from tailseg.parts.dense_teacher import TeacherError, slice_positions, slices_as_rgb
from tailseg.parts.losses import ce_soft_dice, log_softmax

pytest.importorskip("transformers", reason="DINOv3 needs the extra tailseg[dino]")

TASK = example_task(3)
SMALL = {"teacher": "random-tiny", "slice_size": 32, "slices": 3}


def make(spatial_dims: int = 3, in_channels: int = 1, **options: Any) -> DINOMix:
    made = make_example(DINOMix, example_task(3, in_channels, spatial_dims), **{**SMALL, **options})
    assert isinstance(made, DINOMix)
    return made.train()


def at(fraction: float) -> Progress:
    return Progress(step=round(fraction * 1000), total_steps=1000, steps_per_epoch=10)


def seen_by_dino(method: DINOMix, batch: Batch) -> Tensor:
    """The images that DINOv3 gets in one step."""
    seen: list[Tensor] = []
    assert method.dino is not None
    handle = method.dino.register_forward_pre_hook(lambda _, images: seen.append(images[0]))
    method(batch, LATER_STEP)
    handle.remove()
    return seen[0]


def grad_names(method: DINOMix, loss: Tensor) -> set[str]:
    """The first two names of the submodules that the loss teaches."""
    method.zero_grad(set_to_none=True)
    loss.backward()
    taught = [name for name, p in method.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    return {".".join(name.split(".")[:2]) if name.startswith("net.") else name.split(".")[0] for name in taught}


def test_without_a_teacher_it_says_how_to_get_one():
    with pytest.raises(TeacherError, match=r"needs method\.teacher(.|\n)*hf download(.|\n)*random-tiny"):
        make(teacher="")


def test_an_absent_teacher_is_refused_before_training_but_not_before_prediction():
    trained = make()
    with torch.no_grad():
        trained.projector.bias.fill_(3.0)
    read = make(teacher="not/here")
    read.load_state_dict(trained.state_dict())  # strict
    x = example_batch(TASK).x_l
    assert torch.equal(read.eval().predict(x), trained.eval().predict(x))
    with pytest.raises(TeacherError, match="holds no such model"):
        read.check_batch(2, 2, (16, 16, 16))
    with pytest.raises(TeacherError, match="holds no such model"):
        read(example_batch(TASK), LATER_STEP)
    make().check_batch(2, 2, (16, 16, 16))


def test_without_distillation_no_teacher_is_needed():
    method = make(teacher="", fkd_weight=0.0)
    output = method(example_batch(TASK), LATER_STEP)
    assert output.losses.keys() == {"sup", "unsup"}
    assert not any("projector" in name for name in method.state_dict())


def test_options_that_fit_nothing_are_refused():
    with pytest.raises(OptionError, match=r"method\.stage is 6; the encoder has stages 1 to 5"):
        make(stage=6)
    with pytest.raises(OptionError, match=r"method\.slice_size 40 a multiple of 16"):
        make(slice_size=40)


@pytest.mark.parametrize(("spatial_dims", "in_channels"), [(3, 1), (2, 1), (2, 3), (3, 2)])
def test_dino_sees_slices_of_the_clean_patches_in_range(spatial_dims: int, in_channels: int):
    method = make(spatial_dims, in_channels, slice_size=16, mixer={"name": "pic", "probability": 1.0})
    batch = example_batch(method.task)
    seen = seen_by_dino(method, batch)
    positions = slice_positions(16, 3) if spatial_dims == 3 else [0]
    assert torch.equal(seen, slices_as_rgb(batch.x, positions))  # 16 x 16 as they are: nothing to resize
    assert seen.shape == (4 * len(positions), 3, 16, 16)
    assert seen.min() >= 0 and seen.max() <= 1 and batch.x.min() < 0


def test_slices_are_resized_to_what_dino_sees():
    batch = example_batch(TASK)
    seen = seen_by_dino(make(slice_size=48, slices=2, context="repeat"), batch)
    assert seen.shape == (8, 3, 48, 48)
    torch.testing.assert_close(seen[:, 0], seen[:, 2])
    small = seen_by_dino(make(slice_size=16, slices=2, context="repeat"), batch)
    torch.testing.assert_close(seen.mean((2, 3)), small.mean((2, 3)), atol=2e-2, rtol=0)


def test_each_loss_teaches_what_it_should():
    method = make(confidence=0.0)
    for loss, taught in (
        ("sup", {"net.encoder", "net.decoders"}),
        ("unsup", {"net.encoder", "net.decoders"}),
        ("fkd", {"net.encoder", "projector"}),
    ):
        assert grad_names(method, method(example_batch(TASK), LATER_STEP).losses[loss]) == taught


def test_distillation_reaches_no_stage_beyond_its_own():
    method = make(stage=3)
    method.zero_grad(set_to_none=True)
    method(example_batch(TASK), LATER_STEP).losses["fkd"].backward()
    taught = {
        name for name, p in method.net.encoder.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    }
    assert {name.split(".")[1] for name in taught} == {"0", "1", "2"}
    assert method.projector.in_features == method.net.feature_channels[2]


def test_the_distance_starts_near_two_and_falls():
    torch.manual_seed(0)
    method, batch = make(), example_batch(TASK)
    optimizer = torch.optim.Adam([*method.net.encoder.parameters(), *method.projector.parameters()], lr=0.01)
    distances = []
    for _ in range(15):
        output = method(batch, LATER_STEP)
        distances.append(output.logs["feature_distance"].item())
        optimizer.zero_grad()
        output.losses["fkd"].backward()
        optimizer.step()
    assert 1.5 < distances[0] < 2.5
    assert distances[-1] < 0.9


def test_without_mixing_and_unlabelled_patches_it_is_supervised_learning():
    method = make(mixer="none", fkd_weight=0.0, teacher="")
    batch = example_batch(TASK, unlabelled=0)
    expected = ce_soft_dice(log_softmax(method.net(batch.x_l).logits), batch.y_l)
    output = method(batch, LATER_STEP)
    assert output.losses.keys() == {"sup"}
    torch.testing.assert_close(output.losses["sup"], expected)


def test_only_confident_voxels_teach():
    batch = example_batch(TASK)
    assert make(confidence=1.1, mixer="none")(batch, LATER_STEP).losses["unsup"] == 0
    output = make(confidence=0.0, mixer="none")(batch, LATER_STEP)
    assert output.losses["unsup"] > 0 and output.logs["kept"] == 1


def test_weights_follow_their_schedules():
    method = make()
    assert method.unsup_weight(at(0)) == pytest.approx(0.1 + 0.9 * 0.00673795, abs=1e-7)
    assert method.unsup_weight(at(0.2)) == pytest.approx(0.1 + 0.9 * 0.28650480, abs=1e-7)
    assert method.unsup_weight(at(0.4)) == method.unsup_weight(at(0.9)) == 1.0
    assert method.distillation_weight(at(0.0)) == method.distillation_weight(at(0.7)) == 0.5
    falling = make(fkd_schedule="cosine")
    weights = [falling.distillation_weight(at(t)) for t in (0, 0.25, 0.5)]
    assert weights == pytest.approx([0.5, 0.5 * (1 - 0.146447), 0.25], abs=1e-6)


def test_losses_carry_their_weights():
    batch = example_batch(TASK)
    cases: list[tuple[dict[str, Any], str, float]] = [({"fkd_weight": 0.25}, "fkd", 0.5), ({"ramp": 0.0}, "unsup", 1.0)]
    for options, loss, factor in cases:
        outputs = []
        for chosen in ({}, options):  # at LATER_STEP the ramp is over
            method = make(confidence=0.0, **chosen)
            torch.manual_seed(0)
            outputs.append(method(batch, LATER_STEP).losses[loss])
        torch.testing.assert_close(outputs[1], factor * outputs[0])


def test_uniqueness_changes_the_distance_alone():
    outputs = []
    for uniqueness in (False, True):
        method = make(uniqueness=uniqueness)
        torch.manual_seed(0)
        outputs.append(method(example_batch(TASK), LATER_STEP).losses)
    assert outputs[0]["fkd"] != outputs[1]["fkd"] and outputs[0]["sup"] == outputs[1]["sup"]


def test_a_random_teacher_marks_the_run(tmp_path: Path):
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.DINOv3ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_register_tokens=4
    )
    transformers.DINOv3ViTModel(config).save_pretrained(tmp_path)
    assert make()(example_batch(TASK), LATER_STEP).logs["random_teacher"] == 1
    method = make(teacher=str(tmp_path))
    assert "random_teacher" not in method(example_batch(TASK), LATER_STEP).logs
    assert method.projector.out_features == 16


def test_checkpoints_hold_no_weights_of_dino():
    method = make()
    method(example_batch(TASK), LATER_STEP)
    assert {name.split(".")[0] for name in method.state_dict()} == {"net", "ema", "projector"}
    assert sum(p.numel() for p in method.projector.parameters()) == 32 * (32 + 1)


def test_the_ema_teacher_follows_after_the_step_alone():
    method = make()
    before = [p.clone() for p in method.ema.net.parameters()]
    method(example_batch(TASK), LATER_STEP)
    with torch.no_grad():
        for parameter in method.net.parameters():
            parameter.add_(1.0)
    assert all(map(torch.equal, before, method.ema.net.parameters()))
    method.after_step(Progress(500, 1000, 10))
    for old, new in zip(before, method.ema.net.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.01, atol=1e-6, rtol=0)


def test_labelled_patches_without_annotation_still_distil():
    batch = example_batch(TASK)
    blank = Batch(batch.x_l, torch.full_like(batch.y_l, 255), batch.x_u[:0])
    losses = make(mixer="none")(blank, FIRST_STEP).losses
    assert losses["sup"] == 0 and losses["fkd"] > 0


@pytest.mark.parametrize("spatial_dims", [3, 2])
def test_cached_features_of_whole_slices_teach_what_live_ones_do(spatial_dims: int):
    distances = []
    for features in ("live", "cached"):
        method = make(spatial_dims, features=features, mixer="none")
        batch = example_batch(method.task)
        companion = method.companion((16,) * spatial_dims)
        if features == "cached":
            assert companion is not None and method.dino is not None
            scans = batch.x if spatial_dims == 3 else batch.x.unsqueeze(2)
            shape = tuple(scans.shape[2:])
            cuts = [companion.cut(array, shape, (0, 0, 0), shape) for array in companion.encode(scans)]
            batch = Batch(batch.x_l, batch.y_l, batch.x_u, torch.stack(cuts))
            method.dino.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was asked again"))
        else:
            assert companion is None
        torch.manual_seed(0)
        output = method(batch, LATER_STEP)
        assert "random_teacher" in output.logs
        distances.append(output.losses["fkd"])
    torch.testing.assert_close(distances[1], distances[0], atol=1e-4, rtol=0)


def test_cached_features_decide_the_distance_by_patch_and_slice():
    method = make(features="cached", mixer="none", slices=2)
    batch = example_batch(TASK)
    features = torch.randn(4, 32, 2, 2, 2)

    def distance(features: Tensor) -> Tensor:
        torch.manual_seed(0)
        return method(Batch(batch.x_l, batch.y_l, batch.x_u, features), LATER_STEP).losses["fkd"]

    torch.testing.assert_close(distance(features.half()), distance(features), atol=1e-3, rtol=0)
    assert distance(features) != distance(features.flip(0)) != distance(features.flip(2))


def test_zero_features_of_padding_teach_nothing():
    method = make(features="cached")
    batch = example_batch(TASK)
    output = method(Batch(batch.x_l, batch.y_l, batch.x_u, torch.zeros(4, 32, 3, 2, 2)), LATER_STEP)
    output.losses["fkd"].backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-6 for p in method.parameters())


def test_cached_features_that_are_not_there_are_missed():
    with pytest.raises(ValueError, match=r"method\.features=cached learns from Batch\.features(.|\n)*take live"):
        make(features="cached")(example_batch(TASK), LATER_STEP)
    assert make(features="cached", fkd_weight=0.0).companion((16, 16, 16)) is None
