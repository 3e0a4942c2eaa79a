"""A folder of predictions and who made it, so that predictions of two models are never mixed in one.

prediction.json     the runs with the digest of their checkpoints, the options, and of every finished case its source and
                    volumes
volumes.csv         the volumes once more, to be read by people and programs
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tailseg.data.cases import Case
from tailseg.data.image import IMAGE_ENDINGS
from tailseg.evaluate.volumes import VOLUMES_FILE, Volume, write_volumes
from tailseg.files import write_json
from tailseg.options import OptionError

RECORD_FILE = "prediction.json"
_ENDINGS = (*IMAGE_ENDINGS, ".dcm")


@dataclass
class PredictionFolder:
    """identity: what the label files depend on besides the scan; JSON. about: more for the reader, compared with nothing.

    cases: those finished, with their source, the names of their files, and their volumes. expected: label files that were
    going to be written. resume: whether what is finished is kept.
    """

    folder: Path
    identity: Mapping[str, Any]
    about: Mapping[str, Any]
    expected: frozenset[str]
    resume: bool = False
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)

    def kept(self, case: Case) -> bool:
        """Whether the case stays as it is: made from the very files, and all that was written is there."""
        done = self.cases.get(case.id)
        return self.resume and done is not None and done["source"] == _source(case)

    def finish(self, case: Case, files: Sequence[Path], volumes: Mapping[str, Volume]) -> None:
        """Called after the files of the case are written."""
        self.cases[case.id] = {
            "source": _source(case),
            "files": [file.relative_to(self.folder).as_posix() for file in files],
            "volumes": {name: [volume.voxels, volume.ml] for name, volume in volumes.items()},
        }
        self.write()

    def write(self) -> None:
        """prediction.json and volumes.csv, as far as the cases are finished."""
        record = {
            "tailseg_prediction": 1,
            "identity": self.identity,
            **self.about,
            "expected": sorted(self.expected),
            "cases": self.cases,
        }
        write_json(self.folder / RECORD_FILE, record)
        volumes = {
            case: {name: Volume(*pair) for name, pair in done["volumes"].items()}
            for case, done in sorted(self.cases.items())
        }
        write_volumes(self.folder / VOLUMES_FILE, volumes)


def claim_folder(
    folder: Path,
    identity: Mapping[str, Any],
    about: Mapping[str, Any],
    expected: Collection[str],
    *,
    resume: bool = False,
    force: bool = False,
) -> PredictionFolder:
    """The right to write predictions of this identity into folder. Nothing is changed but what force removes.

    expected: names of the label files that will be written. resume: finished cases are kept; else they are predicted again.
    force: predictions of another identity that stand there are removed, all that were recorded and nothing else.
    Raises OptionError where predictions of another identity, or files that no prediction made, would be mixed with these.
    """
    identity = json.loads(json.dumps(identity))  # as it will be read back
    record = _read(folder / RECORD_FILE)
    recorded = {*record["expected"], *(name for done in record["cases"].values() for name in done["files"])}
    if strangers := sorted(set(_label_files(folder)) - recorded):
        others = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        raise OptionError(
            f"{folder} holds {strangers[0]}{others}, which no recorded prediction made; choose another folder for the output."
        )
    present = {name for name in recorded if (folder / name).is_file()}
    if record["identity"] == identity:
        whole = {case: done for case, done in record["cases"].items() if present.issuperset(done["files"])}
        names = frozenset((*expected, *record["expected"]))
        return PredictionFolder(folder, identity, about, names, resume and not force, whole)
    if present and not force:
        raise OptionError(
            f"{folder} holds predictions made with another {_differences(record['identity'], identity)}; choose another "
            "folder, or replace them with --force (in Python: force=True)."
        )
    if present:
        for name in present:
            (folder / name).unlink()
        (folder / RECORD_FILE).unlink()
    return PredictionFolder(folder, identity, about, frozenset(expected))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"identity": None, "expected": [], "cases": {}}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        assert record["tailseg_prediction"] == 1
        return {key: record[key] for key in ("identity", "expected", "cases")}
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise OptionError(f"{path} is no record of predictions; choose another folder for the output.") from error


def _label_files(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return [file.name for file in folder.iterdir() if file.name.endswith(_ENDINGS) and not file.name.startswith(".")]


def _differences(first: Any, second: Mapping[str, Any]) -> str:
    before = first if isinstance(first, Mapping) else {}
    return ", ".join(key for key in second if before.get(key) != second[key])


def _source(case: Case) -> list[list[Any]]:
    """Name, bytes and time of the case's files; of a folder of slices, of all of them together and of the latest."""
    told = []
    for path in case.images:
        stats = [file.stat() for file in (path.iterdir() if path.is_dir() else [path])]
        told.append([path.name, sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)])
    return told
