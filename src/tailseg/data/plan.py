"""From the fingerprint of a folder to a recipe for it: every choice with its reason.

Nothing here touches a file, a device or a network: what they are enters as Machine, Menu and costs. A recipe is chosen so
that its training fits the memory and the hours, at the finest resolution whose patches still show enough of a scan.
"""

from __future__ import annotations

import hashlib
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from tailseg.data.fingerprint import Channel, Fingerprint, Orientation
from tailseg.data.geometry import Spacing
from tailseg.data.image import Shape
from tailseg.data.sides import sided_pairs
from tailseg.data.splits import Split

Dims = Literal[2, 3]

STRONG = 10.0  # imbalance ratio from which the rare classes need more than equal treatment
THICK = 3.0  # ratio of the spacings from which planes count as thick
ENOUGH_STEPS = (3000, 1000, 300)  # a recipe is sought that has time for so many, then for fewer
MOST_STEPS = 30_000  # the longest of the published runs
FEWEST_STEPS = 100
COVERED: Mapping[Dims, float] = {2: 0.5, 3: 0.1}  # share of a median scan (slice) that a patch should show
LARGEST_PATCH = 128**3  # voxels
SMALLEST_CLASS = 27.0  # voxels, 3 x 3 x 3, that coarsening leaves the rarest class in a median case
COARSER = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)
TRAINING_SHARE = 0.85  # of the hours; the rest is for preparing, validation and checkpoints
VALIDATION_SHARE = 0.1  # of the time of the training steps
MEMORY_SHARE = 0.8  # of what is free
BACKWARD = 1.3  # memory of a step relative to what autograd keeps of the forward pass
GB = 1e9
GPU_BASE, CPU_BASE = 1.5 * GB, 0.6 * GB  # the process without a network
FEW_CASES, FOLDS, VAL_SHARE = 10, 5, 0.2


class PlanError(ValueError):
    """Nothing that fits can be planned; the text names what is short, and what to lower."""


@dataclass(frozen=True)
class Machine:
    """device: for train.device. name: in words. memory: free bytes where the networks compute. ram, disk: free bytes.
    load: processes that want the cores at the moment."""

    device: str
    name: str
    is_gpu: bool
    memory: float
    ram: float
    disk: float
    cores: int
    bf16: bool
    load: float = 0.0


class NetworkCost(NamedTuple):
    """Of one voxel of one patch in one network. seconds: forward and backward. kept: values that autograd keeps until the
    backward pass. parameters: of the whole network."""

    seconds: float
    kept: float
    parameters: int


@dataclass(frozen=True)
class MethodChoice:
    """cost: time of a step with as many unlabelled as labelled patches, to one of labelled patches alone. networks: that
    learn; each keeps a forward pass in memory. teachers: networks that only follow."""

    name: str
    cost: float
    networks: int = 1
    teachers: int = 0
    why: str = ""


@dataclass(frozen=True)
class NetworkChoice:
    """divisor: of the sides of a patch. widths: to try, best first. batches: [labelled, unlabelled] to try, best first."""

    name: str
    divisor: int
    widths: Sequence[int]
    batches: Sequence[tuple[int, int]]
    lr: float
    why: str


@dataclass(frozen=True)
class Menu:
    """What to choose from. alone: the method without unlabelled cases. accepts: whether a method can train on so many
    labelled and unlabelled patches of this size."""

    alone: MethodChoice
    strong: MethodChoice
    mild: MethodChoice
    networks: Mapping[Dims, NetworkChoice]
    costs: Callable[[Dims, int], NetworkCost]
    accepts: Callable[[MethodChoice, tuple[int, int], tuple[int, ...]], bool] = lambda method, batch, patch: True


