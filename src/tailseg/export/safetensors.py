"""safetensors: the weights alone, without pickle, and what TailSeg needs to build the network around them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tailseg.components import make_build, make_method
from tailseg.export import extras
from tailseg.export.network import PredictionNetwork
from tailseg.export.trained import ExportError, TrainedModel
from tailseg.files import write_json
from tailseg.train.checkpoint import dump_task, load_task

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = 1


def require() -> None:
    """Raises ExportError naming the extra."""
    extras.require("export", "safetensors", "safetensors")


def write(folder: Path, model: TrainedModel, network: PredictionNetwork, left_out: Sequence[str]) -> None:
    """left_out: tensors of the methods that predict does not touch."""
    torch_files = extras.load("safetensors.torch", "export", "safetensors")
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}
    torch_files.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    members = [
        {"network": recipe.network.model_dump(mode="json"), "method": recipe.method.model_dump(mode="json")}
        for recipe in model.recipes
    ]
    write_json(
        folder / CONFIG,
        {
            "tailseg_network": FORMAT,
            "task": dump_task(model.task),
            "members": members,
            "left_out": list(left_out),
            "label_values": list(model.label_values),
        },
    )


def load_safetensors(folder: Path | str) -> PredictionNetwork:
    """The exported network, in evaluation mode: (B, C, *S) prepared patches -> (B, K, *S) probabilities.

    Raises ExportError if folder holds no such export, or one that this TailSeg does not build.
    """
    torch_files = extras.load("safetensors.torch", "export", "safetensors")
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{folder / CONFIG} cannot be read ({error}); give the folder that `tailseg export` wrote."
        ) from error
    if config.get("tailseg_network") != FORMAT:
        raise ExportError(
            f"{folder / CONFIG} is of no format that this version of TailSeg reads; export the run again."
        )
    network = PredictionNetwork([_method(config, member) for member in config["members"]])
    network.drop(config["left_out"])
    own, read = network.state_dict(), torch_files.load_file(folder / WEIGHTS)
    if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in read.items()}:
        raise ExportError(
            f"{folder / WEIGHTS} holds other tensors than {CONFIG} says; export the run again with this TailSeg."
        )
    for name, tensor in read.items():  # batch normalisation's own loading asks for counters that nothing predicts with
        own[name].copy_(tensor)
    return network.eval()


def _method(config: dict[str, Any], member: dict[str, Any]) -> Any:
    task = load_task(config["task"])
    network, method = dict(member["network"]), dict(member["method"])
    build = make_build(network.pop("name"), network, task)
    return make_method(method.pop("name"), method, task, build)
