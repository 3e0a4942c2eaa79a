"""Where and how a run computes: device, processes, precision, memory."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tailseg.core import Batch, Method, SegNet

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]


class RuntimeOptions(BaseModel):
    """device: cpu, cuda, cuda:1, mps, or auto (cuda where there is one). Under torchrun each process takes its own GPU.

    precision: auto is bf16 where the device computes in it, fp32 elsewhere; a processor that only emulates bf16 takes several
    times as long with it as with fp32. tf32 is fp32 whose convolutions and products round their factors to 10 bits, on an
    NVIDIA GPU since Ampere. channels_last: memory layout of images and networks. compile: the networks with torch.compile.
    deterministic: refuse operations whose result depends on the order of threads. threads: CPU threads of the arithmetic,
    null is torch's number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str = "auto"
    precision: Precision = "auto"
    channels_last: bool = True
    compile: bool = False
    deterministic: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class Runtime:
    device: torch.device
    options: RuntimeOptions
    rank: int = 0
    ranks: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def memory_format(self, spatial_dims: int) -> torch.memory_format:
        if not self.options.channels_last:
            return torch.contiguous_format
        return torch.channels_last_3d if spatial_dims == 3 else torch.channels_last

    @property
    def precision(self) -> Literal["fp32", "tf32", "bf16", "fp16"]:
        """What auto means here."""
        if self.options.precision == "auto":
            return "bf16" if computes_in_bf16(self.device) else "fp32"
        return self.options.precision

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.precision in ("fp32", "tf32"):
            return contextlib.nullcontext()
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        # the cache of cast weights loses their gradient if the first pass over them was one without autograd
        # (github.com/pytorch/pytorch/pull/165068), as it is in many methods
        return torch.autocast(self.device.type, dtype, cache_enabled=False)

    def tune(self) -> None:
        """Tell torch and the allocator of this process how to work for these options; once or often is the same."""
        keep_freed_memory()
        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        # tries the kernels of every new shape once; patches and windows have one shape each
        torch.backends.cudnn.benchmark = not self.options.deterministic
        # convolutions are in TF32 by torch's own default, which nobody who asks for fp32 expects
        torch.backends.cudnn.allow_tf32 = self.precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = self.precision == "tf32"

    def place(self, method: Method) -> None:
        """Move the method to the device and layout, and compile its networks in place, so that no name changes."""
        self.tune()
        method.to(self.device)
        for net in method.modules():
            if isinstance(net, SegNet):
                net.to(memory_format=self.memory_format(method.task.spatial_dims))  # pyright: ignore[reportCallIssue]
                if self.options.compile:
                    for part in (net.encoder, *net.decoders):
                        part.compile()

    def sender(self, spatial_dims: int) -> Callable[[Batch], Callable[[], Batch]]:
        """For threads that make batches: send(batch) starts its way to the GPU, beside the steps that go on there, and
        returns what gives the batch to the thread that trains. Elsewhere there is no such way, and nothing is done."""
        if self.device.type != "cuda":
            return lambda batch: lambda: batch
        aside = torch.cuda.Stream(self.device)

        def send(batch: Batch) -> Callable[[], Batch]:
            with torch.cuda.stream(aside):  # the choice of stream is this thread's own
                # only from pinned memory does a copy go on by itself; torch keeps it until the copy is done
                there = _each(batch, Tensor.pin_memory).to(self.device, self.memory_format(spatial_dims))
                arrived = aside.record_event()

            def receive() -> Batch:
                here = torch.cuda.current_stream(self.device)
                here.wait_event(arrived)  # the GPU waits, not this thread

                def held(part: Tensor) -> Tensor:  # its memory is free again only when the steps here are done with it
                    part.record_stream(here)
                    return part

                return _each(there, held)

            return receive

        return send

    def wrap(self, method: Method) -> nn.Module:
        """The door to call: the method itself, or DDP around it. Trackers and buffers synchronise themselves."""
        if self.ranks == 1:
            return method
        # a 1x1 kernel has one memory in two layouts; DDP then copies instead of sharing it, and says so on every process
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(method, device_ids=devices, **_buffers_stay_as_they_are())


def _buffers_stay_as_they_are() -> dict[str, Any]:
    """The argument that keeps DDP from sending rank 0's buffers before every step; torch 2.13 gave it another name."""
    known = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}


def _each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    features = None if batch.features is None else change(batch.features)
    return Batch(change(batch.x_l), change(batch.y_l), change(batch.x_u), features)


@contextlib.contextmanager
def start_runtime(options: RuntimeOptions, seed: int) -> Iterator[Runtime]:
    """Choose the device, join the other processes if torchrun started them, seed; leaves the process group at the end."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = choose_device(options.device, int(os.environ.get("LOCAL_RANK", "0")))
    if options.precision == "tf32" and not computes_in_tf32(device):
        raise ValueError(
            "train.precision is 'tf32', which is for NVIDIA GPUs since Ampere; use train.precision=auto here."
        )
    if options.precision == "bf16" and not computes_in_bf16(device):
        warnings.warn(
            "This device only emulates bf16; train.precision=auto takes fp32 here, which is faster.", stacklevel=2
        )
    runtime = Runtime(device, options, rank, ranks)
    runtime.tune()
    torch.use_deterministic_algorithms(options.deterministic)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(seed)  # the same networks on every rank; fit() gives each its own noise afterwards
    try:
        yield runtime
    finally:
        if ranks > 1:
            dist.destroy_process_group()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Raises ValueError for a device that this machine or this torch does not have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"train.device '{name}' is no device; use auto, cpu, cuda, cuda:<n> or mps.") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"train.device is '{name}', but torch sees no CUDA GPU here; use train.device=cpu.")
        return device if device.index is not None else torch.device("cuda", local_rank)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("train.device is 'mps', but torch sees no Apple GPU here; use train.device=cpu.")
    return device


def computes_in_bf16(device: torch.device) -> bool:
    """Whether convolutions run in bfloat16 on it rather than by way of float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    # oneDNN also takes bf16 where AVX-512 has no instruction for it, and then widens every number first
    return platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_avx512_bf16_supported()


def computes_in_tf32(device: torch.device) -> bool:
    return (
        device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def keep_freed_memory() -> None:
    """Let glibc keep freed tensors instead of giving them back and faulting every page in again.

    On two kinds of processor a step took 1.1 and 1.2 to 1.5 times as long without; the peak of memory was a tenth lower. One
    arena serves all threads: those of a thread of its own give memory back whatever they are told, and threads cut
    the batches.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL("libc.so.6")
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX of malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, -1)  # never; the largest int is 2 GB, which a step frees at once
    libc.mallopt(arena_max, 1)


def average_batch_norm(method: nn.Module, ranks: int) -> None:
    """Give all ranks the mean of their running statistics, before anything reads them."""
    if ranks == 1:
        return
    for module in method.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            for statistic in (module.running_mean, cast(Tensor, module.running_var)):
                dist.all_reduce(statistic)
                statistic.div_(ranks)
