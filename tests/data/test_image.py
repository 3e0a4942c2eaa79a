from __future__ import annotations

import errno
import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from tailseg.data.image import (
    Image,
    ImageError,
    canonical_orientation,
    read_channels,
    read_geometry,
    read_header,
    read_image,
    same_place,
    spacing_of,
    turned_onto,
    write_image,
)
from tailseg.files import WriteError

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")
ORIENTATIONS = ("RAS", "LAS", "LPS", "PIR", "SAL", "AIL")


def tilted(codes: str, *, degrees: float = 20, spacing: tuple[float, float, float] = (0.7, 1.5, 3.0)) -> np.ndarray:
    """An affine whose nearest axes are codes, turned about two axes, with an origin that nothing hides."""
    axes = nib.orientations.axcodes2ornt(codes)
    steps = np.zeros((3, 3))
    for file_axis, (anatomical, direction) in enumerate(axes):
        steps[int(anatomical), file_axis] = direction * spacing[file_axis]
    a, b = np.radians([degrees, degrees / 2])
    about_s = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_r = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_s @ about_r @ steps
    affine[:3, 3] = (-31, 12.5, 870)
    return affine


def scan(affine: np.ndarray | None = None) -> Image:
    array = np.random.default_rng(0).integers(-1000, 2000, (4, 5, 6)).astype(np.int16)
    return Image(array, np.eye(4) if affine is None else affine)


def test_spacing_is_in_the_order_of_the_array():
    assert spacing_of(tilted("LAS")) == pytest.approx((3.0, 1.5, 0.7))


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_what_is_written_is_read(tmp_path: Path, ending: str, codes: str):
    written = scan(tilted(codes))
    write_image(tmp_path / f"scan{ending}", written)
    read = read_image(tmp_path / f"scan{ending}")
    np.testing.assert_array_equal(read.array, written.array)
    np.testing.assert_allclose(read.affine, written.affine, atol=1e-4)  # NIfTI stores float32: 870 mm to 0.00006
    assert read.array.dtype == np.int16


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_header_alone_says_shape_and_place(tmp_path: Path, ending: str):
    write_image(tmp_path / f"scan{ending}", scan(tilted("PIR")))
    shape, affine = read_geometry(tmp_path / f"scan{ending}")
    np.testing.assert_array_equal(affine, read_image(tmp_path / f"scan{ending}").affine)
    assert shape == (4, 5, 6)


def test_nifti_index_is_the_reversed_array_index(tmp_path: Path):
    path = tmp_path / "scan.nii"
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)  # (i, j, k)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    assert read_image(path).array[3, 2, 1] == voxels[1, 2, 3]


def test_itk_reads_our_nifti_and_ours_reads_itk_at_the_same_place_of_the_patient(tmp_path: Path):
    sitk = pytest.importorskip("SimpleITK")
    write_image(tmp_path / "ours.nii.gz", scan(tilted("SAL")))
    theirs = sitk.ReadImage(str(tmp_path / "ours.nii.gz"))
    index = (5, 1, 2)  # (i, j, k)
    left, posterior, superior = theirs.TransformIndexToPhysicalPoint(index)
    np.testing.assert_allclose(tilted("SAL") @ [*index, 1], [-left, -posterior, superior, 1], atol=1e-4)
    for ending in (".nrrd", ".mha", ".mhd"):
        sitk.WriteImage(theirs, str(tmp_path / f"theirs{ending}"))
        read = read_image(tmp_path / f"theirs{ending}")
        np.testing.assert_array_equal(read.array, scan().array)
        assert same_place(read.affine, tilted("SAL"), (4, 5, 6))


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_turning_to_canonical_and_back_is_exact(codes: str):
    array, affine = scan().array, tilted(codes)
    axes, flips = canonical_orientation(affine)
    backwards = tuple(axis for axis in range(3) if flips[axis])
    turned = np.flip(array.transpose(axes), backwards)
    # nibabel's own turning, which also says where every voxel then lies
    theirs = nib.as_closest_canonical(nib.Nifti1Image(array.T, affine))
    np.testing.assert_array_equal(turned, np.asarray(theirs.dataobj).T)
    assert nib.orientations.aff2axcodes(theirs.affine) == ("R", "A", "S")
    back = np.flip(turned, backwards).transpose(np.argsort(axes))
    np.testing.assert_array_equal(back, array)


