"""The scans with their predictions in 3D, inside one page that needs no network: the page's viewer, NiiVue.

Its label map is drawn over the scan by NiiVue's drawing layer, whose colours are ours: the colour map that NiiVue gives an
overlay leaves small organs unseen.
"""

from __future__ import annotations

import html
import json
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tailseg.data.image import Image, read_channels, read_geometry, read_image, same_place, spacing_of, turned_onto
from tailseg.report.volumes import (
    UNKNOWN,
    class_indices,
    packed,
    reduce_image,
    reduce_labels,
    reduced_affine,
    reduced_shape,
    to_grey,
    to_nifti_text,
    turned_to_ras,
)

NIIVUE_VERSION = "0.69.0"
NIIVUE_SHA256 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"
MAX_CLASSES = 250  # the labels above are for what the viewer draws itself
LONGEST, SHORTEST = 256, 80
"""Voxels along a scan's longest side: more is more than a phone can hold, fewer shows no organs."""

_FOLDER = Path(__file__).parent / "viewer"
LEAST_BUDGET = 2_000_000
"""Bytes that hold the viewer and a scan of SHORTEST voxels along every side, whatever it shows."""
_GROUPS = {"test": "Test", "validation": "Validation", "labelled": "Labelled", "unlabelled": "Unlabelled"}
_STEP = 1.03  # between two voxel sizes that are tried
_FIRST_GUESS = 0.8  # bytes of page per voxel


@dataclass(frozen=True)
class ViewerCase:
    """A scan and its label files.

    group: "test", "validation", "labelled" or "unlabelled". image: one file, or one per channel. score: mean Dice.
    """

    case: str
    group: str
    image: Path | tuple[Path, ...]
    prediction: Path
    reference: Path | None
    score: float | None

    def __post_init__(self) -> None:
        if self.group not in _GROUPS:
            raise ValueError(f"Case {self.case!r} is of the group {self.group!r}; use one of {', '.join(_GROUPS)}.")

    @property
    def first_image(self) -> Path:
        return self.image if isinstance(self.image, Path) else self.image[0]


