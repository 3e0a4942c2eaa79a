"""A plan as a recipe file for people: every choice with its reason as a comment."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from tailseg.data.fingerprint import PERCENTILES, Channel, Fingerprint
from tailseg.data.plan import GB, Machine, Plan, duration
from tailseg.data.splits import Split

WIDTH = 120
_SETS = ("labelled", "unlabelled", "validation", "test")


def recipe_text(plan: Plan, header: Iterable[str]) -> str:
    """The YAML file. header: lines of the opening comment."""
    lines = [f"# {line}".rstrip() for line in header]
    open_sections: list[str] = []
    for choice in plan.choices:
        *sections, key = choice.key.split(".")
        shared = 0
        while shared < min(len(sections), len(open_sections)) and sections[shared] == open_sections[shared]:
            shared += 1
        for depth, section in enumerate(sections[shared:], shared):
            lines.append(f"{'  ' * depth}{section}:")
        open_sections = sections
        indent = "  " * len(sections)
        lines += _with_reason(f"{indent}{key}: {_flow(choice.value)}", choice.reason, indent)
    return "\n".join(lines) + "\n"


def header(
    fingerprint: Fingerprint, plan: Plan, machine: Machine, name: str, split: Split, hints: Sequence[str]
) -> list[str]:
    """What was found, what it will take, and how to go on."""
    counts = (len(split.labelled), len(split.unlabelled), len(split.val), len(split.test))
    sets = ", ".join(f"{count} {each}" for count, each in zip(counts, _SETS, strict=True))
    lines = [f"{name}: {sets} scans. Made by `tailseg plan`."]
    lines += [
        "Every choice says its reason; edit what you know better. Every key left out has a default (`tailseg show`)."
    ]
    lines += ["", *fingerprint_lines(fingerprint), "", *estimate_lines(plan, machine)]
    for note in plan.notes:
        lines += textwrap.wrap(f"Note: {note}", WIDTH - 2)
    return [*lines, "", *hints, ""]


def fingerprint_lines(fingerprint: Fingerprint) -> list[str]:
    """Grids, intensities and classes as a small table."""
    lines = [
        f"What {len(fingerprint.grids)} labelled scans are like (D, H, W, right-anterior-superior; median, least to most):"
    ]
    turned = [grid.turned("canonical") for grid in fingerprint.grids]
    lines.append("  size, voxels    " + _spread([[float(side) for side in shape] for shape, _ in turned]))
    lines.append("  spacing, mm     " + _spread([list(spacing) for _, spacing in turned]))
    lines.append(f"Intensities, the {', '.join(f'{value:g}' for value in PERCENTILES)} % percentiles:")
    lines += [f"  {_one_line(channel.name)}: {_channel(channel)}" for channel in fingerprint.channels]
    lines.append("Classes: share of the annotated voxels, of the foreground, scans that hold them:")
    width = max(len(_one_line(fingerprint.classes[label])) for label in range(1, len(fingerprint.classes)))
    for label in [
        *fingerprint.by_size,
        *(i for i in range(1, len(fingerprint.classes)) if not fingerprint.class_voxels[i]),
    ]:
        share, foreground = fingerprint.shares[label], fingerprint.foreground_share
        part = share / foreground if foreground else 0.0
        held = f"{fingerprint.class_cases[label]} of {len(fingerprint.grids)}"
        lines.append(f"  {_one_line(fingerprint.classes[label]):{width}}  {share:8.3%}  {part:7.2%}  {held}")
    lines.append(f"Imbalance, largest to smallest class: {fingerprint.imbalance:.3g} : 1")
    if fingerprint.ignored_voxels:
        lines.append(f"Voxels that nobody annotated: {fingerprint.ignored_voxels:,}")
    return lines


def estimate_lines(plan: Plan, machine: Machine) -> list[str]:
    """What it will take, the rule behind it, and how far to trust it."""
    told = plan.estimates
    steps = (
        f"preparing {duration(told.preparing)}, {told.steps} steps of {told.seconds_per_step:.2g} s, "
        f"validation {duration(told.validation)}"
    )
    where = "GPU memory" if machine.is_gpu else "memory"
    return [
        f"What it takes on {machine.name}:",
        f"  time    about {duration(told.total)}: {steps}",
        f"  {where}  about {told.memory / GB:.1f} GB a step; RAM up to {told.ram / GB:.1f} GB; disk {told.store / GB:.2g} GB",
        "  Rule: a pass of the network, timed here on a small patch, times voxels, patches and the measured cost of the",
        "  method; memory is what a pass keeps. Time may be off by a factor of 2 on an idle machine, memory by a third.",
    ]


def _with_reason(line: str, reason: str, indent: str) -> list[str]:
    reason = _one_line(reason)
    if len(line) + 4 + len(reason) <= WIDTH:
        return [f"{line}  # {reason}"]
    return [*(f"{indent}# {part}" for part in textwrap.wrap(reason, WIDTH - len(indent) - 2)), line]


def _flow(value: Any) -> str:
    """A value on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _spread(rows: Sequence[Sequence[float]]) -> str:
    columns = list(zip(*rows, strict=True))
    low, median, high = (" x ".join(f"{of(column):.4g}" for column in columns) for of in (min, statistics.median, max))
    return median if low == high else f"{median}   ({low} to {high})"


def _channel(channel: Channel) -> str:
    overall, inside = (", ".join(f"{value:.4g}" for value in values) for values in (channel.overall, channel.inside))
    return f"{overall} overall; {inside} inside the classes; extremes {channel.low:.4g} and {channel.high:.4g}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
