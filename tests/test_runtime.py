"""What a process is told before it computes: precision, kernels, memory; and how batches come to the device."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from tailseg import runtime
from tailseg.checks import example_batch, example_task, make_example
from tailseg.components import find
from tailseg.runtime import Precision, Runtime, RuntimeOptions, start_runtime

CPU = torch.device("cpu")


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bf16_only_where_the_device_computes_in_it(
    native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(runtime, "computes_in_bf16", lambda device: native)
    with Runtime(CPU, RuntimeOptions(precision="auto")).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_an_emulated_precision_is_used_as_asked_and_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime, "computes_in_bf16", lambda device: False)
    options = RuntimeOptions(device="cpu", precision="bf16")
    with (
        pytest.warns(UserWarning, match=r"only emulates bf16; train\.precision=auto"),
        start_runtime(options, 0) as made,
        made.autocast(),
    ):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_whether_this_cpu_computes_in_bf16_is_known():
    assert runtime.computes_in_bf16(CPU) in (True, False)


def test_auto_is_the_default_of_every_run():
    assert RuntimeOptions().precision == "auto"


@pytest.mark.parametrize(
    ("machine", "onednn", "instruction", "expected"),
    [
        ("x86_64", True, True, True),
        ("x86_64", True, False, False),  # AVX-512 of the years before: oneDNN takes bf16, and widens it
        ("x86_64", False, False, False),
        ("aarch64", True, False, True),
    ],
)
def test_a_processor_without_bf16_instructions_does_not_compute_in_it(
    machine: str, onednn: bool, instruction: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: instruction)
    assert runtime.computes_in_bf16(CPU) is expected


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leaves torch's switches and threads as they were."""
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    threads = torch.get_num_threads()
    yield
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
@pytest.mark.usefixtures("flags")
def test_only_tf32_rounds_factors(precision: Precision):
    Runtime(CPU, RuntimeOptions(precision=precision)).tune()
    assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is (precision == "tf32")


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.usefixtures("flags")
def test_kernels_are_tried_out_unless_determinism_is_asked_for(deterministic: bool):
    with start_runtime(RuntimeOptions(device="cpu", deterministic=deterministic), 0):
        assert torch.backends.cudnn.benchmark is not deterministic
        assert torch.are_deterministic_algorithms_enabled() is deterministic


@pytest.mark.usefixtures("flags")
def test_prediction_is_tuned_as_training_is():
    """Prediction has no start_runtime; placing the method is enough."""
    method = make_example(find("methods", "supervised"), example_task(2, 1, 2))
    Runtime(CPU, RuntimeOptions(threads=2)).place(method)
    assert torch.get_num_threads() == 2 and torch.backends.cudnn.benchmark


def test_tf32_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match=r"'tf32', which is for NVIDIA GPUs since Ampere; use train\.precision=auto"):
        start_runtime(RuntimeOptions(device="cpu", precision="tf32"), 0).__enter__()


def test_wrapping_for_several_processes_warns_of_nothing():
    """Torch 2.13 renamed the argument that leaves buffers alone; the name of each version is used."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    try:
        method = make_example(find("methods", "supervised"), example_task(2, 1, 2))
        door = Runtime(CPU, RuntimeOptions(), rank=0, ranks=2).wrap(method)
    finally:
        dist.destroy_process_group()
    stays = getattr(door, "forward_sync_buffers", None) is False or getattr(door, "broadcast_buffers", None) is False
    assert stays and door.module is method


def test_a_batch_for_the_cpu_is_sent_nowhere():
    batch = example_batch(example_task(2, 1, 2))
    assert Runtime(CPU, RuntimeOptions()).sender(2)(batch)() is batch


@pytest.mark.gpu
def test_a_batch_for_the_gpu_arrives_whole_beside_other_work():
    device = torch.device("cuda", 0)
    send = Runtime(device, RuntimeOptions(device="cuda")).sender(3)
    batch = example_batch(example_task(3, 2, 3), side=32)
    busy = torch.rand(4096, 4096, device=device)
    for _ in range(100):
        busy = busy @ busy / 4096
    with ThreadPoolExecutor(1) as threads:
        there = threads.submit(send, batch).result()()
    assert there.x_l.is_contiguous(memory_format=torch.channels_last_3d)
    for mine, its in ((batch.x_l, there.x_l), (batch.y_l, there.y_l), (batch.x_u, there.x_u)):
        assert its.device == device and torch.equal(mine, its.cpu())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_memory_that_the_loaders_threads_took_is_kept():
    """In a process of its own, which has no memory yet. Cut by a thread, freed by another, as batches are."""
    script = """
import resource
from concurrent.futures import ThreadPoolExecutor
import torch
from tailseg.runtime import keep_freed_memory

keep_freed_memory()
faults = []
with ThreadPoolExecutor(1) as pool:
    for _ in range(12):
        batch = pool.submit(lambda: [torch.zeros(4 * 2**20), torch.zeros(2 * 2**20)]).result()
        del batch
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[7])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2000, "a batch of 24 MB has 6144 pages"
