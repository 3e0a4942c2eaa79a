"""What a folder is like, seen in data sets of known numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import make_tiny

from tailseg.data.fingerprint import Fingerprint, take_fingerprint
from tailseg.data.image import Image, write_image
from tailseg.data.raw import DataError, read_raw

LABELLED = ["a", "b", "v1", "v2", "t"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("fingerprint") / "tiny")


def look(root: Path, workers: int = 1) -> Fingerprint:
    return take_fingerprint(read_raw(root), LABELLED, ["u0", "u1"], workers=workers)


def test_classes_are_counted_in_every_labelled_case(tiny: Path):
    found = look(tiny)
    total, box, core = 24 * 20 * 22, 12**3 - 4**3, 4**3
    assert found.class_voxels == (5 * (total - box - core), 5 * box, 5 * core)
    assert found.class_cases == (5, 5, 5) and found.median_voxels[1:] == (box, core)
    assert found.imbalance == pytest.approx(box / core) and found.by_size == [1, 2]
    assert found.shares[2] == pytest.approx(core / total)
    assert found.held["a"] == {1, 2} and not found.never_seen


def test_grids_are_those_of_the_files_and_unlabelled_cases_need_no_reading(tiny: Path):
    found = look(tiny)
    assert [grid.case for grid in found.grids] == sorted(LABELLED)
    assert [grid.case for grid in found.others] == ["u0", "u1"]
    assert found.median_spacing("canonical") == (3, 2, 2)
    assert {shape for shape, _ in found.shapes("canonical")} == {(22, 20, 24)}


def test_intensities_are_told_inside_the_classes_and_overall(tiny: Path):
    (channel,) = look(tiny).channels
    assert channel.inside[1] == pytest.approx(100, abs=5)  # the box has 100, its noise 20
    assert channel.overall[1] == pytest.approx(0, abs=5)
    assert channel.low < -60 and channel.high > 230


def test_two_looks_and_two_workers_see_the_same(tiny: Path):
    first, again = look(tiny), look(tiny, workers=2)
    assert first.channels == again.channels and first.case_voxels == again.case_voxels and first.grids == again.grids


def test_a_sideways_scan_is_told_along_the_patients_axes(tmp_path: Path):
    root = make_tiny(tmp_path / "tiny")
    turn = np.array([[0, 0, 5.0, 0], [2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1]])  # file axes i, j, k are A, S, R
    for case in LABELLED:
        write_image(root / "imagesTr" / f"{case}_0000.nii.gz", Image(np.ones((9, 20, 24), np.int16), turn))
        write_image(root / "labelsTr" / f"{case}.nii.gz", Image(np.ones((9, 20, 24), np.uint8), turn))
    (grid, *_) = look(root).grids
    assert grid.shape == (9, 20, 24) and grid.slice_axis == 0
    assert grid.turned("canonical") == ((20, 24, 9), (2, 2, 5))
    assert grid.turned("file") == ((9, 20, 24), (5, 2, 2))


def test_all_broken_files_are_named_together(tmp_path: Path):
    root = make_tiny(tmp_path / "tiny")
    for case in ("a", "v1"):
        (root / "imagesTr" / f"{case}_0000.nii.gz").write_bytes(b"no scan")
    with pytest.raises(DataError, match=r"(?s)2 problems:.*a_0000.*v1_0000"):
        look(root)
