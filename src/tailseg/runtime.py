"""Where and how a run computes: device, processes, precision, memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tailseg.core import Method, SegNet

Precision = Literal["auto", "fp32", "bf16", "fp16"]


class RuntimeOptions(BaseModel):
    """device: cpu, cuda, cuda:1, mps, or auto (cuda where there is one). Under torchrun each process takes its own GPU.

    precision: auto is bf16 where the device computes in it, fp32 elsewhere; a processor that only emulates bf16 takes several
    times as long with it as with fp32. channels_last: memory layout of images and networks. compile: the networks with
    torch.compile. deterministic: refuse operations whose result depends on the order of threads. threads: CPU threads of the
    arithmetic, null is torch's number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str = "auto"
    precision: Precision = "fp32"
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

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        precision = self.options.precision
        if precision == "fp32" or (precision == "auto" and not computes_in_bf16(self.device)):
            return contextlib.nullcontext()
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        # the cache of cast weights loses their gradient if the first pass over them was one without autograd
        # (github.com/pytorch/pytorch/pull/165068), as it is in many methods
        return torch.autocast(self.device.type, dtype, cache_enabled=False)

    def place(self, method: Method) -> None:
        """Move the method to the device and layout, and compile its networks in place, so that no name changes."""
        method.to(self.device)
        for net in method.modules():
            if isinstance(net, SegNet):
                net.to(memory_format=self.memory_format(method.task.spatial_dims))  # pyright: ignore[reportCallIssue]
                if self.options.compile:
                    for part in (net.encoder, *net.decoders):
                        part.compile()

    def wrap(self, method: Method) -> nn.Module:
        """The door to call: the method itself, or DDP around it. Trackers and buffers synchronise themselves."""
        if self.ranks == 1:
            return method
        # a 1x1 kernel has one memory in two layouts; DDP then copies instead of sharing it, and says so on every process
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(method, device_ids=devices, broadcast_buffers=False)


@contextlib.contextmanager
def start_runtime(options: RuntimeOptions, seed: int) -> Iterator[Runtime]:
    """Choose the device, join the other processes if torchrun started them, seed; leaves the process group at the end."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = choose_device(options.device, int(os.environ.get("LOCAL_RANK", "0")))
    if options.precision == "bf16" and not computes_in_bf16(device):
        warnings.warn(
            "This device only emulates bf16; train.precision=auto takes fp32 here, which is faster.", stacklevel=2
        )
    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(options.deterministic)
    torch.backends.cudnn.benchmark = not options.deterministic
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(seed)  # the same networks on every rank; fit() gives each its own noise afterwards
    try:
        yield Runtime(device, options, rank, ranks)
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
    return device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def keep_freed_memory() -> None:
    """Let glibc keep freed tensors instead of giving them back and faulting every page in again (1.2 to 1.5 times a step)."""
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL("libc.so.6")
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)


def average_batch_norm(method: nn.Module, ranks: int) -> None:
    """Give all ranks the mean of their running statistics, before anything reads them."""
    if ranks == 1:
        return
    for module in method.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            for statistic in (module.running_mean, cast(torch.Tensor, module.running_var)):
                dist.all_reduce(statistic)
                statistic.div_(ranks)
