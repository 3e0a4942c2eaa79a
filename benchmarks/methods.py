"""Every method on one short equal budget: what a step costs, whether the losses move, and what it segments after it.

    python benchmarks/methods.py synapse_mini      3D; all methods of tailseg, one process each
    python benchmarks/methods.py acdc_mini         2D

Needs TAILSEG_DATA. Every row trains the recipe recipes/<data set>/methods.yaml with its own method and seed 0, for the same
number of steps. Runs lie in runs/methods/<data set>; what is finished there is not done again, what was stopped goes on.
`--only` trains rows and writes nothing. The page is benchmarks/results/methods_<data set>.md; it ends with what was written
by hand in benchmarks/findings/ under the same name.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compare import ROOT, Entry, Result, machine, run

from tailseg.components import builtin_names
from tailseg.recipe import load_recipe
from tailseg.train.metrics_log import read_metrics

DATA = ("synapse_mini", "acdc_mini")
PRETRAIN = (
    "method.pretrain=0.5"  # 2/17 of so short a run teach the teacher nothing, and Dice stays at 0 for the rest of it
)
NEEDS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "synapse_mini": {
        "bcp": ("data.batch=[4,4]", PRETRAIN),
        "crossmatch": ("data.batch=[2,4]",),
        "dinomix": ("method.teacher=random-tiny",),
        "magicnet": ("method.cubes=2", "network.norm=instance", "network.dropout=0.0"),
        "unimatch": ("data.batch=[2,4]",),
        "urpc": ("network={name: urpc_unet, width: 8}",),
    },
    "acdc_mini": {
        "bcp": (PRETRAIN,),
        "crossmatch": ("data.batch=[4,8]",),
        "dinomix": ("method.teacher=random-tiny",),
        "magicnet": ("method.cubes=2", "network.norm=instance", "network.dropout=0.0"),
        "unimatch": ("data.batch=[4,8]",),
        "urpc": ("network={name: urpc_unet, width: 8}",),
    },
}
"""What a method's row changes in the recipe beside its name, so that its own batch and network are as its paper has them."""


@dataclass(frozen=True)
class Course:
    """How the losses of a run went: by name, the mean over the first and over the last tenth of the lines that hold it."""

    first: dict[str, float]
    last: dict[str, float]


def entries(data: str) -> list[Entry]:
    recipe = f"recipes/{data}/methods.yaml"
    return [
        Entry(name, recipe, (f"method={{name: {name}}}", *NEEDS[data].get(name, ())))
        for name in builtin_names("methods")
    ]


