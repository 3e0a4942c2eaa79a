"""A run that is killed goes on bit for bit; what does not belong to it is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.examples import METHODS, fit_recipe
from tiny import make_tiny, tiny_recipe

from tailseg import app
from tailseg.options import OptionError
from tailseg.recipe import Recipe, load_recipe
from tailseg.train.checkpoint import CheckpointError, load_checkpoint
from tailseg.train.fit import Trainer
from tailseg.train.metrics_log import read_metrics

KILLED_AT_STEP_10 = """
import os, signal, sys
from pathlib import Path
from tailseg import app
from tailseg.recipe import load_recipe
from tailseg.train.fit import Trainer

train_step = Trainer._train_step

def deadly(self):
    if self.step == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    train_step(self)

Trainer._train_step = deadly
app.train(load_recipe(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def assert_same(first: Any, second: Any, where: str = "checkpoint") -> None:
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list):
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert first == second, where


class Killed(BaseException):
    pass


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_broken_off_run_resumes_bit_for_bit(
    name: str, spatial_dims: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tree = tiny_recipe(make_tiny(tmp_path / "tiny"), name, spatial_dims=spatial_dims)
    recipe = load_recipe(fit_recipe(tree, name))
    unbroken, broken = app.train(recipe, tmp_path / "unbroken"), tmp_path / "broken"
    train_step = Trainer._train_step

    def deadly(self: Trainer) -> None:
        if self.step == 10:
            raise Killed
        train_step(self)

    monkeypatch.setattr(Trainer, "_train_step", deadly)
    with pytest.raises(Killed):
        app.train(recipe, broken)
    monkeypatch.undo()
    assert_resumes_like(recipe, broken, unbroken)


def test_a_run_killed_by_the_system_resumes_bit_for_bit(tmp_path: Path):
    recipe = load_recipe(tiny_recipe(make_tiny(tmp_path / "tiny"), "dhc"))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    unbroken, killed = app.train(recipe, tmp_path / "unbroken"), tmp_path / "killed"
    child = subprocess.run(
        [sys.executable, "-c", KILLED_AT_STEP_10, str(tmp_path / "recipe.yaml"), str(killed)], check=False
    )
    assert child.returncode == -9
    assert_resumes_like(recipe, killed, unbroken)


def assert_resumes_like(recipe: Recipe, broken: Path, unbroken: Path) -> None:
    assert load_checkpoint(broken / "last.pt")["step"] == 8
    app.train(recipe, broken, resume=True)
    for checkpoint in ("last.pt", "best.pt"):
        assert_same(load_checkpoint(unbroken / checkpoint), load_checkpoint(broken / checkpoint))
    lines = [read_metrics(run / "metrics.jsonl") for run in (unbroken, broken)]
    validations = [[line for line in run if line["kind"] == "validation"] for run in lines]
    for line in (*validations[0], *validations[1]):
        assert line.pop("seconds") > 0  # the one thing that need not be the same
    assert validations[0] == validations[1]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of one epoch."""
    recipe = load_recipe(tiny_recipe(make_tiny(tmp_path / "tiny"), "supervised", epochs=1))
    return app.train(recipe, tmp_path / "run")


def test_epochs_may_grow(run: Path):
    app.train(load_recipe(run / "recipe.yaml", ["train.epochs=2"]), run, resume=True)
    assert load_checkpoint(run / "last.pt")["step"] == 8


def test_another_recipe_is_refused_by_key(run: Path):
    with pytest.raises(OptionError, match=r"trained with another train\.lr"):
        app.train(load_recipe(run / "recipe.yaml", ["train.lr=0.5"]), run, resume=True)


def test_a_run_is_never_overwritten(run: Path):
    with pytest.raises(OptionError, match="holds a run already; add --resume"):
        app.train(load_recipe(run / "recipe.yaml"), run)


def test_a_split_that_changed_is_refused(run: Path):
    recipe = load_recipe(run / "recipe.yaml", ["train.epochs=2"])
    path = recipe.data.root / "splits.json"
    splits = json.loads(path.read_text())
    splits["tiny"]["test"], splits["tiny"]["val"] = ["v1"], ["v2", "t"]
    path.write_text(json.dumps(splits))
    with pytest.raises(CheckpointError, match="was trained on other cases: the split has changed"):
        app.train(recipe, run, resume=True)


def test_a_run_killed_before_its_first_checkpoint_starts_again(run: Path):
    (run / "last.pt").unlink()
    app.train(load_recipe(run / "recipe.yaml"), run)
    assert load_checkpoint(run / "last.pt")["step"] == 4
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [4, 4]


def test_nothing_to_resume_is_said(tmp_path: Path):
    recipe = load_recipe(tiny_recipe(make_tiny(tmp_path / "tiny"), "supervised"))
    with pytest.raises(OptionError, match=r"holds no last\.pt to resume from"):
        app.train(recipe, tmp_path / "nowhere", resume=True)


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None])
def test_a_damaged_checkpoint_is_named(run: Path, damage: bytes | None):
    path = run / "last.pt"
    path.write_bytes(path.read_bytes()[:2000] if damage is None else damage)
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged or no TailSeg checkpoint"):
        app.load_run(run, "last")


def test_a_checkpoint_of_another_task_is_refused(run: Path):
    state = load_checkpoint(run / "last.pt")
    state["task"]["classes"] = ["background", "left", "right"]
    torch.save(state, run / "last.pt")
    with pytest.raises(CheckpointError, match="was trained for classes"):
        app.train(load_recipe(run / "recipe.yaml", ["train.epochs=2"]), run, resume=True)


def test_a_checkpoint_says_what_made_it(run: Path):
    state = load_checkpoint(run / "last.pt")
    assert load_recipe(state["recipe"]).to_dict() == load_recipe(run / "recipe.yaml").to_dict()
    assert state["versions"]["torch"] == torch.__version__
    assert len(state["split"]) == 64
