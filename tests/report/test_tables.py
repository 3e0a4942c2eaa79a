"""The verdict and the scores as text."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tailseg.evaluate.protocols import PROTOCOLS
from tailseg.evaluate.scores import Scores
from tailseg.evaluate.summary import summarise
from tailseg.evaluate.verdict import make_verdict
from tailseg.report.collect import Group, Run, Scored
from tailseg.report.numbers import NONE
from tailseg.report.tables import group_view, verdict_view

COLOURS = {"liver": "#111111", "vein": "#222222", "gland": "#333333"}


def scores(dice: np.ndarray, protocol: str = "native") -> Scores:
    """dice: (cases, classes) of 1."""
    rules = PROTOCOLS[protocol]
    values = np.repeat(dice[..., None] * (100 if rules.percent else 1), len(rules.metrics), axis=2)
    voxels = np.tile([1000, 100, 10], (len(dice), 1))
    cases = tuple(f"c{index}" for index in range(len(dice)))
    return Scores(rules, cases, tuple(COLOURS), values, voxels, voxels)


REFERENCE = np.random.default_rng(0).uniform(0.4, 0.6, (12, 3))
BETTER = REFERENCE + np.array([0.0, 0.2, -0.2]) + np.random.default_rng(1).normal(0, 0.01, (12, 3))


def test_a_verdict_has_the_rarest_class_first_and_percents():
    view = verdict_view(
        make_verdict(scores(BETTER), scores(REFERENCE), scored="test", method="dhc", reference="supervised"), COLOURS
    )
    assert [row.name for row in view.rows] == ["gland", "vein", "liver"]
    assert [(row.answer, row.css) for row in view.rows] == [
        ("hurt", "hurt"),
        ("helped", "helped"),
        ("can't tell", "unsure"),
    ]
    assert view.rows[1].difference.startswith("+2") and 40 < float(view.rows[1].reference) < 60
    assert view.rows[0].rare and view.rows[0].share == "0.90" and view.rows[0].colour == "#333333"
    assert view.counts == (("helped", "helped", 1), ("hurt", "hurt", 1), ("can't tell", "unsure", 1))
    assert view.rows[1].why.startswith("+20") and view.rows[1].why.endswith(".")


def test_percents_are_not_multiplied_twice():
    verdict = make_verdict(
        scores(BETTER, "dhc-p23"), scores(REFERENCE, "dhc-p23"), scored="test", method="dhc", reference="supervised"
    )
    assert 40 < float(verdict_view(verdict, COLOURS).rows[1].reference) < 60


def test_intervals_lie_on_one_scale_around_zero():
    view = verdict_view(
        make_verdict(scores(BETTER), scores(REFERENCE), scored="test", method="dhc", reference="supervised"), COLOURS
    )
    hurt, helped, _ = (float(re.search(r'cx="([\d.]+)"', row.forest)[1]) for row in view.rows)  # pyright: ignore[reportOptionalSubscript]
    zero = float(re.search(r'x1="([\d.]+)"', view.rows[0].forest)[1])  # pyright: ignore[reportOptionalSubscript]
    assert hurt < zero < helped and helped - zero == pytest.approx(zero - hurt, rel=0.1)
    assert "+30" in view.axis or "+20" in view.axis


def test_without_a_common_case_nothing_is_drawn():
    empty = np.full((3, 3), np.nan)
    view = verdict_view(
        make_verdict(scores(empty), scores(empty), scored="test", method="dhc", reference="supervised"), COLOURS
    )
    assert view.rows[0].forest == "" and view.rows[0].p == view.rows[0].difference == NONE


def run(name: str, values: Scores) -> Run:
    return Run(name, name, Path(name), (), False, Scored("test", values, summarise(values), {}, {}))


def test_runs_stand_side_by_side_under_every_class():
    view = group_view(Group((run("a", scores(BETTER)), run("b", scores(REFERENCE)))), COLOURS, {"a": 0, "b": 2})
    assert [row.name for row in view.rows] == ["gland", "vein", "liver"]
    assert [(one.run, one.style) for one in view.rows[0].runs] == [("a", 0), ("b", 2)]
    assert view.metrics == ("Dice (%)", "NSD (%)", "HD95 (mm)", "ASD (mm)")
    assert float(view.rows[1].runs[0].cells[0].value) > 60 and " to " in view.rows[1].runs[0].cells[0].interval
    assert [title for title, _, _ in view.charts] == ["Dice (%)", "HD95 (mm)"]
    assert view.protocol[0].startswith("Protocol native")


def test_missed_invented_and_absent_cases_are_counted():
    values = scores(REFERENCE)
    pred = values.pred_voxels.copy()
    pred[:2, 2] = 0
    view = group_view(Group((run("a", replace(values, pred_voxels=pred)),)), COLOURS, {"a": 0})
    assert view.rows[0].runs[0].counts == ("12", "2", "0", "0") and view.overall.runs[0].counts == ("", "2", "0", "0")
