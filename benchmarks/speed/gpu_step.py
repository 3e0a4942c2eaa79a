"""A training step of every method on a GPU: how near the device's limits it comes, and what is in the way.

    python benchmarks/speed gpu-step --device cuda --rounds 20
    python benchmarks/speed/gpu_step.py dhc-organs --device cuda       one row, into benchmarks/results/gpu_steps.json

Every row runs in a process of its own, in stages; each keeps what it found as it ends. A run that was cut short goes on where
it stopped, unless the code, the device or torch is another by then. A stage that fails says why and stops no other. Networks
are channels-last and run under bf16 autocast, as train.precision=auto has it on such a device. floor.py says what the floor is.
TAILSEG_SPEED_SMALL=1 takes tiny sizes and a CPU, to try the code.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from floor import limits_of, work_of
from rich.console import Console
from step_cost import LATE, Contender, Setting
from suite import RESULTS, ROOT, Benchmark, Settings, number
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from tailseg.components import builtin_names
from tailseg.data.stream import DrawnBatch, PatchBatchRequest
from tailseg.files import write_json, write_text
from tailseg.runtime import Runtime, RuntimeOptions, choose_device, start_runtime
from tailseg.train.fit import Trainer, TrainOptions
from tailseg.train.watch import Watch

SMALL = bool(os.environ.get("TAILSEG_SPEED_SMALL"))
ROWS = RESULTS / "gpu_steps.json"
PROFILES = RESULTS / "gpu_step_profiles.txt"
STAGES = ("work", "eager", "loop", "compiled", "graphed")  # what may end the process comes last
LIMIT = 400  # seconds of a row's process
WARM_UP = 3
WORST, LONGEST = 3, 15

ORGANS = Setting("vnet", 32, 14, (64, 128, 128), 2, 2)  # DHC on Synapse
ATRIUM = Setting("vnet", 16, 2, (112, 112, 80), 2, 2)  # UA-MT, CrossMatch on LA
SLICES = Setting("unet", 16, 4, (256, 256), 12, 12)  # SSL4MIS on ACDC
if SMALL:
    ORGANS = replace(ORGANS, width=2, patch=(32, 32, 32))
    ATRIUM = replace(ATRIUM, width=2, patch=(16, 16, 32))
    SLICES = replace(SLICES, width=2, patch=(32, 32), labelled=2, unlabelled=2)

CASES = {
    "dhc-organs": ("dhc", ORGANS),
    "cps-slices": ("cps", SLICES),
    "uamt-atrium": ("uamt", ATRIUM),
    "crossmatch-atrium": ("crossmatch", ATRIUM),
    "crossmatch-slices": ("crossmatch", SLICES),
    "unimatch-slices": ("unimatch", SLICES),
} | {f"{name}-organs": (name, ORGANS) for name in builtin_names("methods") if name not in ("crossmatch", "unimatch")}
"""Row -> method and setting, those with a target first. CrossMatch and UniMatch are shown where their papers are."""


class Failed(RuntimeError):
    """A stage has no result; the text goes into the table."""


# --- the stages of a row: each takes the method anew, a runtime, and how many steps are timed


def work(name: str, runtime: Runtime, rounds: int) -> dict[str, Any]:
    """What a step must do, and how fast the device could do it."""
    contender = Contender(*CASES[name], runtime)
    contender.step()  # the optimiser makes its momentum
    found, limits = work_of(contender.step), limits_of(runtime.device)
    return {**asdict(found), "limits": asdict(limits), **limits.floor(found)}


def eager(name: str, runtime: Runtime, rounds: int) -> dict[str, Any]:
    """The method's step: its time and memory, where the host waits, whether it draws, what it launches and copies."""
    step = Contender(*CASES[name], runtime).step
    found = times(step, rounds, runtime.device) | {"peak": peak(step, runtime.device)}
    before = torch.get_rng_state()
    found |= {"waits": waits(step, runtime.device), "draws": not torch.equal(before, torch.get_rng_state())}
    return found | profiled(step, runtime.device)


def loop(name: str, runtime: Runtime, rounds: int) -> dict[str, Any]:
    """The trainer's step, whose batch has arrived, as the stream hands it out."""
    contender = Contender(*CASES[name], runtime)
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(Path(folder), contender.method.task, log_every=10**6, console=Console(quiet=True))
        drawn: Any = itertools.repeat(DrawnBatch(contender.batch, PatchBatchRequest([], [])))
        options = TrainOptions(lr=0.001, epochs=1000)
        rest: dict[str, Any] = {"steps_per_epoch": 10, "seed": 0, "meta": {}}
        trainer = Trainer(contender.method, drawn, options, runtime, watch, Path(folder), **rest)
        trainer.method.train()
        trainer.step = int(LATE * trainer.total_steps)
        step = trainer._train_step
        found = times(step, rounds, runtime.device) | {"waits": waits(step, runtime.device)}
        watch.close()
    return found


