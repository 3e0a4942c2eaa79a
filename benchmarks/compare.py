"""Train several recipes one after the other, score their test predictions, and write one table per protocol.

    python benchmarks/compare.py synapse_mini      five runs, of which a DHC run takes about 15 minutes on two cores
    python benchmarks/compare.py acdc_mini         the same methods in 2D

Needs TAILSEG_DATA. Runs lie in runs/benchmarks/<name>; what is finished there is not done again, what was stopped goes on.
Writes benchmarks/results/<name>.md and <name>_curves.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tailseg import app
from tailseg.evaluate.scores import read_scores
from tailseg.evaluate.summary import Summary, summarise
from tailseg.recipe import load_recipe
from tailseg.runtime import computes_in_bf16
from tailseg.train.checkpoint import load_checkpoint
from tailseg.train.metrics_log import read_metrics

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Entry:
    """One row: what it is called, its recipe and what it changes there."""

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()


def ablation(a: str, b: str) -> tuple[str, ...]:
    return (f"method.weighter_a={a}", f"method.weighter_b={b}")


COMPARISONS: Mapping[str, Sequence[Entry]] = {
    "synapse_mini": (
        Entry("labelled-only", "recipes/synapse_mini/supervised_20p.yaml"),
        Entry("CPS", "recipes/synapse_mini/cps_20p.yaml"),
        Entry("DistDW-DistDW", "recipes/synapse_mini/cps_20p.yaml", ablation("dist", "dist")),
        Entry("DiffDW-DiffDW", "recipes/synapse_mini/dhc_20p.yaml", ablation("diff", "diff")),
        Entry("DHC", "recipes/synapse_mini/dhc_20p.yaml"),
    ),
    "acdc_mini": (
        Entry("labelled-only", "recipes/acdc_mini/supervised_3.yaml"),
        Entry("CPS", "recipes/acdc_mini/cps_3.yaml"),
        Entry("DHC", "recipes/acdc_mini/dhc_3.yaml"),
    ),
    "synapse": (
        Entry("fully supervised", "recipes/synapse/supervised_full.yaml"),
        Entry("labelled-only", "recipes/synapse/supervised_20p.yaml"),
        Entry("CPS", "recipes/synapse/cps_20p.yaml"),
        Entry("DHC", "recipes/synapse/dhc_20p.yaml"),
    ),
}
CHECKPOINTS = {"best": "best on validation", "last": "last step"}


@dataclass(frozen=True)
class Result:
    entry: Entry
    folder: Path
    summaries: dict[str, dict[str, Summary]]  # checkpoint -> protocol -> summary

    @property
    def facts(self) -> dict[str, float]:
        return json.loads((self.folder / "facts.json").read_text())


def run(entry: Entry, folder: Path, checkpoints: Sequence[str] = tuple(CHECKPOINTS)) -> Result:
    """Train where needed, predict the test cases with the checkpoints, score them."""
    recipe = load_recipe(ROOT / entry.recipe, entry.overrides)
    if not (folder / "facts.json").exists():
        wall, cpu = time.perf_counter(), time.process_time()
        app.train(recipe, folder, resume=(folder / "last.pt").exists())
        facts = {
            "wall_s": time.perf_counter() - wall,
            "cpu_s": time.process_time() - cpu,
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "steps": load_checkpoint(folder / "last.pt")["step"],
            "best_step": load_checkpoint(folder / "best.pt")["step"],
            "commit": commit(),
        }
        (folder / "facts.json").write_text(json.dumps(facts, indent=1))
    summaries = {}
    for checkpoint in checkpoints:
        predictions = folder / f"predictions_{checkpoint}"
        tables = {name: predictions / f"{name}.csv" for name in recipe.evaluate.protocols}
        if not all(table.exists() for table in tables.values()):
            app.predict(folder, "test", predictions, checkpoint=checkpoint)
            app.evaluate(predictions, recipe.data.root, recipe.evaluate.protocols)
        summaries[checkpoint] = {name: summarise(read_scores(table)) for name, table in tables.items()}
    return Result(entry, folder, summaries)


def commit() -> str:
    """Of the code. Results that were just written change no code."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results")
    return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")


