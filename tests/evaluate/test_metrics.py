from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import surface_distance
from medpy.metric import binary as medpy
from scipy.ndimage import gaussian_filter

from tailseg.core import IGNORE as CORE_IGNORE
from tailseg.evaluate.metrics import (
    IGNORE,
    METRICS,
    Comparison,
    asd,
    assd,
    compare,
    compare_classes,
    dice,
    hd95,
    iou,
    nsd,
    precision,
    pred_ml,
    recall,
    ref_ml,
)

SPACINGS = [(1.0, 1.0, 1.0), (3.0, 0.8, 0.8), (0.5, 1.25, 2.0)]


def ball(radius: float, centre: tuple[float, ...], shape: tuple[int, ...], spacing: tuple[float, ...]) -> np.ndarray:
    """A ball with radius and centre in mm."""
    axes = np.ogrid[tuple(slice(0, side) for side in shape)]
    away = sum((axis * mm - at) ** 2 for axis, mm, at in zip(axes, spacing, centre, strict=True))
    return np.asarray(away <= radius**2)


def blobs(seed: int, shape: tuple[int, ...] = (20, 26, 24)) -> tuple[np.ndarray, np.ndarray]:
    """Two irregular masks that overlap in part, touch the edge of the image and have several pieces."""
    rng = np.random.default_rng(seed)
    fields = [gaussian_filter(rng.standard_normal(shape), 2) for _ in range(2)]
    first, second = fields[0], fields[0] + 0.5 * fields[1]
    return first > 0.5 * first.std(), second > 0.5 * second.std()


def box(shape: tuple[int, ...], *sides: slice) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[sides] = True
    return mask


def their_nsd(pred: np.ndarray, ref: np.ndarray, spacing: tuple[float, ...], tolerance: float) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it asks scipy by an old name
        distances = surface_distance.compute_surface_distances(ref, pred, spacing)
    return float(surface_distance.compute_surface_dice_at_tolerance(distances, tolerance))


def test_a_cube_one_voxel_short_has_the_published_values() -> None:
    # the check of the DHC protocol: prediction 3 x 3 x 3, reference 3 x 3 x 4 with a common corner
    pred = box((6, 6, 6), slice(1, 4), slice(1, 4), slice(1, 4))
    ref = box((6, 6, 6), slice(1, 4), slice(1, 4), slice(1, 5))
    there, back = compare(pred, ref, (1, 1, 1)), compare(ref, pred, (1, 1, 1))
    assert dice(there) == pytest.approx(0.85714286)
    assert asd(there) == pytest.approx(0.03846154)
    assert asd(back) == pytest.approx(0.26470588)
    assert assd(there) == assd(back) == pytest.approx(0.16666667)


def test_two_rectangles_have_the_published_values() -> None:
    pred, ref = box((20, 20), slice(0, 5), slice(0, 5)), box((20, 20), slice(0, 5), slice(0, 11))
    there = compare(pred, ref, (1, 1))
    assert dice(there) == 0.625
    assert iou(there) == pytest.approx(0.4545455)
    assert hd95(there) == 6.0
    assert asd(there) == 0.25
    assert asd(compare(ref, pred, (1, 1))) == pytest.approx(2.142857)
    assert assd(there) == pytest.approx(1.4545455)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_two_balls_differ_by_the_difference_of_their_radii_in_mm(spacing: tuple[float, ...]) -> None:
    shape = tuple(round(36 / mm) for mm in spacing)
    inner, outer = (ball(radius, (17.0, 17.0, 17.0), shape, spacing) for radius in (9.0, 14.0))
    comparison = compare(inner, outer, spacing)
    for metric in (hd95, asd, assd):
        assert metric(comparison) == pytest.approx(5.0, abs=max(spacing) / 2)
    assert nsd(comparison, 5.0 + max(spacing)) == 1
    assert nsd(comparison, 2.0) == 0
    assert pred_ml(comparison) == pytest.approx(4 / 3 * math.pi * 0.9**3, rel=0.05)
    assert ref_ml(comparison) == pytest.approx(4 / 3 * math.pi * 1.4**3, rel=0.05)


