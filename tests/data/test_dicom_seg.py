from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tailseg.data.dicom import read_series, series_geometry
from tailseg.data.dicom_seg import write_seg
from tailseg.data.image import Image, ImageError, read_channels, turned_onto
from tailseg.files import WriteError

pydicom: Any = pytest.importorskip("pydicom")
hd: Any = pytest.importorskip("highdicom")
sitk: Any = pytest.importorskip("SimpleITK")

CLASSES = ["background", "spleen", "left_kidney", "gallbladder", "liver_tumour", "odd thing"]
SHAPE = (6, 10, 7)  # (D, H, W); a plane of 70 bits ends within a byte
SPACING = (2.5, 0.8, 0.7)  # mm of slices, rows and columns
WAYS = {
    "axial": [[1, 0, 0], [0, 1, 0]],
    "axial, head to foot": [[-1, 0, 0], [0, 1, 0]],
    "sagittal": [[0, 1, 0], [0, 0, -1]],
    "coronal": [[1, 0, 0], [0, 0, -1]],
    "oblique": [[0.8, 0.48, -0.36], [-0.6, 0.64, -0.48]],
}


def an_f() -> np.ndarray:
    """(D, H, W) uint8: a letter that no mirror and no turn leaves as it is, a little of each class but gallbladder."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:5, 1:8, 1] = 1
    labels[1:5, 1, 1:6] = 2
    labels[1:3, 4, 2:4] = 4
    labels[4, 7, 6] = 5
    return labels


def write_series(
    folder: Path,
    axes: Any = WAYS["axial"],
    *,
    name: Callable[[int], str] = "{}.dcm".format,
    instance: Callable[[int], int] = lambda k: k + 1,
    change: Callable[[Any, int], None] = lambda slice_, k: None,
) -> Path:
    """A CT of SHAPE, the slices k = 0, 1, ... along their normal. change: of the k-th dataset before it is written."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows, columns = np.array(axes, dtype=float)
    for k in range(SHAPE[0]):
        slice_ = pydicom.Dataset()
        slice_.SOPClassUID = pydicom.uid.CTImageStorage
        slice_.SOPInstanceUID = f"1.2.826.0.1.77.{k + 1}"
        slice_.StudyInstanceUID, slice_.SeriesInstanceUID = "1.2.826.0.1.5", "1.2.826.0.1.6"
        slice_.FrameOfReferenceUID, slice_.Modality, slice_.SeriesNumber = "1.2.826.0.1.7", "CT", 4
        slice_.PatientID, slice_.PatientName, slice_.PatientBirthDate, slice_.PatientSex = "p1", "A^B", "19500101", "F"
        slice_.StudyID, slice_.StudyDate, slice_.StudyTime, slice_.AccessionNumber = "s1", "20240102", "101112", "a1"
        slice_.InstanceNumber = instance(k)
        slice_.ImagePositionPatient = [
            f"{value:.6f}" for value in np.array([-120, 35, 800]) + SPACING[0] * k * np.cross(rows, columns)
        ]
        slice_.ImageOrientationPatient = [f"{value:.6f}" for value in (*rows, *columns)]
        slice_.PixelSpacing, slice_.SliceThickness = [SPACING[1], SPACING[2]], SPACING[0]
        slice_.Rows, slice_.Columns = SHAPE[1:]
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 16, 15, 1
        slice_.RescaleSlope, slice_.RescaleIntercept = 1, 0
        slice_.PixelData = rng.integers(-99, 99, SHAPE[1:]).astype("<i2").tobytes()
        slice_.file_meta = pydicom.dataset.FileMetaDataset()
        slice_.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        change(slice_, k)
        slice_.save_as(folder / name(k), enforce_file_format=True)
    return folder


