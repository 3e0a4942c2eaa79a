"""Volumes to look at."""

from __future__ import annotations

import numpy as np

from tailseg.report.outliers import outliers


def volumes(*ml: float) -> dict[str, dict[str, float]]:
    return {f"u{index}": {"liver": value} for index, value in enumerate(ml)}


def test_a_volume_far_from_the_others_is_found_and_a_missing_one_comes_first():
    found = outliers(volumes(1000, 1100, 1200, 900, 1300, 1050, 60, 0), ["liver"])
    assert [(one.case, one.z is None) for one in found] == [("u7", True), ("u6", False)]
    assert found[1].median == 1050 and found[1].z is not None and found[1].z < -3.5


def test_volumes_that_differ_as_organs_do_are_not_outliers():
    drawn = np.exp(np.random.default_rng(0).normal(7, 0.15, 40))
    assert outliers(volumes(*drawn), ["liver"]) == ()


def test_volumes_that_happen_to_agree_make_no_outlier_of_a_neighbour():
    assert outliers(volumes(1000, 1000, 1000, 1000, 1000, 1150), ["liver"]) == ()


def test_of_few_scans_none_is_unusual():
    assert outliers(volumes(1, 1000, 1000, 0), ["liver"]) == ()


def test_a_class_that_is_often_absent_is_not_missed():
    assert outliers(volumes(10, 11, 12, 10, 11, 0, 0, 0), ["liver"]) == ()
