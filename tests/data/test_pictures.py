from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from tailseg.data.errors import ImageError
from tailseg.data.image import read_channels, read_header, read_image
from tailseg.data.pictures import LOSSLESS_ENDINGS, PICTURE_ENDINGS, picture_size, read_picture, write_picture

COLOURS = np.random.default_rng(0).integers(0, 65536, (5, 7, 3)).astype(np.uint16)  # (H, W, C)
EIGHT_BITS = (COLOURS >> 8).astype(np.uint8)


@pytest.mark.parametrize("ending", LOSSLESS_ENDINGS)
def test_grey_and_rgb_of_8_bits(tmp_path: Path, ending: str):
    path = tmp_path / f"skin{ending}"
    Pillow.fromarray(EIGHT_BITS).save(path)
    np.testing.assert_array_equal(read_picture(path), np.moveaxis(EIGHT_BITS, -1, 0))
    assert picture_size(path) == (3, 5, 7)
    Pillow.fromarray(EIGHT_BITS[..., 0]).save(path)
    np.testing.assert_array_equal(read_picture(path), EIGHT_BITS[None, ..., 0])
    assert picture_size(path) == (1, 5, 7)


@pytest.mark.parametrize("ending", LOSSLESS_ENDINGS)
def test_16_bits_stay_16_bits_in_grey_and_in_colour(tmp_path: Path, ending: str):
    """Pillow alone would give the upper eight bits of every colour."""
    sitk = pytest.importorskip("SimpleITK")
    path = tmp_path / f"scan{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(COLOURS, isVector=True), str(path))
    np.testing.assert_array_equal(read_picture(path), np.moveaxis(COLOURS, -1, 0))
    assert read_picture(path).dtype == np.uint16 and picture_size(path) == (3, 5, 7)
    Pillow.fromarray(COLOURS[..., 0]).save(path)
    np.testing.assert_array_equal(read_picture(path), COLOURS[None, ..., 0])
    assert picture_size(path) == (1, 5, 7)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_signed_and_real_values_of_tiff(tmp_path: Path, dtype: type):
    sitk = pytest.importorskip("SimpleITK")
    array = (np.arange(35).reshape(5, 7) * 900 - 7).astype(dtype)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / "scan.tif"))
    np.testing.assert_array_equal(read_picture(tmp_path / "scan.tif")[0], array)


def test_jpeg_is_near_what_was_written(tmp_path: Path):
    smooth = np.linspace(0, 255, 48, dtype=np.uint8)[None, :, None].repeat(32, 0).repeat(3, 2)
    Pillow.fromarray(smooth).save(tmp_path / "skin.jpg", quality=95)
    assert np.abs(read_picture(tmp_path / "skin.jpg").astype(int) - np.moveaxis(smooth, -1, 0)).max() < 6


def test_a_palette_is_indices_in_a_label_and_colours_in_an_image(tmp_path: Path):
    indices = (EIGHT_BITS[..., 0] % 3).astype(np.uint8)
    picture = Pillow.fromarray(indices).convert("P")
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 128, 0])
    picture.putdata(indices.ravel().tolist())
    picture.save(tmp_path / "label.png")
    np.testing.assert_array_equal(read_image(tmp_path / "label.png").array[0], indices)
    colours = read_channels(tmp_path / "label.png").array
    np.testing.assert_array_equal(colours[:, 0], [255 * (indices == 1), 128 * (indices == 2), 0 * indices])
    assert read_header(tmp_path / "label.png")[2] == 3


def test_a_mask_of_one_bit_holds_0_and_1(tmp_path: Path):
    mask = EIGHT_BITS[..., 0] > 99
    Pillow.fromarray(mask).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_image(tmp_path / "mask.png").array[0], mask)


@pytest.mark.parametrize(("ending", "orientation"), [(".jpg", 6), (".tif", 3), (".png", 8)])
def test_a_picture_that_is_stored_turned_is_refused(tmp_path: Path, ending: str, orientation: int):
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    Pillow.fromarray(EIGHT_BITS).save(tmp_path / f"skin{ending}", exif=exif)
    with pytest.raises(
        ImageError, match=rf"skin\{ending} is stored turned: its EXIF orientation is {orientation}\. Write"
    ):
        read_channels(tmp_path / f"skin{ending}")
    exif[0x0112] = 1
    Pillow.fromarray(EIGHT_BITS).save(tmp_path / f"skin{ending}", exif=exif)
    assert read_channels(tmp_path / f"skin{ending}").array.shape == (3, 1, 5, 7)


def test_an_alpha_channel_is_dropped_where_it_says_nothing(tmp_path: Path):
    alpha = np.full((5, 7, 1), 255, np.uint8)
    path = tmp_path / "skin.png"
    Pillow.fromarray(np.concatenate([EIGHT_BITS, alpha], -1)).save(path)
    np.testing.assert_array_equal(read_picture(path), np.moveaxis(EIGHT_BITS, -1, 0))
    assert picture_size(path) == (3, 5, 7)
    alpha[0, 0] = 0
    Pillow.fromarray(np.concatenate([EIGHT_BITS, alpha], -1)).save(path)
    with pytest.raises(ImageError, match="partly transparent"):
        read_picture(path)


def test_other_colours_and_several_pages_are_refused(tmp_path: Path):
    Pillow.fromarray(EIGHT_BITS).convert("CMYK").save(tmp_path / "print.jpg")
    pages = [Pillow.fromarray(EIGHT_BITS)] * 3
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    for name, match in (("print.jpg", "the colours CMYK; convert it to grey or RGB"), ("stack.tif", "holds 3 pages")):
        for read in (read_channels, read_header):
            with pytest.raises(ImageError, match=match):
                read(tmp_path / name)


@pytest.mark.parametrize("ending", PICTURE_ENDINGS)
@pytest.mark.parametrize("damage", ["empty", "truncated", "a web page"])
def test_a_broken_picture_is_named(tmp_path: Path, ending: str, damage: str):
    path = tmp_path / f"skin{ending}"
    noise = np.random.default_rng(0).integers(0, 255, (60, 70, 3)).astype(np.uint8)
    Pillow.fromarray(noise).save(path)
    whole = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "truncated": whole[: len(whole) // 2], "a web page": b"<html>404</html>" * 99}[damage]
    )
    with pytest.raises(ImageError, match=rf"skin\{ending} cannot be read: .*Copy or convert it again"):
        read_channels(path)


def test_a_picture_of_another_name_is_told(tmp_path: Path):
    Pillow.fromarray(EIGHT_BITS).save(tmp_path / "skin.bmp")
    (tmp_path / "skin.bmp").rename(tmp_path / "skin.png")
    with pytest.raises(ImageError, match="cannot be read: it does not begin as a PNG, TIFF or JPEG does"):
        read_channels(tmp_path / "skin.png")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_what_is_written_is_read(tmp_path: Path, dtype: type):
    write_picture(tmp_path / "label.png", COLOURS[..., 0].astype(dtype))
    np.testing.assert_array_equal(read_picture(tmp_path / "label.png")[0], COLOURS[..., 0].astype(dtype))
