"""The page itself: one HTML file that asks nothing of the network."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from tailseg.report import charts
from tailseg.report.cases import Galleries, galleries
from tailseg.report.collect import LABELLED_ONLY, Material, Run
from tailseg.report.colours import class_colours
from tailseg.report.dataset import dataset_view, recipe_view, voxel_shares
from tailseg.report.numbers import NONE, fixed, per_case, short, signed
from tailseg.report.outliers import LIMIT, Outlier, outliers
from tailseg.report.tables import group_view, verdict_view
from tailseg.report.training import training_view
from tailseg.report.viewer import LEAST_BUDGET, MAX_CLASSES, ViewerCase, viewer_html

MOST_BYTES = 12_000_000
"""Of a page, so that it goes by mail. The 3D viewer gets what the rest leaves."""
_TEMPLATES = Path(__file__).parent / "templates"
_GROUPS = {"test": "test", "val": "validation", "unlabelled": "unlabelled", "labelled": "labelled"}


@dataclass(frozen=True)
class RunFact:
    """A row of the table of runs. style: its colour and marker."""

    name: str
    style: int
    method: str
    title: str
    folder: str
    patches: str
    steps: str
    best: str
    parameters: str


def report_page(
    material: Material,
    *,
    cases: int = 30,
    progress: Callable[[int, int, str], None] = lambda done, total, case: None,
) -> str:
    """The HTML. cases: scans that are shown, as slices and in 3D; progress: told (done, total, case) of them."""
    colours = dict(zip(material.classes, class_colours(material.classes), strict=True))
    styles = _styles(material.runs)
    shown = galleries(material, cases, progress)
    context = {
        "material": material,
        "made": f"{datetime.now().astimezone():%Y-%m-%d %H:%M}",
        "version": version("tailseg"),
        "palette": list(colours.values()),
        "runs": [_run_fact(run, styles[run.name], material) for run in material.runs],
        "markers": [_marker(index) for index in range(charts.RUNS)],
        "answers": [(answer, verdict_view(answer.verdict, colours)) for answer in material.answers],
        "way_to_reference": _way_to_reference(material),
        "missing": [text for run in material.runs for text in run.missing],
        "caveats": list(dict.fromkeys((run.name, text) for run in material.runs for text in run.caveats)),
        "groups": [group_view(group, colours, styles) for group in material.groups],
        "training": training_view(material.runs, material.classes, voxel_shares(material), styles),
        "galleries": shown.galleries,
        "volumes": _volumes(material, colours),
        "dataset": dataset_view(material, colours),
        "recipes": recipe_view(material.runs),
        "cards": [
            (run.method, material.cards[run.method])
            for run in {run.method: run for run in material.runs}.values()
            if run.method in material.cards
        ],
        "versions": _versions(material.runs),
        "styles": styles,
        "css": Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8")),
        "js": Markup((_TEMPLATES / "page.js").read_text(encoding="utf-8")),
    }
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"fixed": fixed, "signed": signed, "short": short, "code": _code, "breakable": _breakable}
    environment.globals |= {"per_case": per_case}
    template = environment.get_template("page.html.jinja")
    size = len(template.render(context | {"viewer": ""}).encode())
    viewer = Markup(_viewer(shown, material, colours, MOST_BYTES - size))
    return template.render(context | {"viewer": viewer})


def _styles(runs: Sequence[Run]) -> dict[str, int]:
    """Run -> colour and marker. The labelled-only reference, the first one, is grey."""
    styles: dict[str, int] = {}
    grey = next((run.name for run in runs if run.labelled_only), None)
    free = iter(index for index in range(len(runs) + 1) if index != 1)
    for run in runs:
        styles[run.name] = 1 if run.name == grey else next(free)
    return styles


def _marker(index: int) -> Markup:
    """The marker of a run, as the charts have it."""
    shapes = (
        '<circle cx="6" cy="6" r="4.5"/>',
        '<rect x="2" y="2" width="8" height="8"/>',
        '<path d="M6 .8 11.2 6 6 11.2 .8 6z"/>',
        '<path d="M6 1.5 11 10.5H1z"/>',
        '<path d="M6 10.5 11 1.5H1z"/>',
        '<path d="M4 1h4v3h3v4H8v3H4V8H1V4h3z"/>',
        '<path d="M3 .8 6 3.8 9 .8 11.2 3 8.2 6l3 3L9 11.2 6 8.2 3 11.2.8 9l3-3-3-3z"/>',
        '<path d="m6 .5 1.6 3.7 4 .3-3 2.7.9 4L6 9.1 2.5 11.2l.9-4-3-2.7 4-.3z"/>',
    )
    return Markup(
        f'<svg class="marker" viewBox="0 0 12 12" width="12" height="12" style="fill:var(--run{index % charts.RUNS})" '
        f'aria-hidden="true">{shapes[index % len(shapes)]}</svg>'
    )


def _run_fact(run: Run, style: int, material: Material) -> RunFact:
    means = [line["mean"] for member in run.members for line in member.lines if isinstance(line.get("mean"), float)]
    steps = [max((line["step"] for line in member.lines), default=0) for member in run.members]
    trained = run.members[0].trained
    card = material.cards.get(run.method)
    labelled, unlabelled = run.recipe["data"]["batch"]
    folds = f", {len(run.members)} folds" if len(run.members) > 1 else ""
    return RunFact(
        run.name,
        style,
        run.method,
        card.title if card else "",
        str(run.folder) + folds,
        f"{labelled} labelled + {unlabelled} unlabelled",
        short(max(steps, default=0)) if any(steps) else NONE,
        fixed(100 * max(means)) if means else NONE,
        f"{trained.parameters / 1e6:.2f} million" if trained else NONE,
    )


def _way_to_reference(material: Material) -> str:
    """How to get what the first run without an answer lacks; empty if every one has it."""
    answered = {answer.run.name for answer in material.answers}
    run = next((run for run in material.runs if not run.labelled_only and run.name not in answered), None)
    if run is None:
        return ""
    member = run.members[0].folder
    batch = sum(run.recipe["data"]["batch"])
    reference = member.with_name(member.name + LABELLED_ONLY)
    cases, protocol = _scored_as(run)
    place, data = reference / "predictions" / cases, run.recipe["data"]["root"]
    recipe = _shell(member / "recipe.yaml")
    commands = (
        f"train {recipe} method=supervised 'data.batch=[{batch},0]' --out {_shell(reference)}",
        f"predict {_shell(reference)} {cases} {_shell(place)}",
        f"evaluate {_shell(place)} {_shell(data)}{protocol}",
        f"report {_shell(member)} {_shell(reference)}",
    )
    return "\n".join(f"tailseg {command}" for command in commands)


def _scored_as(run: Run) -> tuple[str, str]:
    """The set that the run was scored on, or could be, and the option of its protocol."""
    split = run.members[0].split
    if run.scored is None:
        return ("test" if split is None or split.test else "val"), ""
    name = run.scored.scores.protocol.name
    return ("val" if run.scored.cases_of == "val" else "test"), "" if name == "native" else f" --protocol {name}"


def _shell(path: Any) -> str:
    return shlex.quote(str(path))


@dataclass(frozen=True)
class VolumesView:
    run: str
    chart: str
    narrow: str
    outliers: tuple[Outlier, ...]
    cases: int
    limit: float
    unit: str


def _volumes(material: Material, colours: dict[str, str]) -> list[VolumesView]:
    views = []
    for run in material.runs:
        if run.unlabelled is None:
            continue
        volumes, unit = run.unlabelled.volumes, run.unlabelled.unit
        classes = [name for name in material.classes if any(name in one for one in volumes.values())]
        if not classes:
            continue
        classes.sort(key=lambda name: statistics.median(one[name] for one in volumes.values() if name in one))
        found = outliers(volumes, classes)
        values = {name: [(case, one[name]) for case, one in volumes.items() if name in one] for name in classes}
        away = {(one.case, one.name) for one in found}
        own = [colours[name] for name in classes]
        wide, narrow = (charts.volumes(classes, own, values, away, unit=unit, size=(width, 0)) for width in (860, 350))
        views.append(VolumesView(run.name, wide, narrow, found, len(volumes), LIMIT, unit))
    return views


def _versions(runs: Sequence[Run]) -> list[tuple[str, str]]:
    told = [
        (run.name, ", ".join(f"{name} {number}" for name, number in member.trained.versions.items()))
        for run in runs
        for member in run.members[:1]
        if member.trained
    ]
    return list(dict.fromkeys(told))


def _viewer(shown: Galleries, material: Material, colours: dict[str, str], budget: int) -> str:
    """Empty where there is nothing to turn."""
    if not shown.shown:
        return ""
    first: dict[str, Any] = {}
    for one in shown.shown:
        first.setdefault(one.case, one)
    values = shown.shown[0].label_values
    same = {case: one for case, one in first.items() if one.label_values == values}
    if not set(material.classes) <= values.keys():
        return ""
    names = sorted(values, key=lambda name: values[name])  # the background, whose value is 0, first
    if budget < LEAST_BUDGET or len(names) > MAX_CLASSES:
        return "<p>The rest of the page leaves no room for the scans in 3D; show fewer with <code>--cases</code>.</p>"
    viewer_cases = [
        ViewerCase(
            case=one.case,
            group=_GROUPS[one.cases_of],
            image=one.images if len(one.images) > 1 else one.images[0],
            prediction=one.prediction,
            reference=one.reference,
            score=one.score,
        )
        for one in same.values()
    ]
    others = [case for case in first if case not in same]
    left_out = (
        f"<p>Not in 3D, since their label files have other values: {escape(', '.join(others))}.</p>" if others else ""
    )
    in_three_d = viewer_html(
        viewer_cases,
        names,
        [values[name] for name in names],
        [colours[name] for name in names[1:]],
        budget=budget - len(left_out.encode()),
    )
    return left_out + in_three_d


def _code(text: str) -> Markup:
    """`commands` in a sentence as code."""
    parts = str(text).split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if index % 2 else Markup("{}").format(part)
        for index, part in enumerate(parts)
    )


def _breakable(name: str) -> Markup:
    """A class name that may break after its underscores."""
    return Markup("_<wbr>").join(name.split("_"))
