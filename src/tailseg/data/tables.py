"""Tables about cases: cases.csv beside a data set, or a table that is the data set itself.

case, patient, annotated_classes      cases.csv in the data set's folder; other columns are the user's own
image, label, patient, ...            one row a case; several files of a case are parted by ;
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from tailseg.data.cases import Case
from tailseg.data.errors import DataError
from tailseg.options import suggest

CASES_FILE = "cases.csv"
_COLUMNS = ("case", "patient", "annotated_classes")
_FILE_COLUMNS = ("image", "label", *_COLUMNS)


@dataclass(frozen=True)
class Row:
    """where: the file and line, for texts. cells: column -> what stands there, without blanks around it."""

    where: str
    cells: Mapping[str, str]


def annotate(cases: Mapping[str, Case], table: Path, classes: Sequence[str]) -> dict[str, Case]:
    """The cases with what the table says of them; cases it leaves out stay as they are. Raises DataError.

    classes: background first.
    """
    told: dict[str, Case] = {}
    for row in _rows(table, needed=("case",), known=_COLUMNS):
        case = row.cells["case"]
        if case not in cases:
            raise DataError(f"{row.where} names case '{case}', of which there is no scan. {suggest(case, cases)}")
        if case in told:
            raise DataError(f"{row.where} names case '{case}' again; keep one row for each.")
        told[case] = _told(cases[case], row, classes)
    return {**cases, **told}


def annotated_classes(table: Path, classes: Sequence[str]) -> dict[str, tuple[str, ...] | None]:
    """Case -> the foreground classes that were looked for, None if all; of every case the table names. Raises DataError."""
    needed = ("case",)
    return {row.cells["case"]: _annotated(row, classes) for row in _rows(table, needed=needed, known=_COLUMNS)}


def cases_of_table(table: Path, classes: Sequence[str] | None = None) -> dict[str, Case]:
    """The cases of a table of files, whose paths are relative to it. Raises DataError.

    classes: background first; without them the classes that were looked for are not read.
    """
    cases: dict[str, Case] = {}
    for row in _rows(table, needed=("image",), known=_FILE_COLUMNS):
        images = tuple(table.parent / name.strip() for name in row.cells["image"].split(";") if name.strip())
        label = table.parent / row.cells["label"] if row.cells.get("label") else None
        if not images:
            raise DataError(f"{row.where} names no image.")
        for file in (*images, *([label] if label else [])):
            if not file.exists():
                raise DataError(f"{row.where} names {file}, which does not exist; paths are relative to the table.")
        case = row.cells.get("case") or case_name(images[0])
        if case != Path(case).name or case.startswith("."):
            raise DataError(f"{row.where}: case '{case}' cannot be a file's name; give it another one under case.")
        if case in cases:
            raise DataError(
                f"{row.where} is a second case '{case}'; give each a name of its own in a column called case."
            )
        cases[case] = _told(Case(case, images, label), row, classes)
    if not cases:
        raise DataError(f"{table} names no case; write one row for each, with image and label.")
    return cases


def case_name(image: Path) -> str:
    """A file's name without its ending and channel."""
    name = image.name.removesuffix(".gz")
    stem = name.rpartition(".")[0] or name if image.is_file() else name
    return stem.removesuffix("_0000")


def _told(case: Case, row: Row, classes: Sequence[str] | None) -> Case:
    annotated = None if classes is None else _annotated(row, classes)
    return replace(case, patient=row.cells.get("patient") or case.id, annotated=annotated)


def _annotated(row: Row, classes: Sequence[str]) -> tuple[str, ...] | None:
    """The foreground classes that were looked for, in the order of classes; None if those are all."""
    text = row.cells.get("annotated_classes", "")
    names = [text] if text in classes else text.split(";") if ";" in text else text.split()
    found = {name.strip() for name in names if name.strip()}
    for name in sorted(found):
        if name not in classes:
            raise DataError(f"{row.where}: annotated_classes names '{name}'. {suggest(name, classes)}")
    annotated = tuple(name for name in classes[1:] if name in found)
    if found and not annotated:
        raise DataError(f"{row.where}: annotated_classes names no class but the background; leave it empty for all.")
    return annotated if found and len(annotated) < len(classes) - 1 else None


def _rows(path: Path, needed: Collection[str], known: Sequence[str]) -> Iterator[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a mark at its beginning
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text in UTF-8: {error}.") from error
    lines = text.splitlines()
    header = lines[0] if lines else ""
    delimiter = max(",;\t", key=header.count)  # what spreadsheets write depends on the country
    reader = csv.reader(lines, delimiter=delimiter)
    columns = [column.strip().lower() for column in next(reader, [])]
    if missing := [column for column in needed if column not in columns]:
        raise DataError(f"{path} has no column '{missing[0]}'; its first line must name {', '.join(known)}.")
    for column in columns:
        close = get_close_matches(column, known, n=1, cutoff=0.8)
        if close and column not in known and close[0] not in columns:
            raise DataError(f"{path} has a column '{column}'; is it '{close[0]}'? Rename it.")
    if twice := [column for column in known if columns.count(column) > 1]:
        raise DataError(f"{path} has two columns '{twice[0]}'; keep one.")
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        where = f"{path}, line {reader.line_num},"
        if len(cells) != len(columns):
            raise DataError(f"{where} has {len(cells)} cells, the first line names {len(columns)} columns; correct it.")
        yield Row(where, {column: cell.strip() for column, cell in zip(columns, cells, strict=True)})
