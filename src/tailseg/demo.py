"""The main job on synthetic abdomens, from nothing to scored predictions: `tailseg demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from tailseg import app
from tailseg.data.phantom import make_phantom
from tailseg.evaluate.summary import summary_table
from tailseg.recipe import load_recipe


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
        "train": {"epochs": 160, "lr": 0.03, "precision": "auto", "validate_every": 20, "checkpoint_every": 20},
    }


def run_demo(out: Path, console: Console) -> None:
    """Make the phantom, train, predict the test scans and score them; everything lies in out afterwards."""
    data, run, predictions = out / "phantom", out / "run", out / "predictions"
    console.rule("1. Synthetic abdomens: CT with 13 organs, a few scans labelled")
    dataset = make_phantom(data)
    labelled = sum(case.label is not None for case in dataset.cases.values())
    console.print(f"{len(dataset.cases)} scans in {data}, {labelled} of them with a label file")
    console.rule("2. Prepare and train DHC on labelled and unlabelled scans")
    recipe = load_recipe(demo_recipe(data, out / "stores"))
    app.train(recipe, run, resume=(run / "last.pt").exists())  # a second call goes on, or finds it done
    console.rule("3. Predict the test scans, which training could not read")
    app.predict(run, "test", predictions)
    console.rule("4. Score them on their own grid")
    summaries = app.evaluate(predictions, data, ["native"])
    console.print(summary_table(summaries["native"]))
    console.print(
        f"\ndata          {data}\nrun           {run}  (recipe.yaml, metrics.jsonl, tensorboard, best.pt)\n"
        f"predictions   {predictions}\nscores        {predictions}/native.csv and native.json",
        highlight=False,
    )
