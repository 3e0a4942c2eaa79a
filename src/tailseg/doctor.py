"""What this machine offers, and what a run would use of it: the verb doctor.

Facts are read from the system; what it does not tell is None, and the text says unknown. A package that is missing or broken
is a finding and no error: doctor speaks where no other verb does, so everything is imported where it is used.
"""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import re
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType

VERSION = 1
"""Of what Findings.to_dict gives."""

EXTRAS = {
    "dino": "DINOv3, which the method dinomix learns from",
    "dicom": "predictions as DICOM SEG",
    "export": "export to ONNX",
    "monai": "tries out an exported MONAI bundle",
}
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
"""Of x86 and ARM, as /proc/cpuinfo calls them: those that convolutions run on."""

GB = 1e9
LITTLE_RAM, LITTLE_DISK = 4 * GB, 5 * GB
SECONDS = 0.2
"""For each of the three measurements."""
UNKNOWN = "unknown"
CPU_BUILD = "the CPU alone"


@dataclass(frozen=True)
class Fact:
    """value: for programs, as JSON has it, None where unknown. shown: for people, where the value does not speak for itself."""

    name: str
    value: Any
    shown: str = ""

    @property
    def text(self) -> str:
        if isinstance(self.value, bool):
            return self.shown or ("on" if self.value else "off")
        return self.shown or (UNKNOWN if self.value is None else str(self.value))


@dataclass(frozen=True)
class Findings:
    """groups: facts by heading. problems: why nothing can run, each with its way out. advice: what would help."""

    groups: Mapping[str, Sequence[Fact]]
    problems: Sequence[str]
    advice: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        facts = {name: {fact.name: fact.value for fact in group} for name, group in self.groups.items()}
        told = {"problems": list(self.problems), "advice": list(self.advice)}
        return {"tailseg_doctor": VERSION, "ok": not self.problems, **told, **facts}


def examine(store: Path = Path("stores"), *, measure: bool = True) -> Findings:
    """store: the folder for prepared scans, whose disk counts; it need not exist. measure: also time a convolution and a
    copy, for less than a second."""
    problems = [f"{text}; install TailSeg again, which brings it" for text in lacking()]
    try:
        import torch
    except Exception as error:  # noqa: BLE001 - a damaged install may raise anything
        torch = None
        problems.append(f"torch cannot be imported: {_first_line(error)}; install it as https://pytorch.org tells")
    groups = {
        "software": _software(torch),
        "processor": _processor(torch),
        "memory": _memory(store),
        "graphics": _graphics(torch),
    }
    if not problems:
        try:
            groups["run"] = _run()
            groups |= {"measured": _measured()} if measure else {}
        except (ImportError, OSError, RuntimeError) as error:  # of a package that is there but does not work
            problems.append(f"TailSeg cannot start here: {_first_line(error)}")
    groups["extras"] = [_extra(name) for name in EXTRAS]
    values = {fact.name: fact.value for group in groups.values() for fact in group}
    return Findings(groups, problems, list(advice(values)))


# --- what is installed


def packages(extra: str = "") -> Iterator[tuple[str, str, str | None]]:
    """Name, least version and installed version of what all need, or of what the extra adds; none where TailSeg runs from its
    source without being installed."""
    for text in _ask(requires) or []:  # such as 'onnx>=1.17; extra == "export"'
        package, _, marker = text.partition(";")
        name, least = re.match(r"[\w.-]+", package), re.search(r">=\s*([\w.]+)", package)
        owner = re.search(r"""extra\s*==\s*['"]([\w.-]+)""", marker)
        if name and (owner[1] if owner else "") == extra:
            yield name[0], least[1] if least else "0", _ask(version, name[0])


def _ask(about: Callable[[str], Any], package: str = "tailseg") -> Any:
    with suppress(PackageNotFoundError):
        return about(package)
    return None


