"""Packages that only some formats need."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from tailseg.export.trained import ExportError


def require(extra: str, file_format: str, *packages: str) -> None:
    """Raises ExportError naming the extra that brings what is missing; imports nothing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ExportError(
                f"the format {file_format} needs {package}, which is not installed: pip install 'tailseg[{extra}]'"
            )


def load(package: str, extra: str, file_format: str) -> Any:
    """The imported package, which may be a part of one. Raises ExportError as require does."""
    require(extra, file_format, package.partition(".")[0])
    return importlib.import_module(package)
