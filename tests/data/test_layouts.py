"""Layouts beside nnU-Net's usual one, which test_raw.py reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Pillow

from tailseg.data.image import ImageError
from tailseg.data.raw import DataError, RawDataset, load_case, read_raw

LABELS = {"background": 0, "lesion": 255}
RGB = {"0": "R", "1": "G", "2": "B"}
COLOURS = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
LESION = (COLOURS[..., 0] > 99).astype(np.uint8)


def describe(root: Path, **description: Any) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def put(root: Path, *names: str) -> None:
    """Pictures of three colours; of one where the name's number says so or the folder holds labels."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        single = name.startswith("labels") or path.stem.endswith(("_0001", "_0002"))
        Pillow.fromarray(255 * LESION if single else COLOURS).save(path)


def load(dataset: RawDataset, case: str) -> tuple[np.ndarray, np.ndarray]:
    image, label = load_case(dataset.cases[case], dataset)
    assert label is not None and image.spacing == (1, 1, 1)
    return image.array, label


@pytest.mark.parametrize(
    ("ending", "images", "label"),
    [
        (".png", ["a_0000.png", "b_0000.png"], "a.png"),
        (".png", ["a.png", "b.png"], "a.png"),
        (".tif", ["a.tif", "b.tif"], "a.tif"),
        (".tif", ["a.tif", "b.tif"], "a.png"),
        (".png", ["img_0017.png", "b.png"], "img_0017.png"),
    ],
)
def test_a_picture_holds_its_colours_in_one_file(tmp_path: Path, ending: str, images: list[str], label: str):
    root = describe(tmp_path, channel_names=RGB, labels=LABELS, file_ending=ending)
    put(root, *(f"imagesTr/{name}" for name in images), f"labelsTr/{label}")
    dataset = read_raw(root)
    labelled = label.partition(".")[0]
    assert set(dataset.cases) == {labelled, "b"} and dataset.cases["b"].label is None
    array, found = load(dataset, labelled)
    np.testing.assert_array_equal(array[:, 0], np.moveaxis(COLOURS, -1, 0))
    np.testing.assert_array_equal(found[0], LESION)


def test_jpegs_have_labels_without_loss(tmp_path: Path):
    root = describe(tmp_path, channel_names=RGB, labels=LABELS, file_ending=".jpg")
    put(root, "imagesTr/ISIC_0024306.jpg", "labelsTr/ISIC_0024306.png", "imagesUn/ISIC_0024307.jpg")
    array, label = load(read_raw(root), "ISIC_0024306")
    assert array.shape == (3, 1, 6, 8)
    np.testing.assert_array_equal(label[0], LESION)
    put(root, "labelsTr/ISIC_0024306.jpg")
    with pytest.raises(
        DataError, match=r"0024306\.jpg cannot hold labels: JPEG changes their values. Write them as PNG"
    ):
        read_raw(root)


def test_colours_may_lie_in_files_of_their_own(tmp_path: Path):
    root = describe(tmp_path, channel_names=RGB, labels=LABELS, file_ending=".png")
    put(root, "imagesTr/a_0001.png", "imagesTr/a_0002.png", "labelsTr/a.png")
    Pillow.fromarray(COLOURS[..., 0]).save(root / "imagesTr/a_0000.png")
    array, _ = load(read_raw(root), "a")
    assert array.shape == (3, 1, 6, 8) and (array[0, 0] == COLOURS[..., 0]).all()


def test_a_picture_of_too_few_colours_is_named(tmp_path: Path):
    root = describe(tmp_path, channel_names={"0": "grey"}, labels=LABELS, file_ending=".png")
    put(root, "imagesTr/a.png", "labelsTr/a.png")
    with pytest.raises(ImageError, match=r"a\.png holds 3 channels, not 1; correct channel_names, or the file"):
        load(read_raw(root), "a")


def test_a_label_of_another_size_is_named(tmp_path: Path):
    root = describe(tmp_path, channel_names=RGB, labels=LABELS, file_ending=".png")
    put(root, "imagesTr/a.png")
    (root / "labelsTr").mkdir()
    Pillow.fromarray(LESION[:4]).save(root / "labelsTr/a.png")
    with pytest.raises(ImageError, match=r"labelsTr/a\.png has the shape \(1, 4, 8\)"):
        load(read_raw(root), "a")


