"""All that is wrong with a raw folder, in one go, before anything is trained on it; and what it holds.

Every file is read once. The rules are those of data/problems.py: check_folder.py looks at names, check_case.py into the files
of one case, and this file at what only shows across cases: spacings, copies, classes, splits.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tailseg.data.cases import Case, RawDataset
from tailseg.data.check_case import CaseFacts, examine_case, relative
from tailseg.data.check_folder import find_cases
from tailseg.data.errors import DataError
from tailseg.data.problems import RULES, Problem, Severity
from tailseg.data.sides import sided_pairs
from tailseg.data.splits import SETS, read_split
from tailseg.data.workers import WorkerKilled, work_through
from tailseg.options import suggest

SPACING_FACTOR = 1.5
SPACING_DEVIATIONS = 5.0
SPACING_SHARE = 0.1
SPACING_FACTOR_ANYWAY = 4.0
"""A spacing is an outlier if along an axis it is more than the first factor, and more than so many robust standard deviations
(1.4826 times the median absolute deviation, of logarithms), away from the median, and at most this share of the scans is so:
of a mixture of 3 mm and 5 mm neither is. It is one anyway beyond the second factor."""
FEW_CASES = 3

Progress = Callable[[int, int, str], None]
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest over scans, axis by axis: (D, H, W) turned to superior, anterior, right."""

    low: Triple
    median: Triple
    high: Triple


@dataclass(frozen=True)
class ClassFacts:
    """cases: label files that hold it. share: of the labelled cases' voxels, without ignored ones."""

    name: str
    cases: int
    voxels: int
    share: float


@dataclass(frozen=True)
class DatasetFacts:
    """labelled, unlabelled: cases. size in voxels, spacing in mm. classes: the background first. rarest: the class of the
    smallest share that some label file holds."""

    name: str
    channels: tuple[str, ...]
    labelled: int
    unlabelled: int
    size: Spread | None
    spacing: Spread | None
    classes: tuple[ClassFacts, ...]
    rarest: str | None
    splits: tuple[str, ...]

    @property
    def cases(self) -> int:
        return self.labelled + self.unlabelled


@dataclass(frozen=True)
class CheckReport:
    """facts: None if no data set could be made of the folder. problems: errors first, in the order of RULES."""

    root: str
    facts: DatasetFacts | None
    problems: tuple[Problem, ...]

    def of(self, severity: Severity) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.severity == severity)

    @property
    def ok(self) -> bool:
        """Whether the data set can be trained on."""
        return not self.of("error")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "root": self.root,
            "ok": self.ok,
            "errors": len(self.of("error")),
            "warnings": len(self.of("warning")),
            "facts": asdict(self.facts) if self.facts else None,
            "problems": [problem.to_dict() for problem in self.problems],
        }


def check_dataset(root: Path, *, workers: int = 1, progress: Progress = lambda done, total, case: None) -> CheckReport:
    """Read everything in root, a folder or a table, once. workers: processes, each holding about one scan at a time; with 0
    or 1 the work is done here. Raises DataError only for a root that does not exist, and if a worker was killed.
    """
    if not root.exists():
        raise DataError(f"No data set at {root}: it does not exist.")
    dataset, problems = find_cases(root)
    if dataset is None:
        return CheckReport(str(root), None, tuple(problems))
    facts = _examine(dataset, workers, progress)
    splits, unread = _read_splits(dataset.root)
    copies = _copies(facts)
    incomplete = {problem.case for problem in problems}
    problems += [problem for each in facts for problem in each.problems]
    problems += [*_missing_labels(root, dataset), *_spacing_outliers(facts), *_duplicates(facts, copies)]
    problems += [*_classes(dataset, facts), *unread]
    for name in splits:
        problems += _check_split(name, splits[name], dataset, incomplete, facts, copies)
    problems += _sides(dataset)
    order = list(RULES)
    problems.sort(key=lambda problem: (order.index(problem.rule), problem.file))
    return CheckReport(str(root), _dataset_facts(dataset, facts, tuple(splits)), tuple(problems))


