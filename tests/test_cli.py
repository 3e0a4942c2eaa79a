"""The command line from a folder to scores, and what a person reads when something is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import typer
import yaml
from tiny import make_tiny, tiny_recipe

from tailseg import cli
from tailseg.components import component_options, method_card, method_cards

nib: Any = nibabel  # its stubs name neither load nor save


def run(*arguments: object) -> int:
    """Call the command in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tailseg", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(make_tiny(tmp_path / "tiny"), "cps", epochs=1)))
    return path


def test_prepare_train_predict_evaluate(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, predictions = tmp_path / "run", tmp_path / "predictions"
    assert run("prepare", recipe, "--workers", 1) == 0
    assert "6 cases prepared" in capsys.readouterr().out
    assert run("train", recipe, "seed=3", "--out", out, "--workers", 1) == 0
    assert yaml.safe_load((out / "recipe.yaml").read_text())["seed"] == 3
    assert run("predict", out, "test", predictions) == 0
    assert json.loads((predictions / "labels.json").read_text())["labels"] == {"background": 0, "box": 1, "core": 2}
    capsys.readouterr()
    assert run("evaluate", predictions, tmp_path / "tiny", "--protocol", "native", "--protocol", "dhc-p23") == 0
    shown = capsys.readouterr().out
    assert "4 references have no prediction and are not scored" in " ".join(shown.split())
    assert {path.name for path in predictions.iterdir()} == {
        *("t.nii.gz", "labels.json", "volumes.csv", "prediction.json"),
        *("native.csv", "native.json", "dhc-p23.csv", "dhc-p23.json"),
    }


def test_predictions_lie_on_the_scans_own_oblique_and_flipped_grid(recipe: Path, tmp_path: Path):
    assert run("train", recipe, "--out", tmp_path / "run", "--workers", 1) == 0
    scan = nib.load(tmp_path / "tiny" / "imagesTr" / "t_0000.nii.gz")
    turn = np.array([[0.0, -0.96, 0.28, 5.0], [1.9, 0.0, 0.0, -7.0], [0.0, 0.56, 1.92, 3.0], [0, 0, 0, 1]])
    turned = nib.Nifti1Image(np.asarray(scan.dataobj)[::-1], turn)
    nib.save(turned, tmp_path / "one_0000.nii.gz")
    assert run("predict", tmp_path / "run", tmp_path / "one_0000.nii.gz", tmp_path / "out", "--probabilities") == 0
    predicted = nib.load(tmp_path / "out" / "one.nii.gz")
    assert predicted.shape == turned.shape
    np.testing.assert_allclose(predicted.affine, turn, atol=1e-5)
    with np.load(tmp_path / "out" / "one_probs.npz") as file:
        probs = file["probs"]
    assert probs.shape == (3, *turned.shape[::-1])
    np.testing.assert_allclose(probs.astype(np.float32).sum(0), 1, atol=5e-3)


def test_several_channels_go_all_the_way(tmp_path: Path):
    tree = tiny_recipe(make_tiny(tmp_path / "tiny", channels=3), "dhc", spatial_dims=2, epochs=1)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert run("train", tmp_path / "recipe.yaml", "--out", tmp_path / "run", "--workers", 1) == 0
    source = tmp_path / "tiny" / "imagesTr"
    assert run("predict", tmp_path / "run", source, tmp_path / "out", "--checkpoint", "last") == 0
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 7


def test_predict_with_every_option(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for seed in (1, 2):
        assert run("train", recipe, f"seed={seed}", "--out", tmp_path / f"run{seed}", "--workers", 1) == 0
    out = tmp_path / "out"
    call = ("predict", tmp_path / "run1", "test", out, "--with", tmp_path / "run2", "--mirror", "lr, ap", "--clean-up")
    assert run(*call, "--uncertainty") == 0
    told = capsys.readouterr().out
    assert "never saw scans mirrored along w, h" in told and "clean-up: " in told and "volumes.csv" in told
    assert {path.name for path in (out / "uncertainty").iterdir()} == {"t_entropy.nii.gz", "t_disagreement.nii.gz"}
    identity = json.loads((out / "prediction.json").read_text())["identity"]
    assert identity["options"]["mirror"] == ["ap", "lr"] and len(set(identity["runs"])) == 2
    before = (out / "t.nii.gz").stat().st_mtime_ns
    assert run(*call, "--uncertainty") == 0 and (out / "t.nii.gz").stat().st_mtime_ns == before
    assert run(*call) == 2
    assert "made with another options" in capsys.readouterr().err
    assert run(*call, "--force") == 0 and not list((out / "uncertainty").iterdir())
    assert run("predict", tmp_path / "run1", "test", tmp_path / "seg", "--format", "dicom-seg") == 2
    assert "t_0000.nii.gz is no DICOM series folder" in capsys.readouterr().err
    assert run("predict", tmp_path / "run1", "test", out, "--format", "png") == 2
    assert run("predict", tmp_path / "run1", "test", tmp_path / "x", "--mirror", "rl") == 2
    assert "Did you mean 'lr'?" in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "No recipe at nowhere.yaml"),
        (["train", "{recipe}", "method=dch"], "No method is called 'dch'. Did you mean 'dhc'?"),
        (["train", "{recipe}", "data.split=tidy"], "Did you mean 'tiny'?"),
        (["train", "{recipe}", "data.patch_size=[64,64,64]"], "data.patch_size (64, 64, 64) exceeds case"),
        (["train", "{recipe}", "data.patch_size=[12,16,16]"], "must be multiples of 16"),
        (["train", "{recipe}", "train.device=tpu9"], "train.device 'tpu9'"),
        (["train", "{recipe}", "--resume", "--out", "nowhere"], "holds no last.pt to resume from"),
        (["predict", "nowhere", "test", "out"], "No run at nowhere"),
        (["evaluate", "nowhere", "{tiny}"], "nowhere"),
        (["evaluate", "{tiny}/labelsTr", "{tiny}", "--protocol", "nativ"], "Did you mean 'native'?"),
        (["list", "method"], "Did you mean 'methods'?"),
        (["show", "dch"], "Did you mean 'dhc'?"),
        (["report", "{tiny}"], "holds no run"),
        (["trian"], "No such command 'trian'"),
    ],
)
def test_errors_are_short_and_name_the_way_out(
    arguments: list[str], message: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    filled = [part.format(recipe=recipe, tiny=tmp_path / "tiny") for part in arguments]
    if filled[0] == "train" and "--out" not in filled:
        filled += ["--out", str(tmp_path / "run"), "--workers", "1"]
    code = run(*filled)
    error = capsys.readouterr().err
    assert code == 2 and message in error and "Traceback" not in error
    assert len(error.strip().splitlines()) <= 3
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_debug_shows_the_traceback(recipe: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tailseg", "train", str(recipe), "method=dch", "--debug"])
        with pytest.raises(ValueError, match="Did you mean 'dhc'"):
            cli.main()


def test_list_and_show_name_everything(recipe: Path, capsys: pytest.CaptureFixture[str]):
    assert run("list") == 0
    shown = capsys.readouterr().out
    for name in ("dhc", "cps", "supervised", "vnet", "unet", "dist", "diff", "dhc-p23", "native"):
        assert name in shown
    assert run("show", "dhc") == 0
    assert "method.cps_weight" in capsys.readouterr().out
    assert run("show", recipe, "train.lr=0.5") == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["lr"] == 0.5


def test_methods_are_listed_by_family_with_what_they_need(capsys: pytest.CaptureFixture[str]):
    assert run("list", "methods") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "family", "venue", "needs", "cost"]
    assert max(map(len, lines)) <= 80
    for card in method_cards():
        (line,) = [line for line in lines if line.split()[:1] == [card.name]]
        assert card.family in line and card.cost in line and card.needs[:8].strip() in line


@pytest.mark.parametrize("name", ["cps", "dhc", "supervised"])
def test_show_tells_the_whole_card_and_the_options(name: str, capsys: pytest.CaptureFixture[str]):
    assert run("show", name) == 0
    shown = re.sub(r"\s", "", capsys.readouterr().out)
    for field, text in asdict(method_card(name)).items():
        assert field in ("name", "venue") or re.sub(r"\s", "", text) in shown, f"{field} is not shown"
    for option in component_options("methods", name):
        assert f"method.{option.name}" in shown


def test_help_names_every_verb_with_its_first_sentences():
    code = (
        "import sys; sys.argv = ['tailseg', '--help']; import tailseg.cli as c\ntry: c.main()\nexcept SystemExit: pass\n"
        "assert not {'markdown_it', 'pygments'} & set(sys.modules), 'too much is imported'"
    )
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "COLUMNS": "300"},
    )
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^│ ([a-z-]+) +(\S.*?) +│$", done.stdout, re.MULTILINE))
    verbs = typer.main.get_command(cli.cli).commands
    assert rows.keys() == verbs.keys() | {"--help"}
    assert rows["train"] == "Train a recipe. Stop it with Ctrl-C whenever you like; --resume goes on bit for bit."