def lacking(extra: str = "") -> list[str]:
    """Of the packages, those that are missing or too old."""
    return [
        f"{name} is {found}, not {least} or newer" if found else f"{name} is missing"
        for name, least, found in packages(extra)
        if not found or _numbers(found) < _numbers(least)
    ]


def _numbers(text: str) -> list[int]:
    """'2.13.0+cpu' -> [2, 13, 0]"""
    return [int(part) for part in re.findall(r"\d+", text.partition("+")[0])]


def _extra(extra: str) -> Fact:
    found = {name: found for name, _, found in packages(extra)}
    told = ", ".join(f"{name} {at}" for name, at in found.items() if at)
    if missing := lacking(extra):
        told = f"{EXTRAS[extra]}: {', '.join(missing)}; pip install 'tailseg[{extra}]'"
    return Fact(extra, found or None, told)


def _software(torch: Any) -> list[Fact]:
    system = f"{platform.system()} {platform.release()}, {platform.machine()}".strip(" ,")
    loaded = {"version": str(torch.__version__), "build": _build(torch)} if torch else None
    return [
        Fact("TailSeg", _ask(version)),
        Fact("torch", loaded, f"{loaded['version']}, built for {loaded['build']}" if loaded else "cannot be imported"),
        Fact("Python", platform.python_version(), f"{platform.python_version()}, {sys.executable}"),
        Fact("system", system or None),
    ]


def _build(torch: Any) -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else CPU_BUILD


# --- the machine


def _processor(torch: Any) -> list[Fact]:
    flags, cores = instruction_sets(), {"usable": usable_cores(), "all": os.cpu_count()}
    capability = torch.backends.cpu.get_cpu_capability() if torch else UNKNOWN
    threads = torch.get_num_threads() if torch else None
    by = f", by OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}" if "OMP_NUM_THREADS" in os.environ else ""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    has = UNKNOWN if flags is None else " ".join(flags) or "none of those that convolutions run on"
    return [
        Fact("CPU", cpu_model()),
        Fact("cores", cores, f"{cores['usable']} of {cores['all'] or UNKNOWN} for this process"),
        Fact("threads", threads, f"{threads or UNKNOWN} of torch{by}"),
        Fact("load", load, UNKNOWN if load is None else f"{load:.1f} cores busy in the last minute"),
        Fact("instructions", flags, f"{has}; torch computes with {capability}"),
    ]


def cpu_model() -> str | None:
    found = re.search(r"^model name\s*:\s*(.+)", _read("/proc/cpuinfo"), re.MULTILINE)
    return found[1] if found else platform.processor() or None


def instruction_sets() -> list[str] | None:
    """Those of INSTRUCTIONS that the processor has; None where the system does not tell."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)", _read("/proc/cpuinfo"), re.MULTILINE)
    return [name for name in INSTRUCTIONS if name in found[1].split()] if found else None


def usable_cores() -> float:
    """Cores that the scheduler gives this process, within the limit of its container, which may be a fraction."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    group = "/sys/fs/cgroup/cpu"  # version 2 has one file, version 1 two in a folder
    limit = _read(f"{group}.max") or f"{_read(f'{group}/cpu.cfs_quota_us')} {_read(f'{group}/cpu.cfs_period_us')}"
    found = re.match(r"(\d+)\s+(\d+)", limit)  # neither "max" nor -1
    quota = round(int(found[1]) / int(found[2]), 2) if found else cores
    return quota if quota < cores else cores


def _memory(store: Path) -> list[Fact]:
    place = store.resolve()
    while not place.exists():
        place = place.parent
    disk, free, total = shutil.disk_usage(place).free, None, None
    with suppress(ImportError, OSError, ValueError, AttributeError):  # without torch, or on a system that does not tell
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        from tailseg.data.machine import free_ram

        free = free_ram()
    return [
        Fact("RAM", {"free": free, "all": total}, f"{_gb(free)} free of {_gb(total)}"),
        Fact("disk", {"free": disk, "store": str(store)}, f"{_gb(disk)} free for prepared scans in {store}"),
    ]


