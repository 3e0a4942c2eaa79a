"""Where a training step spends its time, and how far that is from what the processor could do."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tailseg.core import Method

KINDS: Mapping[str, tuple[str, ...]] = {
    "convolution": ("conv", "bmm"),
    "normalisation": ("batch_norm", "normalise"),
    "activation": ("relu", "threshold"),
    "random draws": ("bernoulli", "random_", "normal_", "uniform_"),
    "interpolation and pooling": ("upsample", "pool"),
    "optimiser and teacher": ("optimizer", "_foreach", "_fused"),
    "losses and counts": ("softmax", "gather", "scatter", "max", "exp", "log", "sum", "mean", "where", "pow"),
    "copies and layout": ("copy_", "clone", "cat", "stack", "fill_", "zero", "empty"),
}
"""Kind -> what the names of its operations hold, or of what called them; the first that fits, else the rest."""
REST = "additions and the rest"
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def by_kind(step: Callable[[], object], times: int = 3) -> dict[str, float]:
    """Seconds of one step that operations of each kind take, the largest first; of the fastest of some, because the profiler
    keeps the memory of a step from being used again, and pages that are new take long."""
    return min((_by_kind(step) for _ in range(times)), key=lambda found: sum(found.values()))


def _by_kind(step: Callable[[], object]) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    times: Counter[str] = Counter()
    for event in profiled.events() or ():
        names, caller = [event.name.lower()], event.cpu_parent
        while caller is not None:
            names.append(caller.name.lower())
            caller = caller.cpu_parent
        fits = (kind for kind, parts in KINDS.items() if any(part in name for name in names for part in parts))
        times[next(fits, REST)] += event.self_cpu_time_total
    return {kind: value / 1e6 for kind, value in times.most_common()}


def convolution_flops(method: Method, step: Callable[[], object]) -> int:
    """Of a step, forward and backward, as the definition of a convolution has them: a product and a sum are two."""
    count = 0

    def add(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        nonlocal count
        transposed = isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d)
        voxels = (given[0] if transposed else made)[:, 0].numel()
        weight: Any = module.weight
        passes = 1 + made.requires_grad * (weight.requires_grad + given[0].requires_grad)
        count += passes * 2 * voxels * weight.numel()

    hooks = [module.register_forward_hook(add) for module in method.modules() if isinstance(module, CONVOLUTIONS)]
    step()
    for hook in hooks:
        hook.remove()
    return count


def product_rate(dtype: torch.dtype, side: int = 2048, times: int = 5) -> float:
    """Floating-point operations per processor second of the best of some products of two matrices."""
    a, b = torch.rand(2, side, side).to(dtype)
    best = float("inf")
    for _ in range(times):
        start = time.process_time()
        torch.mm(a, b)
        best = min(best, time.process_time() - start)
    return 2 * side**3 / best


def step_facts(method: Method, step: Callable[[], object], device: str, precision: str) -> dict[str, str]:
    """Of a step of the method on a CPU, whose networks are in fp32 or bf16; elsewhere nothing."""
    if device != "cpu":
        return {}
    operations, seconds = convolution_flops(method, step), by_kind(step)
    total = sum(seconds.values())
    limit = product_rate(torch.bfloat16 if precision == "bf16" else torch.float32)
    reached = operations / seconds["convolution"]
    return {
        f"share of the step in {precision} by kind of operation": ", ".join(
            f"{kind} {each / total:.1%}" for kind, each in seconds.items()
        ),
        "convolutions of a step": f"{operations / 1e12:.3g} TFLOP at {reached / 1e9:.0f} GFLOP/s a processor",
        f"the product of two matrices in {precision}": (
            f"{limit / 1e9:.0f} GFLOP/s a processor; at that rate these convolutions would take {operations / limit:.3g} s "
            f"of the step's {total:.3g} s"
        ),
    }
