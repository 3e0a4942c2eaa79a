"""The least time that a device could take for a step, from what the step must compute and move.

    floor = max(arithmetic, traffic) + launches

arithmetic  FLOPs of the step's convolutions and matrix products (torch.utils.flop_counter: a multiplication and an addition
            are two), forward, backward and update, at the speed of a large bf16 matrix product on this device.
traffic     Bytes of every tensor that an operation reads or writes, each once an operation, in the type it has there, at the
            speed of a large copy on this device (read and written bytes both count). Element-wise operations, casts, copies
            and normalisations, forward and backward, count half: their input is at hand where it is made, if they are fused
            to what makes it, but their result is written. Views count nothing.
launches    4 microseconds for each operation that counts in full; what is fused has no launch of its own.

All is counted while the step runs under the device's autocast. So the floor is that of what the step does, not of the least
that it could do: a method that computes something twice has a higher floor, not a higher ratio.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

LAUNCH = 4e-6
FUSED = re.compile(
    r"(batch|group|instance|layer)_norm|relu|dropout|masked_fill|_copy$|^copy_$|^clone$|^_foreach_|_fused_(sgd|adam)"
    r"|zeros|ones|full|fill_|zero_|scalar_tensor|arange|eye"
)
"""Besides what torch itself calls pointwise: normalisations, activations, copies, constants and the optimiser's."""
NOT_READ = ("copy_", "fill_", "zero_")


@dataclass(frozen=True)
class Work:
    """Of one step. bytes: read and written by operations that stand alone. fused_bytes: by those that can be fused to another.
    operations, fused: how many there are of each."""

    flops: int
    bytes: int
    fused_bytes: int
    operations: int
    fused: int

    @property
    def traffic(self) -> float:
        return self.bytes + self.fused_bytes / 2


@dataclass(frozen=True)
class Limits:
    """Of a device. flops: a second, of a bf16 matrix product. bytes: a second, read and written by a copy."""

    flops: float
    bytes: float

    def floor(self, work: Work) -> dict[str, float]:
        """Seconds: arithmetic, traffic, launches and, of these, the floor."""
        arithmetic, traffic = work.flops / self.flops, work.traffic / self.bytes
        launches = work.operations * LAUNCH
        floor = max(arithmetic, traffic) + launches
        return {"arithmetic": arithmetic, "traffic": traffic, "launches": launches, "floor": floor}


def work_of(run: Callable[[], object]) -> Work:
    """What run() computes and moves, on any device, "meta" too."""
    with FlopCounterMode(display=False) as flops, _Traffic() as seen:
        run()
    return Work(flops.get_total_flops(), seen.bytes, seen.fused_bytes, seen.operations, seen.fused)


def limits_of(device: torch.device) -> Limits:
    """Measured: a product of matrices that fill the device, and a copy that no cache holds. On a CPU both are small and timed
    by the processor's time, so that the code can be tried; its numbers say nothing there."""
    on_gpu = device.type == "cuda"
    side, count = (8192, 2**30) if on_gpu else (128, 2**20)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))  # zeros would run faster than data does
    product = torch.empty_like(a)
    source = torch.randint(255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    flops = 2 * side**3 / _seconds(lambda: torch.mm(a, b, out=product), on_gpu)
    return Limits(flops, 2 * count / _seconds(lambda: target.copy_(source), on_gpu))


def _seconds(run: Callable[[], object], on_gpu: bool, turns: int = 10) -> float:
    """Mean of ten turns after three."""
    for _ in range(3):
        run()
    if not on_gpu:
        start = time.process_time()
        for _ in range(turns):
            run()
        return max(time.process_time() - start, 1e-9) / turns
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(turns):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / turns


class _Traffic(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.fused_bytes = self.operations = self.fused = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        moved = _moved(func, name, args, kwargs, result)
        if moved and (torch.Tag.pointwise in func.tags or FUSED.search(name)):
            self.fused_bytes, self.fused = self.fused_bytes + moved, self.fused + 1
        elif moved:
            self.bytes, self.operations = self.bytes + moved, self.operations + 1
        return result


def _moved(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes read and written; none by a view."""
    given = list(_tensors((args, kwargs)))
    changed = [
        tensor
        for place, value in zip(func._schema.arguments, args, strict=False)
        if place.alias_info is not None and place.alias_info.is_write
        for tensor in _tensors(value)
    ]
    known = {tensor.untyped_storage()._cdata for tensor in given}
    made = [tensor for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in known]
    if "empty" in name or not (made or changed):
        return 0
    read = given[1:] if name in NOT_READ else given
    return sum(map(_bytes, (*made, *changed, *read)))


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _bytes(tensor: Tensor) -> int:
    """What lies in memory of it: an expanded tensor is read from its one copy."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
