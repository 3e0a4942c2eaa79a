"""Scores that lie in the folder of a run: read, never made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailseg.data.splits import Split
from tailseg.export.trained import TrainedModel


@dataclass(frozen=True)
class FoundScores:
    """run: name of its folder. cases_of: test, val, labelled, unlabelled, or other where they are of no set of its split.
    summary: as `tailseg evaluate` wrote it."""

    run: str
    cases_of: str
    file: str
    summary: dict[str, Any]


def find_scores(model: TrainedModel) -> list[FoundScores]:
    """Every summary in predictions/test, predictions/val and predictions of the runs; the test set's first."""
    found = []
    for folder, split in zip(model.folders, model.splits, strict=True):
        for place in ("predictions/test", "predictions/val", "predictions"):
            for file in sorted((folder / place).glob("*.json")):
                summary = _summary(file)
                if summary is not None:
                    name = file.relative_to(folder).as_posix()
                    found.append(FoundScores(folder.name, _set_of(split, summary["cases"]), name, summary))
    order = ("test", "val", "other", "unlabelled", "labelled")
    return sorted(found, key=lambda one: order.index(one.cases_of))


def find_verdict(model: TrainedModel) -> dict[str, Any] | None:
    """Of a folder that `tailseg run` made."""
    file = model.source / "verdict.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _summary(file: Path) -> dict[str, Any] | None:
    """None for the other JSON files that lie beside predictions."""
    values = json.loads(file.read_text(encoding="utf-8"))
    return (
        values if isinstance(values, dict) and {"protocol", "classes", "mean_over_classes"} <= values.keys() else None
    )


def _set_of(split: Split, cases: list[str]) -> str:
    for each in ("test", "val", "labelled", "unlabelled"):
        if cases and set(cases) <= set(getattr(split, each)):
            return each
    return "other"
