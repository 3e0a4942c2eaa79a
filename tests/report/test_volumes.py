from __future__ import annotations

import numpy as np
import pytest

from tailseg.data.image import Image
from tailseg.report.volumes import (
    UNKNOWN,
    class_indices,
    reduce_image,
    reduce_labels,
    reduced_affine,
    reduced_shape,
    to_grey,
    turned_to_ras,
)


def test_blocks_are_no_longer_than_asked_for_and_no_finer_than_voxels():
    assert reduced_shape((512, 500, 40), (0.7, 0.7, 5.0), 2.1) == (171, 167, 40)
    assert reduced_shape((100, 100, 100), (1.0, 1.0, 1.0), 1.5) == (67, 67, 67)
    assert reduced_shape((100, 100, 100), (1.0, 1.0, 1.0), 1.0) == (100, 100, 100)


def test_a_block_is_the_mean_of_its_voxels_and_of_parts_of_them():
    array = np.array([1, 2, 3, 4, 5], np.float32)[:, None, None]
    assert reduce_image(array, (2, 1, 1)).ravel() == pytest.approx([(1 + 2 + 1.5) / 2.5, (1.5 + 4 + 5) / 2.5])
    noise = np.random.default_rng(0).normal(size=(6, 9, 4))
    blocks = noise.reshape(2, 3, 3, 3, 2, 2).mean((1, 3, 5))
    assert reduce_image(noise, (2, 3, 2)) == pytest.approx(blocks, abs=1e-5)


def test_a_block_lies_in_the_middle_of_its_voxels():
    affine = np.array([[0, -2, 0, 5], [3, 0, 0, 6], [0, 0, 4, 7], [0, 0, 0, 1.0]])
    voxels = np.array([[4, 6, 9, 1], [5, 7, 9, 1.0]])
    middle = (voxels @ affine.T).mean(0)
    assert reduced_affine(affine, (20, 30, 10), (10, 15, 10)) @ [2, 3, 9, 1] == pytest.approx(middle)


def test_the_field_of_view_stays():
    affine = np.diag([1.0, 2, 3, 1])
    reduced = reduced_affine(affine, (50, 60, 70), (33, 41, 70))
    for old, new in (((-0.5,) * 3, (-0.5,) * 3), ((49.5, 59.5, 69.5), (32.5, 40.5, 69.5))):
        assert reduced @ [*new, 1] == pytest.approx(affine @ [*old, 1])


def test_an_organ_thinner_than_a_block_keeps_its_volume():
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[:, 20, 20] = 1  # a vessel of one voxel: a majority of blocks of 64 would lose it
    reduced = reduce_labels(labels, (10, 10, 10))
    assert (reduced == 1).sum() == 1  # 40 voxels are nearer to one block than to two
    labels[:, 20:22, 20:23] = 1
    assert (reduce_labels(labels, (10, 10, 10)) == 1).sum() == 4  # 240 voxels


def test_a_class_of_one_voxel_is_kept_where_it_is():
    labels = np.full((30, 30, 30), 2, np.uint8)
    labels[13, 22, 7] = 1
    reduced = reduce_labels(labels, (6, 6, 6))
    assert np.argwhere(reduced == 1).tolist() == [[2, 4, 1]]


def test_classes_that_share_one_block_are_all_kept():
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[0, 0, :4] = 1, 2, 3, 4
    reduced = reduce_labels(labels, (2, 2, 2))
    assert set(np.unique(reduced)) == {0, 1, 2, 3, 4}


def test_a_large_organ_keeps_its_shape():
    k, j, i = np.indices((64, 64, 64))
    ball = ((k - 31) ** 2 + (j - 30) ** 2 + (i - 33) ** 2 < 20**2).astype(np.uint8)
    reduced = reduce_labels(ball, (16, 16, 16))
    held = ball.reshape(16, 4, 16, 4, 16, 4).mean((1, 3, 5))
    assert (reduced[held > 0.6] == 1).all()
    assert (reduced[held < 0.4] == 0).all()


def test_fractional_blocks_keep_every_volume():
    labels = np.random.default_rng(0).integers(0, 30, (10, 12, 8)).astype(np.uint8)
    labels = np.kron(np.where(labels < 4, labels, 0), np.ones((4, 4, 4), np.uint8))
    reduced = reduce_labels(labels, (29, 37, 20))
    for value in (1, 2, 3):
        assert (reduced == value).mean() == pytest.approx((labels == value).mean(), rel=1e-3)


def test_an_unreduced_label_map_stays_as_it_is():
    labels = np.random.default_rng(0).integers(0, 4, (5, 6, 7)).astype(np.uint8)
    assert (reduce_labels(labels, (5, 6, 7)) == labels).all()


def test_values_become_positions_and_other_values_unknown():
    values = np.array([[[0, 6, 2, 255, -1]]])
    assert class_indices(values, [0, 6, 2]).ravel().tolist() == [0, 1, 2, UNKNOWN, UNKNOWN]


def test_grey_is_spread_over_the_organs_not_over_outliers():
    array = np.full((10, 10, 10), -1000, np.float32)
    labels = np.zeros(array.shape, np.uint8)
    array[2:8, 2:8, 2:8] = np.linspace(0, 100, 216).reshape(6, 6, 6)
    labels[2:8, 2:8, 2:8] = 1
    array[0, 0, 0] = 30000
    grey = to_grey(array, labels)
    inside = grey[labels == 1]
    assert inside.max() - inside.min() > 100
    assert grey[0, 0, 0] == 254 and grey[9, 9, 9] == 0


@pytest.mark.parametrize("fill", [0, 7])
def test_a_constant_scan_without_labels_is_no_error(fill):
    array = np.full((4, 4, 4), fill, np.float32)
    assert to_grey(array, np.zeros((4, 4, 4), np.uint8)).std() == 0


def test_turning_keeps_every_voxel_where_it_is():
    rng = np.random.default_rng(1)
    affine = np.array([[0, -2.0, 0.1, 5], [0.1, 0, -3, 6], [-4, 0.1, 0, 7], [0, 0, 0, 1]])
    image = Image(rng.integers(0, 100, (3, 4, 5)), affine)
    turned, at = turned_to_ras(image)
    to_turned = np.linalg.inv(at) @ affine
    assert (np.argmax(np.abs(at[:3, :3]), axis=0) == [0, 1, 2]).all() and (np.diag(at)[:3] > 0).all()
    for k, j, i in np.ndindex(3, 4, 5):
        x, y, z, _ = np.rint(to_turned @ [i, j, k, 1]).astype(int)
        assert turned[x, y, z] == image.array[k, j, i]
