"""What a benchmark of the suite is, how contestants take turns, and the page of what was found.

A contestant does one unit of the same work, from the same inputs, weights and seeds, as often as it is asked. The first one is
what a user of TailSeg runs on this machine; then come its plain path and peers. They agree in full precision before anybody is
timed. Then all take one turn a round, in an order that reverses every round; what is reported are ratios within a round, and
how far they spread.
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tailseg.files import write_json, write_text
from tailseg.runtime import keep_freed_memory

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
RECORDS = RESULTS / "speed"


@dataclass(frozen=True)
class Settings:
    """peers: name -> checkout. data: folder of the data sets, None where there is none (then scans are made up). rounds: after
    the one that warms up. threads: of torch. device: cpu or cuda. memory: look for peaks too."""

    peers: Mapping[str, Path] = field(default_factory=dict)
    data: Path | None = None
    rounds: int = 3
    threads: int = 1
    device: str = "cpu"
    memory: bool = True


@dataclass(frozen=True)
class Contestant:
    """work: one unit, whose result is compared with TailSeg's. own_allocator: keeps the C library's settings, as a user of it
    has them; the others get tailseg.runtime.keep_freed_memory. rounding: of one that computes in fewer digits, a difference
    that is allowed in every part of its result, but for those that a voxel decides."""

    name: str
    work: Callable[[], Any]
    own_allocator: bool = False
    rounding: float = 0.0


@dataclass(frozen=True)
class Benchmark:
    """what: the work, in a sentence. contestants: makes them, TailSeg's fast path first. tolerance: largest
    difference from TailSeg, relative to the largest number of each part of a result; by contestant. loose: the same
    of the parts that have a tolerance of their own, whoever differs: gradients and what follows from pseudo-labels,
    where rounding may move a voxel over the edge of a ReLU. voxels_decide: the parts that a few voxels decide, by which
    nobody is compared who computes in fewer digits. facts: numbers of another kind, made after the turns.
    remark: what a reader must know of this machine, or of how the work differs from what a user does. skip: why it is
    left out with these settings, empty where it is not."""

    name: str
    what: str
    target: str
    contestants: Callable[[Settings], Sequence[Contestant]] = lambda settings: ()
    tolerance: Mapping[str, float] = field(default_factory=lambda: {"plain": 1e-5})
    facts: Callable[[Settings], Mapping[str, str]] = lambda settings: {}
    remark: str = ""
    skip: Callable[[Settings], str] = lambda settings: ""
    loose: Mapping[str, float] = field(default_factory=dict)
    voxels_decide: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Line:
    """Of one contestant. seconds: median of a turn, of the processor and by the clock. times: what the others take, in units
    of the first one's turn in the same round: median, lowest, highest. difference: from TailSeg in full precision. peak:
    bytes above what the process held before."""

    contestant: str
    cpu_seconds: float
    wall_seconds: float
    times: tuple[float, float, float]
    difference: float
    peak: int | None


@dataclass(frozen=True)
class Record:
    """What one benchmark found, where and with what code. lines: of those who took turns. facts: numbers of another kind."""

    benchmark: str
    what: str
    target: str
    lines: tuple[Line, ...]
    facts: Mapping[str, str]
    remark: str
    machine: str
    commit: str
    threads: int


class Disagreement(AssertionError):
    """Two contestants found different things: there is nothing to time."""


def measure(benchmark: Benchmark, settings: Settings) -> tuple[Line, ...]:
    """Raises Disagreement."""
    contestants = benchmark.contestants(settings)
    if not contestants:
        return ()
    differences = agreement(benchmark, contestants)
    turns = _take_turns(contestants, settings)
    mine = turns[contestants[0].name]
    del contestants
    _give_back()  # to those who are looked at in processes of their own
    clock = 1 if settings.device.startswith("cuda") else 0  # while a GPU works, the processor's time is that of waiting
    lines = []
    for name, taken in turns.items():
        ratios = [other[clock] / own[clock] for other, own in zip(taken, mine, strict=True)]
        cpu, wall = (statistics.median(column) for column in zip(*taken, strict=True))
        spread = (statistics.median(ratios), min(ratios), max(ratios))
        lines.append(Line(name, cpu, wall, spread, differences[name], _peak_elsewhere(benchmark, name, settings)))
    return tuple(lines)


def _take_turns(contestants: Sequence[Contestant], settings: Settings) -> dict[str, list[tuple[float, float]]]:
    """Contestant -> seconds of the processor and by the clock, round by round."""
    turns: dict[str, list[tuple[float, float]]] = {each.name: [] for each in contestants}
    for turn in range(settings.rounds):
        for each in contestants if turn % 2 == 0 else reversed(contestants):
            turns[each.name].append(_timed(each, settings.device))
        print(
            f"  round {turn + 1}: {', '.join(f'{name} {found[-1][0]:.3g} s' for name, found in turns.items())}",
            flush=True,
        )
    return turns


def agreement(benchmark: Benchmark, contestants: Sequence[Contestant]) -> dict[str, float]:
    """Contestant -> its difference from the first that computes in full precision, which is TailSeg's; this is also
    everybody's turn to warm up."""
    found = {each.name: _result(each) for each in contestants}
    rounding = {each.name: each.rounding for each in contestants}
    reference = next(name for name, allowed in rounding.items() if not allowed)
    for part, loose in benchmark.loose.items():
        apart = {name: result.pop(part) for name, result in found.items()}
        for name, value in apart.items():
            if rounding[name] and part in benchmark.voxels_decide:
                continue
            allowed = max(loose, rounding[name])
            _check(
                benchmark, f"{part} of {name}", difference(value, apart[reference]), allowed, value, apart[reference]
            )
    differences = {name: difference(result, found[reference]) for name, result in found.items()}
    for name, value in differences.items():
        allowed = max(benchmark.tolerance.get(name, 0.0), rounding[name])
        _check(benchmark, name, value, allowed, found[name], found[reference])
    return differences


