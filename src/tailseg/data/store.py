"""The prepared store: memory-mapped arrays of every case and an index of what they hold.

    <store>/recipe.json                  what made it
    <store>/index.json                   every case with shape, spacing, voxels per class, geometry and source files
    <store>/cases/<case>/image.npy       (C, D, H, W) float16
    <store>/cases/<case>/label.npy       (D, H, W) uint8, of labelled cases
    <store>/cases/<case>/positions.npz   up to 1000 voxels of every class, of labelled cases
    <store>/cases/<case>/case.json       this case's entry of the index
    <store>/cases/<case>/<key>.npy       what a frozen teacher says of this case (tailseg.data.companions)

A case's folder appears when it is complete, and the index last of all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter

from tailseg.data.geometry import Geometry, Spacing
from tailseg.data.image import Shape
from tailseg.data.preparation import Preparation
from tailseg.data.raw import DataError, RawDataset
from tailseg.data.splits import Split

PREPARE_VERSION = 1
"""Part of every store's digest; raised whenever the same recipe would give other arrays or files."""

OPEN_ARRAYS = 256
"""Memory maps kept open; each holds a file descriptor, of which a process often has 1024."""


class SealedError(RuntimeError):
    """Training asked for what it must not see. Always a mistake in the code that asked."""


