"""What run folders hold, and what is told of what they lack."""

from __future__ import annotations

from pathlib import Path

import pytest
from report.folders import make_run, make_whole, predicted, scored, tiny_data

from tailseg.data.splits import Split
from tailseg.files import write_json
from tailseg.options import OptionError
from tailseg.report.collect import ReportError, collect

TEST = ("t", "v1", "v2")
WIDE = Split("wide", ("a", "b"), ("u0", "u1"), (), TEST)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tiny_data(tmp_path)


def test_a_run_without_scores_names_the_commands_that_make_them(tmp_path: Path, data: Path):
    run = make_run(tmp_path / "run", data)
    material = collect([run])
    (told, curves) = material.runs[0].missing
    assert f"tailseg predict {run} test {run}/predictions/test" in told
    assert f"tailseg evaluate {run}/predictions/test {data}" in told and "metrics.jsonl" in curves
    assert not material.groups and not material.answers and material.dataset is not None


def test_the_labelled_only_run_of_the_same_split_is_the_reference(tmp_path: Path, data: Path):
    method = scored(make_run(tmp_path / "m", data, split=WIDE), data, TEST, shift=0)
    own = scored(make_run(tmp_path / "s", data, "supervised", split=WIDE, labelled_only=True), data, TEST, shift=2)
    (answer,) = collect([own, method]).answers
    assert (answer.run.name, answer.reference.name) == ("dhc", "supervised (labelled only)")
    assert answer.verdict.scored == "test" and answer.verdict.overall.test.difference > 0


def test_a_labelled_only_run_of_another_split_is_no_reference(tmp_path: Path, data: Path):
    method = scored(make_run(tmp_path / "m", data, split=WIDE), data, TEST)
    other = Split("other", ("a",), ("u0", "u1"), (), TEST)
    own = scored(make_run(tmp_path / "s", data, "supervised", split=other, labelled_only=True), data, TEST)
    assert collect([method, own]).answers == ()


def test_a_method_on_labelled_patches_alone_is_labelled_only(tmp_path: Path, data: Path):
    run = make_run(tmp_path / "run", data, "cps", labelled_only=True)
    assert collect([run]).runs[0].labelled_only


def test_folds_are_one_run_in_which_each_case_is_scored_once(tmp_path: Path, data: Path):
    material = collect([make_whole(tmp_path / "out", data, folds=2)])
    method, reference = material.runs
    assert method.scored is not None and sorted(method.scored.scores.cases) == ["a", "b", "t", "v1", "v2"]
    assert len(method.members) == 2 and reference.labelled_only and method.scored.cases_of == "val"
    (answer,) = material.answers
    assert answer.verdict.cases == 5 and answer.verdict.notes  # the checkpoint was chosen on these very cases


def test_folds_that_scored_the_same_cases_stay_apart(tmp_path: Path, data: Path):
    whole = make_whole(tmp_path / "out", data, folds=2)
    for fold in ("fold0", "fold1"):
        scored(whole / fold, data, ("t",), "test")
    names = [run.name for run in collect([whole]).runs if not run.labelled_only]
    assert names == ["dhc · fold0", "dhc · fold1"]


def test_the_verdict_of_a_run_is_read_from_its_folder(tmp_path: Path, data: Path):
    whole = make_whole(tmp_path / "out", data)
    (answer,) = collect([whole]).answers
    told = answer.verdict.to_dict() | {"notes": ["as it was told"]}
    write_json(whole / "verdict.json", told)
    assert collect([whole]).answers[0].verdict.notes == ("as it was told",)
    write_json(whole / "verdict.json", told | {"cases": 7})  # of other scores than those beside it
    assert collect([whole]).answers[0].verdict.notes == answer.verdict.notes


def test_other_protocols_and_other_cases_stand_in_groups_of_their_own(tmp_path: Path, data: Path):
    first = scored(make_run(tmp_path / "a", data, split=WIDE), data, TEST)
    second = scored(make_run(tmp_path / "b", data, "cps", split=WIDE), data, TEST, protocol="dhc-p23")
    third = scored(make_run(tmp_path / "c", data, "uamt", split=WIDE), data, ("t", "v1"))
    material = collect([first, second, third])
    assert [len(group.runs) for group in material.groups] == [1, 1, 1]
    assert any("tables of their own" in note for note in material.notes)
    assert not any(collect([first]).notes)


