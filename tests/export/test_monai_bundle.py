"""MONAI's way through a scan must be TailSeg's. Importing MONAI takes seconds."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export.models import example, model
from tiny import make_tiny, tiny_recipe

from tailseg import app
from tailseg.data.cases import Case, RawDataset
from tailseg.data.geometry import restore_labels
from tailseg.data.image import Image, write_image
from tailseg.data.phantom import make_case
from tailseg.data.preparation import Preparation, prepare_case
from tailseg.evaluate.sliding_window import _axis, sliding_window
from tailseg.export import extras, monai_bundle
from tailseg.export.network import Traced, reverse_axes
from tailseg.export.trained import ExportError, TrainedModel
from tailseg.recipe import load_recipe

CROPPED = {"crop": {"threshold": -300, "margin": 7}, "spacing": [6.1, None, 5.3]}
WINDOW = {"name": "window", "low": -160, "high": 240}
PREPARATIONS: dict[str, dict[str, Any]] = {
    "crop, spacing, window": {**CROPPED, "intensity": {**WINDOW, "rescale": "window"}},
    "crop, spacing, z-score": {**CROPPED, "intensity": {"name": "zscore"}},
    "grid, clipped extremes": {"grid": [20, None, 31], "intensity": {**WINDOW, "rescale": "volume"}},
    "axes as stored, nearest": {
        "orientation": "file",
        "grid": [None, 24, 24],
        "image_interpolation": "nearest",
        "intensity": {"name": "minmax"},
    },
    "percentiles": {"intensity": {"name": "percentiles", "low": 1, "high": 98}},
    "z-score of what is not 0": {"spacing": [4.0, 4.0, 4.0], "intensity": {"name": "zscore", "nonzero": True}},
}


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The bundle's own modules, importable as they are in a bundle."""
    (tmp_path / "bundle").mkdir()
    shutil.copytree(Path(monai_bundle.__file__).parent / "bundle_scripts", tmp_path / "bundle" / "scripts")
    monkeypatch.syspath_prepend(tmp_path / "bundle")
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
        del sys.modules[name]


def bundle_of(each: TrainedModel, folder: Path) -> Path:
    """Without the program."""
    folder.mkdir()
    no_program: Any = None
    monai_bundle.write(folder, each, Traced(no_program, each.recipe.data.patch_size, 16, (False, True)))
    return folder


@pytest.fixture(scope="module")
def parser() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's imports of others' deprecated names
        return pytest.importorskip("monai.bundle", reason="needs the extra tailseg[monai]").ConfigParser


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", PREPARATIONS)
@pytest.mark.parametrize("index", [0, 1, 2])  # stored as RAS, LAS and LPS, some of them oblique
def test_monai_prepares_as_tailseg_does_and_inverts_it(
    name: str, index: int, scripts: None, parser: Any, tmp_path: Path
):
    from monai.data.meta_tensor import MetaTensor

    scan, _ = make_case(index, shape=(20, 28, 36), spacing=(9.0, 8.0, 7.0))
    write_image(tmp_path / "scans" / "one_0000.nii.gz", scan)
    preparation = Preparation.model_validate(PREPARATIONS[name])
    each = model(example("supervised", 2), prepare=PREPARATIONS[name])
    config = monai_bundle.inference_config(each)
    config["dataset_dir"] = str(tmp_path / "scans")
    parsed = parser(config)
    data = parsed.get_parsed_content("dataset")[0]
    ours = prepare_case(Image(scan.array[None].astype(np.float32), scan.affine), None, preparation)
    theirs = np.asarray(data["image"]).transpose(0, 3, 2, 1)
    assert theirs.shape == ours.image.shape
    np.testing.assert_allclose(theirs, ours.image, atol=2e-4)
    np.testing.assert_allclose(np.asarray(data["image"].affine), ours.geometry.prepared_affine, atol=1e-4)

    probs = torch.rand(3, *ours.image.shape[1:], generator=torch.Generator().manual_seed(0))
    data["pred"] = MetaTensor(probs.permute(0, 3, 2, 1))
    for step in parsed.get_parsed_content("postprocessing").transforms[:2]:
        data = step(data)
    labels = np.asarray(data["pred"])[0].transpose(2, 1, 0)
    expected = restore_labels([(0, probs)], ours.geometry)
    assert labels.shape == expected.shape
    assert (labels == expected).mean() > 0.9999


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_bundle_has_every_property_that_monai_asks_of_inference(parser: Any, tmp_path: Path):
    from monai.bundle.properties import InferProperties, MetaProperties

    folder = bundle_of(model(example("supervised", 2)), tmp_path / "bundle")
    parsed = parser(json.loads((folder / "configs" / "inference.json").read_text()))
    parsed.read_meta(str(folder / "configs" / "metadata.json"))
    wanted = {name: each["id"] for name, each in (InferProperties | MetaProperties).items() if each["required"]}
    assert len(wanted) > 8 and not [name for name, place in wanted.items() if place not in parsed]
    for name in ("preprocessing", "postprocessing"):  # and where MONAI looks for those that it does not ask for
        assert parsed[InferProperties[name]["refer_id"]] == f"@{name}"
    told = json.loads((folder / "configs" / "metadata.json").read_text())
    assert told["network_data_format"]["outputs"]["pred"]["channel_def"] == {
        "0": "background",
        "1": "organ1",
        "2": "organ2",
    }
    assert told["network_data_format"]["inputs"]["image"]["spatial_shape"] == ["16*n", 32]  # (W, H)


