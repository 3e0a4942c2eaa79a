"""Run folders as training, predict and evaluate leave them, written without training: labels are the reference, spoilt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tiny import make_tiny, tiny_recipe

from tailseg.data.image import Image, read_image, write_image
from tailseg.data.raw import read_raw
from tailseg.data.splits import Split
from tailseg.evaluate.protocols import protocol_named
from tailseg.evaluate.scores import score_folder, write_scores
from tailseg.files import write_json, write_text

CLASSES = ("box", "core")
SPLIT = Split("tiny", ("a", "b"), ("u0", "u1"), ("v1", "v2"), ("t",))


def tiny_data(root: Path) -> Path:
    """tests/tiny.py's scans, with a licence to be shown."""
    data = make_tiny(root / "tiny")
    description = json.loads((data / "dataset.json").read_text())
    write_json(data / "dataset.json", description | {"name": "Boxes <in> boxes", "licence": "CC0"})
    return data


def make_run(
    folder: Path, data: Path, method: str = "dhc", *, split: Split = SPLIT, labelled_only: bool = False, **train: Any
) -> Path:
    """A run folder without scores or checkpoint."""
    recipe = tiny_recipe(data, method, **train)
    recipe["data"]["batch"] = [4, 0] if labelled_only else [2, 2]
    write_text(folder / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
    write_json(folder / "split.json", split.to_dict())
    return folder


def predicted(folder: Path, data: Path, cases: Sequence[str], *, shift: int, caveat: str = "") -> Path:
    """Label files in folder: the reference, moved by shift voxels; a box where there is none."""
    dataset = read_raw(data)
    for case in cases:
        path = dataset.cases[case].label
        if path is None:
            image = read_image(dataset.cases[case].images[0])
            labels = np.zeros(image.array.shape, np.uint8)
            labels[5:12, 6:12, 6 : 12 + shift] = 1
        else:
            image = read_image(path)
            labels = np.roll(image.array, shift, axis=2)
        write_image(folder / f"{case}.nii.gz", Image(labels, image.affine))
    labels = {"labels": dict(zip(dataset.classes, dataset.label_values, strict=True))}
    write_json(folder / "labels.json", labels | ({"caveat": caveat} if caveat else {}))
    return folder


def scored(
    run: Path,
    data: Path,
    cases: Sequence[str],
    name: str = "test",
    *,
    shift: int = 1,
    protocol: str = "native",
    caveat: str = "",
) -> Path:
    """Predict and evaluate into run/predictions/name."""
    folder = predicted(run / "predictions" / name, data, cases, shift=shift, caveat=caveat)
    for found in score_folder(folder, data / "labelsTr", [protocol_named(protocol)], cases=cases, workers=1).values():
        write_scores(folder / f"{protocol}.csv", found)
    return run


def training_lines(steps: int = 400, *, silent: str = "core") -> list[dict[str, Any]]:
    """A log in which one class is not predicted for the first half."""
    lines: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        told = {"background": 0.9, "box": 0.1, "core": 0.0} | ({silent: 0.01} if step > steps / 2 else {silent: 0.0})
        lines.append(
            {
                "kind": "train", "step": step, "epoch": 1, "lr": 0.01, "losses": {"supervised": 1 / step},
                "seconds_per_step": 0.1, "logs": {"kept": 0.5, "weights_a": told}, "predicted": told,
            }
        )  # fmt: skip
        if step % 100 == 0:
            dice = {"box": step / steps, "core": None if step < 200 else 0.5}
            lines.append({"kind": "validation", "step": step, "epoch": 1, "dice": dice, "mean": 0.6, "best": True})
    lines.insert(20, {"kind": "alarm", "step": 200, "class": silent, "absent_steps": 200, "share": 0.01})
    return lines


def make_whole(folder: Path, data: Path, *, folds: int = 1, reference: bool = True) -> Path:
    """A folder of `tailseg run`: folds that score other cases, their reference, and the unlabelled scans."""
    rest = ("a", "b", "v1", "v2", "t")
    names = [f"fold{index}" for index in range(folds)]
    for index, name in enumerate(names):
        val = rest[index::folds] if folds > 1 else ("v1", "v2")
        split = Split(name, tuple(case for case in rest if case not in val), ("u0", "u1"), val)
        for ending, shift in (("", 0), ("_labelled_only", 1)):
            if ending and not reference:
                continue
            run = make_run(
                folder / (name + ending),
                data,
                "supervised" if ending else "dhc",
                split=split,
                labelled_only=bool(ending),
            )
            scored(run, data, val, "val", shift=shift)
    predictions = predicted(folder / "predictions", data, ("u0", "u1"), shift=1)
    write_text(
        predictions / "volumes.csv",
        "case,class,voxels,ml\nu0,box,100,1.2\nu0,core,3,0.1\nu1,box,120,1.4\nu1,core,0,0\n",
    )
    write_json(
        folder / "run.json",
        {"tailseg_run": 1, "data": str(data), "folds": names, "reference": reference, "scored": "val"},
    )
    return folder