class Choice(NamedTuple):
    """key: as in `data.patch_size`. reason: why this value."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Estimates:
    """seconds_per_step, training, validation (all rounds), preparing: seconds. memory: bytes of a step on the device. ram:
    bytes of the largest moment. store: bytes on disk."""

    seconds_per_step: float
    steps: int
    training: float
    validation: float
    preparing: float
    memory: float
    ram: float
    store: float

    @property
    def total(self) -> float:
        return self.preparing + self.training + self.validation


@dataclass(frozen=True)
class Plan:
    """choices: in the order of the recipe. notes: what a person should know before it is run."""

    choices: tuple[Choice, ...]
    estimates: Estimates
    notes: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> Any:
        return next(choice.value for choice in self.choices if choice.key == key)

    def to_tree(self) -> dict[str, Any]:
        """What load_recipe takes."""
        tree: dict[str, Any] = {}
        for choice in self.choices:
            *path, last = choice.key.split(".")
            branch = tree
            for part in path:
                branch = branch.setdefault(part, {})
            branch[last] = choice.value
        return tree


# ---------------------------------------------------------------------------------------------------------- splits


def plan_splits(
    patients: Mapping[str, str], labelled: Sequence[str], test: Sequence[str], held: Mapping[str, frozenset[int]]
) -> tuple[list[Split], str]:
    """Splits of these cases, and how they came about. The first is the one to begin with.

    patients: of every case, labelled or not; all cases of a patient go to one side. test: labelled cases that are kept out.
    held: the foreground classes of every labelled case; validation sets leave every class to the labelled cases if they can.
    Few patients (under FEW_CASES) give up to FOLDS folds, in each of which some validate.
    """
    if unknown := [case for case in test if case not in labelled]:
        raise PlanError(
            f"--test names {', '.join(unknown)}, which are no labelled cases; a test case needs a label file."
        )
    sealed = {patients[case] for case in test}
    kept_out = [case for case in labelled if patients[case] in sealed]
    groups: dict[str, list[str]] = {}
    for case in sorted(labelled):
        if patients[case] not in sealed:
            groups.setdefault(patients[case], []).append(case)
    if not groups:
        raise PlanError("no labelled case is left to train on; name fewer --test cases.")
    order = _spread(groups, held)
    few = len(order) < FEW_CASES
    if len(order) == 1:
        only = "one labelled patient: there is nothing to validate on, so the last checkpoint is the one to use"
        return [_split("all", groups, [], patients, labelled, kept_out)], only
    if few:
        count = min(FOLDS, len(order))
        folds = [[order[i] for i in range(fold, len(order), count)] for fold in range(count)]
        how = (
            f"{len(order)} labelled patients are few: {count} folds, in each of which others validate; train fold0, and "
            f"data.split=fold1 to fold{count - 1} to see how much chance there is"
        )
        return [_split(f"fold{i}", groups, fold, patients, labelled, kept_out) for i, fold in enumerate(folds)], how
    chosen = order[: max(2, round(VAL_SHARE * len(order)))]
    how = f"{len(chosen)} of {len(order)} labelled patients validate, drawn so that every class is on both sides if it can be"
    return [_split("planned", groups, chosen, patients, labelled, kept_out)], how


def _spread(groups: Mapping[str, Sequence[str]], held: Mapping[str, frozenset[int]]) -> list[str]:
    """Patients, those with the most common classes first: who alone has a rare class is the last to validate."""
    classes = {patient: frozenset().union(*(held[case] for case in cases)) for patient, cases in groups.items()}
    holders = {
        label: sum(label in found for found in classes.values()) for label in frozenset().union(*classes.values())
    }
    scarce = {patient: sum(holders[label] == 1 for label in found) for patient, found in classes.items()}
    # an order that follows from the names alone, but not the order of the names, which is often that of the scanner
    return sorted(groups, key=lambda patient: (scarce[patient], _shuffled(patient)))


def likely_patients(cases: Sequence[str]) -> list[str]:
    """Two cases whose names differ in a trailing number alone, such as patient001_frame01 and patient001_frame02, where that
    holds for most of the cases, but not for all alike (case_001 to case_030); else nothing."""
    groups: dict[str, list[str]] = {}
    for case in cases:
        if stem := re.fullmatch(r"(.*\d.*?)[_-]+[A-Za-z]*\d+", case):
            groups.setdefault(stem[1], []).append(case)
    several = [group for group in groups.values() if len(group) > 1]
    if len(groups) < 2 or 2 * sum(map(len, several)) < len(cases):
        return []
    return sorted(several[0])[:2]


def _shuffled(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _split(
    name: str,
    groups: Mapping[str, Sequence[str]],
    validating: Sequence[str],
    patients: Mapping[str, str],
    labelled: Sequence[str],
    test: Sequence[str],
) -> Split:
    apart = {*validating, *(patients[case] for case in test)}
    return Split(
        name,
        labelled=tuple(case for patient, cases in groups.items() if patient not in apart for case in cases),
        # other scans of a patient who validates would tell of him
        unlabelled=tuple(
            case for case in sorted(patients) if case not in set(labelled) and patients[case] not in apart
        ),
        val=tuple(case for patient in sorted(validating) for case in groups[patient]),
        test=tuple(sorted(test)),
    )


# ----------------------------------------------------------------------------------------------------- preparation


def choose_dims(fingerprint: Fingerprint, orientation: Orientation, divisor: int) -> tuple[Dims, str]:
    """2 or 3, and why."""
    shapes = [shape for shape, _ in fingerprint.shapes(orientation)]
    planes = statistics.median(shape[0] for shape in shapes)
    d, h, w = fingerprint.median_spacing(orientation)
    ratio = d / min(h, w)
    if planes == 1:
        return 2, "one plane each: 2D"
    if planes < divisor:
        return 2, f"{planes:g} planes are fewer than the {divisor} that a 3D network halves four times: 2D, on slices"
    if ratio >= THICK and planes < 2 * divisor:
        return (
            2,
            f"{planes:g} planes, {ratio:.1f} times as thick as their voxels are wide, tell little of their neighbours: 2D",
        )
    return 3, f"{planes:g} planes at {ratio:.1f} times the spacing within them hold context along every axis: 3D"


def choose_orientation(fingerprint: Fingerprint) -> tuple[Orientation, str]:
    """canonical, unless the slices would then not be cut along the axis they were taken along."""
    d, h, w = (statistics.median(grid.shape[axis] for grid in fingerprint.grids) for axis in range(3))
    spacing = fingerprint.median_spacing("file")
    flat = d * 2 <= min(h, w) or spacing[0] >= THICK * min(spacing[1:])
    stored = sum(grid.slice_axis == 0 for grid in fingerprint.grids)
    turned = sum(grid.slice_axis == grid.axes[0] for grid in fingerprint.grids)
    if flat and turned < stored:
        return "file", "slices lie oblique or sideways in the patient: axes as stored keep them whole"
    return "canonical", "all scans turned to right, anterior, superior, however they were stored"


def choose_intensity(channels: Sequence[Channel]) -> tuple[dict[str, Any], str]:
    """The one normalisation for all channels, and why."""
    named = [
        bool(set(re.findall(r"[a-z]+", channel.name.lower())) & {"ct", "cbct", "hounsfield", "hu"})
        for channel in channels
    ]
    like_hu = [channel.low <= -500 and 200 <= channel.high <= 35_000 for channel in channels]
    if all(a or b for a, b in zip(named, like_hu, strict=True)):
        low, high = min(c.inside[0] for c in channels), max(c.inside[2] for c in channels)
        low, high = 5 * math.floor(low / 5), 5 * math.ceil(high / 5)
        if low < high:
            told = "CT by its name" if all(named) else "CT by its range, down to air"
            why = f"{told}: Hounsfield units mean the same in every scan; the window is what 99 % of the classes' voxels span"
            return {"name": "window", "low": low, "high": high, "rescale": "window"}, why
    if all(channel.zeros >= 0.25 for channel in channels):
        empty = min(channel.zeros for channel in channels)
        why = f"{empty:.0%} of the voxels are exactly 0, outside of what was scanned: z-score of the others"
        return {"name": "zscore", "nonzero": True}, why
    tails = [(c.high - c.overall[1]) / max(c.overall[2] - c.overall[1], 1e-9) for c in channels]
    if max(tails) > 2:
        why = f"no fixed scale, and extremes {max(tails):.1f} times beyond the 99.5 % percentile: clipped there, then z-score"
        return {"name": "percentiles", "low": 0.5, "high": 99.5}, why
    return {"name": "zscore"}, "intensities have no fixed scale: each scan to mean 0 and variance 1"


# ------------------------------------------------------------------------------------------------------ the search


@dataclass(frozen=True)
class _Candidate:
    """spacing: target (D, H, W) mm, None where an axis stays. patch: 2 or 3 sides. median: prepared shape of a median case."""

    dims: Dims
    factor: float
    spacing: tuple[float | None, ...] | None
    median: Shape
    patch: tuple[int, ...]
    batch: tuple[int, int]
    width: int
    seconds: float
    memory: float

    @property
    def coverage(self) -> float:
        sides = self.median[-self.dims :]
        return math.prod(min(side, size) / size for side, size in zip(self.patch, sides, strict=True))


@dataclass(frozen=True)
class _Search:
    """What stays the same for all candidates."""

    fingerprint: Fingerprint
    orientation: Orientation
    dims: Dims
    method: MethodChoice
    network: NetworkChoice
    menu: Menu
    machine: Machine
    hours: float
    with_unlabelled: bool
    shapes: list[tuple[Shape, Spacing]] = field(default_factory=list)

    def best(self) -> tuple[_Candidate, int]:
        """The candidate, and for how many steps it was sought. Raises PlanError when even the smallest does not fit."""
        for steps in ENOUGH_STEPS:
            found: list[_Candidate] = []
            for candidate in self._fitting(steps):
                if candidate.coverage >= COVERED[self.dims]:
                    return candidate, steps
                found.append(candidate)
            if found and max(each.coverage for each in found) >= COVERED[self.dims] / 4:
                return max(found, key=lambda each: (round(each.coverage, 2), each.width)), steps
        return self._smallest(), 0

    def _fitting(self, steps: int) -> Iterator[_Candidate]:
        """With time for so many steps, finest spacing first, then widest network, then largest batch."""
        limit = TRAINING_SHARE * self.hours * 3600 / steps
        for factor in self._factors():
            spacing, median = self._grid(factor)
            for width in self.network.widths:
                for batch in self.batches:
                    patch = self._patch(median, width, batch, limit)
                    if patch and self.menu.accepts(self.method, batch, patch):
                        yield self._candidate(factor, spacing, median, patch, batch, width)

    @property
    def batches(self) -> list[tuple[int, int]]:
        if self.with_unlabelled:
            return list(self.network.batches)
        return [(labelled + unlabelled, 0) for labelled, unlabelled in self.network.batches]

    def _factors(self) -> list[float]:
        """Ways to coarsen that leave the rarest class some voxels."""
        rarest = min((voxels for voxels in self.fingerprint.median_voxels[1:] if voxels), default=math.inf)
        kept: list[float] = []
        base = self.fingerprint.median_spacing(self.orientation)
        for factor in COARSER:
            target = self._target(factor, base)
            if factor == 1 or rarest * math.prod(base) / math.prod(target) >= SMALLEST_CLASS:
                kept.append(factor)
        return kept

    def _target(self, factor: float, base: Spacing) -> Spacing:
        """The finest axes become coarser first, until all are alike."""
        planes = base if self.dims == 3 else base[1:]
        d, h, w = (max(value, factor * min(planes)) for value in base)
        return (d, h, w) if self.dims == 3 else (base[0], h, w)

    def _grid(self, factor: float) -> tuple[tuple[float | None, ...] | None, Shape]:
        """The target spacing, and the prepared shape of a median case."""
        base = self.fingerprint.median_spacing(self.orientation)
        target = tuple(_rounded(value) for value in self._target(factor, base))
        axes = range(3) if self.dims == 3 else range(1, 3)
        same = all(abs(grid[axis] / target[axis] - 1) < 0.02 for _, grid in self.shapes for axis in axes)
        spacing = None if same else target if self.dims == 3 else (None, *target[1:])
        prepared = [prepared_shape(shape, grid, spacing) for shape, grid in self.shapes]
        d, h, w = (max(1, round(statistics.median(shape[axis] for shape in prepared))) for axis in range(3))
        return spacing, (d, h, w)

    def _patch(self, median: Shape, width: int, batch: tuple[int, int], limit: float) -> tuple[int, ...] | None:
        """The largest that fits the median case, the memory and the seconds of a step; None if none that is of use does."""
        divisor = self.network.divisor
        sides = [max(size // divisor, 1) * divisor for size in median[-self.dims :]]
        least = min(math.prod(sides), 32**3 if self.dims == 3 else 64**2)
        while math.prod(sides) > LARGEST_PATCH or not self._fits(tuple(sides), width, batch, limit):
            longest = max(range(self.dims), key=lambda axis: (sides[axis] > divisor, sides[axis], axis))
            if sides[longest] == divisor:
                return None
            sides[longest] -= divisor
            if math.prod(sides) < least:
                return None
        return tuple(sides)

    def _fits(self, patch: tuple[int, ...], width: int, batch: tuple[int, int], limit: float) -> bool:
        return (
            self.seconds(patch, width, batch) <= limit
            and self.memory(patch, width, batch) <= MEMORY_SHARE * self.machine.memory
        )

    def seconds(self, patch: tuple[int, ...], width: int, batch: tuple[int, int]) -> float:
        """Of a step: labelled patches through one network, times what the method costs beside that."""
        labelled = batch[0] if not batch[1] else sum(batch) / 2
        return self.menu.costs(self.dims, width).seconds * math.prod(patch) * labelled * self.method.cost

    def memory(self, patch: tuple[int, ...], width: int, batch: tuple[int, int]) -> float:
        """Peak of a step in bytes: what autograd keeps, class scores and their gradients in float32, weights and momentum."""
        cost, voxels = self.menu.costs(self.dims, width), math.prod(patch) * sum(batch)
        size = 2 if self.machine.bf16 else 4
        scores = 4 * 4 * len(self.fingerprint.classes)
        networks = self.method.networks
        kept = networks * voxels * (BACKWARD * size * cost.kept + scores)
        weights = 4 * cost.parameters * (3 * networks + self.method.teachers)
        return kept + weights + (GPU_BASE if self.machine.is_gpu else CPU_BASE)

    def _candidate(
        self,
        factor: float,
        spacing: tuple[float | None, ...] | None,
        median: Shape,
        patch: tuple[int, ...],
        batch: tuple[int, int],
        width: int,
    ) -> _Candidate:
        seconds, memory = self.seconds(patch, width, batch), self.memory(patch, width, batch)
        return _Candidate(self.dims, factor, spacing, median, patch, batch, width, seconds, memory)

    def _smallest(self) -> _Candidate:
        """The last resort, or why there is none."""
        factor, width, batch = self._factors()[-1], min(self.network.widths), min(self.batches, key=sum)
        spacing, median = self._grid(factor)
        patch = tuple(
            min(max(size // self.network.divisor, 1), 2) * self.network.divisor for size in median[-self.dims :]
        )
        smallest = self._candidate(factor, spacing, median, patch, batch, width)
        if smallest.memory > MEMORY_SHARE * self.machine.memory:
            raise PlanError(
                f"Even a patch of {_sides(patch)} in a network of width {width} takes {smallest.memory / GB:.1f} GB a step, "
                f"but {self.machine.name} has {self.machine.memory / GB:.1f} GB free, of which {MEMORY_SHARE:.0%} are "
                "planned with; free some, or plan for another --device."
            )
        needed = smallest.seconds * FEWEST_STEPS / TRAINING_SHARE / 3600
        if needed > self.hours:
            raise PlanError(
                f"--hours {self.hours:.2g} is too short: on {self.machine.name} even the smallest step, with patches of "
                f"{_sides(patch)} in a network of width {width}, takes {smallest.seconds:.1f} s, and {FEWEST_STEPS} of them "
                f"{needed:.2g} hours; give more --hours, a cheaper --method, or another --device."
            )
        return smallest


def prepared_shape(shape: Shape, spacing: Spacing, target: Sequence[float | None] | None) -> Shape:
    """As tailseg.data.preparation resamples."""
    if target is None:
        return shape
    d, h, w = (
        size if new is None else max(1, round(size * old / new))
        for size, old, new in zip(shape, spacing, target, strict=True)
    )
    return d, h, w


def _rounded(value: float) -> float:
    """Three digits are enough for a spacing."""
    return float(f"{value:.3g}")


def _sides(patch: Sequence[float]) -> str:
    return " x ".join(f"{side:g}" for side in patch)


# -------------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Places:
    """root: the data set. store: folder of the prepared arrays. split_file: None for the data set's own."""

    root: str
    store: str
    split_file: str | None = None


