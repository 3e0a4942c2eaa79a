"""What the runs were trained on, and how: the data set's card, and the recipes with what differs between them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from tailseg.data.description import read_description
from tailseg.data.errors import DataError, ImageError
from tailseg.data.geometry import Spacing
from tailseg.data.image import canonical_orientation, read_geometry, spacing_of
from tailseg.data.raw import RawDataset
from tailseg.report.collect import Material, Run
from tailseg.report.numbers import NONE, percent, short

_TOLD = ("description", "licence", "license", "reference", "release", "citation")
_TIMES = " \N{MULTIPLICATION SIGN} "
MOST_PROBLEMS = 40


@dataclass(frozen=True)
class ClassRow:
    """cases: label files that hold it, None where nobody counted. width: of a bar, in % of the largest foreground class."""

    name: str
    colour: str
    cases: int | None
    share: str
    times: str
    width: float


@dataclass(frozen=True)
class Problem:
    severity: str
    where: str
    text: str
    way_out: str


@dataclass(frozen=True)
class DatasetView:
    """facts: (what, value). sets: (split, labelled, unlabelled, val, test) for each."""

    name: str
    facts: tuple[tuple[str, str], ...]
    sets: tuple[tuple[str, int, int, int, int], ...]
    classes: tuple[ClassRow, ...]
    counted: str
    problems: tuple[Problem, ...]
    more_problems: int
    checked: bool


@dataclass(frozen=True)
class RecipeView:
    """differing: (key, value of every run). texts: (run, YAML)."""

    differing: tuple[tuple[str, tuple[str, ...]], ...]
    names: tuple[str, ...]
    texts: tuple[tuple[str, str], ...]


def voxel_shares(material: Material) -> dict[str, float]:
    """Of the voxels of the labelled training scans, background included; from the first checkpoint that tells."""
    for run in material.runs:
        for member in run.members:
            if member.trained and sum(member.trained.class_voxels):
                total = sum(member.trained.class_voxels)
                pairs = zip(member.trained.classes, member.trained.class_voxels, strict=True)
                return {name: voxels / total for name, voxels in pairs}
    return {}


def dataset_view(material: Material, colours: Mapping[str, str]) -> DatasetView:
    facts = (material.check or {}).get("facts")
    dataset = material.dataset
    told: list[tuple[str, str]] = []
    if dataset is not None:
        told += _described(dataset)
        told.append(("channels", ", ".join(dataset.channels)))
    told += _grid(facts, dataset)
    classes, counted = _classes(material, facts, colours)
    problems = [
        Problem(one["severity"], one.get("case") or one.get("file") or "", one["text"], one["way_out"])
        for one in (material.check or {}).get("problems", ())
    ]
    name = dataset.name if dataset else str(material.runs[0].recipe["data"]["root"])
    return DatasetView(
        name,
        tuple(told),
        _sets(material.runs),
        classes,
        counted,
        tuple(problems[:MOST_PROBLEMS]),
        len(problems) - min(len(problems), MOST_PROBLEMS),
        material.check is not None,
    )


def recipe_view(runs: Sequence[Run]) -> RecipeView:
    flat = [_flat(run.recipe) for run in runs]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    differing = tuple(
        (key, tuple(one.get(key, "") for one in flat)) for key in keys if len({one.get(key, "") for one in flat}) > 1
    )
    texts = tuple((run.name, yaml.safe_dump(dict(run.recipe), sort_keys=False, allow_unicode=True)) for run in runs)
    return RecipeView(differing, tuple(run.name for run in runs), texts)


def _described(dataset: RawDataset) -> list[tuple[str, str]]:
    try:
        description = read_description(dataset.root)
    except DataError:
        return []
    told = [
        ("licence" if key == "license" else key, str(description[key]).strip())
        for key in _TOLD
        if description.get(key) and not isinstance(description[key], dict | list)
    ]
    return [*told, ("folder", str(dataset.root))]


def _grid(facts: Mapping[str, Any] | None, dataset: RawDataset | None) -> list[tuple[str, str]]:
    """Median and extremes of size and spacing, axes as superior, anterior, right."""
    if facts and facts.get("size") and facts.get("spacing"):
        size, spacing = facts["size"], facts["spacing"]
    elif dataset is not None:
        shapes, spacings = _headers(dataset)
        if not shapes:
            return []
        size, spacing = _spread(shapes), _spread(spacings)
    else:
        return []
    axes = _TIMES.join(("superior", "anterior", "right"))
    return [
        (f"median size, {axes}", f"{_times(size['median'])} voxels ({_times(size['low'])} to {_times(size['high'])})"),
        (
            f"median spacing, {axes}",
            f"{_times(spacing['median'])} mm ({_times(spacing['low'])} to {_times(spacing['high'])})",
        ),
    ]


def _headers(dataset: RawDataset) -> tuple[list[Sequence[float]], list[Sequence[float]]]:
    shapes: list[Sequence[float]] = []
    spacings: list[Spacing] = []
    for case in dataset.cases.values():
        if case.images[0].is_dir():
            continue  # a series of slices has no header of its own
        try:
            shape, affine = read_geometry(case.images[0])
        except ImageError:
            continue
        axes, _ = canonical_orientation(affine)
        own = spacing_of(affine)
        shapes.append([shape[axis] for axis in axes])
        spacings.append((own[axes[0]], own[axes[1]], own[axes[2]]))
    return shapes, list(spacings)


def _spread(triples: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    return {
        name: [choose(axis) for axis in zip(*triples, strict=True)]
        for name, choose in (("low", min), ("median", statistics.median), ("high", max))
    }


def _times(triple: Sequence[float]) -> str:
    return _TIMES.join(short(side) for side in triple)


def _classes(
    material: Material, facts: Mapping[str, Any] | None, colours: Mapping[str, str]
) -> tuple[tuple[ClassRow, ...], str]:
    """The rarest first."""
    cases: dict[str, int | None] = {}
    if facts:
        shares = {one["name"]: one["share"] for one in facts["classes"]}
        cases = {one["name"]: one["cases"] for one in facts["classes"]}
        counted = "all label files"
    else:
        shares, counted = voxel_shares(material), "the labelled training scans, as prepared"
    foreground = {name: share for name, share in shares.items() if name in colours}
    largest = max(foreground.values(), default=0)
    rows = [
        ClassRow(
            name,
            colours[name],
            cases.get(name),
            percent(share),
            _ratio(largest / share) if share else NONE,
            100 * share / largest if largest else 0,
        )
        for name, share in sorted(foreground.items(), key=lambda item: item[1])
    ]
    return tuple(rows), counted


def _ratio(times: float) -> str:
    return f"1 : {times:,.0f}" if times >= 10 else f"1 : {times:.1f}"


def _sets(runs: Sequence[Run]) -> tuple[tuple[str, int, int, int, int], ...]:
    splits = {member.split.digest: member.split for run in runs for member in run.members if member.split is not None}
    return tuple(
        (split.name, len(split.labelled), len(split.unlabelled), len(split.val), len(split.test))
        for split in splits.values()
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = (
                yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
            )
    return flat