def written(folder: Path, series: Path, labels: np.ndarray, classes: list[str] = CLASSES, **told: Any) -> Any:
    """The segmentation that highdicom reads back."""
    if "affine" not in told:
        told["affine"] = series_geometry(series)[1]
    about = {"description": "organs", "algorithm": "dhc", "algorithm_version": "abc123"}
    write_seg(folder / "seg.dcm", labels, series, classes, **{**about, **told})
    return hd.seg.segread(folder / "seg.dcm")


def placed(seg: Any, affine: np.ndarray, shape: tuple[int, ...], classes: list[str]) -> np.ndarray:
    """Class indices on a grid of ours, every voxel of every frame put where its functional groups say it lies."""
    labels = np.zeros(shape, np.uint8)
    shared = seg.SharedFunctionalGroupsSequence[0]
    y_spacing, x_spacing = shared.PixelMeasuresSequence[0].PixelSpacing
    along = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float).reshape(2, 3)
    names = {each.SegmentNumber: each.SegmentLabel for each in seg.SegmentSequence}
    for frame, groups in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        name = names[groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber]
        position = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        for row, column in np.argwhere(frame):
            left, posterior, superior = position + column * x_spacing * along[0] + row * y_spacing * along[1]
            voxel = np.linalg.solve(affine, [-left, -posterior, superior, 1])[:3]
            np.testing.assert_allclose(voxel, np.rint(voxel), atol=0.01)
            i, j, k = np.rint(voxel).astype(int)
            assert labels[k, j, i] == 0
            labels[k, j, i] = classes.index(name)
    return labels


def by_source(seg: Any, series: Path, **how: Any) -> np.ndarray:
    """Class indices, a slice after the other by the UIDs of the sources, in the order of their place."""
    sources = [pydicom.dcmread(file, **how) for file in series.iterdir()]
    rows, columns = np.array(sources[0].ImageOrientationPatient, dtype=float).reshape(2, 3)
    normal = np.cross(rows, columns)
    sources.sort(key=lambda each: np.array(each.ImagePositionPatient, dtype=float) @ normal)
    numbers = seg.get_pixels_by_source_instance(
        [each.SOPInstanceUID for each in sources], combine_segments=True, assert_missing_frames_are_empty=True
    )
    index = [0, *(CLASSES.index(each.SegmentLabel) for each in seg.SegmentSequence)]
    return np.array(index)[numbers]


@pytest.mark.parametrize("way", WAYS)
def test_a_voxel_lies_where_the_scan_has_it(tmp_path: Path, way: str):
    """In every orientation, whatever the files are called and numbered."""
    series = write_series(
        tmp_path / "ct", WAYS[way], name=lambda k: f"{k * 5 % 6}.dcm", instance=lambda k: 20 - k * 7 % 6
    )
    labels = an_f()
    affine = series_geometry(series)[1]
    seg = written(tmp_path, series, labels)
    np.testing.assert_array_equal(placed(seg, affine, SHAPE, CLASSES), labels)
    np.testing.assert_array_equal(by_source(seg, series), labels)


@pytest.mark.parametrize("way", WAYS)
def test_highdicom_reads_the_volume_where_the_scan_has_it(tmp_path: Path, way: str):
    labels = an_f()
    series = write_series(tmp_path / "ct", WAYS[way])
    volume = written(tmp_path, series, labels).get_volume(combine_segments=True, rescale_fractional=False)
    # from the first frame to the last, in either direction; the last axis is the columns, and the affine LPS
    theirs = Image(volume.array, np.diag([-1.0, -1, 1, 1]) @ volume.affine @ np.eye(4)[:, [2, 1, 0, 3]])
    filled = np.flatnonzero(labels.any((1, 2)))
    grid = series_geometry(series)[1]
    grid[:, 3] = grid @ [0, 0, filled[0], 1]
    numbers = np.array([0, 1, 2, 0, 3, 4])[labels[filled[0] : filled[-1] + 1]]
    np.testing.assert_array_equal(turned_onto(theirs, grid, numbers.shape).array, numbers)


