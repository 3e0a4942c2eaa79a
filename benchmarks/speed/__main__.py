"""The speed suite: TailSeg's fast paths beside its plain ones and beside the released code of the papers.

    python benchmarks/speed                         all benchmarks that need no peer, results into benchmarks/results/speed.md
    python benchmarks/speed step-dhc --peer dhc=PATH --rounds 5
    python benchmarks/speed --list

Peers, each the path of a checkout: dhc, ssl4mis, uamt, crossmatch. $TAILSEG_DATA, or --data, is where real scans lie; without
them scans are made up.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import peers
import torch
from compare import commit, machine
from suite import Benchmark, Record, Settings, fact, measure, peak, save, table

MODULES = (
    "step_dhc", "step_cps2d", "step_uamt", "step_crossmatch", "class_statistics", "draw", "strong_views", "predict_scan",
    "metrics", "prepare", "start", "memory", "gpu_step",
)  # fmt: skip
"""Each holds BENCHMARKS, a tuple."""
PEERS = ("dhc", "ssl4mis", "uamt", "crossmatch")


def checkouts(texts: list[str]) -> dict[str, Path]:
    """["dhc=PATH"] -> {"dhc": Path("PATH")}. Ends the program for a peer that is not known or not there."""
    found = {}
    for text in texts:
        name, _, path = text.partition("=")
        if name not in PEERS or not Path(path).is_dir():
            sys.exit(f"--peer {text}: give one of {', '.join(PEERS)}, and the folder of its checkout: --peer dhc=PATH")
        found[name] = Path(path).resolve()
    return found


def run(benchmark: Benchmark, settings: Settings) -> Record:
    print(f"{benchmark.name}: {benchmark.what}", flush=True)
    lines = measure(benchmark, settings)
    on_gpu = settings.device.startswith("cuda")
    return Record(
        benchmark=f"{benchmark.name}{'-cuda' if on_gpu and benchmark.name != 'gpu-step' else ''}",
        what=benchmark.what,
        target=benchmark.target,
        lines=lines,
        facts=benchmark.facts(settings),
        remark=benchmark.remark,
        machine=f"{torch.cuda.get_device_name()}, {machine()}" if on_gpu else machine(),
        commit=os.environ.get("TAILSEG_COMMIT") or commit(),  # a copy on another machine may have no git
        threads=settings.threads,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of benchmarks; all when left out")
    parser.add_argument("--list", action="store_true", help="tell the names and targets, run nothing")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="a checkout to compare with")
    parser.add_argument("--data", type=Path, default=os.environ.get("TAILSEG_DATA"), help="folder of the data sets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dry", action="store_true", help="print what was found, write nothing")
    parser.add_argument(
        "--no-memory", action="store_true", help="do not look for the peak of memory, which starts processes"
    )
    parser.add_argument("--peak-of", metavar="CONTESTANT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    every = {each.name: each for name in MODULES for each in importlib.import_module(name).BENCHMARKS}
    if unknown := set(arguments.names) - set(every):
        sys.exit(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    if arguments.list:
        for each in every.values():
            print(f"{each.name:18} {each.target:24} {each.what}")
        return
    torch.set_num_threads(arguments.threads)
    peers.device = arguments.device
    settings = Settings(
        checkouts(arguments.peer),
        arguments.data,
        arguments.rounds,
        arguments.threads,
        arguments.device,
        memory=not arguments.no_memory,
    )
    chosen = [every[name] for name in arguments.names or every]
    if arguments.peak_of:
        print(peak(chosen[0], arguments.peak_of, settings))
        return
    for benchmark in chosen:
        if reason := benchmark.skip(settings):
            print(f"{benchmark.name} is skipped: {reason}")
            continue
        record = run(benchmark, settings)
        found = table(record) if record.lines else []
        print("\n".join([*found, *(fact(name, text) for name, text in record.facts.items())]), flush=True)
        if not arguments.dry:
            save(record)


if __name__ == "__main__":
    main()
