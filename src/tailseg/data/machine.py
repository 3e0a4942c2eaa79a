"""What this machine has to offer a plan: memory, disk, and the time that a network's pass takes."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from tailseg.core import SegNet
from tailseg.data.plan import Machine, NetworkCost
from tailseg.runtime import Runtime, RuntimeOptions, choose_device, computes_in_bf16, keep_freed_memory

PASSES = 4
GAIN = 0.7  # of every further thread
_NO_LIMIT = 1 << 60


def look_at_machine(device: str, store: Path) -> Machine:
    """device: as in train.device. store: folder whose disk counts; it need not exist."""
    chosen, ram = choose_device(device), float(free_ram())
    memory, name = ram, f"this CPU ({os.cpu_count()} cores)"
    if chosen.type == "cuda":
        memory, name = float(torch.cuda.mem_get_info(chosen)[0]), torch.cuda.get_device_name(chosen)
    elif chosen.type == "mps":
        name = "this Apple GPU"  # which shares the RAM
    place = store.resolve()
    while not place.exists():
        place = place.parent
    return Machine(
        device=device,
        name=name,
        is_gpu=chosen.type != "cpu",
        memory=memory,
        ram=ram,
        disk=float(shutil.disk_usage(place).free),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        bf16=computes_in_bf16(chosen),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
    )


def free_ram() -> int:
    """Bytes that a new process may take, within the limits of a container; half of all where the system does not say."""
    free = _available() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # no container, or "max"
            most = int(Path(limit).read_text(encoding="ascii"))
            if most < _NO_LIMIT:
                free = min(free, max(most - int(Path(used).read_text(encoding="ascii")), 0))
    return free


def _available() -> int:
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def measure_cost(
    build: Callable[[], SegNet], spatial_dims: Literal[2, 3], in_channels: int, device: str
) -> NetworkCost:
    """Time a few passes of a network on the device, and count what autograd keeps of one. About a second."""
    chosen = choose_device(device)
    runtime = Runtime(chosen, RuntimeOptions(device=device, precision="auto"))
    keep_freed_memory()  # as training does
    large = chosen.type != "cpu"  # a GPU is not filled by less
    sides = ((64, 96, 96) if large else (32, 48, 48)) if spatial_dims == 3 else (256, 256) if large else (128, 128)
    count = 2 if large else 1
    with torch.random.fork_rng([chosen] if chosen.type == "cuda" else []), _one_thread():
        net = build().to(chosen).train()
        net.to(memory_format=runtime.memory_format(spatial_dims))  # pyright: ignore[reportCallIssue]
        x = torch.randn(count, in_channels, *sides).to(chosen, memory_format=runtime.memory_format(spatial_dims))
        seconds = [_pass(net, x, runtime) for _ in range(PASSES)]
        kept = _kept(build, x)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    per_voxel = min(seconds[1:]) / (count * x[0, 0].numel())
    if not large:
        per_voxel /= 1 + GAIN * (torch.get_num_threads() - 1)
    return NetworkCost(per_voxel, kept, parameters)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other beside other work burn the processor's time, which is what is measured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _pass(net: SegNet, x: torch.Tensor, runtime: Runtime) -> float:
    start = _now(runtime.device)
    with runtime.autocast():
        logits = net(x).logits
    F.log_softmax(logits.float(), 1).mean().backward()
    net.zero_grad()
    return _now(runtime.device) - start


def _now(device: torch.device) -> float:
    """Seconds; of the processor on a CPU, so that other work on the machine hardly counts."""
    if device.type == "cpu":
        return time.process_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    else:
        torch.mps.synchronize()
    return time.perf_counter()


def _kept(build: Callable[[], SegNet], x: torch.Tensor) -> float:
    """Values per voxel that autograd keeps of a forward pass; on a device that computes nothing."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "meta":
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage  # held, so that no other takes its place
        return tensor

    with torch.device("meta"):
        net = build().train()
        y = torch.empty(x.shape)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(y)
    weights = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
    size = sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
    return size / 4 / (len(x) * x[0, 0].numel())