def test_labels_whose_axes_run_otherwise_are_turned_onto_the_series(tmp_path: Path):
    """As they do in NIfTI files that converters write."""
    series, labels = write_series(tmp_path / "ct"), an_f()
    affine = series_geometry(series)[1]
    flip = np.diag([1.0, -1, -1, 1])
    flip[1, 3], flip[2, 3] = SHAPE[1] - 1, SHAPE[0] - 1
    turned = Image(np.ascontiguousarray(labels[::-1, ::-1].transpose(1, 0, 2)), (affine @ flip)[:, [0, 2, 1, 3]])
    np.testing.assert_array_equal(turned_onto(turned, affine, SHAPE).array, labels)
    seg = written(tmp_path, series, turned.array, affine=turned.affine)
    np.testing.assert_array_equal(by_source(seg, series), labels)


def test_simpleitk_reads_the_frames_back(tmp_path: Path):
    """Of one segment; its GDCM knows no others, and loses the last bits where all frames together end within a byte."""
    series, labels = write_series(tmp_path / "ct", WAYS["sagittal"]), (an_f() == 1).astype(np.uint8)
    written(tmp_path, series, labels)
    image = sitk.ReadImage(str(tmp_path / "seg.dcm"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image) > 0, labels[labels.any((1, 2))])


def test_segments_are_numbered_without_gaps_and_bear_the_names_of_the_classes(tmp_path: Path):
    seg = written(tmp_path, write_series(tmp_path / "ct"), an_f())
    told = [(each.SegmentNumber, each.SegmentLabel) for each in seg.SegmentSequence]
    assert told == [(1, "spleen"), (2, "left_kidney"), (3, "liver_tumour"), (4, "odd thing")]
    assert seg.SegmentationType == "BINARY" and seg.SegmentsOverlap == "NO"
    assert seg.NumberOfFrames == 4 + 4 + 2 + 1  # frames without voxels are left out


def test_a_segment_says_in_codes_what_it_is(tmp_path: Path):
    seg = written(tmp_path, write_series(tmp_path / "ct"), an_f())
    spleen, kidney, tumour, odd = seg.SegmentSequence

    def code(item: Any) -> tuple[str, str, str]:
        return item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning

    assert code(spleen.SegmentedPropertyTypeCodeSequence[0]) == ("78961009", "SCT", "Spleen")
    assert code(spleen.SegmentedPropertyCategoryCodeSequence[0])[2] == "Anatomical Structure"
    side = kidney.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0]
    assert code(side) == ("7771000", "SCT", "Left")
    assert "SegmentedPropertyTypeModifierCodeSequence" not in spleen.SegmentedPropertyTypeCodeSequence[0]
    assert code(tumour.SegmentedPropertyTypeCodeSequence[0]) == ("108369006", "SCT", "Neoplasm")
    assert code(tumour.AnatomicRegionSequence[0]) == ("10200004", "SCT", "Liver")
    value, scheme, meaning = code(odd.SegmentedPropertyTypeCodeSequence[0])
    assert (scheme, meaning) == ("99TAILSEG", "odd thing") and len(value) == 16
    colours = {tuple(each.RecommendedDisplayCIELabValue) for each in seg.SegmentSequence}
    assert len(colours) == 4


def test_a_class_keeps_its_colour_where_others_are_missing(tmp_path: Path):
    series, labels = write_series(tmp_path / "ct"), an_f()
    first = written(tmp_path, series, labels).SegmentSequence[3]
    second = written(tmp_path, series, np.where(labels == 5, labels, 0)).SegmentSequence[0]
    assert first.SegmentLabel == second.SegmentLabel == "odd thing"
    assert first.RecommendedDisplayCIELabValue == second.RecommendedDisplayCIELabValue


