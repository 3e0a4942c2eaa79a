from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tailseg.data.dicom import is_series, read_series, series_geometry
from tailseg.data.image import Image, ImageError, read_channels, read_geometry, read_header, write_image
from tailseg.data.intensity import ZScore
from tailseg.data.preparation import Preparation
from tailseg.data.prepare import prepare_dataset
from tailseg.data.raw import DataError, load_case, read_raw

sitk: Any = pytest.importorskip("SimpleITK")

VOXELS = np.random.default_rng(0).integers(-500, 500, (6, 5, 7)).astype(np.int16)  # (D, H, W)
AXIAL = np.array([[1.0, 0, 0], [0, 1, 0]])
OBLIQUE = np.array([[0.0, 0.8, -0.6], [0.0, -0.6, -0.8]])


def write_slice(path: Path, plane: np.ndarray, position: np.ndarray, axes: Any = AXIAL, **tags: str) -> None:
    """tags: as 0020_000e. Slope 2 and intercept -1024 unless told otherwise."""
    image = sitk.GetImageFromArray(plane[None])
    image.SetSpacing([0.7, 0.8, 1.0])
    told = {
        "0008_0060": "CT",
        "0008_0008": "DERIVED\\SECONDARY",
        "0020_000e": "1.2.3",
        "0008_0018": f"1.2.3.{abs(hash(path)) % 10**9}",
        "0018_0050": "2.5",
        "0020_0032": "\\".join(f"{value:.6f}" for value in position),
        "0020_0037": "\\".join(f"{value:.6f}" for value in axes.ravel()),
        "0028_1052": "-1024",
        "0028_1053": "1",
    }
    for tag, value in {**told, **tags}.items():
        image.SetMetaData(tag.replace("_", "|"), value)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetImageIO("GDCMImageIO")
    writer.SetFileName(str(path))
    writer.Execute(image)


def write_series(
    folder: Path,
    axes: np.ndarray = AXIAL,
    *,
    name: Callable[[int], str] = "{}.dcm".format,
    position: Callable[[int], Any] = lambda k: 2.5 * k,
    shear: float = 0.0,
    skip: tuple[int, ...] = (),
    **tags: str,
) -> Path:
    """The slices of VOXELS under names whose order is not theirs. position: mm along the normal. shear: mm a slice."""
    normal = np.cross(*axes)
    for k, plane in enumerate(VOXELS):
        if k not in skip:
            where = np.array([-120.0, 35, 800]) + position(k) * normal + shear * k * axes[1]
            write_slice(folder / name((k * 5) % 6), plane, where, axes, **tags)
    return folder


@pytest.mark.parametrize("axes", [AXIAL, OBLIQUE])
def test_slices_are_sorted_by_place_whatever_their_names(tmp_path: Path, axes: np.ndarray):
    array, affine = read_series(write_series(tmp_path / "ct", axes))
    np.testing.assert_array_equal(array, VOXELS)
    shape, again = series_geometry(tmp_path / "ct")
    assert shape == VOXELS.shape and (again == affine).all()
    # a voxel lies where its slice says, in the patient: LPS of DICOM is minus right, minus anterior
    i, j, k = 3, 2, 4
    normal = np.cross(*axes)
    left, posterior, superior = np.array([-120.0, 35, 800]) + 0.7 * i * axes[0] + 0.8 * j * axes[1] + 2.5 * k * normal
    np.testing.assert_allclose(affine @ [i, j, k, 1], [-left, -posterior, superior, 1], atol=1e-4)


def test_itk_s_series_reader_agrees_where_there_is_nothing_to_refuse(tmp_path: Path):
    array, affine = read_series(write_series(tmp_path / "ct", OBLIQUE))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "ct")))
    theirs = reader.Execute()
    np.testing.assert_array_equal(array, sitk.GetArrayFromImage(theirs))
    left, posterior, superior = theirs.TransformIndexToPhysicalPoint((6, 4, 5))
    np.testing.assert_allclose(affine @ [6, 4, 5, 1], [-left, -posterior, superior, 1], atol=1e-3)