@pytest.mark.parametrize("verb", ["['--help']", "['list', 'methods']", "['show', 'dhc']", "['show', 'vnet']"])
def test_these_come_without_torch(verb: str):
    code = (
        f"import sys; sys.argv = ['tailseg', *{verb}]; import tailseg.cli as c\ntry: c.main()\nexcept SystemExit: pass"
    )
    check = f"{code}\nassert not {{'torch', 'scipy', 'nibabel', 'numpy'}} & set(sys.modules), 'too much is imported'"
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)


def test_teacher_check_says_what_the_weights_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    transformers: Any = pytest.importorskip("transformers", reason="DINOv3 needs the extra tailseg[dino]")
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    net = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**sizes, num_register_tokens=4))
    net.save_pretrained(tmp_path)
    (tmp_path / "LICENSE.md").write_text("# DINOv3 License\n")
    capsys.readouterr()
    assert run("teacher", "check", tmp_path) == 0
    captured = capsys.readouterr()
    told = dict(
        re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in captured.out.splitlines() if "  " in line.strip()
    )
    assert told["patch size"] == "16 pixels" and told["width"] == "24 channels"
    assert told["layers"] == "3" and told["register tokens"] == "4"
    assert told["parameters"] == f"{sum(p.numel() for p in net.parameters()):,}"
    assert told["licence"].startswith("DINOv3 License (LICENSE.md")
    assert f"can be used: method.teacher={tmp_path}" in captured.out.replace("\n", "")
    assert not captured.err and "RANDOM" not in captured.out