def test_it_belongs_to_the_patient_and_study_and_says_who_made_it(tmp_path: Path):
    series = write_series(tmp_path / "ct")
    seg = written(tmp_path, series, an_f(), description="x" * 70)
    for keyword, value in (
        ("PatientID", "p1"), ("PatientName", "A^B"), ("StudyInstanceUID", "1.2.826.0.1.5"), ("AccessionNumber", "a1"),
        ("FrameOfReferenceUID", "1.2.826.0.1.7"), ("Modality", "SEG"), ("SeriesNumber", 1004), ("StudyDate", "20240102"),
        ("SeriesDescription", "x" * 64), ("Manufacturer", "TailSeg"), ("SOPClassUID", "1.2.840.10008.5.1.4.1.1.66.4"),
    ):  # fmt: skip
        assert seg[keyword].value == value
    assert seg.SeriesInstanceUID != "1.2.826.0.1.6"
    referenced = seg.ReferencedSeriesSequence[0]
    assert referenced.SeriesInstanceUID == "1.2.826.0.1.6"
    assert {each.ReferencedSOPInstanceUID for each in referenced.ReferencedInstanceSequence} == {
        f"1.2.826.0.1.77.{k + 1}" for k in range(SHAPE[0])
    }
    made_by = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    assert (made_by.AlgorithmName, made_by.AlgorithmVersion) == ("dhc", "abc123")
    assert seg.SegmentSequence[0].SegmentAlgorithmType == "AUTOMATIC"
    again = written(tmp_path, series, an_f())
    assert again.SOPInstanceUID != seg.SOPInstanceUID and again.SeriesInstanceUID != seg.SeriesInstanceUID


def test_where_nothing_was_found_every_class_has_one_empty_frame(tmp_path: Path):
    series = write_series(tmp_path / "ct")
    seg = written(tmp_path, series, np.zeros(SHAPE, np.uint8))
    assert [each.SegmentLabel for each in seg.SegmentSequence] == CLASSES[1:]
    assert seg.NumberOfFrames == len(CLASSES) - 1 and not seg.pixel_array.any()


def test_a_scan_that_is_all_foreground_has_no_background_to_leave_out(tmp_path: Path):
    labels = np.full(SHAPE, 3, np.uint8)
    labels[2:] = 1
    seg = written(tmp_path, write_series(tmp_path / "ct"), labels)
    assert [each.SegmentLabel for each in seg.SegmentSequence] == ["spleen", "gallbladder"]


def test_one_slice_is_enough(tmp_path: Path):
    series = write_series(tmp_path / "ct")
    for file in series.iterdir():
        if file.name != "4.dcm":
            file.unlink()
    labels = an_f()[4:5]
    seg = written(tmp_path, series, labels)
    np.testing.assert_array_equal(placed(seg, series_geometry(series)[1], (1, *SHAPE[1:]), CLASSES), labels)


def remove(*keywords: str) -> Callable[[Any, int], None]:
    def change(slice_: Any, k: int) -> None:
        for keyword in keywords:
            del slice_[keyword]

    return change


def test_an_anonymised_series_is_referred_to_as_it_is(tmp_path: Path):
    series = write_series(
        tmp_path / "ct",
        change=remove("PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
                      "AccessionNumber", "SeriesNumber", "PatientID"),
    )  # fmt: skip
    seg = written(tmp_path, series, an_f())
    assert seg.PatientID in ("", None) and seg.SeriesNumber == 1000
    np.testing.assert_array_equal(by_source(seg, series), an_f())


def test_what_the_source_says_of_the_patient_is_repeated_as_it_stands(tmp_path: Path):
    """Anonymisers write what is no date, and a PACS holds it all the same."""

    def anonymised(slice_: Any, k: int) -> None:
        slice_.StudyDate, slice_.PatientBirthDate, slice_.PatientSex = "anon", "1950", "W"

    with pydicom.config.disable_value_validation():
        series = write_series(tmp_path / "ct", change=anonymised)
        seg = written(tmp_path, series, an_f())
        assert (seg.StudyDate, seg.PatientBirthDate, seg.PatientSex, seg.StudyTime) == ("anon", "1950", "W", "101112")