@dataclass(frozen=True)
class _Grid:
    """shape: (I, J, K) as in the file. spacing: mm, the same order."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]

    def reduced(self, target: float) -> tuple[int, int, int]:
        return reduced_shape(self.shape, self.spacing, target)


@dataclass(frozen=True)
class _Encoded:
    """What a page says of a case, and its volumes: name -> gzipped NIfTI as base64."""

    facts: dict[str, object]
    volumes: dict[str, str]

    @property
    def size(self) -> int:
        return sum(map(len, self.volumes.values())) + 200 * len(self.volumes) + len(json.dumps(self.facts))


def viewer_html(
    cases: Sequence[ViewerCase],
    classes: Sequence[str],
    label_values: Sequence[int],
    colours: Sequence[str],
    *,
    budget: int,
) -> str:
    """An HTML fragment of budget bytes at the most, or "" if no case is a volume. One fragment goes into a page.

    classes: the first is the background. label_values: of every class, in the label files. colours: "#rrggbb" for every
    class but the first. All cases are shown at one voxel size, the finest that fits; if not even the coarsest does, the worst,
    the best and some in between are shown, and the page says how many are left out.
    Raises ValueError for a budget that holds no case, and for label maps that do not lie on their scan's grid; ImageError.
    """
    if not len(classes) == len(label_values) == len(colours) + 1 <= MAX_CLASSES:
        raise ValueError(
            f"{len(classes)} classes with the background, {len(label_values)} label values and {len(colours)} colours do "
            f"not fit together; give a value to every class and a colour to every class but the first, {MAX_CLASSES} at most."
        )
    grids = {index: _grid_of(case) for index, case in enumerate(cases)}
    volumes = [index for index in sorted(grids, key=lambda index: _rank(cases[index])) if min(grids[index].shape) > 1]
    if not volumes:
        return ""
    room = budget - len(_fragment([], [], classes, colours, left_out=len(cases)).encode())
    shown, encoded = _fitted([(cases[index], grids[index]) for index in volumes], label_values, room, budget)
    return _fragment(shown, encoded, classes, colours, left_out=len(cases) - len(shown))


def _grid_of(case: ViewerCase) -> _Grid:
    (d, h, w), affine = read_geometry(case.first_image)
    k, j, i = spacing_of(affine)
    return _Grid((w, h, d), (i, j, k))


def _rank(case: ViewerCase) -> tuple[int, float, str]:
    """By group, the worst first, those without a score last."""
    score = math.inf if case.score is None or math.isnan(case.score) else case.score
    return list(_GROUPS).index(case.group), score, case.case


def _fitted(
    cases: list[tuple[ViewerCase, _Grid]], label_values: Sequence[int], room: int, budget: int
) -> tuple[list[ViewerCase], list[_Encoded]]:
    """As many cases as fine as fit into room bytes. The bytes of a voxel are measured on a case in the middle."""
    targets = _targets([grid for _, grid in cases])
    case, grid = cases[len(cases) // 2]
    trial = _choose(cases, targets, room / _FIRST_GUESS)[1]
    per_voxel = 1.03 * _encode(case, label_values, trial).size / math.prod(grid.reduced(trial))
    while True:
        chosen, target = _choose(cases, targets, room / per_voxel)
        encoded: list[_Encoded] = []
        for case, _ in chosen:
            encoded.append(_encode(case, label_values, target))
            if sum(one.size for one in encoded) > room:
                break
        else:
            return [case for case, _ in chosen], encoded
        if len(chosen) == 1 and target == targets[-1]:
            raise ValueError(
                f"{budget} bytes hold no 3D view, not even of one scan at {SHORTEST} voxels along its longest side; "
                f"give {math.ceil((budget - room + encoded[0].size) / 1e5) / 10:.1f} MB or more."
            )
        done = sum(math.prod(grid.reduced(target)) for _, grid in chosen[: len(encoded)])
        per_voxel = max(1.06 * per_voxel, 1.02 * sum(one.size for one in encoded) / done)


def _targets(grids: Sequence[_Grid]) -> list[float]:
    """Voxel sizes in mm to try, from fine to coarse."""
    target = min(min(grid.spacing) for grid in grids)
    targets = []
    while True:
        longest = max(max(grid.reduced(target)) for grid in grids)
        if longest <= LONGEST:
            targets.append(target)
        if longest <= SHORTEST:
            return targets
        target *= _STEP


def _choose(
    cases: list[tuple[ViewerCase, _Grid]], targets: Sequence[float], voxels: float
) -> tuple[list[tuple[ViewerCase, _Grid]], float]:
    """The cases and the voxel size of about so many voxels in all, at least one case."""
    for target in targets:
        if sum(math.prod(grid.reduced(target)) for _, grid in cases) <= voxels:
            return cases, target
    for count in range(len(cases) - 1, 1, -1):
        some = [cases[index] for index in _spread([case.group for case, _ in cases], count)]
        if sum(math.prod(grid.reduced(targets[-1])) for _, grid in some) <= voxels:
            return some, targets[-1]
    return cases[:1], targets[-1]


def _spread(groups: Sequence[str], count: int) -> list[int]:
    """count of the cases, in order: of every group its share, from its worst to its best in even steps.

    groups: of every case, sorted by group and score.
    """
    members = {group: [index for index, one in enumerate(groups) if one == group] for group in dict.fromkeys(groups)}
    quota = dict.fromkeys(members, 0)
    for _ in range(count):  # to whom has the least of what it should have; every group gets one before any gets two
        group = min(
            (group for group in members if quota[group] < len(members[group])),
            key=lambda group: (quota[group] > 0, quota[group] / len(members[group])),
        )
        quota[group] += 1
    picked = []
    for group, indices in members.items():
        if quota[group]:
            steps = np.linspace(0, len(indices) - 1, quota[group])
            picked += [indices[round(step)] for step in steps]
    return sorted(picked)


def _encode(case: ViewerCase, label_values: Sequence[int], target: float) -> _Encoded:
    """target: mm per voxel."""
    scan = read_channels(case.first_image)
    scan = Image(scan.array[0], scan.affine)
    array, affine = turned_to_ras(scan)
    native = np.linalg.norm(affine[:3, :3], axis=0)
    shape = reduced_shape(array.shape, native, target)
    labels, voxels = {}, {}
    for name, path in (("prediction", case.prediction), ("reference", case.reference)):
        if path is not None:
            whole = _label_map(path, scan, case.case, label_values)
            voxels[name] = np.bincount(whole.ravel(), minlength=len(label_values))[: len(label_values)].tolist()
            labels[name] = reduce_labels(whole, shape)
    reduced = reduce_image(array, shape)
    grid = reduced_affine(affine, array.shape, shape)
    known = np.maximum.reduce([np.where(one == UNKNOWN, 0, one) for one in labels.values()])
    volumes = {"image": to_nifti_text(to_grey(reduced, known), grid)}
    volumes |= {name: to_nifti_text(one, grid) for name, one in labels.items()}
    facts = {
        "case": case.case,
        "group": case.group,
        "score": None if case.score is None or math.isnan(case.score) else round(case.score, 4),
        "voxels": voxels,
        "mm3": abs(float(np.linalg.det(affine[:3, :3]))),
        "native": [round(float(step), 3) for step in native],
        "shown": [round(float(step), 3) for step in np.linalg.norm(grid[:3, :3], axis=0)],
    }
    return _Encoded(facts, volumes)


def _label_map(path: Path, scan: Image, case: str, label_values: Sequence[int]) -> np.ndarray:
    """(I, J, K) uint8 along right, anterior, superior: positions in label_values, on the scan's grid."""
    label = turned_onto(read_image(path), scan.affine, scan.array.shape)  # pyright: ignore[reportArgumentType]
    if label.array.shape != scan.array.shape or not same_place(label.affine, scan.affine, label.array.shape):
        raise ValueError(
            f"{path} of case {case!r} has the shape {label.array.shape}, its scan {scan.array.shape} (D, H, W), or it lies "
            "elsewhere; a label map must lie on the grid of its scan."
        )
    return turned_to_ras(Image(class_indices(label.array, label_values), scan.affine))[0]


