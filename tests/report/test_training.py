"""Charts of whatever the logs hold, and classes that were never predicted."""

from __future__ import annotations

from pathlib import Path

import pytest
from report.folders import CLASSES, make_run, tiny_data, training_lines

from tailseg.report.collect import Run, collect
from tailseg.report.training import MOST_CLASSES, training_view


@pytest.fixture
def run(tmp_path: Path) -> Run:
    folder = make_run(tmp_path / "run", tiny_data(tmp_path))
    return collect([folder], lines={folder: training_lines()}).runs[0]


def test_every_log_has_its_charts(run: Run):
    view = training_view([run], CLASSES, {"box": 0.02, "core": 0.001}, {run.name: 0})
    titles = [panel.title for panel in view.panels]
    assert titles == [
        "Validation Dice (%) over steps",
        "Share of the voxels predicted as each class (%) over steps",
        "Losses and learning rate over steps",
        "What the method logs, over steps",
        "weights_a of every class, over steps",
    ]
    assert [len(panel.charts) for panel in view.panels] == [3, 2, 2, 1, 2]
    assert "core (0.10 % of voxels)" in view.panels[0].charts[1]  # after the mean, the rarest
    assert [panel.folded for panel in view.panels] == [False] * 4 + [True]


def test_a_class_that_was_never_predicted_is_told_of_and_shaded(run: Run):
    view = training_view([run], CLASSES, {}, {run.name: 0})
    (alarm,) = view.alarms
    assert (alarm.name, alarm.first, alarm.last, alarm.steps) == ("core", 0, None, 400)
    shaded = ["var(--hurt)" in chart for chart in view.panels[1].charts]
    assert shaded == [False, True]


def test_an_alarm_ends_when_the_class_is_predicted_again(tmp_path: Path):
    folder = make_run(tmp_path / "run", tiny_data(tmp_path))
    lines = [*training_lines(), {"kind": "alarm_cleared", "step": 210, "class": "core"}]
    run = collect([folder], lines={folder: lines}).runs[0]
    assert training_view([run], CLASSES, {}, {run.name: 0}).alarms[0].last == 210


def test_a_run_without_a_log_has_no_charts(tmp_path: Path):
    run = collect([make_run(tmp_path / "run", tiny_data(tmp_path))]).runs[0]
    assert training_view([run], CLASSES, {}, {run.name: 0}).panels == ()


def test_of_very_many_classes_the_rarest_are_drawn(tmp_path: Path):
    folder = make_run(tmp_path / "run", tiny_data(tmp_path))
    classes = [f"k{index}" for index in range(40)]
    lines = [{"kind": "validation", "step": step, "dice": dict.fromkeys(classes, 0.5), "mean": 0.5} for step in (1, 2)]
    run = collect([folder], lines={folder: lines}).runs[0]
    (panel,) = training_view(
        [run], classes, {name: 1 / (index + 1) for index, name in enumerate(classes)}, {run.name: 0}
    ).panels
    assert len(panel.charts) == 1 + MOST_CLASSES and "k39" in panel.charts[1] and "rarest of 40" in panel.text
