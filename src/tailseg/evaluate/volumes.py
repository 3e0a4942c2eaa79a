"""How much of each class a prediction holds: voxels and millilitres, case by case."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from tailseg.data.preparation import count_labels
from tailseg.files import write_text

VOLUMES_FILE = "volumes.csv"


@dataclass(frozen=True)
class Volume:
    """ml: None where the file does not say how large a voxel is, as pictures do not."""

    voxels: int
    ml: float | None


def class_volumes(
    labels: np.ndarray, classes: Sequence[str], spacing: tuple[float, float, float] | None
) -> dict[str, Volume]:
    """Of every foreground class. labels: (D, H, W) uint8 class indices. classes: background first. spacing: mm, or None."""
    voxels = count_labels(labels).sum(0)[1 : len(classes)].tolist()
    ml = None if spacing is None else prod(spacing) / 1000
    return {
        name: Volume(count, None if ml is None else count * ml) for name, count in zip(classes[1:], voxels, strict=True)
    }


def write_volumes(path: Path, cases: Mapping[str, Mapping[str, Volume]]) -> None:
    """A CSV with a row for each case and class: case, class, voxels, ml, the last one empty where it is unknown."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("case", "class", "voxels", "ml"))
    for case, volumes in cases.items():
        for name, volume in volumes.items():
            writer.writerow((case, name, volume.voxels, "" if volume.ml is None else f"{volume.ml:.6g}"))
    write_text(path, file.getvalue())
