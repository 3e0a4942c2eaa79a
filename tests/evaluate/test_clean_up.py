from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from tailseg.core import IGNORE
from tailseg.evaluate.clean_up import CleanUp, Judged, choose_clean_up, clean_up, merged

CLASSES = ("background", "liver", "vessel")


def grid(**boxes: tuple[slice, ...]) -> np.ndarray:
    """Zeros (12, 12, 12) with the class of that number in each box: one=, two=."""
    labels = np.zeros((12, 12, 12), np.uint8)
    for name, box in boxes.items():
        labels[box] = {"one": 1, "two": 2}[name]
    return labels


def cube(start: int, stop: int) -> tuple[slice, ...]:
    return (slice(start, stop),) * 3


def test_only_the_largest_piece_stays_and_the_rest_becomes_background():
    labels = grid(one=cube(0, 6))
    labels[9:11, 9:11, 9:11] = 1
    labels[6, 6, 6] = 1  # touches the large one by a corner
    labels[10, 0, 0] = 2
    clean_up(labels, CLASSES, {"liver": ("largest_component",)})
    expected = grid(one=cube(0, 6))
    expected[6, 6, 6], expected[10, 0, 0] = 1, 2
    np.testing.assert_array_equal(labels, expected)


def test_the_largest_piece_is_that_of_the_whole_grid():
    mask = np.random.default_rng(0).random((12, 12, 12)) < 0.1
    labels = mask.astype(np.uint8)
    pieces, _ = ndimage.label(mask, np.ones((3, 3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
    clean_up(labels, CLASSES, {"liver": ("largest_component",)})
    np.testing.assert_array_equal(labels == 1, pieces == np.bincount(pieces[pieces > 0]).argmax())


def test_a_hole_is_filled_where_it_is_background_and_other_classes_stay():
    labels = grid(one=cube(2, 9))
    labels[4:7, 4:7, 4:7] = 0
    labels[5, 5, 5] = 2
    labels[2, 2, 2] = 0  # open to the outside
    clean_up(labels, CLASSES, {"liver": ("fill_holes",)})
    expected = grid(one=cube(2, 9))
    expected[5, 5, 5], expected[2, 2, 2] = 2, 0
    np.testing.assert_array_equal(labels, expected)


def test_a_picture_has_holes_within_its_plane_and_a_flat_class_of_a_scan_has_none():
    ring = np.ones((5, 5), np.uint8)
    ring[2, 2] = 0
    picture = ring[None].copy()
    clean_up(picture, CLASSES, {"liver": ("fill_holes",)})
    assert picture.all()
    scan = np.zeros((3, 5, 5), np.uint8)
    scan[1] = ring
    clean_up(scan, CLASSES, {"liver": ("fill_holes",)})
    assert scan[1, 2, 2] == 0


def test_nothing_is_touched_that_was_not_chosen():
    labels = np.random.default_rng(0).integers(0, 3, (6, 6, 6)).astype(np.uint8)
    before = labels.copy()
    clean_up(labels, CLASSES, {})
    np.testing.assert_array_equal(labels, before)


def with_speck(labels: np.ndarray, index: int) -> np.ndarray:
    labels = labels.copy()
    labels[10:12, 10:12, 10:12] = index
    return labels


def test_a_clean_up_is_chosen_for_the_class_that_it_helps_and_no_other():
    truth = grid(one=cube(0, 5))
    truth[6:8, 0:3, 0:3], truth[10:12, 0:3, 0:3] = 2, 2  # the vessel has two pieces
    chosen = choose_clean_up((Judged(case, with_speck(truth, 1), truth) for case in ("a", "b")), CLASSES)
    assert chosen.classes == {"liver": ("largest_component",)} and chosen.cases == ("a", "b")
    assert chosen.gain["liver"] == pytest.approx(1 - 2 * 125 / (125 + 133))
    assert CleanUp.from_dict(chosen.to_dict()) == chosen


def test_both_are_chosen_where_both_are_needed():
    truth = grid(one=cube(0, 7))
    pred = with_speck(truth, 1)
    pred[2:4, 2:4, 2:4] = 0
    assert choose_clean_up([Judged("a", pred, truth)], CLASSES).classes == {
        "liver": ("largest_component", "fill_holes")
    }


def test_what_harms_one_case_is_not_chosen_however_much_it_helps_the_others():
    truth = grid(one=cube(0, 5))
    two_pieces = with_speck(truth, 1)
    judged = [Judged(str(n), with_speck(truth, 1), truth) for n in range(5)] + [Judged("x", two_pieces, two_pieces)]
    assert choose_clean_up(judged, CLASSES).classes == {}


def test_a_gain_of_a_hair_is_none():
    truth = grid(one=cube(0, 11))
    pred = truth.copy()
    pred[5, 5, 5] = 0
    assert choose_clean_up([Judged("a", pred, truth)], CLASSES).classes == {}


def test_cases_without_the_class_and_voxels_that_nobody_looked_at_say_nothing():
    truth = grid(one=cube(0, 5))
    empty = grid()
    unknown = with_speck(truth, IGNORE)
    judged = [Judged("empty", empty, empty), Judged("unknown", with_speck(truth, 1), unknown)]
    assert choose_clean_up(judged, CLASSES).classes == {}
    not_looked_for = Judged("partial", with_speck(truth, 1), truth, ("liver",))
    assert choose_clean_up([not_looked_for], CLASSES).classes == {}


def test_of_several_runs_only_what_all_of_them_chose_is_applied():
    first = CleanUp({"liver": ("largest_component", "fill_holes"), "vessel": ("fill_holes",)}, {}, ("a",))
    second = CleanUp({"liver": ("largest_component",)}, {}, ("b",))
    assert merged([first, second]) == {"liver": ("largest_component",)}
    assert merged([first]) == first.classes


def test_an_unknown_operation_is_named():
    with pytest.raises(ValueError, match="there is no clean-up 'shave'"):
        CleanUp.from_dict({"classes": {"liver": ["shave"]}, "gain": {}, "cases": []})