def edit(file: Path, before: bytes, after: bytes) -> None:
    """What a writer would not write."""
    whole = file.read_bytes()
    assert whole.count(before) == 1 and len(before) == len(after)
    file.write_bytes(whole.replace(before, after))


def test_every_slice_has_its_own_slope_and_intercept(tmp_path: Path):
    for k, slope in enumerate((b"1 ", b"2 ", b".5")):
        file = tmp_path / f"{k}.dcm"
        write_slice(file, np.full((5, 7), 10, np.int16), np.array([0, 0, 3.0 * k]), **{"0028_1052": "-5"})
        edit(file, b"\x28\x00\x53\x10\x02\x00\x00\x001 ", b"\x28\x00\x53\x10\x02\x00\x00\x00" + slope)
    array, _ = read_series(tmp_path)
    np.testing.assert_array_equal(array[:, 0, 0], [10, 25, 2.5])  # stored is 15


def test_what_says_nothing_of_its_place_is_named(tmp_path: Path):
    folder = write_series(tmp_path / "ct")
    edit(folder / "0.dcm", b"-120\\35", b"-120 35")
    with pytest.raises(ImageError, match=r"0\.dcm: its Image Position \(Patient\) is '.*'; it must be 3 numbers"):
        read_series(folder)
    edit(folder / "0.dcm", b"\x20\x00\x32\x00\x0c", b"\x20\x00\x31\x00\x0c")
    with pytest.raises(ImageError, match=r"0\.dcm says nothing of its Image Position \(Patient\); it is no slice"):
        read_series(folder)


def test_several_frames_and_colours_are_refused(tmp_path: Path):
    for name, image, match in (
        ("frames", sitk.GetImageFromArray(VOXELS.astype(np.uint8)), "frames.dcm holds 6 frames; convert it to NIfTI"),
        (
            "colours",
            sitk.GetImageFromArray(np.zeros((5, 7, 3), np.uint8), isVector=True),
            "colours.dcm is in colour",
        ),
    ):
        (tmp_path / name).mkdir()
        sitk.WriteImage(image, str(tmp_path / name / f"{name}.dcm"))
        with pytest.raises(ImageError, match=match):
            read_series(tmp_path / name)


def test_files_without_ending_are_found_by_their_mark(tmp_path: Path):
    folder = write_series(tmp_path / "ct", name="IM{}.dcm".format)
    for file in folder.iterdir():
        file.rename(file.with_suffix(""))
    (folder / "DICOMDIR").write_bytes(b"")
    (folder / "readme.txt").write_text("scan of a phantom")
    assert is_series(folder) and (read_series(folder)[0] == VOXELS).all()
    assert not is_series(tmp_path) and not is_series(folder / "IM0")


def test_slices_with_and_without_ending_are_one_scan(tmp_path: Path):
    """Reading those called .dcm alone would leave every other slice out, without a gap that told of it."""
    folder = write_series(tmp_path / "ct")
    for k in (1, 3, 5):
        file = folder / f"{k * 5 % 6}.dcm"
        file.rename(file.with_suffix(""))
    (folder / "LOCKFILE").write_bytes(b"no slice")
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    assert is_series(folder) and (read_series(folder)[0] == VOXELS).all()


@pytest.mark.parametrize("compressor", ["JPEG", "JPEG2000"])
def test_slices_of_lossless_jpeg_are_read(tmp_path: Path, compressor: str):
    for k, plane in enumerate(VOXELS):
        file = tmp_path / f"{k}.dcm"
        write_slice(file, np.kron(plane, np.ones((8, 8), np.int16)), np.array([0, 0, 2.5 * k]), **{"0028_1052": "0"})
        image, size = sitk.ReadImage(str(file)), file.stat().st_size
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetImageIO("GDCMImageIO")
        writer.SetUseCompression(True)
        writer.SetCompressor(compressor)
        writer.SetFileName(str(file))
        writer.Execute(image)
        assert file.stat().st_size < size
    np.testing.assert_array_equal(read_series(tmp_path)[0][:, ::8, ::8], VOXELS)


