"""The loop: schedules, accumulation, what happens when a loss breaks or somebody stops it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tiny, tiny_recipe

from tailseg import app
from tailseg.core import Progress
from tailseg.data.splits import Split
from tailseg.recipe import Recipe, load_recipe
from tailseg.train.checkpoint import load_checkpoint
from tailseg.train.fit import NonFiniteLoss, Trainer, TrainOptions, learning_rate
from tailseg.train.metrics_log import read_metrics


def recipe_of(tmp_path: Path, method: str = "dhc", **train: Any) -> Recipe:
    return load_recipe(tiny_recipe(make_tiny(tmp_path / "tiny"), method, **train))


def test_poly_schedule_is_dhcs():
    options = TrainOptions(lr=0.03, epochs=300)

    def lr(epoch: int) -> float:
        return learning_rate(options, Progress(8 * epoch, 2400, 8))

    assert lr(0) == lr(1) == 0.03  # the rate is set after an epoch, so the second one still uses the first
    assert [lr(2), lr(151), lr(300)] == pytest.approx([0.029909985, 0.016076602, 0.000176894], abs=1e-9)


def test_cosine_and_constant_schedules_by_step():
    half = Progress(50, 100, 10)
    assert learning_rate(TrainOptions(lr=1, schedule="cosine", schedule_unit="step"), half) == pytest.approx(0.5)
    assert learning_rate(TrainOptions(lr=1, schedule="constant"), half) == 1
    assert learning_rate(TrainOptions(lr=1, schedule_unit="step"), half) == pytest.approx(0.5**0.9)


def test_a_broken_loss_stops_the_run_and_names_the_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train_step = Trainer._train_step

    def poisoned(self: Trainer) -> None:
        if self.step == 6:
            for parameter in self.method.parameters():
                parameter.data.fill_(torch.nan)
        train_step(self)

    monkeypatch.setattr(Trainer, "_train_step", poisoned)
    with pytest.raises(NonFiniteLoss, match=r"Loss 'sup' is nan.* at step 6, on patches of (a, )?(b, )?u0, u1\."):
        app.train(recipe_of(tmp_path), tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "bad_batch.pt", weights_only=True)
    assert saved["x_l"].shape == (2, 1, 16, 16, 16) and set(saved["cases"]) <= {"a", "b", "u0", "u1"}
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    assert last["step"] == 4 and all(torch.isfinite(value).all() for value in last["method"].values())


def test_a_stopped_run_leaves_a_checkpoint_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train_step = Trainer._train_step

    def interrupted(self: Trainer) -> None:
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        train_step(self)

    recipe = recipe_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupted)
        app.train(recipe, tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 6
    app.train(recipe, tmp_path / "run", resume=True)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 12


def test_accumulated_batches_make_one_step(tmp_path: Path):
    run = app.train(recipe_of(tmp_path, "supervised", accumulate=3, clip_norm=0.5, epochs=1), tmp_path / "run")
    state = load_checkpoint(run / "last.pt")
    assert state["step"] == 4
    assert state["optimizer"]["param_groups"][0]["lr"] == 0.03


@pytest.mark.filterwarnings("ignore:This device only emulates bf16")
@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "fp16"}, {"optimizer": "adamw", "lr": 0.001}])
def test_other_precisions_and_optimisers_train(tmp_path: Path, options: dict[str, Any]):
    run = app.train(recipe_of(tmp_path, epochs=1, log_every=1, **options), tmp_path / "run")
    losses = [line["losses"]["sup"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]
    assert len(losses) == 4 and all(loss is not None for loss in losses)


def test_zero_unlabelled_cases_and_no_validation_train(tmp_path: Path):
    tree = tiny_recipe(make_tiny(tmp_path / "tiny", unlabelled=0), "dhc", epochs=1)
    run = app.train(load_recipe(tree), tmp_path / "run")
    assert load_checkpoint(run / "last.pt")["step"] == 4


def test_training_never_reads_a_test_scan(tmp_path: Path):
    recipe = recipe_of(tmp_path, "supervised", epochs=1)
    for folder, name in (("imagesTr", "t_0000.nii.gz"), ("labelsTr", "t.nii.gz")):
        (tmp_path / "tiny" / folder / name).write_bytes(b"whoever opens this fails")
    app.train(recipe, tmp_path / "run")


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = recipe_of(tmp_path, "supervised", epochs=1)
    run = app.train(recipe, tmp_path / "run")
    before = (run / "last.pt").read_bytes()
    write_bytes = Path.write_bytes

    def full(path: Path, data: Any) -> int:
        if path.name.endswith("last.pt"):
            write_bytes(path, bytes(data[:100]))
            raise OSError(28, "No space left on device")
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match=r"last\.pt could not be written: the disk is full"):
        app.train(load_recipe(run / "recipe.yaml", ["train.epochs=2"]), run, resume=True)
    assert (run / "last.pt").read_bytes() == before
    assert not list(run.glob(".*tmp*"))


@pytest.mark.parametrize(
    ("batch", "unlabelled", "steps"), [((2, 2), 16, 8), ((4, 0), 16, 8), ((12, 12), 134, 12), ((2, 2), 0, 1)]
)
def test_labelled_only_runs_take_as_many_steps(batch: tuple[int, int], unlabelled: int, steps: int, tmp_path: Path):
    tree = tiny_recipe(tmp_path, steps_per_epoch=None)
    tree["data"]["batch"] = list(batch)
    split = Split("s", ("a", "b"), tuple(f"u{index}" for index in range(unlabelled)))
    assert app.steps_per_epoch(load_recipe(tree), split) == steps
