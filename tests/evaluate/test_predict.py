"""Whole scans: which ones a path means, and results on their own grid."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from scipy import ndimage
from tiny import make_tiny, tiny_recipe
from torch import Tensor

from tailseg import app
from tailseg.checks import example_task
from tailseg.core import Batch, Method, Progress, StepOutput
from tailseg.data.image import Image, ImageError
from tailseg.data.preparation import Preparation
from tailseg.data.raw import Case, load_images
from tailseg.data.splits import Split
from tailseg.evaluate.mirror import Mirror
from tailseg.evaluate.predict import Ensemble, Output, Predictor, find_cases, label_ending, predict_cases
from tailseg.options import OptionError
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
    runtime = Runtime(torch.device("cpu"), RuntimeOptions(precision="fp32"))
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
    (again,) = app.predict(
        run, raw / "imagesTr" / name.format("t"), run / "again", device="cpu", mirror=("w",), uncertainty=True
    )
    assert again.name == "t.png" and (np.asarray(Pillow.open(again)) == label).mean() > 0.9
    entropy = np.asarray(Pillow.open(run / "again" / "uncertainty" / "t_entropy.png"))
    assert entropy.shape == label.shape and entropy.max() > 0
    _, row = (run / "again" / "volumes.csv").read_text().splitlines()
    assert row == f"t,lesion,{np.count_nonzero(np.asarray(Pillow.open(again)))},"  # how large a pixel is nobody knows


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
        (folder / name).parent.mkdir(exist_ok=True)
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
        (("imagesTr/a.nii.gz",), ".", 1, r"is a data set; give one of its folders of scans, such as .*imagesTr"),
        (("plain.nii.gz",), ".", 2, "must be called <case>_0000"),
        (("a_0000.nii.gz",), ".", 2, r"a_0001\.nii\.gz is missing"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, names: tuple[str, ...], source: str, channels: int, message: str):
    touch(tmp_path, *names)
    with pytest.raises(ImageError, match=message):
        find_cases(tmp_path / source, channels)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs on one split: one network, and two networks on a coarser grid."""
    folder = tmp_path_factory.mktemp("runs")
    root = make_tiny(folder / "tiny")
    first = load_recipe(tiny_recipe(root, "supervised", epochs=2, lr=0.05))
    app.train(first, folder / "first")
    coarse = ["data.prepare.grid=[18,16,20]", "seed=1"]
    app.train(load_recipe(tiny_recipe(root, "cps", epochs=1), coarse), folder / "second")
    return folder / "first", folder / "second"


def probs_of(path: Path, case: str = "t") -> np.ndarray:
    with np.load(path / f"{case}_probs.npz") as file:
        return file["probs"].astype(np.float32)


def test_several_runs_give_the_mean_of_their_probabilities(runs: tuple[Path, Path], tmp_path: Path):
    first, second = runs
    for name, members in {"first": first, "second": [second], "both": [first, second]}.items():
        app.predict(members, "test", tmp_path / name, save_probs=True, uncertainty=True)
    both = probs_of(tmp_path / "both")
    np.testing.assert_allclose(both, (probs_of(tmp_path / "first") + probs_of(tmp_path / "second")) / 2, atol=2e-3)
    maps = {name: {path.name for path in (tmp_path / name / "uncertainty").iterdir()} for name in ("first", "both")}
    assert maps["first"] == {"t_entropy.nii.gz"}
    assert maps["both"] == {"t_entropy.nii.gz", "t_disagreement.nii.gz"}
    record = json.loads((tmp_path / "both" / "prediction.json").read_text())
    assert [run["folder"] for run in record["runs"]] == [str(first), str(second)] and len(
        record["identity"]["runs"]
    ) == 2


