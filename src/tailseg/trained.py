"""Runs read back from their folders: what predict, export, report and run go on with."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from tailseg.components import make_build, make_method
from tailseg.core import Method, Task
from tailseg.data.splits import Split
from tailseg.options import OptionError
from tailseg.recipe import Recipe, load_recipe
from tailseg.train.checkpoint import load_checkpoint, load_task

RUN_FILE = "run.json"
"""Written by `tailseg run` into its folder, which holds the runs of several folds and of the reference."""


def versions() -> dict[str, str]:
    return {"tailseg": version("tailseg"), "torch": str(torch.__version__), "python": platform.python_version()}


def steps_per_epoch(recipe: Recipe, split: Split) -> int:
    """An epoch passes once over the unlabelled cases. A batch without unlabelled patches counts as if half of it were, so
    that the labelled-only reference takes as many steps as the methods it is held against."""
    if recipe.train.steps_per_epoch:
        return recipe.train.steps_per_epoch
    labelled, unlabelled = recipe.data.batch
    if split.unlabelled:
        return -(-len(split.unlabelled) // (unlabelled or max(labelled // 2, 1)))
    return -(-len(split.labelled) // labelled)


def trained_steps(folder: Path) -> tuple[int, int]:
    """(steps done at the last checkpoint, steps of the whole run). Raises CheckpointError or OptionError."""
    recipe = load_recipe(folder / "recipe.yaml")
    split = Split.from_dict(json.loads((folder / "split.json").read_text(encoding="utf-8")))
    return load_checkpoint(folder / "last.pt")["step"], recipe.train.epochs * steps_per_epoch(recipe, split)


def member_runs(folder: Path) -> list[Path]:
    """The run itself; or, of a folder that `tailseg run` made, the method's run of every fold. Raises OptionError."""
    if not (folder / RUN_FILE).exists():
        return [folder]
    folds = json.loads((folder / RUN_FILE).read_text(encoding="utf-8")).get("folds", [])
    members = [folder / fold for fold in folds]
    if not folds or not all((member / "last.pt").exists() for member in members):
        raise OptionError(f"The run in {folder} is not trained yet; call `tailseg run` again, which goes on with it.")
    return members


@dataclass(frozen=True)
class TrainedRun:
    """A run read back from its folder, ready to predict."""

    folder: Path
    recipe: Recipe
    task: Task
    method: Method
    split: Split
    label_values: tuple[int, ...]
    step: int
    checkpoint: Path

    @property
    def digest(self) -> str:
        """sha256 of the checkpoint file."""
        with self.checkpoint.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def load_run(folder: Path, checkpoint: str = "best") -> TrainedRun:
    """checkpoint: 'best' (on validation) or 'last'. Raises CheckpointError or OptionError."""
    if not folder.is_dir():
        raise OptionError(f"No run at {folder}; give the folder that `tailseg train --out` made.")
    path = folder / f"{checkpoint}.pt"
    if checkpoint == "best" and not path.exists() and (folder / "last.pt").exists():
        raise OptionError(f"{folder} has no best.pt: its split has no validation cases. Use --checkpoint last.")
    state = load_checkpoint(path)
    recipe, task = load_recipe(state["recipe"]), load_task(state["task"])
    build = make_build(recipe.network.name, recipe.network.options, task)
    method = make_method(recipe.method.name, recipe.method.options, task, build)
    method.load_state_dict(state["method"])
    split = Split.from_dict(json.loads((folder / "split.json").read_text(encoding="utf-8")))
    return TrainedRun(folder, recipe, task, method, split, tuple(state["label_values"]), state["step"], path)


def load_runs(folders: Sequence[Path], checkpoint: str = "best") -> list[TrainedRun]:
    """The runs in these folders; those of `tailseg run` hold several. Raises OptionError if they cannot be averaged."""
    members = [member for folder in folders for member in member_runs(folder)]
    for index, member in enumerate(members):
        if member.resolve() in [other.resolve() for other in members[:index]]:
            raise OptionError(f"The run {member} is given twice; give each once.")
    runs = [load_run(member, checkpoint) for member in members]
    first, *others = runs
    for other in others:
        for what, ours, theirs in (
            ("classes", first.task.classes, other.task.classes),
            ("values of the labels", first.label_values, other.label_values),
            ("number of channels", first.task.in_channels, other.task.in_channels),
            ("number of dimensions", first.task.spatial_dims, other.task.spatial_dims),
        ):
            if ours != theirs:
                raise OptionError(
                    f"Runs of different {what} cannot be averaged: {first.folder} has {ours}, {other.folder} has {theirs}; "
                    "predict with each alone."
                )
    return runs
