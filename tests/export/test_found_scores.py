from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from export.models import example, model

from tailseg.export.found_scores import find_scores, find_verdict


def test_scores_are_found_in_every_place_and_told_apart_by_their_cases(tmp_path: Path):
    for place, cases in (("test", ["t"]), ("val", ["v"]), ("", ["a", "strange"])):
        folder = tmp_path / "predictions" / place
        folder.mkdir(parents=True, exist_ok=True)
        summary = {"protocol": {}, "classes": [], "mean_over_classes": {}, "cases": cases}
        (folder / "native.json").write_text(json.dumps(summary))
        (folder / "labels.json").write_text(json.dumps({"labels": {}}))  # no scores
    each = replace(model(example("supervised", 2)), folders=(tmp_path,), source=tmp_path)
    found = [(one.cases_of, one.file) for one in find_scores(each)]
    assert found == [
        ("test", "predictions/test/native.json"),
        ("val", "predictions/val/native.json"),
        ("other", "predictions/native.json"),
    ]


def test_no_verdict_is_none(tmp_path: Path):
    each = replace(model(example("supervised", 2)), source=tmp_path)
    assert find_verdict(each) is None
    (tmp_path / "verdict.json").write_text("{}")
    assert find_verdict(each) == {}