def test_two_labels_of_one_picture_are_named(tmp_path: Path):
    root = describe(tmp_path, channel_names=RGB, labels=LABELS, file_ending=".png")
    put(root, "imagesTr/a.png", "labelsTr/a.png", "labelsTr/a.tif")
    with pytest.raises(DataError, match=r"labelsTr/a\.png and .*labelsTr/a\.tif are two files of 'a'; keep one"):
        read_raw(root)


def decathlon(root: Path, **changes: Any) -> Path:
    """Two channels on a fourth axis; brain_1 and brain_2 labelled, brain_3 to be predicted."""
    voxels = np.random.default_rng(0).integers(0, 99, (6, 5, 4, 2)).astype(np.int16)
    for name in ("imagesTr/brain_1", "imagesTr/brain_2", "imagesTs/brain_3"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(voxels, np.diag([1, 2, 3, 1.0])), root / f"{name}.nii.gz")
    (root / "labelsTr").mkdir()
    for name in ("brain_1", "brain_2"):
        label = (voxels[..., 0] % 3).astype(np.uint8)
        nib.save(nib.Nifti1Image(label, np.diag([1, 2, 3, 1.0])), root / f"labelsTr/{name}.nii.gz")
    (root / "imagesTr/._brain_1.nii.gz").touch()  # as in the published archives
    training = [{"image": f"./imagesTr/{x}.nii.gz", "label": f"./labelsTr/{x}.nii.gz"} for x in ("brain_1", "brain_2")]
    description = {
        "name": "BRATS",
        "tensorImageSize": "4D",
        "modality": {"0": "FLAIR", "1": "T1w"},
        "labels": {"0": "background", "1": "edema", "2": "tumour"},
        "numTraining": 2,
        "training": training,
        "test": ["./imagesTs/brain_3.nii.gz"],
    }
    return describe(root, **description | changes)


def test_the_lists_of_the_decathlon_are_followed(tmp_path: Path):
    dataset = read_raw(decathlon(tmp_path))
    assert dataset.name == "BRATS" and dataset.channels == ("FLAIR", "T1w")
    assert dataset.classes == ("background", "edema", "tumour")
    assert {case.id: case.label is not None for case in dataset.cases.values()} == {
        "brain_1": True, "brain_2": True, "brain_3": False,
    }  # fmt: skip
    image, label = load_case(dataset.cases["brain_1"], dataset)
    assert image.array.shape == (2, 4, 5, 6) and image.spacing == (3, 2, 1) and label is not None
    np.testing.assert_array_equal(label, image.array[0] % 3)


def test_a_decathlon_file_of_other_channels_is_named(tmp_path: Path):
    dataset = read_raw(decathlon(tmp_path, modality={"0": "T1w"}))
    with pytest.raises(ImageError, match=r"brain_1\.nii\.gz holds 2 channels, not 1"):
        load_case(dataset.cases["brain_1"], dataset)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"test": ["./imagesTs/brain_9.nii.gz"]}, r"lists .*imagesTs/brain_9\.nii\.gz, which does not exist"),
        ({"test": ["./imagesTr/brain_2.nii.gz"]}, "lists two cases 'brain_2'"),
        ({"test": [3]}, "training must list"),
    ],
)
def test_lists_that_cannot_be_followed(tmp_path: Path, changes: dict[str, Any], match: str):
    with pytest.raises(DataError, match=match):
        read_raw(decathlon(tmp_path, **changes))


def test_the_first_nnunet_listed_cases_and_no_files(tmp_path: Path):
    root = decathlon(tmp_path)
    for path in sorted((root / "imagesTr").glob("brain_*")):
        voxels = nib.load(path)
        for channel in range(2):
            name = path.name.replace(".nii.gz", f"_{channel:04d}.nii.gz")
            nib.save(nib.Nifti1Image(np.asarray(voxels.dataobj)[..., channel], voxels.affine), path.with_name(name))
        path.unlink()
    dataset = read_raw(root)
    assert list(dataset.cases) == ["brain_1", "brain_2"] and len(dataset.cases["brain_1"].images) == 2
