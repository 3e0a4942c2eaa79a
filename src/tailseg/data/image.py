"""Read and write scans with their spacing and orientation.

Arrays are indexed [k, j, i], the file's axes reversed, so that the last axis is the fastest; affines stay as the file has
them: (i, j, k, 1) -> right, anterior, superior in mm.
"""

from __future__ import annotations

import contextlib
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from tailseg.files import written_whole

NIFTI_ENDINGS = (".nii.gz", ".nii")
ITK_ENDINGS = (".nrrd", ".mha", ".mhd")
IMAGE_ENDINGS = NIFTI_ENDINGS + ITK_ENDINGS
WRITABLE_ENDINGS = (*NIFTI_ENDINGS, ".nrrd", ".mha")  # .mhd is two files, which cannot be replaced in one go
_WRITABLE_TYPES = ("uint8", "int16", "uint16", "int32", "uint32", "float32", "float64")  # every format has these
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

Shape = tuple[int, int, int]


class ImageError(ValueError):
    """A scan or label file that cannot be used; the text names the file, the rule and the way out."""


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
    """One scan (D, H, W) of NIfTI, NRRD or MetaImage. Raises ImageError for what is missing, truncated or no image."""
    with _readable(path):
        array, affine = _read_nifti(path) if path.name.endswith(NIFTI_ENDINGS) else _read_itk(path)
    k, j, i = _check_grid(path, array.shape, affine)
    if array.dtype.kind not in "biuf":
        raise ImageError(f"{path} holds voxels of the type {array.dtype}; a scan has one real number per voxel.")
    return Image(np.ascontiguousarray(array.reshape(i, j, k, order="F").T), affine)


def read_geometry(path: Path) -> tuple[Shape, np.ndarray]:
    """Shape (D, H, W) and affine from the header alone. Raises ImageError as read_image does."""
    with _readable(path):
        if path.name.endswith(NIFTI_ENDINGS):
            nifti: Any = nib.load(path)  # pyright: ignore[reportPrivateImportUsage]
            shape, affine = nifti.shape, np.asarray(nifti.affine, dtype=np.float64)
        else:
            _, shape, affine = _itk_header(path)
    return _check_grid(path, shape, affine), affine


def write_image(path: Path, image: Image) -> None:
    """Write (D, H, W) with its affine, whole or not at all; the ending chooses the format. Raises WriteError, ImageError."""
    if not path.name.endswith(WRITABLE_ENDINGS):
        raise ImageError(f"{path} cannot be written in this format; use one of {', '.join(WRITABLE_ENDINGS)}.")
    if image.array.dtype.name not in _WRITABLE_TYPES:
        raise ImageError(f"{path} cannot hold {image.array.dtype}; convert to one of {', '.join(_WRITABLE_TYPES)}.")
    with written_whole(path) as temporary:
        if path.name.endswith(NIFTI_ENDINGS):
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


def _check_grid(path: Path, shape: tuple[int, ...], affine: np.ndarray) -> Shape:
    """(D, H, W) of a file's (i, j, k), or (i, j, k, 1)."""
    if len(shape) < 3 or 0 in shape or any(size != 1 for size in shape[3:]):
        raise ImageError(
            f"{path} has the shape {tuple(shape)}; a scan has three axes. Write every channel to its own file."
        )
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise ImageError(f"{path} has no usable spacing and orientation; its affine is {affine[:3].round(4).tolist()}.")
    i, j, k = shape[:3]
    return k, j, i


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if path.name.endswith(".gz"):
        # to the end of the file: only there stands the checksum, which nibabel never reads
        data = gzip.decompress(path.read_bytes())
        nifti: Any = _nifti_kind(data).from_bytes(data)
    else:
        nifti = nib.load(path)  # pyright: ignore[reportPrivateImportUsage]
    return np.asanyarray(nifti.dataobj), np.asarray(nifti.affine, dtype=np.float64)


def _nifti_kind(data: bytes) -> Any:
    """NIfTI-1 or -2: the header begins with its own size, in either byte order."""
    for size, kind in ((348, nib.Nifti1Image), (540, nib.Nifti2Image)):  # pyright: ignore[reportPrivateImportUsage]
        if len(data) >= size and size in (int.from_bytes(data[:4], "little"), int.from_bytes(data[:4], "big")):
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
    return reader, shape if channels == 1 else (*shape, channels), _LPS_TO_RAS @ affine


def _read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import SimpleITK as sitk  # noqa: N813

    reader, shape, affine = _itk_header(path)
    _check_grid(path, shape, affine)
    with _itk_errors():
        return sitk.GetArrayFromImage(reader.Execute()).T, affine


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
