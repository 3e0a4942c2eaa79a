"""A folder of DICOM slices as one scan: sorted by position, with nothing guessed about what is missing.

SimpleITK's GDCM reads the files: it is here for NRRD anyway, knows the compressed transfer syntaxes and applies rescale slope
and intercept of every slice. Where the slices lie is reckoned here, since ITK's own series reader passes over tilted
gantries and takes missing slices for thicker ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tailseg.data.errors import ImageError

SERIES, POSITION, ORIENTATION, SPACING = "0020|000e", "0020|0032", "0020|0037", "0028|0030"
DESCRIPTION, THICKNESS, FRAMES, SAMPLES = "0008|103e", "0018|0050", "0028|0008", "0028|0002"
_ENDINGS = (".dcm", ".ima")
_NAMES = {
    SERIES: "Series Instance UID",
    POSITION: "Image Position (Patient)",
    ORIENTATION: "Image Orientation (Patient)",
    SPACING: "Pixel Spacing",
}


@dataclass(frozen=True)
class _Slice:
    """size: (i, j). position: mm, LPS. axes: (2, 3) unit vectors along i and j. spacing: mm along i and j."""

    file: Path
    series: str
    description: str
    size: tuple[int, int]
    position: np.ndarray
    axes: np.ndarray
    spacing: np.ndarray
    thickness: str  # as the file has it, for few slices are asked


def is_series(folder: Path) -> bool:
    """Whether the folder itself holds DICOM files: *.dcm, or without ending with DICOM's mark."""
    if not folder.is_dir():
        return False
    files = _files(folder)
    return any(file.suffix.lower() in _ENDINGS for file in files) or bool(files and _has_mark(files[0]))


