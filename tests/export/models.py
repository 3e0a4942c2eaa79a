"""Models to export that nothing was trained for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from methods.examples import OPTIONS
from tiny import tiny_recipe

from tailseg.checks import example_task, make_example
from tailseg.components import find
from tailseg.core import Method
from tailseg.data.splits import Split
from tailseg.export.trained import TrainedModel
from tailseg.recipe import load_recipe


def example(name: str, spatial_dims: int, network: str = "unet", width: int = 2, seed: int = 0) -> Method:
    """On networks without dropout, in evaluation mode."""
    task = example_task(3, 1, spatial_dims)
    return make_example(find("methods", name), task, network, width, seed, **OPTIONS.get(name, {})).eval()


def model(*methods: Method, prepare: dict[str, Any] | None = None, data: dict[str, Any] | None = None) -> TrainedModel:
    """Of untrained methods, with no data set to be found."""
    tree = tiny_recipe(Path("nowhere") / "here", "supervised", spatial_dims=methods[0].task.spatial_dims)
    tree["data"]["patch_size"] = [32] * methods[0].task.spatial_dims
    tree["data"] |= ({"prepare": prepare} if prepare else {}) | (data or {})
    split = Split("made up", ("a", "b"), ("u",), ("v",), ("t",))
    count = len(methods)
    return TrainedModel(
        source=Path("runs"),
        folders=tuple(Path(f"runs/fold{i}") for i in range(count)),
        recipes=(load_recipe(tree),) * count,
        methods=methods,
        splits=(split,) * count,
        steps=(7,) * count,
        label_values=(0, 1, 5),
        checkpoint="best",
        versions={"tailseg": "0", "torch": "0"},
        dataset=None,
        unreachable="it was never made",
    )