@pytest.mark.parametrize("syntax", ["RLELossless", "JPEGLSLossless", "DeflatedExplicitVRLittleEndian"])
def test_what_a_pacs_sends_compressed_is_read(tmp_path: Path, syntax: str):
    pydicom: Any = pytest.importorskip("pydicom")
    folder = write_series(tmp_path / "ct")
    for file in folder.iterdir():
        slice_ = pydicom.dcmread(file)
        slice_.PixelData = np.ascontiguousarray(np.kron(slice_.pixel_array, np.ones((4, 4), np.int16))).tobytes()
        slice_.Rows, slice_.Columns = 4 * slice_.Rows, 4 * slice_.Columns
        if syntax == "DeflatedExplicitVRLittleEndian":
            slice_.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
        else:
            slice_.compress(getattr(pydicom.uid, syntax))
        slice_.save_as(file)
    np.testing.assert_array_equal(read_series(folder)[0][:, ::4, ::4], VOXELS)


def test_image_reads_a_folder_as_a_scan_of_one_channel(tmp_path: Path):
    folder = write_series(tmp_path / "ct")
    image = read_channels(folder)
    assert image.array.shape == (1, *VOXELS.shape) and image.spacing == pytest.approx((2.5, 0.8, 0.7))
    assert read_header(folder)[2] == 1 and read_geometry(folder)[0] == VOXELS.shape


def test_one_slice_is_as_thick_as_it_says(tmp_path: Path):
    write_slice(tmp_path / "a.dcm", VOXELS[0], np.zeros(3))
    assert read_channels(tmp_path).spacing == pytest.approx((2.5, 0.8, 0.7))


@pytest.mark.parametrize(
    ("series", "match"),
    [
        ({"skip": (3,)}, r"1 slice is missing between .*4\.dcm and 2\.dcm: 5 mm apart, the others 2\.5; add"),
        ({"skip": (2, 3)}, "2 slices are missing between"),
        ({"position": lambda k: 2.5 * min(k, 4)}, r"4?.*\.dcm and .*\.dcm are two slices of one place; keep one"),
        ({"position": lambda k: 2.5 * k + (k > 2)}, "slices at uneven distances: 3.5 mm between"),
        ({"shear": 0.9}, r"ct was taken with a gantry tilted by 19\.8 degrees: its last slice lies 4\.5 mm beside"),
    ],
)
def test_what_cannot_be_a_volume_is_refused(tmp_path: Path, series: dict[str, Any], match: str):
    folder = write_series(tmp_path / "ct", **series)
    for read in (read_channels, read_geometry):
        with pytest.raises(ImageError, match=match):
            read(folder)


def test_a_geometry_that_is_none_is_named(tmp_path: Path):
    file = tmp_path / "a.dcm"
    write_slice(file, VOXELS[0], np.zeros(3), **{"0018_0050": "0"})
    with pytest.raises(ImageError, match="Slice Thickness is '0'; it must be a positive number"):
        read_series(tmp_path)
    edit(file, b".8\\.7", b".8\\.0")
    with pytest.raises(ImageError, match=r"Pixel Spacing is '.*'; it must be positive"):
        read_series(tmp_path)
    edit(file, b"1\\0\\0\\0\\1\\0", b"0\\0\\0\\0\\0\\0")
    with pytest.raises(ImageError, match=r"Image Orientation \(Patient\) is '.*'; it must be two vectors of length 1"):
        read_series(tmp_path)


def test_a_tilt_of_rounding_is_none(tmp_path: Path):
    assert read_series(write_series(tmp_path / "ct", shear=0.02))[0].shape == VOXELS.shape


