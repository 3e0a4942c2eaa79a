"""Segment whole scans: prepare, sliding windows, and back to the scan's own grid and orientation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tailseg.core import Method
from tailseg.data.dicom import is_series
from tailseg.data.geometry import restore_labels, restore_probs
from tailseg.data.image import IMAGE_ENDINGS, Image, ImageError, read_header, write_image
from tailseg.data.layouts import numbered
from tailseg.data.pictures import PICTURE_ENDINGS
from tailseg.data.prepare import Preparation, prepare_case
from tailseg.data.raw import Case, load_images
from tailseg.evaluate.sliding_window import sliding_window
from tailseg.files import write_json, written_whole
from tailseg.runtime import Runtime


@dataclass(frozen=True)
class Predictor:
    """A trained method with everything a new scan must go through before and after it.

    overlap, weighting, batch_size: of the sliding windows.
    """

    method: Method
    preparation: Preparation
    patch_size: tuple[int, ...]
    runtime: Runtime
    overlap: float = 0.5
    weighting: Literal["uniform", "gaussian"] = "uniform"
    batch_size: int = 4

    def labels(self, image: Image) -> np.ndarray:
        """(D, H, W) uint8 class indices on the scan's own grid. image: (C, D, H, W).

        Probabilities are interpolated back slab by slab, so that memory does not grow with the native grid times K.
        """
        prepared = prepare_case(image, None, self.preparation)
        return restore_labels(self._slabs(prepared.image), prepared.geometry)

    def probs(self, image: Image) -> np.ndarray:
        """(K, D, H, W) float32 on the scan's own grid; outside a crop the background has probability 1."""
        prepared = prepare_case(image, None, self.preparation)
        return restore_probs(self._slabs(prepared.image), prepared.geometry)

    def _slabs(self, image: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        self.method.eval()
        return sliding_window(
            self._predict,
            torch.from_numpy(image),
            self.patch_size,
            overlap=self.overlap,
            weighting=self.weighting,
            batch_size=self.batch_size,
            device=self.runtime.device,
        )

    def _predict(self, x: Tensor) -> Tensor:
        with torch.inference_mode(), self.runtime.autocast():
            x = x.contiguous(memory_format=self.runtime.memory_format(x.dim() - 2))
            return self.method.predict(x)


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


def label_ending(case: Case) -> str:
    """Of the label file that is written for a case: a picture's is a picture."""
    return ".png" if case.images[0].name.endswith(PICTURE_ENDINGS) else ".nii.gz"


def predict_cases(
    predictor: Predictor,
    cases: Sequence[Case],
    output: Path,
    *,
    label_values: Sequence[int],
    save_probs: bool = False,
    report: Callable[[int, int, str], None],
) -> list[Path]:
    """Write <case>.nii.gz, or <case>.png of a picture, for every case and labels.json with the classes' names and values,
    and the method's caveat if it has one; returns the label files.

    label_values: value of each class in the files. save_probs: also <case>_probs.npz, "probs" (K, D, H, W) float16.
    """
    names = dict(zip(predictor.method.task.classes, label_values, strict=True))
    caveat = predictor.method.caveat()
    write_json(output / "labels.json", {"labels": names} | ({"caveat": caveat} if caveat else {}))
    table = np.array(label_values, dtype=np.uint8)
    written = []
    for index, case in enumerate(cases):
        report(index, len(cases), case.id)
        image = load_images(case, predictor.method.task.in_channels)
        if save_probs:
            probs = predictor.probs(image)
            labels = probs.argmax(0)
            with written_whole(output / f"{case.id}_probs.npz") as temporary:
                np.savez_compressed(temporary, probs=probs.astype(np.float16))
        else:
            labels = predictor.labels(image)
        path = output / f"{case.id}{label_ending(case)}"
        write_image(path, Image(table[labels], image.affine))
        written.append(path)
        report(index + 1, len(cases), case.id)
    return written
