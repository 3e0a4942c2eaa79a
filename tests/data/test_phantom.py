from __future__ import annotations

import json
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tailseg.data.image import read_geometry, read_image
from tailseg.data.phantom import CLASSES, MIN_VOXELS, make_case, make_phantom
from tailseg.data.raw import DataError, RawDataset, load_case
from tailseg.data.splits import read_split

SMALL = (16, 24, 24)
SECONDS_PER_CASE = 4  # measured: 0.4 on one core; the rest is for machines that are busy with other things


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> RawDataset:
    start = time.perf_counter()
    dataset = make_phantom(tmp_path_factory.mktemp("phantom"), cases=8, labelled=6)
    assert time.perf_counter() - start < 8 * SECONDS_PER_CASE
    return dataset


@pytest.fixture(scope="module")
def counts(phantom: RawDataset) -> np.ndarray:
    """Voxels of every class in every case with a label file, (cases, K)."""
    labels = [load_case(case, phantom)[1] for case in phantom.cases.values()]
    return np.stack([np.bincount(label.ravel(), minlength=len(CLASSES)) for label in labels if label is not None])


def centers(case: int) -> dict[str, np.ndarray]:
    """Where every organ lies: right, anterior, superior in mm."""
    _, label = make_case(case)
    found = {}
    for value, organ in enumerate(CLASSES):
        k, j, i = np.argwhere(label.array == value).mean(axis=0)
        found[organ] = (label.affine @ [i, j, k, 1])[:3]
    return found


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_same_arguments_write_the_same_bytes(tmp_path: Path):
    for folder in ("one", "two"):
        make_phantom(tmp_path / folder, cases=6, labelled=6, shape=SMALL, seed=3)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_another_seed_makes_other_patients():
    one, two = make_case(0, shape=SMALL, seed=0)[0], make_case(0, shape=SMALL, seed=1)[0]
    assert not np.array_equal(one.array, two.array)


def test_a_case_does_not_depend_on_how_many_there_are(tmp_path: Path):
    few = make_phantom(tmp_path / "few", cases=6, labelled=6, shape=SMALL)
    many = make_phantom(tmp_path / "many", cases=7, labelled=6, shape=SMALL)
    same = [dataset.cases["phantom_005"].images[0].read_bytes() for dataset in (few, many)]
    assert same[0] == same[1]


def test_every_organ_is_in_every_labelled_case(counts: np.ndarray):
    assert counts.shape == (6, 14)
    assert counts.min() >= MIN_VOXELS


def test_every_organ_is_there_even_on_a_coarse_grid():
    for index in range(3):
        _, label = make_case(index, shape=SMALL, spacing=(15.0, 13.0, 13.0))
        assert set(np.unique(label.array)) == set(range(14))


def test_organs_are_as_unequal_as_in_patients(counts: np.ndarray):
    voxels = dict(zip(CLASSES, counts.sum(axis=0), strict=True))
    assert voxels["liver"] > 400 * voxels["right_adrenal_gland"]
    assert voxels["liver"] == max(voxels[organ] for organ in CLASSES[1:])
    for large, small in (
        ("stomach", "left_kidney"),
        ("right_kidney", "aorta"),
        ("aorta", "esophagus"),
        ("pancreas", "portal_and_splenic_vein"),
        ("esophagus", "right_adrenal_gland"),
    ):
        assert voxels[large] > voxels[small], (large, small)


@pytest.mark.parametrize("case", range(4))
def test_organs_lie_on_the_right_side_of_the_patient_in_every_orientation(case: int):
    at = centers(case)
    assert at["liver"][0] > 30 > -30 > at["spleen"][0]
    assert at["right_kidney"][0] > 30 > -30 > at["left_kidney"][0]
    assert at["inferior_vena_cava"][0] > at["aorta"][0]
    assert at["stomach"][1] > at["left_kidney"][1]
    assert at["gallbladder"][2] < at["liver"][2]
    assert at["right_adrenal_gland"][2] > at["right_kidney"][2]
    assert at["esophagus"][2] > at["pancreas"][2]


def test_files_differ_in_orientation_spacing_and_tilt(phantom: RawDataset):
    affines = [read_geometry(case.images[0])[1] for case in phantom.cases.values()]
    assert {"".join(nib.orientations.aff2axcodes(affine)) for affine in affines} == {"RAS", "LAS", "LPS"}
    spacings = [read_image(case.images[0]).spacing for case in phantom.cases.values()]
    assert len(set(spacings)) == 8
    assert np.allclose(spacings, (5, 4, 4), rtol=0.05)
    oblique = [bool(np.count_nonzero(np.abs(affine[:3, :3]) > 1e-6) > 3) for affine in affines]
    assert any(oblique) and not all(oblique)


def test_scans_look_like_ct(phantom: RawDataset):
    case = phantom.cases["phantom_000"]
    scan = read_image(case.images[0])
    image, label = load_case(case, phantom)
    assert label is not None
    assert scan.array.dtype == np.int16 and scan.array.min() < -950 and scan.array.max() > 250
    means = {organ: image.array[0][label == index].mean() for index, organ in enumerate(CLASSES)}
    assert 70 < means["liver"] < 140 and means["gallbladder"] < 50 < means["spleen"]
    assert means["right_kidney"] > means["liver"]
    liver = image.array[0][label == CLASSES.index("liver")]
    assert 5 < liver.std() < 40


def test_layout_has_label_files_only_for_labelled_cases(phantom: RawDataset):
    split = read_split(phantom, "phantom")
    assert [len(split.labelled), len(split.unlabelled), len(split.val), len(split.test)] == [1, 2, 2, 3]
    assert {case.id for case in phantom.cases.values() if case.label is None} == set(split.unlabelled)
    assert len(list((phantom.root / "labelsTr").iterdir())) == 6
    assert phantom.classes == CLASSES


def test_names_are_those_of_synapse(shared_data: Path):
    description = json.loads((shared_data / "Dataset111_SynapseP23" / "dataset.json").read_text())
    assert {name: value for value, name in enumerate(CLASSES)} == description["labels"]


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="something other"):
        make_phantom(tmp_path, shape=SMALL)
    make_phantom(tmp_path / "a", cases=6, labelled=6, shape=SMALL)
    with pytest.raises(DataError, match="something other"):
        make_phantom(tmp_path / "a", cases=6, labelled=6, shape=SMALL, seed=1)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a", "thesis.txt"]


def test_an_interrupted_folder_is_completed(tmp_path: Path):
    whole = make_phantom(tmp_path, cases=6, labelled=6, shape=SMALL)
    before = files(tmp_path)
    (tmp_path / "splits.json").unlink()
    whole.cases["phantom_004"].images[0].unlink()
    make_phantom(tmp_path, cases=6, labelled=6, shape=SMALL)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labelled": 5}, "from 6 to 16"),
        ({"cases": 8, "labelled": 9}, "from 6 to 8"),
        ({"shape": (4, 80, 80)}, "8 or more"),
        ({"spacing": (0.0, 4.0, 4.0)}, "above 0"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path: Path, options: dict, message: str):
    with pytest.raises(DataError, match=message):
        make_phantom(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
