"""Segment whole scans: which ones a path means, and what is written for each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from tailseg.data.dicom import is_series
from tailseg.data.image import IMAGE_ENDINGS, Image, ImageError, read_header, write_image
from tailseg.data.layouts import numbered
from tailseg.data.pictures import PICTURE_ENDINGS
from tailseg.data.raw import Case, load_images
from tailseg.evaluate.clean_up import clean_up
from tailseg.evaluate.prediction_folder import claim_folder
from tailseg.evaluate.predictor import Ensemble, Predictor, Segmentation
from tailseg.evaluate.scores import LABELS_FILE
from tailseg.evaluate.uncertainty import write_map
from tailseg.evaluate.volumes import class_volumes
from tailseg.files import write_json, written_whole
from tailseg.options import OptionError, suggest

__all__ = ["Ensemble", "Maker", "Output", "Predictor", "find_cases", "label_ending", "predict_cases"]

FileFormat = Literal["nifti", "dicom-seg"]


def find_cases(source: Path, channels: int) -> list[Case]:
    """The scans to segment: one file, a folder of DICOM slices, or every scan of a folder, DICOM series being folders in it.

    Channels of a case are `<case>_0000`, `<case>_0001`, ...; a file without such an ending is a case too, if its header says
    that it holds all the channels.
    Raises ImageError naming what is missing.
    """
    if not source.exists():
        raise ImageError(f"{source} does not exist; give a scan, a folder of scans, or test, val or unlabelled.")
    files = [source] if source.is_file() or is_series(source) else sorted(source.iterdir())
    files = [file for file in files if file.name.endswith(IMAGE_ENDINGS) or is_series(file)]
    files = [file for file in files if not file.name.startswith(".")]
    if not files:
        if (source / "imagesTr").is_dir():
            raise ImageError(
                f"{source} is a data set; give one of its folders of scans, such as {source / 'imagesTr'}."
            )
        raise ImageError(
            f"{source} holds no scan; known endings are {', '.join(IMAGE_ENDINGS)}. A DICOM series is given as its folder."
        )
    pictures = [file for file in files if file.name.endswith(PICTURE_ENDINGS)]
    plain = set() if numbered([_stem(file) for file in pictures], channels) else set(pictures)
    found: dict[str, Path] = {}
    for file in files:
        stem = _stem(file)
        has_number = len(stem) > 5 and stem[-5] == "_" and stem[-4:].isdigit() and file not in plain
        if not has_number and channels > 1 and read_header(file)[2] != channels:
            raise ImageError(
                f"{file} must be called <case>_0000{file.name.removeprefix(stem)}: the run was trained on {channels} channels."
            )
        case = stem[:-5] if has_number else stem
        first = found.setdefault(case, file)
        if first is not file and (not has_number or _stem(first) in (stem, case)):
            raise ImageError(f"{first} and {file} are two scans of case '{case}'; move one elsewhere.")
    return [Case(case, _channel_files(file, case, channels), None) for case, file in sorted(found.items())]


def _stem(file: Path) -> str:
    """Without ending; a folder of slices has none."""
    return (
        file.name
        if file.is_dir()
        else file.name.removesuffix(next(ending for ending in IMAGE_ENDINGS if file.name.endswith(ending)))
    )


def _channel_files(file: Path, case: str, channels: int) -> tuple[Path, ...]:
    if channels == 1 or _stem(file) == case:
        return (file,)
    ending = file.name.removeprefix(_stem(file))
    paths = tuple(file.with_name(f"{case}_{channel:04d}{ending}") for channel in range(channels))
    if not paths[1].exists() and paths[0].exists() and read_header(paths[0])[2] == channels:
        return paths[:1]
    for path in paths:
        if not path.exists():
            raise ImageError(f"{path} is missing: the run was trained on {channels} channels.")
    return paths


def label_ending(case: Case, file_format: FileFormat = "nifti") -> str:
    """Of the label file that is written for a case: a picture's is a picture, whatever the format."""
    if is_picture(case):
        return ".png"
    return ".dcm" if file_format == "dicom-seg" else ".nii.gz"


def is_picture(case: Case) -> bool:
    return case.images[0].name.endswith(PICTURE_ENDINGS)


@dataclass(frozen=True)
class Output:
    """What is written for every case beside its labels, and how.

    probs: <case>_probs.npz, "probs" (K, D, H, W) float16, which no clean-up touches. uncertainty: uncertainty/<case>_entropy
    and, with several members, <case>_disagreement. clean_up: class -> operations on the labels. file_format: of the labels of
    scans; dicom-seg needs cases that are DICOM series.
    """

    probs: bool = False
    uncertainty: bool = False
    clean_up: Mapping[str, Sequence[str]] = field(default_factory=dict)
    file_format: FileFormat = "nifti"

    def check(self, cases: Sequence[Case]) -> None:
        """Raises ValueError for cases that cannot be written in this format."""
        if self.file_format not in get_args(FileFormat):
            raise OptionError(
                f"There is no format '{self.file_format}'. {suggest(self.file_format, get_args(FileFormat))}"
            )
        if self.file_format == "nifti":
            return
        for case in cases:
            if not case.images[0].is_dir():
                raise OptionError(
                    f"{case.images[0]} is no DICOM series folder, which a DICOM SEG refers to; write its labels as NIfTI."
                )
        if find_spec("highdicom") is None:
            raise OptionError("writing DICOM SEG needs highdicom: pip install 'tailseg[dicom]'")


