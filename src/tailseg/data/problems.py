"""What can be wrong with a data set: RULES names every rule, how grave it is and what it says.

Errors keep a data set from being trained on, or its scores from meaning anything. Warnings ask for a look. Notes are no
problems: they say what to keep in mind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]

_RULES: dict[str, tuple[Severity, str]] = {
    "description": ("error", "dataset.json is missing, no JSON, or contradicts itself"),
    "layout": ("error", "files that nothing would read"),
    "channel": ("error", "channels missing, or too many"),
    "orphan-label": ("error", "labels without their scan"),
    "no-labels": ("error", "nothing to learn from"),
    "unreadable": ("error", "files that are damaged, or no scan"),
    "affine": ("error", "scans without a usable spacing and orientation"),
    "shape": ("error", "files of one case with different numbers of voxels"),
    "place": ("error", "files of one case at different places in the patient"),
    "nan": ("error", "voxels that are no numbers"),
    "label-fraction": ("error", "label values that are no whole numbers: interpolated?"),
    "label-value": ("error", "label values that dataset.json does not name"),
    "memory": ("error", "cases that do not fit the memory"),
    "split": ("error", "splits that cannot be used"),
    "leak": ("error", "splits that judge by what they were trained on"),
    "missing-label": ("warning", "fewer labels than dataset.json says"),
    "empty-label": ("warning", "labels of background alone"),
    "unsought": ("warning", "labels of classes that cases.csv says nobody looked for"),
    "constant": ("warning", "images of one value"),
    "spacing": ("warning", "voxels of an unusual size"),
    "shear": ("warning", "axes that are not at right angles"),
    "duplicate": ("warning", "the same voxels under two names"),
    "empty-class": ("warning", "classes that nobody annotated"),
    "few-cases": ("warning", "classes with fewer than 3 labelled cases"),
    "split-class": ("warning", "classes that a split gives no example of"),
    "sides": ("note", "left and right, which a mirrored image mixes up"),
}
RULES: Mapping[str, tuple[Severity, str]] = MappingProxyType(_RULES)
"""rule -> its severity, and what it says. In the order of a report."""


@dataclass(frozen=True)
class Problem:
    """One finding. file: relative to the data set, or "". case: its id, or "" where the finding is of no single case."""

    rule: str
    text: str
    way_out: str
    file: str = ""
    case: str = ""

    @property
    def severity(self) -> Severity:
        return RULES[self.rule][0]

    def to_dict(self) -> dict[str, Any]:
        return {"severity": self.severity, **asdict(self)}
