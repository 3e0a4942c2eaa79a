from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from export.models import example, model
from safetensors.torch import load_file, save_file

from tailseg.export import extras, safetensors
from tailseg.export.network import PredictionNetwork
from tailseg.export.safetensors import load_safetensors
from tailseg.export.trained import ExportError, TrainedModel


def written(folder: Path, each: TrainedModel) -> Path:
    network = PredictionNetwork(each.methods)
    safetensors.write(folder, each, network, network.drop_unused())
    return folder


@pytest.fixture
def supervised() -> TrainedModel:
    method = example("supervised", 2)
    each = model(method)
    # as the recipe says: the file is all that load_safetensors has
    object.__setattr__(each, "recipes", (each.recipe.model_copy(update={"network": width_two(each)}),))
    return each


def width_two(each: TrainedModel):
    return each.recipe.network.model_copy(update={"name": "unet", "width": 2, "dropout": 0.0})


def test_what_is_loaded_predicts_the_same(supervised: TrainedModel, tmp_path: Path):
    network = load_safetensors(written(tmp_path, supervised))
    x = torch.rand(3, 1, 48, 32)
    with torch.inference_mode():
        assert torch.equal(network(x), supervised.methods[0].predict(x))
    assert not network.training


def test_the_file_holds_only_what_predicts(supervised: TrainedModel, tmp_path: Path):
    names = load_file(written(tmp_path, supervised) / safetensors.WEIGHTS)
    assert names and not any("num_batches_tracked" in name for name in names)


def test_weights_of_another_network_are_refused(supervised: TrainedModel, tmp_path: Path):
    file = written(tmp_path, supervised) / safetensors.WEIGHTS
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "head" not in name}, file)
    with pytest.raises(ExportError, match=r"holds other tensors than config\.json"):
        load_safetensors(tmp_path)


def test_a_folder_without_an_export_is_named(tmp_path: Path):
    with pytest.raises(ExportError, match=rf"{tmp_path}.*cannot be read"):
        load_safetensors(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"tailseg_network": 99}))
    with pytest.raises(ExportError, match="no format that this version"):
        load_safetensors(tmp_path)


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"needs safetensors.*tailseg\[export\]"):
        safetensors.require()