def _fragment(
    cases: Sequence[ViewerCase],
    encoded: Sequence[_Encoded],
    classes: Sequence[str],
    colours: Sequence[str],
    *,
    left_out: int,
) -> str:
    data = {
        "classes": list(classes[1:]),
        "colours": list(colours),
        "unknown": UNKNOWN,
        "cases": [one.facts for one in encoded],
    }
    volumes = [
        f'<script type="text/plain" id="tsv-{number}-{name}">{text}</script>'
        for number, one in enumerate(encoded)
        for name, text in one.volumes.items()
    ]
    template = string.Template((_FOLDER / "fragment.html").read_text(encoding="utf-8"))
    return template.substitute(
        css=(_FOLDER / "viewer.css").read_text(encoding="utf-8"),
        js=(_FOLDER / "viewer.js").read_text(encoding="utf-8"),
        niivue=packed((_FOLDER / "niivue.umd.js").read_bytes()),
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),  # no name may end the script it stands in
        volumes="\n".join(volumes),
        options=_options(cases),
        note=_note(encoded, left_out),
    )


def _options(cases: Sequence[ViewerCase]) -> str:
    """The worst of each group comes first."""
    parts = []
    for group, title in _GROUPS.items():
        members = [(number, case) for number, case in enumerate(cases) if case.group == group]
        options = "".join(
            f'<option value="{number}">{html.escape(case.case)}{_score(case.score)}</option>'
            for number, case in members
        )
        if members:
            parts.append(f'<optgroup label="{title}">{options}</optgroup>')
    return "".join(parts)


def _score(score: float | None) -> str:
    return "" if score is None or math.isnan(score) else f" · Dice {score:.3f}"


def _note(encoded: Sequence[_Encoded], left_out: int) -> str:
    coarser = sum(one.facts["native"] != one.facts["shown"] for one in encoded)
    parts = []
    if coarser:
        parts.append(
            "To keep the page small, scans are shown coarser than they are; every class keeps its share of the volume and "
            "no class is lost. Scores and volumes are those of the full scans."
        )
    if left_out:
        parts.append(
            f"{left_out} more {'case is' if left_out == 1 else 'cases are'} not shown here, to keep the page small: these "
            "are the worst, the best and some in between."
        )
    return " ".join(parts)
