"""Does training in bfloat16 cost accuracy? The same recipe, several seeds, once in fp32 and once in bf16: one page.

    python benchmarks/precision.py                      three seeds of DHC on synapse_mini, a small network and 480 steps

Where the device computes in bf16, training does. A processor that would only emulate it, a hundred times slower, takes every
convolution in fp32 over operands that were rounded to bf16, and rounds the result and all gradients to bf16: what the hardware
does, which multiplies bf16 exactly and sums in fp32, but for the order of the sums. Everything between convolutions is in
bf16 anyway. Runs lie in runs/precision/, the page in benchmarks/results/precision_synapse_mini.md. Needs $TAILSEG_DATA.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from compare import ROOT, Entry, Result, machine, run
from torch import Tensor

from tailseg.files import write_text
from tailseg.runtime import choose_device, computes_in_bf16

PRECISIONS = ("fp32", "bf16")
RECIPE = "recipes/synapse_mini/dhc_20p.yaml"
OVERRIDES = (
    "network.width=8", "train.epochs=60", "train.steps_per_epoch=8", "train.validate_every=20", "train.checkpoint_every=10",
    "train.threads=1", "evaluate.protocols=[native]", "evaluate.overlap=0.5",
)  # fmt: skip
CHECKPOINT = "last"  # at which all runs are equally long


@contextmanager
def convolutions_round_to_bf16() -> Iterator[None]:
    """Within, convolutions under autocast do on any processor what they do on one that computes in bf16."""

    def rounded(convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **options: Any) -> Tensor:
            if not torch.is_autocast_enabled("cpu"):
                return convolve(x, weight, bias, *rest, **options)
            with torch.autocast("cpu", enabled=False):
                operands = (None if each is None else each.bfloat16().float() for each in (x, weight, bias))
                return convolve(*operands, *rest, **options).bfloat16()

        return call

    names = ("conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d")
    patches = [patch.object(F, name, rounded(getattr(F, name))) for name in names]
    try:
        for each in patches:
            each.start()
        yield
    finally:
        for each in patches:
            each.stop()


def train_all(seeds: Sequence[int], folder: Path) -> dict[str, list[Result]]:
    """Precision -> a result a seed. Prediction is in the precision of the training."""
    device = choose_device("auto")
    assert computes_in_bf16(device) or device.type == "cpu", "only a CPU's convolutions are rounded here"
    results: dict[str, list[Result]] = {name: [] for name in PRECISIONS}
    for seed in seeds:
        for precision in PRECISIONS:
            entry = Entry(
                f"{precision}, seed {seed}", RECIPE, (*OVERRIDES, f"seed={seed}", f"train.precision={precision}")
            )
            rounding = nullcontext() if computes_in_bf16(device) else convolutions_round_to_bf16()
            with rounding, warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This device only emulates bf16")
                results[precision].append(run(entry, folder / f"{precision}_{seed}", [CHECKPOINT]))
            print(f"{entry.name}: {100 * mean_dice(results[precision][-1]):.1f}", flush=True)
    return results


def mean_dice(result: Result) -> float:
    return result.summaries[CHECKPOINT]["native"].overall["dice"].mean


def page(results: dict[str, list[Result]], seeds: Sequence[int], emulated: bool) -> str:
    first = results["fp32"][0]
    classes = first.summaries[CHECKPOINT]["native"].classes
    rows = [
        [
            "class",
            "share of foreground",
            *(f"{precision}, {word}" for precision in PRECISIONS for word in ("mean", "seeds")),
        ]
    ]
    rows.append(["---", *["---:"] * 5])

    def cells(values: list[float]) -> tuple[str, str]:
        return f"{100 * statistics.fmean(values):.1f}", ", ".join(f"{100 * value:.1f}" for value in values)

    for index, one in enumerate(classes):
        row = [one.name.replace("_", " "), f"{100 * one.share:.2f} %"]
        for precision in PRECISIONS:
            found = [
                each.summaries[CHECKPOINT]["native"].classes[index].metrics["dice"].mean for each in results[precision]
            ]
            row += cells(found)
        rows.append(row)
    means = {precision: [mean_dice(result) for result in results[precision]] for precision in PRECISIONS}
    rows.append(["**mean Dice**", "", *(cell for precision in PRECISIONS for cell in cells(means[precision]))])
    gap = 100 * (statistics.fmean(means["bf16"]) - statistics.fmean(means["fp32"]))
    within = statistics.fmean(statistics.stdev(values) for values in means.values()) * 100
    same_seed = [100 * (b - a) for a, b in zip(means["fp32"], means["bf16"], strict=True)]
    how = (
        "This processor does not compute in bf16: convolutions ran in fp32 over operands rounded to bf16, their results and "
        "gradients rounded too, as the benchmark's first lines say."
        if emulated
        else "The device computes in bf16."
    )
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""\
# bf16 beside fp32 on synapse_mini

Made by `python benchmarks/precision.py --seeds {" ".join(map(str, seeds))}` at commit {first.facts["commit"]} on {machine()}.
`{RECIPE}` with {", ".join(OVERRIDES)}: {first.facts["steps"]:.0f} steps, Dice in % on
the test scans at the last step, protocol native, in {len(seeds)} seeds. {how}

{table}

bf16 minus fp32: {gap:+.1f} in the mean; seed by seed {", ".join(f"{value:+.1f}" for value in same_seed)}.
The standard deviation over seeds is {within:.1f} within a precision. The runs are far too
short to be good; they ask whether precision moves the result more than a seed does.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "precision")
    arguments = parser.parse_args()
    results = train_all(arguments.seeds, arguments.out)
    text = page(results, arguments.seeds, not computes_in_bf16(choose_device("auto")))
    write_text(ROOT / "benchmarks" / "results" / "precision_synapse_mini.md", text)
    print(text)


if __name__ == "__main__":
    main()
