"""Scores of label files against label files: one value for each case, class and metric.

A folder of label files says in its labels.json (or dataset.json) which value stands for which class, so that two folders
are matched by the names of their classes, never by the order of their values.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tailseg.data.image import IMAGE_ENDINGS, Image, read_image, same_place, turned_onto
from tailseg.data.tables import CASES_FILE, annotated_classes, cases_of_table
from tailseg.evaluate.metrics import IGNORE, compare_classes
from tailseg.evaluate.protocols import Protocol, protocol_named
from tailseg.files import write_text

LABELS_FILE = "labels.json"
_COLUMNS = ("protocol", "case", "class", "pred_voxels", "ref_voxels")


class ScoreError(ValueError):
    """Label files that cannot be scored; the text names the files, the rule and the way out."""


@dataclass(frozen=True, eq=False)
class Scores:
    """classes: the foreground. values: (cases, classes, metrics of the protocol), NaN where the protocol leaves one out.

    pred_voxels, ref_voxels: (cases, classes), on the grid that the protocol scores on, without ignored voxels.
    unmatched: predictions of cases that no reference was asked for. unannotated: (cases, classes) bool, classes that nobody
    looked for in that case: NaN and 0 voxels, neither missed nor invented nor absent; None is none.
    """

    protocol: Protocol
    cases: tuple[str, ...]
    classes: tuple[str, ...]
    values: np.ndarray
    pred_voxels: np.ndarray
    ref_voxels: np.ndarray
    unmatched: tuple[str, ...] = ()
    unannotated: np.ndarray | None = None

    @property
    def looked_for(self) -> np.ndarray:
        """(cases, classes) bool."""
        return np.ones(self.ref_voxels.shape, bool) if self.unannotated is None else ~self.unannotated

    @property
    def missed(self) -> np.ndarray:
        """(cases, classes) bool: only the reference has the class."""
        return (self.ref_voxels > 0) & (self.pred_voxels == 0)

    @property
    def invented(self) -> np.ndarray:
        """(cases, classes) bool: only the prediction has the class."""
        return (self.ref_voxels == 0) & (self.pred_voxels > 0)

    @property
    def absent(self) -> np.ndarray:
        """(cases, classes) bool: neither has the class."""
        return (self.ref_voxels == 0) & (self.pred_voxels == 0) & self.looked_for

    def metric(self, name: str) -> np.ndarray:
        """(cases, classes). Raises ScoreError if the protocol does not report it."""
        if name not in self.protocol.metrics:
            raise ScoreError(
                f"Protocol {self.protocol.name} reports no '{name}'; choose from {', '.join(self.protocol.metrics)}."
            )
        return self.values[..., self.protocol.metrics.index(name)]


def score_case(
    pred: np.ndarray,
    ref: np.ndarray,
    spacing: Sequence[float],
    classes: Sequence[str],
    protocol: Protocol,
    *,
    case: str = "case",
    annotated: Collection[str] | None = None,
) -> Scores:
    """Scores of one case. pred, ref: class indices (D, H, W) uint8, ref may hold IGNORE. classes: background first.

    spacing: mm per voxel, (D, H, W). annotated: classes that were looked for, None is all. The others are left out. Where ref
    has none of the annotated classes, they are known not to be: what is predicted there is wrong, unlike in training, where
    such a voxel cannot be taught to be background.
    Raises ValueError if they do not fit each other.
    """
    if pred.shape != ref.shape:
        raise ValueError(f"the prediction of {case} has the shape {pred.shape}, its reference {ref.shape}.")
    pred, ref, scored_spacing = protocol.to_grid(pred, ref, spacing)
    diagonal = math.hypot(*(side * size for side, size in zip(scored_spacing, ref.shape, strict=True)))
    comparisons = compare_classes(pred, ref, len(classes), scored_spacing)
    values = [protocol.values(comparison, diagonal) for comparison in comparisons]
    voxels = np.array([comparison.voxels for comparison in comparisons])  # (classes, 3)
    scored = np.array([values], float)
    unannotated = None
    if annotated is not None:
        unannotated = np.array([[name not in annotated for name in classes[1:]]])
        scored[unannotated] = np.nan
        voxels[unannotated[0]] = 0
    return Scores(
        protocol, (case,), tuple(classes[1:]), scored, voxels[None, :, 0], voxels[None, :, 1], unannotated=unannotated
    )


def joined(scores: Sequence[Scores], *, unmatched: Iterable[str] = ()) -> Scores:
    """The cases of several scores, of one protocol and the same classes, in one."""
    first = scores[0]
    partial = any(one.unannotated is not None for one in scores)
    return Scores(
        first.protocol,
        tuple(case for one in scores for case in one.cases),
        first.classes,
        np.concatenate([one.values for one in scores]),
        np.concatenate([one.pred_voxels for one in scores]),
        np.concatenate([one.ref_voxels for one in scores]),
        tuple(unmatched),
        ~np.concatenate([one.looked_for for one in scores]) if partial else None,
    )


def score_folder(
    pred: Path,
    ref: Path | Mapping[str, Path],
    protocols: Sequence[Protocol],
    *,
    labels: Mapping[str, int] | None = None,
    ignore_values: Collection[int] = (),
    pred_labels: Mapping[str, int] | None = None,
    cases: Collection[str] | None = None,
    annotated: Mapping[str, Collection[str] | None] | None = None,
    workers: int = 2,
    progress: Callable[[str], None] = lambda case: None,
) -> dict[str, Scores]:
    """Score a folder of label files against another, under each protocol; each file is read once.

    ref: a folder, or case id -> label file. labels: class name -> value in the reference files, background first;
    ignore_values: values there that nobody annotated. Both come from labels.json or dataset.json in ref, or beside it,
    when labels is None; pred_labels likewise from pred. cases: score only these. annotated: of a case, the classes that were
    looked for, where those are not all; from cases.csv in ref, or beside it, when None. workers: cases held in memory at
    once. progress: called with each finished case. Cases are sorted by id.
    Raises ScoreError or ImageError, naming the files, for whatever does not match.
    """
    pred_files = find_label_files(pred)
    if isinstance(ref, Path):
        ref_files = find_label_files(ref)
        if labels is None:
            labels, ignore_values = read_labels_file(ref)
        if annotated is None:
            annotated = read_annotated(ref, ref_files, tuple(labels))
    else:
        ref_files = dict(ref)
    if labels is None:
        raise ScoreError("labels is needed with a mapping of reference files: the value of each class in them.")
    if pred_labels is None:
        pred_labels, _ = read_labels_file(pred)
    _check_same_classes(pred, pred_labels, labels)
    wanted = sorted(ref_files if cases is None else cases)
    _check_files(pred, pred_files, ref_files, wanted)
    ref_values, pred_values = list(labels.values()), [pred_labels[name] for name in labels]
    looked_for = annotated or {}

    def score(case: str) -> list[Scores]:
        pred_path, ref_path = pred_files[case], ref_files[case]
        ref_image = read_image(ref_path)
        d, h, w = ref_image.array.shape
        pred_image = turned_onto(read_image(pred_path), ref_image.affine, (d, h, w))
        _check_same_grid(pred_path, pred_image, ref_path, ref_image)
        pred_classes = _to_classes(pred_path, pred_image.array, pred_values, ())
        ref_classes = _to_classes(ref_path, ref_image.array, ref_values, ignore_values)
        return [
            score_case(
                pred_classes,
                ref_classes,
                ref_image.spacing,
                tuple(labels),
                protocol,
                case=case,
                annotated=looked_for.get(case),
            )
            for protocol in protocols
        ]

    # threads: inflating, comparing and searching release the interpreter, and nothing has to be sent
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(score, case) for case in wanted]
        try:
            by_case = []
            for case, future in zip(wanted, futures, strict=True):
                by_case.append(future.result())
                progress(case)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    unmatched = sorted(pred_files.keys() - set(ref_files))
    return {
        protocol.name: joined([scores[index] for scores in by_case], unmatched=unmatched)
        for index, protocol in enumerate(protocols)
    }


def find_label_files(folder: Path) -> dict[str, Path]:
    """Case id -> label file, by name, or as a table of files says (tailseg.data.tables).

    Raises ScoreError for no folder, no label file, or two of one case.
    """
    if folder.suffix.lower() == ".csv" and folder.is_file():
        return {case.id: case.label for case in cases_of_table(folder).values() if case.label is not None}
    if not folder.is_dir():
        raise ScoreError(f"No folder {folder}; give the folder that holds <case>.nii.gz files.")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        ending = next((ending for ending in IMAGE_ENDINGS if path.name.endswith(ending)), None)
        if ending is None or path.name.startswith("."):
            continue
        case = path.name.removesuffix(ending)
        if case in files:
            raise ScoreError(f"{files[case]} and {path} are two label files of case '{case}'; keep one.")
        files[case] = path
    if not files:
        raise ScoreError(f"{folder} holds no label file; it should hold <case>.nii.gz files.")
    return files


def read_labels_file(folder: Path) -> tuple[dict[str, int], tuple[int, ...]]:
    """Class name -> value, in order of the values, and the values to ignore: "ignore", which may have a list of them.

    From labels.json or dataset.json in the folder or the one above it: {"labels": {"background": 0, "liver": 1}}.
    Raises ScoreError when there is none, or none that says so.
    """
    places = [parent / name for parent in (folder, folder.parent) for name in (LABELS_FILE, "dataset.json")]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ScoreError(
            f"Nothing names the classes of {folder}: put a {LABELS_FILE} beside the label files, "
            'like {"labels": {"background": 0, "liver": 1}}.'
        )
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))["labels"]
        if all(name.isdigit() for name in labels):  # nnU-Net v1 wrote value -> name
            labels = {name: int(value) for value, name in labels.items()}
        ignored = labels.pop("ignore", [])
        ignored = tuple(int(value) for value in (ignored if isinstance(ignored, list) else [ignored]))
        values = {str(name): int(value) for name, value in labels.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ScoreError(
            f'{path} must be JSON with one value for each class, like {{"labels": {{"background": 0, "liver": 1}}}}.'
        ) from error
    return dict(sorted(values.items(), key=lambda item: item[1])), ignored


def read_annotated(folder: Path, cases: Collection[str], classes: Sequence[str]) -> dict[str, Collection[str] | None]:
    """Case -> the classes that were looked for, None is all, as a table of files says itself, or cases.csv in the folder or the
    one above it. Raises DataError.
    """
    if folder.suffix.lower() == ".csv" and folder.is_file():
        return {case.id: case.annotated for case in cases_of_table(folder, classes).values()}
    table = next((place / CASES_FILE for place in (folder, folder.parent) if (place / CASES_FILE).is_file()), None)
    if table is None:
        return {}
    told = annotated_classes(table, classes)
    return {case: told[case] for case in cases if case in told}


def read_caveat(folder: Path) -> str:
    """What the labels.json of predictions says must be told with their scores; empty where it says nothing."""
    path = folder / LABELS_FILE
    return str(json.loads(path.read_text(encoding="utf-8")).get("caveat", "")) if path.is_file() else ""


def write_scores(path: Path, scores: Scores) -> None:
    """A CSV with a row for each case and class; an empty cell is a value that the protocol leaves out. Where nobody looked for
    the class, the numbers of voxels are empty too."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow((*_COLUMNS, *scores.protocol.metrics))
    for c, case in enumerate(scores.cases):
        for k, name in enumerate(scores.classes):
            cells = ["" if math.isnan(value) else repr(value) for value in scores.values[c, k].tolist()]
            voxels = int(scores.pred_voxels[c, k]), int(scores.ref_voxels[c, k])
            voxels = voxels if scores.looked_for[c, k] else ("", "")
            writer.writerow((scores.protocol.name, case, name, *voxels, *cells))
    write_text(path, file.getvalue())


