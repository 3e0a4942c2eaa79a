"""From a folder and this machine to a recipe: what `tailseg plan` chooses from, and how it goes about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tailseg.components import builtin_names, make_build, make_method, method_card
from tailseg.core import Method, SegNet, Task
from tailseg.data.fingerprint import Fingerprint, take_fingerprint
from tailseg.data.machine import look_at_machine, measure_cost
from tailseg.data.plan import (
    Dims,
    Machine,
    Menu,
    MethodChoice,
    NetworkChoice,
    NetworkCost,
    Places,
    Plan,
    make_plan,
    plan_splits,
)
from tailseg.data.plan_file import header, recipe_text
from tailseg.data.raw import RawDataset, read_raw
from tailseg.data.splits import SETS, Split, read_split
from tailseg.files import write_json, write_text
from tailseg.options import OptionError
from tailseg.progress import Report, silent
from tailseg.recipe import load_recipe


@dataclass(frozen=True)
class Planned:
    """What plan() wrote, and what it saw on the way. split_file: None where the data set's own splits are used."""

    recipe: Path
    split_file: Path | None
    plan: Plan
    fingerprint: Fingerprint
    machine: Machine


def plan(
    root: Path,
    out: Path | None = None,
    *,
    split: str | None = None,
    test: Sequence[str] = (),
    hours: float = 8.0,
    device: str = "auto",
    method: str | None = None,
    store: Path = Path("stores"),
    force: bool = False,
    workers: int = 1,
    report: Report = silent,
) -> Planned:
    """Look at a data set and at this machine, and write a recipe whose comments say why each choice was made.

    out: the file, default <name of root>.yaml. split: one of root's own; else the labelled cases are split for validation,
    and the splits lie beside the recipe. test: labelled cases that these splits keep out of the training. hours: for the
    whole run. method: instead of the one that the data suggest.

    Raises OptionError where out exists and force is false, PlanError where nothing fits.
    """
    out = Path(f"{root.resolve().name}.yaml") if out is None else out
    split_file = out.with_name(f"{out.stem}_splits.json").resolve()
    for path in (out, *([] if split else [split_file])):
        if path.exists() and not force:
            raise OptionError(f"{path} exists; add --force to replace it, or choose another --out.")
    if out.resolve().is_relative_to(root.resolve()):
        raise OptionError(f"{out} lies in the data set, which is never written to; choose another --out.")
    if split and test:
        raise OptionError("--test goes with splits made here; the split named with --split has its own test cases.")
    dataset = read_raw(root)
    machine = look_at_machine(device, store)
    if split:
        splits, why = [read_split(dataset, split)], "the data set's own"
        read, headers = splits[0].labelled, [*splits[0].unlabelled, *splits[0].val]
        fingerprint = take_fingerprint(dataset, read, headers, workers=workers, progress=report)
    else:
        patients = {case: files.patient for case, files in dataset.cases.items()}
        labelled = [case for case, files in dataset.cases.items() if files.label is not None]
        sealed = {patients.get(case) for case in test}
        read = [case for case in labelled if patients[case] not in sealed]
        headers = [case for case in dataset.cases if case not in labelled and patients[case] not in sealed]
        fingerprint = take_fingerprint(dataset, read, headers, workers=workers, progress=report)
        splits, why = plan_splits(patients, labelled, test, fingerprint.held)
    menu = _menu(dataset, machine)
    made = make_plan(
        fingerprint,
        splits[0],
        why,
        Places(str(root.resolve()), str(store), None if split else str(split_file)),
        machine,
        menu,
        hours=hours,
        workers=workers,
        method=_method_choice(method, dataset) if method else None,
        patients_named=any(case.patient != case.id for case in dataset.cases.values()),
    )
    load_recipe(made.to_tree())  # refuses what no run could use before anything is written
    if not split:
        source = f"made by `tailseg plan` for {out.name}: {why}"
        write_json(split_file, {each.name: _plain_sets(each) | {"source": source} for each in splits})
    run, hints = (
        f"runs/{out.stem}",
        ["To see every default, to train, and to train the labelled-only reference on as many patches:"],
    )
    hints += [f"  tailseg show {out}", f"  tailseg train {out} --out {run}"]
    if made["data.batch"][1]:
        alone = f"method={menu.alone.name} 'data.batch=[{sum(made['data.batch'])},0]'"
        hints.append(f"  tailseg train {out} {alone} --out {run}_labelled_only")
    write_text(out, recipe_text(made, header(fingerprint, made, machine, dataset.name, splits[0], hints)))
    return Planned(out, None if split else split_file, made, fingerprint, machine)


