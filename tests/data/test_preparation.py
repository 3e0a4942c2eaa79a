from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from tailseg.core import IGNORE
from tailseg.data.image import Image
from tailseg.data.intensity import MinMax, Window, ZScore
from tailseg.data.preparation import PREPARATIONS, Crop, Preparation, nearest_index, prepare_case

RAW = Window(low=-10000, high=10000, rescale="window")


def scan(shape: tuple[int, ...] = (9, 12, 11), spacing: tuple[float, float, float] = (3, 2, 1.5)) -> Image:
    """spacing: mm, (D, H, W)."""
    array = np.random.default_rng(0).normal(0, 200, shape).astype(np.float32)
    return Image(array if array.ndim == 4 else array[None], np.diag([*spacing[::-1], 1.0]))


@pytest.mark.parametrize(("old", "new"), [(147, 80), (512, 160), (80, 80), (33, 7), (7, 33), (1, 5), (5, 1)])
def test_nearest_indices_match_their_formulas(old: int, new: int) -> None:
    i = np.arange(new)
    np.testing.assert_array_equal(nearest_index(old, new, "legacy-nearest"), i * old // new)
    np.testing.assert_array_equal(nearest_index(old, new, "nearest"), (2 * i + 1) * old // (2 * new))


def test_dhc_p23_is_the_published_arithmetic() -> None:
    image = scan((9, 12, 11))
    label = np.random.default_rng(1).integers(0, 14, (9, 12, 11)).astype(np.uint8)
    recipe = PREPARATIONS["dhc-p23"].model_copy(update={"grid": (8, 16, 15)})
    prepared = prepare_case(image, label, recipe)

    x = F.interpolate(torch.from_numpy(image.array)[None], (8, 16, 15), mode="trilinear", align_corners=False)[0, 0]
    x = x.clamp(-75, 275)
    np.testing.assert_array_equal(prepared.image[0], ((x - x.min()) / (x.max() - x.min())).numpy())
    d, h, w = (np.arange(new) * old // new for old, new in zip(label.shape, (8, 16, 15), strict=True))
    assert prepared.label is not None
    np.testing.assert_array_equal(prepared.label, label[d][:, h][:, :, w])
    assert prepared.spacing == pytest.approx((3 * 9 / 8, 2 * 12 / 16, 1.5 * 11 / 15))


def test_dhc_p23_does_not_turn_the_scan() -> None:
    image = scan((8, 6, 7))
    flipped = Image(image.array, np.diag([-1.0, -1, 1, 1]) @ image.affine)
    recipe = PREPARATIONS["dhc-p23"].model_copy(update={"grid": (8, 6, 7)})
    np.testing.assert_array_equal(prepare_case(image, None, recipe).image, prepare_case(flipped, None, recipe).image)


def test_canonical_orientation_makes_equal_what_lies_equally_in_the_patient() -> None:
    image = scan((5, 6, 7))
    stored_otherwise = Image(image.array[:, :, ::-1, ::-1], image.affine @ flip_of(image, 0) @ flip_of(image, 1))
    recipe = Preparation(intensity=ZScore())
    first, second = prepare_case(image, None, recipe), prepare_case(stored_otherwise, None, recipe)
    np.testing.assert_allclose(first.image, second.image, atol=1e-6)
    np.testing.assert_allclose(first.geometry.prepared_affine, second.geometry.prepared_affine)


def flip_of(image: Image, file_axis: int) -> np.ndarray:
    flip = np.eye(4)
    flip[file_axis, file_axis], flip[file_axis, 3] = -1, image.array.shape[3 - file_axis] - 1
    return flip


def test_spacing_keeps_the_field_of_view_and_is_recorded_exactly() -> None:
    recipe = Preparation(spacing=(2.0, None, 4.0), intensity=RAW)
    prepared = prepare_case(scan((9, 12, 11)), None, recipe)
    assert prepared.image.shape == (1, 14, 12, 4)  # round(13.5) is even, round(4.125) is 4
    assert prepared.spacing == pytest.approx((27 / 14, 2.0, 16.5 / 4))


def test_spacing_leaves_at_least_one_voxel() -> None:
    assert Preparation(spacing=(100, 100, 100), intensity=RAW).target_shape((9, 12, 11), (3, 2, 1.5)) == (1, 1, 1)


def test_null_in_a_grid_keeps_the_axis() -> None:
    assert PREPARATIONS["acdc"].target_shape((10, 210, 180), (10, 1.5, 1.5)) == (10, 256, 256)


def test_nearest_image_and_label_take_the_same_voxels() -> None:
    label = np.random.default_rng(2).integers(0, 3, (4, 9, 10)).astype(np.uint8)
    image = Image(label[None].astype(np.float32), np.eye(4))
    recipe = Preparation(orientation="file", grid=(None, 13, 6), image_interpolation="nearest", intensity=MinMax())
    prepared = prepare_case(image, label, recipe)
    assert prepared.label is not None
    np.testing.assert_array_equal(prepared.image[0] * 2, prepared.label)


def test_crop_is_the_box_above_the_threshold_with_a_margin_in_mm() -> None:
    image = scan((9, 12, 11), spacing=(3, 2, 1.5))
    image.array[:] = -1000
    image.array[0, 4:6, 5:8, 1:10] = 0
    recipe = Preparation(orientation="file", crop=Crop(threshold=-300, margin=4), intensity=RAW)
    geometry = prepare_case(image, None, recipe).geometry
    assert geometry.start == (2, 3, 0)  # 2, 2 and 3 voxels of margin, within the scan
    assert geometry.stop == (8, 10, 11)


def test_crop_does_not_look_at_the_label() -> None:
    image = scan()
    recipe = Preparation(crop=Crop(threshold=500), spacing=(2, 2, 2), intensity=RAW)
    label = np.zeros((9, 12, 11), np.uint8)
    label[0, 0, 0] = 1
    with_label, without = prepare_case(image, label, recipe), prepare_case(image, None, recipe)
    assert with_label.geometry == without.geometry
    np.testing.assert_array_equal(with_label.image, without.image)


def test_crop_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no voxel is above the crop threshold 5000"):
        prepare_case(scan(), None, Preparation(crop=Crop(threshold=5000), intensity=RAW))


def test_channels_are_normalised_on_their_own_and_told_when_constant() -> None:
    image = scan((3, 5, 6, 7))
    image.array[1] = 7
    image.array[2] *= 50
    prepared = prepare_case(image, None, Preparation(spacing=(2, 2, 2), intensity=ZScore()))
    assert prepared.constant_channels == (1,)
    np.testing.assert_array_equal(prepared.image[1], 0)
    assert prepared.image[2].std() == pytest.approx(1, abs=1e-4)


def test_classes_that_resampling_loses_are_told() -> None:
    label = np.zeros((8, 8, 8), np.uint8)
    label[:, :4] = 1
    label[1, 1, 1] = 2
    label[1, 1, 3] = IGNORE
    recipe = Preparation(grid=(4, 4, 4), label_interpolation="legacy-nearest", intensity=RAW)
    prepared = prepare_case(scan((8, 8, 8)), label, recipe)
    assert prepared.lost_classes == (2,)
    assert prepare_case(scan((8, 8, 8)), label, Preparation(intensity=RAW)).lost_classes == ()


@pytest.mark.parametrize("recipe", [PREPARATIONS["la"], PREPARATIONS["mr"], Preparation(grid=(5, 5, 5), intensity=RAW)])
def test_the_scan_given_is_left_as_it_was(recipe: Preparation) -> None:
    image, label = scan(), np.ones((9, 12, 11), np.uint8)
    before = image.array.copy()
    prepared = prepare_case(image, label, recipe)
    np.testing.assert_array_equal(image.array, before)
    assert prepared.image.dtype == np.float32 and prepared.image.flags.c_contiguous
    assert prepared.label is not None and prepared.label.dtype == np.uint8 and prepared.label.flags.c_contiguous


def test_recipes_survive_json() -> None:
    for recipe in PREPARATIONS.values():
        assert Preparation.model_validate(json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe


def test_contradictory_recipes_are_refused() -> None:
    with pytest.raises(ValidationError, match="not both"):
        Preparation(spacing=(1, 1, 1), grid=(8, 8, 8), intensity=RAW)
    with pytest.raises(ValidationError, match="Extra inputs"):
        Preparation.model_validate({"intensity": {"name": "zscore"}, "spacings": [1, 1, 1]})
    with pytest.raises(ValidationError, match="'window', 'percentiles', 'zscore', 'minmax'"):
        Preparation.model_validate({"intensity": {"name": "zscores"}})
    with pytest.raises(ValidationError, match="greater than 0"):
        Preparation(spacing=(1, 0, 1), intensity=RAW)