def read_scores(path: Path, protocol: Protocol | None = None) -> Scores:
    """What write_scores wrote. protocol: needed only if it is none of PROTOCOLS.

    Raises ScoreError if the file is not whole or of another protocol.
    """
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    if tuple(header[: len(_COLUMNS)]) != _COLUMNS or not rows:
        raise ScoreError(f"{path} holds no scores; give a file that `tailseg evaluate` wrote.")
    protocol = protocol or protocol_named(rows[0][0])
    cases, classes = (tuple(dict.fromkeys(row[column] for row in rows)) for column in (1, 2))
    fits = {row[0] for row in rows} == {protocol.name} and tuple(header[len(_COLUMNS) :]) == protocol.metrics
    in_order = [(row[1], row[2]) for row in rows] == [(case, name) for case in cases for name in classes]
    if not fits or not in_order or any(len(row) != len(header) for row in rows):
        raise ScoreError(f"{path} is not whole, or not of protocol {protocol.name}; score the label files again.")
    shape = (len(cases), len(classes))
    values = np.array([[float(cell or "nan") for cell in row[len(_COLUMNS) :]] for row in rows])
    voxels = np.array([[int(cell or 0) for cell in row[3:5]] for row in rows])
    unannotated = np.array([row[4] == "" for row in rows]).reshape(shape)
    pred_voxels, ref_voxels = (voxels[:, column].reshape(shape) for column in (0, 1))
    return Scores(
        protocol, cases, classes, values.reshape(*shape, -1), pred_voxels, ref_voxels,
        unannotated=unannotated if unannotated.any() else None,
    )  # fmt: skip


