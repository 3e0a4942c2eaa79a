"""metrics.jsonl: one JSON object per line, told apart by "kind"; what is not finite is null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tailseg.files import write_text


class MetricsLog:
    """Appends to path after dropping the lines of steps beyond until; each line is on the disk when write returns.

    kept: the lines that stay. Raises ValueError when path is no such file.
    """

    def __init__(self, path: Path, until: int) -> None:
        self.kept = [line for line in read_metrics(path) if line["step"] <= until] if path.exists() else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in self.kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, kind: str, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(_finite({"kind": kind, **values}), allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a run, in order; a last line cut short by a kill is left out."""
    lines = []
    rows = path.read_text(encoding="utf-8").splitlines()
    for number, row in enumerate(rows, start=1):
        try:
            lines.append(json.loads(row))
        except json.JSONDecodeError as error:
            if number < len(rows):
                raise ValueError(f"{path}, line {number} is no JSON: mend or remove it. ({error})") from error
    return lines


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
