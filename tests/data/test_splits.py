from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tailseg.data.raw import Case, DataError, RawDataset, read_raw
from tailseg.data.splits import Split, read_split

GOOD = {"labelled": ["a", "b"], "unlabelled": ["u"], "val": ["v"], "test": ["t"]}


@pytest.fixture
def dataset(tmp_path: Path) -> RawDataset:
    """Labels for a, b, v, t and spare; none for u and w."""
    cases = {
        case: Case(case, (tmp_path / f"{case}_0000.nii.gz",), None if case in "uw" else tmp_path / f"{case}.nii.gz")
        for case in ("a", "b", "spare", "t", "u", "v", "w")
    }
    return RawDataset(tmp_path, "tiny", ("CT",), ("background", "liver"), (0, 1), (), cases)


def read(dataset: RawDataset, split: Any, name: str = "tenth") -> Split:
    (dataset.root / "splits.json").write_text(json.dumps({"tenth": split, "fifth": GOOD}))
    return read_split(dataset, name)


def test_a_split_need_not_use_every_case(dataset: RawDataset):
    split = read(dataset, GOOD)
    assert split == Split("tenth", ("a", "b"), ("u",), ("v",), ("t",))
    assert split.training == ("a", "b", "u", "v")


def test_both_spellings_and_a_source_are_read(dataset: RawDataset):
    american = {"labeled": ["a", "b"], "unlabeled": ["u"], "val": ["v"], "test": ["t"], "source": "a paper"}
    assert read(dataset, american) == read(dataset, GOOD)


def test_sets_may_be_left_out(dataset: RawDataset):
    assert read(dataset, {"labelled": ["a"]}) == Split("tenth", ("a",))


def test_a_case_with_a_label_file_may_be_unlabelled(dataset: RawDataset):
    assert read(dataset, {"labelled": ["a"], "unlabelled": ["b"]}).unlabelled == ("b",)


def test_another_file_may_hold_the_splits(dataset: RawDataset):
    file = dataset.root / "mine.json"
    file.write_text(json.dumps({"mine": GOOD}))
    assert read_split(dataset, "mine", file).labelled == ("a", "b")


def test_the_digest_is_of_the_sets_alone():
    one = Split("one", ("a", "b"), ("u", "w"), ("v",), ("t",))
    assert one.digest == Split("two", ("b", "a"), ("w", "u"), ("v",), ("t",)).digest
    text = '{"labelled": ["a", "b"], "test": ["t"], "unlabelled": ["u", "w"], "val": ["v"]}'
    assert one.digest == hashlib.sha256(text.encode()).hexdigest()
    moved = Split("one", ("a", "b"), ("u", "w"), ("t",), ("v",))
    assert moved.digest != one.digest


def test_a_split_comes_back_from_json_unless_it_was_changed():
    split = Split("one", ("a",), ("u",), ("v",), ("t",))
    saved = json.loads(json.dumps(split.to_dict()))
    assert Split.from_dict(saved) == split
    with pytest.raises(DataError, match="other cases than its sha256 says"):
        Split.from_dict(saved | {"unlabelled": ["u", "t2"]})


@pytest.mark.parametrize(
    ("sets", "match"),
    [
        ({"test": ["t", "a", "b"]}, "'tenth': a, b are both labelled and test; keep one of each"),
        ({"val": ["v", "u"]}, "u are both unlabelled and val"),
        ({"val": ["t"]}, "t are both val and test"),
        ({"labelled": ["a", "b", "a"]}, "names a twice under labelled"),
        ({"labelled": []}, "no labelled cases; training needs at least one"),
        ({"unlabelled": ["spar"]}, "unlabelled names 'spar', which is not in .*Did you mean 'spare'"),
        ({"labelled": ["a", "w"]}, "labelled case 'w' has no file in labelsTr"),
        ({"val": ["w"]}, "val case 'w' has no file in labelsTr"),
        ({"test": ["w"]}, "test case 'w' has no file in labelsTr"),
        ({"unlabeld": ["w"]}, "has no set 'unlabeld'. Did you mean 'unlabelled'"),
        ({"unlabeled": ["w"]}, "names unlabelled twice, as 'unlabeled' too"),
        ({"test": "t"}, "test must be a list of case ids"),
        ({"test": [1]}, "test must be a list of case ids"),
    ],
)
def test_a_split_that_cannot_be_used(dataset: RawDataset, sets: dict[str, Any], match: str):
    with pytest.raises(DataError, match=match):
        read(dataset, GOOD | sets)


@pytest.mark.parametrize(
    ("first", "second", "sets"),
    [
        ("a", "t", "labelled (case 'a') and in test (case 't')"),
        ("u", "v", "unlabelled (case 'u') and in val (case 'v')"),
        ("v", "t", "val (case 'v') and in test (case 't')"),
    ],
)
def test_a_patient_never_stands_on_both_sides(dataset: RawDataset, first: str, second: str, sets: str):
    cases = {
        id_: replace(case, patient="p7") if id_ in (first, second) else case for id_, case in dataset.cases.items()
    }
    match = (
        rf"splits\.json, split 'tenth': patient 'p7' stands in {re.escape(sets)}; keep all cases of a patient in one"
    )
    with pytest.raises(DataError, match=match):
        read(replace(dataset, cases=cases), GOOD)


def test_a_patient_may_be_learnt_from_with_and_without_label(dataset: RawDataset):
    cases = {id_: replace(case, patient="p7") if id_ in "abu" else case for id_, case in dataset.cases.items()}
    assert read(replace(dataset, cases=cases), GOOD).unlabelled == ("u",)


def test_an_unknown_name_gets_a_suggestion(dataset: RawDataset):
    with pytest.raises(DataError, match=r"splits\.json holds no split 'tent'. Did you mean 'tenth'"):
        read(dataset, GOOD, "tent")


@pytest.mark.parametrize(
    ("text", "match"),
    [("{", "is no JSON"), ("[]", r"must hold \{"), ('{"tenth": ["a"]}', "must be an object with the lists labelled")],
)
def test_a_file_that_holds_no_splits(dataset: RawDataset, text: str, match: str):
    (dataset.root / "splits.json").write_text(text)
    with pytest.raises(DataError, match=match):
        read_split(dataset, "tenth")


def test_no_file(dataset: RawDataset):
    with pytest.raises(DataError, match=r"splits\.json is missing; write"):
        read_split(dataset, "tenth")


def test_the_published_splits_are_read(shared_data: Path):
    for folder in sorted(shared_data.glob("Dataset*")):
        dataset = read_raw(folder)
        for name in json.loads((folder / "splits.json").read_text()):
            assert read_split(dataset, name).test