def test_a_shifted_cube_has_the_overlap_and_distance_of_its_shift() -> None:
    pred = box((30, 30, 30), slice(10, 20), slice(5, 15), slice(5, 15))
    ref = box((30, 30, 30), slice(12, 22), slice(5, 15), slice(5, 15))
    comparison = compare(pred, ref, (2.5, 1.0, 1.0))
    assert dice(comparison) == precision(comparison) == recall(comparison) == 0.8
    assert iou(comparison) == pytest.approx(8 / 12)
    assert hd95(comparison) == 5.0  # two slices of 2.5 mm


def test_precision_and_recall_are_of_the_prediction_and_of_the_reference() -> None:
    comparison = compare(box((4, 4, 4), slice(0, 1)), box((4, 4, 4), slice(0, 4)), (1, 1, 1))
    assert (precision(comparison), recall(comparison)) == (1.0, 0.25)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("seed", range(3))
def test_values_are_medpys(seed: int, spacing: tuple[float, ...]) -> None:
    pred, ref = blobs(seed)
    comparison = compare(pred, ref, spacing)
    assert dice(comparison) == pytest.approx(medpy.dc(pred, ref), abs=1e-9)
    assert iou(comparison) == pytest.approx(medpy.jc(pred, ref), abs=1e-9)
    assert precision(comparison) == pytest.approx(medpy.precision(pred, ref), abs=1e-9)
    assert recall(comparison) == pytest.approx(medpy.recall(pred, ref), abs=1e-9)
    assert hd95(comparison) == pytest.approx(medpy.hd95(pred, ref, spacing), abs=1e-9)
    assert asd(comparison) == pytest.approx(medpy.asd(pred, ref, spacing), abs=1e-9)
    assert assd(comparison) == pytest.approx(medpy.assd(pred, ref, spacing), abs=1e-9)


