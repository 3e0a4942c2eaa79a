"""Which scans are shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from report.folders import make_run, make_whole, scored, tiny_data

from tailseg.data.splits import Split
from tailseg.report.cases import galleries
from tailseg.report.collect import Material, collect

CASES = ("a", "b", "t", "v1", "v2")


def quiet(done: int, total: int, case: str) -> None:
    pass


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return make_whole(tmp_path / "out", tiny_data(tmp_path), folds=2)


@pytest.fixture
def material(whole: Path) -> Material:
    return collect([whole])


def test_the_worst_case_comes_first_and_names_its_worst_classes(tmp_path: Path):
    data = tiny_data(tmp_path)
    run = make_run(tmp_path / "run", data, split=Split("s", ("a",), (), (), CASES[1:]))
    scored(run, data, CASES[1:], shift=4)
    (gallery,) = galleries(collect([run]), 30, quiet).galleries
    values = [float(view.scores[0][1]) for view in gallery.shown]
    assert values == sorted(values) and len(values) == 4
    assert gallery.shown[0].found[0].text.startswith(("core", "missed: core"))
    assert gallery.shown[0].maps == ("reference", "dhc") and gallery.shown[0].cut is not None


def test_scored_and_unlabelled_scans_share_the_limit(material: Material):
    everything = galleries(material, 30, quiet)
    assert [len(one.shown) + len(one.folded) for one in everything.galleries] == [5, 2]
    assert [one.cases_of for one in everything.shown] == ["val"] * 5 + ["unlabelled"] * 2
    few = galleries(material, 3, quiet)
    assert [len(one.shown) for one in few.galleries] == [2, 1]
    assert galleries(material, 0, quiet).galleries == ()


def test_progress_ends_at_the_total(material: Material):
    told: list[tuple[int, int]] = []
    galleries(material, 30, lambda done, total, case: told.append((done, total)))
    assert told[0] == (0, 7) and told[-1] == (7, 7) and len(told) == 8


def test_a_case_that_cannot_be_drawn_says_why(whole: Path):
    broken = next((whole / "fold0" / "predictions" / "val").glob("*.nii.gz"))
    broken.write_bytes(broken.read_bytes()[:100])
    shown = galleries(collect([whole]), 30, quiet)
    (view,) = [view for gallery in shown.galleries for view in gallery.shown if view.cut is None]
    assert str(broken) in view.why and view.case not in {one.case for one in shown.shown}