def course(result: Result) -> Course:
    lines = read_metrics(result.folder / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "train"]
    first, last = {}, {}
    for name in dict.fromkeys(name for line in steps for name in line["losses"]):
        values = [line["losses"][name] for line in steps if name in line["losses"]]  # a loss may belong to a stage
        some = max(len(values) // 10, 1)
        first[name], last[name] = sum(values[:some]) / some, sum(values[-some:]) / some

    return Course(first, last)


def cost_table(results: Sequence[Result]) -> list[str]:
    base = next(
        result.facts["cpu_s"] / result.facts["steps"] for result in results if result.entry.name == "supervised"
    )
    lines = [
        "| method | CPU s a step | times labelled-only | peak memory MiB | losses, first to last tenth | commit |",
        "| --- | ---: | ---: | ---: | --- | --- |",
    ]
    for result in results:
        facts, how = result.facts, course(result)
        each = facts["cpu_s"] / facts["steps"]
        moved = ", ".join(f"{name} {how.first[name]:.3g} to {how.last[name]:.3g}" for name in how.first)
        lines.append(
            f"| {result.entry.name} | {each:.2f} | {each / base:.1f} | {facts['peak_rss_mib']:.0f} | {moved} "
            f"| {facts['commit']} |"
        )
    return lines


def dice_table(results: Sequence[Result], protocol: str) -> list[str]:
    classes = results[0].summaries["last"][protocol].classes
    names = [one.name.replace("_", " ") + (" *" if one.rare else "") for one in classes]
    lines = [
        f"| method | mean | 95 % interval | {' | '.join(names)} |",
        f"| --- | ---: | ---: | {' | '.join('---:' for _ in names)} |",
        f"| *share of foreground, %* | | | {' | '.join(f'{100 * one.share:.2f}' for one in classes)} |",
    ]
    for result in results:
        summary = result.summaries["last"][protocol]
        mean = summary.overall["dice"]
        cells = [f"{100 * one.metrics['dice'].mean:.1f}" for one in summary.classes]
        interval = f"{100 * mean.low:.1f} to {100 * mean.high:.1f}"
        lines.append(f"| {result.entry.name} | **{100 * mean.mean:.2f}** | {interval} | {' | '.join(cells)} |")
    return lines


def report(data: str, results: Sequence[Result], note: str) -> str:
    recipe = load_recipe(ROOT / results[0].entry.recipe)
    (protocol,) = recipe.evaluate.protocols
    ranked = [result for result in results if result.entry.name != "dinomix"]
    unranked = [result for result in results if result.entry.name == "dinomix"]
    lines = [
        f"# All methods on {data}: split {recipe.data.split}, seed {recipe.seed}, {results[0].facts['steps']} steps each",
        "",
        f"Made by `python benchmarks/methods.py {data}` on {machine()}; every row at the commit beside it.",
        "The budget is short and equal in steps, one run a row and few test cases: it says what a method costs and whether it",
        "trains. It does not rank methods; many of them only unfold over a run a hundred times as long.",
        *([note] if note else []),
        "",
        "`supervised` is labelled-only training on the same budget. A row changes nothing but the method and, where its paper",
        "has another batch or network, these keys:",
        "",
        *(f"- {name}: {', '.join(f'`{key}`' for key in keys)}" for name, keys in sorted(NEEDS[data].items())),
        "",
        "## Cost and course of training",
        "",
        *cost_table(results),
        "",
    ]
    lines += [f"## Dice in % on the test cases after the last step, protocol {protocol}", ""]
    lines += [*dice_table(ranked, protocol), ""]
    lines += ["\\* among the rarest third of the classes.", ""]
    if unranked:
        lines += [
            "## With a randomly initialised teacher: not DINO-Mix, and no result of it",
            "",
            "No DINOv3 weights were at hand. This row shows that our re-design runs; its teacher knows nothing.",
            "",
            *dice_table(unranked, protocol),
            "",
        ]
    findings = ROOT / "benchmarks" / "findings" / f"methods_{data}.md"
    if findings.exists():
        lines += ["## What the numbers say", "", findings.read_text(encoding="utf-8")]
    text = results[0].summaries["last"][protocol].scores.protocol.describe()
    return "\n".join([*lines, *(f"> {line}  " for line in text.splitlines()), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=DATA)
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"), help="folder for the runs")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="train and score these rows alone, write no page")
    parser.add_argument("--note", default="", help="a sentence for the page on how the runs were made")
    arguments = parser.parse_args()
    chosen = [entry for entry in entries(arguments.data) if arguments.only is None or entry.name in arguments.only]
    if arguments.only is not None and len(chosen) == 1:
        run(chosen[0], arguments.runs / arguments.data / chosen[0].name, ["last"])
        return
    for entry in chosen:  # a process each, so that peak memory is a run's own
        if not (arguments.runs / arguments.data / entry.name / "facts.json").exists():
            print(f"== {entry.name}", flush=True)
            command = [sys.executable, __file__, arguments.data, "--runs", str(arguments.runs), "--only", entry.name]
            subprocess.run(command, check=True)
    if arguments.only is not None:
        return
    results = [run(entry, arguments.runs / arguments.data / entry.name, ["last"]) for entry in chosen]
    page = ROOT / "benchmarks" / "results" / f"methods_{arguments.data}.md"
    page.write_text(report(arguments.data, results, arguments.note), encoding="utf-8")
    print(page.read_text())


if __name__ == "__main__":
    main()
