from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from tiny import make_tiny, tiny_recipe

from tailseg import app
from tailseg.data.image import read_image
from tailseg.data.splits import Split
from tailseg.evaluate.scores import read_scores
from tailseg.evaluate.verdict import Verdict
from tailseg.options import OptionError
from tailseg.recipe import Recipe, load_recipe
from tailseg.running import CheckFailed, Finished, RunSettings, Stopped, _files_digest, _steps_for, _Timed, run
from tailseg.train.fit import Trainer


def settings(root: Path, *, recipe: bool = True, **others) -> RunSettings:
    """Four steps of DHC and of the reference on the tiny scans, on its own split, unless it is to be planned."""
    if not root.exists():
        make_tiny(root)
    if recipe:
        tree = tiny_recipe(root, epochs=1, validate_every=1)
        path = root.parent / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        others = {"recipe": str(path), **others}
    return RunSettings(data=str(root), store=str(root.parent / "stores"), device="cpu", **others)


def predicted(folder: Path) -> dict[str, bytes]:
    return {path.name: read_image(path).array.tobytes() for path in sorted(folder.glob("*.nii.gz"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunSettings, Finished]:
    root = tmp_path_factory.mktemp("run") / "data"
    asked = settings(root)
    return asked, run(asked, root.parent / "out")


def test_a_folder_becomes_predictions_a_verdict_and_a_report(finished: tuple[RunSettings, Finished]):
    _, done = finished
    assert sorted(predicted(done.folder / "predictions")) == ["u0.nii.gz", "u1.nii.gz"]
    assert done.predictions == done.folder / "predictions"
    for name in ("tiny", "tiny_labelled_only"):
        assert (done.folder / name / "best.pt").exists()
        assert read_scores(done.folder / name / "predictions" / "test" / "native.csv").cases == ("t",)
    assert done.verdict is not None
    told = json.loads((done.folder / "verdict.json").read_text(encoding="utf-8"))
    assert Verdict.from_dict(told).sentence == done.verdict.sentence
    assert (done.verdict.scored, done.verdict.cases, done.verdict.method) == ("test", 1, "dhc")
    assert done.report == done.folder / "report.html" and done.report.stat().st_size > 10_000


def test_the_reference_sees_as_many_patches_in_as_many_steps_and_no_unlabelled_one(
    finished: tuple[RunSettings, Finished],
):
    _, done = finished
    method, alone = (load_recipe(done.folder / name / "recipe.yaml") for name in ("tiny", "tiny_labelled_only"))
    assert (method.data.batch, alone.data.batch) == ((2, 2), (4, 0))
    assert (method.method.name, alone.method.name) == ("dhc", "supervised")
    assert app.trained_steps(done.folder / "tiny") == app.trained_steps(done.folder / "tiny_labelled_only") == (4, 4)
    assert method.network == alone.network
    assert (method.method.options["weighter_a"], alone.method.options["weighter"]) == ("diff", "diff")
    assert done.verdict is not None
    assert "class weights 'diff'" in done.verdict.notes[0] and "average of its 2 networks" in done.verdict.notes[0]


def test_a_finished_run_is_left_as_it_is(finished: tuple[RunSettings, Finished], monkeypatch: pytest.MonkeyPatch):
    asked, done = finished
    monkeypatch.setattr(app, "train", None)
    monkeypatch.setattr(app, "check", None)
    before = {path: path.stat().st_mtime_ns for path in done.folder.rglob("*.nii.gz")}
    again = run(asked, done.folder)
    assert {path: path.stat().st_mtime_ns for path in done.folder.rglob("*.nii.gz")} == before
    assert again.verdict == done.verdict


def test_the_folder_of_a_run_stands_for_its_networks(finished: tuple[RunSettings, Finished], tmp_path: Path):
    _, done = finished
    assert app.member_runs(done.folder) == [done.folder / "tiny"]
    assert app.member_runs(done.folder / "tiny") == [done.folder / "tiny"]
    app.predict(done.folder, "val", tmp_path / "val")
    assert sorted(predicted(tmp_path / "val")) == ["v1.nii.gz", "v2.nii.gz"]


@pytest.mark.parametrize("stage", ["app.train", "app.predict", "app.evaluate", "make_verdict", "app.report"])
def test_a_run_killed_in_any_stage_goes_on_to_the_same_end(
    stage: str, finished: tuple[RunSettings, Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    asked, done = finished
    with monkeypatch.context() as patched:
        patched.setattr(f"tailseg.{stage}" if stage.startswith("app") else f"tailseg.running.{stage}", killed)
        with pytest.raises(KeyboardInterrupt):
            run(asked, tmp_path / "out")
    again = run(asked, tmp_path / "out")
    assert again.verdict == done.verdict
    assert predicted(tmp_path / "out" / "predictions") == predicted(done.folder / "predictions")


def test_a_signal_while_training_stops_the_whole_run_and_it_goes_on_to_the_same_end(
    finished: tuple[RunSettings, Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked, done = finished
    step = Trainer._train_step

    def stopping(self: Trainer) -> None:
        step(self)
        self.stopped = True  # as a signal does

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_train_step", stopping)
        with pytest.raises(Stopped):
            run(asked, tmp_path / "out")
    assert app.trained_steps(tmp_path / "out" / "tiny") == (1, 4)
    again = run(asked, tmp_path / "out")
    assert again.verdict == done.verdict
    assert predicted(tmp_path / "out" / "predictions") == predicted(done.folder / "predictions")


def test_a_folder_keeps_to_the_settings_it_was_begun_with(finished: tuple[RunSettings, Finished]):
    asked, done = finished
    other = RunSettings(**{**vars(asked), "reference": False})
    with pytest.raises(OptionError, match="was begun with reference True; call it so again"):
        run(other, done.folder)


def test_files_of_someone_else_are_not_mixed_with(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.docx").touch()
    with pytest.raises(OptionError, match="holds other files"):
        run(settings(tmp_path / "data"), tmp_path / "out")


def test_errors_in_the_data_stop_it_before_anything_long_and_once_mended_it_goes_on(tmp_path: Path):
    asked = settings(tmp_path / "data", reference=False)
    label = tmp_path / "data" / "labelsTr" / "a.nii.gz"
    kept = label.read_bytes()
    label.write_bytes(kept[:200])
    with pytest.raises(CheckFailed, match="holds 1 error"):
        run(asked, tmp_path / "out")
    assert not (tmp_path / "out" / "tiny").exists()
    label.write_bytes(kept)
    done = run(asked, tmp_path / "out")
    assert done.verdict is None and not (tmp_path / "out" / "tiny_labelled_only").exists()
    assert sorted(predicted(tmp_path / "out" / "predictions")) == ["u0.nii.gz", "u1.nii.gz"]


def test_a_planned_run_trains_the_folds_that_were_asked_for_and_scores_each_labelled_case_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    timed: list[_Timed] = []

    def two_steps(recipe: Recipe, splits: object, sides: list[_Timed], left: float) -> dict:
        timed.extend(sides)
        return {"overrides": ["train.epochs=1", "train.steps_per_epoch=2"], "why": "this is a test", "steps": 2}

    monkeypatch.setattr("tailseg.running._steps_for", two_steps)
    root = make_tiny(tmp_path / "data")
    (root / "splits.json").unlink()
    for case in ("t", "v2"):  # three labelled cases are left: three folds
        (root / "labelsTr" / f"{case}.nii.gz").unlink()
    small = ("data.patch_size=[16,16,16]", "network.width=4")
    asked = settings(root, recipe=False, hours=2.0, folds="all", overrides=small)
    done = run(asked, tmp_path / "out")
    assert done.verdict is not None and done.verdict.cases == 3 and done.verdict.scored == "val"
    state = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert state["folds"] == ["fold0", "fold1", "fold2"]
    assert app.trained_steps(tmp_path / "out" / "fold1") == (2, 2)
    assert len(timed) == 2 and all(0 < each.step < 60 and 0 < each.validation < 60 for each in timed)
    assert not list((tmp_path / "out").glob(".trial*"))
    assert sorted(predicted(tmp_path / "out" / "predictions")) == ["t.nii.gz", "u0.nii.gz", "u1.nii.gz", "v2.nii.gz"]
    assert not any((root / name).exists() for name in ("splits.json", "stores"))


def test_nothing_is_written_into_the_data_set(finished: tuple[RunSettings, Finished]):
    asked, _ = finished
    assert sorted(os.listdir(asked.data)) == ["dataset.json", "imagesTr", "labelsTr", "splits.json"]  # noqa: PTH208
    with pytest.raises(OptionError, match="lies in the data set"):
        run(asked, Path(asked.data) / "out")


def test_several_processes_are_sent_to_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = settings(tmp_path / "data")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="one process"):
        run(asked, tmp_path / "out")


def test_a_changed_file_is_noticed_and_what_lies_beside_a_table_is_not(tmp_path: Path):
    root = make_tiny(tmp_path / "data")
    before = _files_digest(root)
    (root / "labelsTr" / "a.nii.gz").touch()
    assert _files_digest(root) != before
    table = root / "scans.csv"
    table.write_text(
        "image,label\nimagesTr/a_0000.nii.gz,labelsTr/a.nii.gz\nimagesTr/u0_0000.nii.gz,\n", encoding="utf-8"
    )
    before = _files_digest(table)
    (root / "notes.txt").write_text("of someone", encoding="utf-8")
    assert _files_digest(table) == before
    (root / "imagesTr" / "u0_0000.nii.gz").touch()
    assert _files_digest(table) != before


@pytest.mark.parametrize("others", [{"test": ("a",)}, {"split": "tiny"}])
def test_folds_are_for_cases_that_no_test_scores(others: dict, tmp_path: Path):
    with pytest.raises(OptionError, match="Leave one of them out"):
        run(settings(tmp_path / "data", recipe=False, folds=2, **others), tmp_path / "out")


def test_a_recipe_for_another_folder_is_refused(tmp_path: Path):
    asked = settings(tmp_path / "data")
    make_tiny(tmp_path / "other")
    with pytest.raises(OptionError, match="not for"):
        run(RunSettings(**{**vars(asked), "data": str(tmp_path / "other")}), tmp_path / "out")


def test_steps_fill_the_hours_after_the_predictions(tmp_path: Path):
    recipe = load_recipe(tiny_recipe(make_tiny(tmp_path / "data"), epochs=10, validate_every=1))
    split = Split("a", ("a", "b"), tuple(f"u{i}" for i in range(10)), ("v1", "v2"))
    timed = [_Timed(step=1.0, validation=4.0), _Timed(step=0.5, validation=2.0)]
    # a scan takes 2.5 x 4 / 2 = 5 s: ten unlabelled ones and two scored 60 s; by the reference two of 2.5 s
    told = _steps_for(recipe, [split], timed, left=1065.0)
    # 0.92 x 1000 s; of them at most 15 %, 138 s, for rounds of 6 s: all ten; 860 s are 573 steps of 1.5 s, 57 an epoch
    assert told["overrides"] == ["train.steps_per_epoch=57", "train.validate_every=1"]
    with pytest.raises(OptionError, match="--hours is too short"):
        _steps_for(recipe, [split], timed, left=80.0)
