"""Which cases are labelled, unlabelled, for validation and for test: by id, hashed, and never overlapping."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tailseg.data.raw import DataError, RawDataset
from tailseg.options import suggest

SETS = ("labelled", "unlabelled", "val", "test")
_NOTES = ("source",)  # says where a published split comes from
_SPELLINGS = {"labeled": "labelled", "unlabeled": "unlabelled"}


@dataclass(frozen=True)
class Split:
    """Case ids of the four sets. Test cases cannot be read while training."""

    name: str
    labelled: tuple[str, ...]
    unlabelled: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for first, second in itertools.combinations(SETS, 2):
            if shared := sorted(set(getattr(self, first)) & set(getattr(self, second))):
                raise DataError(
                    f"Split '{self.name}': {', '.join(shared)} are both {first} and {second}; keep one of each."
                )
        for each in SETS:
            if twice := sorted(case for case, times in Counter(getattr(self, each)).items() if times > 1):
                raise DataError(f"Split '{self.name}' names {', '.join(twice)} twice under {each}.")
        if not self.labelled:
            raise DataError(f"Split '{self.name}' has no labelled cases; training needs at least one.")

    @property
    def training(self) -> tuple[str, ...]:
        """All cases that may be read while training."""
        return (*self.labelled, *self.unlabelled, *self.val)

    @property
    def digest(self) -> str:
        """SHA-256 of the four sets, whatever their order and the split's name."""
        sets = {each: sorted(getattr(self, each)) for each in SETS}
        return hashlib.sha256(json.dumps(sets, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"sha256": self.digest}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Split:
        """What to_dict gave. Raises DataError if its cases were changed since."""
        split = cls(values["name"], *(tuple(values[each]) for each in SETS))
        if split.digest != values["sha256"]:
            raise DataError(
                f"Split '{split.name}' has other cases than its sha256 says; take the one written with the run."
            )
        return split


def read_split(dataset: RawDataset, name: str, file: Path | None = None) -> Split:
    """The split called name in file, default <root>/splits.json: {name: {labelled, unlabelled, val, test}}.

    Sets may be left out and need not use every case. Raises DataError for an unknown name or case, overlapping sets, labelled,
    validation or test cases without a label file, and validation or test patients of whom another set has scans too.
    """
    path = file or dataset.root / "splits.json"
    if not path.is_file():
        raise DataError(f'{path} is missing; write {{"my_split": {{"labelled": [...], "unlabelled": [...], ...}}}}.')
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no JSON: {error}.") from error
    if not isinstance(splits, dict):
        raise DataError(f'{path} must hold {{"my_split": {{"labelled": [...], "unlabelled": [...], ...}}}}.')
    if name not in splits:
        raise DataError(f"{path} holds no split '{name}'. {suggest(name, splits)}")
    sets = _sets(splits[name], f"{path}, split '{name}'")
    split = Split(name, *(sets.get(each, ()) for each in SETS))
    _check_cases(split, dataset, path)
    _check_patients(split, dataset, path)
    return split


def _sets(given: Any, where: str) -> dict[str, tuple[str, ...]]:
    """The sets as they are written, under our spelling."""
    if not isinstance(given, dict):
        raise DataError(f"{where} must be an object with the lists {', '.join(SETS)}.")
    sets: dict[str, tuple[str, ...]] = {}
    for key, cases in given.items():
        each = _SPELLINGS.get(key, key)
        if each in _NOTES:
            continue
        if each not in SETS:
            raise DataError(f"{where} has no set '{key}'. {suggest(key, SETS)}")
        if each in sets:
            raise DataError(f"{where} names {each} twice, as '{key}' too; keep one spelling.")
        if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
            raise DataError(f"{where}: {key} must be a list of case ids.")
        sets[each] = tuple(cases)
    return sets


def _check_cases(split: Split, dataset: RawDataset, path: Path) -> None:
    for each in SETS:
        for case in getattr(split, each):
            if case not in dataset.cases:
                raise DataError(
                    f"{path}, split '{split.name}': {each} names '{case}', which is not in {dataset.root}. "
                    f"{suggest(case, dataset.cases)}"
                )
            if each != "unlabelled" and dataset.cases[case].label is None:
                raise DataError(
                    f"{path}, split '{split.name}': {each} case '{case}' has no file in labelsTr; add it, or move the case "
                    "to unlabelled."
                )


def _check_patients(split: Split, dataset: RawDataset, path: Path) -> None:
    """Scans of one patient resemble each other: scores on one tell of what was learnt from another. Both may be learnt from,
    one with its label and one without."""
    for first, second in itertools.combinations(SETS, 2):
        if (first, second) == ("labelled", "unlabelled"):
            continue
        others = {dataset.cases[case].patient: case for case in getattr(split, second)}
        for case in getattr(split, first):
            patient = dataset.cases[case].patient
            if patient in others:
                raise DataError(
                    f"{path}, split '{split.name}': patient '{patient}' stands in {first} (case '{case}') and in {second} "
                    f"(case '{others[patient]}'); keep all cases of a patient in one of them."
                )
