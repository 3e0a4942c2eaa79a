from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx as onnx_package
import pytest
import torch
from export.models import example, model

from tailseg.export import extras, onnx
from tailseg.export.network import PredictionNetwork, trace
from tailseg.export.preparation import describe
from tailseg.export.trained import ExportError


def test_the_file_predicts_the_same_in_any_batch_and_size_and_describes_itself(tmp_path: Path):
    method = example("supervised", 2, "unet")
    each = model(method)
    network = PredictionNetwork(each.methods)
    network.drop_unused()
    traced = trace(network, (32, 32))
    description = describe(each, network, traced)
    facts = onnx.write(tmp_path, network, traced, description)
    run = onnx.load(tmp_path)
    for shape in ((1, 1, 32, 48), (3, 1, 48, 32)):
        x = torch.rand(*shape)
        with torch.inference_mode():
            torch.testing.assert_close(run(x), method.predict(x), atol=1e-5, rtol=0)
    file: Any = onnx_package.load(tmp_path / onnx.FILE)
    names = [dim.dim_param or dim.dim_value for dim in file.graph.input[0].type.tensor_type.shape.dim]
    assert names == ["batch", 1, "height", "width"]
    assert json.loads(file.metadata_props[0].value) == description
    assert facts["opset"] >= 18
    assert [path.name for path in tmp_path.iterdir()] == [onnx.FILE]  # the weights are inside


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else 1)
    with pytest.raises(ExportError, match=r"onnx needs onnxscript.*tailseg\[export\]"):
        onnx.require()
