"""TailSeg: semi-supervised, class-imbalanced medical image segmentation.

The names below are loaded when first asked for, so that `import tailseg` and the command start without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tailseg.core import IGNORE, Batch, Method, Progress, SegNet, SegOutput, StepOutput, Task

    __version__: str

_HOME = {
    "IGNORE": "tailseg.core",
    "Batch": "tailseg.core",
    "Method": "tailseg.core",
    "Progress": "tailseg.core",
    "SegNet": "tailseg.core",
    "SegOutput": "tailseg.core",
    "StepOutput": "tailseg.core",
    "Task": "tailseg.core",
}

__all__ = ["IGNORE", "Batch", "Method", "Progress", "SegNet", "SegOutput", "StepOutput", "Task", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("tailseg")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'tailseg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
