"""The files of a data set, with all that is wrong with their names at once.

read_raw is the judge of what can be used, and stops at the first thing that cannot. What follows looks further only when it
refused, so the two never disagree: find_cases says everything, and hands on the cases that are whole.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tailseg.data.cases import Case, RawDataset
from tailseg.data.description import channel_names, class_labels, read_description
from tailseg.data.dicom import is_series
from tailseg.data.errors import DataError
from tailseg.data.image import IMAGE_ENDINGS
from tailseg.data.layouts import is_msd, msd_cases, numbered
from tailseg.data.pictures import LOSSLESS_ENDINGS, PICTURE_ENDINGS
from tailseg.data.problems import Problem
from tailseg.data.raw import read_raw
from tailseg.options import suggest


def find_cases(root: Path) -> tuple[RawDataset | None, list[Problem]]:
    """The data set with the cases whose files are all there, and what is wrong with the others.

    None where nothing could be made of it: without a usable dataset.json, or where a table of files is wrong.
    """
    try:
        return read_raw(root), []
    except DataError as error:
        folder = root if root.is_dir() else root.parent
        refusal = _refusal(folder, str(error))
    try:
        description = read_description(folder)
        channels = channel_names(folder, description)
        classes, values, ignored = class_labels(folder, description)
    except DataError:
        return None, [refusal]
    problems: list[Problem] = []
    if root != folder:
        return None, [refusal]
    if is_msd(folder, description):
        cases = _listed_cases(folder, description, problems)
    elif (ending := description.get("file_ending", ".nii.gz")) in IMAGE_ENDINGS:
        cases = _cases(folder, ending, len(channels), problems)
    else:
        return None, [refusal]
    if not cases and not problems:
        return None, [refusal]
    name = str(description.get("name", root.name))
    dataset = RawDataset(folder, name, channels, classes, values, ignored, dict(sorted(cases.items())))
    return dataset, problems or [refusal]


def _refusal(root: Path, said: str) -> Problem:
    """What read_raw said, as a problem."""
    text, _, way_out = said.partition("; ")
    text = text.replace(f"{root}/", "").replace(str(root), "it").strip().rstrip(".")
    first, _, rest = text.partition(" ")
    file = first.rstrip(":,") if "." in first else ""
    text = rest if file and not first.endswith(",") else text
    rule = "description" if file in ("dataset.json", "") or file.endswith(".csv") else "layout"
    return Problem(rule, text, way_out.rstrip(".") or "correct it, and check again", file)


def _cases(root: Path, ending: str, channels: int, problems: list[Problem]) -> dict[str, Case]:
    """nnU-Net's folders."""
    labelled = _images(root, "imagesTr", ending, channels, problems)
    unlabelled = _images(root, "imagesUn", ending, channels, problems)
    labels = _labels(root, ending, problems)
    for case in sorted(labels.keys() - labelled.keys()):
        text, way_out = f"labels no scan: imagesTr/{case}_0000{ending} is missing", "add the scan, or remove the label"
        if case in unlabelled:
            text, way_out = "its scan lies in imagesUn, where labels are not read", "move the scan to imagesTr"
        elif (close := suggest(case, labelled.keys() - labels.keys())).startswith("Did you"):
            text = f"{text}. {close}"
        problems.append(Problem("orphan-label", text, way_out, f"labelsTr/{labels[case].name}", case))
    for case in sorted(labelled.keys() & unlabelled.keys()):
        text = "is in imagesTr too"
        problems.append(Problem("layout", text, "keep one of each", f"imagesUn/{case}_0000{ending}", case))
    both = unlabelled | labelled
    return {case: Case(case, images, labels.get(case)) for case, images in both.items() if images is not None}


