from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections import namedtuple
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from filelock import FileLock
from tiny import make_tiny

from tailseg.data import prepare as prepare_module
from tailseg.data.intensity import Window, ZScore
from tailseg.data.preparation import Preparation, prepare_case
from tailseg.data.prepare import prepare_dataset, store_path
from tailseg.data.raw import DataError, RawDataset, load_case, read_raw
from tailseg.data.store import Store

RECIPE = Preparation(spacing=(4, 4, 4), intensity=ZScore())


@pytest.fixture
def dataset(tmp_path: Path) -> RawDataset:
    return read_raw(make_tiny(tmp_path / "raw"))


class Counter:
    """A progress callback that remembers."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, str]] = []

    def __call__(self, done: int, total: int, case: str) -> None:
        self.calls.append((done, total, case))

    @property
    def cases(self) -> list[str]:
        return sorted(case for _, _, case in self.calls)


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_the_store_holds_what_prepare_case_gives(dataset: RawDataset, tmp_path: Path) -> None:
    store = prepare_dataset(dataset, RECIPE, tmp_path / "stores")
    assert store.path == store_path(dataset, RECIPE, tmp_path / "stores")
    assert sorted(store.cases) == sorted(dataset.cases)
    for case in dataset.cases.values():
        prepared = prepare_case(*load_case(case, dataset), RECIPE)
        np.testing.assert_array_equal(store.image(case.id), prepared.image.astype(np.float16))
        assert store.cases[case.id].geometry == prepared.geometry
        assert store.spacing(case.id) == prepared.spacing
        if prepared.label is not None:
            np.testing.assert_array_equal(store.label(case.id), prepared.label)


def test_two_workers_make_the_same_store(dataset: RawDataset, tmp_path: Path) -> None:
    counter = Counter()
    alone = prepare_dataset(dataset, RECIPE, tmp_path / "alone")
    together = prepare_dataset(dataset, RECIPE, tmp_path / "together", workers=2, progress=counter)
    assert contents(alone.path) == contents(together.path)
    assert [done for done, _, _ in counter.calls] == list(range(1, 8))
    assert counter.cases == sorted(dataset.cases)


def test_unchanged_cases_are_reused_and_changed_ones_redone(dataset: RawDataset, tmp_path: Path) -> None:
    prepare_dataset(dataset, RECIPE, tmp_path)
    again = Counter()
    before = contents(prepare_dataset(dataset, RECIPE, tmp_path, progress=again).path)
    assert again.calls == []

    os.utime(dataset.cases["a"].images[0], ns=(1, 1))
    changed = Counter()
    store = prepare_dataset(dataset, RECIPE, tmp_path, progress=changed)
    assert changed.calls == [(1, 1, "a")]
    differing = {name for name, content in contents(store.path).items() if before[name] != content}
    assert differing == {"index.json", "cases/a/case.json"}


def test_an_up_to_date_store_is_not_written(
    dataset: RawDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_dataset(dataset, RECIPE, tmp_path)
    monkeypatch.setattr(prepare_module, "write_json", lambda *_: pytest.fail("wrote"))
    monkeypatch.setattr(prepare_module, "FileLock", lambda *_: pytest.fail("locked"))
    prepare_dataset(dataset, RECIPE, tmp_path)


def test_a_label_that_went_away_makes_the_case_unlabelled(dataset: RawDataset, tmp_path: Path) -> None:
    prepare_dataset(dataset, RECIPE, tmp_path / "stores")
    (dataset.root / "labelsTr" / "b.nii.gz").unlink()
    store = prepare_dataset(read_raw(dataset.root), RECIPE, tmp_path / "stores")
    assert store.cases["b"].class_voxels is None
    assert not (store.path / "cases" / "b" / "label.npy").exists()


def test_only_wanted_cases_are_prepared_and_others_stay(dataset: RawDataset, tmp_path: Path) -> None:
    assert sorted(prepare_dataset(dataset, RECIPE, tmp_path, cases=["a", "u0"]).cases) == ["a", "u0"]
    counter = Counter()
    assert sorted(prepare_dataset(dataset, RECIPE, tmp_path, cases=["b"], progress=counter).cases) == ["a", "b", "u0"]
    assert counter.cases == ["b"]
    with pytest.raises(DataError, match="has no case 'c'"):
        prepare_dataset(dataset, RECIPE, tmp_path, cases=["c"])


def test_an_outdated_case_that_is_not_wanted_leaves_the_index(dataset: RawDataset, tmp_path: Path) -> None:
    prepare_dataset(dataset, RECIPE, tmp_path, cases=["a", "b"])
    os.utime(dataset.cases["a"].images[0], ns=(1, 1))
    assert sorted(prepare_dataset(dataset, RECIPE, tmp_path, cases=["b", "t"]).cases) == ["b", "t"]


def test_a_withdrawn_case_is_forgotten(dataset: RawDataset, tmp_path: Path) -> None:
    prepare_dataset(dataset, RECIPE, tmp_path / "stores")
    dataset.cases["u0"].images[0].unlink()
    (dataset.root / "imagesTr" / "u9_0000.nii.gz").write_bytes(dataset.cases["u1"].images[0].read_bytes())
    store = prepare_dataset(read_raw(dataset.root), RECIPE, tmp_path / "stores")
    assert "u0" not in store.cases and "u9" in store.cases
    assert not (store.path / "cases" / "u0").exists()


def test_other_recipes_classes_and_data_sets_have_stores_of_their_own(dataset: RawDataset, tmp_path: Path) -> None:
    other = Preparation(spacing=(4, 4, 4), intensity=Window(low=0, high=1, rescale="window"))
    assert store_path(dataset, RECIPE, tmp_path) != store_path(dataset, other, tmp_path)
    description = json.loads((dataset.root / "dataset.json").read_text())
    for change in ({"labels": {"background": 0, "kernel": 1, "core": 2}}, {"name": "another"}):
        (dataset.root / "dataset.json").write_text(json.dumps(description | change))
        assert store_path(dataset, RECIPE, tmp_path) != store_path(read_raw(dataset.root), RECIPE, tmp_path)


def test_every_problem_is_told_at_once_and_the_rest_is_kept(dataset: RawDataset, tmp_path: Path) -> None:
    truncated, wrong = dataset.cases["a"].images[0], dataset.cases["v1"].label
    assert wrong is not None
    whole = truncated.read_bytes()
    truncated.write_bytes(whole[:500])
    label = np.full((24, 20, 22), 9, np.uint8)
    nib.save(nib.Nifti1Image(label, np.diag([2, 2, 3, 1.0])), wrong)  # pyright: ignore[reportPrivateImportUsage]

    counter = Counter()
    with pytest.raises(DataError) as raised:
        prepare_dataset(dataset, RECIPE, tmp_path / "stores", progress=counter)
    heading, *problems = str(raised.value).splitlines()
    assert heading == "2 problems:"
    assert len(problems) == 2 and str(truncated) in problems[0] and str(wrong) in problems[1]
    assert len(counter.calls) == 7
    path = store_path(dataset, RECIPE, tmp_path / "stores")
    assert sorted(folder.name for folder in (path / "cases").iterdir()) == ["b", "t", "u0", "u1", "v2"]
    assert not (path / ".tmp").exists()
    with pytest.raises(DataError, match=r"incomplete, it has no index\.json; run `tailseg prepare`"):
        Store.open(path)

    truncated.write_bytes(whole)
    rest = Counter()
    prepare_dataset(dataset, RECIPE, tmp_path / "stores", cases=["a", "b", "u0"], progress=rest)
    assert rest.cases == ["a"]


def test_a_problem_of_preparing_names_the_file(dataset: RawDataset, tmp_path: Path) -> None:
    recipe = Preparation.model_validate({"crop": {"threshold": 1e6}, "intensity": {"name": "zscore"}})
    with pytest.raises(DataError, match=r"a_0000\.nii\.gz: no voxel is above the crop threshold 1e\+06"):
        prepare_dataset(dataset, recipe, tmp_path, cases=["a"])


def test_while_a_changed_case_is_missing_the_store_is_incomplete(dataset: RawDataset, tmp_path: Path) -> None:
    path = prepare_dataset(dataset, RECIPE, tmp_path).path
    dataset.cases["a"].images[0].write_bytes(b"broken")
    with pytest.raises(DataError, match="a_0000"):
        prepare_dataset(dataset, RECIPE, tmp_path)
    with pytest.raises(DataError, match="incomplete"):
        Store.open(path)


def test_a_failure_on_a_new_case_leaves_the_old_ones_readable(dataset: RawDataset, tmp_path: Path) -> None:
    path = prepare_dataset(dataset, RECIPE, tmp_path, cases=["b"]).path
    dataset.cases["a"].images[0].write_bytes(b"broken")
    with pytest.raises(DataError, match="a_0000"):
        prepare_dataset(dataset, RECIPE, tmp_path, cases=["a", "b"])
    assert list(Store.open(path).cases) == ["b"]


def test_a_file_that_vanished_is_named(dataset: RawDataset, tmp_path: Path) -> None:
    dataset.cases["a"].images[0].unlink()
    with pytest.raises(DataError, match=r"a_0000\.nii\.gz does not exist"):
        prepare_dataset(dataset, RECIPE, tmp_path)


def test_what_an_interrupted_run_left_is_removed_and_its_cases_reused(dataset: RawDataset, tmp_path: Path) -> None:
    path = prepare_dataset(dataset, RECIPE, tmp_path).path
    (path / "index.json").unlink()
    shutil.rmtree(path / "cases" / "a")
    (path / ".tmp" / "a").mkdir(parents=True)
    (path / ".1.tmp.index.json").write_text("half")
    counter = Counter()
    prepare_dataset(dataset, RECIPE, tmp_path, progress=counter)
    assert counter.cases == ["a"]
    assert sorted(entry.name for entry in path.iterdir() if entry.name != ".lock") == [
        "cases",
        "index.json",
        "recipe.json",
    ]


def test_a_killed_worker_is_told_with_its_cases(
    dataset: RawDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module._Job, "__reduce__", lambda job: (os._exit, (9,)))  # dies on unpickling
    with pytest.raises(DataError, match=r"killed while it prepared one of a, b, .*memory: use fewer than 2 workers"):
        prepare_dataset(dataset, RECIPE, tmp_path, workers=2)


def test_a_full_disk_ends_the_work(dataset: RawDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(prepare_module, "write_case", full)
    counter = Counter()
    with pytest.raises(DataError, match=r"The disk of .* is full; free some space or choose another data\.store"):
        prepare_dataset(dataset, RECIPE, tmp_path, progress=counter)
    assert len(counter.calls) == 1


def test_too_little_space_is_refused_before_the_start(
    dataset: RawDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    voxels = 16 * 10 * 12  # 66 mm x 40 mm x 48 mm by 4 mm, 16.5 rounded to even
    needed = voxels * (2 * 7 + 5)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(prepare_module.shutil, "disk_usage", lambda _: usage(needed - 1))
    counter = Counter()
    with pytest.raises(DataError, match="7 cases takes up to"):
        prepare_dataset(dataset, RECIPE, tmp_path, progress=counter)
    assert counter.calls == []
    monkeypatch.setattr(prepare_module.shutil, "disk_usage", lambda _: usage(needed))
    prepare_dataset(dataset, RECIPE, tmp_path)


def test_runs_started_together_wait_for_each_other(
    dataset: RawDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = store_path(dataset, RECIPE, tmp_path)
    path.mkdir(parents=True)
    taken = threading.Event()

    def another_run() -> None:
        with FileLock(path / ".lock"):
            taken.set()
            time.sleep(0.3)

    other = threading.Thread(target=another_run)
    other.start()
    taken.wait()
    prepare_dataset(dataset, RECIPE, tmp_path, cases=["a"])
    other.join()
    assert "waiting for it" in caplog.text


def test_a_folder_that_cannot_be_written_is_refused(dataset: RawDataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written .*; choose another data\.store"):
        prepare_dataset(dataset, RECIPE, tmp_path / "file")
