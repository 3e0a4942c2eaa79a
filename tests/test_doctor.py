"""What doctor says of this machine and of machines that are not here."""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tailseg import cli, doctor
from tailseg.doctor import EXTRAS, Fact, Findings, advice, examine, findings_table
from tailseg.runtime import Precision
from tailseg.train.fit import TrainOptions

DECLARED = ["torch>=2.6", "numpy>=1.26", "pydicom>=3.0.1; extra == 'dicom'", 'highdicom; extra == "dicom"']


def shown(findings: Findings, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(findings_table(findings))
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def run(*arguments: object) -> int:
    """Call the command in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tailseg", "doctor", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The system's files, by path; others are not there."""
    there: dict[str, str] = {}
    monkeypatch.setattr(doctor, "_read", lambda path: there.get(str(path), ""))
    return there


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say what is declared and installed."""

    def say(requires: list[str], **installed: str) -> None:
        def version(name: str) -> str:
            if name not in installed:
                raise doctor.PackageNotFoundError(name)
            return installed[name]

        monkeypatch.setattr(doctor, "requires", lambda name: requires)
        monkeypatch.setattr(doctor, "version", version)

    return say


# --- the whole


def test_this_machine_can_run_and_the_json_has_the_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("--json", "--no-measure", "--store", tmp_path) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tailseg_doctor"] == 1 and told["ok"] and told["problems"] == []
    assert told["software"]["torch"]["version"] == str(torch.__version__)
    assert told["processor"]["threads"] == torch.get_num_threads()
    assert told["memory"]["disk"]["store"] == str(tmp_path) and told["memory"]["disk"]["free"] > 0
    assert told["run"]["deterministic"] is False and told["run"]["channels_last"] is True
    assert set(told["extras"]) == set(EXTRAS)
    assert "measured" not in told


def test_the_table_fits_80_columns_and_has_every_fact(tmp_path: Path):
    findings = examine(tmp_path, measure=False)
    lines = shown(findings).splitlines()
    assert all(len(line) <= 80 for line in lines)
    names = {line.strip().split("  ")[0] for line in lines}
    assert names >= {fact.name for group in findings.groups.values() for fact in group}
    assert names >= {"software", "processor", "memory", "graphics", "what a run would use", "extras"}


def test_text_of_the_system_is_no_markup():
    findings = Findings({"processor": [Fact("CPU", "[red]fast[/red]")]}, ["[b] broke"], [])
    assert "[red]fast[/red]" in shown(findings) and "[b] broke" in shown(findings)


@pytest.mark.parametrize(
    ("fact", "text"),
    [(Fact("a", None), "unknown"), (Fact("a", True), "on"), (Fact("a", False), "off"), (Fact("a", 0, "none"), "none")],
)
def test_a_value_speaks_for_itself_unless_told_otherwise(fact: Fact, text: str):
    assert fact.text == text


@pytest.mark.parametrize("bf16", [True, False])
def test_measured_are_speeds(monkeypatch: pytest.MonkeyPatch, bf16: bool):
    # a processor that emulates bf16 would compute for seconds
    monkeypatch.setattr(doctor, "seconds", lambda work: 0.5 if bf16 or work() is not None else 0.0)
    monkeypatch.setattr("tailseg.runtime.computes_in_bf16", lambda device: bf16)
    facts = {fact.name: fact for fact in doctor._measured()}
    conv = facts["3D convolution"].value
    assert conv["float32"] == pytest.approx(2 * 27 * 32 * 32 * 16 * 48 * 48 / 0.5)
    assert ("bfloat16" in conv) is bf16 is ("bfloat16" in facts["3D convolution"].text)
    assert facts["copy"].value == 2 * 4 * 2**24 / 0.5


def test_a_turn_is_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "SECONDS", 0.02)
    assert 0.002 <= doctor.seconds(lambda: time.sleep(0.002)) < 0.2


def test_a_device_that_fails_is_told_and_nothing_else_is_lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail(device: object, dtype: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB.\nGPU 0 has")

    monkeypatch.setattr(doctor, "conv_speed", fail)
    told = examine(tmp_path).to_dict()
    assert told["ok"] and told["run"]
    assert told["measured"]["failed"].endswith(": CUDA out of memory. Tried to allocate 2 MiB.")


def test_an_install_that_does_not_work_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail() -> list[Fact]:
        raise ImportError("cannot import name 'Task'")

    monkeypatch.setattr(doctor, "_run", fail)
    findings = examine(tmp_path)
    assert findings.problems == ["TailSeg cannot start here: cannot import name 'Task'"]
    assert {"run", "measured"} & set(findings.groups) == set()


# --- what is installed


def test_a_dependency_that_is_missing_or_too_old_is_a_problem(declared: Callable[..., None], tmp_path: Path):
    declared(DECLARED, torch="2.4.1+cpu")
    assert doctor.lacking() == ["torch is 2.4.1+cpu, not 2.6 or newer", "numpy is missing"]
    assert not examine(tmp_path, measure=False).to_dict()["ok"]
    declared(DECLARED, torch="2.10+cu118", numpy="2.0.1")
    assert doctor.lacking() == []


def test_an_extra_that_lacks_a_package_says_how_to_get_it(declared: Callable[..., None]):
    declared(DECLARED, pydicom="3.0.1")
    fact = doctor._extra("dicom")
    assert fact.value == {"pydicom": "3.0.1", "highdicom": None}
    assert fact.text == "predictions as DICOM SEG: highdicom is missing; pip install 'tailseg[dicom]'"
    declared(DECLARED, pydicom="3.0.1", highdicom="0.28")
    assert doctor._extra("dicom").text == "pydicom 3.0.1, highdicom 0.28"


def test_the_extras_are_those_that_users_install():
    declared = metadata("tailseg").get_all("Provides-Extra") or []
    assert set(declared) - {"test", "dev", "docs"} == set(EXTRAS)
    assert all(list(doctor.packages(extra)) for extra in EXTRAS)


@pytest.mark.parametrize(
    ("text", "extra", "package"),
    [
        ("torch>=2.6", "", ("torch", "2.6", None)),
        ("mkdocs-material>=9.5; extra == 'docs'", "docs", ("mkdocs-material", "9.5", None)),
        ('tailseg[dicom,dino]; extra == "test"', "test", ("tailseg", "0", None)),
        ("numpy (>=1.26,<3) ; python_version > '3'", "", ("numpy", "1.26", None)),
    ],
)
def test_a_requirement_is_read(declared: Callable[..., None], text: str, extra: str, package: tuple[str, str, None]):
    declared([text])
    assert list(doctor.packages(extra)) == [package]
    assert list(doctor.packages("other")) == []


def test_a_torch_that_cannot_be_imported_is_told_and_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    real = builtins.__import__

    def without_torch(name: str, *rest: Any, **more: Any) -> Any:
        if name == "torch":
            raise OSError("libtorch_cpu.so: cannot open shared object file")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    assert run("--json", "--store", tmp_path) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["problems"] == [
        "torch cannot be imported: libtorch_cpu.so: cannot open shared object file; install it as https://pytorch.org tells"
    ]
    assert told["software"]["torch"] is None and told["graphics"]["GPUs"] == []
    assert "run" not in told and "measured" not in told
    assert run("--store", tmp_path) == 1
    assert "none: torch cannot be imported" in capsys.readouterr().out


# --- the machine


@pytest.mark.parametrize(
    ("limits", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "250000 100000"}, 2.5),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "6400000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_cores_are_those_that_a_container_grants(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch, limits: dict[str, str], cores: float
):
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    files |= {f"/sys/fs/cgroup/{name}": text for name, text in limits.items()}
    assert doctor.usable_cores() == cores


def test_instruction_sets_are_read_of_x86_and_arm_and_unknown_elsewhere(files: dict[str, str]):
    assert doctor.instruction_sets() is None
    files["/proc/cpuinfo"] = "model name\t: A 9000\nflags\t\t: fpu avx2 avx512f amx_bf16 avx512_bf16x"
    assert doctor.instruction_sets() == ["avx2", "avx512f", "amx_bf16"] and doctor.cpu_model() == "A 9000"
    files["/proc/cpuinfo"] = "Features\t: fp asimd bf16"
    assert doctor.instruction_sets() == ["asimd", "bf16"]


def test_what_the_system_does_not_tell_is_unknown(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(doctor.platform, "processor", lambda: "")
    monkeypatch.delattr(doctor.os, "sysconf")
    facts = {fact.name: fact for fact in (*doctor._processor(torch), *doctor._memory(tmp_path / "not" / "there"))}
    assert facts["CPU"].value is None and facts["CPU"].text == "unknown"
    assert facts["instructions"].value is None
    assert facts["instructions"].text.startswith("unknown; torch computes with ")
    assert facts["RAM"].value["free"] is None and facts["RAM"].text == "unknown free of unknown"
    assert facts["disk"].value["free"] > 0


def test_the_driver_is_read(files: dict[str, str]):
    assert doctor.nvidia_driver() is None
    files["/proc/driver/nvidia/version"] = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5"
    assert doctor.nvidia_driver() == "550.54.15"
    files["/proc/driver/nvidia/version"] = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release"
    assert doctor.nvidia_driver() == "570.86.10"


def test_why_no_gpu_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert doctor._why_no_gpu(torch, "550.1") == "this torch is built for the CPU alone"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert doctor._why_no_gpu(torch, "550.1") == "CUDA_VISIBLE_DEVICES is '-1', which hides all"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old.\nUpdate it.")

    monkeypatch.setattr(torch.cuda, "init", init)
    assert doctor._why_no_gpu(torch, "450.1") == "The NVIDIA driver on your system is too old."
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert doctor._why_no_gpu(torch, None) == "there is no driver"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert "train.device=mps" in doctor._why_no_gpu(torch, None)


def test_gpus_are_told_with_their_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ((20 + index) * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H")
    gpus = doctor._graphics(torch)[0]
    assert [gpu["free"] for gpu in gpus.value] == [20e9, 21e9]
    assert gpus.text.splitlines()[0] == "0: H, 20.0 GB free of 80.0 GB, bf16"


# --- what a run would use


@pytest.mark.parametrize("computes", [True, False])
@pytest.mark.parametrize("option", ["auto", "fp32", "fp16"])
def test_precision_is_what_the_default_takes_here(monkeypatch: pytest.MonkeyPatch, computes: bool, option: Precision):
    monkeypatch.setattr("tailseg.train.fit.TrainOptions", lambda: TrainOptions(precision=option))
    monkeypatch.setattr("tailseg.runtime.choose_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr("tailseg.runtime.computes_in_bf16", lambda device: computes)
    fact = {fact.name: fact for fact in doctor._run()}["precision"]
    assert fact.value == (option if option != "auto" else "bf16" if computes else "fp32")
    assert f"train.precision={option}" in fact.text and ("emulate" in fact.text) is not computes


@pytest.mark.parametrize(("library", "keeps"), [("glibc", True), ("", False)])
def test_the_allocator_is_told_to_keep_memory_where_it_is_glibcs(
    monkeypatch: pytest.MonkeyPatch, library: str, keeps: bool
):
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.libc_ver", lambda: (library, "2.39"))
    calls: list[str] = []
    monkeypatch.setattr("ctypes.CDLL", lambda name: calls.append(name) or type("C", (), {"mallopt": lambda *a: 1})())
    from tailseg.runtime import keep_freed_memory

    keep_freed_memory()
    assert doctor.allocator_can_be_told() is keeps is bool(calls)  # as training does


@pytest.mark.parametrize("fused", [True, False])
def test_the_optimiser_is_the_one_that_training_makes(monkeypatch: pytest.MonkeyPatch, fused: bool):
    def make(method: Any, options: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(method.parameters(), 0.1, fused=fused)

    monkeypatch.setattr("tailseg.train.fit.make_optimizer", make)
    assert doctor._fused(torch.device("cpu"), TrainOptions()) is fused


def test_what_compile_lacks_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CXX", "nvc++ -O2")
    lacks = ["the compiler nvc++", "Python's headers (Python.h)"]
    assert doctor.lacking_for_compile(torch.device("cpu")) == lacks
    assert "it would lack the compiler nvc++ and Python's headers" in {f.name: f.text for f in doctor._run()}["compile"]
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert doctor.lacking_for_compile(torch.device("cpu")) == []
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert doctor.lacking_for_compile(torch.device("cuda")) == ["the package triton"]


# --- advice


FINE: dict[str, Any] = {
    "torch": {"version": "2.6", "build": "CUDA 12.8"},
    "cores": {"usable": 8, "all": 8},
    "threads": 8,
    "load": 0.3,
    "RAM": {"free": 64e9, "all": 80e9},
    "disk": {"free": 500e9, "store": "stores"},
    "GPUs": [{"index": 0}],
    "NVIDIA driver": "550.1",
}


@pytest.mark.parametrize("values", [FINE, {}, dict.fromkeys(FINE)])
def test_a_machine_that_has_all_or_tells_nothing_gets_no_advice(values: dict[str, Any]):
    assert list(advice(values)) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"cores": {"usable": 1.5, "all": 8}}, "train.threads=2"),
        ({"load": 6.0}, "about 6.0 cores busy"),
        ({"GPUs": [], "torch": {"build": "the CPU alone"}}, "pytorch.org"),
        ({"GPUs": [], "NVIDIA driver": None}, "tailseg plan"),
        ({"RAM": {"free": 1e9}}, "only 1.0 GB of RAM"),
        ({"disk": {"free": 1e9}}, "--store"),
    ],
)
def test_what_falls_short_gets_one_piece_of_advice(change: dict[str, Any], told: str):
    (line,) = advice(FINE | change)
    assert told in line