def _graphics(torch: Any) -> list[Fact]:
    driver, gpus = nvidia_driver(), _gpus(torch) if torch else []
    shown = "\n".join(map(_gpu, gpus)) or f"none: {_why_no_gpu(torch, driver)}"
    return [Fact("GPUs", gpus, shown), Fact("NVIDIA driver", driver, driver or "none found")]


def _gpus(torch: Any) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why none is seen is told by _why_no_gpu
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = []
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        name = torch.cuda.get_device_name(index)
        found.append({"index": index, "name": name, "memory": total, "free": free, "bf16": bf16})
    return found


def _gpu(gpu: Mapping[str, Any]) -> str:
    memory, bf16 = f"{_gb(gpu['free'])} free of {_gb(gpu['memory'])}", "" if gpu["bf16"] else "no "
    return f"{gpu['index']}: {gpu['name']}, {memory}, {bf16}bf16"


def nvidia_driver() -> str | None:
    """The version of the kernel's driver, None where there is none that the system tells of."""
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", _read("/proc/driver/nvidia/version"))
    return found[1] if found else None


def _why_no_gpu(torch: Any, driver: str | None) -> str:
    if torch is None:
        return "torch cannot be imported"
    if torch.backends.mps.is_available():
        return "this Apple GPU is taken only by train.device=mps"
    if _build(torch) == CPU_BUILD:
        return f"this torch is built for {CPU_BUILD}"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and not re.search(r"(?<!-)\d|GPU|MIG", hidden):
        return f"CUDA_VISIBLE_DEVICES is '{hidden}', which hides all"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return _first_line(error)
    return UNKNOWN if driver else "there is no driver"


# --- what a run would use


def _run() -> list[Fact]:
    from tailseg.runtime import Runtime, choose_device, computes_in_bf16
    from tailseg.train.fit import TrainOptions

    options, device = TrainOptions(), choose_device("auto")
    precision = Runtime(device, options).precision
    why = "computes in bf16" if computes_in_bf16(device) else "would only emulate bf16"
    keeps, lacks = allocator_can_be_told(), lacking_for_compile(device)
    kept = "glibc, told to keep freed memory" if keeps else "not glibc: steps on the CPU take up to 1.5 times as long"
    compiles = "nothing is missing for it" if not lacks else f"it would lack {' and '.join(lacks)}"
    return [
        Fact("device", str(device)),
        Fact("precision", precision, f"{precision} by train.precision={options.precision}; {device} {why}"),
        Fact("allocator", keeps, kept),
        Fact("channels_last", options.channels_last),
        Fact("fused optimiser", _fused(device, options)),
        Fact("compile", options.compile, f"{Fact('', options.compile).text}; {compiles}"),
        Fact("deterministic", options.deterministic),
    ]


def allocator_can_be_told() -> bool:
    """Whether runtime.keep_freed_memory does anything here."""
    return platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"


def _fused(device: torch.device, options: Any) -> bool:
    """Whether the optimiser that training makes updates all parameters in one kernel."""
    from tailseg.checks import example_task, make_example
    from tailseg.components import find
    from tailseg.train.fit import make_optimizer

    method = make_example(find("methods", "supervised"), example_task(2, 1, 2)).to(device)
    return bool(make_optimizer(method, options).param_groups[0].get("fused"))


def lacking_for_compile(device: torch.device) -> list[str]:
    """What torch.compile needs and does not find."""
    compiler = os.environ.get("CXX", "clang++" if platform.system() == "Darwin" else "g++").split()[0]
    needs = {
        f"the compiler {compiler}": shutil.which(compiler),
        "Python's headers (Python.h)": Path(sysconfig.get_path("include"), "Python.h").exists(),
        "the package triton": device.type != "cuda" or importlib.util.find_spec("triton"),
    }
    return [need for need, there in needs.items() if not there]


# --- measured


