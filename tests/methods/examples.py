"""Every built-in method, and what some of them must be told before they run on an example."""

from __future__ import annotations

from typing import Any

from tailseg.checks import accepted_batch, example_task, make_example
from tailseg.components import builtin_names, find

METHODS = builtin_names("methods")
OPTIONS: dict[str, dict[str, Any]] = {
    # a fresh network is confident nowhere; what it learns from pseudo-labels would not be tested
    "crossmatch": {"tau": 0.0, "loss_weights": [1.0, 0.25, 0.25]},
    "dinomix": {"teacher": "random-tiny", "slice_size": 32, "slices": 2},
    "fixmatch": {"tau": 0.0},
    "magicnet": {"cubes": 2},
    "unimatch": {"tau": 0.0, "loss_weights": [1.0, 0.25, 0.25]},
}


def fit_recipe(tree: dict[str, Any], name: str, *, side: int = 16, ranks: int = 1) -> dict[str, Any]:
    """The recipe with the method, the batch and the patches (of at least this side) that the method accepts."""
    dims = len(tree["data"]["patch_size"])
    batch = accepted_batch(make_example(find("methods", name), example_task(3, 1, dims), **OPTIONS.get(name, {})))
    tree["method"] = {"name": name, **OPTIONS.get(name, {})}
    tree["data"]["batch"] = [len(batch.x_l) * ranks, len(batch.x_u) * ranks]
    tree["data"]["patch_size"] = [max(side, batch.x_l.shape[-1])] * dims
    tree["data"]["pad"] = True  # the scans are smaller than some of these patches
    return tree
