"""Trained runs to export: of two folds, in 2D, in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import make_tiny, tiny_recipe

from tailseg import app
from tailseg.recipe import load_recipe


@pytest.fixture(scope="session")
def folds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of `tailseg run`: two runs that differ in the seed. Read it, and write elsewhere."""
    root = tmp_path_factory.mktemp("export")
    tree = tiny_recipe(make_tiny(root / "tiny"), "mean_teacher", spatial_dims=2, epochs=1)
    tree["data"]["patch_size"] = [32, 32]
    tree["data"]["pad"] = True
    tree["network"]["width"] = 2
    for seed in (0, 1):
        app.train(load_recipe(tree, [f"seed={seed}", "train.validate_every=1"]), root / "runs" / f"fold{seed}")
    (root / "runs" / "run.json").write_text(json.dumps({"tailseg_run": 1, "folds": ["fold0", "fold1"]}))
    return root / "runs"


@pytest.fixture(scope="session")
def run(folds: Path) -> Path:
    return folds / "fold0"