def test_slices_without_the_mark_of_a_file_are_referred_to(tmp_path: Path):
    series = write_series(tmp_path / "ct")
    for file in series.iterdir():
        slice_ = pydicom.dcmread(file)
        del slice_.file_meta
        slice_.preamble = None
        slice_.save_as(file, implicit_vr=True, little_endian=True)
    np.testing.assert_array_equal(by_source(written(tmp_path, series, an_f()), series, force=True), an_f())


def test_what_cannot_be_referred_to_is_named(tmp_path: Path):
    series = write_series(tmp_path / "ct", change=remove("FrameOfReferenceUID"))
    with pytest.raises(ImageError, match=r"0\.dcm says nothing of its FrameOfReferenceUID"):
        written(tmp_path, series, an_f())
    assert not (tmp_path / "seg.dcm").exists()


def test_two_studies_in_one_series_are_refused(tmp_path: Path):
    def other_study(slice_: Any, k: int) -> None:
        slice_.StudyInstanceUID = f"1.2.3.{k // 3}"

    series = write_series(tmp_path / "ct", change=other_study)
    with pytest.raises(ImageError, match="ct cannot be referred to by a DICOM SEG: Source images must all be part of"):
        written(tmp_path, series, an_f())


def test_names_and_patients_keep_their_letters(tmp_path: Path):
    def japanese(slice_: Any, k: int) -> None:
        slice_.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
        slice_.PatientName = "Yamada^Tarou=\u5c71\u7530^\u592a\u90ce"

    series = write_series(tmp_path / "ct", change=japanese)
    classes = ["background", "Gr\u00f6\u00dfe", "\u809d\u81d3", "-", "fat\\water"]
    seg = written(tmp_path, series, np.minimum(an_f(), 4), classes)
    assert [each.SegmentLabel for each in seg.SegmentSequence] == [*classes[1:3], "fat/water"]
    assert seg.PatientName.ideographic == "\u5c71\u7530^\u592a\u90ce"


def test_what_fits_neither_grid_nor_classes_is_refused(tmp_path: Path):
    series, labels = write_series(tmp_path / "ct"), an_f()
    with pytest.raises(ImageError, match=r"labels \(5, 10, 7\) do not lie on the grid \(6, 10, 7\) of .*ct"):
        written(tmp_path, series, labels[1:])
    shifted = series_geometry(series)[1].copy()
    shifted[2, 3] += 2.5
    with pytest.raises(ImageError, match="do not lie on the grid"):
        written(tmp_path, series, labels, affine=shifted)
    with pytest.raises(ImageError, match="hold class 5, but 5 classes have names"):
        written(tmp_path, series, labels, CLASSES[:-1])
    with pytest.raises(ImageError, match="is no folder of DICOM slices"):
        written(tmp_path, tmp_path / "none", labels, affine=np.eye(4))
    assert not (tmp_path / "seg.dcm").exists()


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    imported = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "highdicom":
            raise ImportError(name)
        return imported(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"writing DICOM SEG needs highdicom: pip install 'tailseg\[dicom\]'"):
        written(tmp_path, tmp_path, an_f(), affine=np.eye(4))


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path: Path):
    series = write_series(tmp_path / "ct")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError):
        written(tmp_path / "file", series, an_f())
    assert (tmp_path / "file").read_text() == "mine"


def test_the_scan_itself_is_read_from_the_same_folder(tmp_path: Path):
    """What predict does: the grid of the labels is that of the image it read."""
    series = write_series(tmp_path / "ct", WAYS["oblique"])
    image = read_channels(series)
    assert read_series(series)[0].shape == SHAPE
    labels = (image.array[0] > 50).astype(np.uint8)
    seg = written(tmp_path, series, labels, affine=image.affine)
    np.testing.assert_array_equal(by_source(seg, series), labels)
