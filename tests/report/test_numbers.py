"""Numbers as they are read."""

from __future__ import annotations

import math

import pytest

from tailseg.evaluate.protocols import PROTOCOLS
from tailseg.report.numbers import MINUS, NONE, factor, fixed, p_value, percent, short, signed, title


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.34, "34"), (0.042, "4.2"), (0.01, "1.0"), (0.0031, "0.31"), (0.000042, "0.0042"), (0.0, "0"), (1.0, "100")],
)
def test_a_share_keeps_two_digits(share: float, text: str):
    assert percent(share) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0001, "< 0.001"), (0.0039, "0.0039"), (0.5, "0.50"), (1.0, "1.00"), (math.nan, NONE)]
)
def test_a_small_p_keeps_two_digits(value: float, text: str):
    assert p_value(value) == text


def test_differences_have_a_sign_and_zero_has_none():
    assert (signed(2.44), signed(-1.0), signed(-0.01), signed(math.nan)) == ("+2.4", f"{MINUS}1.0", "0.0", NONE)


def test_no_number_is_a_dash():
    assert fixed(None) == fixed(math.nan) == short(math.inf) == NONE


def test_overlaps_are_shown_in_percent_whatever_the_protocol_reports():
    assert factor(PROTOCOLS["native"], "dice") == 100 and factor(PROTOCOLS["dhc-p23"], "dice") == 1
    assert factor(PROTOCOLS["native"], "hd95") == 1
    assert title(PROTOCOLS["dhc-p23"], "asd") == "ASD (voxels)" and title(PROTOCOLS["native"], "dice") == "Dice (%)"