def test_stored_integers_with_slope_and_intercept_give_their_real_values(tmp_path: Path):
    nifti = nib.Nifti1Image(np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.eye(4))
    nifti.header.set_slope_inter(2.0, -125.0)
    nib.save(nifti, tmp_path / "scan.nii.gz")
    stored = np.asarray(nib.load(tmp_path / "scan.nii.gz").dataobj.get_unscaled()).T
    read = read_image(tmp_path / "scan.nii.gz").array
    np.testing.assert_allclose(read, 2.0 * stored - 125.0)
    assert read.dtype.kind == "f"


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("endianness", ["<", ">"])
def test_both_niftis_in_both_byte_orders(tmp_path: Path, kind: type, endianness: str):
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4, 1)  # a trailing axis of one is no fourth axis
    header = kind.header_class(endianness=endianness)
    header.set_data_dtype(np.int16)
    nib.save(kind(voxels, tilted("LPS"), header=header), tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(read_image(tmp_path / "scan.nii.gz").array, voxels[..., 0].T)
    assert read_geometry(tmp_path / "scan.nii.gz")[0] == (4, 3, 2)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("damage", ["empty", "truncated", "a web page"])
def test_a_broken_file_is_named(tmp_path: Path, ending: str, damage: str):
    path = tmp_path / f"scan{ending}"
    write_image(path, Image(np.random.default_rng(0).integers(0, 99, (20, 30, 40)).astype(np.int16), np.eye(4)))
    whole = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "truncated": whole[: len(whole) // 2], "a web page": b"<html>404</html>" * 99}[damage]
    )
    with pytest.raises(ImageError, match=rf"scan{ending} cannot be read: .*Copy or convert it again") as error:
        read_image(path)
    assert len(str(error.value).splitlines()) == 1


def test_a_flipped_bit_in_a_compressed_file_is_found(tmp_path: Path):
    path = tmp_path / "scan.nii.gz"
    write_image(path, scan())
    damaged = bytearray(gzip.decompress(path.read_bytes()))
    damaged[400] ^= 1  # a voxel: all else about the file is right
    whole = path.read_bytes()
    path.write_bytes(gzip.compress(bytes(damaged), mtime=0)[:-8] + whole[-8:])
    with pytest.raises(ImageError, match="incorrect data check"):
        read_image(path)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, ">i2", np.float32, np.float64])
@pytest.mark.parametrize("slope", [1.0, 0.5])
def test_a_compressed_scan_is_read_as_nibabel_reads_it_bit_for_bit(tmp_path: Path, dtype: str, slope: float):
    voxels = np.random.default_rng(0).integers(0, 99, (7, 5, 3)).astype(dtype)
    header = nib.Nifti1Header(endianness=">" if dtype == ">i2" else "<")
    header.set_data_dtype(voxels.dtype)
    nifti = nib.Nifti1Image(voxels, tilted("LPS"), header)
    nifti.header.set_slope_inter(slope, 0.0)
    nib.save(nifti, tmp_path / "scan.nii.gz")
    theirs = np.asanyarray(nib.load(tmp_path / "scan.nii.gz").dataobj).T
    ours = read_image(tmp_path / "scan.nii.gz").array
    assert ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()
    assert ours.flags.writeable and ours.flags.aligned and ours.flags.c_contiguous


@pytest.mark.parametrize("ending", [b"", b"\0" * 300_000])
def test_a_compressed_scan_may_come_in_several_members_and_be_padded_with_zeros(tmp_path: Path, ending: bytes):
    path = tmp_path / "scan.nii.gz"
    write_image(path, Image(np.random.default_rng(0).integers(0, 9999, (40, 90, 80)).astype(np.int16), np.eye(4)))
    expected, content = read_image(path).array, gzip.decompress(path.read_bytes())
    parts = (content[:7], content[7:200_000], content[200_000:])
    path.write_bytes(b"".join(gzip.compress(part, mtime=0) for part in parts) + ending)
    np.testing.assert_array_equal(read_image(path).array, expected)


