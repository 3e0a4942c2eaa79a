"""The main job on synthetic abdomens, from nothing to a report: `tailseg demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tailseg.data.phantom import make_phantom
from tailseg.files import write_text
from tailseg.running import Finished, Progress, RunSettings, Say, run


def demo_recipe(data: Path, stores: Path) -> dict[str, Any]:
    """DHC on the phantom, small enough for two CPU cores."""
    return {
        "data": {
            "root": str(data),
            "split": "phantom",
            "prepare": {
                "spacing": [5.0, 5.0, 5.0],
                "intensity": {"name": "window", "low": -75, "high": 275, "rescale": "window"},
            },
            "store": str(stores),
            "patch_size": [32, 48, 48],
            "batch": [2, 2],
            "foreground": 0.5,
        },
        "network": {"name": "vnet", "width": 8},
        "method": {"name": "dhc"},
        "train": {"epochs": 100, "lr": 0.03, "precision": "auto", "validate_every": 20, "checkpoint_every": 20},
    }


def make_demo_data(out: Path) -> tuple[Path, Path]:
    """The phantom and a recipe for it, in out: (data set, recipe). What is there already stays."""
    data, recipe = out / "phantom", out / "phantom.yaml"
    make_phantom(data)
    if not recipe.exists():
        tree = demo_recipe(data.resolve(), (out / "stores").resolve())
        write_text(recipe, yaml.safe_dump(tree, sort_keys=False))
    return data, recipe


def run_demo(out: Path, say: Say, progress: Progress) -> Finished:
    """Make the phantom and run DHC on it, with the labelled-only reference; a second call goes on, or finds it done."""
    say("making synthetic abdomens: CT with 13 organs, a few scans labelled")
    data, recipe = make_demo_data(out)
    settings = RunSettings(data=str(data), recipe=str(recipe.resolve()), store=str(out / "stores"))
    return run(settings, out / "run", workers=2, say=say, progress=progress)
