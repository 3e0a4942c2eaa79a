"""Where a data set's files lie: nnU-Net's raw folders, or the lists of the Medical Segmentation Decathlon (MSD).

A DICOM series is a folder, <case>/ or <case>_0000/, <case>_0001/, ..., where else a file would be.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tailseg.data.cases import Case
from tailseg.data.dicom import is_series
from tailseg.data.errors import DataError
from tailseg.data.image import IMAGE_ENDINGS
from tailseg.data.pictures import LOSSLESS_ENDINGS, PICTURE_ENDINGS
from tailseg.data.tables import case_name


def folder_cases(root: Path, description: Mapping[str, Any], channels: int) -> dict[str, Case]:
    """The cases in nnU-Net's folders imagesTr, labelsTr and imagesUn. Raises DataError."""
    ending = description.get("file_ending", ".nii.gz")
    if ending not in IMAGE_ENDINGS:
        raise DataError(
            f"{root}/dataset.json: file_ending '{ending}' is not known; use one of {', '.join(IMAGE_ENDINGS)}."
        )
    labels = _label_files(root / "labelsTr", ending)
    labelled = _find(root / "imagesTr", ending, channels, labels)
    unlabelled = _find(root / "imagesUn", ending, channels, {})
    if not labelled and not unlabelled:
        raise DataError(f"{root} holds no scans: put them into imagesTr as <case>_0000{ending}, labels into labelsTr.")
    if twice := sorted(labelled.keys() & unlabelled.keys()):
        raise DataError(f"{root}: cases {', '.join(twice)} are both in imagesTr and in imagesUn; keep one of each.")
    for case, label in labels.items():
        if case not in labelled:
            raise DataError(f"{label} labels no scan: {root}/imagesTr/{case}_0000{ending} is missing.")
    return {**labelled, **unlabelled}


def is_msd(root: Path, description: Mapping[str, Any]) -> bool:
    """Whether dataset.json lists files that are there. The first nnU-Net listed cases, not files."""
    training = description.get("training")
    if not isinstance(training, list):
        return False
    return any(_listed_image(root, entry).is_file() for entry in training)


def msd_cases(root: Path, description: Mapping[str, Any]) -> dict[str, Case]:
    """The cases that dataset.json lists under training and, without label, under test. Raises DataError."""
    cases: dict[str, Case] = {}
    for entry in (*description["training"], *description.get("test", ())):
        image = _listed_image(root, entry)
        label = root / entry["label"] if isinstance(entry, dict) and entry.get("label") else None
        for file in (image, *([label] if label else [])):
            if not file.is_file():
                raise DataError(f"{root}/dataset.json lists {file}, which does not exist; add it, or take it out.")
        case = case_name(image)
        if case in cases:
            raise DataError(f"{root}/dataset.json lists two cases '{case}'; rename one of them.")
        cases[case] = Case(case, (image,), label)
    return cases


def numbered(stems: Collection[str], channels: int) -> bool:
    """Whether the names of pictures end in a channel number. `img_0007` is a picture of its own: no data set of 2D pictures
    has an eighth channel."""
    return all(
        len(stem) > 5 and stem[-5] == "_" and stem[-4:].isdigit() and int(stem[-4:]) < channels for stem in stems
    )


def _listed_image(root: Path, entry: Any) -> Path:
    image = entry.get("image") if isinstance(entry, dict) else entry
    if not isinstance(image, str):
        raise DataError(f'{root}/dataset.json: training must list {{"image": file, "label": file}}, not {entry!r}.')
    return root / image


def _files(folder: Path, endings: Collection[str], ending: str) -> dict[str, Path]:
    """Name without its ending -> file, or folder of slices. Hidden ones are not the user's, such as macOS' "._" copies."""
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    files: dict[str, Path] = {}
    for name in names:
        if name.startswith(".") or not (name.endswith(IMAGE_ENDINGS) or is_series(folder / name)):
            continue
        if is_series(folder / name):
            files[name] = folder / name
            continue
        found = next((each for each in endings if name.endswith(each)), None)
        if found is None:
            raise DataError(
                f"{folder}/{name} would be left out: dataset.json's file_ending is '{ending}'. Convert it, correct "
                "file_ending, or move it elsewhere."
            )
        stem = name.removesuffix(found)
        if stem in files:
            raise DataError(f"{files[stem]} and {folder}/{name} are two files of '{stem}'; keep one.")
        files[stem] = folder / name
    return files


def _label_files(folder: Path, ending: str) -> dict[str, Path]:
    """A picture's label keeps its values only without loss, so it may have another ending than a JPEG."""
    if ending not in PICTURE_ENDINGS:
        return _files(folder, (ending,), ending)
    lossy = sorted(folder.glob(f"*{ending}")) if ending not in LOSSLESS_ENDINGS and folder.is_dir() else []
    if lossy:
        raise DataError(f"{lossy[0]} cannot hold labels: JPEG changes their values. Write them as PNG.")
    return _files(folder, LOSSLESS_ENDINGS, ending)


def _find(folder: Path, ending: str, channels: int, labels: Mapping[str, Path]) -> dict[str, Case]:
    files = _files(folder, (ending,), ending)
    if ending in PICTURE_ENDINGS and not numbered(files, channels):
        return {case: Case(case, (file,), labels.get(case)) for case, file in files.items()}
    found: dict[str, set[int]] = {}
    for stem in tuple(files):
        if channels == 1 and files[stem].is_dir() and not numbered([stem], channels):
            found.setdefault(stem, set()).add(0)
            files = {**files, f"{stem}_0000": files[stem]}
            continue
        if len(stem) < 6 or stem[-5] != "_" or not stem[-4:].isdigit():
            raise DataError(
                f"{folder}/{stem}{ending} must be called <case>_0000{ending}: the last four digits are the channel."
            )
        found.setdefault(stem[:-5], set()).add(int(stem[-4:]))
    cases = {}
    for case, numbers in found.items():
        if ending in PICTURE_ENDINGS and numbers == {0}:  # all colours in one file, which only reading it can tell
            cases[case] = Case(case, (files[f"{case}_0000"],), labels.get(case))
            continue
        for channel in sorted(set(range(channels)) ^ numbers):
            problem = "is missing" if channel < channels else "is a channel too many"
            raise DataError(f"{folder}/{case}_{channel:04d}{ending} {problem}: dataset.json names {channels} channels.")
        images = tuple(files[f"{case}_{channel:04d}"] for channel in range(channels))
        cases[case] = Case(case, images, labels.get(case))
    return cases
