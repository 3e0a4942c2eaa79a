"""What run folders hold, gathered for one page; what is missing is told, with the commands that make it.

A folder of `tailseg run` gives two runs: the method, whose folds are members of it, and the labelled-only reference. A plain
run folder gives one; trained without unlabelled patches on the same split, it is the reference of the others.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from tailseg.data.errors import DataError
from tailseg.data.raw import RawDataset, read_raw
from tailseg.data.splits import Split
from tailseg.evaluate.protocols import PROTOCOLS, protocol_named
from tailseg.evaluate.scores import LABELS_FILE, Scores, find_label_files, joined, read_caveat, read_scores
from tailseg.evaluate.summary import Summary, summarise
from tailseg.evaluate.verdict import Scored as VerdictSet
from tailseg.evaluate.verdict import Verdict, make_verdict
from tailseg.evaluate.volumes import VOLUMES_FILE

CaseSet = Literal["test", "val", "unlabelled", "labelled"]
SET_TITLES: dict[CaseSet, str] = {
    "test": "test",
    "val": "validation",
    "unlabelled": "unlabelled",
    "labelled": "labelled (training)",
}
_WORST_FIRST: tuple[CaseSet, ...] = ("labelled", "val", "unlabelled", "test")
"""What says most against scores on these cases."""
LABELLED_ONLY = "_labelled_only"


class ReportError(ValueError):
    """Folders of which no page can be made; the text names the folder, the rule and the way out."""


@dataclass(frozen=True)
class Trained:
    """What the checkpoint of a run tells. classes: background first; class_voxels: of the labelled cases, for each."""

    classes: tuple[str, ...]
    class_voxels: tuple[int, ...]
    step: int
    parameters: int
    versions: Mapping[str, str]
    caveat: str


@dataclass(frozen=True)
class Card:
    """A method in short."""

    title: str
    paper: str
    idea: str
    needs: str
    cost: str


@dataclass(frozen=True)
class Member:
    """One run folder. recipe: as resolved. lines: of metrics.jsonl. trained: None without a checkpoint."""

    folder: Path
    recipe: Mapping[str, Any]
    split: Split | None
    lines: tuple[Mapping[str, Any], ...]
    trained: Trained | None


@dataclass(frozen=True)
class Scored:
    """One set of cases scored under one protocol. files: case -> predicted label file, where it is still there. label_values:
    class -> value in them."""

    cases_of: CaseSet
    scores: Scores
    summary: Summary
    files: Mapping[str, Path]
    label_values: Mapping[str, int]


@dataclass(frozen=True)
class Predictions:
    """Label files of unlabelled scans. volumes: case -> class -> how much, in ml; in voxels, of pictures."""

    files: Mapping[str, Path]
    label_values: Mapping[str, int]
    volumes: Mapping[str, Mapping[str, float]]
    unit: Literal["ml", "voxels"]


@dataclass(frozen=True)
class Run:
    """One column of the page. name: unique in it. missing: what the page lacks of it, and how to make it. whole: the folder of
    `tailseg run` that it belongs to."""

    name: str
    method: str
    folder: Path
    members: tuple[Member, ...]
    labelled_only: bool
    scored: Scored | None
    unlabelled: Predictions | None = None
    missing: tuple[str, ...] = ()
    whole: Path | None = None

    @property
    def recipe(self) -> Mapping[str, Any]:
        return self.members[0].recipe

    @property
    def caveats(self) -> tuple[str, ...]:
        told = [member.trained.caveat for member in self.members if member.trained]
        told += [self.scored.summary.caveat] if self.scored else []
        return tuple(dict.fromkeys(text for text in told if text))

    @property
    def splits(self) -> tuple[str, ...]:
        """Digests, one for each member."""
        return tuple(sorted(member.split.digest for member in self.members if member.split))


@dataclass(frozen=True)
class Group:
    """Runs whose numbers may stand in one table: one protocol, the same classes, the same scored cases."""

    runs: tuple[Run, ...]

    @property
    def scored(self) -> Scored:
        assert self.runs[0].scored is not None
        return self.runs[0].scored

    @property
    def title(self) -> str:
        scores, count = self.scored.scores, len(self.scored.scores.cases)
        return f"{count} {SET_TITLES[self.scored.cases_of]} case{'s' * (count != 1)}, protocol {scores.protocol.name}"


@dataclass(frozen=True)
class Answered:
    """A method held against its labelled-only reference."""

    run: Run
    reference: Run
    verdict: Verdict


@dataclass(frozen=True)
class Material:
    """Everything that the page is made of. classes: the foreground. dataset: None where the scans are no longer at the place
    that the recipe names. check: CheckReport.to_dict() of a folder of `tailseg run`. notes: about the page as a whole."""

    runs: tuple[Run, ...]
    groups: tuple[Group, ...]
    answers: tuple[Answered, ...]
    classes: tuple[str, ...]
    dataset: RawDataset | None
    check: Mapping[str, Any] | None
    cards: Mapping[str, Card]
    notes: tuple[str, ...]


def is_whole(folder: Path) -> bool:
    """Whether `tailseg run` made this folder."""
    return (folder / "run.json").is_file()


def run_folders(folders: Sequence[Path]) -> list[Path]:
    """The plain run folders in these folders. Raises ReportError for one that is neither."""
    found: list[Path] = []
    for folder in folders:
        if is_whole(folder):
            folds = _folds(folder)
            found += [folder / fold for fold in folds]
            found += [path for fold in folds if (path := folder / (fold + LABELLED_ONLY)).is_dir()]
        else:
            found.append(folder)
    for folder in found:
        if not (folder / "recipe.yaml").is_file():
            raise ReportError(
                f"{folder} holds no run: recipe.yaml is missing. Give the folder that `tailseg train --out` or `tailseg run` "
                "made."
            )
    return found


def collect(
    folders: Sequence[Path],
    *,
    protocol: str | None = None,
    trained: Mapping[Path, Trained] | None = None,
    lines: Mapping[Path, Sequence[Mapping[str, Any]]] | None = None,
    cards: Mapping[str, Card] | None = None,
) -> Material:
    """Read run folders and folders of `tailseg run`. protocol: whose scores are shown; None takes each run's first of
    PROTOCOLS. trained, lines: what the checkpoints and metrics.jsonl tell, by run folder. cards: by method.

    Raises ReportError for a folder that holds no run, for the same folder twice, and for runs of other classes.
    """
    if not folders:
        raise ReportError("A report needs at least one folder of a run.")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ReportError("The same folder is given twice; name every run once.")
    if protocol is not None:
        protocol_named(protocol)
    run_folders(folders)
    reader = _Reader(protocol, trained or {}, lines or {})
    runs = [run for folder in folders for run in reader.runs(folder)]
    runs = _named(runs)
    classes = _classes(runs)
    dataset, notes = _dataset(runs)
    groups = _groups(runs)
    if len(groups) > 1:
        told = "; ".join(f"{' and '.join(run.name for run in group.runs)}: {group.title}" for group in groups)
        notes.append(
            f"Numbers of other protocols or other cases do not compare, so they stand in tables of their own ({told})."
        )
    answers = tuple(answer for group in groups for answer in _answers(group))
    check = next((_read_json(folder / "check.json") for folder in folders if (folder / "check.json").is_file()), None)
    return Material(tuple(runs), groups, answers, classes, dataset, check, cards or {}, tuple(notes))


@dataclass(frozen=True)
class _Reader:
    protocol: str | None
    trained: Mapping[Path, Trained]
    lines: Mapping[Path, Sequence[Mapping[str, Any]]]

    def runs(self, folder: Path) -> list[Run]:
        if not is_whole(folder):
            member = self._member(folder)
            scored = [self._scored(member)]
            return [self._run((member,), scored, folder, labelled_only=_is_labelled_only(member), whole=None)]
        folds = _folds(folder)
        runs: list[Run] = []
        for ending, labelled_only in (("", False), (LABELLED_ONLY, True)):
            members = [self._member(folder / (fold + ending)) for fold in folds if (folder / (fold + ending)).is_dir()]
            scored = [self._scored(member) for member in members]
            if _share_cases(scored):  # every fold scored the same cases: they cannot be one row a case
                runs += [
                    self._run((member,), [one], member.folder, labelled_only=labelled_only, whole=folder)
                    for member, one in zip(members, scored, strict=True)
                ]
            elif members:
                runs.append(self._run(tuple(members), scored, folder, labelled_only=labelled_only, whole=folder))
        return runs

    def _member(self, folder: Path) -> Member:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        split = _read_json(folder / "split.json") if (folder / "split.json").is_file() else None
        return Member(
            folder,
            recipe,
            Split.from_dict(split) if split else None,
            tuple(self.lines.get(folder, ())),
            self.trained.get(folder),
        )

    def _run(
        self,
        members: tuple[Member, ...],
        each: Sequence[Scored | None],
        folder: Path,
        *,
        labelled_only: bool,
        whole: Path | None,
    ) -> Run:
        """each: the scores of every member. Where one has none, the run has none: it would be of other cases."""
        held = [one for one in each if one is not None]
        scored = _joined(held) if len(held) == len(members) else None
        method = str(members[0].recipe["method"]["name"])
        missing = [self._missing(member) for member, one in zip(members, each, strict=True) if one is None]
        if not any(member.lines for member in members):
            missing.append(f"{members[0].folder} has no metrics.jsonl, so there are no learning curves.")
        unlabelled = None if labelled_only else _unlabelled(folder, members)
        return Run(method, method, folder, members, labelled_only, scored, unlabelled, tuple(missing), whole)

    def _scored(self, member: Member) -> Scored | None:
        places = [member.folder / "predictions" / name for name in ("test", "", "val")]
        names = [self.protocol] if self.protocol else list(PROTOCOLS)
        for place in places:
            for name in names:
                if (place / f"{name}.csv").is_file():
                    return _read_scored(place, name, member.split)
        return None

    def _missing(self, member: Member) -> str:
        """How to get scores."""
        cases = "test" if member.split is None or member.split.test else "val"
        place, data = member.folder / "predictions" / cases, member.recipe["data"]["root"]
        under = f" --protocol {self.protocol}" if self.protocol and self.protocol != "native" else ""
        whose = f" of protocol {self.protocol}" if self.protocol else ""
        return (
            f"{member.folder} has no scores{whose}. Make them: `tailseg predict {member.folder} {cases} {place}`, then "
            f"`tailseg evaluate {place} {data}{under}`."
        )


def _folds(folder: Path) -> list[str]:
    told = _read_json(folder / "run.json")
    if not isinstance(told.get("folds"), list) or not told["folds"]:
        raise ReportError(f"{folder} is not trained yet; call `tailseg run` again, which goes on with it.")
    return [str(fold) for fold in told["folds"]]


def _is_labelled_only(member: Member) -> bool:
    return member.recipe["data"]["batch"][1] == 0 or member.recipe["method"]["name"] == "supervised"


def _set_of(split: Split | None, cases: Sequence[str]) -> CaseSet:
    """The set that says most against the scores: one case that was trained on makes them scores on training cases."""
    if split is not None:
        for name in _WORST_FIRST[:-1]:
            if set(cases) & set(getattr(split, name)):
                return name
    return "test"


def _read_scored(place: Path, protocol: str, split: Split | None) -> Scored:
    scores = read_scores(place / f"{protocol}.csv")
    try:
        found = find_label_files(place)
    except ValueError:  # the label files were deleted: the numbers are still good
        found = {}
    files = {case: found[case] for case in scores.cases if case in found}
    caveat = read_caveat(place)
    return Scored(_set_of(split, scores.cases), scores, summarise(scores, caveat), files, _label_values(place))


def _label_values(place: Path) -> dict[str, int]:
    path = place / LABELS_FILE
    return {name: int(value) for name, value in _read_json(path)["labels"].items()} if path.is_file() else {}


def _share_cases(scored: Sequence[Scored | None]) -> bool:
    cases = [case for one in scored if one for case in one.scores.cases]
    return len(cases) > len(set(cases))


def _joined(scored: Sequence[Scored]) -> Scored:
    """Folds, each of which scored other cases."""
    if len(scored) == 1:
        return scored[0]
    scores = joined([one.scores for one in scored])
    caveat = " ".join(dict.fromkeys(one.summary.caveat for one in scored if one.summary.caveat))
    worst = _WORST_FIRST[min(_WORST_FIRST.index(one.cases_of) for one in scored)]
    files = {case: path for one in scored for case, path in one.files.items()}
    return Scored(worst, scores, summarise(scores, caveat), files, scored[0].label_values)


def _unlabelled(folder: Path, members: Sequence[Member]) -> Predictions | None:
    """Label files of the split's unlabelled cases, in predictions/ or predictions/unlabelled/."""
    for place in (folder / "predictions" / "unlabelled", folder / "predictions"):
        if not place.is_dir():
            continue
        try:
            found = find_label_files(place)
        except ValueError:
            continue
        unlabelled = {case for member in members if member.split for case in member.split.unlabelled}
        files = {case: path for case, path in found.items() if case in unlabelled}
        if files:
            return Predictions(files, _label_values(place), *_volumes(place / VOLUMES_FILE))
    return None