def test_a_protocol_that_was_asked_for_and_not_scored_is_missing(tmp_path: Path, data: Path):
    run = scored(make_run(tmp_path / "run", data), data, ("t",))
    material = collect([run], protocol="dhc-p23")
    assert material.groups == () and "--protocol dhc-p23" in material.runs[0].missing[0]
    with pytest.raises(OptionError, match="No protocol is called 'dhc'"):
        collect([run], protocol="dhc")


def test_scores_on_training_cases_give_no_verdict(tmp_path: Path, data: Path):
    runs = [
        scored(make_run(tmp_path / "m", data), data, ("a", "t")),
        scored(make_run(tmp_path / "s", data, "supervised", labelled_only=True), data, ("a", "t")),
    ]
    material = collect(runs)
    assert material.groups[0].scored.cases_of == "labelled" and material.answers == ()
    assert "labelled (training)" in material.groups[0].title


def test_the_caveat_of_predictions_goes_with_the_run(tmp_path: Path, data: Path):
    run = scored(make_run(tmp_path / "run", data), data, ("t",), caveat="RANDOM TEACHER")
    assert collect([run]).runs[0].caveats == ("RANDOM TEACHER",)


def test_unlabelled_predictions_and_their_volumes_are_found(tmp_path: Path, data: Path):
    (run, _) = collect([make_whole(tmp_path / "out", data)]).runs
    assert run.unlabelled is not None and set(run.unlabelled.files) == {"u0", "u1"}
    assert run.unlabelled.volumes["u1"] == {"box": 1.4, "core": 0.0} and run.unlabelled.unit == "ml"


def test_volumes_of_pictures_are_counted_in_voxels(tmp_path: Path, data: Path):
    whole = make_whole(tmp_path / "out", data)
    (whole / "predictions" / "volumes.csv").write_text("case,class,voxels,ml\nu0,box,100,\n")
    (run, _) = collect([whole]).runs
    assert run.unlabelled is not None and run.unlabelled.unit == "voxels" and run.unlabelled.volumes["u0"]["box"] == 100


def test_runs_of_one_method_are_told_apart_by_their_folders(tmp_path: Path, data: Path):
    runs = [make_run(tmp_path / name / "dhc", data) for name in ("first", "second")]
    assert [run.name for run in collect(runs).runs] == ["dhc · first/dhc", "dhc · second/dhc"]


def test_scans_that_moved_away_are_told_of(tmp_path: Path, data: Path):
    run = scored(make_run(tmp_path / "run", data), data, ("t",))
    data.rename(tmp_path / "elsewhere")
    material = collect([run])
    assert material.dataset is None and "No scan can be shown" in material.notes[0]
    assert material.groups  # the numbers are still good


def test_what_is_no_run_is_refused(tmp_path: Path, data: Path):
    run = make_run(tmp_path / "run", data)
    with pytest.raises(ReportError, match="holds no run"):
        collect([tmp_path])
    with pytest.raises(ReportError, match="given twice"):
        collect([run, run])
    with pytest.raises(ReportError, match="at least one"):
        collect([])
    (tmp_path / "out").mkdir()
    write_json(tmp_path / "out" / "run.json", {"tailseg_run": 1})
    with pytest.raises(ReportError, match="not trained yet"):
        collect([tmp_path / "out"])


def test_runs_of_other_classes_are_refused(tmp_path: Path, data: Path):
    first, second = (scored(make_run(tmp_path / name, data), data, ("t",)) for name in ("a", "b"))
    scores = second / "predictions" / "test" / "native.csv"
    scores.write_text(scores.read_text().replace("core", "heart"))
    with pytest.raises(ReportError, match="different classes"):
        collect([first, second])


def test_an_unscored_set_of_predictions_gives_no_scores(tmp_path: Path, data: Path):
    run = make_run(tmp_path / "run", data)
    predicted(run / "predictions" / "test", data, ("t",), shift=0)
    assert collect([run]).runs[0].scored is None