def _check(benchmark: Benchmark, name: str, value: float, allowed: float, found: Any, expected: Any) -> None:
    if not value <= allowed:
        raise Disagreement(
            f"{benchmark.name}: {name} differs from TailSeg's by {value:.2g}, allowed are {allowed:g}.\n{found}\n{expected}"
        )


def difference(one: Any, other: Any) -> float:
    """Largest absolute difference, by the largest number of its part: dicts and sequences have parts. NaN equals NaN."""
    if isinstance(other, Mapping):
        assert one.keys() == other.keys(), f"{sorted(one)} are not {sorted(other)}"
        return max((difference(one[key], other[key]) for key in other), default=0.0)
    if isinstance(other, list | tuple):
        assert len(one) == len(other)
        return max((difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    a, b = (torch.as_tensor(value, dtype=torch.float64, device="cpu").detach() for value in (one, other))
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    if not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    gap = (a - b).nan_to_num().abs().max() if a.numel() else torch.zeros(())
    return float(gap / b.nan_to_num().abs().max().clamp_min(1e-12)) if gap else 0.0


def _result(contestant: Contestant) -> Any:
    with _allocator(contestant):
        return contestant.work()


def _timed(contestant: Contestant, device: str) -> tuple[float, float]:
    gc.collect()
    with _allocator(contestant):
        _wait(device)
        cpu, wall = time.process_time(), time.perf_counter()
        contestant.work()
        _wait(device)
        return time.process_time() - cpu, time.perf_counter() - wall


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@contextmanager
def _allocator(contestant: Contestant) -> Iterator[None]:
    if not contestant.own_allocator:
        keep_freed_memory()
    elif platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 65536)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX: what glibc begins with
        libc.mallopt(-1, 128 * 1024)
        libc.mallopt(-3, 128 * 1024)
        libc.mallopt(-8, 0)
        libc.malloc_trim(0)
    yield


# --- memory, in a process of its own


def _give_back() -> None:
    """All memory that nobody holds, to the system."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _peak_elsewhere(benchmark: Benchmark, contestant: str, settings: Settings) -> int | None:
    if not settings.memory or not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, str(Path(__file__).parent), benchmark.name, "--peak-of", contestant]
    command += [part for name, path in settings.peers.items() for part in ("--peer", f"{name}={path}")]
    command += ["--data", str(settings.data)] if settings.data else []
    command += ["--threads", str(settings.threads), "--device", settings.device]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def peak(benchmark: Benchmark, name: str, settings: Settings) -> int:
    """Bytes that one turn of a contestant takes above what was held before its first turn."""
    contestant = next(each for each in benchmark.contestants(settings) if each.name == name)
    with _allocator(contestant):
        gc.collect()
        if settings.device.startswith("cuda"):
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            contestant.work()
            return torch.cuda.max_memory_allocated() - before
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        contestant.work()
        return _status("VmHWM") - before


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


# --- what is kept and shown


def save(record: Record) -> None:
    """Its file in benchmarks/results/speed/, and the page of all of them."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    write_json(RECORDS / f"{record.benchmark}.json", asdict(record))
    write_text(RESULTS / "speed.md", page(load_records()))


def load_records() -> list[Record]:
    found = []
    for path in sorted(RECORDS.glob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        lines = tuple(Line(**{**line, "times": tuple(line["times"])}) for line in values.pop("lines"))
        found.append(Record(lines=lines, **values))
    return found


def number(value: float) -> str:
    """Three digits: 0.0123, 1.23, 12.3, 123"""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def table(record: Record) -> list[str]:
    rows = ["| | times TailSeg | spread | processor s | clock s | differs by | peak memory |"]
    rows.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for line in record.lines:
        median, low, high = map(number, line.times)
        peak_ = "" if line.peak is None else f"{line.peak / 1e6:.0f} MB"
        times = ("1", "") if line is record.lines[0] else (median, f"{low} to {high}")
        differs = (
            f"{line.difference:.1g}" if line.difference or line.contestant not in ("tailseg", "tailseg, fp32") else ""
        )
        name = (
            line.contestant if line.contestant.startswith(("tailseg", "plain")) else f"released code: {line.contestant}"
        )
        cells = (name, *times, number(line.cpu_seconds), number(line.wall_seconds), differs, peak_)
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def fact(name: str, text: str) -> str:
    """text: a value, or a table of Markdown, whose title is its name."""
    return f"\n{name}\n\n{text}\n" if text.startswith("|") else f"- {name}: {text}"


def page(records: Sequence[Record]) -> str:
    parts = [HEAD]
    for record in records:
        parts.append(f"## {record.benchmark}\n{record.what} Target: {record.target}.\n")
        if record.lines:
            parts.append("\n".join(table(record)) + "\n")
        if record.facts:
            parts.append("\n".join(fact(name, value) for name, value in record.facts.items()) + "\n")
        threads = "one thread" if record.threads == 1 else f"{record.threads} threads"
        remark = f" {record.remark}" if record.remark else ""
        parts.append(f"On {record.machine}, {threads}, at commit {record.commit}.{remark}\n")
    return "\n".join(parts)


HEAD = """\
# How fast TailSeg is

Made by `python benchmarks/speed` (`make speed`), one benchmark at a time; every section names its machine and commit. The first
line is what a user of TailSeg runs on that machine (in bf16 where it computes in bf16; then TailSeg in fp32 has a line of its
own), `plain` the same arithmetic written as a textbook has it, in fp32, and the others are the released code of a paper, run
on CPU tensors from a checkout of its own (`--peer`). All of one section got the same data, weights and seeds, and their results
agreed with TailSeg's in fp32, as the column says, before anybody was timed. "times TailSeg": processor time of a turn by that
of the first line in the same round, the median and the spread of the rounds. Peak memory: what a turn takes above what was
held before, each in a fresh process.
"""
