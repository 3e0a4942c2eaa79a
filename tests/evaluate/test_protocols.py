from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tailseg.evaluate.metrics import compare
from tailseg.evaluate.protocols import PROTOCOLS, Protocol, protocol_named, resize_nearest
from tailseg.evaluate.scores import score_case
from tailseg.options import OptionError

FULL = np.pad(np.ones((2, 2, 2), bool), 1)
EMPTY = np.zeros_like(FULL)
PAIRS = {"found": (FULL, FULL), "missed": (EMPTY, FULL), "invented": (FULL, EMPTY), "absent": (EMPTY, EMPTY)}


def values(protocol: Protocol, state: str, diagonal: float = 99.0) -> dict[str, float]:
    comparison = compare(*PAIRS[state], (1.0, 1.0, 1.0))
    return dict(zip(protocol.metrics, protocol.values(comparison, diagonal), strict=True))


@pytest.mark.parametrize(
    ("name", "state", "dice", "distance"),
    [
        ("native", "found", 1, 0),
        ("native", "missed", 0, 99),
        ("native", "invented", 0, 99),
        ("native", "absent", math.nan, math.nan),
        ("dhc-p23", "found", 100, 0),
        ("dhc-p23", "missed", 0, 128),
        ("dhc-p23", "invented", 0, 128),
        ("dhc-p23", "absent", 1, 0),
        ("dhc-p23-absent-100", "absent", 100, 0),
        ("dhc-p23-absent-out", "absent", math.nan, math.nan),
        ("dhc-p23-absent-out", "missed", 0, 128),
        ("ssl4mis", "found", 100, 0),
        ("ssl4mis", "missed", 0, 0),
        ("ssl4mis", "invented", 0, 99),
        ("ssl4mis", "absent", 0, 0),
    ],
)
def test_an_empty_mask_counts_as_the_protocol_says(name: str, state: str, dice: float, distance: float) -> None:
    protocol = PROTOCOLS[name]
    for metric, value in values(protocol, state).items():
        if protocol.unit(metric) in ("", "%"):
            assert value == pytest.approx(dice, nan_ok=True), metric
        elif protocol.unit(metric) in ("mm", "voxels"):
            assert value == pytest.approx(distance, nan_ok=True), metric
        else:
            holders = {"pred_ml": ("found", "invented"), "ref_ml": ("found", "missed")}
            assert value == pytest.approx(0.008 * (state in holders[metric])), metric


def test_native_measures_in_mm_and_a_miss_costs_the_diagonal_of_the_scan() -> None:
    ref = np.zeros((10, 20, 20), np.uint8)
    ref[2:4, 5:9, 5:9] = 1
    ref[6:8, 5:9, 5:9] = 2
    pred = np.roll(ref, 2, axis=1)
    pred[pred == 2] = 0
    scores = score_case(pred, ref, (5.0, 0.5, 0.5), ("background", "a", "b"), PROTOCOLS["native"])
    assert scores.metric("hd95")[0] == pytest.approx([1.0, math.hypot(50, 10, 10)])
    assert scores.metric("dice")[0] == pytest.approx([0.5, 0.0])
    assert scores.metric("ref_ml")[0] == pytest.approx([0.04, 0.04])
    assert scores.missed.tolist() == [[False, True]]


def test_dhc_scores_the_resized_grid_in_voxels() -> None:
    # twice the protocol's grid: each of its voxels is one of the first of two
    ref = np.zeros((160, 320, 320), np.uint8)
    pred = np.zeros_like(ref)
    pred[2:8, 2:8, 2:8] = 1
    ref[2:8, 2:8, 2:10] = 1
    scores = score_case(pred, ref, (1.0, 0.3, 0.3), ("background", "a"), PROTOCOLS["dhc-p23"])
    assert scores.metric("dice").item() == pytest.approx(85.714286)
    assert scores.metric("asd").item() == pytest.approx(0.03846154)
    assert (scores.pred_voxels.item(), scores.ref_voxels.item()) == (27, 36)


@pytest.mark.parametrize(("old", "new"), [(147, 80), (512, 160), (208, 160), (77, 80), (256, 160), (80, 80), (1, 80)])
def test_resizing_takes_the_voxels_that_torch_takes(old: int, new: int) -> None:
    theirs = F.interpolate(torch.arange(old, dtype=torch.float32)[None, None], new, mode="nearest")[0, 0]
    ours = resize_nearest(np.arange(old, dtype=np.int32), (new,))
    assert ours.tolist() == theirs.int().tolist()


def test_a_fixed_grid_in_mm_keeps_the_size_of_the_scan() -> None:
    protocol = replace(PROTOCOLS["dhc-p23"], name="mine", spacing="mm")
    _, _, spacing = protocol.to_grid(np.zeros((40, 320, 80), np.uint8), np.zeros((40, 320, 80), np.uint8), (4, 1, 2))
    assert spacing == (2, 2, 1)


def test_tolerance_is_the_protocols() -> None:
    pred, ref = np.zeros((12, 12, 12), bool), np.zeros((12, 12, 12), bool)
    pred[2:6, 2:6, 2:6] = ref[5:9, 2:6, 2:6] = True
    comparison = compare(pred, ref, (1, 1, 1))
    strict, lenient = (
        replace(PROTOCOLS["native"], metrics=("nsd",), tolerance=tolerance).values(comparison, 1.0)[0]
        for tolerance in (0.0, 3.0)
    )
    assert strict < 0.5 < lenient == 1


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=list(PROTOCOLS))
def test_description_says_what_every_empty_mask_counts_as(protocol: Protocol) -> None:
    text = protocol.describe()
    for word in (protocol.name, "Missed", "Invented", "Absent", "mm" if protocol.spacing == "mm" else "voxels"):
        assert word in text
    assert all(len(line) < 240 for line in text.splitlines())


def test_description_follows_the_rules() -> None:
    native, dhc = PROTOCOLS["native"].describe(), PROTOCOLS["dhc-p23"].describe()
    assert "Missed (only the reference has the class): overlaps 0, distances the diagonal of the grid in mm." in native
    assert "Absent (neither has it): left out of every mean, and counted." in native
    assert "80 x 160 x 160" in dhc
    assert "Absent (neither has it): overlaps 1, distances 0." in dhc
    assert "Invented (only the prediction has it): overlaps 0, distances 128." in dhc


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"No protocol is called 'natve'\. Did you mean 'native'\?"):
        protocol_named("natve")
    with pytest.raises(OptionError, match=r"no metric is called 'dise'\. Did you mean 'dice'\?"):
        replace(PROTOCOLS["native"], metrics=("dise",))
    with pytest.raises(OptionError, match="pred_ml is in ml and needs spacing 'mm'"):
        replace(PROTOCOLS["native"], spacing="voxels")
    assert protocol_named("dhc-p23") is PROTOCOLS["dhc-p23"]
