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
from tailseg.data.geometry import restore_labels, restore_probs
from tailseg.data.image import IMAGE_ENDINGS, Image, ImageError, write_image
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
    """The scans to segment: one file, or every scan of a folder.

    Channels of a case are `<case>_0000`, `<case>_0001`, ...; with one channel a file without such an ending is a case too.
    Raises ImageError naming what is missing.
    """
    if not source.exists():
        raise ImageError(f"{source} does not exist; give a scan, a folder of scans, or test, val or unlabelled.")
    files = [source] if source.is_file() else sorted(source.iterdir())
    files = [file for file in files if file.name.endswith(IMAGE_ENDINGS)]
    if not files:
        raise ImageError(f"{source} holds no scan; known endings are {', '.join(IMAGE_ENDINGS)}.")
    found: dict[str, Path] = {}
    for file in files:
        ending = next(ending for ending in IMAGE_ENDINGS if file.name.endswith(ending))
        stem = file.name.removesuffix(ending)
        numbered = len(stem) > 5 and stem[-5] == "_" and stem[-4:].isdigit()
        if not numbered and channels > 1:
            raise ImageError(f"{file} must be called <case>_0000{ending}: the run was trained on {channels} channels.")
        found.setdefault(stem[:-5] if numbered else stem, file)
    return [Case(case, _channel_files(file, case, channels), None) for case, file in sorted(found.items())]


def _channel_files(file: Path, case: str, channels: int) -> tuple[Path, ...]:
    if channels == 1:
        return (file,)
    ending = next(ending for ending in IMAGE_ENDINGS if file.name.endswith(ending))
    paths = tuple(file.with_name(f"{case}_{channel:04d}{ending}") for channel in range(channels))
    for path in paths:
        if not path.exists():
            raise ImageError(f"{path} is missing: the run was trained on {channels} channels.")
    return paths


def predict_cases(
    predictor: Predictor,
    cases: Sequence[Case],
    output: Path,
    *,
    label_values: Sequence[int],
    save_probs: bool = False,
    report: Callable[[int, int, str], None],
) -> list[Path]:
    """Write <case>.nii.gz for every case and labels.json with the classes' names and values, and the method's caveat if
    it has one; returns the label files.

    label_values: value of each class in the files. save_probs: also <case>_probs.npz, "probs" (K, D, H, W) float16.
    """
    names = dict(zip(predictor.method.task.classes, label_values, strict=True))
    caveat = predictor.method.caveat()
    write_json(output / "labels.json", {"labels": names} | ({"caveat": caveat} if caveat else {}))
    table = np.array(label_values, dtype=np.uint8)
    written = []
    for index, case in enumerate(cases):
        report(index, len(cases), case.id)
        image = load_images(case)
        if save_probs:
            probs = predictor.probs(image)
            labels = probs.argmax(0)
            with written_whole(output / f"{case.id}_probs.npz") as temporary:
                np.savez_compressed(temporary, probs=probs.astype(np.float16))
        else:
            labels = predictor.labels(image)
        path = output / f"{case.id}.nii.gz"
        write_image(path, Image(table[labels], image.affine))
        written.append(path)
        report(index + 1, len(cases), case.id)
    return written
