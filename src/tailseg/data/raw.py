"""The folder a person has, in nnU-Net's raw layout, as cases.

dataset.json    channel_names, labels, file_ending
imagesTr/       <case>_0000.nii.gz, <case>_0001.nii.gz, ... one file per channel
labelsTr/       <case>.nii.gz; a case without one is unlabelled
imagesUn/       more unlabelled cases
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tailseg.core import IGNORE
from tailseg.data.image import IMAGE_ENDINGS, Image, ImageError, read_image, same_place


class DataError(ValueError):
    """A data set that cannot be used; the text names the file, the rule and the way out."""


@dataclass(frozen=True)
class Case:
    """images: one file per channel, in channel order. label: None for an unlabelled case."""

    id: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class RawDataset:
    """classes: names, background first. label_values: the value of each in the label files. ignore_values: read as IGNORE."""

    root: Path
    name: str
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    label_values: tuple[int, ...]
    ignore_values: tuple[int, ...]
    cases: Mapping[str, Case]


def read_raw(root: Path) -> RawDataset:
    """Find the cases of a folder; reads no image. Raises DataError naming the file, the rule and the way out."""
    description = _read_description(root)
    channels = _channels(root, description)
    classes, values, ignored = _labels(root, description)
    ending = description.get("file_ending", ".nii.gz")
    if ending not in IMAGE_ENDINGS:
        raise DataError(
            f"{root}/dataset.json: file_ending '{ending}' is not known; use one of {', '.join(IMAGE_ENDINGS)}."
        )
    labelled = _find(root / "imagesTr", ending, len(channels), labels=root / "labelsTr")
    unlabelled = _find(root / "imagesUn", ending, len(channels), labels=None)
    if not labelled and not unlabelled:
        raise DataError(f"{root} holds no scans: put them into imagesTr as <case>_0000{ending}, labels into labelsTr.")
    if twice := sorted(labelled.keys() & unlabelled.keys()):
        raise DataError(f"{root}: cases {', '.join(twice)} are both in imagesTr and in imagesUn; keep one of each.")
    for case in _stems(root / "labelsTr", ending):
        if case not in labelled:
            raise DataError(
                f"{root}/labelsTr/{case}{ending} labels no scan: {root}/imagesTr/{case}_0000{ending} is missing."
            )
    cases = {**labelled, **unlabelled}
    name = str(description.get("name", root.name))
    return RawDataset(root, name, channels, classes, values, ignored, {case: cases[case] for case in sorted(cases)})


def load_images(case: Case) -> Image:
    """All channels as (C, D, H, W) float32. Raises ImageError for channels of different grids and for NaN or infinity."""
    channels = [read_image(path) for path in case.images]
    first = channels[0]
    for path, channel in zip(case.images, channels, strict=True):
        _check_same_grid(path, channel, case.images[0], first)
        array = channel.array
        if array.dtype.kind == "f" and (broken := int(np.count_nonzero(~np.isfinite(array)))):
            raise ImageError(
                f"{path} holds {broken} voxels that are NaN or infinite; replace them, or leave the case out."
            )
    return Image(np.stack([channel.array.astype(np.float32) for channel in channels]), first.affine)


def load_label(case: Case, dataset: RawDataset, image: Image) -> np.ndarray:
    """Class indices (D, H, W) uint8, IGNORE where nobody annotated. image: the case's own, whose grid it must share.

    Raises ImageError for another grid, and for values that dataset.json does not name.
    """
    assert case.label is not None, f"{case.id} has no label"
    label = read_image(case.label)
    _check_same_grid(case.label, label, case.images[0], Image(image.array[0], image.affine))
    table, known = np.full(256, IGNORE, np.uint8), np.zeros(256, bool)
    table[list(dataset.label_values)] = range(len(dataset.classes))
    known[[*dataset.label_values, *dataset.ignore_values]] = True
    with np.errstate(invalid="ignore"):  # what NaN becomes does not matter: it is unequal to anything
        values = label.array.astype(np.uint8)
    wrong = (values != label.array) | ~known[values]
    if wrong.any():
        unknown = [f"{value:.10g}" for value in np.unique(label.array[wrong])]
        shown = ", ".join(unknown[:10]) + (", ..." if len(unknown) > 10 else "")
        raise ImageError(
            f"{case.label} holds the values {shown}, which {dataset.root}/dataset.json does not name; "
            "name them under labels, or correct the file."
        )
    return table[values]


def load_case(case: Case, dataset: RawDataset, *, with_label: bool = True) -> tuple[Image, np.ndarray | None]:
    """load_images, and load_label where there is one and it is wanted."""
    image = load_images(case)
    return image, load_label(case, dataset, image) if with_label and case.label is not None else None


def _check_same_grid(path: Path, image: Image, other_path: Path, other: Image) -> None:
    if image.array.shape != other.array.shape:
        raise ImageError(
            f"{path} has the shape {image.array.shape} (D, H, W), {other_path} has {other.array.shape}; "
            "resample one onto the other's grid."
        )
    d, h, w = image.array.shape
    if not same_place(image.affine, other.affine, (d, h, w)):
        raise ImageError(
            f"{path} lies elsewhere in the patient than {other_path}: their affines differ. Correct the header, or "
            "resample one onto the other's grid."
        )


def _read_description(root: Path) -> dict[str, Any]:
    path = root / "dataset.json"
    if not root.is_dir():
        raise DataError(f"No data set at {root}: the folder does not exist; give data.root.")
    if not path.is_file():
        raise DataError(f"{path} is missing; it names the channels and labels, see nnU-Net's raw layout.")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no JSON: {error}.") from error
    if not isinstance(description, dict):
        raise DataError(f"{path} must hold an object with channel_names and labels.")
    return description


def _channels(root: Path, description: Mapping[str, Any]) -> tuple[str, ...]:
    channels = description.get("channel_names", description.get("modality"))
    numbers = [str(number) for number in range(len(channels))] if isinstance(channels, dict) else []
    if not isinstance(channels, dict) or not channels or set(channels) != set(numbers):
        raise DataError(f'{root}/dataset.json: channel_names must be like {{"0": "CT"}}, counting from 0.')
    return tuple(str(channels[number]) for number in numbers)


def _labels(root: Path, description: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]:
    """Class names in order of their values, the values, and the values to ignore."""
    labels = description.get("labels")
    if not isinstance(labels, dict) or len(labels) < 2:
        raise DataError(f'{root}/dataset.json: labels must be like {{"background": 0, "liver": 1}}.')
    if all(key.isdigit() for key in labels):  # the first nnU-Net wrote value -> name
        if len(set(map(str, labels.values()))) != len(labels):
            raise DataError(f"{root}/dataset.json: two labels have the same name; every value needs a name of its own.")
        labels = {str(name): int(value) for value, name in labels.items()}
    for name, value in labels.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 255:
            raise DataError(f"{root}/dataset.json: label '{name}' is {value!r}; it must be one integer from 0 to 255.")
    classes = {name: value for name, value in labels.items() if name != "ignore"}
    if len(set(labels.values())) != len(labels) or 0 not in classes.values():
        raise DataError(f"{root}/dataset.json: every label needs a value of its own, and the background has 0.")
    if len(classes) < 2:
        raise DataError(
            f"{root}/dataset.json: labels name no class beside the background; add what is to be segmented."
        )
    names = sorted(classes, key=lambda name: classes[name])
    ignored = (labels["ignore"],) if "ignore" in labels else ()
    return tuple(names), tuple(classes[name] for name in names), ignored


def _stems(folder: Path, ending: str) -> list[str]:
    """Names of the files without their ending; hidden ones are not the user's, such as macOS' "._" copies."""
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    names = [name for name in names if name.endswith(IMAGE_ENDINGS) and not name.startswith(".")]
    for name in names:
        if not name.endswith(ending):
            raise DataError(
                f"{folder}/{name} would be left out: dataset.json's file_ending is '{ending}'. Convert it, correct "
                "file_ending, or move it elsewhere."
            )
    return [name.removesuffix(ending) for name in names]


def _find(folder: Path, ending: str, channels: int, labels: Path | None) -> dict[str, Case]:
    found: dict[str, set[int]] = {}
    for stem in _stems(folder, ending):
        if len(stem) < 6 or stem[-5] != "_" or not stem[-4:].isdigit():
            raise DataError(
                f"{folder}/{stem}{ending} must be called <case>_0000{ending}: the last four digits are the channel."
            )
        found.setdefault(stem[:-5], set()).add(int(stem[-4:]))
    cases = {}
    for case, numbers in found.items():
        for channel in sorted(set(range(channels)) ^ numbers):
            problem = "is missing" if channel < channels else "is a channel too many"
            raise DataError(f"{folder}/{case}_{channel:04d}{ending} {problem}: dataset.json names {channels} channels.")
        images = tuple(folder / f"{case}_{channel:04d}{ending}" for channel in range(channels))
        label = None if labels is None else labels / f"{case}{ending}"
        cases[case] = Case(case, images, label if label is not None and label.exists() else None)
    return cases
