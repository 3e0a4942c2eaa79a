"""Charts that belong to the page: valid SVG, the page's colours, and no id twice."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from tailseg.report import charts
from tailseg.report.charts import Line, Points

NAN = float("nan")


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def texts(svg: str) -> list[str]:
    return ["".join(each.itertext()) for each in parsed(svg).iter("text")]


def some() -> list[str]:
    lines = [Line([1, 2, 3], [0.1, 0.5, 0.9]), Line([1, 2, 3], [0.2, NAN, 0.4], run=1)]
    points = [Points([80, NAN], [70, NAN], [90, NAN], 0), Points([60, 20], [50, 10], [70, 30], 1)]
    return [
        charts.curves(lines, "loss", alarms=[(1, 2)]),
        charts.curves(lines, "rate", log=True),
        charts.against_share(["big", "tiny <1>"], ["#2a78d6", "#e8590c"], [0.9, 0.1], points, ["a", "b"], "Dice (%)"),
        charts.volumes(["big"], ["#2a78d6"], {"big": [("u0", 2.0), ("u1", 0.0)]}, {("u0", "big")}),
    ]


def test_charts_are_valid_and_never_share_an_id():
    ids = [found for svg in some() for found in re.findall(r'\bid="([^"]+)"', svg)]
    assert ids and len(ids) == len(set(ids))
    for svg in some():
        used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
        assert used <= set(re.findall(r'\bid="([^"]+)"', svg)) and parsed(svg).get("role") == "img"


def test_charts_have_the_colours_and_the_font_of_the_page():
    for svg in some():
        assert "var(--line)" in svg and "#0101" not in svg and "#0102" not in svg
        assert "font-family" not in svg and "<style" not in svg and "http" not in svg
    assert "var(--run1)" in some()[0]


def test_a_small_number_in_a_title_stays_what_it_is():
    assert "adrenal (0.0057 % of voxels)" in texts(
        charts.curves([Line([1, 2], [0.1, 0.2])], "adrenal (0.0057 % of voxels)")
    )


def test_a_chart_is_told_to_who_cannot_see_it():
    svg = charts.curves([Line([1, 2], [0.1, 0.9])], "loss & more")
    assert parsed(svg).get("aria-label") == "loss & more: from 0.1 to 0.9"


def test_a_long_curve_is_thinned_and_keeps_its_course():
    long = charts.curves([Line(range(20_000), list(np.linspace(0, 1, 20_000)))], "x")
    assert len(long) < 12_000
    x, y = charts._thinned(np.arange(1000.0), np.r_[np.full(500, NAN), np.ones(500)])
    assert len(x) == 300 and np.isnan(y[x < 497]).all() and (y[x > 503] == 1).all()


def test_the_running_mean_of_a_constant_is_the_constant():
    y = np.r_[np.full(50, 3.0), NAN, np.full(49, 3.0)]
    mean = charts._running_mean(y)
    assert np.isnan(mean[50]) and np.allclose(np.delete(mean, 50), 3.0)


@pytest.mark.parametrize("places", [[10.0, 11, 12, 200], [0, 0, 0], [290, 295, 300], [5]])
def test_names_are_pushed_apart_and_stay_in_their_order(places: list[float]):
    pushed = np.array(charts._pushed_apart(np.array(places, float), 13, 300))
    assert (np.diff(pushed) >= 13 - 1e-9).all() and pushed.min() >= 0 and pushed.max() <= 300


def test_a_class_that_no_case_holds_has_its_place():
    svg = charts.against_share(
        ["a", "b"], ["#2a78d6", "#e8590c"], [1.0, 0.0], [Points([80, NAN], [70, NAN], [90, NAN], 0)], ["r"], "Dice (%)"
    )
    assert {"a", "b"} <= set(texts(svg))