def compiled(name: str, runtime: Runtime, rounds: int) -> dict[str, Any]:
    """With train.compile=true. first: seconds of the first step, which compiles. graphs: how many were compiled."""
    options = runtime.options.model_copy(update={"compile": True})
    start = time.perf_counter()
    step = Contender(*CASES[name], replace(runtime, options=options)).step
    step()
    wait(runtime.device)
    first = time.perf_counter() - start
    found = times(step, rounds, runtime.device) | {"peak": peak(step, runtime.device)}
    return found | {"first": first, "graphs": counters["stats"]["unique_graphs"]}


def graphed(name: str, runtime: Runtime, rounds: int) -> dict[str, Any]:
    """The whole step as one CUDA graph, where a replay computes what a step would. Learning rate and weights of losses stay
    those of the step that was captured: it tells what graphs would gain, and is no way to train."""
    if runtime.device.type != "cuda":
        raise Failed("no GPU")
    if reasons := list(against_capture(load(runtime.device)[name]["eager"])):
        raise Failed(", ".join(reasons))
    return times(captured(Contender(*CASES[name], runtime)), rounds, runtime.device)


def against_capture(seen: Mapping[str, Any]) -> Iterator[str]:
    """seen: by eager()."""
    if seen.get("draws"):
        yield "draws on the host"
    if seen.get("waits"):
        yield f"waits at {', '.join(seen['waits'])}"
    if seen.get("copies"):  # a replay would read where the values once lay
        yield f"{seen['copies']} copies between host and device"


