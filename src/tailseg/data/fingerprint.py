"""What a folder of scans is like: grids, intensities, and how much there is of every class.

Labelled cases are read one at a time and leave counts and a few thousand voxels; of the others only the header is read.
"""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tailseg.core import IGNORE
from tailseg.data.geometry import Geometry, Spacing
from tailseg.data.image import ImageError, Shape, read_geometry
from tailseg.data.raw import Case, DataError, RawDataset, load_case
from tailseg.data.workers import WorkerKilled, work_through

SAMPLES = 10_000  # voxels of a case and channel, overall and inside the classes; fewer each where cases are many
ALL_SAMPLES = 4_000_000  # values kept together: 16 MB of float32
PERCENTILES = (0.5, 50.0, 99.5)

Progress = Callable[[int, int, str], None]
Orientation = Literal["canonical", "file"]


@dataclass(frozen=True)
class Grid:
    """shape, spacing: (D, H, W) as stored. axes: the stored axis of each axis of the canonical orientation."""

    case: str
    shape: Shape
    spacing: Spacing
    axes: Shape

    def turned(self, orientation: Orientation) -> tuple[Shape, Spacing]:
        """Shape and spacing (D, H, W) as the preparation sees them."""
        a, b, c = self.axes if orientation == "canonical" else (0, 1, 2)
        shape, spacing = self.shape, self.spacing
        return (shape[a], shape[b], shape[c]), (spacing[a], spacing[b], spacing[c])

    @property
    def slice_axis(self) -> int:
        """The stored axis along which there are few and thick planes."""
        return max(range(3), key=lambda axis: self.spacing[axis] / self.shape[axis])


@dataclass(frozen=True)
class Channel:
    """overall, inside: PERCENTILES of all voxels and of those within a foreground class. low, high: extremes of the data
    set. zeros: share of voxels that are exactly 0. inside_mean, inside_std: within the classes."""

    name: str
    overall: tuple[float, ...]
    inside: tuple[float, ...]
    low: float
    high: float
    zeros: float
    inside_mean: float
    inside_std: float


@dataclass(frozen=True)
class Fingerprint:
    """grids: of the labelled cases. others: of cases of which only the header was read. case_voxels: (K,) of each labelled
    case. ignored_voxels: that nobody annotated. seconds: of a processor, to read a labelled case."""

    classes: tuple[str, ...]
    grids: tuple[Grid, ...]
    others: tuple[Grid, ...]
    channels: tuple[Channel, ...]
    case_voxels: tuple[tuple[int, ...], ...]
    ignored_voxels: int
    seconds: float

    @property
    def all_grids(self) -> tuple[Grid, ...]:
        return self.grids + self.others

    @property
    def class_voxels(self) -> tuple[int, ...]:
        """(K,) over the labelled cases."""
        return tuple(map(sum, zip(*self.case_voxels, strict=True)))

    @property
    def class_cases(self) -> tuple[int, ...]:
        """(K,) labelled cases that hold the class."""
        return tuple(sum(count > 0 for count in counts) for counts in zip(*self.case_voxels, strict=True))

    @property
    def median_voxels(self) -> tuple[float, ...]:
        """(K,) in a case that holds the class; 0 for a class that none holds."""
        held = ([count for count in counts if count] for counts in zip(*self.case_voxels, strict=True))
        return tuple(float(statistics.median(counts)) if counts else 0.0 for counts in held)

    @property
    def held(self) -> dict[str, frozenset[int]]:
        """The foreground classes of each labelled case."""
        return {
            grid.case: frozenset(label for label, count in enumerate(counts) if label and count)
            for grid, counts in zip(self.grids, self.case_voxels, strict=True)
        }

    @property
    def shares(self) -> tuple[float, ...]:
        """(K,) of the annotated voxels."""
        total = max(sum(self.class_voxels), 1)
        return tuple(count / total for count in self.class_voxels)

    @property
    def foreground_share(self) -> float:
        return sum(self.shares[1:])

    @property
    def by_size(self) -> list[int]:
        """The foreground classes that were seen, largest first."""
        seen = [label for label in range(1, len(self.classes)) if self.class_voxels[label]]
        return sorted(seen, key=lambda label: -self.class_voxels[label])

    @property
    def imbalance(self) -> float:
        """Voxels of the largest foreground class to those of the smallest that occurs; 1 for a single class."""
        return self.class_voxels[self.by_size[0]] / self.class_voxels[self.by_size[-1]] if self.by_size else 1.0

    @property
    def never_seen(self) -> list[str]:
        return [self.classes[label] for label in range(1, len(self.classes)) if not self.class_voxels[label]]

    def median_spacing(self, orientation: Orientation) -> Spacing:
        d, h, w = (statistics.median(grid.turned(orientation)[1][axis] for grid in self.grids) for axis in range(3))
        return d, h, w

    def shapes(self, orientation: Orientation) -> list[tuple[Shape, Spacing]]:
        return [grid.turned(orientation) for grid in self.all_grids]