def _plain_sets(split: Split) -> dict[str, Any]:
    return {each: list(getattr(split, each)) for each in SETS}


def _menu(dataset: RawDataset, machine: Machine) -> Menu:
    """What `plan` chooses from: methods by what they are good at, networks with what was measured of them here."""
    measured: dict[tuple[int, int], NetworkCost] = {}
    gpu = machine.is_gpu
    networks: dict[Dims, NetworkChoice] = {
        3: NetworkChoice(
            "vnet",
            16,
            (32, 16) if gpu else (16, 8),
            [(2, 2)],
            0.03,
            "the network of the published 3D runs",
        ),
        2: NetworkChoice(
            "unet",
            16,
            (32, 16) if gpu else (16, 8),
            [(12, 12), (8, 8), (4, 4)],
            0.01,
            "the network of the published 2D runs",
        ),
    }

    def cost(spatial_dims: Dims, width: int) -> NetworkCost:
        if (spatial_dims, width) not in measured:
            task = _bare_task(dataset, spatial_dims)
            build = make_build(networks[spatial_dims].name, {"width": width}, task)
            measured[spatial_dims, width] = measure_cost(build, spatial_dims, task.in_channels, machine.device)
        return measured[spatial_dims, width]

    small: dict[tuple[str, int], Method] = {}

    def accepts(method: MethodChoice, batch: tuple[int, int], patch_size: tuple[int, ...]) -> bool:
        spatial_dims: Dims = 3 if len(patch_size) == 3 else 2
        key = method.name, spatial_dims
        if key not in small:
            small[key] = _small_method(method.name, dataset, spatial_dims)[1]
        try:
            small[key].check_batch(*batch, patch_size)
        except ValueError:
            return False
        return True

    return Menu(
        alone=_method_choice("supervised", dataset, "every other method wants unlabelled ones"),
        strong=_method_choice("dhc", dataset, "two networks weigh the classes by how rare and how hard they are"),
        mild=_method_choice("cps", dataset, "two networks that label for each other do without class weights")
        if gpu
        else _method_choice(
            "mean_teacher",
            dataset,
            "a teacher that follows one network does without class weights, and a CPU has time for it",
        ),
        networks=networks,
        costs=cost,
        accepts=accepts,
    )


def _bare_task(dataset: RawDataset, spatial_dims: Dims) -> Task:
    """The task before anything is known of its voxels."""
    classes = len(dataset.classes)
    return Task(dataset.classes, len(dataset.channels), spatial_dims, (1.0, 1.0, 1.0), (1,) * classes)


def _small_method(name: str, dataset: RawDataset, spatial_dims: Dims) -> tuple[SegNet, Method]:
    """A network of little width, and the method with such networks, to ask it what it takes."""
    state = torch.get_rng_state()
    task = _bare_task(dataset, spatial_dims)
    build = make_build("vnet", {"width": 4}, task)
    made = build(), make_method(name, {}, task, build)
    torch.set_rng_state(state)
    return made


def _method_choice(name: str, dataset: RawDataset, why: str = "") -> MethodChoice:
    """What a step of the method costs, by its card, and how many networks it holds, by its parameters."""
    net, method = _small_method(name, dataset, 3)
    one = sum(parameter.numel() for parameter in net.parameters())
    learns = sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
    follows = sum(parameter.numel() for parameter in method.parameters() if not parameter.requires_grad)
    cost = method_card(name).cost.removeprefix("x") if name in builtin_names("methods") else ""
    known = cost.replace(".", "", 1).isdigit()
    return MethodChoice(name, float(cost) if known else 4.0, max(1, round(learns / one)), round(follows / one), why)