def test_what_follows_the_compressed_scan_must_be_compressed_too(tmp_path: Path):
    path = tmp_path / "scan.nii.gz"
    write_image(path, scan())
    path.write_bytes(path.read_bytes() + b"something else")
    with pytest.raises(ImageError, match="incorrect header check"):
        read_image(path)


def test_a_compressed_scan_with_too_few_voxels_is_refused(tmp_path: Path):
    path = tmp_path / "scan.nii.gz"
    write_image(path, scan())
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-4], mtime=0))
    with pytest.raises(ImageError, match=r"Expected \d+ bytes, got"):
        read_image(path)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("read", [read_image, read_geometry])
def test_what_is_not_there_or_has_no_known_ending(tmp_path: Path, ending: str, read):
    with pytest.raises(ImageError, match="does not exist"):
        read(tmp_path / f"scan{ending}")
    (tmp_path / "scan.gif").touch()
    with pytest.raises(ImageError, match=r"scan\.gif has no known ending; convert it to one of \.nii\.gz"):
        read(tmp_path / "scan.gif")


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6, 2, 3), (4, 5, 0)])
@pytest.mark.parametrize("read", [read_image, read_channels, read_geometry])
def test_a_scan_has_three_axes(tmp_path: Path, shape: tuple[int, ...], read):
    nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), np.eye(4)), tmp_path / "scan.nii")
    with pytest.raises(ImageError, match="three axes"):
        read(tmp_path / "scan.nii")


@pytest.mark.parametrize("shape", [(4, 5, 6, 3), (4, 5, 6, 1, 3)])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_the_fourth_axis_of_nifti_holds_channels(tmp_path: Path, shape: tuple[int, ...], ending: str):
    voxels = np.random.default_rng(0).integers(0, 99, shape).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, tilted("LPS")), tmp_path / f"scan{ending}")
    image = read_channels(tmp_path / f"scan{ending}")
    np.testing.assert_array_equal(image.array, voxels.reshape(4, 5, 6, 3).T)
    size, affine, channels = read_header(tmp_path / f"scan{ending}")
    assert (size, channels) == ((6, 5, 4), 3) and read_geometry(tmp_path / f"scan{ending}")[0] == size
    np.testing.assert_array_equal(affine, image.affine)
    with pytest.raises(ImageError, match=r"three axes\. Write every channel to its own file"):
        read_image(tmp_path / f"scan{ending}")


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_the_vectors_of_itk_hold_channels(tmp_path: Path, ending: str):
    sitk = pytest.importorskip("SimpleITK")
    array = np.random.default_rng(0).integers(0, 99, (4, 5, 6, 3)).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=True), str(tmp_path / f"scan{ending}"))
    np.testing.assert_array_equal(read_channels(tmp_path / f"scan{ending}").array, np.moveaxis(array, -1, 0))
    assert read_header(tmp_path / f"scan{ending}")[2] == 3
    with pytest.raises(ImageError, match="three axes"):
        read_image(tmp_path / f"scan{ending}")


@pytest.mark.parametrize("read", [read_image, read_channels, read_geometry])
def test_time_series_of_itk_are_refused(tmp_path: Path, read):
    sitk = pytest.importorskip("SimpleITK")
    sitk.WriteImage(
        sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=False), str(tmp_path / "scan.nrrd")
    )
    with pytest.raises(ImageError, match="three axes"):
        read(tmp_path / "scan.nrrd")


def test_a_picture_is_a_volume_of_one_slice_and_one_nominal_mm(tmp_path: Path):
    label = np.random.default_rng(0).integers(0, 4, (1, 5, 6)).astype(np.uint8)
    write_image(tmp_path / "label.png", Image(label, np.eye(4)))
    read = read_image(tmp_path / "label.png")
    np.testing.assert_array_equal(read.array, label)
    assert read.spacing == (1, 1, 1) and read_channels(tmp_path / "label.png").array.shape == (1, 1, 5, 6)
    shape, affine, channels = read_header(tmp_path / "label.png")
    assert (shape, channels) == ((1, 5, 6), 1) and (affine == np.eye(4)).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "spacing", "match"),
    [
        ((2, 5, 6), np.uint8, 1.0, "more than one slice"),
        ((1, 5, 6), np.uint8, 2.0, r"nor where it lies; use one of \.nii\.gz"),
        ((1, 5, 6), np.float32, 1.0, "cannot hold float32"),
    ],
)
def test_what_a_png_cannot_hold_is_refused(tmp_path: Path, shape: tuple, dtype: type, spacing: float, match: str):
    with pytest.raises(ImageError, match=match):
        write_image(tmp_path / "scan.png", Image(np.zeros(shape, dtype), np.diag([spacing, spacing, 1, 1])))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]), np.complex64])