@dataclass(frozen=True)
class Maker:
    """Who predicts, for whoever finds the files. runs: digests of their checkpoints and the like. name: of the method.

    about: more for the reader of prediction.json. notes: what to bear in mind; they stand in labels.json.
    """

    runs: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = "TailSeg"
    about: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


def predict_cases(
    ensemble: Ensemble,
    cases: Sequence[Case],
    folder: Path,
    *,
    label_values: Sequence[int],
    output: Output = Output(),
    maker: Maker = Maker(),
    resume: bool = False,
    force: bool = False,
    report: Callable[[int, int, str], None],
) -> list[Path]:
    """Write <case>.nii.gz, <case>.png of a picture, or <case>.dcm for every case; volumes.csv; labels.json with the classes'
    names and values, the clean-up and the caveats; and prediction.json, which says who made them. Returns the label files.

    label_values: value of each class in the files; in a DICOM SEG classes are segments. resume, force: see
    prediction_folder.claim_folder, which refuses to mix.
    """
    task = ensemble.predictors[0].method.task
    output.check(cases)
    for picture in {is_picture(case) for case in cases}:
        if ensemble.mirror:
            ensemble.mirror.check(picture=picture)
    identity = {
        "tailseg": version("tailseg"),
        "runs": sorted(maker.runs),
        "options": {
            **maker.options,
            "mirror": sorted(ensemble.mirror.axes) if ensemble.mirror else [],
            "clean_up": {name: list(each) for name, each in output.clean_up.items()},
            "format": output.file_format,
            "probabilities": output.probs,
            "uncertainty": output.uncertainty,
        },
    }
    paths = {case.id: folder / f"{case.id}{label_ending(case, output.file_format)}" for case in cases}
    names = [path.name for path in paths.values()]
    claimed = claim_folder(folder, identity, maker.about, names, resume=resume, force=force)
    write_json(folder / LABELS_FILE, _labels_file(ensemble, label_values, output, maker))
    claimed.write()
    table = np.array(label_values, dtype=np.uint8)
    for index, case in enumerate(cases):
        report(index, len(cases), case.id)
        if not claimed.kept(case):
            image = load_images(case, task.in_channels)
            found = ensemble.segment(
                image, probs=output.probs, uncertainty=output.uncertainty, picture=is_picture(case), scratch=folder
            )
            if output.clean_up:
                clean_up(found.labels, task.classes, output.clean_up)
            path = paths[case.id]
            files = [path, *_write_beside(folder, case, found, image)]
            if path.name.endswith(".dcm"):
                _write_dicom(path, found.labels, case, image, task.classes, maker)
            else:
                write_image(path, Image(table[found.labels], image.affine))
            spacing = None if is_picture(case) else image.spacing
            claimed.finish(case, files, class_volumes(found.labels, task.classes, spacing))
        report(index + 1, len(cases), case.id)
    return list(paths.values())


def _labels_file(ensemble: Ensemble, label_values: Sequence[int], output: Output, maker: Maker) -> dict[str, Any]:
    names = dict(zip(ensemble.predictors[0].method.task.classes, label_values, strict=True))
    caveats = dict.fromkeys(predictor.method.caveat() for predictor in ensemble.predictors)
    told = {
        "caveat": " ".join(filter(None, caveats)),
        "clean_up": {name: list(each) for name, each in output.clean_up.items()},
        "notes": list(maker.notes),
    }
    return {"labels": names} | {key: value for key, value in told.items() if value}


def _write_beside(folder: Path, case: Case, found: Segmentation, image: Image) -> list[Path]:
    """What is asked for beside the labels; returns the files."""
    written: list[Path] = []
    if found.probs is not None:
        written.append(folder / f"{case.id}_probs.npz")
        with written_whole(written[-1]) as temporary:
            np.savez_compressed(temporary, probs=found.probs.astype(np.float16))
    for name, steps in (("entropy", found.entropy), ("disagreement", found.disagreement)):
        if steps is not None:
            written.append(folder / "uncertainty" / f"{case.id}_{name}{label_ending(case)}")
            write_map(written[-1], steps, image.affine)
    return written


def _write_dicom(
    path: Path, labels: np.ndarray, case: Case, image: Image, classes: Sequence[str], maker: Maker
) -> None:
    from tailseg.data.dicom_seg import write_seg

    write_seg(
        path,
        labels,
        case.images[0],
        classes,
        affine=image.affine,
        description=f"{maker.name} segmentation",
        algorithm=maker.name,
        algorithm_version=hashlib.sha256("".join(sorted(maker.runs)).encode()).hexdigest()[:16],
    )
