"""Slices: which one, how it hangs, and contours where the voxels are."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from tailseg.data.image import Image, write_image
from tailseg.report.slices import Slice, SliceError, case_slice

RAS = np.diag([2.0, 2.0, 4.0, 1.0])
LPS = np.diag([-2.0, -2.0, 4.0, 1.0])


def scan(
    folder: Path, label: np.ndarray, affine: np.ndarray = RAS, bright: tuple[slice, ...] | None = None
) -> tuple[Path, Path]:
    image = np.zeros(label.shape, np.int16)
    image[bright if bright else label > 0] = 500
    paths = folder / "image.nii.gz", folder / "label.nii.gz"
    write_image(paths[0], Image(image, affine))
    write_image(paths[1], Image(label, affine))
    return paths


def cut(paths: tuple[Path, Path], weights: list[float]) -> Slice:
    values = list(range(1, len(weights) + 1))
    return case_slice([paths[0]], {"reference": paths[1]}, {"reference": values}, weights)


def middle(path: str) -> tuple[float, float]:
    """x, y of the middle of a contour's box."""
    x, y, points = 0.0, 0.0, []
    for kind, a, b in re.findall(r"([Ml])(-?[\d.]+) (-?[\d.]+)", path):
        x, y = (float(a), float(b)) if kind == "M" else (x + float(a), y + float(b))
        points.append((x, y))
    xs, ys = zip(*points, strict=True)
    return (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2


def pixels(one: Slice) -> np.ndarray:
    return np.asarray(Pillow.open(io.BytesIO(base64.b64decode(one.image.partition(",")[2]))))


def test_the_slice_shows_what_has_weight(tmp_path: Path):
    label = np.zeros((20, 30, 30), np.uint8)
    label[2:6, 5:25, 5:25] = 1
    label[14:16, 10:13, 10:13] = 2
    paths = scan(tmp_path, label)
    assert cut(paths, [0.1, 2.0]).classes == (1,)  # the small one, as it failed
    assert cut(paths, [2.0, 0.1]).classes == (0,)


@pytest.mark.parametrize("affine", [RAS, LPS])
def test_the_patients_right_is_on_the_left_and_the_front_up(affine: np.ndarray, tmp_path: Path):
    label = np.zeros((8, 40, 40), np.uint8)
    i, j = (30, 34) if affine is RAS else (9, 5)  # towards right and front, in either order of the voxels
    label[4, j - 3 : j + 3, i - 3 : i + 3] = 1
    label[4, 2:4, 2:4] = label[4, 36:38, 36:38] = 2  # so that the whole plane is shown
    one = cut(scan(tmp_path, label, affine), [1.0, 0.0])
    x, y = middle(next(each.path for each in one.maps["reference"] if each.index == 1))
    assert x < one.width / 2 and y < one.height / 2 and (one.left, one.top) == ("R", "A")
    assert one.place.startswith("axial slice")


def test_contours_run_around_the_voxels(tmp_path: Path):
    label = np.zeros((4, 40, 60), np.uint8)
    label[2, 10:20, 30:50] = 1
    one = cut(scan(tmp_path, label), [1.0])
    (drawn,) = one.maps["reference"]
    bright = pixels(one) > 128
    ys, xs = np.nonzero(bright)
    x, y = middle(drawn.path)
    assert x == pytest.approx((xs.min() + xs.max() + 1) / 2, abs=1) and y == pytest.approx(
        (ys.min() + ys.max() + 1) / 2, abs=1
    )


def test_thick_slices_are_cut_along_themselves(tmp_path: Path):
    label = np.zeros((30, 12, 30), np.uint8)
    label[10:20, 5, 10:20] = 1
    one = cut(scan(tmp_path, label, np.diag([1.0, 6.0, 1.0, 1.0])), [1.0])
    assert one.place.startswith("coronal slice 7 of 12") and one.top == "S"


def test_millimetres_not_voxels_give_the_shape(tmp_path: Path):
    label = np.zeros((4, 40, 40), np.uint8)
    label[2, 1:-1, 1:-1] = 1
    one = cut(scan(tmp_path, label, np.diag([1.0, 1.8, 3.0, 1.0])), [1.0])
    assert one.height / one.width == pytest.approx(1.8, rel=0.02) and max(one.height, one.width) == 300


def test_a_picture_is_shown_as_it_is(tmp_path: Path):
    colours = np.zeros((24, 32, 3), np.uint8)
    colours[2:6, 3:9] = (200, 0, 0)
    Pillow.fromarray(colours).save(tmp_path / "image.png")
    label = np.zeros((1, 24, 32), np.uint8)
    label[0, 2:6, 3:9] = 1
    write_image(tmp_path / "label.png", Image(label, np.eye(4)))
    one = cut((tmp_path / "image.png", tmp_path / "label.png"), [1.0])
    assert one.place == "picture" and one.left == "" and pixels(one).shape[2] == 3
    x, y = middle(one.maps["reference"][0].path)
    assert x < one.width / 2 and y < one.height / 2


def test_an_empty_prediction_shows_the_whole_plane(tmp_path: Path):
    one = cut(scan(tmp_path, np.zeros((6, 20, 30), np.uint8), bright=(slice(0, 6), slice(5, 9))), [1.0, 1.0])
    assert one.classes == () and one.maps["reference"] == () and one.width == 300 and one.height == 200


def test_a_prediction_of_another_grid_is_refused(tmp_path: Path):
    paths = scan(tmp_path, np.ones((6, 20, 30), np.uint8))
    write_image(tmp_path / "other.nii.gz", Image(np.ones((6, 20, 31), np.uint8), RAS))
    with pytest.raises(SliceError, match=r"other\.nii\.gz has the shape"):
        case_slice([paths[0]], {"p": tmp_path / "other.nii.gz"}, {"p": [1]}, [1.0])


def test_a_prediction_at_another_place_is_refused(tmp_path: Path):
    paths = scan(tmp_path, np.ones((6, 20, 30), np.uint8))
    moved = RAS.copy()
    moved[2, 3] = 8.0
    write_image(tmp_path / "other.nii.gz", Image(np.ones((6, 20, 30), np.uint8), moved))
    with pytest.raises(SliceError, match="lies elsewhere"):
        case_slice([paths[0]], {"p": tmp_path / "other.nii.gz"}, {"p": [1]}, [1.0])
