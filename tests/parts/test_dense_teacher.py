"""DINOv3 as a teacher, on a tiny one with random weights; and what is read, compared and weighed of its features."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tailseg.parts import dense_teacher
from tailseg.parts.dense_teacher import (
    RANDOM_TINY,
    DINOv3,
    Projector,
    TeacherError,
    feature_distance,
    licence_of,
    read_slices,
    slice_positions,
    slices_as_rgb,
)

MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)


def save_vit(folder: Path, registers: int = 4) -> Any:
    """A tiny DINOv3 in a folder, as transformers writes it; returns the model."""
    transformers: Any = pytest.importorskip("transformers", reason="reading DINOv3 needs the extra tailseg[dino]")
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.DINOv3ViTConfig(**sizes, num_register_tokens=registers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        net = transformers.DINOv3ViTModel(config).eval()
    net.save_pretrained(folder)
    return net


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_vit(tmp_path / "vit")
    return tmp_path / "vit"


# features


@pytest.mark.parametrize("registers", [4, 0])
def test_features_are_the_models_own_without_class_and_register_tokens(registers: int, tmp_path: Path):
    net = save_vit(tmp_path / "vit", registers)
    images = torch.rand(2, 3, 32, 48)
    features = DINOv3(str(tmp_path / "vit"))(images)
    with torch.no_grad():
        tokens = net(pixel_values=(images - MEAN) / STD).last_hidden_state
    assert tokens.shape == (2, 1 + registers + 6, 24) and features.shape == (2, 24, 2, 3)
    for row in range(2):
        for column in range(3):
            expected = tokens[:, 1 + registers + 3 * row + column]
            torch.testing.assert_close(features[:, :, row, column], expected, rtol=1e-5, atol=1e-6)


def test_random_tiny_is_equal_everywhere_and_says_that_it_is_random():
    pytest.importorskip("transformers", reason="the random teacher too is built by transformers")
    images, features = torch.rand(1, 3, 32, 32), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        teacher = DINOv3(RANDOM_TINY)
        features.append(teacher(images))
        assert torch.equal(before, torch.get_rng_state()), "building the teacher drew from the run's random numbers"
        assert teacher.is_random and teacher.width == 32 and teacher.patch_size == 16
    assert torch.equal(*features) and features[0].shape == (1, 32, 2, 2)
    assert features[0].std() > 0.1


def test_reading_weights_draws_no_random_numbers(weights: Path):
    before = torch.get_rng_state()
    assert not DINOv3(str(weights)).load().training
    assert torch.equal(before, torch.get_rng_state())


def test_images_of_other_shapes_are_refused(weights: Path):
    teacher = DINOv3(str(weights))
    for shape in ((2, 1, 32, 32), (2, 3, 32, 40), (3, 32, 32)):
        with pytest.raises(ValueError, match="sides that are multiples of 16"):
            teacher(torch.rand(shape))


# frozen, and no part of the run


class Student(nn.Module):
    def __init__(self, teacher: DINOv3) -> None:
        super().__init__()
        self.teacher, self.head = teacher, nn.Conv2d(3, 3, 1)


def test_the_teacher_is_frozen_and_evaluates_whatever_happens_around_it(weights: Path):
    student = Student(DINOv3(str(weights))).train()
    images = torch.rand(1, 3, 32, 32)
    features = student.teacher(student.head(images))
    student.train()
    inner = student.teacher.load()
    assert not features.requires_grad
    assert not inner.training and not any(parameter.requires_grad for parameter in inner.parameters())
    assert torch.equal(features, student.teacher(student.head(images)))
    assert {name for name, _ in student.named_parameters()} == {"head.weight", "head.bias"}


def test_the_teacher_is_in_no_checkpoint(weights: Path):
    student = Student(DINOv3(str(weights)))
    student.teacher.load()
    state = student.state_dict()
    assert state.keys() == {"head.weight", "head.bias"}
    for source in (str(weights), RANDOM_TINY, "not/here"):
        Student(DINOv3(source)).load_state_dict(state)  # strict


def test_features_may_be_computed_under_autocast(weights: Path):
    teacher, images = DINOv3(str(weights)), torch.rand(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        features = teacher(images)
    assert torch.nn.functional.cosine_similarity(features.float(), teacher(images), 1).min() > 0.99


def test_nothing_is_read_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dense_teacher, "_transformers", None)
    assert DINOv3("not/here").known_width() is None
    assert DINOv3(RANDOM_TINY).known_width() == 32


def test_a_projector_takes_the_width_of_its_checkpoint():
    trained = nn.Sequential(Projector(4, 7))
    read = nn.Sequential(Projector(4, None))
    read.load_state_dict(trained.state_dict())
    features = torch.rand(2, 4)
    assert torch.equal(read(features), trained(features)) and read[0].out_features == 7
    with pytest.raises(RuntimeError, match="size mismatch"):
        nn.Sequential(Projector(4, 8)).load_state_dict(trained.state_dict())


# what is not there or cannot be used


def refusal(source: object) -> str:
    with pytest.raises(TeacherError) as refused:
        DINOv3(str(source)).load()
    return str(refused.value)


def test_missing_weights_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("huggingface_hub", reason="comes with the extra tailseg[dino]")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for source in ("", "facebook/dinov3-vitb16-pretrain-lvd1689m", tmp_path / "nowhere", "a/b/c"):
        text = refusal(source)
        assert "DINOv3 License" in text and "hf download" in text and "random-tiny" in text
    assert "the local cache of the Hugging Face hub holds no such model" in refusal("facebook/nothing")
    (tmp_path / "weights.pth").write_bytes(b"")
    assert "is a single file" in refusal(tmp_path / "weights.pth")
    (tmp_path / "empty").mkdir()
    assert "holds no model.safetensors" in refusal(tmp_path / "empty")


def test_weights_are_found_in_the_hubs_cache_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tmp_path / "cache" / "models--facebook--dinov3-vits16-pretrain-lvd1689m"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc123")
    save_vit(model / "snapshots" / "abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("opened a connection"))
    teacher = DINOv3("facebook/dinov3-vits16-pretrain-lvd1689m")
    teacher.check()
    assert teacher(torch.rand(1, 3, 16, 16)).shape == (1, 24, 1, 1)


def test_other_models_are_refused_by_name(weights: Path):
    config = json.loads((weights / "config.json").read_text())

    def told(**changes: object) -> str:
        (weights / "config.json").write_text(json.dumps({**config, **changes}))
        return refusal(weights)

    assert "is a ConvNeXt of the DINOv3 family" in told(model_type="dinov3_convnext")
    assert "a model of type 'dinov2', not a DINOv3 vision transformer" in told(model_type="dinov2")
    assert "num_register_tokens None" in told(num_register_tokens=None)
    assert "images of three channels" in told(num_channels=1)
    (weights / "config.json").write_text("{")
    assert "config.json is damaged" in refusal(weights)
    (weights / "config.json").unlink()
    assert "holds no config.json" in refusal(weights)


def test_damaged_or_incomplete_weights_are_refused(weights: Path):
    from safetensors.torch import load_file, save_file

    path = weights / "model.safetensors"
    tensors = load_file(path)
    save_file({key: tensors[key] for key in list(tensors)[1:]}, path, metadata={"format": "pt"})
    assert "are no whole DINOv3: 1 are missing, e.g. embeddings.cls_token" in refusal(weights)
    path.write_bytes(path.read_bytes()[:100])
    assert "cannot be read" in refusal(weights)
    path.unlink()
    assert "holds no model.safetensors" in refusal(weights)


def test_pickled_weights_are_not_read(weights: Path):
    (weights / "model.safetensors").unlink()
    torch.save({}, weights / "pytorch_model.bin")
    assert "holds no model.safetensors" in refusal(weights)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'tailseg[dino]'" in refusal(RANDOM_TINY)
    with pytest.raises(TeacherError, match=r"tailseg\[dino\]"):
        DINOv3(RANDOM_TINY).check()


def test_the_licence_is_read_beside_the_weights(tmp_path: Path):
    assert licence_of(tmp_path).startswith(
        "nothing beside the weights says so; Meta's DINOv3 are under the DINOv3 License"
    )
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: dinov3-license\n---\n")
    assert licence_of(tmp_path) == "dinov3-license (the model card beside the weights)"
    (tmp_path / "LICENSE.md").write_text("\n# DINOv3 License\n\ntext")
    assert licence_of(tmp_path) == "DINOv3 License (LICENSE.md beside the weights)"


# slices


def test_slices_lie_in_the_middle_of_equal_parts():
    assert slice_positions(64, 8) == [4, 12, 20, 28, 36, 44, 52, 60]
    assert slice_positions(80, 3) == [math.floor((j + 0.5) * 80 / 3) for j in range(3)] == [13, 40, 66]
    assert slice_positions(5, 8) == [0, 1, 2, 3, 4]
    assert slice_positions(1, 8) == [0]


def planes(*values: float) -> Tensor:
    """A (1, 1, D, 2, 2) patch whose slices hold one value each."""
    return torch.tensor(values).reshape(1, 1, -1, 1, 1).expand(1, 1, len(values), 2, 2)


def test_grey_slices_are_seen_with_their_neighbours_clamped_at_the_ends():
    images = slices_as_rgb(planes(0.1, 0.2, 0.3, 0.4), [0, 2, 3])
    assert images.shape == (3, 3, 2, 2)
    torch.testing.assert_close(images[:, :, 0, 0], torch.tensor([[0.1, 0.1, 0.2], [0.2, 0.3, 0.4], [0.3, 0.4, 0.4]]))
    torch.testing.assert_close(
        slices_as_rgb(planes(0.1, 0.2, 0.3), [1], "repeat")[0, :, 0, 0], torch.tensor([0.2, 0.2, 0.2])
    )


def test_a_2d_image_is_its_own_slice():
    grey, colour = torch.rand(2, 1, 4, 4), torch.rand(2, 3, 4, 4)
    assert torch.equal(slices_as_rgb(grey, [0]), grey.expand(2, 3, 4, 4))
    assert torch.equal(slices_as_rgb(colour, [0]), colour)
    two = torch.rand(2, 2, 4, 4)
    torch.testing.assert_close(slices_as_rgb(two, [0]), two.mean(1, keepdim=True).expand(2, 3, 4, 4))


def test_slices_of_a_batch_come_patch_by_patch():
    x = torch.rand(2, 3, 5, 4, 4)
    images = slices_as_rgb(x, [1, 4])
    assert torch.equal(images, torch.stack([x[0, :, 1], x[0, :, 4], x[1, :, 1], x[1, :, 4]]))


def test_intensities_in_range_are_taken_as_they_are_and_others_rescaled_by_channel():
    x = torch.stack([planes(0.2, 0.5), planes(-3.0, 1.0), planes(0.0, 4.0), planes(2.0, 2.0)], 1)[:, :, 0]
    images = slices_as_rgb(x.transpose(0, 1), [0, 1], "repeat")[:, 0, 0, 0]
    torch.testing.assert_close(images, torch.tensor([0.2, 0.5, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0]))
    mixed = torch.cat([planes(0.2, 0.5), planes(-1.0, 1.0), planes(0.0, 1.0)], 1)
    assert slices_as_rgb(mixed, [0])[0, :, 0, 0].tolist() == pytest.approx([0.2, 0.0, 0.0])


@pytest.mark.parametrize(("depth", "stride"), [(64, 8), (32, 4), (48, 16), (10, 1)])
def test_features_are_read_at_the_very_depth_of_a_slice(depth: int, stride: int):
    """Features that name the depth of their centre in voxels are read as the depth of the slice's centre."""
    centres = (torch.arange(depth // stride) + 0.5) * stride
    features = centres.reshape(1, 1, -1, 1, 1).expand(1, 2, -1, 3, 3)
    positions = slice_positions(depth, 8)
    read = read_slices(features, positions, depth, (5, 5))
    wanted = (torch.tensor(positions) + 0.5).clamp(centres[0], centres[-1])
    assert read.shape == (len(positions), 2, 5, 5)
    torch.testing.assert_close(read[:, 0, 2, 2], wanted)


def test_features_are_read_on_the_teachers_grid():
    """A feature that names its place across the image reads as the place of the teacher's token."""
    across = (torch.arange(16) + 0.5) / 16
    features = across.reshape(1, 1, 1, 16).expand(1, 1, 16, 16)
    read = read_slices(features, [0], 1, (14, 14))
    torch.testing.assert_close(read[0, 0, 3, 1:-1], ((torch.arange(14) + 0.5) / 14)[1:-1])


# the distance


def test_distance_of_the_worked_example_sums_over_channels():
    student = torch.tensor([[[3.0, 4], [0, 2], [1, 0]]])
    teacher = torch.tensor([[[4.0, 3], [0, 5], [-1, 0]]])
    assert feature_distance(student, teacher).item() == pytest.approx(1.36, abs=1e-6)
    for place, distance in enumerate((0.08, 0.0, 4.0)):
        one = feature_distance(student[:, [place]], teacher[:, [place]])
        assert one.item() == pytest.approx(distance, abs=1e-6)


def test_uniqueness_of_the_worked_example():
    teacher = torch.tensor([[[1.0, 0], [1, 0], [0.6, 0.8], [-1, 0]]])
    distances = torch.tensor([0.1, 0.2, 0.3, 0.4])
    turn = (1 - distances / 2).acos()  # a student turned so far off the teacher is that far away
    x, y = teacher[0].unbind(1)
    student = torch.stack([x * turn.cos() - y * turn.sin(), x * turn.sin() + y * turn.cos()], 1)[None]
    assert feature_distance(student, teacher).item() == pytest.approx(0.25, abs=1e-6)
    assert feature_distance(student, teacher, uniqueness=True).item() == pytest.approx(0.2875, abs=1e-6)
    weights = dense_teacher._uniqueness(teacher)
    assert weights.tolist()[0] == pytest.approx([0.75, 0.75, 0.75, 1.75], abs=1e-6)
    assert (weights * 3.2 / 3).tolist()[0] == pytest.approx([0.8, 0.8, 0.8, 1.866667], abs=1e-6)


def test_distance_ignores_length_and_is_finite_for_empty_features():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    torch.testing.assert_close(feature_distance(student * 7, teacher / 3), feature_distance(student, teacher))
    zero = torch.zeros(1, 4, 8, requires_grad=True)
    same = torch.ones(1, 4, 8)
    loss = feature_distance(zero, same, uniqueness=True) + feature_distance(zero, same)
    loss.backward()
    assert torch.isfinite(loss) and zero.grad is not None and torch.isfinite(zero.grad).all()
    assert feature_distance(same, same, uniqueness=True).item() == pytest.approx(0, abs=1e-6)


def test_distance_is_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert feature_distance(torch.rand(1, 2, 4).bfloat16(), torch.rand(1, 2, 4)).dtype == torch.float32
