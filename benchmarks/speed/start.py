"""How long a person waits for the command itself: fresh processes, by the clock."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from suite import Benchmark, Settings

TIMES = 10
COMMAND = Path(sys.executable).parent / "tailseg"
CALLS = {
    "tailseg --help": [str(COMMAND), "--help"],
    "tailseg list": [str(COMMAND), "list"],
    "tailseg show dhc": [str(COMMAND), "show", "dhc"],
    "an empty Python program": [sys.executable, "-c", ""],
}


def seconds(command: Sequence[str]) -> list[float]:
    """Of TIMES processes, after one that fills the disk's cache. Raises RuntimeError for one that fails."""
    found = []
    for _ in range(TIMES + 1):
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        found.append(time.perf_counter() - start)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return found[1:]


def facts(settings: Settings) -> Mapping[str, str]:
    told = {}
    for name, command in CALLS.items():
        found = seconds(command)
        told[name] = f"{statistics.median(found):.2f} s ({min(found):.2f} to {max(found):.2f})"
    return told


BENCHMARKS = (
    Benchmark(
        "start",
        f"From the command to its end, by the clock: the median of {TIMES} fresh processes, the fastest and the slowest.",
        "--help within 0.3 s",
        facts=facts,
    ),
)