def test_values_are_medpys_far_apart_and_in_2d() -> None:
    pred = box((12, 40, 90), slice(0, 3), slice(0, 5), slice(0, 7))
    ref = box((12, 40, 90), slice(9, 12), slice(30, 40), slice(70, 90))
    assert hd95(compare(pred, ref, (3, 0.8, 0.8))) == pytest.approx(medpy.hd95(pred, ref, (3, 0.8, 0.8)), abs=1e-9)
    pred, ref = blobs(0, (60, 50))
    assert assd(compare(pred, ref, (0.7, 1.3))) == pytest.approx(medpy.assd(pred, ref, (0.7, 1.3)), abs=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("tolerance", [0.5, 1.0, 2.0, 5.0])
def test_nsd_is_that_of_surface_distance(spacing: tuple[float, ...], tolerance: float) -> None:
    for seed in range(3):
        pred, ref = blobs(seed)
        theirs = their_nsd(pred, ref, spacing, tolerance)
        assert nsd(compare(pred, ref, spacing), tolerance) == pytest.approx(theirs, abs=0.003)


def test_nsd_of_a_2d_mask_weights_the_contour_by_length() -> None:
    pred, ref = blobs(1, (60, 50))
    theirs = their_nsd(pred, ref, (0.7, 1.3), 1.0)
    assert nsd(compare(pred, ref, (0.7, 1.3)), 1.0) == pytest.approx(theirs, abs=1e-9)


def test_a_mask_against_itself_is_perfect() -> None:
    mask, _ = blobs(4)
    comparison = compare(mask, mask, (3, 1, 1))
    assert dice(comparison) == iou(comparison) == nsd(comparison, 0.0) == 1
    assert hd95(comparison) == asd(comparison) == assd(comparison) == 0


def test_a_volume_of_one_slice_is_compared_as_the_slice() -> None:
    pred, ref = blobs(3, (40, 30))
    flat, volume = compare(pred, ref, (0.7, 1.3)), compare(pred[None], ref[None], (5.0, 0.7, 1.3))
    for metric in (dice, hd95, asd, assd, nsd):
        assert metric(volume) == metric(flat)
    assert ref_ml(volume) == pytest.approx(np.count_nonzero(ref) * 5 * 0.7 * 1.3 / 1000)


@pytest.mark.parametrize(
    ("has_pred", "has_ref", "state"),
    [(True, True, "found"), (False, True, "missed"), (True, False, "invented"), (False, False, "absent")],
)
def test_an_empty_mask_has_a_state_and_no_distance(has_pred: bool, has_ref: bool, state: str) -> None:
    full, empty = box((4, 5, 6), slice(1, 3), slice(1, 3), slice(1, 3)), np.zeros((4, 5, 6), bool)
    comparison = compare(full if has_pred else empty, full if has_ref else empty, (1, 1, 1))
    assert comparison.state == state
    for metric in (hd95, asd, assd, nsd):
        assert math.isnan(metric(comparison)) == (state != "found")
    assert math.isnan(dice(comparison)) == math.isnan(iou(comparison)) == (state == "absent")


def test_classes_of_one_volume_are_those_of_each_mask_alone() -> None:
    rng = np.random.default_rng(0)
    fields = np.stack([gaussian_filter(rng.standard_normal((14, 18, 16)), 2) for _ in range(4)])
    ref = fields.argmax(0).astype(np.uint8)
    pred = (fields + 0.3 * np.roll(fields, 1, axis=0)).argmax(0).astype(np.uint8)
    pred[pred == 3] = 0
    together = compare_classes(pred, ref, 5, (2, 1, 1))
    assert [comparison.state for comparison in together] == ["found", "found", "missed", "absent"]
    for index, comparison in enumerate(together, start=1):
        alone = compare(pred == index, ref == index, (2, 1, 1))
        for name, metric in METRICS.items():
            assert metric.compute(comparison) == pytest.approx(metric.compute(alone), nan_ok=True), name


def test_what_is_predicted_where_nobody_annotated_changes_nothing() -> None:
    pred, ref = blobs(2)
    labels = ref.astype(np.uint8)
    labels[:, :9] = IGNORE
    results = []
    for filling in (0, 1, 2):
        guess = pred.astype(np.uint8)
        guess[:, :9] = filling
        comparisons = compare_classes(guess, labels, 3, (2, 1, 1))
        results.append([[metric.compute(comparison) for metric in METRICS.values()] for comparison in comparisons])
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    assert results[0][0][0] == pytest.approx(medpy.dc(pred[:, 9:], ref[:, 9:]))


def test_no_surface_runs_along_ignored_voxels() -> None:
    pred = box((10, 10, 10), slice(2, 8), slice(2, 8), slice(0, 10))
    ref = pred.copy()
    ref[2:8, 2:8, 5:] = False  # the class would end at 5, were it not that nobody annotated beyond
    ignored = box((10, 10, 10), slice(None), slice(None), slice(5, 10))
    comparison = compare(pred, ref, (1, 1, 1), ignored)
    assert hd95(comparison) == 0
    assert nsd(comparison) == dice(comparison) == 1


def test_a_mask_enclosed_by_ignored_voxels_has_no_distance() -> None:
    mask = box((5, 5, 5), slice(2, 3), slice(2, 3), slice(2, 3))
    comparison = compare(mask, mask, (1, 1, 1), ~mask)
    assert comparison.state == "found"
    assert dice(comparison) == 1
    assert math.isnan(hd95(comparison)) and math.isnan(nsd(comparison))


def test_the_ignored_label_is_that_of_training() -> None:
    assert IGNORE == CORE_IGNORE


def test_everything_may_be_ignored() -> None:
    labels = np.full((3, 3, 3), IGNORE, np.uint8)
    (comparison,) = compare_classes(np.ones_like(labels), labels, 2, (1, 1, 1))
    assert isinstance(comparison, Comparison)
    assert comparison.state == "absent"


@pytest.mark.parametrize(
    ("pred", "ref", "spacing", "message"),
    [
        (np.zeros((2, 3, 4), np.uint8), np.zeros((2, 3, 5), np.uint8), (1, 1, 1), "must be of one shape"),
        (np.zeros((2, 3, 4), np.int64), np.zeros((2, 3, 4), np.uint8), (1, 1, 1), "must be uint8, got int64"),
        (np.zeros((2, 3, 4), np.uint8), np.zeros((2, 3, 4), np.uint8), (1, 1), "must be 3 positive numbers"),
        (np.zeros((2, 3, 4), np.uint8), np.zeros((2, 3, 4), np.uint8), (1, 0, 1), "must be 3 positive numbers"),
        (np.full((2, 3, 4), 3, np.uint8), np.zeros((2, 3, 4), np.uint8), (1, 1, 1), "the prediction holds label 3"),
        (
            np.full((2, 3, 4), IGNORE, np.uint8),
            np.zeros((2, 3, 4), np.uint8),
            (1, 1, 1),
            "the prediction holds label 255",
        ),
    ],
)
def test_maps_that_do_not_fit_are_refused(
    pred: np.ndarray, ref: np.ndarray, spacing: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare_classes(pred, ref, 3, spacing)
