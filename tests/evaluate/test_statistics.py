from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from tailseg.evaluate.statistics import (
    bootstrap_interval,
    class_mean_interval,
    holm,
    mean_of_class_means,
    paired_test,
)

RNG = np.random.default_rng(7)


def test_interval_is_scipys_bca() -> None:
    values = RNG.beta(8, 2, 24)
    expected = stats.bootstrap((values,), np.mean, method="BCa", rng=np.random.default_rng(3), batch=1000)
    interval = bootstrap_interval(values, seed=3)
    assert interval == pytest.approx(tuple(expected.confidence_interval), abs=1e-12)
    assert interval.low < values.mean() < interval.high


def test_interval_is_the_same_every_time_and_narrower_at_a_lower_level() -> None:
    values = RNG.random(12)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    wide, narrow = bootstrap_interval(values), bootstrap_interval(values, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    samples = rng.beta(5, 2, (80, 25))
    covered = [low <= 5 / 7 <= high for low, high in map(bootstrap_interval, samples)]
    assert 0.88 <= np.mean(covered) <= 1


@pytest.mark.parametrize("values", [[0.7], [0.7, 0.7, 0.7], [0.7, math.nan]])
def test_interval_without_spread_is_the_point(values: list[float]) -> None:
    assert bootstrap_interval(np.array(values)) == pytest.approx((0.7, 0.7))


def test_interval_of_nothing_is_nan() -> None:
    assert np.isnan(bootstrap_interval(np.array([math.nan, math.nan]))).all()
    assert np.isnan(class_mean_interval(np.full((3, 2), math.nan))).all()


def test_mean_over_classes_weights_classes_not_values() -> None:
    values = np.array([[1.0, 0.2, math.nan], [0.0, math.nan, math.nan], [0.5, 0.4, math.nan]])
    assert mean_of_class_means(values) == pytest.approx((0.5 + 0.3) / 2)
    assert math.isnan(mean_of_class_means(np.full((2, 2), math.nan)))


def test_class_mean_interval_of_one_class_is_that_of_its_cases() -> None:
    values = RNG.random(15)
    assert class_mean_interval(values[:, None]) == pytest.approx(bootstrap_interval(values))


def test_class_mean_interval_keeps_a_case_together() -> None:
    # what one class wins in a case the other loses: the mean over both never moves, whichever cases are drawn
    values = RNG.random(15)
    assert class_mean_interval(np.column_stack([values, 1 - values])) == pytest.approx((0.5, 0.5))
    together = class_mean_interval(np.column_stack([values, values]))
    assert together == pytest.approx(bootstrap_interval(values))


def test_paired_test_is_scipys_on_pairs_that_differ() -> None:
    first, second = RNG.random(11), RNG.random(11)
    test = paired_test(first, second)
    assert test.wilcoxon_p == pytest.approx(stats.wilcoxon(first, second).pvalue)
    exact = stats.permutation_test((first - second,), np.mean, permutation_type="samples", n_resamples=10**4)
    assert test.permutation_p == pytest.approx(exact.pvalue)
    assert test.difference == pytest.approx(test.first - test.second)
    assert (test.low, test.high) == bootstrap_interval(first - second)
    assert (test.cases, test.differing, test.note) == (11, 11, "")


def test_order_of_the_sides_turns_the_sign_and_nothing_else() -> None:
    first, second = RNG.random(20), RNG.random(20)
    there, back = paired_test(first, second), paired_test(second, first)
    assert there.difference == -back.difference
    assert (there.wilcoxon_p, there.permutation_p) == (back.wilcoxon_p, back.permutation_p)


@pytest.mark.parametrize(("cases", "smallest"), [(1, 1.0), (4, 0.125), (5, 0.0625), (6, 0.03125)])
def test_few_cases_cannot_be_significant_and_say_so(cases: int, smallest: float) -> None:
    second = np.linspace(0.1, 0.5, cases)
    test = paired_test(second + np.linspace(0.1, 0.3, cases), second)  # better in every case
    assert test.wilcoxon_p == test.permutation_p == test.smallest_p == smallest
    assert ("out of reach" in test.note) == (cases < 6)


def test_pairs_with_a_missing_side_are_left_out() -> None:
    first = np.array([0.5, math.nan, 0.7, 0.9, 0.8])
    second = np.array([0.4, 0.2, math.nan, 0.9, 0.6])
    test = paired_test(first, second)
    assert (test.cases, test.differing) == (3, 2)
    assert test.difference == pytest.approx(0.1)


def test_no_pair_and_no_difference_are_said() -> None:
    values = np.array([0.5, 0.6])
    assert paired_test(values, values).note == "no case differs"
    assert paired_test(values, values).permutation_p == 1
    nothing = paired_test(values, np.full(2, math.nan))
    assert nothing.note == "no case was scored on both sides"
    assert math.isnan(nothing.permutation_p)


def test_p_is_uniform_when_nothing_differs() -> None:
    rng = np.random.default_rng(1)
    tests = [paired_test(rng.random(10), rng.random(10)) for _ in range(100)]
    for p in ([t.wilcoxon_p for t in tests], [t.permutation_p for t in tests]):
        assert np.mean(np.array(p) < 0.05) < 0.09


def test_sides_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="one value per case on both sides"):
        paired_test(np.zeros(3), np.zeros(4))


def test_holm_multiplies_the_smallest_by_the_number_of_tests() -> None:
    adjusted = holm([0.01, 0.04, 0.03, math.nan, 0.5])
    np.testing.assert_allclose(adjusted, [0.04, 0.09, 0.09, math.nan, 0.5])