def _files(root: Path, folder: str, endings: Collection[str], ending: str, problems: list[Problem]) -> dict[str, Path]:
    """Name without its ending -> file, or folder of slices."""
    files: dict[str, Path] = {}
    for path in sorted((root / folder).iterdir()) if (root / folder).is_dir() else ():
        if path.name.startswith(".") or not (path.name.endswith(IMAGE_ENDINGS) or is_series(path)):
            continue
        if is_series(path):
            files[path.name] = path
            continue
        found = next((each for each in endings if path.name.endswith(each)), None)
        if found is None:
            text, way_out = f"would be left out: file_ending is '{ending}'", "convert it, or correct file_ending"
        elif path.name.removesuffix(found) in files:
            text, way_out = f"has the name of {files[path.name.removesuffix(found)].name}", "keep one of the two"
        else:
            files[path.name.removesuffix(found)] = path
            continue
        problems.append(Problem("layout", text, way_out, f"{folder}/{path.name}"))
    return files


def _labels(root: Path, ending: str, problems: list[Problem]) -> dict[str, Path]:
    if ending not in PICTURE_ENDINGS:
        return _files(root, "labelsTr", (ending,), ending, problems)
    files = _files(root, "labelsTr", PICTURE_ENDINGS, ending, problems)
    for case, path in list(files.items()):
        if not path.name.endswith(LOSSLESS_ENDINGS):
            text = "cannot hold labels: JPEG changes their values"
            problems.append(Problem("layout", text, "write it as PNG", f"labelsTr/{path.name}", case))
            del files[case]
    return files


def _images(
    root: Path, folder: str, ending: str, channels: int, problems: list[Problem]
) -> dict[str, tuple[Path, ...] | None]:
    """Case -> its files in channel order; None for a case whose channels are not all there."""
    files = _files(root, folder, (ending,), ending, problems)
    if ending in PICTURE_ENDINGS and not numbered(files, channels):
        return {case: (file,) for case, file in files.items()}
    found: dict[str, set[int]] = {}
    for stem, path in list(files.items()):
        if channels == 1 and path.is_dir() and not numbered([stem], channels):
            found.setdefault(stem, set()).add(0)
            files[f"{stem}_0000"] = path
        elif len(stem) < 6 or stem[-5] != "_" or not stem[-4:].isdigit():
            text = f"has no channel number: images are called <case>_0000{ending}"
            problems.append(Problem("layout", text, "rename it, or move it elsewhere", f"{folder}/{stem}{ending}"))
        else:
            found.setdefault(stem[:-5], set()).add(int(stem[-4:]))
    wanted = set(range(channels))
    named = f"dataset.json names {channels} channel{'s' if channels != 1 else ''}"
    cases: dict[str, tuple[Path, ...] | None] = {}
    for case, numbers in found.items():
        if ending in PICTURE_ENDINGS and numbers == {0}:  # all colours in one file
            cases[case] = (files[f"{case}_0000"],)
            continue
        for channel in sorted(wanted ^ numbers):
            text, way_out = f"is missing: {named}", "add the file, or correct channel_names"
            if channel not in wanted:
                text, way_out = f"is a channel too many: {named}", "move it elsewhere, or correct channel_names"
            problems.append(Problem("channel", text, way_out, f"{folder}/{case}_{channel:04d}{ending}", case))
        whole = wanted <= numbers
        cases[case] = tuple(files[f"{case}_{channel:04d}"] for channel in sorted(wanted)) if whole else None
    return cases


def _listed_cases(root: Path, description: Mapping[str, Any], problems: list[Problem]) -> dict[str, Case]:
    """Of the files that dataset.json lists, the Decathlon's way, those that are there."""
    kept: dict[str, list[Any]] = {"training": [], "test": []}
    for key, entries in kept.items():
        for entry in description.get(key, ()):
            listed = [entry.get("image"), entry.get("label")] if isinstance(entry, dict) else [entry]
            missing = [name for name in listed if isinstance(name, str) and not (root / name).is_file()]
            for name in missing:
                text = f"is missing, though dataset.json lists it under {key}"
                problems.append(
                    Problem("channel", text, "add it, or take it out of dataset.json", Path(name).as_posix())
                )
            if not missing:
                entries.append(entry)
    try:
        return msd_cases(root, kept)
    except DataError as error:
        problems.append(_refusal(root, str(error)))
        return {}
