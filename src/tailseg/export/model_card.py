"""The model card: what the network is, what it was made of, how good it was found to be, and what it must not be used for.

Every number comes from the run, its scores or the export's own check; what is not known is said to be unknown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
import yaml

from tailseg.components import builtin_names, method_card, summary
from tailseg.data.splits import SETS
from tailseg.evaluate.metrics import METRICS
from tailseg.export.check import Checked
from tailseg.export.found_scores import FoundScores, find_scores, find_verdict
from tailseg.export.preparation import prose
from tailseg.export.trained import TrainedModel

FILE, FACTS = "MODEL_CARD.md", "model_card.json"
_INTENDED = (
    "Research: to segment scans of the kind it was trained on, to compare methods, and as a first draft that a person who "
    "knows the anatomy corrects."
)
_NOT_INTENDED = (
    "Diagnosis, treatment planning, dosimetry or any other decision about a patient. It is not a medical device, was not "
    "cleared by any authority and was not tested on scanners, protocols, ages or diseases other than those of its training "
    "data. It names a class for every voxel, on scans of another body part or modality too, without any warning."
)
_SETS = {
    "test": "test cases, which training never saw",
    "val": "validation cases, on which the checkpoint was chosen, so that these scores are too good",
    "labelled": "labelled training cases: no measure of how good the network is on other scans",
    "unlabelled": "unlabelled training cases",
    "other": "cases that the run's split does not name",
}
_SHOWN = ("dice", "iou", "nsd", "hd95", "assd", "asd")


def facts(
    model: TrainedModel, preparation: Mapping[str, Any], checked: Checked, file_format: str, made: Mapping[str, Any]
) -> dict[str, Any]:
    """All that the card says, as plain values for model_card.json. made: facts about the files that were written."""
    verdict = find_verdict(model)
    return {
        "tailseg_model_card": 1,
        "format": file_format,
        "name": f"{model.data_name}: {model.recipe.method.name} on {model.recipe.network.name}",
        "intended_use": _INTENDED,
        "out_of_scope": _NOT_INTENDED,
        "classes": preparation["classes"],
        "channels": preparation["channels"],
        "training_data": _training_data(model),
        "method": _method(model),
        "network": model.recipe.network.model_dump(mode="json"),
        "recipes": [_recipe(recipe.to_dict()) for recipe in model.recipes],
        "runs": [
            {"name": name, "checkpoint": model.checkpoint, "steps": steps, "seed": recipe.seed}
            for name, steps, recipe in zip(model.names, model.steps, model.recipes, strict=True)
        ],
        "scores": [_score(one) for one in find_scores(model)],
        "verdict": verdict,
        "caveats": list(dict.fromkeys(filter(None, (method.caveat() for method in model.methods)))),
        "check": checked.to_dict() | {"sentences": checked.sentences()},
        "files": dict(made),
        "versions": {"trained": dict(model.versions), "exported": {"tailseg": version("tailseg"), "torch": torch.__version__}},
    }  # fmt: skip


def _training_data(model: TrainedModel) -> dict[str, Any]:
    dataset = model.dataset
    told: dict[str, str] = {}
    if dataset is not None:
        description = json.loads((dataset.root / "dataset.json").read_text(encoding="utf-8"))
        for key, names in {
            "description": ("description",),
            "reference": ("reference", "citation"),
            "licence": ("licence", "license"),
            "release": ("release",),
        }.items():
            value = next((description[name] for name in names if description.get(name)), None)
            if value is not None:
                told[key] = str(value)
    voxels = model.task.class_voxels
    foreground = sum(voxels[1:])
    return {
        "name": model.data_name,
        "read": dataset is not None,
        **told,
        "cases": [{each: len(getattr(split, each)) for each in SETS} for split in model.splits],
        "split_sha256": [split.digest for split in model.splits],
        "foreground_shares": {
            name: count / foreground if foreground else None
            for name, count in zip(model.task.classes[1:], voxels[1:], strict=True)
        },
    }


def _method(model: TrainedModel) -> dict[str, Any]:
    name = model.recipe.method.name
    if name not in builtin_names("methods"):
        return {"name": name, "title": name, "paper": "", "idea": "A plug-in; TailSeg knows no more of it."}
    card = method_card(name)
    return {"name": name, "title": card.title, "paper": card.paper, "idea": card.idea}


def _recipe(tree: dict[str, Any]) -> dict[str, Any]:
    """Without the folders of the machine that trained it."""
    data = {key: value for key, value in tree["data"].items() if key not in ("root", "store", "split_file")}
    return {**tree, "data": data}


def _score(one: FoundScores) -> dict[str, Any]:
    """Without the names of the cases."""
    told = {key: value for key, value in one.summary.items() if key not in ("cases", "predictions_without_reference")}
    return {"run": one.run, "cases_of": one.cases_of, "file": one.file, "cases": len(one.summary["cases"]), **told}


def render(card: Mapping[str, Any], preparation: Mapping[str, Any], usage: str) -> str:
    """The card as Markdown. usage: how to run the files, in Markdown."""
    several = len(card["runs"]) > 1
    sections = {
        "What it segments": _class_table(card),
        "Intended use": card["intended_use"],
        "Not intended for": card["out_of_scope"],
        "How to use it": usage.strip(),
        "Preparation": "\n".join(f"{n}. {_escape(step)}" for n, step in enumerate(prose(dict(preparation)), 1))
        + "\n\nThe same, for programs: `preparation.json`.",
        "Training data": _data_text(card),
        "Method": _method_text(card, several),
        "How good it is": _scores_text(card, several),
        "Caveats": "\n".join(f"- {_escape(text)}" for text in card["caveats"]) or "None that the method names.",
        "Checked when it was exported": "\n".join(f"- {_escape(text)}" for text in card["check"]["sentences"])
        + ("" if card["check"]["real"] else "\n- **No scan of the data set was used**: agreement on real ones is untested."),
        "Licence": _licence_text(card),
        "Recipe": "\n\n".join(
            _recipe_text(run, recipe, several) for run, recipe in zip(card["runs"], card["recipes"], strict=True)
        ),
        "Versions": "\n".join(
            f"- {when}: " + ", ".join(f"{name} {number}" for name, number in versions.items())
            for when, versions in card["versions"].items()
        ),
    }  # fmt: skip
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"# {_escape(card['name'])}\n\n{body}\n"


def _class_table(card: Mapping[str, Any]) -> str:
    shares = card["training_data"]["foreground_shares"]
    rows = [
        (
            str(one["index"]),
            _escape(one["name"]),
            str(one["label_value"]),
            f"{100 * share:.3g} %" if (share := shares.get(one["name"])) is not None else "",
        )
        for one in card["classes"]
    ]
    heads = ("index", "class", "value in label files", "share of the labelled training cases' foreground")
    channels = ", ".join(map(_escape, card["channels"]))
    return f"Input channels, in this order: {channels}.\n\n{_table(heads, rows)}"


def _data_text(card: Mapping[str, Any]) -> str:
    data = card["training_data"]
    lines = [f"- Data set: {_escape(data['name'])}"]
    told = [key for key in ("description", "reference", "release") if key in data]
    lines += [f"- {key.capitalize()}: {_escape(data[key])}" for key in told]
    if not data["read"]:
        lines.append(
            "- Its dataset.json was not there when the network was exported; reference and licence are unknown."
        )
    for run, cases in zip(card["runs"], data["cases"], strict=True):
        of = f" ({_escape(run['name'])})" if len(card["runs"]) > 1 else ""
        lines.append(
            f"- Cases{of}: {cases['labelled']} labelled, {cases['unlabelled']} unlabelled, {cases['val']} for validation, "
            f"{cases['test']} for test"
        )
    return "\n".join(lines)


def _method_text(card: Mapping[str, Any], several: bool) -> str:
    method, network = card["method"], card["network"]
    about = summary("networks", network["name"]) if network["name"] in builtin_names("networks") else "a plug-in"
    lines = [f"**{_escape(method['title'])}**"]
    if method["paper"]:
        lines.append(_escape(method["paper"]))
    lines += [_escape(method["idea"]), f"Network: `{network['name']}`. {_escape(about)}"]
    runs = ", ".join(f"{_escape(run['name'])} at step {run['steps']} (seed {run['seed']})" for run in card["runs"])
    lines.append(f"Checkpoint: {card['runs'][0]['checkpoint']}, of {runs}.")
    if several:
        lines.append("The probabilities of these networks are averaged.")
    return "\n\n".join(lines)


def _scores_text(card: Mapping[str, Any], several: bool) -> str:
    if not card["scores"]:
        return (
            "Nobody measured it, or not in the folder of the run: `tailseg predict RUN test RUN/predictions/test` and then "
            "`tailseg evaluate` would."
        )
    parts = ["Read from the run's folder, as `tailseg evaluate` wrote it there."]
    if several:
        parts.append("These are the scores of each network alone. **The average, which is exported, was not scored.**")
    for one in card["scores"]:
        parts += [f"### {_escape(one['run'])}: {one['cases']} {_SETS[one['cases_of']]}", _score_table(one)]
        parts += ["\n".join(f"> {_escape(line)}" for line in (*one["protocol"]["text"].splitlines(), one["method"]))]
        if one.get("caveat"):
            parts.append(f"**Caveat:** {_escape(one['caveat'])}")
    if verdict := card["verdict"]:
        parts += ["### Did the unlabelled scans help?", _escape(verdict["sentence"])]
        parts += [f"> {_escape(note)}" for note in verdict.get("notes", ())]
    return "\n\n".join(parts)


def _score_table(one: Mapping[str, Any]) -> str:
    shown = [name for name in _SHOWN if name in one["units"]]
    units = [f" ({one['units'][name]})" if one["units"][name] else "" for name in shown]
    heads = ("class", "share of the foreground", "missed / invented", *(
        f"{METRICS[name].title}{unit}" for name, unit in zip(shown, units, strict=True)
    ))  # fmt: skip
    rows = [
        (
            _escape(each["name"]) + (" (rare)" if each["rare"] else ""),
            f"{100 * each['share']:.3g} %",
            f"{each['missed']} / {each['invented']}",
            *(_interval(each["metrics"][name]) for name in shown),
        )
        for each in one["classes"]
    ]
    overall = one["mean_over_classes"]
    rows.append(("mean over classes", "", "", *(_interval(overall[name]) for name in shown)))
    return _table(heads, rows)


def _interval(metric: Mapping[str, Any]) -> str:
    if metric["mean"] is None:
        return "-"
    low, high = ("?" if metric[end] is None else f"{metric[end]:.3f}" for end in ("low", "high"))
    return f"{metric['mean']:.3f} ({low} to {high})"


def _licence_text(card: Mapping[str, Any]) -> str:
    licence = card["training_data"].get("licence")
    data = (
        f"dataset.json names this licence of the data: {_escape(licence)}."
        if licence
        else "No licence of the data is known: dataset.json names none, or was not there."
    )
    return (
        f"{data} Whether weights learnt from data fall under the data's terms is for those terms to say; treat these "
        "weights as if they did. TailSeg itself, which made them, is under the MIT licence."
    )


def _recipe_text(run: Mapping[str, Any], recipe: Mapping[str, Any], several: bool) -> str:
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip()
    return (f"{_escape(run['name'])}:\n\n" if several else "") + f"```yaml\n{text}\n```"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(text: Any) -> str:
    """Text as Markdown that shows it as it is; names of classes and cases come from files."""
    return re.sub(r"([\\`*_<>|\[\]#])", r"\\\1", " ".join(str(text).split()))
