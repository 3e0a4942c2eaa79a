from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from tailseg.evaluate.uncertainty import entropy, to_bytes, write_map

nib: Any = nibabel


def test_entropy_is_0_for_certainty_and_1_for_equal_odds():
    probs = torch.tensor([[1.0, 0.25, 0.5], [0.0, 0.25, 0.5], [0.0, 0.25, 0.0], [0.0, 0.25, 0.0]])
    assert entropy(probs, 0).tolist() == pytest.approx([0.0, 1.0, 0.5])


def test_a_probability_below_0_by_rounding_does_no_harm():
    assert entropy(torch.tensor([1.0, -1e-8]), 0) == 0


def test_maps_are_read_as_values_from_0_to_1(tmp_path: Path):
    values = torch.linspace(0, 1, 24).reshape(2, 3, 4)
    affine = np.array([[0, -1.5, 0, 5], [2, 0, 0, -7], [0, 0, 3, 1], [0, 0, 0, 1.0]])
    write_map(tmp_path / "a.nii.gz", to_bytes(values), affine)
    image = nib.load(tmp_path / "a.nii.gz")
    assert image.get_data_dtype() == np.uint8
    np.testing.assert_allclose(image.get_fdata().T, values, atol=0.5 / 255 + 1e-6)
    np.testing.assert_allclose(image.affine, affine)


def test_of_a_picture_the_map_is_a_picture_in_steps(tmp_path: Path):
    write_map(tmp_path / "a.png", to_bytes(torch.tensor([[[0.0, 0.5, 1.0]]])), np.eye(4))
    assert np.asarray(Pillow.open(tmp_path / "a.png")).tolist() == [[0, 128, 255]]