def take_fingerprint(
    dataset: RawDataset,
    labelled: Collection[str],
    others: Collection[str] = (),
    *,
    workers: int = 1,
    progress: Progress = lambda done, total, case: None,
) -> Fingerprint:
    """Of these cases of the data set. workers: processes, each holding one scan at a time.

    Raises DataError listing all files that cannot be read.
    """
    cases = [dataset.cases[case] for case in sorted(labelled)]
    samples = max(min(SAMPLES, ALL_SAMPLES // (2 * len(dataset.channels) * max(len(cases), 1))), 100)
    jobs = [_Job(replace(dataset, cases={case.id: case}), samples) for case in cases]
    facts: dict[str, _Facts] = {}
    problems: list[str] = []
    for done, result in enumerate(_results(jobs, min(workers, len(jobs))), 1):
        if isinstance(result, str):
            problems.append(result)
        else:
            facts[result.grid.case] = result
        progress(done, len(jobs), "" if isinstance(result, str) else result.grid.case)
    headers: list[Grid] = []
    for case in sorted(others):
        try:
            headers.append(_grid(dataset.cases[case]))
        except ImageError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join([f"{len(problems)} problems:", *problems] if len(problems) > 1 else problems))
    if not facts:
        raise DataError(f"{dataset.root} has no labelled case to look at; put label files into labelsTr.")
    return _together(dataset, [facts[case] for case in sorted(facts)], headers)


@dataclass(frozen=True)
class _Job:
    """dataset: with one case alone, so that little is sent to a worker."""

    dataset: RawDataset
    samples: int


@dataclass(frozen=True)
class _Facts:
    """overall, inside: (C, n) float32 drawn voxels. extremes: (C, 2). zeros: (C,) share."""

    grid: Grid
    overall: np.ndarray
    inside: np.ndarray
    extremes: np.ndarray
    zeros: np.ndarray
    class_voxels: np.ndarray
    ignored: int
    seconds: float


def _grid(case: Case) -> Grid:
    shape, affine = read_geometry(case.images[0])
    stored = Geometry.whole(shape, affine, canonical=False)
    return Grid(case.id, stored.shape, stored.spacing, Geometry.whole(shape, affine, canonical=True).axes)


def _look(job: _Job) -> _Facts | str:
    """One labelled case, or what is wrong with it; in a worker."""
    (case,) = job.dataset.cases.values()
    start = time.process_time()
    try:
        image, label = load_case(case, job.dataset)
        grid = _grid(case)
    except ImageError as error:
        return str(error)
    except MemoryError:
        return f"{case.images[0]} does not fit the memory beside the other workers' scans; use fewer workers."
    assert label is not None, f"{case.id} has no label"
    counts = np.zeros(256, np.int64)
    for plane in label:  # bincount makes int64 of what it counts
        counts += np.bincount(plane.ravel(), minlength=256)
    rng = np.random.default_rng(zlib.crc32(case.id.encode()))  # the same voxels at every call
    voxels = image.array.reshape(len(image.array), -1)  # (C, N)
    anywhere = rng.integers(0, voxels.shape[1], job.samples)
    inside = np.flatnonzero((label.ravel() != 0) & (label.ravel() != IGNORE))
    if inside.size:
        inside = inside[rng.integers(0, inside.size, job.samples)]
    return _Facts(
        grid,
        voxels[:, anywhere],
        voxels[:, inside],
        np.stack([voxels.min(1), voxels.max(1)], 1),
        (voxels[:, anywhere] == 0).mean(1),
        counts[: len(job.dataset.classes)],
        int(counts[IGNORE]),
        time.process_time() - start,
    )


def _results(jobs: list[_Job], workers: int) -> Iterator[_Facts | str]:
    """As they finish."""
    try:
        with closing(work_through(_look, {next(iter(job.dataset.cases)): job for job in jobs}, workers)) as results:
            for _, result in results:
                yield result
    except WorkerKilled as killed:
        yield f"A worker was killed while it read one of {killed.cases}, {killed}"


def _together(dataset: RawDataset, facts: Sequence[_Facts], others: Iterable[Grid]) -> Fingerprint:
    overall = np.concatenate([each.overall for each in facts], 1)  # (C, n)
    inside = np.concatenate([each.inside for each in facts], 1)
    inside = inside if inside.shape[1] else overall
    extremes = np.stack([each.extremes for each in facts])  # (cases, C, 2)
    channels = tuple(
        Channel(
            name,
            tuple(np.percentile(overall[index], PERCENTILES).tolist()),
            tuple(np.percentile(inside[index], PERCENTILES).tolist()),
            float(extremes[:, index, 0].min()),
            float(extremes[:, index, 1].max()),
            float(np.mean([each.zeros[index] for each in facts])),
            float(inside[index].mean(dtype=np.float64)),
            float(inside[index].std(dtype=np.float64)),
        )
        for index, name in enumerate(dataset.channels)
    )
    return Fingerprint(
        classes=dataset.classes,
        grids=tuple(each.grid for each in facts),
        others=tuple(others),
        channels=channels,
        case_voxels=tuple(tuple(each.class_voxels.tolist()) for each in facts),
        ignored_voxels=sum(each.ignored for each in facts),
        seconds=statistics.median(each.seconds for each in facts),
    )