def _volumes(path: Path) -> tuple[dict[str, dict[str, float]], Literal["ml", "voxels"]]:
    """What tailseg.evaluate.volumes wrote. Where one file does not say how large a voxel is, none is counted in ml."""
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.is_file() else []
    unit = "ml" if all(row["ml"] for row in rows) else "voxels"
    volumes: dict[str, dict[str, float]] = {}
    for row in rows:
        volumes.setdefault(row["case"], {})[row["class"]] = float(row[unit])
    return volumes, unit


def _named(runs: Sequence[Run]) -> list[Run]:
    """Methods are names enough where they differ; else the folder, and its parents as far as needed, tell them apart."""

    def base(run: Run) -> str:
        return f"{run.method} (labelled only)" if run.labelled_only else run.method

    named: list[Run] = []
    for run in runs:
        alike = [other for other in runs if base(other) == base(run)]
        name = base(run)
        if len(alike) > 1:
            parts, depth = run.folder.resolve().parts, 1
            while (
                depth < len(parts)
                and sum(other.folder.resolve().parts[-depth:] == parts[-depth:] for other in alike) > 1
            ):
                depth += 1
            name = f"{name} · {'/'.join(parts[-depth:])}"
        named.append(replace(run, name=name))
    return named


def _classes(runs: Sequence[Run]) -> tuple[str, ...]:
    """The foreground classes of all runs. Raises ReportError where they differ."""
    told: dict[tuple[str, ...], Run] = {}
    for run in runs:
        for classes in (
            run.scored.scores.classes if run.scored else None,
            *(member.trained.classes[1:] if member.trained else None for member in run.members),
            tuple(run.unlabelled.label_values)[1:] if run.unlabelled and run.unlabelled.label_values else None,
        ):
            if classes:
                told.setdefault(classes, run)
    by_names = {frozenset(classes): run for classes, run in told.items()}
    if len(by_names) > 1:
        folders = " and ".join(str(run.folder) for run in by_names.values())
        raise ReportError(f"{folders} segment different classes; make a report of each.")
    return next(iter(told), ())


