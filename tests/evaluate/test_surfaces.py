from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from tailseg.evaluate import surfaces
from tailseg.evaluate.surfaces import areas_near, border_distances

SHAPES = [(9, 14, 20), (3, 5, 63), (4, 4, 64), (2, 6, 65), (40, 33), (1, 1, 1)]
"""Lines that end before, at and after a word among them."""
SPACINGS = [(3.0, 0.8, 0.7), (1.0, 1.0, 1.0), (0.5, 1.25, 2.0)]


def masks(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two irregular masks with pieces that touch the rim, and unknown voxels in neither of which one may rely on."""
    rng = np.random.default_rng(seed)
    smooth = [ndimage.gaussian_filter(rng.standard_normal(shape), 1.5, mode="wrap") for _ in range(3)]
    pred, ref = smooth[0] >= np.median(smooth[0]), smooth[1] >= np.quantile(smooth[1], 0.7)
    unknown = smooth[2] > np.quantile(smooth[2], 0.8)
    return pred & ~unknown, ref & ~unknown, unknown


def plain_border(mask: np.ndarray, unknown: np.ndarray | None) -> np.ndarray:
    solid = mask if unknown is None else mask | unknown
    return mask & np.logical_not(ndimage.binary_erosion(solid))


def plain_cells(mask: np.ndarray, unknown: np.ndarray | None) -> np.ndarray:
    """The corners of the grid whose voxels are not all of one kind, none of them unknown."""

    def around(voxels: np.ndarray, choose: np.ufunc) -> np.ndarray:
        voxels = np.pad(voxels, 1)
        for axis in range(voxels.ndim):
            voxels = choose(*(np.take(voxels, range(first, voxels.shape[axis] - 1 + first), axis) for first in (0, 1)))
        return voxels

    cells = around(mask, np.logical_or) & ~around(mask, np.logical_and)
    return cells if unknown is None else cells & ~around(unknown, np.logical_or)


def to_nearest(surface: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    return np.asarray(ndimage.distance_transform_edt(~surface, spacing))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mm", SPACINGS)
@pytest.mark.parametrize("annotated", [True, False])
def test_distances_are_those_of_a_distance_transform(shape, mm, annotated):
    pred, ref, unknown = masks(shape, 0)
    spacing, unknown = mm[-len(shape) :], None if annotated else unknown
    borders = [plain_border(mask, unknown) for mask in (pred, ref)]
    there, back = border_distances(pred, ref, unknown, spacing)
    if not (borders[0].any() and borders[1].any()):
        assert not there.size and not back.size
        return
    np.testing.assert_allclose(there, to_nearest(borders[1], spacing)[borders[0]], atol=1e-12)
    np.testing.assert_allclose(back, to_nearest(borders[0], spacing)[borders[1]], atol=1e-12)


def test_what_lies_further_than_is_looked_up_asks_the_tree_and_is_as_exact():
    pred, ref = np.zeros((2, 20, 150, 90), bool)
    pred[2:5, 3:9, 4:8] = ref[3:5, 2:9, 5:8] = True
    pred[12:15, 130:140, 70:80] = True
    there, back = border_distances(pred, ref, None, (2.5, 0.6, 0.9))
    borders = [plain_border(mask, None) for mask in (pred, ref)]
    np.testing.assert_allclose(there, to_nearest(borders[1], (2.5, 0.6, 0.9))[borders[0]], atol=1e-12)
    assert there.max() > 80 and back.max() < 3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mm", SPACINGS[:2])
@pytest.mark.parametrize("tolerance", [0.0, 2.4, 4.0, math.inf])
@pytest.mark.parametrize("annotated", [True, False])
def test_what_is_near_is_what_a_distance_transform_finds_near(monkeypatch, shape, mm, tolerance, annotated):
    pred, ref, unknown = masks(shape, 1)
    spacing, unknown = mm[-len(shape) :], None if annotated else unknown
    monkeypatch.setattr(surfaces, "_element_areas", lambda spacing: np.ones(256))
    cells = [plain_cells(mask, unknown) for mask in (pred, ref)]
    found = areas_near(pred, ref, unknown, spacing, tolerance)
    if not (cells[0].any() and cells[1].any()):
        assert found is None
        return
    near = sum(
        np.count_nonzero(to_nearest(other, spacing)[own] <= tolerance + 1e-9) for own, other in (cells, reversed(cells))
    )
    assert found == (near, sum(map(np.count_nonzero, cells)))


@pytest.mark.parametrize("tolerance", [0.8, 3.0])
def test_a_wide_tolerance_takes_another_way_to_the_same_area(monkeypatch, tolerance):
    pred, ref, _ = masks((9, 14, 20), 2)
    narrow = areas_near(pred, ref, None, (1.2, 0.8, 0.8), tolerance)
    monkeypatch.setattr(surfaces, "_LINES", 0)
    assert areas_near(pred, ref, None, (1.2, 0.8, 0.8), tolerance) == narrow


@pytest.mark.parametrize("by", [0, 1, -1, 63, 64, -64, -65, 130, -300, 600])
def test_bits_move_as_those_of_a_whole_number(by):
    words = np.random.default_rng(0).integers(0, 2**63, 5, np.uint64)
    number, whole = int.from_bytes(words.tobytes(), "little"), 2 ** (64 * 5) - 1
    expected = (number << by if by > 0 else number >> -by) & whole
    assert int.from_bytes(surfaces._moved(words, by).tobytes(), "little") == expected