class StoreRecipe(BaseModel):
    """What a store is made of; stores with the same recipe hold the same arrays for the same files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    preparation: Preparation
    dataset: str
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    label_values: tuple[int, ...]
    ignore_values: tuple[int, ...]

    @classmethod
    def of(cls, dataset: RawDataset, preparation: Preparation) -> StoreRecipe:
        return cls(
            version=PREPARE_VERSION,
            preparation=preparation,
            dataset=dataset.name,
            channels=dataset.channels,
            classes=dataset.classes,
            label_values=dataset.label_values,
            ignore_values=dataset.ignore_values,
        )

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class CaseInfo:
    """One entry of the index. shape: (D, H, W). spacing: mm, (D, H, W).

    class_voxels: (K,), without IGNORE, whose voxels are counted in ignored; both None for a case without label.
    constant_channels: channels without contrast. lost_classes: classes that vanished when the label was resampled.
    source: file, relative to the data set -> [bytes, mtime in ns], when it was prepared.
    unannotated: classes that nobody looked for in the label.
    """

    shape: Shape
    spacing: Spacing
    class_voxels: tuple[int, ...] | None
    ignored: int | None
    constant_channels: tuple[int, ...]
    lost_classes: tuple[int, ...]
    geometry: Geometry
    source: Mapping[str, tuple[int, int]]
    unannotated: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CaseInfo:
        """Raises ValueError if values is not what to_dict gave."""
        return _CASE_INFO.validate_python(values)


_CASE_INFO = TypeAdapter(CaseInfo)


class Store:
    """A prepared store, opened for reading. cases: every case of the index, by id.

    Safe to read from several threads; the arrays are read-only memory maps.
    """

    def __init__(self, path: Path, recipe: StoreRecipe, cases: Mapping[str, CaseInfo]) -> None:
        self.path, self.recipe, self.cases = path, recipe, MappingProxyType(dict(cases))
        self._array = lru_cache(OPEN_ARRAYS)(self._load)
        self._positions = lru_cache(OPEN_ARRAYS)(self._load_positions)

    @classmethod
    def open(cls, path: Path) -> Store:
        """path: folder of one recipe. Raises DataError if it is missing, incomplete or of another version."""
        if not path.is_dir():
            raise DataError(f"No prepared store at {path}; run `tailseg prepare`.")
        try:
            recipe = StoreRecipe.model_validate_json((path / "recipe.json").read_bytes())
            index = json.loads((path / "index.json").read_bytes())
            cases = {case: CaseInfo.from_dict(entry) for case, entry in index["cases"].items()}
            folders = {entry.name for entry in os.scandir(path / "cases")}
        except FileNotFoundError as error:
            name = Path(error.filename).name
            raise DataError(f"The store {path} is incomplete, it has no {name}; run `tailseg prepare`.") from None
        except (ValueError, TypeError, LookupError) as error:
            raise DataError(
                f"The store {path} is unreadable ({error}); delete it and run `tailseg prepare`."
            ) from error
        if recipe.version != PREPARE_VERSION:
            raise DataError(
                f"The store {path} has version {recipe.version}, not {PREPARE_VERSION}; run `tailseg prepare`."
            )
        if absent := sorted(cases.keys() - folders):
            raise DataError(f"The store {path} is incomplete, it lost case '{absent[0]}'; run `tailseg prepare`.")
        return cls(path, recipe, cases)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.path, self.recipe, dict(self.cases))  # a pickled memory map would be a copy of the array

    @property
    def preparation(self) -> Preparation:
        return self.recipe.preparation

    @property
    def classes(self) -> tuple[str, ...]:
        return self.recipe.classes

    def image(self, case: str) -> np.ndarray:
        """(C, D, H, W) float16."""
        self.info(case)
        return self._array(case, "image.npy")

    def label(self, case: str) -> np.ndarray:
        """(D, H, W) uint8 class indices and IGNORE. Raises DataError for a case without label."""
        self.class_voxels(case)
        return self._array(case, "label.npy")

    def positions(self, case: str) -> dict[int, np.ndarray]:
        """Class -> (n, 3) uint16 voxels (D, H, W), up to 1000 drawn evenly, in raster order; only classes it has."""
        self.class_voxels(case)
        return dict(self._positions(case))

    def class_voxels(self, case: str) -> tuple[int, ...]:
        """(K,) voxels of each class, without IGNORE. Raises DataError for a case without label."""
        counts = self.info(case).class_voxels
        if counts is None:
            raise DataError(f"Case '{case}' of {self.path} has no label.")
        return counts

    def companion(self, case: str, key: str) -> np.ndarray:
        """What the companion of this key said of the case. Raises DataError where it was not asked."""
        self.info(case)
        return self._array(case, f"{key}.npy")

    def companion_path(self, case: str, key: str) -> Path:
        """Beside the image, so that it goes when the case is prepared anew or withdrawn."""
        self.info(case)
        return self.path / "cases" / case / f"{key}.npy"

    def shape(self, case: str) -> Shape:
        return self.info(case).shape

    def spacing(self, case: str) -> Spacing:
        return self.info(case).spacing

    def info(self, case: str) -> CaseInfo:
        if case not in self.cases:
            raise DataError(
                f"Case '{case}' is not in the store {self.path}; run `tailseg prepare` for the split it is in."
            )
        return self.cases[case]

    def notes(self) -> list[str]:
        """One sentence for each thing that preparing did to a case and that a person should know."""
        contrast = [
            f"Case '{case}': channel '{self.recipe.channels[channel]}' has no contrast left."
            for case, info in self.cases.items()
            for channel in info.constant_channels
        ]
        lost = [
            f"Case '{case}': no voxel is left of {', '.join(self.classes[label] for label in info.lost_classes)}."
            for case, info in self.cases.items()
            if info.lost_classes
        ]
        return contrast + lost

    def for_training(self, split: Split) -> TrainingStore:
        return TrainingStore(self, split)

    def _load_positions(self, case: str) -> Mapping[int, np.ndarray]:
        with self._load(case, "positions.npz") as file:
            voxels, counts = file["voxels"], file["counts"]
        voxels.flags.writeable = False
        parts = np.split(voxels, np.cumsum(counts)[:-1])
        return {label: part for label, part in enumerate(parts) if len(part)}

    def _load(self, case: str, name: str) -> Any:
        try:
            return np.load(self.path / "cases" / case / name, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DataError(
                f"Case '{case}' of {self.path} lost its {name} ({error}); run `tailseg prepare`."
            ) from error


class TrainingStore:
    """What training may see of a store: the images of the labelled, unlabelled and validation cases of a split, and the
    labels of the labelled and validation ones. cases: their entries, without what an unlabelled case's label would tell.

    Everything else raises SealedError, whether or not the store holds it.
    """

    def __init__(self, store: Store, split: Split) -> None:
        for case in split.training:
            store.info(case)
        self._store, self._split = store, split
        self._labelled = frozenset(split.labelled) | frozenset(split.val)
        sealed = {"class_voxels": None, "ignored": None, "lost_classes": ()}
        self.cases: Mapping[str, CaseInfo] = MappingProxyType(
            {
                case: store.cases[case] if case in self._labelled else replace(store.cases[case], **sealed)
                for case in sorted(split.training)
            }
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return TrainingStore, (self._store, self._split)

    @property
    def path(self) -> Path:
        return self._store.path

    @property
    def classes(self) -> tuple[str, ...]:
        return self._store.classes

    @property
    def preparation(self) -> Preparation:
        return self._store.preparation

    def image(self, case: str) -> np.ndarray:
        """(C, D, H, W) float16."""
        self._check(case)
        return self._store.image(case)

    def label(self, case: str) -> np.ndarray:
        """(D, H, W) uint8 class indices and IGNORE."""
        self._check(case, label=True)
        return self._store.label(case)

    def positions(self, case: str) -> dict[int, np.ndarray]:
        """Class -> (n, 3) uint16 voxels, as in Store."""
        self._check(case, label=True)
        return self._store.positions(case)

    def class_voxels(self, case: str) -> tuple[int, ...]:
        """(K,) voxels of each class, without IGNORE."""
        self._check(case, label=True)
        return self._store.class_voxels(case)

    def companion(self, case: str, key: str) -> np.ndarray:
        """As in Store."""
        self._check(case)
        return self._store.companion(case, key)

    def companion_path(self, case: str, key: str) -> Path:
        """As in Store."""
        self._check(case)
        return self._store.companion_path(case, key)

    def shape(self, case: str) -> Shape:
        self._check(case)
        return self._store.shape(case)

    def spacing(self, case: str) -> Spacing:
        self._check(case)
        return self._store.spacing(case)

    def _check(self, case: str, *, label: bool = False) -> None:
        if case not in self.cases:
            raise SealedError(f"training may not see case '{case}': split '{self._split.name}' does not train on it")
        if label and case not in self._labelled:
            raise SealedError(f"training may not see the label of case '{case}': split '{self._split.name}' hides it")