def _dataset_facts(dataset: RawDataset, facts: Sequence[CaseFacts], splits: tuple[str, ...]) -> DatasetFacts:
    labels = [each.voxels for each in facts if each.voxels is not None]
    voxels = [sum(counts) for counts in zip(*labels, strict=True)] or [0] * len(dataset.classes)
    cases = [sum(count > 0 for count in counts) for counts in zip(*labels, strict=True)] or [0] * len(dataset.classes)
    total = max(sum(voxels), 1)
    classes = tuple(
        ClassFacts(name, *numbers, share=numbers[1] / total)
        for name, *numbers in zip(dataset.classes, cases, voxels, strict=True)
    )
    present = [each for each in classes[1:] if each.voxels]
    labelled = sum(case.label is not None for case in dataset.cases.values())
    return DatasetFacts(
        dataset.name,
        dataset.channels,
        labelled,
        len(dataset.cases) - labelled,
        _spread([each.shape for each in facts if each.shape]),
        _spread([each.spacing for each in facts if each.spacing]),
        classes,
        min(present, key=lambda each: each.voxels).name if present else None,
        splits,
    )


def _spread(triples: Sequence[Triple]) -> Spread | None:
    if not triples:
        return None
    low, median, high = (
        tuple(float(choose(axis)) for axis in zip(*triples, strict=True)) for choose in (min, statistics.median, max)
    )
    return Spread(low, median, high)  # pyright: ignore[reportArgumentType] - three axes each


def _missing_labels(root: Path, dataset: RawDataset) -> list[Problem]:
    labelled = [case for case in dataset.cases.values() if case.label is not None]
    if not labelled:
        text = "not one case has a label file"
        return [Problem("no-labels", text, "put those that you have into labelsTr, as <case> and the images' ending")]
    promised = _promised_labels(root)
    if len(labelled) >= promised:
        return []
    text = f"numTraining is {promised}, but {len(labelled)} cases have a label file"
    way_out = "add what is missing; if the others are meant to be unlabelled, all is well"
    return [Problem("missing-label", text, way_out, "dataset.json")]


def _promised_labels(root: Path) -> int:
    """0 where nothing is promised, as by a table of files."""
    try:
        promised = json.loads((root / "dataset.json").read_text(encoding="utf-8")).get("numTraining", 0)
    except (OSError, ValueError, AttributeError):
        return 0
    return promised if isinstance(promised, int) else 0


def _spacing_outliers(facts: Sequence[CaseFacts]) -> list[Problem]:
    found: list[Problem] = []
    measured = [(each, each.spacing) for each in facts if each.spacing is not None]
    if not measured:
        return []
    logs = np.log([spacing for _, spacing in measured])  # (cases, 3)
    medians = np.median(logs, 0)
    away = np.abs(logs - medians)
    deviations = 1.4826 * np.median(away, 0)
    far = away > np.maximum(np.log(SPACING_FACTOR), SPACING_DEVIATIONS * deviations)
    outlying = far & (far.sum(0) <= max(1, SPACING_SHARE * len(measured)))
    outlying |= away > np.log(SPACING_FACTOR_ANYWAY)
    usual = " x ".join(f"{side:.3g}" for side in np.exp(medians))
    for (each, spacing), axes in zip(measured, outlying, strict=True):
        if axes.any():
            text = f"{' x '.join(f'{side:.3g}' for side in spacing)} mm (D, H, W); the median is {usual}"
            way_out = "is its header right? If it is, resampling makes up for it (data.prepare.spacing)"
            found.append(Problem("spacing", text, way_out, case=each.case))
    return found


def _copies(facts: Iterable[CaseFacts]) -> list[tuple[tuple[str, str], ...]]:
    """Groups of (case, file) whose voxels are the same; of several channels, the first that is."""
    by_digest: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for each in facts:
        for file, digest in each.digests:
            by_digest[digest].append((each.case, file))
    groups = {}
    for group in by_digest.values():
        if len(group) > 1:
            groups.setdefault(tuple(case for case, _ in group), tuple(group))
    return list(groups.values())


