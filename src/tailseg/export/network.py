"""The part of trained methods that predicts, as a plain module, and its torch.export program.

Patches are (B, C, *S) float32, prepared; probabilities are (B, K, *S) float32, exactly those of Method.predict, or their mean
over several methods.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tailseg.core import Method, SegNet
from tailseg.export.trained import ExportError
from tailseg.networks.layers import Conv3d

AXES = ("depth", "height", "width")


class PredictionNetwork(nn.Module):
    """The methods' predict in evaluation mode, on the CPU, averaged. The methods themselves stay as they are.

    reverse_axes: patches come and go as (B, C, W, H, D), the order of the axes in a NIfTI file, in place of (B, C, D, H, W).
    """

    def __init__(self, methods: Sequence[Method], *, reverse_axes: bool = False) -> None:
        super().__init__()
        self.methods = nn.ModuleList(copy.deepcopy(method) for method in methods)
        self.reverse_axes = reverse_axes
        self.to(device="cpu", dtype=torch.float32).requires_grad_(False).eval()
        for module in self.modules():
            if (
                type(module) is Conv3d
            ):  # its detour is for gradients in bfloat16, and would fix the depth of what is traced
                module.__class__ = nn.Conv3d  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, patch: Tensor) -> Tensor:
        x = reverse_axes(patch) if self.reverse_axes else patch
        probs = [cast(Method, method).predict(x) for method in self.methods]
        mean = probs[0] if len(probs) == 1 else torch.stack(probs).mean(0)
        return reverse_axes(mean) if self.reverse_axes else mean

    @property
    def task(self) -> Any:
        return cast(Method, self.methods[0]).task

    def drop_unused(self) -> list[str]:
        """Remove the tensors that predict does not touch (teachers, class weights, memories of training images, which are
        nobody else's business); returns their names."""
        seen = _Seen()
        with torch.no_grad(), seen:
            self(self.example())
        tensors = [*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False)]
        unused = [name for name, tensor in tensors if id(tensor) not in seen.ids]
        self.drop(unused)
        return unused

    def drop(self, names: Sequence[str]) -> None:
        """Leave None in the place of these parameters and buffers."""
        for name in names:
            path, _, leaf = name.rpartition(".")
            module = self.get_submodule(path)
            tensors = module._parameters if leaf in module._parameters else module._buffers
            tensors[leaf] = None

    @property
    def size_divisor(self) -> int:
        """Every side of a patch must be a multiple of it."""
        return math.lcm(*(net.size_divisor for net in self.modules() if isinstance(net, SegNet)))

    def example(self, batch: int = 2, sides: Sequence[int] | None = None) -> Tensor:
        """Noise. sides: (D, H, W) or (H, W), by default small ones."""
        shape = tuple(sides or (2 * self.size_divisor,) * self.task.spatial_dims)
        if self.reverse_axes:
            shape = shape[::-1]
        generator = torch.Generator().manual_seed(0)
        return torch.rand(batch, self.task.in_channels, *shape, generator=generator)


@dataclass(frozen=True)
class Traced:
    """free: of each axis of the patch, in the order (D, H, W), whether any multiple of the divisor from twice that on is taken;
    the others have the side of patch_size. reason: why an axis is not free."""

    program: ExportedProgram
    patch_size: tuple[int, ...]
    divisor: int
    free: tuple[bool, ...]
    reason: str = ""

    @property
    def other_size(self) -> tuple[int, ...] | None:
        """A patch of another size than the usual one; None where there is no other."""
        least = 2 * self.divisor
        other = [
            (least if side != least else least + self.divisor) if free else side
            for side, free in zip(self.patch_size, self.free, strict=True)
        ]
        return tuple(other) if any(self.free) else None


def trace(network: PredictionNetwork, patch_size: Sequence[int]) -> Traced:
    """The network as a graph of torch's own operations, for any number of patches; for any size of them where the network
    allows that, else for patch_size alone. Raises ExportError when it cannot be traced at all."""
    divisor, patch, axes = network.size_divisor, tuple(patch_size), AXES[-len(patch_size) :]
    # a single voxel at the deepest stage is a case of its own, to torch and to some networks
    free = tuple(side >= 2 * divisor for side in patch)
    reason = "" if all(free) else f"sides below {2 * divisor} are a case of their own to torch"
    if any(free):
        example = network.example(sides=[2 * divisor if each else side for each, side in zip(free, patch, strict=True)])
        places = [len(patch) + 1 - axis if network.reverse_axes else 2 + axis for axis in range(len(patch))]
        sizes = {
            place: divisor * Dim(f"{name}_steps", min=2)
            for place, name, each in zip(places, axes, free, strict=True)
            if each
        }
        try:
            traced = Traced(_export(network, example, sizes), patch, divisor, free, reason)
            _try_sizes(network, traced)
            return traced
        except Exception as error:  # noqa: BLE001  torch.export's refusals have no common class
            reason = _first_line(error)
    try:
        program = _export(network, network.example(sides=patch), {})
    except Exception as error:
        raise ExportError(f"torch.export cannot trace this network: {_first_line(error)}") from error
    return Traced(program, patch, divisor, (False,) * len(patch), reason)


def _try_sizes(network: PredictionNetwork, traced: Traced) -> None:
    """Run the program on patches of the usual and of another size. Raises where its guards refuse one: what depends on the size
    of the example, as SCDL's grid of tokens does, is seen by torch only then."""
    run = program_callable(traced.program)
    for size in (traced.patch_size, traced.other_size):
        with torch.inference_mode():
            run(network.example(1, size))


def _export(network: PredictionNetwork, example: Tensor, sizes: dict[int, Any]) -> ExportedProgram:
    with quiet():
        return torch.export.export(network, (example,), dynamic_shapes=({0: Dim("batch", min=1), **sizes},))


def program_callable(program: ExportedProgram) -> Callable[[Tensor], Tensor]:
    module = program.module()
    return lambda x: module(x)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what torch's exporters tell about their own insides."""
    # torchvision's operations, which nobody asked for, are missing; and a trace of the tracing, which takes longer than it
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.__trace")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`isinstance\\(treespec, LeafSpec\\)`", category=FutureWarning)
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


class _Seen(TorchFunctionMode):
    """Remembers every tensor that is given to a function of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.ids.update(id(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


def reverse_axes(x: Tensor) -> Tensor:
    """(B, C, D, H, W) to (B, C, W, H, D), and back."""
    return x.permute(0, 1, *range(x.ndim - 1, 1, -1))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
