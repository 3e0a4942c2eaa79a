"""From trained runs to folders that others use; the MONAI bundle has its own file, because MONAI takes seconds to import."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tailseg import app, cli, exporting
from tailseg.data.raw import DataError
from tailseg.export import check, write
from tailseg.export.safetensors import load_safetensors
from tailseg.export.trained import ExportError
from tailseg.options import OptionError

DESCRIBED = {"MODEL_CARD.md", "model_card.json", "preparation.json"}


def test_a_torch_program_says_on_real_patches_what_tailseg_says(run: Path, tmp_path: Path):
    done = app.export(run, "torch", tmp_path / "out")
    assert {path.name for path in done.folder.iterdir()} == {"model.pt2", *DESCRIBED} == set(done.files)
    assert done.checked.real and done.checked.on == "a validation scan" and done.checked.equal_voxels >= 0.9999
    files: dict[str, str] = {"preparation.json": ""}
    program = torch.export.load(done.folder / "model.pt2", extra_files=files).module()
    assert json.loads(files["preparation.json"]) == json.loads((done.folder / "preparation.json").read_text())
    x = torch.rand(1, 1, 64, 32)
    with torch.inference_mode():
        torch.testing.assert_close(program(x), app.load_run(run).method.eval().predict(x), atol=1e-6, rtol=0)
    assert list(tmp_path.iterdir()) == [done.folder]  # nothing temporary stays


def test_folds_are_averaged_unless_one_is_named(folds: Path, tmp_path: Path):
    x = torch.rand(1, 1, 32, 32)
    both, one = (
        load_safetensors(app.export(folds, "safetensors", tmp_path / name, fold=fold).folder)
        for name, fold in (("both", None), ("one", "fold1"))
    )
    runs = [app.load_run(folds / name).method.eval() for name in ("fold0", "fold1")]
    with torch.inference_mode():
        own = [method.predict(x) for method in runs]
        torch.testing.assert_close(both(x), (own[0] + own[1]) / 2)
        assert torch.equal(one(x), own[1]) and not torch.allclose(own[0], own[1])
    assert (
        "The average" in (tmp_path / "both" / "MODEL_CARD.md").read_text()
        or "averaged" in (tmp_path / "both" / "MODEL_CARD.md").read_text()
    )
    with pytest.raises(OptionError, match=r"has no fold7.*fold0|has no fold7\. Did you mean"):
        app.export(folds, "safetensors", tmp_path / "none", fold="fold7")


def test_an_export_is_not_overwritten_unless_forced(run: Path, tmp_path: Path):
    out = tmp_path / "out"
    first = app.export(run, "safetensors", out)
    before = (out / "model_card.json").stat().st_mtime_ns
    with pytest.raises(ExportError, match="--force"):
        app.export(run, "safetensors", out)
    assert app.export(run, "safetensors", out, force=True).files == first.files
    assert (out / "model_card.json").stat().st_mtime_ns != before


def test_a_folder_of_other_things_is_never_replaced(run: Path, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match="holds no export"):
        app.export(run, "safetensors", tmp_path, force=True)
    assert (tmp_path / "thesis.tex").exists()


def test_a_failed_check_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(write.safetensors, "load_safetensors", lambda folder: lambda x: x[:, :1].repeat(1, 3, 1, 1))
    with pytest.raises(ExportError, match="differ by up to"):
        app.export(run, "safetensors", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_old_one(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    done = app.export(run, "safetensors", tmp_path / "out")
    monkeypatch.setattr(check, "PROBABILITY_LIMIT", -1.0)
    with pytest.raises(ExportError):
        app.export(run, "safetensors", tmp_path / "out", force=True)
    assert load_safetensors(done.folder) is not None and list(tmp_path.iterdir()) == [done.folder]


def test_without_the_data_the_check_runs_on_noise_and_says_so(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def gone(root: Path):
        raise DataError("the disk is in another country")

    monkeypatch.setattr(exporting, "read_raw", gone)
    done = app.export(run, "safetensors", tmp_path / "out")
    assert not done.checked.real and any("noise" in note for note in done.notes)
    card = (done.folder / "MODEL_CARD.md").read_text()
    assert "in another country" in card and "reference and licence are unknown" in card


def test_an_unknown_format_is_named_with_the_nearest(run: Path, tmp_path: Path):
    with pytest.raises(ExportError, match=r"no format 'onxx'.*'onnx'"):
        app.export(run, "onxx", tmp_path / "out")


def test_exporting_changes_neither_the_run_nor_its_predictions(run: Path, tmp_path: Path):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    app.export(run, "safetensors", tmp_path / "out")
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_the_command_says_what_it_wrote_and_how_to_use_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["tailseg", "export", str(run), "--format", "safetensors", "--out", str(out)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().out
    assert stop.value.code == 0, said
    for words in (str(out), "model.safetensors", "largest difference of a probability", "load_safetensors"):
        assert words in said
    assert not np.isnan(json.loads((out / "model_card.json").read_text())["check"]["probability_difference"])
