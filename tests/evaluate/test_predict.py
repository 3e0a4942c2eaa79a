"""Whole scans: which ones a path means, and results on their own grid."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from tiny import tiny_recipe
from torch import Tensor

from tailseg import app
from tailseg.checks import example_task
from tailseg.core import Batch, Method, Progress, StepOutput
from tailseg.data.image import Image, ImageError
from tailseg.data.preparation import Preparation
from tailseg.evaluate.predict import Predictor, find_cases, label_ending
from tailseg.recipe import load_recipe
from tailseg.runtime import Runtime, RuntimeOptions


class Threshold(Method):
    """Class 1 where the image is above one half; no network."""

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        raise AssertionError("prediction takes no step")

    def predict(self, x: Tensor) -> Tensor:
        bright = (x[:, :1] > 0.5).float()
        return torch.cat([1 - bright, bright], 1)


def predictor(patch_size: tuple[int, ...], **preparation: object) -> Predictor:
    intensity = {"name": "window", "low": 0, "high": 100, "rescale": "window"}
    recipe = Preparation.model_validate({"intensity": intensity, **preparation})
    runtime = Runtime(torch.device("cpu"), RuntimeOptions())
    return Predictor(Threshold(example_task(2)), recipe, patch_size, runtime)


OBLIQUE = np.array([[0.0, -1.9, 0.3, 5.0], [1.2, 0.0, 0.0, -7.0], [0.0, -0.6, -1.9, 3.0], [0, 0, 0, 1]])


@pytest.mark.parametrize("patch_size", [(8, 8, 8), (8, 8)])
@pytest.mark.parametrize("affine", [np.eye(4), np.diag([-1.0, 1, -2, 1]), OBLIQUE])
def test_labels_lie_where_the_scan_is_bright(patch_size: tuple[int, ...], affine: np.ndarray):
    bright = np.random.default_rng(0).random((11, 13, 9)) > 0.7
    image = Image((100.0 * bright)[None].astype(np.float32), affine)
    np.testing.assert_array_equal(predictor(patch_size).labels(image), bright)
    np.testing.assert_array_equal(predictor(patch_size).probs(image)[1] > 0.5, bright)


def test_a_coarse_preparation_comes_back_on_the_scans_own_grid():
    box = np.zeros((16, 20, 24), bool)
    box[4:12, 4:16, 8:20] = True
    image = Image((100.0 * box)[None].astype(np.float32), OBLIQUE)
    found = predictor((4, 4, 4), grid=(8, 10, 12)).labels(image)
    assert found.shape == box.shape and (found == box).mean() > 0.93


def save(path: Path, channels: int, *, size: tuple[int, int] = (40, 36)) -> np.ndarray:
    """A picture with a bright box on a dark, noisy ground, and the box (H, W) bool."""
    rng = np.random.default_rng(zlib.crc32(path.name.encode()))
    box = np.zeros(size, bool)
    row, column = rng.integers(2, 12, 2)
    box[row : row + 20, column : column + 18] = True
    picture = (rng.integers(0, 40, (*size, 3)) + 180 * box[..., None]).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(picture if channels == 3 else picture[..., 0]).save(path)
    return box


@pytest.mark.parametrize(("channels", "name"), [(3, "{}_0000.png"), (3, "{}.jpg"), (1, "{}.tif")])
def test_a_recipe_of_two_sides_trains_on_pictures_and_predicts_pictures(tmp_path: Path, channels: int, name: str):
    raw, run = tmp_path / "raw", tmp_path / "run"
    (raw / "labelsTr").mkdir(parents=True)
    for case in ("a", "b", "v", "t", "u1", "u2"):
        box = save(raw / "imagesTr" / name.format(case), channels)
        if not case.startswith("u"):
            Pillow.fromarray(255 * box.astype(np.uint8)).save(raw / "labelsTr" / f"{case}.png")
    names = {str(i): colour for i, colour in enumerate(["red", "green", "blue"][:channels])}
    description = {"channel_names": names, "labels": {"background": 0, "lesion": 255}, "file_ending": name[-4:]}
    (raw / "dataset.json").write_text(json.dumps(description))
    split = {"labelled": ["a", "b"], "unlabelled": ["u1", "u2"], "val": ["v"], "test": ["t"]}
    (raw / "splits.json").write_text(json.dumps({"tiny": split}))
    tree = tiny_recipe(raw, "supervised", spatial_dims=2, epochs=10, lr=0.05, validate_every=5)
    tree["data"]["prepare"] = {"intensity": {"name": "window", "low": 0, "high": 255, "rescale": "window"}}
    app.train(load_recipe(tree), run)
    (written,) = app.predict(run, "test", run / "predictions", device="cpu")
    label = np.asarray(Pillow.open(written))
    assert written.name == "t.png" and label.shape == (40, 36) and set(np.unique(label)) <= {0, 255}
    scores = app.evaluate(run / "predictions", raw, ["native"])["native"]
    assert scores.overall["dice"].mean > 0.7
    (again,) = app.predict(run, raw / "imagesTr" / name.format("t"), run / "again", device="cpu")
    assert again.name == "t.png" and again.read_bytes() == written.read_bytes()


def test_pictures_of_a_folder_with_all_colours_in_one_file_or_each_in_its_own(tmp_path: Path):
    for name in ("img_0007.png", "img_0008.png", "other.jpg"):
        save(tmp_path / "plain" / name, 3)
    assert [case.id for case in find_cases(tmp_path / "plain", 3)] == ["img_0007", "img_0008", "other"]
    for name in ("a_0000.png", "a_0001.png", "a_0002.png"):
        save(tmp_path / "apart" / name, 1)
    (case,) = find_cases(tmp_path / "apart", 3)
    assert [path.name for path in case.images] == ["a_0000.png", "a_0001.png", "a_0002.png"]
    save(tmp_path / "grey" / "b.png", 1)
    with pytest.raises(ImageError, match=r"b\.png must be called <case>_0000\.png: the run was trained on 3 channels"):
        find_cases(tmp_path / "grey", 3)


def test_one_file_may_hold_all_channels(tmp_path: Path):
    nibabel.Nifti1Image(np.zeros((2, 2, 2, 4), np.int16), np.eye(4)).to_filename(tmp_path / "brain.nii.gz")
    (case,) = find_cases(tmp_path, 4)
    assert case.id == "brain" and len(case.images) == 1
    with pytest.raises(ImageError, match="must be called <case>_0000"):
        find_cases(tmp_path, 2)


def test_a_dicom_series_is_a_scan_by_itself_or_one_of_a_folder(tmp_path: Path):
    for case in ("x", "y"):
        (tmp_path / case).mkdir()
        for name in ("1.dcm", "2.dcm"):
            (tmp_path / case / name).touch()
    (tmp_path / "notes").mkdir()
    assert [case.id for case in find_cases(tmp_path, 1)] == ["x", "y"]
    (case,) = find_cases(tmp_path / "x", 1)
    assert case.id == "x" and case.images == (tmp_path / "x",) and label_ending(case) == ".nii.gz"
    with pytest.raises(ImageError, match="A DICOM series is given as its folder"):
        find_cases(tmp_path / "x" / "1.dcm", 1)


def test_two_scans_of_a_case_are_told(tmp_path: Path):
    touch(tmp_path, "a_0000.nii.gz", "a.nii.gz")
    with pytest.raises(ImageError, match=r"a\.nii\.gz and .*a_0000\.nii\.gz are two scans of case 'a'"):
        find_cases(tmp_path, 1)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        nibabel.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4)).to_filename(folder / name)


def test_scans_of_a_folder(tmp_path: Path):
    touch(tmp_path, "b_0000.nii.gz", "a_0000.nii.gz", "plain.nii.gz")
    assert [case.id for case in find_cases(tmp_path, 1)] == ["a", "b", "plain"]


def test_one_file_brings_its_other_channels(tmp_path: Path):
    touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz")
    (case,) = find_cases(tmp_path / "a_0000.nii.gz", 2)
    assert case.id == "a" and [path.name for path in case.images] == ["a_0000.nii.gz", "a_0001.nii.gz"]


@pytest.mark.parametrize(
    ("names", "source", "channels", "message"),
    [
        ((), "nowhere", 1, "does not exist; give a scan, a folder"),
        ((), ".", 1, "holds no scan"),
        (("plain.nii.gz",), ".", 2, "must be called <case>_0000"),
        (("a_0000.nii.gz",), ".", 2, r"a_0001\.nii\.gz is missing"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, names: tuple[str, ...], source: str, channels: int, message: str):
    touch(tmp_path, *names)
    with pytest.raises(ImageError, match=message):
        find_cases(tmp_path / source, channels)
