"""A data set of a few small scans that trains in seconds, and recipes for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

SHAPE = (24, 20, 22)  # (W, H, D) as in the files


def make_tiny(root: Path, *, unlabelled: int = 2, channels: int = 1) -> Path:
    """Two labelled, two validation, one test and some label-less cases: a bright box, and a small brighter one in it."""
    rng = np.random.default_rng(0)
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    labelled = ["a", "b", "v1", "v2", "t"]
    for case in [*labelled, *(f"u{i}" for i in range(unlabelled))]:
        label = np.zeros(SHAPE, np.uint8)
        corner = rng.integers(2, 6, 3)
        label[tuple(slice(c, c + 12) for c in corner)] = 1
        label[tuple(slice(c + 3, c + 7) for c in corner)] = 2
        for channel in range(channels):
            image = (100 * label + rng.normal(0, 20, SHAPE)).astype(np.int16)
            nib.save(
                nib.Nifti1Image(image, np.diag([2, 2, 3, 1.0])), root / "imagesTr" / f"{case}_{channel:04d}.nii.gz"
            )
        if case in labelled:
            nib.save(nib.Nifti1Image(label, np.diag([2, 2, 3, 1.0])), root / "labelsTr" / f"{case}.nii.gz")
    dataset = {
        "channel_names": {str(channel): f"channel{channel}" for channel in range(channels)},
        "labels": {"background": 0, "box": 1, "core": 2},
        "numTraining": len(labelled),
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(dataset))
    split = {
        "labelled": ["a", "b"],
        "unlabelled": [f"u{i}" for i in range(unlabelled)],
        "val": ["v1", "v2"],
        "test": ["t"],
    }
    (root / "splits.json").write_text(json.dumps({"tiny": split}))
    return root


def tiny_recipe(root: Path, method: str = "dhc", *, spatial_dims: int = 3, **train: Any) -> dict[str, Any]:
    """Four steps an epoch, one thread, fp32 on every machine, so that runs can be compared bit for bit."""
    return {
        "data": {
            "root": str(root),
            "split": "tiny",
            "store": str(root.parent / "stores"),
            "prepare": {"intensity": {"name": "window", "low": -50, "high": 300, "rescale": "window"}},
            "patch_size": [16] * spatial_dims,
            "batch": [2, 2],
            "foreground": 0.5,
        },
        "network": {"name": "vnet" if spatial_dims == 3 else "unet", "width": 4},
        "method": {"name": method},
        "train": {
            "epochs": 3,
            "steps_per_epoch": 4,
            "threads": 1,
            "device": "cpu",
            "precision": "fp32",
            "checkpoint_every": 1,
            "validate_every": 2,
            **train,
        },
    }