def _duplicates(facts: Sequence[CaseFacts], copies: Iterable[tuple[tuple[str, str], ...]]) -> list[Problem]:
    found: list[Problem] = []
    known: set[frozenset[str]] = set()
    for (case, file), *others in copies:
        text = f"holds the same voxels as {', '.join(other for _, other in others)}"
        found.append(Problem("duplicate", text, "keep one of them", file, case))
        known.add(frozenset([case, *(other for other, _ in others)]))
    by_digest: dict[str, list[str]] = defaultdict(list)
    for each in facts:
        if each.label_digest is not None:
            by_digest[each.label_digest].append(each.case)
    for cases in by_digest.values():
        if len(cases) > 1 and not any(set(cases) <= group for group in known):
            text = f"its label is the same as that of {', '.join(cases[1:])}, voxel for voxel, but the images differ"
            found.append(Problem("duplicate", text, "one of the labels was saved under a wrong name", case=cases[0]))
    return found


def _classes(dataset: RawDataset, facts: Sequence[CaseFacts]) -> list[Problem]:
    found: list[Problem] = []
    labels = [(each.case, each.voxels) for each in facts if each.voxels is not None]
    if not labels:
        return []
    for index, name in enumerate(dataset.classes[1:], 1):
        cases = [case for case, voxels in labels if voxels[index]]
        if not cases:
            value = dataset.label_values[index]
            way_out = "is the value right? Else take it out of dataset.json: nothing can learn it"
            found.append(Problem("empty-class", f"'{name}' (value {value}) is in no label file", way_out))
        elif len(cases) < FEW_CASES:
            text = f"'{name}' is in {len(cases)} of {len(labels)} label files only: {', '.join(cases)}"
            way_out = "training, validation and test need one each: annotate more, or trust its scores little"
            found.append(Problem("few-cases", text, way_out))
    return found


def _sides(dataset: RawDataset) -> list[Problem]:
    pairs = sided_pairs(dataset.classes[1:])
    if not pairs:
        return []
    text = ", ".join(f"{left}/{right}" for left, right in pairs)
    way_out = "leave w out of data.augment.flip, as it is by default: a mirrored image needs these labels swapped"
    return [Problem("sides", text, way_out)]


def _read_splits(root: Path) -> tuple[Mapping[str, Any], list[Problem]]:
    """Name -> what is written there; none without a splits.json."""
    path = root / "splits.json"
    if not path.is_file():
        return {}, []
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        return {}, [Problem("split", f"is no JSON: {error}", "correct it", path.name)]
    if not isinstance(splits, dict):
        return {}, [Problem("split", "is no object", 'write {"my_split": {"labelled": [...], ...}}', path.name)]
    return splits, []


def _check_split(
    name: str,
    given: Any,
    dataset: RawDataset,
    incomplete: Collection[str],
    facts: Sequence[CaseFacts],
    copies: Iterable[tuple[tuple[str, str], ...]],
) -> list[Problem]:
    """incomplete: cases that are there, though not all of their files are."""
    sets = _sets(given)
    of_patients = _patient_leaks(name, sets, dataset)
    problems: list[Problem] = []
    try:
        read_split(dataset, name)
    except DataError as error:
        problems = [*_overlaps(name, sets), *_unusable(name, sets, dataset, incomplete)]
        named = {case for cases in sets.values() for case in cases}
        if not problems and not of_patients and not named & set(incomplete):
            text = str(error).removeprefix(f"{dataset.root / 'splits.json'}, ")
            problems = [_split_problem("split", "", text, "correct it")]
    problems += [*of_patients, *_leaks(name, sets, copies)]
    voxels = [each.voxels for each in facts if each.case in sets["labelled"] and each.voxels is not None]
    everywhere = [each.voxels for each in facts if each.voxels is not None]
    for index, each in enumerate(dataset.classes):
        if voxels and not any(counts[index] for counts in voxels) and any(counts[index] for counts in everywhere):
            text = f"none of the {len(sets['labelled'])} labelled cases holds '{each}'"
            way_out = "it cannot be learnt there: choose labelled cases that hold it"
            problems.append(_split_problem("split-class", name, text, way_out))
    return problems


def _split_problem(rule: str, name: str, text: str, way_out: str, case: str = "") -> Problem:
    return Problem(rule, f"split '{name}': {text}" if name else text, way_out, "splits.json", case)


def _sets(given: Any) -> dict[str, list[str]]:
    """What can be understood of a split; read_split says what cannot."""
    sets: dict[str, list[str]] = {each: [] for each in SETS}
    for key, cases in given.items() if isinstance(given, dict) else ():
        each = key.replace("labeled", "labelled")
        if each in sets and isinstance(cases, list):
            sets[each] += [case for case in cases if isinstance(case, str)]
    return sets


