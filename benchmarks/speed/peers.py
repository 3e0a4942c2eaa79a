"""What makes the released code of a paper run here unchanged: on CPU tensors, without the packages it only imports.

Nothing of theirs is in this repository; every function takes the folder of a checkout.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import torch

device = "cpu"
"""Where the benchmarks run; set by __main__."""


@contextmanager
def on_cpu() -> Iterator[None]:
    """Within, .cuda() leaves everything where it is, unless the benchmarks run on a GPU."""
    if device.startswith("cuda"):
        yield
        return

    def stay(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    with patch.object(torch.Tensor, "cuda", stay), patch.object(torch.nn.Module, "cuda", stay):
        yield


def load(folder: Path, module: str, *, stubs: Sequence[str] = (), arguments: Sequence[str] = ()) -> ModuleType:
    """A module of the checkout, with folder first on the path; packages of other checkouts with its name are forgotten.

    stubs: packages that it imports and does not need here. arguments: of its command line, which scripts parse on import.
    """
    top = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    for name in [name for name in sys.modules if name.split(".")[0] in top]:
        del sys.modules[name]
    missing = {name: _stub(name) for name in stubs if name not in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        with patch.dict(sys.modules, missing), patch.object(sys, "argv", [module, *arguments]), on_cpu():
            return importlib.import_module(module)
    finally:
        sys.path.remove(str(folder))


def _stub(name: str) -> ModuleType:
    module = types.ModuleType(name)
    module.__getattr__ = lambda attribute: MagicMock(name=f"{name}.{attribute}")  # pyright: ignore[reportAttributeAccessIssue]
    module.__path__ = []
    return module
