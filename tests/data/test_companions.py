"""Arrays kept beside the scans: made once, whole or not at all, and of nothing that training may not see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from tiny import make_tiny
from torch import Tensor

from tailseg.data.companions import CompanionStore
from tailseg.data.intensity import ZScore
from tailseg.data.preparation import Preparation
from tailseg.data.prepare import prepare_dataset
from tailseg.data.raw import read_raw
from tailseg.data.splits import read_split
from tailseg.data.store import SealedError, TrainingStore
from tailseg.data.stream import PatchRequest
from tailseg.files import WriteError

CPU = torch.device("cpu")
CASES = ("a", "b", "u0", "u1")


class Means:
    """Says of every slice its mean, as one place; breaks off at the scan `last`."""

    def __init__(self, key: str = "means", last: int = 100) -> None:
        self.key, self.last, self.seen = key, last, 0

    def encode(self, scans: Iterable[Tensor]) -> Iterator[np.ndarray]:
        for scan in scans:
            if self.seen == self.last:
                raise KeyboardInterrupt
            self.seen += 1
            yield scan.mean((0, 2, 3)).reshape(-1, 1, 1, 1).half().numpy()

    def cut(
        self, array: np.ndarray, shape: tuple[int, ...], start: tuple[int, ...], patch_size: tuple[int, ...]
    ) -> Tensor:
        assert len(array) == shape[0]
        return torch.tensor(array[start[0] : start[0] + patch_size[0]]).permute(3, 0, 1, 2)


@pytest.fixture
def store(tmp_path: Path) -> TrainingStore:
    """Of all cases, the test case t too."""
    dataset = read_raw(make_tiny(tmp_path / "raw"))
    recipe = Preparation(spacing=(4, 4, 4), intensity=ZScore())
    return prepare_dataset(dataset, recipe, tmp_path / "stores").for_training(read_split(dataset, "tiny"))


def test_every_case_is_encoded_once_and_found_again(store: TrainingStore):
    told: list[tuple[int, int, str]] = []
    CompanionStore(store, Means()).build(CASES, CPU, lambda *done: told.append(done))
    assert told == [(1, 4, "a"), (2, 4, "b"), (3, 4, "u0"), (4, 4, "u1")]
    again = Means()
    companions = CompanionStore(store, again)
    companions.build(CASES, CPU)
    assert again.seen == 0
    array = store.companion("b", "means")
    assert isinstance(array, np.memmap) and array.dtype == np.float16
    np.testing.assert_allclose(array.ravel(), store.image("b").mean((0, 2, 3), dtype=np.float64), atol=1e-3)
    cut = companions.cut(PatchRequest("b", (2, 0, 0)), (3, 4, 4))
    assert cut.flatten().tolist() == array[2:5].ravel().tolist()


def test_another_key_is_another_array(store: TrainingStore):
    for companion in (Means(), Means("others")):
        CompanionStore(store, companion).build(CASES, CPU)
        assert companion.seen == 4


def test_what_was_done_when_it_broke_off_is_kept_and_nothing_half(store: TrainingStore):
    with pytest.raises(KeyboardInterrupt):
        CompanionStore(store, Means(last=2)).build(CASES, CPU)
    assert sorted(path.parent.name for path in store.path.glob("cases/*/*means*")) == ["a", "b"]
    left = store.path / "cases" / "u0" / ".123.tmp.means.npy"  # as a killed process leaves it
    left.touch()
    rest = Means()
    CompanionStore(store, rest).build(CASES, CPU)
    assert rest.seen == 2 and not left.exists()


def test_what_training_may_not_see_is_never_encoded(store: TrainingStore):
    companion = Means()
    with pytest.raises(SealedError, match="may not see case 't'"):
        CompanionStore(store, companion).build(["a", "t"], CPU)
    with pytest.raises(SealedError, match="may not see case 't'"):
        CompanionStore(store, companion).cut(PatchRequest("t", (0, 0, 0)), (1, 1, 1))
    assert companion.seen == 0 and not [*store.path.glob("cases/*/*means*")]


def test_a_store_that_cannot_be_written_will_do_where_nothing_is_missing(
    store: TrainingStore, monkeypatch: pytest.MonkeyPatch
):
    CompanionStore(store, Means()).build(CASES, CPU)
    monkeypatch.setattr("tailseg.data.companions.FileLock", lambda path: pytest.fail("asked to write"))
    CompanionStore(store, Means()).build(CASES, CPU)


def test_runs_started_together_encode_once(store: TrainingStore, caplog: pytest.LogCaptureFixture):
    second = Means()
    with ThreadPoolExecutor(1) as pool:
        with FileLock(store.path / ".lock"):
            waiting = pool.submit(CompanionStore(store, second).build, CASES, CPU)
            while "is writing" not in caplog.text:
                assert not waiting.done()
            for case in CASES[:3]:  # what the first of them does meanwhile
                np.save(store.companion_path(case, "means"), np.zeros((store.shape(case)[0], 1, 1, 1), np.float16))
        waiting.result(timeout=60)
    assert second.seen == 1


def test_a_store_that_cannot_be_written_says_so(store: TrainingStore, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tailseg.data.companions.FileLock.acquire", refuse)
    with pytest.raises(WriteError, match=r"Permission denied; choose another data\.store"):
        CompanionStore(store, Means()).build(CASES, CPU)


def test_a_case_prepared_anew_has_to_be_encoded_anew(store: TrainingStore, tmp_path: Path):
    CompanionStore(store, Means()).build(CASES, CPU)
    image = tmp_path / "raw" / "imagesTr" / "u0_0000.nii.gz"
    image.write_bytes((tmp_path / "raw" / "imagesTr" / "u1_0000.nii.gz").read_bytes())
    dataset = read_raw(tmp_path / "raw")
    renewed = prepare_dataset(dataset, store.preparation, tmp_path / "stores").for_training(read_split(dataset, "tiny"))
    assert renewed.path == store.path
    companion = Means()
    CompanionStore(renewed, companion).build(CASES, CPU)
    assert companion.seen == 1
    assert np.array_equal(renewed.companion("u0", "means"), renewed.companion("u1", "means"))