@pytest.mark.parametrize(
    ("patch_size", "overlap"), [((96, 96, 96), 0.5), ((48, 16, 33), 0.3), ((7, 7, 7), 0.5), ((16, 16, 16), 0.0)]
)
def test_windows_move_as_tailsegs_do(patch_size: tuple[int, ...], overlap: float):
    made = monai_bundle._inferer(patch_size, overlap, "uniform", 1)
    strides = [int(side * (1 - each)) for side, each in zip(made["roi_size"], made["overlap"], strict=True)]
    assert strides == [_axis(500, side, overlap, "uniform").stride for side in patch_size[::-1]]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("weighting", ["uniform", "gaussian"])
@pytest.mark.parametrize("patch_size", [(8, 12, 10), (12, 10)])
def test_monais_windows_average_as_tailsegs_do(patch_size: tuple[int, ...], weighting: str, scripts: None, parser: Any):
    """Probabilities that depend on the place in the window; with little overlap, so that only outer parts of windows meet."""
    inferer = parser(
        {"imports": ["$import scripts"], "inferer": monai_bundle._inferer(patch_size, 0.3, weighting, 3)}
    ).get_parsed_content("inferer")
    ramp = torch.rand(*patch_size, generator=torch.Generator().manual_seed(0))
    image = torch.rand(1, 17, 25, 21, generator=torch.Generator().manual_seed(1))

    def predict(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x * ramp, 1 - x * ramp], 1)

    def turned(x: torch.Tensor) -> torch.Tensor:
        return reverse_axes(predict(reverse_axes(x)))

    slabs = sliding_window(predict, image, patch_size, overlap=0.3, weighting=weighting, batch_size=3, device="cpu")  # pyright: ignore[reportArgumentType]
    ours = torch.cat([slab for _, slab in slabs], 1)
    theirs = reverse_axes(inferer(reverse_axes(image[None]), turned))[0]
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


def test_pictures_are_refused():
    cases = {"a": Case("a", (Path("a.png"),), None)}
    dataset = RawDataset(Path("x"), "x", ("grey",), ("background", "one"), (0, 1), (), cases)
    with pytest.raises(ExportError, match="holds pictures; export onnx or torch"):
        monai_bundle.require(replace(model(example("supervised", 2)), dataset=dataset))


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"needs monai.*tailseg\[monai\]"):
        monai_bundle.require(model(example("supervised", 2)))


def test_a_bundle_that_does_not_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(monai_bundle, "_RUN", "raise ValueError('no such transform')")
    with pytest.raises(ExportError, match=r"does not run(.|\n)*no such transform"):
        monai_bundle.run_bundle(tmp_path, tmp_path, tmp_path)


def test_the_whole_bundle_labels_a_scan_as_tailseg_does(run: Path, tmp_path: Path):
    done = app.export(run, "monai-bundle", tmp_path / "out")
    checked = done.checked
    assert checked.real and checked.equal_voxels >= 0.999 and checked.probability_difference < 1e-4
    folders = {path.relative_to(done.folder).parts[0] for path in done.folder.rglob("*")}
    described = {"MODEL_CARD.md", "model_card.json", "preparation.json"}
    assert folders == {"configs", "models", "scripts", "docs", "LICENSE"} | described
    assert not list(done.folder.rglob("__pycache__"))
    assert "python -m monai.bundle run" in (done.folder / "docs" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["uniform", "gaussian"])
def test_the_whole_bundle_in_3d_with_several_channels(weighting: str, tmp_path: Path):
    tree = tiny_recipe(make_tiny(tmp_path / "tiny", channels=2), "dhc", epochs=1)
    crop = {"threshold": -20, "margin": 4}
    tree["data"]["prepare"] = {"crop": crop, "spacing": [2.5, 1.7, None], "intensity": {"name": "zscore"}}
    tree["data"]["pad"] = True
    tree["evaluate"] = {"overlap": 0.3, "weighting": weighting}
    app.train(load_recipe(tree, ["train.validate_every=1"]), tmp_path / "run")
    checked = app.export(tmp_path / "run", "monai-bundle").checked
    assert checked.equal_voxels >= 0.999
