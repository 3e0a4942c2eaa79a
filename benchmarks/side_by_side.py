"""`tailseg run` beside nnU-Net v2 on one folder of scans, after the same wall time: one page.

    python benchmarks/side_by_side.py my_scans_hidden my_run nnunet_2d [nnunet_3d ...] --minutes 29.5

my_scans_hidden: the labels that neither of them saw (benchmarks/own_folder.py). my_run: the folder of `tailseg run`, and
`--minutes` what that took by its last line. nnunet_...: work folders of benchmarks/nnunet.py. `--labelled-only`: predictions of
the same scans by the run's own reference, if somebody made them. All are scored with protocol native, on the same scans.
Writes benchmarks/results/<--page>.md, which ends with what was written by hand in benchmarks/findings/ under the same name.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compare import ROOT, commit, machine

from tailseg import app
from tailseg.data.raw import DataError
from tailseg.evaluate.summary import MetricSummary, Summary, compare_scores
from tailseg.files import write_text
from tailseg.recipe import load_recipe
from tailseg.train.metrics_log import read_metrics

PROTOCOL = "native"
ITS_OWN_LENGTH = 1000 * 250  # iterations of nnU-Net's training as it comes


REMARKS = """\
**What is compared: {minutes:.0f} minutes on a CPU, far below what either package is made for.** nnU-Net is meant to train for
a day on a GPU, and is very hard to beat there; nothing is said of that here. The question is what a person gets who has a few
annotated scans, a folder of unlabelled ones, and little time.

- The {cases} scored scans are the unlabelled ones, and TailSeg has trained on their images, though never on a label. That is
  the use it is made for; nnU-Net has no use for them. On scans that neither has seen the difference may be another.
- TailSeg was written with these scans at hand: what its planner chooses was tried on them, at budgets like this one. nnU-Net's
  defaults come from elsewhere and from long trainings. That favours TailSeg. nnU-Net's configuration was chosen by what there
  is time for, not by scores.
- One run each, one seed: the intervals are over scans, not over trainings.
- Both were given the same wall time, from the first look at the data to the last prediction, and what they did with it stands
  below. Finding out how fast nnU-Net is on this machine was not counted; TailSeg does that within its time.
- nnU-Net learns from all labelled scans, with none held back to choose a checkpoint by. Its own five folds need five scans:
  with fewer it stops ("Cannot have number of splits n_splits=5 greater than the number of samples").
- Of nnU-Net, the length of training was changed, and what is said below. Learning rate and its decay over the run, loss,
  augmentation, network and patch are its own; so is a momentum of 0.99, which is slow to start. By default it mirrors training
  patches along all axes, also where classes are told apart by their side.
- The scans are at half of their resolution in plane and cropped around the organs, with the help of the labels, for both
  alike: an easier task than whole scans."""


@dataclass(frozen=True)
class Side:
    """name: of its column. minutes: all it took; None where it is part of another side's. told: what it is, in a sentence."""

    name: str
    summary: Summary
    minutes: float | None
    told: str


def tailseg_side(run: Path, minutes: float, hidden: Path) -> Side:
    state = json.loads((run / app.RUN_FILE).read_text(encoding="utf-8"))
    members = app.member_runs(run)
    recipe = load_recipe(members[0] / "recipe.yaml")
    split = json.loads((members[0] / "split.json").read_text(encoding="utf-8"))
    hours, batch = state["settings"]["hours"], " + ".join(map(str, recipe.data.batch))
    told = (
        f"{recipe.method.name} with {recipe.network.name}, patches of {by(recipe.data.patch_size)}, batch {batch} (labelled + "
        f"unlabelled); it planned all of this itself for {60 * hours:g} minutes. {len(split['labelled'])} labelled scans to "
        f"learn from, {len(split['val'])} to validate on, {len(split['unlabelled'])} unlabelled ones. {pace(members[0])}"
    )
    if state["reference"]:
        reference = members[0].with_name(f"{members[0].name}_labelled_only")
        told += f"; and in the same time its labelled-only reference, which its verdict needs: {pace(reference)}"
    return Side("TailSeg", score(run / "predictions", hidden), minutes, f"{told}.")


def pace(run: Path) -> str:
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]
    seconds = statistics.median(line["seconds_per_step"] for line in lines if line["seconds_per_step"])
    return f"{app.trained_steps(run)[0]} steps of {seconds:.2f} s"


def nnunet_side(work: Path, hidden: Path) -> Side:
    facts = json.loads((work / "nnunet.json").read_text(encoding="utf-8"))
    plan, seconds = facts["plan"], facts["seconds"]
    spacing, features = by([round(each, 2) for each in plan["spacing"]]), ", ".join(map(str, plan["features"]))
    spent = ", ".join(f"{what} {each / 60:.1f}" for what, each in seconds.items())
    mirrored = (
        "averaged over mirrored scans, as by default" if facts["mirrored"] else "without mirroring, for want of time"
    )
    told = (
        f"nnU-Net v{facts['version']}, {facts['threads']} thread{'s' * (facts['threads'] > 1)}, its own plan: patches of "
        f"{by(plan['patch_size'])} at {spacing} mm, batch {plan['batch_size']}, {plan['network']} with {features} features. "
        f"{facts['labelled']} labelled scans to learn from (fold all). {facts['iterations']} iterations of "
        f"{facts['seconds_per_iteration']:.2f} s in {facts['epochs']} epochs: "
        f"{100 * facts['iterations'] / ITS_OWN_LENGTH:.2g} % of the {ITS_OWN_LENGTH} it has by itself. Predictions {mirrored}. "
        f"Minutes: {spent}."
    )
    name = f"nnU-Net {facts['configuration']}"
    return Side(name, score(work / "predictions", hidden), sum(seconds.values()) / 60, told)