def _check_same_classes(pred: Path, pred_labels: Mapping[str, int], labels: Mapping[str, int]) -> None:
    if len(labels) < 2:
        raise ScoreError(f"labels must name the background and at least one class, got {dict(labels)}.")
    if pred_labels.keys() != labels.keys():
        only_pred = ", ".join(name for name in pred_labels if name not in labels) or "none"
        only_ref = ", ".join(name for name in labels if name not in pred_labels) or "none"
        raise ScoreError(
            f"{pred} and the reference name different classes (only there: {only_pred}; only in the reference: "
            f"{only_ref}). Give both the same names in {LABELS_FILE}."
        )


def _check_files(
    pred: Path, pred_files: Mapping[str, Path], ref_files: Mapping[str, Path], wanted: Sequence[str]
) -> None:
    if not wanted:
        raise ScoreError(f"No case to score in {pred}: the reference is empty.")
    if unknown := [case for case in wanted if case not in ref_files]:
        raise ScoreError(f"No reference for {_some(unknown)}; leave them out of the cases to score.")
    if missing := [case for case in wanted if case not in pred_files]:
        extra = [case for case in pred_files if case not in ref_files]
        found = f" It holds {_some(extra)}, which has no reference." if extra else ""
        raise ScoreError(
            f"{pred} holds no prediction of {_some(missing)}.{found} Predict them, or name the cases to score."
        )