def test_the_folder_of_several_folds_is_their_mean(runs: tuple[Path, Path], tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(json.dumps({"tailseg_run": 1, "folds": ["fold0", "fold1"]}))
    for fold, run in zip(("fold0", "fold1"), runs, strict=True):
        (tmp_path / "out" / fold).symlink_to(run)
    (folds,) = app.predict(tmp_path / "out", "test", tmp_path / "folds")
    (both,) = app.predict(runs, "test", tmp_path / "both")
    assert folds.read_bytes() == both.read_bytes()


def test_volumes_are_those_of_the_label_files(runs: tuple[Path, Path], tmp_path: Path):
    (written,) = app.predict(runs[0], "test", tmp_path / "out")
    label = np.asarray(nibabel.nifti1.load(written).dataobj)
    voxels = [np.count_nonzero(label == value) for value in (1, 2)]
    assert voxels[0] > 0
    assert (tmp_path / "out" / "volumes.csv").read_text().splitlines() == [
        *(
            "case,class,voxels,ml",
            f"t,box,{voxels[0]},{voxels[0] * 0.012:.6g}",
            f"t,core,{voxels[1]},{voxels[1] * 0.012:.6g}",
        )
    ]


def test_runs_that_cannot_be_averaged_are_told_apart(runs: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(OptionError, match="first is given twice"):
        app.predict([runs[0], runs[0]], "test", tmp_path / "out")
    tree = tiny_recipe(make_tiny(tmp_path / "two", channels=2), "supervised", epochs=1)
    other = app.train(load_recipe(tree), tmp_path / "run")
    with pytest.raises(
        OptionError, match=r"Runs of different number of channels .*first has 1, .*run has 2; predict with"
    ):
        app.predict([runs[0], other], "test", tmp_path / "out")


def test_a_set_that_is_not_the_same_in_all_runs_is_refused(runs: tuple[Path, Path], tmp_path: Path):
    """What one fold is validated on, the others have learnt."""
    copy = tmp_path / "other"
    shutil.copytree(runs[0], copy)
    other = Split("other", ("a", "b", "v2"), ("u0", "u1"), ("v1",), ("t",))
    (copy / "split.json").write_text(json.dumps(other.to_dict()))
    with pytest.raises(OptionError, match=r"first and .*other differ in their val cases"):
        app.predict([runs[0], copy], "val", tmp_path / "out")
    assert len(app.predict([runs[0], copy], "test", tmp_path / "out")) == 1


def test_finished_cases_are_kept_and_other_options_refused(runs: tuple[Path, Path], tmp_path: Path):
    out, root = tmp_path / "out", runs[0].parent / "tiny" / "imagesTr"
    app.predict(runs[0], root / "t_0000.nii.gz", out)
    before = (out / "t.nii.gz").stat().st_mtime_ns
    written = app.predict(runs[0], root, out, resume=True)
    assert len(written) == 7 and (out / "t.nii.gz").stat().st_mtime_ns == before
    app.predict(runs[0], root / "t_0000.nii.gz", out)
    assert (out / "t.nii.gz").stat().st_mtime_ns != before
    assert len((out / "volumes.csv").read_text().splitlines()) == 1 + 7 * 2
    with pytest.raises(OptionError, match=r"made with another options; .*force=True"):
        app.predict(runs[0], "test", out, resume=True, mirror=("lr",))
    with pytest.raises(OptionError, match="made with another runs"):
        app.predict(runs[1], "test", out, resume=True)
    app.predict(runs[1], "test", out, force=True)
    assert [path.name for path in out.glob("*.nii.gz")] == ["t.nii.gz"]


def test_a_folder_of_scans_is_never_predicted_into(tmp_path: Path, runs: tuple[Path, Path]):
    touch(tmp_path, "plain.nii.gz")
    before = (tmp_path / "plain.nii.gz").read_bytes()
    with pytest.raises(OptionError, match=r"plain\.nii\.gz, which no recorded prediction made"):
        app.predict(runs[0], tmp_path, tmp_path, force=True)
    assert (tmp_path / "plain.nii.gz").read_bytes() == before


def test_a_clean_up_is_chosen_on_validation_written_and_told(runs: tuple[Path, Path], tmp_path: Path):
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(runs[0], run)
    chosen = app.choose_clean_up(run)
    assert chosen["cases"] == ["v1", "v2"] and set(chosen["classes"]) == set(chosen["gain"])
    values = json.loads((run / "clean_up.json").read_text())
    values |= {"classes": {"box": ["largest_component"]}, "gain": {"box": 0.1}}
    (run / "clean_up.json").write_text(json.dumps(values))
    app.predict(run, "test", out, clean_up=True)  # takes what is there, for it is of this checkpoint
    assert json.loads((out / "labels.json").read_text())["clean_up"] == {"box": ["largest_component"]}
    label = np.asarray(nibabel.nifti1.load(out / "t.nii.gz").dataobj)
    assert ndimage.label(label == 1, np.ones((3, 3, 3)))[1] == 1  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    (run / "clean_up.json").write_text(json.dumps(values | {"sha256": "of another checkpoint"}))
    app.predict(run, "test", tmp_path / "anew", clean_up=True)
    assert json.loads((run / "clean_up.json").read_text())["sha256"] == values["sha256"]


def test_mirroring_that_training_never_did_is_told(runs: tuple[Path, Path], tmp_path: Path):
    app.predict(runs[0], "test", tmp_path / "out", mirror=("lr",))
    (note,) = json.loads((tmp_path / "out" / "labels.json").read_text())["notes"]
    assert "never saw scans mirrored along w while training" in note


def test_a_picture_cannot_be_mirrored_along_the_patients_axes_and_nothing_is_written(tmp_path: Path):
    save(tmp_path / "a.png", 1)
    ensemble = Ensemble((predictor((8, 8)),), Mirror(("lr",), ("background", "organ1"), 2))
    cases = find_cases(tmp_path, 1)
    with pytest.raises(OptionError, match="A picture does not say how the patient lay"):
        predict_cases(ensemble, cases, tmp_path / "out", label_values=(0, 1), report=app.silent)
    assert not (tmp_path / "out").exists()


def test_dicom_seg_is_written_of_series_alone(tmp_path: Path):
    touch(tmp_path, "a.nii.gz")
    case = Case("a", (tmp_path / "a.nii.gz",), None)
    with pytest.raises(OptionError, match=r"a\.nii\.gz is no DICOM series folder.*write its labels as NIfTI"):
        Output(file_format="dicom-seg").check([case])


def test_a_series_becomes_a_dicom_seg_on_its_own_slices(tmp_path: Path):
    hd = pytest.importorskip("highdicom", reason="needs the extra tailseg[dicom]")
    from data.test_dicom_seg import SHAPE, write_series

    series = write_series(tmp_path / "x")
    ensemble = Ensemble((predictor((8, 8, 8), intensity={"name": "zscore"}),))
    output = Output(file_format="dicom-seg", uncertainty=True)
    cases = find_cases(series, 1)
    (written,) = predict_cases(ensemble, cases, tmp_path / "out", label_values=(0, 1), output=output, report=app.silent)
    assert written == tmp_path / "out" / "x.dcm"
    found = ensemble.segment(load_images(cases[0], 1)).labels
    segments = hd.seg.segread(written)
    assert found.any() and found.shape == SHAPE
    assert sum(int(frame.sum()) for frame in segments.pixel_array) == np.count_nonzero(found)
    assert (tmp_path / "out" / "uncertainty" / "x_entropy.nii.gz").exists()