def score(predictions: Path, hidden: Path) -> Summary:
    """Raises DataError where a scan with a hidden label was not predicted."""
    if missing := app.unpredicted(predictions, hidden):
        raise DataError(f"{predictions} holds no prediction of {', '.join(missing)}; predict all scans of {hidden}.")
    return app.evaluate(predictions, hidden, [PROTOCOL])[PROTOCOL]


def by(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    header, *body = rows
    return [f"| {' | '.join(row)} |" for row in (header, ["---", *["---:"] * (len(header) - 1)], *body)]


def dice_table(sides: Sequence[Side]) -> list[str]:
    rows = [["class", "share of foreground", *(side.name for side in sides)]]
    for k, one in enumerate(sides[0].summary.classes):
        cells = [interval(side.summary.classes[k].metrics["dice"]) for side in sides]
        rows.append([one.name.replace("_", " ") + " *" * one.rare, f"{100 * one.share:.2f} %", *cells])
    rows.append(["**mean over classes**", "", *(f"**{interval(side.summary.overall['dice'])}**" for side in sides)])
    return table(rows)


def interval(dice: MetricSummary) -> str:
    return f"{100 * dice.mean:.1f} ({100 * dice.low:.1f} to {100 * dice.high:.1f})"


def distance_table(sides: Sequence[Side]) -> list[str]:
    heads = [f"{side.name}: {what}" for side in sides for what in ("HD95 (mm)", "missed")]
    rows = [["class", *heads]]
    for k, one in enumerate(sides[0].summary.classes):
        classes = [side.summary.classes[k] for side in sides]
        cells = [
            cell for each in classes for cell in (f"{each.metrics['hd95'].mean:.1f}", f"{each.missed}/{each.cases}")
        ]
        rows.append([one.name.replace("_", " ") + " *" * one.rare, *cells])
    means = [cell for side in sides for cell in (f"{side.summary.overall['hd95'].mean:.1f}", "")]
    return table([*rows, ["mean over classes", *means]])


def test_table(first: Side, second: Side) -> list[str]:
    compared = compare_scores(first.summary.scores, second.summary.scores)
    rows = [["class", f"{first.name} - {second.name}, Dice points", "95 % interval", "adjusted p", "cases that differ"]]
    for one in compared:
        test = one.test
        between = f"{100 * test.low:+.1f} to {100 * test.high:+.1f}"
        row = [one.name.replace("_", " "), f"{100 * test.difference:+.1f}", between, f"{one.adjusted_p:.2g}"]
        rows.append([*row, f"{test.differing} of {test.cases}"])
    return table(rows)


def report(sides: Sequence[Side], title: str, note: str, findings: str) -> str:
    first, others = sides[0], [side for side in sides[1:] if side.minutes is not None]
    scores = first.summary.scores
    lines = [
        f"# {title}",
        "",
        f"Made by `tailseg run` and `benchmarks/own_folder.py`, `nnunet.py` and `side_by_side.py` on {machine()}, at commit",
        f"{commit()}. {len(scores.cases)} scans are scored; neither side has seen a label of theirs.",
        *([note] if note else []),
        "",
        REMARKS.format(minutes=first.minutes, cases=len(scores.cases)),
        "",
        "## What each did with its time",
        "",
        *(f"- **{side.name}**{f', {side.minutes:.1f} min' if side.minutes else ''}: {side.told}" for side in sides),
        "",
        "## Dice in %, mean over the scans with its 95 % interval",
        "",
        *dice_table(sides),
        "",
        "\\* among the rarest third of the classes.",
        "",
        "## Surface distances, and scans in which a class was missed altogether",
        "",
        *distance_table(sides),
        "",
    ]
    for other in others:
        lines += [f"## Paired over scans: {first.name} and {other.name}", "", *test_table(first, other), ""]
    lines += ["p: permutation of signs, adjusted by Holm over the classes; the last row is a test of its own.", ""]
    lines += ["## What the numbers say", "", findings] if findings else []
    return "\n".join([*lines, *(f"> {line}  " for line in scores.protocol.describe().splitlines()), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hidden", type=Path, help="the labels to score against")
    parser.add_argument("run", type=Path, help="the folder of `tailseg run`")
    parser.add_argument("nnunet", type=Path, nargs="+", help="work folders of benchmarks/nnunet.py")
    parser.add_argument("--minutes", type=float, required=True, help="wall time of `tailseg run`")
    parser.add_argument("--labelled-only", type=Path, help="predictions of the run's labelled-only reference")
    parser.add_argument("--page", default="own_folder_synapse", help="name of the page in benchmarks/results")
    parser.add_argument("--title", default="A folder with 4 annotated scans: TailSeg beside nnU-Net")
    parser.add_argument("--note", default="", help="a sentence for the page on how the runs were made")
    given = parser.parse_args()
    try:
        sides = [tailseg_side(given.run, given.minutes, given.hidden)]
        if given.labelled_only:
            told = "TailSeg's own reference: one network, the method's class weights, no unlabelled scans."
            sides.append(Side("TailSeg, labelled-only", score(given.labelled_only, given.hidden), None, told))
        sides += [nnunet_side(work, given.hidden) for work in given.nnunet]
    except (ValueError, OSError) as error:
        parser.exit(1, f"{error}\n")
    page = ROOT / "benchmarks" / "results" / f"{given.page}.md"
    by_hand = ROOT / "benchmarks" / "findings" / page.name
    findings = by_hand.read_text(encoding="utf-8") if by_hand.exists() else ""
    write_text(page, report(sides, given.title, given.note, findings))
    print(page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