def test_teacher_check_says_how_to_get_weights_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("teacher", "check", tmp_path / "nowhere") == 1
    captured = capsys.readouterr()
    assert not captured.out and "Traceback" not in captured.err
    for part in (
        "there is no folder",
        "DINOv3 License",
        "hf auth login",
        "hf download",
        "random-tiny",
        "tailseg[dino]",
    ):
        assert part in captured.err
    (tmp_path / "config.json").write_text('{"model_type": "dinov3_convnext"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert run("teacher", "check", tmp_path) == 1
    assert "ConvNeXt" in capsys.readouterr().err


def test_teacher_check_says_that_the_tiny_teacher_is_random(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("transformers", reason="DINOv3 needs the extra tailseg[dino]")
    assert run("teacher", "check", "random-tiny") == 0
    assert "RANDOM WEIGHTS" in capsys.readouterr().out


def test_dinomix_without_a_teacher_is_refused_before_the_run(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for options in (["method=dinomix"], ["method=dinomix", "method.teacher=no/where"]):
        assert run("train", recipe, *options, "--out", tmp_path / "run", "--workers", 1) == 2
        assert "tailseg teacher check" in capsys.readouterr().err
        assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_a_run_with_a_random_teacher_carries_its_mark_to_the_scores(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("transformers", reason="DINOv3 needs the extra tailseg[dino]")
    method = "method={name: dinomix, teacher: random-tiny, slice_size: 16, slices: 1}"
    out, predictions = tmp_path / "run", tmp_path / "predictions"
    assert run("train", recipe, method, "--out", out, "--workers", 1) == 0
    assert "RANDOM TEACHER" in "".join(capsys.readouterr())
    assert '"random_teacher": 1.0' in (out / "metrics.jsonl").read_text()
    assert run("predict", out, "test", predictions) == 0
    assert run("evaluate", predictions, tmp_path / "tiny") == 0
    assert "RANDOM TEACHER" in json.loads((predictions / "native.json").read_text())["caveat"]
    checkpoint = (out / "last.pt").read_bytes()
    assert b"projector" in checkpoint and b"dino." not in checkpoint


def test_check_is_quiet_when_all_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = make_tiny(tmp_path / "tiny")
    assert run("check", root, "--workers", 1) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith("tiny: 7 cases, 5 labelled and 2 unlabelled")
    assert lines[-1] == "no problems in 7 cases" and max(map(len, lines)) <= 80 and len(lines) < 12


def test_check_tells_everything_at_once_and_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = make_tiny(tmp_path / "tiny")
    (root / "imagesTr" / "u0_0000.nii.gz").write_bytes(b"no scan")
    (root / "labelsTr" / "z.nii.gz").touch()
    assert run("check", root, "--workers", 1) == 1
    shown = capsys.readouterr().out
    assert "error orphan-label" in shown and "error unreadable" in shown and "way out:" in shown
    assert run("check", root, "--workers", 1, "--json") == 1
    captured = capsys.readouterr()
    tree = json.loads(captured.out)
    assert not captured.err and tree["errors"] == 2
    assert [problem["file"] for problem in tree["problems"]] == ["labelsTr/z.nii.gz", "imagesTr/u0_0000.nii.gz"]
    assert run("check", root / "nowhere") == 2
    assert "it does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("spatial_dims", [3, 2])
def test_a_planned_recipe_is_shown_trained_and_not_overwritten(
    spatial_dims: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    root = make_tiny(tmp_path / "tiny", unlabelled=3)
    if spatial_dims == 2:
        for path in root.glob("*Tr/*.nii.gz"):
            scan = nib.load(path)
            nib.save(nib.Nifti1Image(np.asarray(scan.dataobj)[..., 6:14], scan.affine), path)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert run("plan", root, "--hours", 0.05, "--workers", 1, "--device", "cpu") == 0
    told = capsys.readouterr().out
    assert "Imbalance" in told and "tailseg train tiny.yaml" in told
    splits = json.loads((tmp_path / "tiny_splits.json").read_text())
    assert list(splits) == [f"fold{i}" for i in range(5)] and splits["fold0"]["test"] == []
    assert run("show", "tiny.yaml") == 0
    tree = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    assert len(tree["data"]["patch_size"]) == spatial_dims and tree["data"]["split"] == "fold0"
    text = (tmp_path / "tiny.yaml").read_text()
    short = ["train.epochs=1", "train.steps_per_epoch=2", "train.threads=1", "network.width=4", "data.batch=[2,2]"]
    assert run("train", "tiny.yaml", *short, "--out", "run", "--workers", 1) == 0
    assert (tmp_path / "run" / "best.pt").exists()
    capsys.readouterr()
    assert run("plan", root, "--workers", 1) == 2
    assert "tiny.yaml exists; add --force" in capsys.readouterr().err
    assert (tmp_path / "tiny.yaml").read_text() == text
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_a_plan_for_a_named_split_looks_at_its_labelled_cases_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    root = make_tiny(tmp_path / "tiny")
    (root / "imagesTr" / "t_0000.nii.gz").write_bytes(b"a test case that nobody may read")
    out = tmp_path / "mine.yaml"
    options = ("--split", "tiny", "--hours", 0.05, "--device", "cpu", "--workers", 1)
    assert run("plan", root, *options, "--method", "mean_teacher", "--out", out) == 0
    tree = yaml.safe_load(out.read_text())
    assert tree["data"]["split"] == "tiny" and "split_file" not in tree["data"]
    assert tree["method"]["name"] == "mean_teacher"
    assert "2 labelled, 2 unlabelled, 2 validation, 1 test" in out.read_text()
    capsys.readouterr()
    assert run("plan", root, "--split", "tidy", "--force") == 2
    assert "Did you mean 'tiny'?" in capsys.readouterr().err
    assert run("plan", root, "--out", root / "recipe.yaml") == 2
    assert "never written to" in capsys.readouterr().err


def test_a_report_holds_a_run_against_its_labelled_only_reference(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    runs = tmp_path / "cps", tmp_path / "supervised"
    for folder, changed in zip(runs, ([], ["method=supervised", "data.batch=[4,0]"]), strict=True):
        assert run("train", recipe, *changed, "--out", folder, "--workers", 1) == 0
        for cases in ("test", "unlabelled"):
            assert run("predict", folder, cases, folder / "predictions" / cases) == 0
        assert run("evaluate", folder / "predictions" / "test", tmp_path / "tiny", "--workers", 1) == 0
    capsys.readouterr()
    assert run("report", *runs, "--cases", 2) == 0
    assert f"{runs[0] / 'report.html'} (" in capsys.readouterr().out.replace("\n", "")
    page = (runs[0] / "report.html").read_text(encoding="utf-8")
    assert "Nobody can tell from 1 test case" in page and "cps against" not in page
    assert "Unlabelled scans, predicted by cps" in page and "Volumes on the unlabelled scans" in page
    assert "two networks" in page and "million" in page and "torch" in page  # card, checkpoint, versions
    assert run("report", runs[0], "--out", tmp_path / "alone.html", "--protocol", "dhc-p23") == 0
    assert "--protocol dhc-p23" in (tmp_path / "alone.html").read_text(encoding="utf-8")