def machine() -> str:
    """Cores, processor, what its arithmetic can (a hypervisor's name may hide the model), and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = app.versions()
    arithmetic = torch.backends.cpu.get_cpu_capability() + (
        " and bf16" if computes_in_bf16(torch.device("cpu")) else ""
    )
    return f"{os.cpu_count()} cores of {cpu} with {arithmetic}, torch {versions['torch']}, Python {versions['python']}"


def table(results: Sequence[Result], checkpoint: str, protocol: str) -> str:
    """Per-organ mean Dice over the test cases with the organ's voxel share, and the averages."""
    first = results[0].summaries[checkpoint][protocol]
    distances = [name for name in ("asd", "assd", "hd95") if name in first.overall]
    percent = 1.0 if first.scores.protocol.percent else 100.0
    header = ["class", "share of foreground", *(result.entry.name for result in results)]
    rows = [header, ["---", "---:", *("---:" for _ in results)]]
    for index, one in enumerate(first.classes):
        cells = [result.summaries[checkpoint][protocol].classes[index].metrics["dice"] for result in results]
        name = one.name.replace("_", " ") + (" *" if one.rare else "")
        rows.append([name, f"{100 * one.share:.2f} %", *(f"{percent * cell.mean:.1f}" for cell in cells)])
    means = [result.summaries[checkpoint][protocol].overall["dice"] for result in results]
    rows.append(["**mean Dice**", "", *(f"**{percent * cell.mean:.2f}**" for cell in means)])
    rows.append(["95 % interval", "", *(f"{percent * cell.low:.1f} to {percent * cell.high:.1f}" for cell in means)])
    for name in distances:
        unit = first.scores.protocol.unit(name)
        cells = [result.summaries[checkpoint][protocol].overall[name].mean for result in results]
        rows.append([f"mean {name.upper()} ({unit})", "", *(f"{cell:.2f}" for cell in cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def report(name: str, results: Sequence[Result], note: str) -> str:
    recipe = load_recipe(ROOT / results[0].entry.recipe, results[0].entry.overrides)
    lines = [
        f"# {name}: split {recipe.data.split}, seed {recipe.seed}",
        "",
        f"Made by `python benchmarks/compare.py {name}` on {machine()}; the runs at the commits below.",
        "One run per row and few test cases: differences within the intervals mean nothing.",
        *([note] if note else []),
        "",
        "| run | recipe | steps | best step | wall min | CPU min | peak memory MiB | commit |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for result in results:
        facts, entry = result.facts, result.entry
        what = " ".join([f"`{entry.recipe}`", *(f"`{override}`" for override in entry.overrides)])
        lines.append(
            f"| {entry.name} | {what} | {facts['steps']} | {facts['best_step']} | {facts['wall_s'] / 60:.1f} "
            f"| {facts['cpu_s'] / 60:.1f} | {facts['peak_rss_mib']:.0f} | {facts['commit']} |"
        )
    lines += ["", "\\* among the rarest third of the classes. Dice in %.", ""]
    for protocol in recipe.evaluate.protocols:
        for checkpoint, words in CHECKPOINTS.items():
            lines += [f"## Protocol {protocol}, {words}", "", table(results, checkpoint, protocol), ""]
        text = results[0].summaries["best"][protocol].scores.protocol.describe()
        lines += [*(f"> {line}  " for line in text.splitlines()), ""]
    lines += ["## Mean validation Dice while training", "", f"![validation curves]({name}_curves.svg)", ""]
    lines += [curve_table(results), ""]
    return "\n".join(lines)


def validation_curve(result: Result) -> list[tuple[int, float]]:
    lines = read_metrics(result.folder / "metrics.jsonl")
    return [(line["epoch"], line["mean"]) for line in lines if line["kind"] == "validation"]


def curve_table(results: Sequence[Result]) -> str:
    curves = [dict(validation_curve(result)) for result in results]
    rows = [["epoch", *(result.entry.name for result in results)], ["---:", *("---:" for _ in results)]]
    rows.extend(
        [str(epoch), *(f"{100 * curve[epoch]:.1f}" if epoch in curve else "" for curve in curves)]
        for epoch in sorted(set().union(*curves))
    )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw_curves(results: Sequence[Result], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "tailseg"  # the same curves give the same file
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for result in results:
        epochs, dice = zip(*validation_curve(result), strict=True)
        axes.plot(epochs, [100 * value for value in dice], marker="o", markersize=3, label=result.entry.name)
    axes.set(xlabel="epoch", ylabel="mean validation Dice (%)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks"), help="folder for the runs")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="train and score these rows alone, write no table")
    parser.add_argument("--note", default="", help="a sentence for the page on how the runs were made")
    arguments = parser.parse_args()
    name = arguments.comparison
    results = []
    for entry in COMPARISONS[name]:
        if arguments.only is None or entry.name in arguments.only:
            print(f"== {entry.name}", flush=True)
            results.append(run(entry, arguments.runs / name / entry.name.replace(" ", "_")))
    if arguments.only is not None:
        return
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    draw_curves(results, folder / f"{name}_curves.svg")
    (folder / f"{name}.md").write_text(report(name, results, arguments.note), encoding="utf-8")
    print((folder / f"{name}.md").read_text())


if __name__ == "__main__":
    main()