def make_plan(
    fingerprint: Fingerprint,
    split: Split,
    split_why: str,
    places: Places,
    machine: Machine,
    menu: Menu,
    *,
    hours: float,
    workers: int = 2,
    method: MethodChoice | None = None,
    patients_named: bool = False,
) -> Plan:
    """method: the one a person named; else one of the menu. patients_named: whether the data set says whose scans are whose.

    Raises PlanError when nothing fits.
    """
    orientation, orientation_why = choose_orientation(fingerprint)
    dims, dims_why = choose_dims(fingerprint, orientation, menu.networks[3].divisor)
    network = menu.networks[dims]
    method, method_why = choose_method(fingerprint, bool(split.unlabelled), menu, method)
    search = _Search(
        fingerprint,
        orientation,
        dims,
        method,
        network,
        menu,
        machine,
        hours,
        bool(split.unlabelled) and method.name != menu.alone.name,
        fingerprint.shapes(orientation),
    )
    found, sought = search.best()
    steps = int(min(TRAINING_SHARE * hours * 3600 / found.seconds, MOST_STEPS))
    epochs = max(1, min(100, steps // 10))
    per_epoch = max(1, steps // epochs)
    estimates, rounds = _estimate(search, found, split, epochs, per_epoch, workers)
    _check_resources(estimates, machine, workers)
    intensity, intensity_why = choose_intensity(fingerprint.channels)
    patch_why, spacing_why = _patch_reason(search, found, sought), _spacing_reason(search, found)
    padded = [
        shape
        for shape in _prepared(search, found)
        if any(a < b for a, b in zip(shape[-dims:], found.patch, strict=True))
    ]
    pairs = sided_pairs(fingerprint.classes)
    foreground, foreground_why = _foreground(fingerprint)
    prepare: list[Choice] = [
        Choice("data.prepare.orientation", orientation, orientation_why),
        Choice("data.prepare.spacing", None if found.spacing is None else list(found.spacing), spacing_why),
        Choice("data.prepare.intensity", intensity, intensity_why),
    ]
    split_file = (
        [] if places.split_file is None else [Choice("data.split_file", places.split_file, "made with this recipe")]
    )
    choices = [
        Choice("data.root", places.root, "read, never written to"),
        Choice("data.split", split.name, f"{split_why} (sha256 {split.digest[:12]})"),
        *split_file,
        Choice("data.store", places.store, f"the prepared scans go here: about {estimates.store / GB:.2g} GB"),
        *prepare,
        Choice("data.patch_size", list(found.patch), f"{dims_why}. {patch_why}"),
        Choice("data.batch", list(found.batch), _batch_reason(found, search)),
        Choice("data.pad", bool(padded), _pad_reason(padded, search)),
        Choice("data.foreground", foreground, foreground_why),
        Choice("data.augment", _augment(dims, bool(pairs)), _augment_reason(pairs)),
        Choice("data.workers", max(1, min(4, machine.cores)), "threads that cut patches; a cut costs milliseconds"),
        Choice("network", {"name": network.name, "width": found.width}, _width_reason(network, found, machine)),
        Choice("method.name", method.name, method_why),
        Choice("train.device", machine.device, f"planned for {machine.name}"),
        Choice("train.precision", "auto", _precision_reason(machine)),
        Choice(
            "train.epochs",
            epochs,
            "an epoch is a beat of the learning rate and of validation, not a pass over the scans",
        ),
        Choice("train.steps_per_epoch", per_epoch, _steps_reason(estimates, hours)),
        Choice("train.lr", network.lr, f"what the published runs with this network start from ({network.name}, SGD)"),
        Choice(
            "train.validate_every",
            max(1, epochs // max(rounds, 1)),
            _validation_reason(estimates, rounds, bool(split.val)),
        ),
        Choice("train.checkpoint_every", max(1, epochs // 20), "a stopped run goes on from here (--resume)"),
        Choice("evaluate.protocols", ["native"], "millimetres on each scan's own grid; a missed organ counts"),
        Choice("seed", 0, "another seed shows how much of a difference is chance"),
    ]
    return Plan(
        tuple(choices),
        estimates,
        tuple(_notes(fingerprint, split, machine, guess_patients=places.split_file is not None and not patients_named)),
    )


def choose_method(
    fingerprint: Fingerprint, with_unlabelled: bool, menu: Menu, named: MethodChoice | None
) -> tuple[MethodChoice, str]:
    names, ratio = fingerprint.by_size, fingerprint.imbalance
    if len(names) > 1:
        most, least = fingerprint.classes[names[0]], fingerprint.classes[names[-1]]
        told = f"{most} has {ratio:.3g} times the voxels of {least}"
    else:
        told = "there is one foreground class"
    if named is not None:
        return named, f"named with --method; {told}"
    if not with_unlabelled:
        return menu.alone, f"there are no unlabelled scans to learn from; {menu.alone.why}"
    if ratio >= STRONG:
        return menu.strong, f"{told}: {menu.strong.why}"
    return menu.mild, f"{told}: {menu.mild.why}"


def _foreground(fingerprint: Fingerprint) -> tuple[float, str]:
    share, ratio = fingerprint.foreground_share, fingerprint.imbalance
    rarest = min((s for s in fingerprint.shares[1:] if s), default=0.0)
    told = f"the classes fill {share:.2%} of the voxels, the rarest {rarest:.3%}"
    if ratio >= STRONG or rarest < 1e-3:
        return 0.5, f"{told}: every second labelled patch is cut around a class, each class as often"
    return 0.33, f"{told}: every third labelled patch is cut around a class, each class as often"


def _augment(dims: Dims, sided: bool) -> dict[str, Any]:
    augment: dict[str, Any] = {"flip": [] if sided else ["h", "w"]}
    return {**augment, "rotate": 20} if dims == 2 else augment


def _augment_reason(pairs: Sequence[tuple[str, str]]) -> str:
    if pairs:
        left, right = pairs[0]
        return f"no mirroring: it would make {left} of {right} ({len(pairs)} such pairs by name)"
    return "no class has a side by its name, so a mirrored scan is as good a scan; empty the list if yours do"


def _spacing_reason(search: _Search, found: _Candidate) -> str:
    base = _sides([_rounded(value) for value in search.fingerprint.median_spacing(search.orientation)])
    shape = _sides(found.median)
    planes = "" if search.dims == 3 else "; slices stay as they were taken"
    if found.spacing is None:
        return f"all scans have {base} mm (D, H, W) already: nothing is resampled; a median scan is {shape} voxels"
    if found.factor == 1:
        return f"the median of the labelled scans, {base} mm (D, H, W): a median scan becomes {shape} voxels{planes}"
    return (
        f"coarser than the median {base} mm (D, H, W), finest axes first, so that a patch that fits shows "
        f"{found.coverage:.0%} of a median scan, then {shape} voxels{planes}"
    )


def _patch_reason(search: _Search, found: _Candidate, sought: int) -> str:
    limit = "the whole of a median scan" if found.coverage >= 0.95 else f"{found.coverage:.0%} of a median scan"
    budget = f"for {sought} steps within the hours" if sought else "though there is time for few steps only"
    step = f"{found.memory / GB:.1f} GB and {found.seconds:.2g} s a step"
    return f"Sides are multiples of {search.network.divisor}; they show {limit} at {step}, {budget}"


def _batch_reason(found: _Candidate, search: _Search) -> str:
    if found.batch[1]:
        return "labelled and unlabelled patches of a step, as many of each, as the published runs have"
    return f"labelled patches alone; {search.method.name} looks at no others"


def _pad_reason(padded: Sequence[Shape], search: _Search) -> str:
    if padded:
        return f"{len(padded)} of {len(search.shapes)} scans are smaller than a patch along some axis"
    return "every scan is larger than a patch"


def _width_reason(network: NetworkChoice, found: _Candidate, machine: Machine) -> str:
    if found.width == network.widths[0]:
        return f"{network.why}; width {found.width} is the usual one on {'a GPU' if machine.is_gpu else 'a CPU'}"
    return f"{network.why}; width {found.width}, since {network.widths[0]} does not fit the time or the memory"


def _precision_reason(machine: Machine) -> str:
    if machine.bf16:
        return f"bfloat16 where the device computes in it, as {machine.name} does: about half the memory"
    return f"float32 on {machine.name}, which has no bfloat16; on one that has, it is used"


def _steps_reason(estimates: Estimates, hours: float) -> str:
    if estimates.steps >= MOST_STEPS - 100:
        return f"{estimates.steps} steps in all, as the longest published runs; --hours {hours:g} would allow more"
    return f"{estimates.steps} steps in all, for --hours {hours:g} at about {estimates.seconds_per_step:.2g} s a step"


def _validation_reason(estimates: Estimates, rounds: int, has_val: bool) -> str:
    if not has_val:
        return "there is nothing to validate on"
    return f"epochs; {rounds} validations take about {duration(estimates.validation)}"


def _prepared(search: _Search, found: _Candidate) -> list[Shape]:
    return [prepared_shape(shape, grid, found.spacing) for shape, grid in search.shapes]


def _estimate(
    search: _Search, found: _Candidate, split: Split, epochs: int, per_epoch: int, workers: int
) -> tuple[Estimates, int]:
    """And how often to validate, so that it takes VALIDATION_SHARE of the training or less."""
    fingerprint, channels = search.fingerprint, len(search.fingerprint.channels)
    shapes = dict(zip((grid.case for grid in fingerprint.all_grids), _prepared(search, found), strict=True))
    labelled = {*split.labelled, *split.val}
    store = sum(math.prod(shapes[case]) * (2 * channels + (case in labelled)) for case in split.training)
    per_voxel = search.menu.costs(search.dims, found.width).seconds / 3 * search.method.networks
    patch = math.prod(found.patch)
    seen = 0.0
    for case in split.val:
        windows = [
            math.ceil(max(size - side, 0) / (side / 2)) + 1
            for size, side in zip(shapes[case][-search.dims :], found.patch, strict=True)
        ]
        seen += math.prod(windows) * patch * (1 if search.dims == 3 else shapes[case][0])
    scan = max(math.prod(shape) for shape, _ in search.shapes)
    prepared = max(math.prod(shape) for shape in shapes.values())
    preparing = workers * (0.3 * GB + 12 * channels * scan)
    scoring = 4 * len(fingerprint.classes) * prepared
    training = (CPU_BASE if search.machine.is_gpu else found.memory) + scoring
    training_seconds, once = epochs * per_epoch * found.seconds, seen * per_voxel
    rounds = max(1, min(20, epochs, int(VALIDATION_SHARE * training_seconds / once))) if once else 1
    estimates = Estimates(
        seconds_per_step=found.seconds,
        steps=epochs * per_epoch,
        training=training_seconds,
        validation=rounds * once,
        preparing=1.5 * fingerprint.seconds * len(split.training),
        memory=found.memory,
        ram=max(preparing, training),
        store=store,
    )
    return estimates, rounds


def _check_resources(estimates: Estimates, machine: Machine, workers: int) -> None:
    """Raises PlanError where disk or RAM are short."""
    if estimates.store > machine.disk:
        raise PlanError(
            f"The prepared scans take {estimates.store / GB:.1f} GB, but the disk of the store has {machine.disk / GB:.1f} "
            "GB free; free some, or name a folder on another disk with --store."
        )
    if estimates.ram > machine.ram:
        raise PlanError(
            f"Preparing and training take up to {estimates.ram / GB:.1f} GB of RAM with {workers} workers, but "
            f"{machine.ram / GB:.1f} GB are free; free some, or use fewer --workers."
        )


def _notes(fingerprint: Fingerprint, split: Split, machine: Machine, *, guess_patients: bool) -> list[str]:
    notes = []
    if fingerprint.never_seen:
        notes.append(f"No labelled scan holds {', '.join(fingerprint.never_seen)}: nothing can be learnt of them.")
    scarce = [name for name, cases in zip(fingerprint.classes, fingerprint.class_cases, strict=True) if 0 < cases < 3]
    if scarce:
        notes.append(f"Fewer than 3 labelled scans hold {', '.join(scarce)}: their scores will say little.")
    if len(split.val) == 1:
        notes.append("One scan validates: the best checkpoint is chosen by it alone, and its score is an anecdote.")
    if guess_patients and (shared := likely_patients([grid.case for grid in fingerprint.all_grids])):
        notes.append(
            f"{' and '.join(shared)} may be of one patient, by their names. If so, say it in cases.csv (case, patient), so "
            "that no patient both trains and validates."
        )
    if machine.load > 1.2 * machine.cores and not machine.is_gpu:
        notes.append(
            f"{machine.load:.0f} processes share {machine.cores} cores now. Times are those of an idle machine: beside such "
            f"work it may take {(machine.load + machine.cores) / machine.cores:.0f} times as long."
        )
    return notes


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
