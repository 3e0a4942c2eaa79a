"""Write one export: a folder that appears when it is complete and checked, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from tailseg.export import model_card, monai_bundle, onnx, preparation, safetensors, torch_program, usage
from tailseg.export.check import Checked, Network, check_bundle, check_network, find_scan
from tailseg.export.network import PredictionNetwork, Traced, reverse_axes, trace
from tailseg.export.trained import ExportError, TrainedModel
from tailseg.files import write_json, write_text
from tailseg.options import suggest

Format = Literal["onnx", "torch", "safetensors", "monai-bundle"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class Exported:
    """files: relative to folder. usage: two or three lines on how to run it. notes: what the user should
    know, one sentence each."""

    folder: Path
    files: tuple[str, ...]
    checked: Checked
    usage: str
    notes: tuple[str, ...] = ()


def write_export(
    model: TrainedModel,
    file_format: str,
    output: Path,
    *,
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Export, load back, check, describe; output appears last. say: told what is being done.

    Raises ExportError for an unknown format, a missing package, an output that is there already (unless force), a network that
    cannot be traced, and one that does not predict what TailSeg does.
    """
    if file_format not in FORMATS:
        raise ExportError(f"There is no format '{file_format}'. {suggest(file_format, FORMATS)}")
    _check_output(output, force)
    _require(model, file_format)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as name:
        folder = Path(name) / output.name
        folder.mkdir()
        made = _write(folder, model, file_format, say)
        _replace(folder, output, Path(name) / "old")
    return Exported(output, _files(output), *made)


def _write(
    folder: Path, model: TrainedModel, file_format: str, say: Callable[[str], None]
) -> tuple[Checked, str, tuple[str, ...]]:
    say("tracing the network")
    network = PredictionNetwork(model.methods, reverse_axes=file_format == "monai-bundle")
    left_out = network.drop_unused()
    traced = None if file_format == "safetensors" else trace(network, model.recipe.data.patch_size)
    description = preparation.describe(model, network, traced)
    say(f"writing {file_format}")
    exported, more = _write_and_load(folder, model, file_format, network, traced, left_out, description)
    other_size = traced.other_size if traced else None
    say("checking it against TailSeg's own prediction")
    scan = find_scan(model)
    if file_format == "monai-bundle":
        checked = check_bundle(model, exported, folder, scan, other_size=other_size)
    else:
        checked = check_network(model, exported, scan, other_size=other_size)
    made = {"parameters": sum(each.numel() for each in network.parameters()), **more}
    _describe(folder, model, description, checked, file_format, made)
    return checked, usage.in_short(file_format), _notes(model, traced, checked)


def _write_and_load(
    folder: Path,
    model: TrainedModel,
    file_format: str,
    network: PredictionNetwork,
    traced: Traced | None,
    left_out: Sequence[str],
    description: dict[str, Any],
) -> tuple[Network, dict[str, Any]]:
    """The network as it is read back from the files, with the axes (D, H, W); facts about the files."""
    if traced is None:
        safetensors.write(folder, model, network, left_out)
        return safetensors.load_safetensors(folder), {}
    if file_format == "onnx":
        made = onnx.write(folder, network, traced, description)
        return onnx.load(folder), made
    if file_format == "torch":
        torch_program.write(folder / torch_program.FILE, traced, description)
        return torch_program.load(folder / torch_program.FILE), {}
    path = folder / monai_bundle.PROGRAM
    path.parent.mkdir()
    torch_program.write(path, traced, description)
    monai_bundle.write(folder, model, traced)
    bundled = torch_program.load(path)
    return lambda x: reverse_axes(bundled(reverse_axes(x))), {}


def _describe(
    folder: Path,
    model: TrainedModel,
    description: dict[str, Any],
    checked: Checked,
    file_format: str,
    made: dict[str, Any],
) -> None:
    card = model_card.facts(model, description, checked, file_format, made)
    text = model_card.render(card, description, usage.in_full(file_format, description))
    write_json(folder / preparation.FILE, description)
    write_json(folder / model_card.FACTS, card)
    write_text(folder / model_card.FILE, text)
    if file_format == "monai-bundle":
        write_text(folder / "docs" / "README.md", text)
        write_text(folder / "LICENSE", monai_bundle.licence(card))


def _notes(model: TrainedModel, traced: Traced | None, checked: Checked) -> tuple[str, ...]:
    notes = []
    if traced is not None and not all(traced.free):
        notes.append(f"Not every side of a patch is free, {model.recipe.data.patch_size} is safe: {traced.reason}.")
    if not checked.real:
        notes.append("No scan of the data set could be read, so the check ran on made-up noise.")
    if len(model.methods) > 1:
        notes.append(f"The average of {', '.join(model.names)}; --fold exports one of them.")
    return tuple(notes)


def _require(model: TrainedModel, file_format: str) -> None:
    if file_format == "onnx":
        onnx.require()
    elif file_format == "safetensors":
        safetensors.require()
    elif file_format == "monai-bundle":
        monai_bundle.require(model)


def _check_output(output: Path, force: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir() or not ((output / model_card.FACTS).is_file() or not any(output.iterdir())):
        raise ExportError(f"{output} is there and holds no export; choose another --out.")
    if any(output.iterdir()) and not force:
        raise ExportError(f"{output} holds an export already; add --force to replace it, or choose another --out.")


def _replace(folder: Path, output: Path, aside: Path) -> None:
    if output.exists():
        output.replace(aside)
    try:
        os.replace(folder, output)  # noqa: PTH105  a folder onto a free name
    except OSError:
        if aside.exists():
            aside.replace(output)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _files(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))
