"""Labels as a DICOM Segmentation, which a PACS stores beside the series that they were drawn on.

One file holds all classes, a binary segment each, and every frame of it names the slice that it lies on. The segments take
over patient, study and frame of reference of the series; what a class is in DICOM's words is in coded_names.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from tailseg.data.coded_names import Code, coded_name, long_string
from tailseg.data.dicom import is_series, series_slices
from tailseg.data.errors import ImageError
from tailseg.data.image import Image, turned_onto
from tailseg.files import written_whole

_NO_EXTRA = "writing DICOM SEG needs highdicom: pip install 'tailseg[dicom]'"
_FIRST_SERIES = 1000  # and the number of the source on top: behind the scanner's own series, in their order
_MUST_SAY = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "Modality")
_REPEATED = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime",
)  # fmt: skip
"""Anonymisers remove them, or write what is no date; empty will do for DICOM."""


def write_seg(
    path: Path,
    labels: np.ndarray,
    series: Path,
    classes: Sequence[str],
    *,
    affine: np.ndarray,
    description: str,
    algorithm: str,
    algorithm_version: str,
) -> None:
    """Write labels as one DICOM Segmentation, whole or not at all.

    labels: (D, H, W) class indices on the grid of the series, its axes in any order. affine: of labels, voxel (i, j, k, 1)
    -> RAS+ mm. series: the folder of the source slices. classes: names by index, the background first. description: of the
    new series; it, algorithm and algorithm_version are cut to the 64 characters that DICOM gives them.

    The classes that have voxels become segments 1, 2, ... in their order, without gaps, as DICOM wants it; Segment Label is
    the class name. Where no class has any, each becomes a segment of one empty frame: the scan was looked at, and nothing
    was found.
    Raises ImageError for a series that cannot be read or referred to, and for labels that do not fit it or classes;
    ValueError where highdicom is not installed; WriteError.
    """
    hd, pydicom = _extra()
    if not is_series(series):
        raise ImageError(f"{series} is no folder of DICOM slices, which a DICOM SEG refers to; write NIfTI instead.")
    files, shape, grid = series_slices(series)
    turned = turned_onto(Image(labels, affine), grid, shape)
    if turned.affine is not grid:
        raise ImageError(
            f"The labels {labels.shape} do not lie on the grid {shape} of {series}; bring them back to it before writing."
        )
    labels = turned.array
    found = _found(labels, classes)
    if not found:
        found, labels, files = list(range(1, len(classes))), labels[:1], files[:1]
    sources = [_source(pydicom, file) for file in files]
    algorithm, algorithm_version, description = map(long_string, (algorithm, algorithm_version, description))
    patient = _taken_out(sources[0])
    identification = hd.AlgorithmIdentificationSequence(
        algorithm, pydicom.sr.codedict.codes.DCM.ArtificialIntelligence, algorithm_version, source="TailSeg"
    )
    numbers = np.zeros(len(classes), np.uint8)
    numbers[found] = range(1, len(found) + 1)
    try:
        segmentation = hd.seg.Segmentation(
            sources,
            numbers[labels],
            "BINARY",
            [_segment(hd, index, classes[index], int(numbers[index]), identification) for index in found],
            series_instance_uid=hd.UID(),
            series_number=_FIRST_SERIES + max(0, int(sources[0].get("SeriesNumber") or 0)),
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="TailSeg",
            manufacturer_model_name=algorithm,
            software_versions=version("tailseg"),
            device_serial_number=algorithm_version,
            series_description=description,
            content_description=description,
            content_label="SEGMENTATION",
            specific_character_set="ISO_IR 192",  # UTF-8: names of classes need not be in the letters of the source
            omit_empty_frames=labels.any(),
        )
    except ValueError as error:
        raise ImageError(f"{series} cannot be referred to by a DICOM SEG: {error}") from error
    for element in patient:
        segmentation[element.tag] = element
    with written_whole(path) as temporary:
        segmentation.save_as(temporary)


def _extra() -> tuple[Any, Any]:
    """highdicom and pydicom."""
    try:
        import highdicom
        import pydicom.sr.codedict
    except ImportError:
        raise ValueError(_NO_EXTRA) from None
    return highdicom, pydicom


def _found(labels: np.ndarray, classes: Sequence[str]) -> list[int]:
    """The classes that have voxels, but for the background."""
    if labels.max() >= len(classes):
        raise ImageError(
            f"The labels hold class {labels.max()}, but {len(classes)} classes have names, counted from 0."
        )
    voxels = sum(np.bincount(plane.ravel(), minlength=len(classes)) for plane in labels)  # a plane at a time: as int64
    return [index for index in np.flatnonzero(voxels).tolist() if index > 0]


def _source(pydicom: Any, file: Path) -> Any:
    """The header of a slice, complete enough to be referred to."""
    header = pydicom.dcmread(file, stop_before_pixels=True, force=True)  # some lack the mark of a file
    for keyword in _MUST_SAY:
        if not header.get(keyword):
            raise ImageError(
                f"{file} says nothing of its {keyword}, which a DICOM SEG must repeat; write NIfTI instead."
            )
    return header


def _taken_out(header: Any) -> list[Any]:
    """What a segmentation repeats of patient and study: highdicom refuses dates that a PACS holds, so it sees none."""
    repeated = [header[keyword] for keyword in _REPEATED if keyword in header]
    for keyword in _REPEATED:
        header.pop(keyword, None)
        setattr(header, keyword, None)
    return repeated


def _segment(hd: Any, index: int, class_name: str, number: int, identification: Any) -> Any:
    name = coded_name(class_name)
    angle = index * math.pi * (3 - math.sqrt(5))  # the golden angle: neighbours differ, and a class keeps its colour
    segment = hd.seg.SegmentDescription(
        number,
        long_string(class_name),
        _concept(hd, name.category),
        _concept(hd, name),
        "AUTOMATIC",
        identification,
        anatomic_regions=[_concept(hd, name.region)] if name.region else None,
        display_color=hd.color.CIELabColor(65, 55 * math.cos(angle), 55 * math.sin(angle)),
    )
    if name.side:
        segment.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [
            _concept(hd, name.side)
        ]
    if name.region and name.region.side:
        segment.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = [_concept(hd, name.region.side)]
    return segment


def _concept(hd: Any, code: Code) -> Any:
    return hd.sr.CodedConcept(code.value, code.scheme, code.meaning)
