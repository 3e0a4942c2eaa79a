"""Read and write scans with their spacing and orientation.

A 2D picture is a volume of one slice, (C, 1, H, W), with a nominal spacing of 1 mm: its files do not say how large a pixel is.

Arrays are indexed [k, j, i], the file's axes reversed, so that the last axis is the fastest; affines stay as the file has
them: (i, j, k, 1) -> right, anterior, superior in mm.
"""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from tailseg.data.dicom import read_series, series_geometry
from tailseg.data.errors import ImageError
from tailseg.data.pictures import PICTURE_ENDINGS, picture_size, read_picture, write_picture
from tailseg.files import written_whole

__all__ = ["ImageError"]

NIFTI_ENDINGS = (".nii.gz", ".nii")
ITK_ENDINGS = (".nrrd", ".mha", ".mhd")
IMAGE_ENDINGS = NIFTI_ENDINGS + ITK_ENDINGS + PICTURE_ENDINGS
VOLUME_ENDINGS = (*NIFTI_ENDINGS, ".nrrd", ".mha")  # .mhd is two files, which cannot be replaced in one go
WRITABLE_ENDINGS = (*VOLUME_ENDINGS, ".png")
_WRITABLE_TYPES = ("uint8", "int16", "uint16", "int32", "uint32", "float32", "float64")  # every format has these
_GZIP = 16 + zlib.MAX_WBITS
"""zlib's word for data with gzip's header and checksum."""
_PIECE = 2**17
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Image:
    """array: (D, H, W) as read from one file, or (C, D, H, W). affine: (4, 4) float64, voxel (i, j, k, 1) -> RAS+ mm."""

    array: np.ndarray
    affine: np.ndarray

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm per voxel, (D, H, W)."""
        return spacing_of(self.affine)


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """mm per voxel, (D, H, W)."""
    i, j, k = np.linalg.norm(affine[:3, :3], axis=0)
    return float(k), float(j), float(i)


def read_image(path: Path) -> Image:
    """One scan (D, H, W) of one channel, or a label map. Raises ImageError for what is missing, truncated or no image.

    A PNG with a palette gives its indices.
    """
    image = _read(path, indexed=True)
    if len(image.array) != 1:
        raise ImageError(
            f"{path} has the shape {image.array.shape} (C, D, H, W); here a scan has three axes. Write every channel to "
            "its own file."
        )
    return Image(image.array[0], image.affine)


def read_channels(path: Path) -> Image:
    """All channels (C, D, H, W) of one file: colours, NIfTI's fourth axis, or ITK's vectors; or a folder of DICOM slices.

    Raises ImageError.
    """
    return _read(path, indexed=False)


def read_geometry(path: Path) -> tuple[Shape, np.ndarray]:
    """Shape (D, H, W) and affine from the header alone, however many channels. Raises ImageError as read_channels does."""
    shape, affine, _ = read_header(path)
    return shape, affine


def read_header(path: Path) -> tuple[Shape, np.ndarray, int]:
    """Shape (D, H, W), affine and number of channels from the header alone. Raises ImageError as read_channels does."""
    if path.is_dir():
        return *series_geometry(path), 1
    with _readable(path):
        if path.name.endswith(PICTURE_ENDINGS):
            channels, h, w = picture_size(path)
            return (1, h, w), np.eye(4), channels
        if path.name.endswith(NIFTI_ENDINGS):
            nifti: Any = nib.load(path)  # pyright: ignore[reportPrivateImportUsage]
            size, affine = nifti.shape, np.asarray(nifti.affine, dtype=np.float64)
        else:
            _, size, affine = _itk_header(path)
    shape, channels = _check_grid(path, size, affine)
    return shape, affine, channels


def write_image(path: Path, image: Image) -> None:
    """Write (D, H, W) with its affine, whole or not at all; the ending chooses the format. Raises WriteError, ImageError."""
    if not path.name.endswith(WRITABLE_ENDINGS):
        raise ImageError(f"{path} cannot be written in this format; use one of {', '.join(WRITABLE_ENDINGS)}.")
    if image.array.dtype.name not in _WRITABLE_TYPES:
        raise ImageError(f"{path} cannot hold {image.array.dtype}; convert to one of {', '.join(_WRITABLE_TYPES)}.")
    if path.name.endswith(PICTURE_ENDINGS):
        _check_flat(path, image)
    with written_whole(path) as temporary:
        if path.name.endswith(PICTURE_ENDINGS):
            write_picture(temporary, image.array[0])
        elif path.name.endswith(NIFTI_ENDINGS):
            nifti = nib.Nifti1Image(image.array.T, image.affine)  # pyright: ignore[reportPrivateImportUsage]
            nifti.header.set_xyzt_units("mm")
            nifti.set_qform(image.affine, code=1)
            nifti.set_sform(image.affine, code=1)
            nib.save(nifti, temporary)  # pyright: ignore[reportPrivateImportUsage]
        else:
            _write_itk(temporary, image)


def canonical_orientation(affine: np.ndarray) -> tuple[Shape, tuple[bool, bool, bool]]:
    """How to turn [k, j, i] to the nearest of (superior, anterior, right) by transposing and flipping alone.

    Returns the source axis of each turned axis, and whether it is walked backwards.
    """
    turned = nib.orientations.io_orientation(affine)  # (3, 2): file axis i, j, k -> axis R, A, S and direction
    axes, flips = [0, 0, 0], [False, False, False]
    for file_axis, (anatomical, direction) in enumerate(turned):
        axes[2 - int(anatomical)] = 2 - file_axis
        flips[2 - int(anatomical)] = bool(direction < 0)
    return (axes[0], axes[1], axes[2]), (flips[0], flips[1], flips[2])


def turned_onto(image: Image, affine: np.ndarray, shape: Shape) -> Image:
    """The same voxels (D, H, W) in the order of another grid, if that is made of the very same places; else image itself."""
    steps = np.linalg.solve(image.affine, affine)  # (i, j, k, 1) of the other grid -> of image
    whole = np.rint(steps[:3, :3])
    is_turn = all((np.abs(whole).sum(axis) == 1).all() for axis in (0, 1))
    if not is_turn or not np.allclose(steps[:3, :3], whole, atol=0.01):
        return image
    axes = [2 - int(np.flatnonzero(whole[:, file_axis])[0]) for file_axis in (2, 1, 0)]
    flipped = tuple(axis for axis, file_axis in enumerate((2, 1, 0)) if whole[:, file_axis].sum() < 0)
    array = np.flip(image.array.transpose(axes), flipped)
    exact = np.eye(4)
    exact[:3, :3] = whole
    for file_axis in range(3):
        if whole[file_axis].sum() < 0:
            exact[file_axis, 3] = image.array.shape[2 - file_axis] - 1
    if array.shape != shape or not same_place(image.affine @ exact, affine, shape):
        return image
    return Image(np.ascontiguousarray(array), affine)


def same_place(first: np.ndarray, second: np.ndarray, shape: Shape) -> bool:
    """Whether two affines put every voxel of a grid (D, H, W) at the same place, to a hundredth of a voxel."""
    corners = np.array([[i, j, k, 1] for k in (0, shape[0]) for j in (0, shape[1]) for i in (0, shape[2])])
    away = np.linalg.norm((corners @ (first - second).T)[:, :3], axis=1)
    return bool(away.max() <= 0.01 * min(spacing_of(first)) + 1e-3)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Says what is wrong with a file that the block fails to read."""
    if not path.is_file():
        raise ImageError(f"{path} does not exist.")
    if not path.name.endswith(IMAGE_ENDINGS):
        raise ImageError(f"{path} has no known ending; convert it to one of {', '.join(IMAGE_ENDINGS)}.")
    try:
        yield
    except ImageError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, ImageFileError, HeaderDataError) as error:
        raise ImageError(
            f"{path} cannot be read: {_first_line(error)}. Is it whole? Copy or convert it again."
        ) from error


