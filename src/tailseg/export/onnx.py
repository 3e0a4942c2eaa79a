"""ONNX: one file, run by ONNX Runtime and by much that is not Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailseg.export import extras
from tailseg.export.network import AXES, PredictionNetwork, Traced, quiet

FILE = "model.onnx"


def require() -> None:
    """Raises ExportError naming the extra."""
    extras.require("export", "onnx", "onnx", "onnxscript", "onnxruntime")


def write(folder: Path, network: PredictionNetwork, traced: Traced, preparation: dict[str, Any]) -> dict[str, Any]:
    """Write folder/model.onnx, weights and description inside; returns facts for the card."""
    onnx = extras.load("onnx", "export", "onnx")
    with quiet():
        program: Any = torch.onnx.export(
            traced.program, dynamo=True, verbose=False, input_names=["patch"], output_names=["probabilities"]
        )
    model = program.model_proto
    _name_axes(model, network.task.spatial_dims)
    onnx.helper.set_model_props(model, {"preparation": json.dumps(preparation)})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(folder / FILE))
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return {"opset": opset, "ir_version": model.ir_version, "onnx": onnx.__version__}


def _name_axes(model: Any, spatial_dims: int) -> None:
    """Axes of free size are called by their meaning in place of the tracer's symbols."""
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        for place, name in ((0, "batch"), *enumerate(AXES[-spatial_dims:], start=2)):
            if dims[place].dim_param:
                dims[place].dim_param = name


def load(folder: Path) -> Callable[[Tensor], Tensor]:
    """Runs the file with ONNX Runtime on the CPU."""
    runtime = extras.load("onnxruntime", "export", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(folder / FILE), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"patch": x.contiguous().numpy()})[0])
