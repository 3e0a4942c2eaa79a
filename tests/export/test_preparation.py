from __future__ import annotations

import json
from typing import Any

import pytest
from export.models import example, model

from tailseg.evaluate.sliding_window import _axis
from tailseg.export.network import PredictionNetwork
from tailseg.export.preparation import describe, prose, stride


def described(spatial_dims: int = 2, **kwargs: Any) -> dict[str, Any]:
    each = model(example("supervised", spatial_dims), **kwargs)
    return describe(each, PredictionNetwork(each.methods), None)


@pytest.mark.parametrize(
    ("intensity", "numbers"),
    [
        ({"name": "window", "low": -160, "high": 240, "rescale": "window"}, ["[-160, 240]", "(x - -160) / 400"]),
        ({"name": "window", "low": -75, "high": 275, "rescale": "volume"}, ["[-75, 275]", "extremes of the clipped"]),
        ({"name": "percentiles", "low": 1, "high": 99}, ["percentiles 1 and 99", "ddof=0"]),
        ({"name": "zscore", "nonzero": True}, ["other than 0", "ddof=0"]),
        ({"name": "zscore"}, ["of the volume", "ddof=0"]),
        ({"name": "minmax"}, ["extremes of the volume"]),
    ],
)
def test_the_intensity_is_told_with_its_numbers(intensity: dict[str, Any], numbers: list[str]):
    told = " ".join(prose(described(prepare={"intensity": intensity})))
    assert all(number in told for number in numbers)


def test_every_step_is_told_in_its_order():
    prepare = {
        "crop": {"threshold": -300, "margin": 5},
        "spacing": [3.0, None, 1.5],
        "intensity": {"name": "minmax"},
    }
    told = prose(described(prepare=prepare))
    words = [
        "RAS+",
        "above -300",
        "3 x the scan's own x 1.5 mm",
        "extremes",
        "pad",
        "windows of",
        "Interpolate",
        "outside",
    ]
    places = [next(i for i, step in enumerate(told) if word in step) for word in words]
    assert places == sorted(places) and len(set(places)) == len(words)


def test_what_does_not_happen_is_not_told():
    told = " ".join(prose(described(prepare={"orientation": "file", "intensity": {"name": "minmax"}})))
    assert "Crop" not in told and "Resample" not in told and "Interpolate" not in told and "RAS" not in told


def test_label_values_stand_beside_the_classes():
    classes = described()["classes"]
    assert [(one["index"], one["label_value"]) for one in classes] == [(0, 0), (1, 1), (2, 5)]
    json.dumps(described(), allow_nan=False)


@pytest.mark.parametrize(("side", "overlap", "expected"), [(32, 0.5, 16), (16, 0.3, 11), (5, 0.9, 1), (7, 0.5, 4)])
def test_strides_are_those_of_the_sliding_windows(side: int, overlap: float, expected: int):
    assert stride(side, overlap) == expected == _axis(100, side, overlap, "uniform").stride
