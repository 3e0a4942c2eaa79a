"""What a data set is made of, whatever the layout of its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One scan of one patient.

    images: one file per channel, in channel order; or fewer, of which some hold several channels (colours, NIfTI's fourth
    axis). label: None for an unlabelled case. patient: the case's own id where nothing says more. annotated: foreground
    classes that were looked for; None is all of them.
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None
    patient: str = ""
    annotated: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.patient:
            object.__setattr__(self, "patient", self.id)


@dataclass(frozen=True)
class RawDataset:
    """classes: names, background first. label_values: the value of each in the label files. ignore_values: read as IGNORE."""

    root: Path
    name: str
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    label_values: tuple[int, ...]
    ignore_values: tuple[int, ...]
    cases: Mapping[str, Case]
