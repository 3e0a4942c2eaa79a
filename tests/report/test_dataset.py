"""The data set's card and what differs between recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
from report.folders import make_run, make_whole, tiny_data

from tailseg.data.check import check_dataset
from tailseg.files import write_json
from tailseg.report.collect import Trained, collect
from tailseg.report.dataset import dataset_view, recipe_view

X = " \N{MULTIPLICATION SIGN} "
AXES = X.join(("superior", "anterior", "right"))
COLOURS = {"box": "#111111", "core": "#222222"}
TRAINED = Trained(("background", "box", "core"), (9000, 900, 100), 12, 1000, {"tailseg": "0"}, "")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tiny_data(tmp_path)


def test_the_card_says_what_dataset_json_says_and_how_large_scans_are(tmp_path: Path, data: Path):
    run = make_run(tmp_path / "run", data)
    view = dataset_view(collect([run], trained={run: TRAINED}), COLOURS)
    facts = dict(view.facts)
    assert view.name == "Boxes <in> boxes" and facts["licence"] == "CC0" and facts["channels"] == "channel0"
    assert facts[f"median size, {AXES}"].startswith(f"22{X}20{X}24 voxels")
    assert facts[f"median spacing, {AXES}"].startswith(f"3{X}2{X}2 mm")
    assert view.sets == (("tiny", 2, 2, 2, 1),) and not view.checked


def test_imbalance_is_counted_by_the_checkpoint_where_no_check_was_kept(tmp_path: Path, data: Path):
    run = make_run(tmp_path / "run", data)
    rows = dataset_view(collect([run], trained={run: TRAINED}), COLOURS).classes
    assert [(row.name, row.share, row.times, row.cases) for row in rows] == [
        ("core", "1.0", "1 : 9.0", None),
        ("box", "9.0", "1 : 1.0", None),
    ]


def test_what_check_found_is_shown(tmp_path: Path, data: Path):
    whole = make_whole(tmp_path / "out", data)
    report = check_dataset(data).to_dict()
    problem = {"severity": "warning", "rule": "few-cases", "text": "thin", "way_out": "more", "file": "", "case": "a"}
    write_json(whole / "check.json", report | {"problems": [problem] * 50})
    view = dataset_view(collect([whole]), COLOURS)
    assert view.checked and len(view.problems) == 40 and view.more_problems == 10
    assert view.problems[0].where == "a" and {row.name: row.cases for row in view.classes} == {"core": 5, "box": 5}


def test_only_keys_that_differ_are_listed(tmp_path: Path, data: Path):
    runs = [make_run(tmp_path / "a", data, lr=0.1), make_run(tmp_path / "b", data, "cps", lr=0.2)]
    view = recipe_view(collect(runs).runs)
    assert dict(view.differing) == {"method.name": ("dhc", "cps"), "train.lr": ("0.1", "0.2")}
    assert view.names == ("dhc", "cps") and "patch_size" in view.texts[0][1]
