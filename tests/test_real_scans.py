"""The whole path on real CT and MRI, where the scans are at hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tailseg import app
from tailseg.data.raw import read_raw
from tailseg.data.splits import read_split
from tailseg.recipe import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"


def test_splits_of_every_data_set_are_sound(shared_data: Path):
    for root, name in (
        *((shared_data / "Dataset111_SynapseP23", f"dhc_20p_s{number}") for number in (1, 2, 3)),
        (shared_data / "Dataset110_Synapse", "synapse_4"),
        (shared_data / "Dataset027_ACDC", "acdc_3"),
        (shared_data / "Dataset101_LA", "la_8"),
        (shared_data / "Dataset103_Brain15", "brain_3"),
    ):
        split = read_split(read_raw(root), name)
        assert split.labelled and split.test


def test_full_supervision_labels_the_training_scans_of_s2(shared_data: Path):
    dataset = read_raw(shared_data / "Dataset111_SynapseP23")
    few = read_split(dataset, "dhc_20p_s2")
    full = read_split(dataset, "full_s2", RECIPES / "synapse" / "splits.json")
    assert set(full.labelled) == {*few.labelled, *few.unlabelled} and (full.val, full.test) == (few.val, few.test)


@pytest.mark.parametrize(
    ("recipe", "protocol"), [("synapse_mini/dhc_20p.yaml", "dhc-p23"), ("acdc_mini/cps_3.yaml", "native")]
)
def test_from_scans_to_scores(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, protocol: str
):
    monkeypatch.setenv("TAILSEG_DATA", str(shared_data))
    overrides = [f"data.store={tmp_path / 'stores'}", "train.epochs=1", "train.steps_per_epoch=2", "network.width=4"]
    loaded = load_recipe(RECIPES / recipe, overrides)
    # two labelled, two unlabelled and a validation scan are enough to see that everything fits
    dataset = read_raw(loaded.data.root)
    split = read_split(dataset, loaded.data.split)
    few = {
        "labelled": split.labelled[:2],
        "unlabelled": split.unlabelled[:2],
        "val": split.val[:1],
        "test": split.test[:1],
    }
    (tmp_path / "splits.json").write_text(json.dumps({"few": few}))
    loaded = load_recipe(
        RECIPES / recipe, [*overrides, f"data.split_file={tmp_path / 'splits.json'}", "data.split=few"]
    )
    run = app.train(loaded, tmp_path / "run")
    written = app.predict(run, "test", tmp_path / "predictions")
    assert [path.name for path in written] == [f"{split.test[0]}.nii.gz"]
    summary = app.evaluate(tmp_path / "predictions", loaded.data.root, [protocol])[protocol]
    assert summary.scores.cases == (split.test[0],)
    assert np.isfinite(summary.overall["dice"].mean)