def _read(path: Path, *, indexed: bool) -> Image:
    """(C, D, H, W)."""
    if path.is_dir():
        array, affine = read_series(path)
        return Image(array[None], affine)
    with _readable(path):
        if path.name.endswith(PICTURE_ENDINGS):
            return Image(read_picture(path, indexed=indexed)[:, None], np.eye(4))
        array, affine = _read_nifti(path) if path.name.endswith(NIFTI_ENDINGS) else _read_itk(path)
    (k, j, i), channels = _check_grid(path, array.shape, affine)
    if array.dtype.kind not in "biuf":
        raise ImageError(f"{path} holds voxels of the type {array.dtype}; a scan has one real number per voxel.")
    return Image(np.ascontiguousarray(array.reshape(i, j, k, channels, order="F").T), affine)


def _check_flat(path: Path, image: Image) -> None:
    d, h, w = image.array.shape
    if d != 1 or not same_place(image.affine, np.eye(4), (d, h, w)):
        raise ImageError(
            f"{path} cannot hold more than one slice, nor where it lies; use one of {', '.join(VOLUME_ENDINGS)}."
        )
    if image.array.dtype.name not in ("uint8", "uint16"):
        raise ImageError(f"{path} cannot hold {image.array.dtype}; convert to one of uint8, uint16.")


