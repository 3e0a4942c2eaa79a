"""What a training step of every method costs beside one of `supervised`, on the same patches.

    python benchmarks/step_cost.py                  V-Nets of width 8, patches 32x64x64, 14 classes, 2 + 2 patches, this device
    python benchmarks/step_cost.py --write          also write the ratio into the Cost line of every method's file

Forward, backward and optimiser step; needs no data. All methods take turns, one step each a round, in one process; the ratio
is the median over the rounds of a method's time over that of supervised in the same round. On a CPU the time is the
processor's, so that other work on the machine hardly counts.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from pathlib import Path

import torch

from tailseg.checks import example_batch, example_task
from tailseg.components import builtin_names, make_build, make_method
from tailseg.core import Batch, Method, Progress
from tailseg.runtime import Runtime, RuntimeOptions, choose_device, keep_freed_memory

METHODS = Path(__file__).parents[1] / "src" / "tailseg" / "methods"
SIDES = (32, 64, 64)
OPTIONS = {"dinomix": {"teacher": "random-tiny"}, "magicnet": {"cubes": 2}}
LABELLED = {"bcp": 4}  # where not 2
UNLABELLED = {"bcp": 4, "crossmatch": 4, "unimatch": 4}
NETWORKS = {"urpc": ("urpc_unet", {})}
LATE = 0.75  # of the run: past every warm-up, so that no term of a loss is left out


class Contender:
    """A method with its batch and optimiser."""

    def __init__(self, name: str, width: int, runtime: Runtime) -> None:
        task = example_task(14, 1, 3)
        network, options = NETWORKS.get(name, ("vnet", {}))
        build = make_build(network, {"width": width, **options}, task)
        self.method: Method = make_method(name, OPTIONS.get(name, {}), task, build)
        runtime.place(self.method)
        self.method.train()
        self.optimizer = torch.optim.SGD(self.method.param_groups(), lr=0.001)
        made = example_batch(task, LABELLED.get(name, 2), UNLABELLED.get(name, 2), side=64)
        cut = Batch(
            *(part[..., : SIDES[0], : SIDES[1], : SIDES[2]].contiguous() for part in (made.x_l, made.y_l, made.x_u))
        )
        self.batch = cut.to(runtime.device, runtime.memory_format(3))
        self.runtime = runtime
        self.steps = 0

    def step(self) -> float:
        """Seconds of one whole training step."""
        progress = Progress(int(LATE * 10_000) + self.steps, 10_000, 10)
        start = self._now()
        with self.runtime.autocast():
            total = torch.stack([*self.method(self.batch, progress).losses.values()]).sum()
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.method.after_step(progress)
        self.steps += 1
        return self._now() - start

    def _now(self) -> float:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def measure(rounds: int, width: int, runtime: Runtime) -> dict[str, list[float]]:
    """Method -> its ratios to supervised, one a round, after one round to warm up."""
    contenders = {name: Contender(name, width, runtime) for name in builtin_names("methods")}
    ratios: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        seconds = {name: contender.step() for name, contender in contenders.items()}
        print(f"round {turn}: supervised takes {seconds['supervised']:.2f} s", flush=True)
        for name, time_ in seconds.items() if turn else ():
            ratios[name].append(time_ / seconds["supervised"])
    return ratios


def write_cost(name: str, ratio: float) -> None:
    path = METHODS / f"{name}.py"
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r"^Cost: .*$", f"Cost: x{ratio:.1f}", text, count=1, flags=re.MULTILINE), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="fp32")
    parser.add_argument("--write", action="store_true", help="into the Cost lines of src/tailseg/methods")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    options = RuntimeOptions(precision=arguments.precision)
    ratios = measure(arguments.rounds, arguments.width, Runtime(choose_device(arguments.device), options))
    print("\n| method | times supervised | lowest | highest |\n| --- | ---: | ---: | ---: |")
    for name, found in sorted(ratios.items(), key=lambda item: statistics.median(item[1])):
        print(f"| {name} | {statistics.median(found):.1f} | {min(found):.1f} | {max(found):.1f} |")
        if arguments.write:
            write_cost(name, statistics.median(found))


if __name__ == "__main__":
    main()
