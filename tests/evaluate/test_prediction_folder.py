from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tailseg.data.cases import Case
from tailseg.evaluate.prediction_folder import PredictionFolder, claim_folder
from tailseg.evaluate.volumes import Volume
from tailseg.options import OptionError

ONE = {"runs": ["1"], "options": {"mirror": []}}
OTHER = {"runs": ["2"], "options": {"mirror": []}}


def case(tmp_path: Path, name: str = "a") -> Case:
    scan = tmp_path / "scans" / f"{name}.nii.gz"
    scan.parent.mkdir(exist_ok=True)
    if not scan.exists():
        scan.write_bytes(b"scan")
    return Case(name, (scan,), None)


def predicted(tmp_path: Path, name: str = "a", identity: dict[str, object] = ONE) -> Path:
    """A folder with one finished case."""
    out = tmp_path / "out"
    claimed = claim_folder(out, identity, {}, [f"{name}.nii.gz"])
    claimed.write()
    files = [out / f"{name}.nii.gz", out / "uncertainty" / f"{name}_entropy.nii.gz"]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"labels")
    claimed.finish(case(tmp_path, name), files, {"liver": Volume(3, 0.5)})
    return out


def resumed(out: Path, identity: dict[str, object] = ONE) -> PredictionFolder:
    return claim_folder(out, identity, {}, ["a.nii.gz"], resume=True)


def test_a_finished_case_is_kept_on_resume_alone(tmp_path: Path):
    out, one = predicted(tmp_path), case(tmp_path)
    assert resumed(out).kept(one)
    assert not claim_folder(out, ONE, {}, ["a.nii.gz"]).kept(one)
    assert not claim_folder(out, ONE, {}, ["a.nii.gz"], resume=True, force=True).kept(one)
    assert not resumed(out).kept(case(tmp_path, "b"))


def test_another_scan_of_the_same_name_is_predicted_again(tmp_path: Path):
    out, one = predicted(tmp_path), case(tmp_path)
    os.utime(one.images[0], (1, 1))
    assert not resumed(out).kept(one)


@pytest.mark.parametrize("lost", ["a.nii.gz", "uncertainty/a_entropy.nii.gz"])
def test_a_case_of_which_a_file_is_gone_is_predicted_again(lost: str, tmp_path: Path):
    out = predicted(tmp_path)
    (out / lost).unlink()
    assert not resumed(out).kept(case(tmp_path))


def test_predictions_of_others_are_not_mixed_in(tmp_path: Path):
    out = predicted(tmp_path)
    with pytest.raises(OptionError, match=f"{out} holds predictions made with another runs; .*--force"):
        resumed(out, OTHER)
    assert (out / "a.nii.gz").exists()


def test_force_removes_all_that_was_recorded_and_nothing_else(tmp_path: Path):
    out = predicted(tmp_path)
    (out / "notes.txt").touch()
    claim_folder(out, OTHER, {}, ["b.nii.gz"], force=True)
    left = {path.name for path in out.rglob("*") if path.is_file()}
    assert left == {"notes.txt", "volumes.csv"}  # the latter is written anew


def test_a_folder_without_label_files_is_free(tmp_path: Path):
    out = predicted(tmp_path)
    (out / "a.nii.gz").unlink()
    (out / "uncertainty" / "a_entropy.nii.gz").unlink()
    assert resumed(out, OTHER).cases == {}


def test_files_that_no_prediction_made_are_never_touched(tmp_path: Path):
    """Reference labels, the scans themselves: whoever gives their folder as the output keeps them."""
    folder = tmp_path / "labelsTr"
    folder.mkdir()
    for name in ("x.nii.gz", "y.nii.gz"):
        (folder / name).touch()
    for force in (False, True):
        with pytest.raises(OptionError, match=r"holds x\.nii\.gz and 1 more, which no recorded prediction made"):
            claim_folder(folder, ONE, {}, ["x.nii.gz"], force=force)


def test_a_case_that_was_being_written_when_all_stopped_is_no_stranger(tmp_path: Path):
    out = tmp_path / "out"
    claim_folder(out, ONE, {}, ["a.nii.gz", "b.nii.gz"]).write()
    (out / "b.nii.gz").touch()
    assert not resumed(out).kept(case(tmp_path, "b"))


def test_cases_of_several_calls_stand_in_one_record(tmp_path: Path):
    predicted(tmp_path)
    out = predicted(tmp_path, "b")
    assert (out / "volumes.csv").read_text() == "case,class,voxels,ml\na,liver,3,0.5\nb,liver,3,0.5\n"
    assert json.loads((out / "prediction.json").read_text())["expected"] == ["a.nii.gz", "b.nii.gz"]


def test_a_record_that_is_none_is_named(tmp_path: Path):
    (tmp_path / "prediction.json").write_text("[]")
    with pytest.raises(OptionError, match=r"prediction\.json is no record of predictions"):
        resumed(tmp_path)