def _check_grid(path: Path, shape: tuple[int, ...], affine: np.ndarray) -> tuple[Shape, int]:
    """(D, H, W) and channels of a file's (i, j, k), (i, j, k, channels) or NIfTI's (i, j, k, 1, channels)."""
    if len(shape) < 3 or 0 in shape or sum(size != 1 for size in shape[3:]) > 1:
        raise ImageError(f"{path} has the shape {tuple(shape)}; a scan has three axes, or four with its channels.")
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise ImageError(f"{path} has no usable spacing and orientation; its affine is {affine[:3].round(4).tolist()}.")
    i, j, k = shape[:3]
    return (k, j, i), int(np.prod(shape[3:]))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.name.endswith(".gz"):
        nifti: Any = nib.load(path)  # pyright: ignore[reportPrivateImportUsage]
        return np.asanyarray(nifti.dataobj), np.asarray(nifti.affine, dtype=np.float64)
    data = _inflate(path)
    nifti = _nifti_kind(data).from_stream(data)
    return _voxels(nifti.dataobj, data), np.asarray(nifti.affine, dtype=np.float64)


def _inflate(path: Path) -> io.BytesIO:
    """What a gzip file holds, to its very end: only there stands the checksum, which nibabel never reads.

    Piece by piece, since gzip.decompress holds the file and twice its content at once, and takes longer for it.
    """
    data, member = io.BytesIO(), None
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            while True:
                if member is None:  # the next of several members; zeros may pad the file
                    if not (piece := piece.lstrip(b"\0")):
                        break
                    member = zlib.decompressobj(_GZIP)
                data.write(member.decompress(piece))
                if not member.eof:
                    break
                piece, member = member.unused_data, None
    if member is not None:
        raise EOFError("its compressed data ends in the middle")
    return data


def _voxels(proxy: Any, data: io.BytesIO) -> np.ndarray:
    """nibabel's array (i, j, k, ...) of the file in data; where voxels are stored as they are, in the memory of data itself."""
    end = proxy.offset + prod(proxy.shape) * proxy.dtype.itemsize
    if (proxy.slope, proxy.inter) != (1, 0) or end > data.getbuffer().nbytes:
        return np.asanyarray(proxy)  # scales, or says how much is missing
    array = np.ndarray(proxy.shape, proxy.dtype, data.getbuffer(), proxy.offset, order="F")
    return array if array.flags.aligned else array.copy(order="F")


def _nifti_kind(data: io.BytesIO) -> Any:
    """NIfTI-1 or -2: the header begins with its own size, in either byte order."""
    first = bytes(data.getbuffer()[:4])
    for size, kind in ((348, nib.Nifti1Image), (540, nib.Nifti2Image)):  # pyright: ignore[reportPrivateImportUsage]
        whole = data.getbuffer().nbytes >= size
        if whole and size in (int.from_bytes(first, "little"), int.from_bytes(first, "big")):
            return kind
    raise ValueError("it does not begin with a NIfTI header")


def _itk_header(path: Path) -> tuple[Any, tuple[int, ...], np.ndarray]:
    """An ITK reader that has read the header, the shape (i, j, k) and the affine."""
    import SimpleITK as sitk  # noqa: N813 - its customary name; here, because only these formats need its 50 MB

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    with _itk_errors():
        reader.ReadImageInformation()
    shape, channels = reader.GetSize(), reader.GetNumberOfComponents()
    affine = np.eye(4)
    if len(shape) == 3:
        affine[:3, :3] = np.array(reader.GetDirection()).reshape(3, 3) * np.array(reader.GetSpacing())
        affine[:3, 3] = reader.GetOrigin()
    elif len(shape) > 3:
        raise ImageError(f"{path} has the shape {shape}; a scan has three axes. Write every volume to its own file.")
    return reader, shape if channels == 1 else (*shape, channels), _LPS_TO_RAS @ affine


def _read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import SimpleITK as sitk  # noqa: N813

    reader, shape, affine = _itk_header(path)
    _check_grid(path, shape, affine)
    with _itk_errors():
        array = sitk.GetArrayFromImage(reader.Execute())  # (k, j, i), and the channels behind them
    return (array.T if array.ndim == 3 else array.transpose(2, 1, 0, 3)), affine


@contextlib.contextmanager
def _itk_errors() -> Iterator[None]:
    """ITK's own text is a page of C++ whose last line may be wrong: 'No such file' for a truncated one."""
    try:
        yield
    except RuntimeError as error:
        raise OSError("SimpleITK finds no whole image in it") from error


def _write_itk(path: Path, image: Image) -> None:
    import SimpleITK as sitk  # noqa: N813

    affine = _LPS_TO_RAS @ image.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    written = sitk.GetImageFromArray(image.array)
    written.SetSpacing(spacing.tolist())
    written.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    written.SetOrigin(affine[:3, 3].tolist())
    try:
        sitk.WriteImage(written, str(path), useCompression=True)
    except RuntimeError as error:
        raise OSError("SimpleITK cannot write it") from error
