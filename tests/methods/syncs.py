"""Find where a training step would wait for a GPU, without a GPU.

The device is torch's meta device: its tensors have shapes but no values, while those of the host keep theirs. Nothing of the
device can decide what the host does next, so that a step which runs to its end has waited for none of its values, whatever
they are; where it stops, that is the wait. What runs on meta but waits on CUDA is told by name: copies that block, and
operations that look at their input first. Arithmetic on the host, such as random draws, is free to look at itself.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, final
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import tailseg

DEVICE = torch.device("meta")
SOURCE = str(Path(tailseg.__file__).parent)
WAITING = {"multinomial", "histc", "_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "linalg_eig"}
"""Operations of aten that meta runs and CUDA waits for."""
COPIED_INDEX = list | np.ndarray


@final
class Waits:
    """found: what waited or made a one-hot, with the line of TailSeg that asked for it. largest: bytes of the largest tensor
    made on the device meanwhile. one_hot_size: as many elements make a one-hot of the labels; None looks for none."""

    def __init__(self, one_hot_size: int | None) -> None:
        self.one_hot_size = one_hot_size
        self.found: list[str] = []
        self.largest = 0

    def add(self, what: str) -> None:
        self.found.append(f"{_caller()}: {what}")


class Waited(Exception):
    """There is no value to go on with."""


def waits_of(run: Callable[[], object], *, one_hot_size: int | None = None) -> Waits:
    """What run(), which computes on DEVICE, waits for; of the values that it cannot do without, the first."""
    waits = Waits(one_hot_size)
    with contextlib.suppress(Waited), _no_autocast(), _Calls(waits), _Operations(waits):
        run()
    return waits


class _Calls(TorchFunctionMode):
    """Sees calls of torch's functions and of methods of tensors, before they become operations or fail to."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, found = kwargs or {}, len(self.waits.found)
        if func is F.one_hot and self.waits.one_hot_size:
            self.waits.add("one_hot")
        if reason := _hidden_copy(func, args, kwargs):
            self.waits.add(reason)
        try:
            return func(*args, **kwargs)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            if "meta" not in str(error).lower():
                raise
            if len(self.waits.found) == found:
                self.waits.add(f"{getattr(func, '__name__', func)}: {str(error).splitlines()[0]}")
            raise Waited from error


def _hidden_copy(func: Any, args: Any, kwargs: Any) -> str | None:
    """Values of the host that no operation shows on their way to the device, which blocks."""
    if func in (torch.tensor, torch.as_tensor, torch.asarray) and not isinstance(args[0], Tensor):
        there = kwargs.get("device") is not None and torch.device(kwargs["device"]) == DEVICE
        return f"torch.{func.__name__} on the device" if there else None
    if func is Tensor.new_tensor and args[0].device == DEVICE:
        return "new_tensor on the device"
    if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device == DEVICE:
        places = args[1] if isinstance(args[1], tuple) else (args[1],)
        return "index by a list" if any(isinstance(place, COPIED_INDEX) for place in places) else None
    return None


class _Operations(TorchDispatchMode):
    """Sees every operation of aten."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, tuple(kwargs.values()))))
        there = any(tensor.device == DEVICE for tensor in given) or kwargs.get("device") == DEVICE
        if there and (reason := _reason(func, args, kwargs)):
            self.waits.add(reason)
        result = _shapes(func, args, kwargs) if there else func(*args, **kwargs)
        made = [tensor for tensor in _tensors(result) if tensor.device == DEVICE]
        old = {tensor.untyped_storage()._cdata for tensor in given}
        new = [tensor.untyped_storage() for tensor in made if tensor.untyped_storage()._cdata not in old]
        self.waits.largest = max([self.waits.largest, *(storage.nbytes() for storage in new)])
        large = self.waits.one_hot_size and made and made[0].numel() >= self.waits.one_hot_size
        if large and _makes_one_hot(func.overloadpacket.__name__, args):
            self.waits.add(f"{func} makes a one-hot of {tuple(made[0].shape)}")
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


_known: dict[Any, Any] = {}
"""What an operation makes, by its arguments: to ask torch for it anew takes most of a step's time."""


def _shapes(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of func, remembered unless it is a view of an argument or the argument itself."""
    if any(made.alias_info for made in func._schema.returns):
        return func(*args, **kwargs)
    key = (func, _key(args), _key([*kwargs.items()]))
    if key not in _known:
        result = func(*args, **kwargs)
        _known[key] = [_remember(one) for one in result] if isinstance(result, list | tuple) else _remember(result)
        return result
    result = _known[key]
    return [_make(one) for one in result] if isinstance(result, list) else _make(result)


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.device)
    return tuple(map(_key, value)) if isinstance(value, list | tuple) else (type(value), value)


def _remember(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return partial(torch.empty_strided, value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _make(value: Any) -> Any:
    return value() if isinstance(value, partial) else value


def _reason(func: Any, args: Any, kwargs: Any) -> str | None:
    name = func.overloadpacket.__name__
    if name in WAITING:
        return str(func)
    match name:
        case "index" | "index_put" | "index_put_":
            places = [place for place in args[1] if place is not None]
            if any(place.dtype in (torch.bool, torch.uint8) for place in places):
                return f"{func} by a mask"
            if any(place.device != DEVICE for place in places):
                return f"{func} by places of the host"
        case "masked_fill" | "masked_fill_":
            if isinstance(args[2], Tensor) and args[2].device == DEVICE:
                return f"{func} by a value of the device"
        case "_to_copy":
            return _copy(func, args[0].device, kwargs.get("device") or args[0].device, kwargs.get("non_blocking"))
        case "copy_":
            return _copy(func, args[1].device, args[0].device, (*args, False)[2])
    return None


def _copy(func: Any, source: torch.device, target: torch.device, non_blocking: bool | None) -> str | None:
    if source == DEVICE != target:
        return f"{func} to the host"
    if source != DEVICE == target and not non_blocking:
        return f"{func} from the host without non_blocking=True"
    return None


def _makes_one_hot(name: str, args: Any) -> bool:
    """One value of each voxel scattered over an axis of classes, or labels compared with all classes."""
    if name.startswith("scatter"):
        target, axis, index = args[:3]
        return index.dim() > 1 and index.shape[axis] == 1 < target.shape[axis]
    labels = [one for one in args if isinstance(one, Tensor) and not one.is_floating_point()]
    return name == "eq" and len(labels) == 2 and labels[0].numel() != labels[1].numel()


def _caller() -> str:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith(SOURCE):
            return f"{Path(frame.f_code.co_filename).relative_to(SOURCE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside of tailseg"


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    """The meta device knows no autocast; whoever only switches it off has it off already."""

    def autocast(device_type: str, *, enabled: bool = True) -> contextlib.AbstractContextManager[None]:
        assert device_type == DEVICE.type and not enabled
        return contextlib.nullcontext()

    with patch("torch.autocast", autocast):
        yield
