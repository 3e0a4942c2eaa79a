"""How a long job tells where it is."""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[int, int, str], None]
"""Told (done, total, case) after every case of a long job."""


def silent(done: int, total: int, case: str) -> None:
    """A Report that says nothing."""