def _dataset(runs: Sequence[Run]) -> tuple[RawDataset | None, list[str]]:
    roots = list(dict.fromkeys(str(run.recipe["data"]["root"]) for run in runs))
    notes = (
        [] if len(roots) == 1 else [f"The runs were trained on {', '.join(roots)}; the scans shown are of the first."]
    )
    try:
        return read_raw(Path(roots[0])), notes
    except DataError as error:
        return None, [*notes, f"No scan can be shown, and little be said of the data set: {error}"]


def _groups(runs: Sequence[Run]) -> tuple[Group, ...]:
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        if run.scored:
            scores = run.scored.scores
            key = (scores.protocol.name, scores.classes, frozenset(scores.cases), run.scored.cases_of)
            groups.setdefault(key, []).append(run)
    return tuple(Group(tuple(group)) for group in groups.values())


def _answers(group: Group) -> list[Answered]:
    references = [run for run in group.runs if run.labelled_only]
    found = []
    for run in group.runs:
        if run.labelled_only or run.scored is None or run.scored.cases_of == "labelled":
            continue
        own = [one for one in references if one.whole == run.whole] if run.whole else references
        reference = next((one for one in own or references if one.splits == run.splits), None)
        if reference is None or reference.scored is None:
            continue
        found.append(Answered(run, reference, _verdict(run, run.scored, reference, reference.scored)))
    return found


def _verdict(run: Run, scored: Scored, reference: Run, reference_scored: Scored) -> Verdict:
    protocol = scored.scores.protocol.name
    path = run.folder / "verdict.json"
    if run.folder == run.whole == reference.whole and path.is_file():
        verdict = Verdict.from_dict(_read_json(path))
        same_classes = tuple(one.name for one in verdict.classes) == scored.scores.classes
        if verdict.protocol == protocol and verdict.cases == len(scored.scores.cases) and same_classes:
            return verdict
    on: VerdictSet = "val" if scored.cases_of == "val" else "test"
    return make_verdict(
        scored.scores, reference_scored.scores, scored=on, method=run.method, reference=reference.method
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ReportError(f"{path} is no JSON: {error}; make it again.") from error
