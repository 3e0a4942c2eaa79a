from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export.models import example, model

from tailseg import app
from tailseg.core import Method
from tailseg.data.raw import read_raw
from tailseg.export.check import check_network, find_scan, reference
from tailseg.export.model_card import facts, render
from tailseg.export.network import PredictionNetwork
from tailseg.export.preparation import describe
from tailseg.export.trained import TrainedModel


def card_of(each: TrainedModel) -> tuple[dict[str, Any], str]:
    description = describe(each, PredictionNetwork(each.methods), None)
    checked = check_network(each, reference(each), find_scan(each), other_size=None)
    card = facts(each, description, checked, "torch", {})
    json.dumps(card, allow_nan=False)
    return card, render(card, description, "Run it.")


@pytest.fixture
def supervised() -> TrainedModel:
    return model(example("supervised", 2))


def test_without_scores_none_are_claimed(supervised: TrainedModel):
    card, text = card_of(supervised)
    assert card["scores"] == [] and card["verdict"] is None
    assert "Nobody measured it" in text and "DSC" not in text


def test_it_says_what_it_is_not_for(supervised: TrainedModel):
    _, text = card_of(supervised)
    assert "not a medical device" in text and "## Not intended for" in text and "Research" in text


def test_the_scores_of_the_run_are_told_with_their_rules_and_intervals(run: Path, tmp_path: Path):
    root = run.parents[1] / "tiny"
    scored = tmp_path / "scored"
    loaded = app.load_run(run)
    predictions = scored / "predictions" / "test"
    app.predict(run, "test", predictions)
    app.evaluate(predictions, root, ["native"], workers=1)
    summary = json.loads((predictions / "native.json").read_text())
    each = replace(
        model(example("supervised", 2)),
        folders=(scored,),
        splits=(loaded.split,),
        dataset=read_raw(root),
    )
    card, text = card_of(each)
    assert [(one["cases_of"], one["cases"]) for one in card["scores"]] == [("test", 1)]
    overall = summary["mean_over_classes"]["dice"]
    assert f"{overall['mean']:.3f}" in text and "which training never saw" in text
    assert "Protocol native" in text and "BCa bootstrap" in text and "share of the foreground" in text
    rows = [line for line in text.splitlines() if line.startswith(("| box", "| core"))]
    assert len(rows) == 2


def test_it_names_no_case_and_no_folder(run: Path):
    loaded = app.load_run(run)
    root = run.parents[1] / "tiny"
    each = replace(
        model(example("supervised", 2)), recipes=(loaded.recipe,), splits=(loaded.split,), dataset=read_raw(root)
    )
    card, text = card_of(each)
    told = json.dumps(card) + text
    assert str(root) not in told and str(root.parent) not in told and '"v1"' not in told and "v2" not in text


def test_dataset_json_gives_licence_and_reference(tmp_path: Path, run: Path):
    source = run.parents[1] / "tiny"
    description = json.loads((source / "dataset.json").read_text())
    own = tmp_path / "own"
    own.mkdir()
    for name in ("imagesTr", "labelsTr", "splits.json"):
        (own / name).symlink_to(source / name)
    told = {"licence": "CC-BY-SA 4.0", "reference": "A. Person, 2020", "name": "Own_Data"}
    (own / "dataset.json").write_text(json.dumps(description | told))
    card, text = card_of(replace(model(example("supervised", 2)), dataset=read_raw(own)))
    assert card["training_data"]["licence"] == "CC-BY-SA 4.0" and "CC-BY-SA 4.0" in text and "A. Person, 2020" in text
    assert "# Own\\_Data: supervised on unet" in text


def test_a_caveat_of_the_method_goes_along(supervised: TrainedModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Method, "caveat", lambda self: "RANDOM WEIGHTS: no result counts")
    card, text = card_of(supervised)
    assert card["caveats"] == ["RANDOM WEIGHTS: no result counts"] and "RANDOM WEIGHTS: no result counts" in text


def test_of_several_folds_it_says_that_their_average_was_not_scored(tmp_path: Path):
    methods = [example("supervised", 2, seed=seed) for seed in (0, 1)]
    each = model(*methods)
    summary = {
        "protocol": {"text": "Protocol native."},
        "method": "means",
        "cases": ["v"],
        "units": {"dice": ""},
        "classes": [],
        "mean_over_classes": {"dice": {"mean": 0.5, "low": None, "high": None}},
    }
    folders = tuple(tmp_path / f"fold{i}" for i in range(2))
    for folder in folders:
        (folder / "predictions" / "val").mkdir(parents=True)
        (folder / "predictions" / "val" / "native.json").write_text(json.dumps(summary))
    (tmp_path / "verdict.json").write_text(json.dumps({"sentence": "Nobody can tell.", "notes": ["Scored on <val>."]}))
    card, text = card_of(replace(each, folders=folders, source=tmp_path))
    assert [one["cases_of"] for one in card["scores"]] == ["val", "val"]
    assert "The average, which is exported, was not scored." in text and "too good" in text
    assert "Nobody can tell." in text and "0.500 (? to ?)" in text and r"Scored on \<val\>." in text


def test_torch_is_named_with_its_version(supervised: TrainedModel):
    card, _ = card_of(supervised)
    assert card["versions"]["exported"]["torch"] == torch.__version__
