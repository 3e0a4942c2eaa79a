"""torch.export: a graph that any PyTorch loads, without TailSeg and without pickled code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailseg.export.network import Traced, program_callable, quiet

FILE = "model.pt2"


def write(path: Path, traced: Traced, preparation: dict[str, Any]) -> None:
    """path: of the .pt2 file; the description of the preparation goes along inside."""
    with quiet():
        torch.export.save(traced.program, path, extra_files={"preparation.json": json.dumps(preparation)})


def load(path: Path) -> Callable[[Tensor], Tensor]:
    with quiet():
        return program_callable(torch.export.load(path))
