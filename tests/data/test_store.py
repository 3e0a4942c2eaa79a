from __future__ import annotations

import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tiny import make_tiny

from tailseg.data import store as store_module
from tailseg.data.intensity import ZScore
from tailseg.data.preparation import Preparation
from tailseg.data.prepare import prepare_dataset
from tailseg.data.raw import DataError, read_raw
from tailseg.data.splits import Split, read_split
from tailseg.data.store import SealedError, Store, TrainingStore

RECIPE = Preparation(spacing=(4, 4, 4), intensity=ZScore())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Split]:
    """A store of all cases of a tiny data set, and a split in which b, though it has a label, is unlabelled."""
    folder = tmp_path_factory.mktemp("store")
    dataset = read_raw(make_tiny(folder / "raw"))
    split = read_split(dataset, "tiny")
    path = prepare_dataset(dataset, RECIPE, folder / "stores").path
    return path, Split("hiding", ("a",), ("b", "u0"), split.val, split.test)


@pytest.fixture
def store(prepared: tuple[Path, Split]) -> Store:
    return Store.open(prepared[0])


@pytest.fixture
def training(store: Store, prepared: tuple[Path, Split]) -> TrainingStore:
    return store.for_training(prepared[1])


def test_a_store_tells_what_it_is(store: Store) -> None:
    assert store.preparation == RECIPE
    assert store.classes == ("background", "box", "core")
    assert store.notes() == []
    info = store.cases["a"]
    assert store.image("a").shape == (1, *info.shape) and store.label("a").shape == info.shape
    assert info.class_voxels == store.class_voxels("a") == tuple(np.bincount(store.label("a").ravel(), minlength=3))


def test_arrays_are_read_only_maps(store: Store) -> None:
    for array in (store.image("a"), store.label("a")):
        assert isinstance(array, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0
    assert not store.positions("a")[0].flags.writeable


def test_positions_are_of_the_classes_a_case_has(store: Store) -> None:
    positions = store.positions("a")
    counts = store.class_voxels("a")
    assert {label: len(voxels) for label, voxels in positions.items()} == {
        label: min(count, 1000) for label, count in enumerate(counts) if count
    }
    for label, voxels in positions.items():
        assert (store.label("a")[tuple(voxels.T)] == label).all()


def test_open_arrays_are_bounded_and_shared(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.image("a") is store.image("a")
    monkeypatch.setattr(store_module, "OPEN_ARRAYS", 2)
    small = Store.open(store.path)
    first = small.image("a")
    for case in store.cases:
        small.image(case)
    assert small.image("a") is not first


def test_threads_may_read_at_once(store: Store) -> None:
    fresh = Store.open(store.path)
    with ThreadPoolExecutor(4) as pool:
        sums = list(pool.map(lambda case: float(fresh.image(case).sum(dtype=np.float64)), [*store.cases] * 20))
    assert sums == sums[: len(store.cases)] * 20


def test_a_store_is_sent_to_another_process_without_its_arrays(store: Store, training: TrainingStore) -> None:
    assert store.image("a").shape == training.image("a").shape
    for sent in (store, training):
        data = pickle.dumps(sent)
        assert len(data) < 20_000
        np.testing.assert_array_equal(pickle.loads(data).image("a"), store.image("a"))


def test_training_reads_images_of_its_cases_and_labels_of_labelled_ones(training: TrainingStore, store: Store) -> None:
    assert list(training.cases) == ["a", "b", "u0", "v1", "v2"]
    for case in training.cases:
        np.testing.assert_array_equal(training.image(case), store.image(case))
        assert training.shape(case) == store.shape(case) and training.spacing(case) == store.spacing(case)
    for case in ("a", "v1"):
        np.testing.assert_array_equal(training.label(case), store.label(case))
        assert training.class_voxels(case) == store.class_voxels(case) == training.cases[case].class_voxels
        assert training.positions(case).keys() == store.positions(case).keys()
    assert training.classes == store.classes and training.preparation == store.preparation


@pytest.mark.parametrize("case", ["b", "u0"])
def test_training_may_not_see_an_unlabelled_case_s_label(training: TrainingStore, case: str) -> None:
    for read in (training.label, training.positions, training.class_voxels):
        with pytest.raises(SealedError, match=f"label of case '{case}': split 'hiding' hides it"):
            read(case)
    info = training.cases[case]
    assert info.class_voxels is None and info.ignored is None and info.lost_classes == ()


@pytest.mark.parametrize("case", ["t", "u1", "nobody"])
def test_training_may_not_see_a_case_outside_its_split(training: TrainingStore, case: str) -> None:
    reads = (
        training.image,
        training.label,
        training.positions,
        training.class_voxels,
        training.shape,
        training.spacing,
    )
    for read in reads:
        with pytest.raises(SealedError, match=f"may not see case '{case}'"):
            read(case)
    assert case not in training.cases


def test_a_case_without_label_has_none(store: Store) -> None:
    for read in (store.label, store.positions, store.class_voxels):
        with pytest.raises(DataError, match=r"Case 'u0' of .* has no label"):
            read("u0")


def test_a_case_that_is_not_prepared_is_named(store: Store) -> None:
    for read in (store.image, store.label, store.positions, store.shape):
        with pytest.raises(DataError, match=r"Case 'x' is not in the store .*; run `tailseg prepare`"):
            read("x")
    with pytest.raises(DataError, match=r"Case 'x' is not in the store .*; run `tailseg prepare`"):
        store.for_training(Split("other", ("a", "x")))


def test_what_is_no_complete_store_says_to_prepare(store: Store, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No prepared store at .*; run `tailseg prepare`"):
        Store.open(tmp_path / "nowhere")
    for name in ("recipe.json", "index.json"):
        broken = copy(store.path, tmp_path / f"without_{name}")
        (broken / name).unlink()
        with pytest.raises(DataError, match=f"incomplete, it has no {name}; run `tailseg prepare`"):
            Store.open(broken)
        (broken / name).write_text("{")
        with pytest.raises(DataError, match="delete it and run `tailseg prepare`"):
            Store.open(broken)
    broken = copy(store.path, tmp_path / "lost")
    shutil.rmtree(broken / "cases" / "b")
    with pytest.raises(DataError, match="incomplete, it lost case 'b'; run `tailseg prepare`"):
        Store.open(broken)


def test_a_file_lost_after_opening_is_named(store: Store, tmp_path: Path) -> None:
    opened = Store.open(copy(store.path, tmp_path / "copy"))
    for name, read in {"image.npy": opened.image, "label.npy": opened.label, "positions.npz": opened.positions}.items():
        (opened.path / "cases" / "a" / name).unlink()
        with pytest.raises(DataError, match=f"Case 'a' of .* lost its {name}"):
            read("a")


def test_another_version_is_refused(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "PREPARE_VERSION", 2)
    with pytest.raises(DataError, match="has version 1, not 2; run `tailseg prepare`"):
        Store.open(store.path)


def test_notes_tell_lost_classes_and_channels_without_contrast(tmp_path: Path) -> None:
    dataset = read_raw(make_tiny(tmp_path / "raw"))
    recipe = {"grid": [1, 1, 1], "intensity": {"name": "minmax"}}
    store = prepare_dataset(dataset, Preparation.model_validate(recipe), tmp_path, cases=["a", "u0"])
    text = "\n".join(store.notes())
    assert "Case 'a': channel 'channel0' has no contrast left." in text
    assert "Case 'u0': channel 'channel0' has no contrast left." in text
    assert "Case 'a': no voxel is left of background" in text


def copy(store: Path, target: Path) -> Path:
    shutil.copytree(store, target)
    return target