def test_another_series_and_what_is_no_slice_of_it_are_named(tmp_path: Path):
    folder = write_series(tmp_path / "ct")
    scout = folder / "scout.dcm"
    write_slice(scout, VOXELS[0], np.zeros(3), **{"0020_000e": "9.9", "0008_103e": "scout"})
    with pytest.raises(
        ImageError, match=r"ct holds 2 series: scout \(scout\.dcm\), without description .*folder of its own"
    ):
        read_series(folder)
    write_slice(scout, VOXELS[0], np.zeros(3), OBLIQUE)
    with pytest.raises(ImageError, match=r"scout\.dcm has another orientation than .*0\.dcm"):
        read_series(folder)
    write_slice(scout, VOXELS[0, :3], np.zeros(3))
    with pytest.raises(ImageError, match=r"scout\.dcm has another size than"):
        read_series(folder)
    scout.write_bytes(b"not DICOM")
    with pytest.raises(ImageError, match=r"scout\.dcm cannot be read as DICOM"):
        read_series(folder)
    whole = (folder / "0.dcm").read_bytes()
    scout.unlink()
    (folder / "0.dcm").write_bytes(whole[:-30])
    with pytest.raises(ImageError, match=r"0\.dcm cannot be read as DICOM\. Is it whole"):
        read_series(folder)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """a, labelled, and u as folders of slices; a file of another case beside them."""
    raw = tmp_path / "raw"
    write_series(raw / "imagesTr" / "a")
    write_series(raw / "imagesUn" / "u_0000")
    array, affine = read_series(raw / "imagesTr" / "a")
    (raw / "labelsTr").mkdir()
    write_image(raw / "imagesTr" / "n_0000.nii.gz", Image(array, affine))
    write_image(raw / "labelsTr" / "a.nii.gz", Image((array > 0).astype(np.uint8), affine))
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "bright": 1}}
    (raw / "dataset.json").write_text(json.dumps(description))
    return raw


def test_series_are_cases_where_else_files_would_be(root: Path):
    dataset = read_raw(root)
    assert list(dataset.cases) == ["a", "n", "u"]
    image, label = load_case(dataset.cases["a"], dataset)
    np.testing.assert_array_equal(label, image.array[0] > 0)
    (root / "imagesTr" / "notes").mkdir()
    assert list(read_raw(root).cases) == ["a", "n", "u"]


def test_a_label_whose_axes_run_otherwise_is_turned_onto_the_series(root: Path):
    """Converters flip rows and slices on the way to NIfTI, and labels are drawn there."""
    dataset = read_raw(root)
    image, label = load_case(dataset.cases["a"], dataset)
    assert label is not None and dataset.cases["a"].label is not None
    flip = np.diag([1.0, -1, -1, 1])
    flip[1, 3], flip[2, 3] = 4, 5
    turned = Image(np.ascontiguousarray(label[::-1, ::-1].transpose(1, 0, 2)), (image.affine @ flip)[:, [0, 2, 1, 3]])
    write_image(dataset.cases["a"].label, turned)
    np.testing.assert_array_equal(load_case(dataset.cases["a"], dataset)[1], label)


def test_channels_may_be_series_of_their_own(root: Path):
    write_series(root / "imagesTr" / "b_0000")
    write_series(root / "imagesTr" / "b_0001")
    description = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "bright": 1}}
    (root / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(DataError, match=r"imagesTr/a\.nii\.gz must be called <case>_0000|a must be called"):
        read_raw(root)
    (root / "imagesTr" / "a").rename(root / "imagesTr" / "a_0000")
    with pytest.raises(DataError, match="a_0001"):
        read_raw(root)


def test_a_changed_slice_is_prepared_anew(root: Path, tmp_path: Path):
    recipe, redone = Preparation(intensity=ZScore()), []
    for _ in range(2):
        prepare_dataset(read_raw(root), recipe, tmp_path / "stores", progress=lambda *call: redone.append(call[2]))
    assert redone == ["a", "n", "u"]
    file = root / "imagesTr" / "a" / "0.dcm"
    file.write_bytes(file.read_bytes())
    prepare_dataset(read_raw(root), recipe, tmp_path / "stores", progress=lambda *call: redone.append(call[2]))
    assert redone == ["a", "n", "u", "a"]
