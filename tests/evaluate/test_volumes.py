from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from tailseg.evaluate.volumes import Volume, class_volumes, write_volumes


def test_volumes_are_voxels_and_ml():
    labels = np.zeros((4, 5, 6), np.uint8)
    labels[:2, :5, :5], labels[3, 0, 0] = 1, 3
    found = class_volumes(labels, ("background", "liver", "spleen", "tumour"), (5.0, 2.0, 2.0))
    assert found == {"liver": Volume(50, 1.0), "spleen": Volume(0, 0.0), "tumour": Volume(1, 0.02)}


def test_where_the_size_of_a_voxel_is_unknown_ml_stays_empty(tmp_path: Path):
    found = class_volumes(np.ones((1, 2, 2), np.uint8), ("background", "lesion, old"), None)
    write_volumes(tmp_path / "volumes.csv", {"a": found, "b": {"lesion, old": Volume(3, 0.25)}})
    rows = list(csv.reader((tmp_path / "volumes.csv").read_text().splitlines()))
    assert rows == [["case", "class", "voxels", "ml"], ["a", "lesion, old", "4", ""], ["b", "lesion, old", "3", "0.25"]]