def _check_same_grid(pred_path: Path, pred: Image, ref_path: Path, ref: Image) -> None:
    d, h, w = ref.array.shape
    if pred.array.shape != ref.array.shape:
        raise ScoreError(
            f"{pred_path} has the shape {pred.array.shape} (D, H, W), {ref_path} has {ref.array.shape}; "
            "resample the prediction onto the reference's grid."
        )
    if not same_place(ref.affine, pred.affine, (d, h, w)):
        raise ScoreError(
            f"{pred_path} lies elsewhere in the patient than {ref_path}: their affines differ; "
            "resample the prediction onto the reference's grid, or correct its header."
        )


def _to_classes(path: Path, array: np.ndarray, values: Sequence[int], ignore_values: Collection[int]) -> np.ndarray:
    """Class indices, uint8, of the values in a label file; IGNORE where nobody annotated."""
    if array.dtype.kind not in "iu":
        with np.errstate(invalid="ignore"):
            whole = array.astype(np.int32)
        if not np.array_equal(whole, array):
            raise ScoreError(f"{path} holds fractions or NaN; a label file holds whole numbers.")
        array = whole
    known = [*values, *ignore_values]
    inside = array.min() >= 0 and array.max() <= max(known)
    if inside and known == list(range(len(known))) and not ignore_values:
        return array.astype(np.uint8, copy=False)
    table = np.zeros(max(known) + 1, np.uint8)
    table[list(ignore_values)] = IGNORE
    table[list(values)] = np.arange(len(values))
    classes = np.empty(array.shape, np.uint8)
    # plane by plane, because numpy makes eight bytes of every label that it looks up
    for plane, found in zip(array, classes, strict=True) if inside else ():
        found[:] = table[plane]
        inside = inside and np.array_equal(found == 0, plane == values[0])  # what has no name became background
    if not inside:
        unknown = sorted(set(np.unique(array).tolist()) - set(known))
        raise ScoreError(f"{path} holds the values {_some(unknown)}, which name no class; correct its {LABELS_FILE}.")
    return classes


def _some(names: Sequence[object]) -> str:
    shown = ", ".join(map(str, names[:10]))
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"
