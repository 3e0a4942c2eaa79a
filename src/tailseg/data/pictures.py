"""2D pictures, grey or RGB: PNG, TIFF and JPEG of 8 or 16 bits, as arrays of whole numbers or floats.

Resolutions in dots per inch are left alone: cameras and programs write what they like there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image as Pillow
from PIL import ImageFile, TiffImagePlugin

from tailseg.data.errors import ImageError

LOSSLESS_ENDINGS = (".png", ".tif", ".tiff")
PICTURE_ENDINGS = (*LOSSLESS_ENDINGS, ".jpg", ".jpeg")
_ORIENTATION = 0x0112
_CHANNELS = {"1": 1, "L": 1, "I": 1, "F": 1, "LA": 1, "P": 3, "RGB": 3, "RGBA": 3}


def read_picture(path: Path, *, indexed: bool = False) -> np.ndarray:
    """(C, H, W): one channel or red, green, blue. indexed: a palette gives its indices, as in label maps, not colours.

    Raises ImageError for what is no single upright picture of these kinds; OSError or ValueError for a damaged file.
    """
    with _opened(path) as picture:
        deep = _is_deep_colour(picture)
        try:
            _check(path, picture)
            if deep:
                return _read_deep_colour(path)
            picture.load()
        except SyntaxError as error:  # a damaged PNG
            raise OSError(str(error)) from error
        if picture.mode.startswith("P") and not indexed:
            picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
        array = np.asarray(picture)
        if picture.mode in ("LA", "RGBA"):
            if (array[..., -1] != array[..., -1].max()).any():
                raise ImageError(f"{path} is partly transparent; write it without its alpha channel.")
            array = array[..., :-1]
    if array.ndim == 2:
        return np.array(array)[None]
    return np.ascontiguousarray(np.moveaxis(array, -1, 0))


def picture_size(path: Path) -> tuple[int, int, int]:
    """(C, H, W) from the header alone, which does not say whether the picture is upright. Raises as read_picture."""
    with _opened(path) as picture:
        _check_kind(path, picture)
        return _CHANNELS.get(picture.mode, 1), picture.height, picture.width


def write_picture(path: Path, array: np.ndarray) -> None:
    """array: (H, W) uint8 or uint16, as a grey PNG."""
    Pillow.fromarray(array).save(path, format="PNG")


def _opened(path: Path) -> ImageFile.ImageFile:
    try:
        return Pillow.open(path, formats=("PNG", "TIFF", "JPEG"))
    except Pillow.UnidentifiedImageError as error:
        raise OSError("it does not begin as a PNG, TIFF or JPEG does") from error
    except Pillow.DecompressionBombError as error:
        raise ImageError(f"{path} is too large a picture ({error}); cut it into tiles.") from error


def _check(path: Path, picture: ImageFile.ImageFile) -> None:
    _check_kind(path, picture)
    turn = picture.getexif().get(_ORIENTATION, 1)  # reads a whole PNG, at whose end it may stand
    if turn not in (0, 1):
        # whether its label was drawn on the stored or on the turned picture cannot be known
        raise ImageError(
            f"{path} is stored turned: its EXIF orientation is {turn}. Write it upright (for instance "
            "`mogrify -auto-orient`), and see that its label lies as the picture does."
        )


def _check_kind(path: Path, picture: ImageFile.ImageFile) -> None:
    if picture.mode not in _CHANNELS and not picture.mode.startswith("I;16"):
        raise ImageError(f"{path} has the colours {picture.mode}; convert it to grey or RGB.")
    if _rawmode(picture).startswith("LA;16"):  # neither Pillow nor ITK reads these whole
        raise ImageError(f"{path} is grey of 16 bits with an alpha channel; write it without its alpha channel.")
    if (pages := getattr(picture, "n_frames", 1)) > 1:
        raise ImageError(f"{path} holds {pages} pages; write each to a file of its own, or the stack as NIfTI.")


def _is_deep_colour(picture: ImageFile.ImageFile) -> bool:
    """Several channels of more than 8 bits, of which Pillow would drop the lower ones without a word."""
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        bits = picture.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
        return len(bits) > 1 and max(bits) > 8
    return picture.format == "PNG" and len(picture.getbands()) > 1 and ";16" in _rawmode(picture)


def _rawmode(picture: ImageFile.ImageFile) -> str:
    """How the file holds the pixels, before they are loaded."""
    return str(picture.tile[0].args) if picture.tile else ""


def _read_deep_colour(path: Path) -> np.ndarray:
    import SimpleITK as sitk  # noqa: N813 - here, because only these pictures need its 50 MB

    try:
        array = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    except RuntimeError as error:
        raise OSError("SimpleITK finds no whole picture in it") from error
    array = array.reshape(*array.shape[-3:])  # (H, W, C)
    if array.shape[-1] == 4:
        if (array[..., -1] != array[..., -1].max()).any():
            raise ImageError(f"{path} is partly transparent; write it without its alpha channel.")
        array = array[..., :-1]
    return np.ascontiguousarray(np.moveaxis(array, -1, 0))
