"""The data set a person has, as cases: nnU-Net's raw layout, the lists of the Medical Segmentation Decathlon, or a table.

dataset.json    channel_names, labels, file_ending
imagesTr/       <case>_0000.nii.gz, <case>_0001.nii.gz, ... one file per channel; pictures hold all colours: <case>.png
labelsTr/       <case>.nii.gz; a case without one is unlabelled
imagesUn/       more unlabelled cases
cases.csv       if there is one: case, patient, annotated_classes

A dataset.json that lists its files under training and test is the Decathlon's and is followed. A root that ends in .csv is
a table of files (tailseg.data.tables), beside which dataset.json stands.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tailseg.core import IGNORE
from tailseg.data.cases import Case, RawDataset
from tailseg.data.description import channel_names as _channels
from tailseg.data.description import class_labels as _labels
from tailseg.data.description import read_description as _read_description
from tailseg.data.errors import DataError
from tailseg.data.image import Image, ImageError, read_channels, read_image, same_place, turned_onto
from tailseg.data.layouts import folder_cases, is_msd, msd_cases
from tailseg.data.tables import CASES_FILE, annotate, cases_of_table

__all__ = ["Case", "DataError", "RawDataset", "load_case", "load_images", "load_label", "read_raw"]


def read_raw(root: Path) -> RawDataset:
    """Find the cases of a folder or a table; reads no image. Raises DataError naming the file, the rule and the way out."""
    table = root if root.suffix.lower() == ".csv" else None
    if table is not None and not table.is_file():
        raise DataError(f"No data set at {table}: the table does not exist; give data.root.")
    folder = root if table is None else root.parent
    description = _read_description(folder)
    channels = _channels(folder, description)
    classes, values, ignored = _labels(folder, description)
    if table is not None:
        cases = cases_of_table(table, classes)
    else:
        msd = is_msd(folder, description)
        cases = msd_cases(folder, description) if msd else folder_cases(folder, description, len(channels))
        if (folder / CASES_FILE).is_file():
            cases = annotate(cases, folder / CASES_FILE, classes)
    name = root.stem if table is not None else str(description.get("name", root.name))
    return RawDataset(folder, name, channels, classes, values, ignored, {case: cases[case] for case in sorted(cases)})


def load_images(case: Case, channels: int | None = None) -> Image:
    """All channels as (C, D, H, W) float32. channels: how many there must be.

    Raises ImageError for another number, for files of different grids and for NaN or infinity.
    """
    images = [read_channels(path) for path in case.images]
    first = images[0]
    for path, image in zip(case.images, images, strict=True):
        _check_same_grid(path, image, case.images[0], first)
        array = image.array
        if array.dtype.kind == "f" and (broken := int(np.count_nonzero(~np.isfinite(array)))):
            raise ImageError(
                f"{path} holds {broken} voxels that are NaN or infinite; replace them, or leave the case out."
            )
    found = sum(len(image.array) for image in images)
    if channels is not None and found != channels:
        files = " and ".join(map(str, case.images))
        held = "one channel" if found == 1 else f"{found} channels"
        raise ImageError(
            f"{files} hold{'s' * (len(images) == 1)} {held}, not {channels}; correct channel_names, or the file."
        )
    return Image(np.concatenate([image.array for image in images], dtype=np.float32), first.affine)


def load_label(case: Case, dataset: RawDataset, image: Image) -> np.ndarray:
    """Class indices (D, H, W) uint8, IGNORE where nobody annotated. image: the case's own, whose grid it must share.

    In a case where only some classes were looked for, what is labelled otherwise, background included, may be any of the
    others: it is IGNORE.

    A label whose axes run otherwise through the same voxels is turned.
    Raises ImageError for another grid, and for values that dataset.json does not name.
    """
    assert case.label is not None, f"{case.id} has no label"
    _, d, h, w = image.array.shape
    label = turned_onto(read_image(case.label), image.affine, (d, h, w))
    _check_same_grid(case.label, label, case.images[0], image)
    table, known = np.full(256, IGNORE, np.uint8), np.zeros(256, bool)
    table[list(dataset.label_values)] = range(len(dataset.classes))
    known[[*dataset.label_values, *dataset.ignore_values]] = True
    if case.annotated is not None:
        unknown = [name not in case.annotated for name in dataset.classes]
        table[np.array(dataset.label_values)[unknown]] = IGNORE
    indices = np.empty(label.array.shape, np.uint8)
    for plane, made in zip(label.array, indices, strict=True):  # plane by plane: it stays in the processor's cache
        with np.errstate(invalid="ignore"):  # what NaN becomes does not matter: it is unequal to anything
            values = plane.astype(np.uint8)
        if not (known[values].all() and np.array_equal(values, plane)):
            raise ImageError(_strange_values(case.label, label.array, known, dataset))
        np.take(table, values, out=made)
    return indices


def _strange_values(path: Path, label: np.ndarray, known: np.ndarray, dataset: RawDataset) -> str:
    """Which values of label (D, H, W) the data set does not name. known: (256,) bool."""
    values = np.unique(label)
    with np.errstate(invalid="ignore"):
        indices = values.astype(np.uint8)
    strange = [f"{value:.10g}" for value in values[(indices != values) | ~known[indices]]]
    shown = ", ".join(strange[:10]) + (", ..." if len(strange) > 10 else "")
    return (
        f"{path} holds the values {shown}, which {dataset.root}/dataset.json does not name; "
        "name them under labels, or correct the file."
    )


def load_case(case: Case, dataset: RawDataset, *, with_label: bool = True) -> tuple[Image, np.ndarray | None]:
    """load_images, and load_label where there is one and it is wanted."""
    image = load_images(case, len(dataset.channels))
    return image, load_label(case, dataset, image) if with_label and case.label is not None else None


def _check_same_grid(path: Path, image: Image, other_path: Path, other: Image) -> None:
    (d, h, w), other_shape = image.array.shape[-3:], other.array.shape[-3:]
    if (d, h, w) != other_shape:
        raise ImageError(
            f"{path} has the shape {(d, h, w)} (D, H, W), {other_path} has {other_shape}; "
            "resample one onto the other's grid."
        )
    if not same_place(image.affine, other.affine, (d, h, w)):
        raise ImageError(
            f"{path} lies elsewhere in the patient than {other_path}: their affines differ. Correct the header, or "
            "resample one onto the other's grid."
        )
