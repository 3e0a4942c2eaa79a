from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from export.models import example, model
from torch import Tensor

from tailseg.data.image import Image
from tailseg.export.check import Scan, check_network, find_scan, patch_difference, reference
from tailseg.export.trained import ExportError, TrainedModel


@pytest.fixture(scope="module")
def supervised() -> TrainedModel:
    return model(example("supervised", 2))


def test_the_network_itself_passes(supervised: TrainedModel):
    checked = check_network(supervised, reference(supervised), find_scan(supervised), other_size=(32, 16))
    assert checked.probability_difference == 0 and checked.equal_voxels == 1
    assert checked.patches == 4 and not checked.real and "noise" in checked.on
    assert set(checked.dice.values()) == {1.0}


def test_a_network_that_is_slightly_off_fails(supervised: TrainedModel):
    own = reference(supervised)
    with pytest.raises(ExportError, match="probabilities of the exported network differ by up to 1"):
        check_network(supervised, lambda x: own(x) + 1.5e-4, find_scan(supervised), other_size=None)


def test_a_network_that_gives_no_numbers_fails(supervised: TrainedModel):
    with pytest.raises(ExportError, match="no numbers"):
        check_network(
            supervised, lambda x: reference(supervised)(x) * float("nan"), find_scan(supervised), other_size=None
        )


def test_labels_of_a_single_class_are_said_to_tell_little(supervised: TrainedModel):
    def blank(x: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(x), torch.zeros_like(x), torch.zeros_like(x)], 1)

    method = supervised.methods[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "predict", blank)
        checked = check_network(supervised, blank, find_scan(supervised), other_size=None)
    assert "All of them are background" in checked.sentences()[1]
    assert "All of them" not in replace(checked, dice={"a": 1.0, "b": 1.0}).sentences()[1]


def test_labels_that_differ_fail(supervised: TrainedModel):
    """Patches agree, but on the whole scan every tenth window is another's."""
    own, calls = reference(supervised), 0

    def moody(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return own(x).roll(1, 1) if calls > 2 else own(x)  # the first two are the patches

    with pytest.raises(ExportError, match=r"only .* % of the voxels"):
        check_network(supervised, moody, find_scan(supervised), other_size=None)


def test_other_sizes_are_tried_where_any_is_promised(supervised: TrainedModel):
    own, shapes = reference(supervised), []

    def watched(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape[2:]))
        return own(x)

    patch_difference(supervised, watched, find_scan(supervised), (32, 16))
    assert set(shapes) == {(32, 32), (32, 16)}


def test_scans_smaller_than_the_patch_are_padded(supervised: TrainedModel):
    small = Scan(
        "a small scan", Image(np.random.default_rng(0).normal(0, 99, (1, 3, 9, 20)).astype("f4"), np.eye(4)), True
    )
    assert check_network(supervised, reference(supervised), small, other_size=None).voxels == 3 * 9 * 20


@pytest.mark.parametrize(
    "prepare",
    [
        {"intensity": {"name": "window", "low": -160, "high": 240, "rescale": "window"}, "crop": {"threshold": -300}},
        {"intensity": {"name": "zscore"}, "spacing": [3.0, 1.5, None]},
        {"intensity": {"name": "percentiles"}, "grid": [None, 40, 40]},
    ],
)
def test_made_up_scans_survive_every_preparation(prepare: dict[str, Any]):
    each = model(example("supervised", 2), prepare=prepare)
    scan = find_scan(each)
    assert not scan.real and "it was never made" in scan.what
    assert check_network(each, reference(each), scan, other_size=None).equal_voxels == 1
    assert torch.isfinite(torch.from_numpy(scan.image.array)).all()