def _measured() -> list[Fact]:
    import torch

    from tailseg.runtime import choose_device, computes_in_bf16, keep_freed_memory

    keep_freed_memory()  # as training does
    device = choose_device("auto")
    dtypes = [torch.float32, torch.bfloat16] if computes_in_bf16(device) else [torch.float32]
    try:
        conv = {str(dtype).removeprefix("torch."): conv_speed(device, dtype) for dtype in dtypes}
        source = torch.zeros(2**24 if device.type == "cpu" else 2**27, device=device)
        target = torch.zeros_like(source)
        copied = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    except RuntimeError as error:  # a GPU that others have filled
        return [Fact("failed", f"{device}: {_first_line(error)}")]
    told = ", ".join(f"{speed / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, speed in conv.items())
    return [
        Fact("3D convolution", conv, f"{told}; 32 to 32 channels, forward"),
        Fact("copy", copied, f"{copied / GB:,.0f} GB/s, read and written"),
    ]


def conv_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a 3 x 3 x 3 convolution of 32 to 32 channels, channels last, as training has it."""
    import torch

    channels, sides = 32, (16, 48, 48) if device.type == "cpu" else (64, 96, 96)
    net = torch.nn.Conv3d(channels, channels, 3, padding=1, bias=False, device=device, dtype=dtype)
    net.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]
    x = torch.zeros(1, channels, *sides, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        return 2 * 27 * channels**2 * math.prod(sides) / seconds(lambda: net(x))


def seconds(work: Callable[[], object]) -> float:
    """Of one turn, the median; the GPU's work is waited for."""
    import torch
    from torch.utils.benchmark import Timer

    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=SECONDS).median


# --- what to do about it


def advice(values: Mapping[str, Any]) -> Iterator[str]:
    """values: those of the facts by name; what is unknown or missing calls for nothing."""
    cores, threads, load = (values.get("cores") or {}).get("usable"), values.get("threads"), values.get("load")
    if cores and threads and threads > (most := math.ceil(cores)):
        yield f"torch would start {threads} threads on {cores} cores, to wait for each other: set train.threads={most}"
    if cores and load and load > 0.5 * cores:
        yield f"other work keeps about {load:.1f} cores busy: training is slower for it, and so is what was measured"
    if values.get("NVIDIA driver") and (values.get("torch") or {}).get("build") == CPU_BUILD:
        yield f"there is an NVIDIA driver, but this torch is built for {CPU_BUILD}: https://pytorch.org names its build"
    elif values.get("GPUs") == []:
        yield "no GPU: train on 2D patches or small 3D ones; `tailseg plan` writes a recipe that fits this machine"
    ram, disk = (values.get("RAM") or {}).get("free"), (values.get("disk") or {}).get("free")
    if ram is not None and ram < LITTLE_RAM:
        yield f"only {_gb(ram)} of RAM is free: prepare with --workers 1, train with small patches and batches"
    if disk is not None and disk < LITTLE_DISK:
        yield f"only {_gb(disk)} of disk is free for prepared scans: name another place with --store"


# --- shown


def findings_table(findings: Findings) -> RenderableType:
    """The facts, then advice and problems, for a terminal of 80 columns or more."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows = Table.grid(padding=(0, 2))
    rows.add_column(no_wrap=True)
    rows.add_column(overflow="fold")
    for name, group in findings.groups.items():
        rows.add_row(Text("what a run would use" if name == "run" else name, style="bold"))
        for fact in group:
            rows.add_row(Text(f"  {fact.name}", style="cyan"), Text(fact.text))
    ends = Table.grid(padding=(0, 1))
    for heading, colour, lines in (("advice", "yellow", findings.advice), ("problems", "red", findings.problems)):
        for line in lines:
            ends.add_row(Text(heading, style=f"bold {colour}"), Text(line))
    return Group(rows, *([Text(""), ends] if ends.rows else []))


def _gb(size: float | None) -> str:
    return UNKNOWN if size is None else f"{size / GB:.1f} GB"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read(path: str | Path) -> str:
    """Empty where there is no such file, as on other systems."""
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8", errors="replace")
    return ""