def times(step: Callable[[], object], rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds of a step after warming up; on a GPU by its own clock, and nobody waits in between."""
    for _ in range(WARM_UP):
        step()
    wait(device)
    marks = [mark(device)]
    for _ in range(rounds):
        step()
        marks.append(mark(device))
    wait(device)
    found = [between(start, end) for start, end in itertools.pairwise(marks)]
    return {"seconds": median(found), "lowest": min(found), "highest": max(found)}


# --- what only a GPU does, and what stands for it on a CPU


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.process_time()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Seconds between two marks, which the device has passed."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def peak(step: Callable[[], object], device: torch.device) -> int | None:
    """Bytes of all tensors at the height of a step; None on a CPU."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    step()
    wait(device)
    return torch.cuda.max_memory_allocated()


def waits(step: Callable[[], object], device: torch.device) -> dict[str, int] | None:
    """Line of the source -> how often the host waited there for the device; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    told = [each for each in caught if "synchronizing" in str(each.message)]
    return dict(Counter(f"{'/'.join(Path(each.filename).parts[-2:])}:{each.lineno}" for each in told))


def profiled(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """How often a step launches, synchronises a stream, copies between host and device; its longest operations as text."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True) as seen:
        step()
        wait(device)
    calls = Counter(event.name for event in seen.events() or ())

    def count(*parts: str) -> int:
        return sum(times for name, times in calls.items() if any(part in name for part in parts))

    def milliseconds(operation: Any) -> float:
        return (operation.self_device_time_total if on_gpu else operation.self_cpu_time_total) / 1e3

    operations = [each for each in seen.key_averages(group_by_input_shape=True) if each.device_type.name == "CPU"]
    longest = sorted(operations, key=milliseconds, reverse=True)[:LONGEST]
    return {
        "launches": count("LaunchKernel"),
        "synchronisations": count("cudaStreamSynchronize"),
        "copies": count("Memcpy HtoD", "Memcpy DtoH"),
        "longest": [
            f"{milliseconds(each):9.3f} ms {each.count:5} x {each.key} {each.input_shapes}"[:120] for each in longest
        ],
    }


def captured(contender: Contender) -> Callable[[], None]:
    """Replays a step of it. Raises RuntimeError where something in the step cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            contender.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        contender.step()
    return graph.replay


# --- rows on the disk, each made in a process of its own


@cache
def identity(device: torch.device) -> str:
    """All that a result depends on."""
    sources = [*(ROOT / "src" / "tailseg").rglob("*.py"), ROOT / "benchmarks" / "step_cost.py"]
    sources += [Path(__file__), Path(__file__).with_name("floor.py")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()[:12]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, tiny sizes"
    return f"{name}, torch {torch.__version__}, code {digest}"


def load(device: torch.device) -> dict[str, dict[str, Any]]:
    """Row -> stage -> what it found; nothing where the code, the device or torch was another."""
    known = json.loads(ROWS.read_text(encoding="utf-8")) if ROWS.exists() else {}
    return known["rows"] if known.get("identity") == identity(device) else {}


def keep(device: torch.device, name: str, stage: str, found: Mapping[str, Any]) -> None:
    rows = load(device)
    rows.setdefault(name, {})[stage] = dict(found)
    write_json(ROWS, {"identity": identity(device), "rows": rows})


def missing(device: torch.device, name: str) -> list[str]:
    return [stage for stage in STAGES if stage not in load(device).get(name, {})]


def run_here(name: str, device: str, rounds: int) -> None:
    """The stages of a row that have no result yet."""
    with start_runtime(RuntimeOptions(device=device, precision="auto"), seed=0) as runtime:
        for stage in missing(runtime.device, name):
            try:
                found = globals()[stage](name, runtime, rounds)
            except RuntimeError as error:  # of the compiler, of the capture, or for want of memory
                found = {"failed": (str(error).strip().splitlines() or [type(error).__name__])[0][:200]}
            keep(runtime.device, name, stage, found)
            gc.collect()


def run_elsewhere(name: str, settings: Settings) -> None:
    """A stage that takes its process along, or too long, has failed; those after it run in a new process."""
    device = choose_device(settings.device)
    command = [sys.executable, __file__, name, "--device", settings.device, "--rounds", str(settings.rounds)]
    for _ in STAGES:
        if not missing(device, name):
            return
        try:
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=LIMIT)
            reason = f"ended its process, {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1][:200]}"
        except subprocess.TimeoutExpired:
            reason = f"not done in {LIMIT} s"
        for stage in missing(device, name)[:1]:
            keep(device, name, stage, {"failed": reason})
    assert not missing(device, name), "the code has changed meanwhile"


# --- what is told


HEADER = (
    "step", "eager", "x floor", "compiled", "x floor", "trainer", "CUDA graph", "floor", "arithmetic", "traffic", "launched",
    "TFLOP", "GB", "launches", "waits", "waits of the trainer", "peak GB", "compiled peak GB",
)  # fmt: skip
EXPLAINED = (
    "Milliseconds of the method's own step, eager, with train.compile, and replayed as one CUDA graph; `trainer` is the step "
    "of the training loop around the eager one. The floor is the greater of arithmetic and traffic, and 4 us to launch each "
    "operation that cannot be fused to another. GB: the traffic. waits: how often the host waits for the device in a step."
)


def facts(settings: Settings) -> dict[str, str]:
    for name in CASES:
        run_elsewhere(name, settings)
        print(f"  {name} done", flush=True)
    device = choose_device(settings.device)
    rows = load(device)
    worst = sorted(rows, key=lambda name: ratio(rows[name], "eager"), reverse=True)[:WORST]
    profiles = [f"{name}, eager\n" + "\n".join(rows[name]["eager"].get("longest", [])) for name in worst]
    write_text(PROFILES, "\n\n".join(profiles) + "\n")
    table = [HEADER, ("---", *("---:" for _ in HEADER[1:])), *(cells(name, rows[name]) for name in CASES)]
    found = {
        "device": f"{identity(device)}; {limits_text(rows)}",
        EXPLAINED: "\n".join(f"| {' | '.join(line)} |" for line in table),
        "longest operations of the worst": f"{', '.join(worst)}: `benchmarks/results/{PROFILES.name}`",
    }
    failures = {
        f"{name}, {stage}": rows[name][stage]["failed"]
        for name in CASES
        for stage in STAGES
        if "failed" in rows[name][stage]
    }
    return found | failures


def limits_text(rows: Mapping[str, Any]) -> str:
    limits = [row["work"]["limits"] for row in rows.values() if "limits" in row["work"]]
    flops, moved = (median(each[key] for each in limits) for key in ("flops", "bytes"))
    return f"{flops / 1e12:.3g} TFLOP/s of a bf16 matrix product and {moved / 1e12:.3g} TB/s of a copy, which the floors take"


def ratio(row: Mapping[str, Any], stage: str) -> float:
    """Times the floor; not a number where one of them is missing, which sorts as the least."""
    return row[stage].get("seconds", -1.0) / row["work"].get("floor", float("inf"))


def cells(name: str, row: Mapping[str, Any]) -> Sequence[str]:
    def shown(stage: str, key: str, scale: float) -> str:
        value = row[stage].get(key)
        return "" if value is None else number(value / scale)

    def waited(stage: str) -> str:
        places = row[stage].get("waits")
        return "" if places is None else str(sum(places.values()))

    times_floor = [number(found) if (found := ratio(row, stage)) > 0 else "" for stage in ("eager", "compiled")]
    traffic = row["work"].get("bytes", 0) + row["work"].get("fused_bytes", 0) / 2
    return (
        name, shown("eager", "seconds", 1e-3), times_floor[0], shown("compiled", "seconds", 1e-3), times_floor[1],
        shown("loop", "seconds", 1e-3), shown("graphed", "seconds", 1e-3),
        *(shown("work", key, 1e-3) for key in ("floor", "arithmetic", "traffic", "launches")),
        shown("work", "flops", 1e12), number(traffic / 1e9), shown("eager", "launches", 1), waited("eager"), waited("loop"),
        shown("eager", "peak", 1e9), shown("compiled", "peak", 1e9),
    )  # fmt: skip


def skip(settings: Settings) -> str:
    """Why it is not run, if it is not."""
    if settings.device.startswith("cuda") or SMALL:
        return ""
    return "it needs a GPU: --device cuda"


BENCHMARKS = (
    Benchmark(
        name="gpu-step",
        what="A training step of every method under bf16 autocast, beside the least time that the device could take for it.",
        target="<= 2x the floor, no wait",
        skip=skip,
        facts=facts,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=CASES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    run_here(arguments.row, arguments.device, arguments.rounds)


if __name__ == "__main__":
    main()
