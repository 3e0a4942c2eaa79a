"""Two processes train what one would with the same global batch, and never drift apart."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_tiny, tiny_recipe

from tailseg import app
from tailseg.components import builtin_names
from tailseg.recipe import load_recipe
from tailseg.train.metrics_log import read_metrics

RANK = """
import os, sys
from pathlib import Path
import torch
from tailseg import app
from tailseg.recipe import load_recipe
from tailseg.train.fit import Trainer

fit = Trainer.fit

def fit_and_tell(self):
    fit(self)
    torch.save(self.method.state_dict(), Path(sys.argv[2]) / f"rank{os.environ['RANK']}.pt")

Trainer.fit = fit_and_tell
app.train(load_recipe(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_on_two_ranks(recipe_file: Path, folder: Path) -> None:
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", RANK, str(recipe_file), str(folder)]
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]


def losses(run: Path) -> list[dict[str, float]]:
    return [line["losses"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]


@pytest.mark.parametrize(
    ("name", "norm"), [*((name, "instance") for name in builtin_names("methods")), ("dhc", "batch")]
)
def test_two_ranks_follow_one(name: str, norm: str, tmp_path: Path):
    tree = tiny_recipe(make_tiny(tmp_path / "tiny"), name, epochs=1, log_every=1, lr=0.0005)
    tree["network"] |= {"norm": norm, "dropout": 0.0, "width": 4}
    tree["data"]["patch_size"] = [32, 32, 32]  # eight voxels at the bottom: InstanceNorm of one or two is chaotic
    tree["data"]["pad"] = True
    recipe = load_recipe(tree)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    train_on_two_ranks(tmp_path / "recipe.yaml", tmp_path / "two")
    first, second = (torch.load(tmp_path / "two" / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for key, value in first.items():
        assert torch.equal(value, second[key]), f"{key} drifted apart"
    if norm == "instance":  # BatchNorm's statistics are of a rank's share, so its losses differ
        app.train(recipe, tmp_path / "one")
        for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
            assert one == pytest.approx(two, rel=1e-4, abs=1e-6)
