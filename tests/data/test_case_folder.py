from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from tailseg.core import IGNORE
from tailseg.data import case_folder
from tailseg.data.case_folder import read_case_info, sample_positions, write_case
from tailseg.data.image import Image
from tailseg.data.intensity import ZScore
from tailseg.data.preparation import Preparation, PreparedCase, count_labels, prepare_case

SOURCE = {"imagesTr/a_0000.nii.gz": (7, 123456789)}


def label_of(seed: int = 0) -> np.ndarray:
    """Classes 0 to 2 often, 3 in three voxels, 4 nowhere, and some voxels that nobody annotated."""
    rng = np.random.default_rng(seed)
    label = rng.choice(np.array([0, 1, 2, IGNORE], np.uint8), (7, 30, 31), p=[0.6, 0.3, 0.05, 0.05])
    label[2, 4, 5] = label[2, 4, 6] = label[6, 29, 30] = 3
    return label


def prepared(label: np.ndarray | None = None) -> PreparedCase:
    image = Image(np.random.default_rng(1).normal(0, 1, (2, 7, 30, 31)).astype(np.float32), np.diag([1, 2, 3, 1.0]))
    return prepare_case(image, label, Preparation(intensity=ZScore()))


def test_positions_lie_in_their_class_and_are_few_and_different() -> None:
    label = label_of()
    voxels, counts = sample_positions(label, count_labels(label)[:, :5], "case")
    totals = [np.count_nonzero(label == c) for c in range(5)]
    assert counts.tolist() == [min(total, 1000) for total in totals] == [1000, 1000, totals[2], 3, 0]
    assert voxels.dtype == np.uint16
    classes = np.repeat(np.arange(5), counts)
    np.testing.assert_array_equal(label[tuple(voxels.T)], classes)
    assert len(np.unique(voxels, axis=0)) == len(voxels)


def test_positions_are_drawn_evenly() -> None:
    label = np.zeros((50, 20, 20), np.uint8)
    voxels, _ = sample_positions(label, count_labels(label)[:, :1], "case")
    np.testing.assert_allclose(voxels.mean(0), [24.5, 9.5, 9.5], atol=1.5)
    np.testing.assert_allclose(voxels.std(0), [14.4, 5.8, 5.8], atol=1.0)


def test_positions_depend_on_case_and_label_alone() -> None:
    label = label_of()
    counts = count_labels(label)[:, :5]
    first, again, other = (sample_positions(label, counts, case)[0] for case in ("case", "case", "other"))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_positions_are_those_of_stores_made_before() -> None:
    label = label_of()
    voxels, _ = sample_positions(label, count_labels(label)[:, :5], "case")
    assert hashlib.sha256(voxels.tobytes()).hexdigest()[:16] == "6a659e6b98a86471"


def test_positions_of_a_label_without_classes_are_none() -> None:
    label = np.full((3, 4, 5), IGNORE, np.uint8)
    voxels, counts = sample_positions(label, count_labels(label)[:, :5], "case")
    assert voxels.shape == (0, 3) and voxels.dtype == np.uint16 and not counts.any()


def test_a_folder_holds_what_was_prepared(tmp_path: Path) -> None:
    label, case = label_of(), prepared(label_of())
    info = write_case(tmp_path, "a", case, 5, SOURCE)
    folder = tmp_path / "cases" / "a"
    image = np.load(folder / "image.npy", mmap_mode="r")
    assert image.dtype == np.float16
    np.testing.assert_array_equal(image, case.image.astype(np.float16))
    np.testing.assert_array_equal(np.load(folder / "label.npy"), label)
    assert info.class_voxels == tuple(np.count_nonzero(label == c) for c in range(5))
    assert info.ignored == np.count_nonzero(label == IGNORE)
    assert info.shape == (7, 30, 31) and info.spacing == (3, 2, 1)
    assert read_case_info(tmp_path, "a") == info


def test_an_unlabelled_folder_knows_no_voxels(tmp_path: Path) -> None:
    info = write_case(tmp_path, "a", prepared(), 5, SOURCE)
    assert info.class_voxels is None and info.ignored is None
    assert sorted(path.name for path in (tmp_path / "cases" / "a").iterdir()) == ["case.json", "image.npy"]


def test_a_changed_case_replaces_the_old_one_whole(tmp_path: Path) -> None:
    write_case(tmp_path, "a", prepared(label_of()), 5, SOURCE)
    write_case(tmp_path, "a", prepared(), 5, SOURCE)
    assert not (tmp_path / "cases" / "a" / "label.npy").exists()
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_a_failed_write_leaves_the_old_case_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_case(tmp_path, "a", prepared(label_of()), 5, SOURCE)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(case_folder.os, "fsync", full)
    for case in ("a", "b"):
        with pytest.raises(OSError, match="No space left"):
            write_case(tmp_path, case, prepared(), 5, SOURCE)
    assert read_case_info(tmp_path, "a") == before
    assert [path.name for path in (tmp_path / "cases").iterdir()] == ["a"]
    assert list((tmp_path / ".tmp").iterdir()) == []


@pytest.mark.parametrize("value", [70000, -70000, np.nan])
def test_intensities_beyond_float16_are_refused(tmp_path: Path, value: float) -> None:
    case = prepared()
    case.image[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"exceed float16's 65504; choose another prepare\.intensity"):
        write_case(tmp_path, "a", case, 5, SOURCE)
    assert not (tmp_path / "cases").exists()


def test_an_unreadable_entry_is_no_entry(tmp_path: Path) -> None:
    write_case(tmp_path, "a", prepared(), 5, SOURCE)
    for text in ("", "[]", "{}", '{"shape": [1]}'):
        (tmp_path / "cases" / "a" / "case.json").write_text(text)
        assert read_case_info(tmp_path, "a") is None
