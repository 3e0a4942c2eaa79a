from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tailseg.core import IGNORE
from tailseg.data.image import Image, ImageError, read_image, write_image
from tailseg.data.raw import DataError, RawDataset, load_case, load_images, read_raw

AFFINE = np.diag([2.0, 2.0, 5.0, 1.0])
SHAPE = (4, 5, 6)
LABELS = {"background": 0, "liver": 1, "tumour": 2}


def put(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, Image(array, affine))


def describe(root: Path, **changes: Any) -> Path:
    description = {"channel_names": {"0": "CT"}, "labels": LABELS, "file_ending": ".nii.gz", **changes}
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(description))
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One channel; case 'b' labelled, 'a' unlabelled in imagesTr, 'c' in imagesUn."""
    describe(tmp_path)
    image = np.arange(120, dtype=np.int16).reshape(SHAPE)
    for name in ("imagesTr/b", "imagesTr/a", "imagesUn/c"):
        put(tmp_path / f"{name}_0000.nii.gz", image)
    put(tmp_path / "labelsTr/b.nii.gz", (image % 3).astype(np.uint8))
    return tmp_path


def load(root: Path, case: str = "b") -> tuple[Image, np.ndarray | None]:
    dataset = read_raw(root)
    return load_case(dataset.cases[case], dataset)


def test_cases_are_sorted_and_only_some_have_labels(root: Path):
    dataset = read_raw(root)
    assert list(dataset.cases) == ["a", "b", "c"]
    assert [case.label is not None for case in dataset.cases.values()] == [False, True, False]
    assert dataset.classes == ("background", "liver", "tumour") and dataset.label_values == (0, 1, 2)
    assert dataset.channels == ("CT",) and dataset.ignore_values == ()


def test_a_case_is_read_with_its_place(root: Path):
    image, label = load(root)
    assert image.array.shape == (1, *SHAPE) and image.array.dtype == np.float32
    assert image.spacing == (5.0, 2.0, 2.0)
    assert label is not None and label.dtype == np.uint8
    np.testing.assert_array_equal(label, image.array[0] % 3)


def test_a_label_is_read_only_where_there_is_one_and_it_is_wanted(root: Path):
    dataset = read_raw(root)
    assert load(root, "a")[1] is None and load(root, "c")[1] is None
    (root / "labelsTr/b.nii.gz").write_bytes(b"not to be opened")
    assert load_case(dataset.cases["b"], dataset, with_label=False)[1] is None


def test_hidden_files_are_no_cases(root: Path):
    for hidden in ("imagesTr/._b_0000.nii.gz", "labelsTr/._b.nii.gz", "imagesUn/.DS_Store"):
        (root / hidden).touch()
    assert list(read_raw(root).cases) == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["imagesTr/d_0000.nii", "labelsTr/a.mha", "imagesUn/d_0000.nrrd"])
def test_a_file_of_another_ending_is_not_skipped_in_silence(root: Path, name: str):
    put(root / name, np.zeros(SHAPE, np.uint8))
    with pytest.raises(DataError, match=rf"{name} would be left out: .*file_ending is '\.nii\.gz'"):
        read_raw(root)


def test_channels_are_stacked_in_their_order(root: Path):
    describe(root, channel_names={"0": "T1", "1": "T2"})
    (root / "imagesTr/a_0000.nii.gz").unlink()
    (root / "imagesUn/c_0000.nii.gz").unlink()
    put(root / "imagesTr/b_0001.nii.gz", np.full(SHAPE, 7, np.int16))
    image, _ = load(root)
    assert image.array.shape == (2, *SHAPE)
    assert (image.array[1] == 7).all() and read_raw(root).channels == ("T1", "T2")


def test_the_first_nnunet_s_description_is_understood(root: Path):
    (root / "dataset.json").write_text(
        json.dumps({"modality": {"0": "CT"}, "labels": {"0": "background", "2": "tumour", "1": "liver"}})
    )
    dataset = read_raw(root)
    assert dataset.classes == ("background", "liver", "tumour") and dataset.channels == ("CT",)


def test_values_become_class_indices_and_ignored_ones_become_ignore(root: Path):
    describe(root, labels={"background": 0, "liver": 6, "tumour": 200, "ignore": 14})
    values = np.random.default_rng(0).choice([0, 6, 14, 200], SHAPE).astype(np.float32)  # floats, as some tools write
    put(root / "labelsTr/b.nii.gz", values)
    _, label = load(root)
    expected = np.select([values == 0, values == 6, values == 200], [0, 1, 2], IGNORE)
    np.testing.assert_array_equal(label, expected)
    assert read_raw(root).label_values == (0, 6, 200)


def test_any_number_of_values_may_be_ignored(root: Path):
    describe(root, labels={**LABELS, "ignore": [14, 255]})
    values = np.random.default_rng(0).choice([0, 1, 2, 14, 255], SHAPE).astype(np.uint8)
    put(root / "labelsTr/b.nii.gz", values)
    np.testing.assert_array_equal(load(root)[1], np.where(values > 2, IGNORE, values))
    assert read_raw(root).ignore_values == (14, 255)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(3, np.uint8), (256, np.int16), (-1, np.int16), (1.5, np.float32), (np.nan, np.float32), (1.0000001, float)],
)
def test_a_value_that_the_description_does_not_name(root: Path, value: float, dtype: type):
    label = np.zeros(SHAPE, dtype)
    label[0, 0, :3] = value
    put(root / "labelsTr/b.nii.gz", label)
    with pytest.raises(ImageError, match=rf"labelsTr/b\.nii\.gz holds the values {value}, which .*dataset\.json"):
        load(root)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_voxels_are_counted(root: Path, value: float):
    image = np.zeros(SHAPE, np.float32)
    image[0, 0, :3] = value
    put(root / "imagesTr/b_0000.nii.gz", image)
    with pytest.raises(ImageError, match=r"b_0000\.nii\.gz holds 3 voxels that are NaN or infinite"):
        load(root)


def test_a_label_of_another_shape(root: Path):
    put(root / "labelsTr/b.nii.gz", np.zeros((4, 5, 7), np.uint8))
    with pytest.raises(
        ImageError, match=r"labelsTr/b\.nii\.gz has the shape \(4, 5, 7\).*b_0000\.nii\.gz has \(4, 5, 6\)"
    ):
        load(root)


def test_a_label_of_another_place(root: Path):
    put(root / "labelsTr/b.nii.gz", np.zeros(SHAPE, np.uint8), AFFINE @ np.diag([-1.0, 1.0, 1.0, 1.0]))
    with pytest.raises(ImageError, match=r"labelsTr/b\.nii\.gz lies elsewhere in the patient than .*b_0000\.nii\.gz"):
        load(root)


@pytest.mark.parametrize(("shape", "scale", "match"), [((4, 5, 7), 1.0, "the shape"), (SHAPE, 1.1, "lies elsewhere")])
def test_channels_on_different_grids(root: Path, shape: tuple[int, ...], scale: float, match: str):
    describe(root, channel_names={"0": "T1", "1": "T2"})
    for case in ("imagesTr/a", "imagesTr/b", "imagesUn/c"):
        put(root / f"{case}_0001.nii.gz", np.zeros(shape, np.int16), AFFINE @ np.diag([scale, 1, 1, 1]))
    with pytest.raises(ImageError, match=rf"b_0001\.nii\.gz .*{match}|b_0001\.nii\.gz {match}"):
        load_images(read_raw(root).cases["b"])


def test_a_missing_and_a_surplus_channel_are_named(root: Path):
    describe(root, channel_names={"0": "T1", "1": "T2"})
    with pytest.raises(DataError, match=r"imagesTr/a_0001\.nii\.gz is missing: dataset\.json names 2 channels"):
        read_raw(root)
    describe(root)
    (root / "imagesTr/b_0007.nii.gz").touch()
    with pytest.raises(DataError, match=r"imagesTr/b_0007\.nii\.gz is a channel too many"):
        read_raw(root)


def test_a_label_without_a_scan(root: Path):
    (root / "labelsTr/z.nii.gz").touch()
    with pytest.raises(DataError, match=r"labelsTr/z\.nii\.gz labels no scan: .*imagesTr/z_0000\.nii\.gz is missing"):
        read_raw(root)


def test_a_case_in_both_image_folders(root: Path):
    (root / "imagesUn/b_0000.nii.gz").touch()
    with pytest.raises(DataError, match="cases b are both in imagesTr and in imagesUn"):
        read_raw(root)


def test_a_name_without_a_channel_number(root: Path):
    (root / "imagesTr/patient1.nii.gz").touch()
    with pytest.raises(DataError, match=r"patient1\.nii\.gz must be called <case>_0000\.nii\.gz"):
        read_raw(root)


def test_an_empty_folder_and_none(tmp_path: Path):
    with pytest.raises(DataError, match="the folder does not exist"):
        read_raw(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"dataset\.json is missing"):
        read_raw(tmp_path)
    with pytest.raises(DataError, match=r"holds no scans: put them into imagesTr as <case>_0000\.nii\.gz"):
        read_raw(describe(tmp_path))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"channel_names": {"CT": 0}}, "channel_names must be like"),
        ({"channel_names": {}}, "channel_names must be like"),
        ({"labels": {"background": 0}}, "labels must be like"),
        ({"labels": {"background": 0, "ignore": 1}}, "no class beside the background"),
        ({"labels": {"background": 0, "whole": [1, 2]}}, r"label 'whole' is \[1, 2\]; it must be one integer"),
        ({"labels": {"background": 0, "far": 256}}, "label 'far' is 256; it must be one integer from 0 to 255"),
        ({"labels": {"liver": 1, "tumour": 2}}, "the background has 0"),
        ({"labels": {"background": 0, "liver": 1, "tumour": 1}}, "a value of its own"),
        ({"labels": {"background": 0, "liver": 1, "ignore": 1}}, "a value of its own"),
        ({"labels": {"background": 0, "liver": 1, "ignore": [7, 7]}}, "a value of its own"),
        (
            {"labels": {"background": 0, "liver": 1, "ignore": [7, 256]}},
            "label 'ignore' is 256; it must be one integer",
        ),
        ({"labels": {"0": "background", "1": "liver", "2": "liver"}}, "two labels have the same name"),
        ({"file_ending": ".bmp"}, r"file_ending '\.bmp' is not known; use one of \.nii\.gz"),
    ],
)
def test_a_description_that_cannot_be_used(root: Path, changes: dict[str, Any], match: str):
    with pytest.raises(DataError, match=match):
        read_raw(describe(root, **changes))


@pytest.mark.parametrize(("text", "match"), [("{", "is no JSON"), ("[]", "must hold an object")])
def test_a_description_that_is_no_object(root: Path, text: str, match: str):
    (root / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=match):
        read_raw(root)


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_other_formats_are_read_as_nifti_is(root: Path, ending: str):
    nifti: RawDataset = read_raw(root)
    expected, expected_label = load_case(nifti.cases["b"], nifti)
    for path in sorted(root.rglob("*.nii.gz")):
        write_image(path.with_name(path.name.replace(".nii.gz", ending)), read_image(path))
        path.unlink()
    describe(root, file_ending=ending)
    image, label = load(root)
    np.testing.assert_array_equal(image.array, expected.array)
    np.testing.assert_allclose(image.affine, expected.affine)
    np.testing.assert_array_equal(label, expected_label)


def test_the_real_data_sets_are_read(shared_data: Path):
    for folder in sorted(shared_data.glob("Dataset*")):
        dataset = read_raw(folder)
        image, label = load_case(next(iter(dataset.cases.values())), dataset)
        assert label is not None and label.shape == image.array.shape[1:]
        assert label.max() < len(dataset.classes)
