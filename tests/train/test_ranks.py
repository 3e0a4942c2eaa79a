"""Two processes train what one would with the same global batch, and never drift apart."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.examples import METHODS, OPTIONS, fit_recipe
from tiny import make_tiny, tiny_recipe

from tailseg import app
from tailseg.checks import LATER_STEP, accepted_batch, example_task, make_example
from tailseg.components import find
from tailseg.recipe import load_recipe
from tailseg.train.metrics_log import read_metrics

pytestmark = pytest.mark.timeout(900)  # the first test waits for the runs of all

RUNS = [*((name, 2, "instance") for name in METHODS), ("dhc", 3, "instance"), ("dhc", 2, "batch")]

RANK = """
import json, os, sys, traceback
from pathlib import Path
import torch
from tailseg import app
from tailseg.recipe import load_recipe
from tailseg.train.fit import Trainer

fit = Trainer.fit

def fit_and_tell(self):
    fit(self)
    torch.save(self.method.state_dict(), self.folder / f"rank{os.environ['RANK']}.pt")

Trainer.fit = fit_and_tell
for folder, port in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)  # each run is a process group of its own
    try:
        app.train(load_recipe(Path(folder) / "given.yaml"), Path(folder))
    except Exception:
        (Path(folder) / f"error{os.environ['RANK']}.txt").write_text(traceback.format_exc())
"""


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def small_recipe(data: Path, name: str, dims: int, norm: str) -> dict[str, Any]:
    # a fourth step multiplies what rounding did to the others by 100, on processors whose kernels follow the batch's size
    tree = tiny_recipe(data, name, spatial_dims=dims, epochs=1, steps_per_epoch=3, log_every=1, lr=0.0005)
    tree["network"] |= {"norm": norm, "dropout": 0.0, "width": 4}
    # several voxels at the bottom: InstanceNorm of one or two is chaotic
    return fit_recipe(tree, name, side=64 if dims == 2 else 32, ranks=2)


@pytest.fixture(scope="module")
def trained_on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one run for each of RUNS, all trained by one pair of processes."""
    root = tmp_path_factory.mktemp("ranks")
    data = make_tiny(root / "tiny")
    for name, dims, norm in RUNS:
        folder = root / f"{name}-{dims}-{norm}"
        folder.mkdir()
        (folder / "given.yaml").write_text(load_recipe(small_recipe(data, name, dims, norm)).to_yaml())
    folders = [str(root / f"{name}-{dims}-{norm}") for name, dims, norm in RUNS]
    jobs = json.dumps(list(zip(folders, free_ports(len(folders)), strict=True)))
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, jobs], env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in (0, 1)
    ]
    try:
        assert [rank.wait(timeout=600) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return root


def losses(run: Path) -> list[dict[str, float]]:
    return [line["losses"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]


def step_is_random(name: str) -> bool:
    """Whether noise, dropout of features or boxes make two steps from one state differ; then two ranks draw others than one."""
    model = make_example(find("methods", name), example_task(3, 1, 2), **OPTIONS.get(name, {}))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    totals = []
    for seed in (0, 1):
        model.load_state_dict(state)
        torch.manual_seed(seed)
        totals.append(torch.stack([*model(accepted_batch(model), LATER_STEP).losses.values()]).sum().item())
    return totals[0] != totals[1]


@pytest.mark.parametrize(("name", "dims", "norm"), RUNS)
def test_two_ranks_follow_one(name: str, dims: int, norm: str, trained_on_two_ranks: Path, tmp_path: Path):
    two = trained_on_two_ranks / f"{name}-{dims}-{norm}"
    errors = [path.read_text() for path in two.glob("error*.txt")]
    assert not errors, errors[0]
    first, second = (torch.load(two / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for key, value in first.items():
        assert torch.equal(value, second[key]), f"{key} drifted apart"
    # BatchNorm's statistics are of a rank's share, so its losses differ
    if norm == "instance" and not step_is_random(name):
        app.train(load_recipe(two / "given.yaml"), tmp_path / "one")
        for one, both in zip(losses(tmp_path / "one"), losses(two), strict=True):
            assert one == pytest.approx(both, rel=1e-4, abs=1e-6)
