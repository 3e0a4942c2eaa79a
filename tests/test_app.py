"""The verbs put together: here what a companion of a method needs; the rest is seen in test_cli and test_resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_tiny, tiny_recipe
from torch import Tensor

from tailseg import app
from tailseg.core import Batch
from tailseg.data.companions import CompanionStore
from tailseg.methods.dinomix import DINOMix
from tailseg.options import OptionError
from tailseg.parts.slice_features import SliceFeatures
from tailseg.recipe import Recipe, load_recipe
from tailseg.runtime import Runtime, RuntimeOptions
from tailseg.train.checkpoint import load_checkpoint
from tailseg.train.fit import Trainer

pytest.importorskip("transformers", reason="DINOv3 needs the extra tailseg[dino]")


def cached_recipe(root: Path, *overrides: str, spatial_dims: int = 3) -> Recipe:
    data = root / "tiny"
    tree = tiny_recipe(data if data.exists() else make_tiny(data), spatial_dims=spatial_dims, epochs=2)
    options: dict[str, Any] = {"teacher": "random-tiny", "features": "cached", "slice_size": 32, "slices": 2}
    tree["method"] = {"name": "dinomix", **options}
    return load_recipe(tree, overrides)


def cached(root: Path) -> list[str]:
    return sorted(path.parent.name for path in root.glob("stores/**/features-*.npy"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of every scan that the teacher is shown."""
    shapes: list[tuple[int, ...]] = []
    encode = SliceFeatures.encode

    def watched(self: SliceFeatures, scans: Any) -> Any:
        def seen(scan: Tensor) -> Tensor:
            shapes.append(tuple(scan.shape))
            return scan

        return encode(self, map(seen, scans))

    monkeypatch.setattr(SliceFeatures, "encode", watched)
    return shapes


class Killed(BaseException):
    pass


@pytest.mark.parametrize("spatial_dims", [3, 2])
def test_a_run_on_cached_features_resumes_bit_for_bit(
    spatial_dims: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[tuple[int, ...]]
):
    recipe = cached_recipe(tmp_path, "data.augment.flip=[h]", spatial_dims=spatial_dims)
    unbroken, broken = app.train(recipe, tmp_path / "unbroken"), tmp_path / "broken"
    assert len(encoded) == 4 and cached(tmp_path) == ["a", "b", "u0", "u1"]  # neither validation nor test scans
    train_step = Trainer._train_step

    def deadly(self: Trainer) -> None:
        if self.step == 6:
            raise Killed
        train_step(self)

    monkeypatch.setattr(Trainer, "_train_step", deadly)
    with pytest.raises(Killed):
        app.train(recipe, broken)
    monkeypatch.setattr(Trainer, "_train_step", train_step)
    assert load_checkpoint(broken / "last.pt")["step"] == 4
    app.train(recipe, broken, resume=True)
    assert len(encoded) == 4  # the other runs found them in the store
    first, second = (load_checkpoint(run / "last.pt")["method"] for run in (unbroken, broken))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_batches_bring_what_the_teacher_says_of_their_patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    batches: list[Batch] = []
    step = DINOMix.step

    def watched(self: DINOMix, batch: Batch, progress: Any) -> Any:
        batches.append(batch)
        return step(self, batch, progress)

    monkeypatch.setattr(DINOMix, "step", watched)
    app.train(cached_recipe(tmp_path, "train.epochs=1"), tmp_path / "run")
    assert all(batch.features is not None and batch.features.shape == (4, 32, 2, 2, 2) for batch in batches)
    shapes = {np.load(path).shape for path in tmp_path.glob("stores/**/features-*.npy")}
    assert shapes == {(22, 2, 3, 32)}  # 20 x 24 voxels, two places for each 16


def test_another_teacher_is_asked_anew(tmp_path: Path, encoded: list[tuple[int, ...]]):
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.DINOv3ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_register_tokens=4
    )
    for seed in (0, 1):  # the same folder with other weights
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformers.DINOv3ViTModel(config).save_pretrained(tmp_path / "teacher")
        recipe = cached_recipe(tmp_path, f"method.teacher={tmp_path / 'teacher'}", "train.epochs=1")
        app.train(recipe, tmp_path / f"run{seed}")
        assert len(encoded) == len(cached(tmp_path)) == 4 * (seed + 1)


@pytest.mark.parametrize("turn", ["data.augment.rotate=10", "data.augment.rot90=true"])
def test_turned_patches_are_refused_before_the_run(turn: str, tmp_path: Path, encoded: list[tuple[int, ...]]):
    with pytest.raises(OptionError, match=r"data\.augment\.rotate(.|\n)*method\.features=live"):
        app.train(cached_recipe(tmp_path, turn), tmp_path / "run")
    assert not encoded and not (tmp_path / "run" / "recipe.yaml").exists()


def test_the_first_of_several_processes_asks_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By their order: each meets the others after the first is done, and none but it builds."""
    recipe = cached_recipe(tmp_path)
    store, dataset, split = app.prepare(recipe)
    training = store.for_training(split)
    task = app.make_task(recipe, training, dataset, split)
    build = app.make_build(recipe.network.name, recipe.network.options, task)
    method = app.make_method(recipe.method.name, recipe.method.options, task, build)
    events: list[str] = []
    monkeypatch.setattr(torch.distributed, "barrier", lambda: events.append("barrier"))
    monkeypatch.setattr(CompanionStore, "build", lambda self, cases, *rest: events.append(f"build {len(cases)}"))
    for rank, expected in ((0, ["build 4", "barrier"]), (1, ["barrier"])):
        events.clear()
        runtime = Runtime(torch.device("cpu"), RuntimeOptions(precision="fp32"), rank, 2)
        assert app._companions_once(recipe, runtime, method, training, split, app.silent) is not None
        assert events == expected


def test_without_unlabelled_patches_their_scans_are_not_encoded(tmp_path: Path):
    app.train(cached_recipe(tmp_path, "data.batch=[2,0]", "train.epochs=1"), tmp_path / "run")
    assert cached(tmp_path) == ["a", "b"]
