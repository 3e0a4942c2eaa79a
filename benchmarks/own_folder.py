"""Make of a data set what a person has who annotated a few scans, and put the other labels away for scoring.

    python benchmarks/own_folder.py $TAILSEG_DATA/Dataset110_Synapse my_scans --split synapse_4

The folder holds the images of all cases, the label files of the split's labelled cases, and dataset.json; it knows of no split.
The label files of all other cases go to <folder>_hidden, which `tailseg evaluate PREDICTIONS <folder>_hidden` takes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tailseg.data.raw import DataError, read_raw
from tailseg.data.splits import read_split
from tailseg.files import write_json


@dataclass(frozen=True)
class OwnFolder:
    """labelled: case ids with a label file in folder. hidden: a data set of the labels of the others, without images."""

    folder: Path
    hidden: Path
    labelled: tuple[str, ...]
    unlabelled: tuple[str, ...]


def make_own_folder(source: Path, folder: Path, split: str) -> OwnFolder:
    """source: nnU-Net's raw layout. split: in its splits.json. Nothing that exists is written over.

    Raises DataError where folder or <folder>_hidden exists, or the split is not there.
    """
    dataset = read_raw(source)
    labelled = read_split(dataset, split).labelled
    others = [case for id, case in dataset.cases.items() if id not in labelled]
    hidden = folder.with_name(f"{folder.name}_hidden")
    for path in (folder, hidden):
        if path.exists():
            raise DataError(f"{path} exists already; remove it, or name another folder.")
    _copy((image for case in dataset.cases.values() for image in case.images), folder / "imagesTr")
    _copy((label for id in labelled if (label := dataset.cases[id].label)), folder / "labelsTr")
    _copy((case.label for case in others if case.label), hidden / "labelsTr")
    description = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    write_json(folder / "dataset.json", description | {"numTraining": len(labelled)})
    write_json(hidden / "dataset.json", description | {"numTraining": sum(case.label is not None for case in others)})
    return OwnFolder(folder, hidden, labelled, tuple(case.id for case in others))


def _copy(files: Iterable[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a data set in nnU-Net's raw layout with splits.json")
    parser.add_argument("folder", type=Path, help="what to make")
    parser.add_argument("--split", required=True, help="whose labelled cases keep their label files")
    arguments = parser.parse_args()
    try:
        own = make_own_folder(arguments.source, arguments.folder, arguments.split)
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    print(
        f"{own.folder}: {len(own.labelled)} labelled scans ({', '.join(own.labelled)}), {len(own.unlabelled)} without a label."
    )
    print(f"Their labels, for scoring: tailseg evaluate PREDICTIONS {own.hidden}")


if __name__ == "__main__":
    main()
