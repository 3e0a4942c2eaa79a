"""Whole scans: which ones a path means, and results on their own grid."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor

from tailseg.checks import example_task
from tailseg.core import Batch, Method, Progress, StepOutput
from tailseg.data.image import Image, ImageError
from tailseg.data.preparation import Preparation
from tailseg.evaluate.predict import Predictor, find_cases
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