def _overlaps(name: str, sets: Mapping[str, Sequence[str]]) -> list[Problem]:
    found: list[Problem] = []
    where: dict[str, list[str]] = defaultdict(list)
    for each, cases in sets.items():
        for case, times in Counter(cases).items():
            where[case].append(each)
            if times > 1:
                text = f"names '{case}' {times} times under {each}"
                found.append(_split_problem("split", name, text, "name it once", case))
    for case, homes in where.items():
        if len(homes) > 1:
            text = f"'{case}' is {' and '.join(homes)}"
            found.append(_split_problem("split", name, text, "keep it in one set", case))
    return found


def _unusable(
    name: str, sets: Mapping[str, Sequence[str]], dataset: RawDataset, incomplete: Collection[str]
) -> list[Problem]:
    found: list[Problem] = []
    for each, cases in sets.items():
        for case in sorted(set(cases) - set(incomplete)):
            if case not in dataset.cases:
                close = suggest(case, dataset.cases)
                text = f"{each} names '{case}', which is not there" + (f". {close}" if "Did you" in close else "")
                found.append(_split_problem("split", name, text, "correct the name, or add the case", case))
            elif each != "unlabelled" and dataset.cases[case].label is None:
                text = f"{each} case '{case}' has no label file"
                found.append(_split_problem("split", name, text, "add it, or move the case to unlabelled", case))
    return found


def _leaks(
    name: str, sets: Mapping[str, Sequence[str]], copies: Iterable[tuple[tuple[str, str], ...]]
) -> list[Problem]:
    """Copies of one scan of which some are trained on and some are judged by."""
    found: list[Problem] = []
    home = {case: each for each, cases in sets.items() for case in cases}
    for group in copies:
        used = list(dict.fromkeys(case for case, _ in group if case in home))
        homes = {home[case] for case in used}
        if len(homes) > 1 and not homes <= {"labelled", "unlabelled"}:
            names = " and ".join(f"'{case}' ({home[case]})" for case in used)
            text = f"{names} hold the same voxels"
            found.append(_split_problem("leak", name, text, "keep one of them, or all in one set", used[0]))
    return found


def _patient_leaks(name: str, sets: Mapping[str, Sequence[str]], dataset: RawDataset) -> list[Problem]:
    """Patients of whom some scans are trained on and others are judged by."""
    found: list[Problem] = []
    scans: dict[str, dict[str, str]] = defaultdict(dict)  # patient -> case -> set
    for each, cases in sets.items():
        for case in cases:
            if case in dataset.cases:
                scans[dataset.cases[case].patient].setdefault(case, each)
    for patient, home in scans.items():
        if len(set(home.values())) > 1 and not set(home.values()) <= {"labelled", "unlabelled"}:
            names = " and ".join(f"'{case}' ({each})" for case, each in home.items())
            text = f"{names} are of one patient, '{patient}'"
            found.append(_split_problem("leak", name, text, "keep a patient in one set", next(iter(home))))
    return found


@dataclass(frozen=True)
class _Job:
    """One case to read, small enough to send to a worker: dataset holds that case alone."""

    dataset: RawDataset

    @property
    def case(self) -> Case:
        (case,) = self.dataset.cases.values()
        return case


def _examine(dataset: RawDataset, workers: int, progress: Progress) -> list[CaseFacts]:
    """Of every case, by id."""
    jobs = {id_: _Job(replace(dataset, cases={id_: case})) for id_, case in dataset.cases.items()}
    facts: dict[str, CaseFacts] = {}
    try:
        with closing(work_through(_examine_job, jobs, min(workers, len(jobs)))) as outcomes:
            for done, (case, each) in enumerate(outcomes, 1):
                facts[case] = each
                progress(done, len(jobs), case)
    except WorkerKilled as killed:
        raise DataError(f"A worker was killed while it read one of {killed.cases}, {killed}") from killed
    return [facts[case] for case in dataset.cases]


def _examine_job(job: _Job) -> CaseFacts:
    try:
        return examine_case(job.case, job.dataset)
    except MemoryError:
        file = relative(job.case.images[0], job.dataset.root)
        text = "does not fit the memory beside the other workers' scans"
        return CaseFacts(job.case.id, (Problem("memory", text, "use fewer workers", file, job.case.id),))
