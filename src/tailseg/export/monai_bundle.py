"""MONAI Bundle: a folder that `python -m monai.bundle run` segments scans with, without TailSeg.

The network is a torch.export program whose axes are those of a NIfTI file, (W, H, D), as MONAI reads them. Preparation and
restoring are MONAI's transforms; a few small ones of our own (bundle_scripts/) do what MONAI's cannot be configured for.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tailseg.data.intensity import MinMax, Percentiles, Window, ZScore
from tailseg.data.pictures import PICTURE_ENDINGS
from tailseg.data.preparation import Preparation
from tailseg.evaluate.sliding_window import batch_for
from tailseg.export import extras
from tailseg.export.network import Traced
from tailseg.export.preparation import stride
from tailseg.export.trained import ExportError, TrainedModel
from tailseg.files import write_json

PROGRAM = Path("models") / "model.pt2"
_SCRIPTS = Path(__file__).parent / "bundle_scripts"
_SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
_KEYS = {"keys": "image"}


def require(model: TrainedModel) -> None:
    """Raises ExportError naming the extra, and for pictures, which the bundle does not read."""
    extras.require("monai", "monai-bundle", "monai")
    cases = model.dataset.cases.values() if model.dataset else ()
    if any(case.images[0].name.endswith(PICTURE_ENDINGS) for case in cases):
        raise ExportError("the MONAI bundle reads NIfTI files, and this data set holds pictures; export onnx or torch.")


def write(folder: Path, model: TrainedModel, traced: Traced) -> None:
    """Everything but the program, the card and preparation.json."""
    write_json(folder / "configs" / "inference.json", inference_config(model))
    write_json(folder / "configs" / "metadata.json", metadata(model, traced))
    (folder / "scripts").mkdir()
    for script in sorted(_SCRIPTS.glob("*.py")):
        shutil.copyfile(script, folder / "scripts" / script.name)


def inference_config(model: TrainedModel) -> dict[str, Any]:
    recipe, channels = model.recipe, model.task.in_channels
    patch_size, evaluate = recipe.data.patch_size, recipe.evaluate
    windows = evaluate.batch or batch_for(patch_size)
    return {
        "imports": ["$import torch", "$import scripts"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/data'",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network_def": {
            "_target_": "scripts.network.ExportedNetwork",
            "path": f"$@bundle_root + '/{PROGRAM.as_posix()}'",
            "device": "@device",
        },
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": _preprocessing(recipe.data.prepare)},
        "dataset": {
            "_target_": "Dataset",
            "data": f"$scripts.inference.find_scans(@dataset_dir, {channels})",
            "transform": "@preprocessing",
        },
        "inferer": _inferer(patch_size, evaluate.overlap, evaluate.weighting, windows),
        "postprocessing": {"_target_": "Compose", "transforms": _postprocessing(model.label_values)},
        "evaluator": {
            "_target_": "scripts.inference.Inference",
            "dataset": "@dataset",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "device": "@device",
        },
        "run": ["$@evaluator.run()"],
    }  # fmt: skip


def _preprocessing(preparation: Preparation) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [
        {"_target_": "LoadImaged", **_KEYS, "reader": "NibabelReader", "ensure_channel_first": True, "image_only": True}
    ]
    if preparation.orientation == "canonical":
        labels = [["L", "R"], ["P", "A"], ["I", "S"]]
        steps.append({"_target_": "Orientationd", **_KEYS, "axcodes": "RAS", "labels": labels})
    if crop := preparation.crop:
        crop_step = {"_target_": "scripts.preparation.CropBrightd", **_KEYS}
        steps.append({**crop_step, "threshold": crop.threshold, "margin": crop.margin})
    if preparation.spacing or preparation.grid:
        name, target = ("grid", preparation.grid) if preparation.grid else ("spacing", preparation.spacing)
        mode = "trilinear" if preparation.image_interpolation == "linear" else "nearest-exact"
        resample = {"_target_": "scripts.preparation.ResampleOverFieldOfViewd", **_KEYS, "mode": mode}
        steps.append({**resample, name: list(target or ())[::-1]})  # MONAI's axes are (W, H, D)
    return [*steps, *_intensity(preparation)]


def _intensity(preparation: Preparation) -> list[dict[str, Any]]:
    rescale = {"_target_": "ScaleIntensityd", **_KEYS, "minv": 0.0, "maxv": 1.0, "channel_wise": True}
    standardise = {"_target_": "NormalizeIntensityd", **_KEYS, "channel_wise": True}
    match preparation.intensity:
        case Window(low=low, high=high, rescale=by):
            clip = {"_target_": "ScaleIntensityRanged", **_KEYS, "a_min": low, "a_max": high, "clip": True}
            if by == "window":
                return [{**clip, "b_min": 0.0, "b_max": 1.0}]
            return [{**clip, "b_min": low, "b_max": high}, rescale]
        case Percentiles(low=low, high=high):
            clip = {"_target_": "ClipIntensityPercentilesd", **_KEYS, "channel_wise": True}
            return [{**clip, "lower": low, "upper": high}, standardise]
        case ZScore(nonzero=nonzero):
            return [{**standardise, "nonzero": nonzero}]
        case MinMax():
            return [rescale]


def _inferer(patch_size: Sequence[int], overlap: float, weighting: str, batch: int) -> dict[str, Any]:
    sides = list(patch_size)[::-1]
    overlaps = [_overlap(side, overlap) for side in sides]
    settings: dict[str, Any] = {"roi_size": sides, "sw_batch_size": batch}
    settings["overlap"] = overlaps if len(sides) == 3 else [*overlaps, 0.0]
    if weighting == "gaussian":  # MONAI's own weights are cut off below
        name = "GaussianWindows" if len(sides) == 3 else "GaussianSlices"
        return {"_target_": f"scripts.windows.{name}", **settings}
    if len(sides) == 2:
        return {"_target_": "SliceInferer", "spatial_dim": 2, **settings, "mode": "constant"}
    return {"_target_": "SlidingWindowInferer", **settings, "mode": "constant"}


def _overlap(side: int, overlap: float) -> float:
    """Of which MONAI, which cuts int(side * (1 - overlap)), makes our stride, which is rounded."""
    step = stride(side, overlap)
    return overlap if int(side * (1 - overlap)) == step else max(0.0, 1 - (step + 0.5) / side)


def _postprocessing(label_values: Sequence[int]) -> list[dict[str, Any]]:
    keys = {"keys": "pred"}
    steps: list[dict[str, Any]] = [
        {
            "_target_": "Invertd",
            **keys,
            "transform": "@preprocessing",
            "orig_keys": "image",
            "nearest_interp": False,
            "to_tensor": True,
        },
        {"_target_": "AsDiscreted", **keys, "argmax": True},
    ]
    indices = list(range(len(label_values)))
    if list(label_values) != indices:
        values = list(label_values)
        steps.append({"_target_": "MapLabelValued", **keys, "orig_labels": indices, "target_labels": values})
    saver = {
        "_target_": "SaveImaged",
        **keys,
        "output_dir": "@output_dir",
        "output_postfix": "",
        "output_ext": ".nii.gz",
        "output_dtype": "$torch.uint8",
        "resample": False,
        "separate_folder": False,
        "print_log": False,
        "output_name_formatter": "$scripts.inference.output_name",
    }
    return [*steps, saver]


def metadata(model: TrainedModel, traced: Traced) -> dict[str, Any]:
    """As MONAI's schema of metadata.json has it."""
    task, prepare = model.task, model.recipe.data.prepare
    sides = list(model.recipe.data.patch_size)[::-1]
    unit_interval = isinstance(prepare.intensity, Window | MinMax)
    names = dict(enumerate(model.task.classes))
    organs = ", ".join(task.classes[1:])
    free = traced.free[::-1]
    shape = [f"{traced.divisor}*n" if each else side for each, side in zip(free, sides, strict=True)]
    return {
        "schema": _SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": "exported by TailSeg " + version("tailseg")},
        "monai_version": version("monai"),
        "pytorch_version": str(torch.__version__).split("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {"nibabel": version("nibabel")},
        "name": f"{model.data_name} segmentation",
        "task": f"Segmentation of {organs}",
        "description": f"{model.recipe.method.name} ({model.recipe.network.name}), trained by TailSeg on {model.data_name}; "
        "see docs/README.md. For research; not a medical device.",
        "authors": "see docs/README.md",
        "copyright": "see docs/README.md",
        "data_source": model.data_name,
        "data_type": "nifti",
        "image_classes": "; ".join(f"channel {i}: {name}" for i, name in enumerate(model.channels)),
        "label_classes": "; ".join(
            f"{value}: {name}" for name, value in zip(task.classes, model.label_values, strict=True)
        ),
        "pred_classes": f"{task.num_classes} channels of probabilities, in the order of channel_def",
        "intended_use": "Research only; not a medical device.",
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "hounsfield" if any("CT" in name.upper() for name in model.channels) else "magnitude",
                    "modality": ", ".join(model.channels),
                    "num_channels": task.in_channels,
                    "spatial_shape": shape,
                    "dtype": "float32",
                    "value_range": [0, 1] if unit_interval else [],
                    "is_patch_data": True,
                    "channel_def": {str(number): name for number, name in enumerate(model.channels)},
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "segmentation",
                    "num_channels": task.num_classes,
                    "spatial_shape": shape,
                    "dtype": "float32",
                    "value_range": [0, 1],
                    "is_patch_data": True,
                    "channel_def": {str(number): name for number, name in names.items()},
                }
            },
        },
    }


def licence(card: Mapping[str, Any]) -> str:
    """The bundle's LICENSE: what is known of the terms of its parts."""
    data = card["training_data"].get("licence")
    known = f"The licence of the data, as their dataset.json names it: {data}" if data else "Their licence is unknown."
    return (
        "scripts/ and configs/ were written by TailSeg and are under the MIT licence, as TailSeg is.\n\n"
        f"models/ holds weights that were learnt from data. {known}\n"
        "Treat the weights as if the terms of the data applied to them.\n"
    )


_RUN = """
import sys
from monai.bundle import run
run(config_file="configs/inference.json", bundle_root=".", dataset_dir=sys.argv[1], output_dir=sys.argv[2],
    device="$torch.device('cpu')")
assert not any(name.split(".")[0] == "tailseg" for name in sys.modules), "the bundle imports TailSeg"
"""


def run_bundle(folder: Path, scans: Path, output: Path) -> None:
    """Run the bundle on the scans of a folder as a user would, in a process of its own, on the CPU, and see that it does not
    touch TailSeg. Raises ExportError with the end of what it said."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _RUN, str(scans.resolve()), str(output.resolve())],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise ExportError(f"the MONAI bundle does not run:\n{said}")