def test_voxels_are_real_numbers(tmp_path: Path, dtype):
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), dtype), np.eye(4)), tmp_path / "scan.nii")
    with pytest.raises(ImageError, match="one real number per voxel"):
        read_image(tmp_path / "scan.nii")


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_an_affine_that_places_nothing_is_refused(tmp_path: Path, value: float):
    nifti = nib.Nifti1Image(np.zeros((4, 5, 6), np.uint8), None)
    nifti.header["sform_code"] = 1
    nifti.header["srow_x"], nifti.header["srow_y"], nifti.header["srow_z"] = [value] * 4, [0, 2, 0, 0], [0, 0, 3, 0]
    nib.save(nifti, tmp_path / "scan.nii")
    with pytest.raises(ImageError, match="no usable spacing and orientation"):
        read_geometry(tmp_path / "scan.nii")


def test_affines_are_equal_when_no_voxel_lies_elsewhere():
    affine, shape = tilted("LPS"), (40, 50, 60)
    rounded, shifted, longer = affine.astype(np.float32), affine.copy(), affine.copy()
    shifted[0, 3] += 0.1
    longer[:3, 2] *= 1.001  # 0.003 mm a slice, 0.12 mm at the far end
    assert same_place(affine, rounded.astype(float), shape)
    assert not same_place(affine, shifted, shape)
    assert not same_place(affine, longer, shape)
    assert not same_place(affine, tilted("LAS"), shape)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_an_image_is_turned_onto_a_grid_of_the_same_places(codes: str):
    image = scan(tilted("LPS"))
    theirs: Any = nib.Nifti1Image(image.array.T, image.affine)
    start = nib.orientations.io_orientation(np.round(image.affine @ np.diag([1 / 0.7, 1 / 1.5, 1 / 3, 1])))
    turn = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(codes))
    other = theirs.as_reoriented(turn)
    voxels = np.asarray(other.dataobj).T
    turned = turned_onto(image, other.affine, voxels.shape)
    np.testing.assert_array_equal(turned.array, voxels)
    np.testing.assert_array_equal(turned_onto(turned, image.affine, (4, 5, 6)).array, image.array)


def test_an_image_that_lies_elsewhere_stays_as_it_is():
    image = scan(tilted("LPS"))
    shifted, finer = image.affine.copy(), image.affine @ np.diag([0.5, 1, 1, 1])
    shifted[0, 3] += 0.1
    for affine in (shifted, finer, tilted("LPS", degrees=21)):
        assert turned_onto(image, affine, (4, 5, 6)) is image
    assert turned_onto(image, image.affine, (4, 5, 7)) is image


@pytest.mark.parametrize("dtype", [bool, np.float16, np.int64])
def test_a_type_that_the_formats_do_not_share_is_refused(tmp_path: Path, dtype):
    with pytest.raises(ImageError, match="convert to one of uint8"):
        write_image(tmp_path / "label.nii.gz", Image(np.zeros((4, 5, 6), dtype), np.eye(4)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["scan.mhd", "scan.jpg", "scan"])
def test_a_format_that_cannot_be_written_whole_is_refused(tmp_path: Path, name: str):
    with pytest.raises(ImageError, match=r"use one of \.nii\.gz"):
        write_image(tmp_path / name, scan())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("before", [None, b"an earlier scan"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bytes | None):
    def save_half(nifti: nib.Nifti1Image, path: Path) -> None:
        path.write_bytes(b"half a scan")
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "scan.nii.gz"
    if before is not None:
        path.write_bytes(before)
    monkeypatch.setattr(nib, "save", save_half)
    with pytest.raises(WriteError, match=r"scan\.nii\.gz could not be written: the disk is full"):
        write_image(path, scan())
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([] if before is None else [before])