def read_series(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(D, H, W) and the affine, voxel (i, j, k, 1) -> RAS+ mm, of the one series in the folder.

    Raises ImageError naming the files for several series, duplicate or missing slices, a tilted gantry, several frames in a
    file and colours.
    """
    slices, affine = _ordered(folder)
    array = np.stack([_pixels(each.file) for each in slices])  # of one type, the widest of all slices
    return array.astype(np.float32) if array.dtype == np.float64 else array, affine


def series_geometry(folder: Path) -> tuple[tuple[int, int, int], np.ndarray]:
    """(D, H, W) and affine from the headers alone. Raises ImageError as read_series does."""
    _, shape, affine = series_slices(folder)
    return shape, affine


def series_slices(folder: Path) -> tuple[list[Path], tuple[int, int, int], np.ndarray]:
    """The files in the order of D, (D, H, W) and affine, from the headers alone. Raises ImageError as read_series does."""
    slices, affine = _ordered(folder)
    i, j = slices[0].size
    return [each.file for each in slices], (len(slices), j, i), affine


def _files(folder: Path) -> list[Path]:
    """Those called .dcm and those without ending that bear DICOM's mark; where none is called .dcm, all without ending."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    named = [file for file in files if file.suffix.lower() in _ENDINGS]
    # PACS exports count without ending, or write a UID, of which the last number looks like one
    bare = [file for file in files if not file.suffix.strip(".").isalpha() and file.name != "DICOMDIR"]
    return sorted(named + [file for file in bare if _has_mark(file)]) if named else bare


def _has_mark(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(132)[128:] == b"DICM"


def _ordered(folder: Path) -> tuple[list[_Slice], np.ndarray]:
    """The slices from the first to the last along their normal, and the affine."""
    files = _files(folder)
    if not files:
        raise ImageError(f"{folder} holds no DICOM file.")
    slices = [_read_header(file) for file in files]
    _check_alike(folder, slices)
    first = slices[0]
    normal = np.cross(first.axes[0], first.axes[1])
    heights = np.array([each.position @ normal for each in slices])
    order = np.argsort(heights, kind="stable")
    slices, heights = [slices[index] for index in order], heights[order]
    gap = _gap(folder, slices, heights)
    _check_straight(folder, slices, normal)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = first.axes * first.spacing[:, None]
    affine[:3, 2], affine[:3, 3] = normal * gap, slices[0].position
    return slices, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _read_header(file: Path) -> _Slice:
    reader = _reader(file)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ImageError(
            f"{file} cannot be read as DICOM. Is it whole? Copy it again; a report or a plan, which is no slice, belongs "
            "elsewhere."
        ) from error
    tags = {tag: reader.GetMetaData(tag).strip(" \0") for tag in reader.GetMetaDataKeys()}
    if int(tags.get(FRAMES) or 1) > 1:
        raise ImageError(
            f"{file} holds {tags[FRAMES]} frames; convert it to NIfTI (dcm2niix does), or to one file a slice. A "
            "segmentation of the scan belongs elsewhere."
        )
    if int(tags.get(SAMPLES) or 1) > 1:
        raise ImageError(f"{file} is in colour; a scan has one number per voxel.")
    for tag, name in _NAMES.items():
        if not tags.get(tag):
            raise ImageError(f"{file} says nothing of its {name}; it is no slice of a scan: move it elsewhere.")
    axes = _numbers(file, tags, ORIENTATION, 6).reshape(2, 3)
    lengths = np.linalg.norm(axes, axis=1, keepdims=True)
    spacing = _numbers(file, tags, SPACING, 2)[::-1]
    for tag, right, rule in (
        (ORIENTATION, np.allclose(lengths, 1, atol=0.01), "two vectors of length 1"),
        (SPACING, (spacing > 0).all(), "positive"),
    ):
        if not right:
            raise ImageError(f"{file}: its {_NAMES[tag]} is '{tags[tag]}'; it must be {rule}.")
    i, j = reader.GetSize()[:2]
    return _Slice(
        file, tags[SERIES], tags.get(DESCRIPTION, ""), (i, j), _numbers(file, tags, POSITION, 3), axes / lengths, spacing,
        tags.get(THICKNESS, ""),
    )  # fmt: skip


def _numbers(file: Path, tags: dict[str, str], tag: str, count: int) -> np.ndarray:
    try:
        values = np.array([float(value) for value in tags[tag].split("\\")])
    except ValueError:
        values = np.array([np.nan])
    if values.shape != (count,) or not np.isfinite(values).all():
        raise ImageError(f"{file}: its {_NAMES[tag]} is '{tags[tag]}'; it must be {count} numbers.")
    return values


def _check_alike(folder: Path, slices: Sequence[_Slice]) -> None:
    series = {each.series: each for each in slices}
    if len(series) > 1:
        told = ", ".join(
            sorted(f"{each.description or 'without description'} ({each.file.name})" for each in series.values())
        )
        raise ImageError(f"{folder} holds {len(series)} series: {told}. Give each a folder of its own.")
    first = slices[0]
    if abs(first.axes[0] @ first.axes[1]) > 1e-3:
        raise ImageError(f"{first.file}: rows and columns are not at right angles; convert the scan to NIfTI.")
    for each in slices[1:]:
        for what, same in (
            ("size", each.size == first.size),
            ("pixel spacing", np.allclose(each.spacing, first.spacing, rtol=1e-3)),
            ("orientation", np.allclose(each.axes, first.axes, atol=1e-3)),
        ):
            if not same:
                raise ImageError(
                    f"{each.file} has another {what} than {first.file}; move what is no slice of the scan elsewhere."
                )


def _gap(folder: Path, slices: Sequence[_Slice], heights: np.ndarray) -> float:
    """mm from slice to slice, which must be the same everywhere."""
    if len(slices) == 1:
        return _thickness(slices[0])
    steps = np.diff(heights)
    for index in np.flatnonzero(steps < 1e-3).tolist():
        raise ImageError(
            f"{slices[index].file} and {slices[index + 1].file} are two slices of one place; keep one, or give each time or "
            "echo a folder of its own."
        )
    usual = float(np.median(steps))
    uneven = np.abs(steps - usual) > 0.05 * usual
    if not uneven.any():
        return float(heights[-1] - heights[0]) / len(steps)
    index = int(np.flatnonzero(uneven)[0])
    missing = round(steps[index] / usual) - 1
    between = f"between {slices[index].file} and {slices[index + 1].file.name}"
    if missing > 0 and abs(steps[index] - (missing + 1) * usual) <= 0.05 * usual:
        slices_are = "1 slice is" if missing == 1 else f"{missing} slices are"
        raise ImageError(
            f"{slices_are} missing {between}: {steps[index]:g} mm apart, the others {usual:g}; add what is missing."
        )
    raise ImageError(
        f"{folder} has slices at uneven distances: {steps[index]:g} mm {between}, elsewhere {usual:g}; complete the scan, "
        "or resample it to one distance."
    )


def _thickness(single: _Slice) -> float:
    """mm; nominally 1 where the slice does not say."""
    try:
        thickness = float(single.thickness or 1)
    except ValueError:
        thickness = 0.0
    if not 0 < thickness < np.inf:
        raise ImageError(f"{single.file}: its Slice Thickness is '{single.thickness}'; it must be a positive number.")
    return thickness


def _check_straight(folder: Path, slices: Sequence[_Slice], normal: np.ndarray) -> None:
    """Refuses slices that are shifted against each other in plane: the gantry was tilted, and the volume is sheared."""
    way = slices[-1].position - slices[0].position
    along = way @ normal
    shift = float(np.linalg.norm(way - along * normal))
    if shift > 0.25 * slices[0].spacing.min():
        degrees = np.degrees(np.arctan2(shift, along))
        raise ImageError(
            f"{folder} was taken with a gantry tilted by {degrees:.1f} degrees: its last slice lies {shift:.1f} mm beside its "
            "first. Convert it to a straight volume (dcm2niix does), and give that."
        )


def _reader(file: Path) -> Any:
    import SimpleITK as sitk  # noqa: N813 - here, because only DICOM needs its 50 MB

    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(file))
    return reader


def _pixels(file: Path) -> np.ndarray:
    """(H, W), rescaled."""
    import SimpleITK as sitk  # noqa: N813

    try:
        return sitk.GetArrayFromImage(_reader(file).Execute())[0]
    except RuntimeError as error:
        raise ImageError(f"{file} cannot be read as DICOM. Is it whole? Copy it again.") from error
