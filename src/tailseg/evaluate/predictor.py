"""Trained methods that say what a scan holds: one run, or several whose probabilities are averaged.

Runs that prepare scans alike and look at them through the same windows are averaged window by window: the scan is prepared
once, and no more is held than one run needs. Where they differ, each goes back to the scan's own grid, and the average is
taken there, in a file on the disk: K times the scan is never held in memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tailseg.core import Method
from tailseg.data.geometry import Geometry, native_planes, restore_labels, restore_probs
from tailseg.data.image import Image
from tailseg.data.prepare import Preparation, prepare_case
from tailseg.evaluate.mirror import PLAIN, Mirror, View
from tailseg.evaluate.sliding_window import batch_for, sliding_window
from tailseg.evaluate.uncertainty import entropy, to_bytes
from tailseg.files import WriteError
from tailseg.runtime import Runtime

Slabs = Iterator[tuple[int, Tensor]]


@dataclass(frozen=True)
class Predictor:
    """A trained method with everything a new scan must go through before and after it.

    overlap, weighting, batch_size: of the sliding windows, see sliding_window.
    """

    method: Method
    preparation: Preparation
    patch_size: tuple[int, ...]
    runtime: Runtime
    overlap: float = 0.5
    weighting: Literal["uniform", "gaussian"] = "uniform"
    batch_size: int | None = None

    def labels(self, image: Image) -> np.ndarray:
        """(D, H, W) uint8 class indices on the scan's own grid. image: (C, D, H, W).

        Probabilities are interpolated back slab by slab, so that memory does not grow with the native grid times K.
        """
        return Ensemble((self,)).segment(image).labels

    def probs(self, image: Image) -> np.ndarray:
        """(K, D, H, W) float32 on the scan's own grid; outside a crop the background has probability 1."""
        probs = Ensemble((self,)).segment(image, probs=True).probs
        assert probs is not None
        return probs

    def predict(self, x: Tensor) -> Tensor:
        """Probabilities (B, K, *patch) of windows (B, C, *patch) on the device."""
        with self.runtime.autocast():
            return self.method.predict(self._laid_out(x))

    def predict_each(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The same, and those of every network of the method alone."""
        with self.runtime.autocast():
            return self.method.predict_each(self._laid_out(x))

    def _laid_out(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=self.runtime.memory_format(x.dim() - 2))

    def sees_as(self, other: Predictor) -> bool:
        """Whether both are shown the same windows of the same prepared scan."""
        return all(
            getattr(self, name) == getattr(other, name)
            for name in ("preparation", "patch_size", "overlap", "weighting")
        )


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What a scan holds, on its own grid.

    labels: (D, H, W) uint8 class indices. probs: (K, D, H, W) float32. entropy, disagreement: (D, H, W) uint8, in steps of
    1 / 255 (tailseg.evaluate.uncertainty); disagreement is None where a single network was asked. None is not asked for.
    """

    labels: np.ndarray
    probs: np.ndarray | None = None
    entropy: np.ndarray | None = None
    disagreement: np.ndarray | None = None


@dataclass(frozen=True)
class Ensemble:
    """Runs of one task whose probabilities are averaged, each counting once, over mirrored views if there are any."""

    predictors: tuple[Predictor, ...]
    mirror: Mirror | None = None

    @property
    def groups(self) -> list[tuple[Predictor, ...]]:
        """Those that see the same windows, together."""
        groups: list[list[Predictor]] = []
        for predictor in self.predictors:
            group = next((group for group in groups if predictor.sees_as(group[0])), None)
            if group is None:
                groups.append([predictor])
            else:
                group.append(predictor)
        return [tuple(group) for group in groups]

    def segment(
        self,
        image: Image,
        *,
        probs: bool = False,
        uncertainty: bool = False,
        picture: bool = False,
        scratch: Path | None = None,
    ) -> Segmentation:
        """image: (C, D, H, W). picture: the patient's axes are unknown. scratch: folder for the average of runs that are
        prepared in different ways, 4 bytes a voxel and class; default the system's. Raises OptionError for axes that cannot
        be mirrored, WriteError for a full disk.
        """
        groups = self.groups
        passes = (_Pass(group, self.mirror, image, uncertainty, picture) for group in groups)  # each prepares the scan
        if len(groups) > 1:
            return _averaged_on_own_grid(passes, len(self.predictors), image, probs, uncertainty, scratch)
        (only,) = passes
        if uncertainty:
            return _with_maps(only, probs)
        if not probs:
            return Segmentation(restore_labels(only.slabs(), only.geometry))
        restored = restore_probs(only.slabs(), only.geometry)
        return Segmentation(restored.argmax(0).astype(np.uint8), restored)


@dataclass
class _Pass:
    """One scan, prepared for predictors that see the same windows."""

    predictors: tuple[Predictor, ...]
    mirror: Mirror | None
    image: Image
    uncertainty: bool
    picture: bool
    prepared: np.ndarray = field(init=False)
    geometry: Geometry = field(init=False)
    views: tuple[View, ...] = field(init=False)

    def __post_init__(self) -> None:
        prepared = prepare_case(self.image, None, self.predictors[0].preparation)
        self.prepared, self.geometry = prepared.image, prepared.geometry
        self.views = self.mirror.views(self.geometry, picture=self.picture) if self.mirror else (PLAIN,)

    @property
    def classes(self) -> int:
        return self.predictors[0].method.task.num_classes

    def slabs(self) -> Slabs:
        """Probabilities (K, d, H, W) of the prepared grid; (K + 1, d, H, W) with the disagreement of the members, if there
        are several and it is wanted.

        It is taken on the prepared grid, and interpolated from there: on a finer one, the voxels between two classes would
        look disputed where all agree.
        """
        first = self.predictors[0]
        for predictor in self.predictors:
            predictor.method.eval()
        slabs = sliding_window(
            self._average_with_entropies if self.uncertainty else self._average,
            torch.from_numpy(self.prepared),
            first.patch_size,
            overlap=first.overlap,
            weighting=first.weighting,
            batch_size=min(predictor.batch_size or batch_for(predictor.patch_size) for predictor in self.predictors),
            device=first.runtime.device,
        )
        return self._with_disagreement(slabs) if self.uncertainty else slabs

    def _average(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            total: Tensor | None = None
            for predictor in self.predictors:
                for view in self.views:
                    probs = view.back(predictor.predict(view.of(x)))
                    total = probs if total is None else total + probs
            assert total is not None
            members = len(self.predictors) * len(self.views)
            return total if members == 1 else total / members

    def _average_with_entropies(self, x: Tensor) -> Tensor:
        """(B, K, *S) the probabilities; with several members also (B, K, *S) the mean of theirs, which differs from it where
        a method averages logits, and (B, 1, *S) the mean of their entropies."""
        members = 0
        with torch.inference_mode():
            total: list[Tensor] = []
            for predictor in self.predictors:
                for view in self.views:
                    probs, each = predictor.predict_each(view.of(x))
                    members += len(each)
                    entropies = torch.stack([entropy(one, 1) for one in each]).mean(0)[:, None]
                    found = [view.back(probs), view.back(torch.stack(each).mean(0)), View(view.dims).back(entropies)]
                    total = [a + b for a, b in zip(total, found, strict=True)] if total else found
            if members == 1:
                return total[0]
            return torch.cat(total, 1) / (len(self.predictors) * len(self.views))

    def _with_disagreement(self, slabs: Slabs) -> Slabs:
        for start, slab in slabs:
            if len(slab) == self.classes:
                yield start, slab
                continue
            probs, mean, entropies = slab.split([self.classes, self.classes, 1])
            disagreement = (entropy(mean, 0)[None] - entropies).clamp(min=0)
            yield start, torch.cat([probs, disagreement])


def _with_maps(only: _Pass, want_probs: bool) -> Segmentation:
    shape, classes = only.geometry.source_shape, only.classes
    labels, unsure, disputed = (np.zeros(shape, np.uint8) for _ in range(3))
    probs = np.zeros((classes, *shape), np.float32) if want_probs else None
    if probs is not None:
        probs[0] = 1
    views = [only.geometry.view(array) for array in (labels, unsure, disputed)]
    several = False
    for first, planes in native_planes(only.slabs(), only.geometry):
        rows, found = slice(first, first + len(planes)), planes[:, :classes]
        views[0][rows] = found.max(1).indices.to(torch.uint8).cpu().numpy()
        views[1][rows] = to_bytes(entropy(found, 1))
        if several := planes.shape[1] > classes:
            views[2][rows] = to_bytes(planes[:, classes])
        if probs is not None:
            only.geometry.view(probs)[:, rows] = found.transpose(0, 1).cpu().numpy()
    return Segmentation(labels, probs, unsure, disputed if several else None)


def _averaged_on_own_grid(
    passes: Iterable[_Pass], runs: int, image: Image, want_probs: bool, uncertainty: bool, scratch: Path | None
) -> Segmentation:
    """Each pass counts as often as it has runs. The mutual information of all members is that between the passes and, on
    average, that within them."""
    shape = image.array.shape[1:]
    certain = np.zeros(shape, np.float32) if uncertainty else None  # mean of the passes' entropies less disagreements
    with tempfile.TemporaryFile(dir=scratch) as file:
        total = np.empty(0)
        for each in passes:
            classes = each.classes
            if not total.size:
                total = _on_disk(file, (classes, *shape), scratch)
            share = len(each.predictors) / runs
            view = each.geometry.view(total)
            total[0] += share
            view[0] -= share  # outside the crop all is background
            for first, planes in native_planes(each.slabs(), each.geometry):
                rows = slice(first, first + len(planes))
                view[:, rows] += share * planes[:, :classes].transpose(0, 1).cpu().numpy()
                if certain is not None:
                    own = entropy(planes[:, :classes], 1)
                    own = own - planes[:, classes] if planes.shape[1] > classes else own
                    each.geometry.view(certain)[rows] += share * own.cpu().numpy()
        labels = np.empty(shape, np.uint8)
        unsure, disputed = (np.empty(shape, np.uint8) if uncertainty else None for _ in range(2))
        for plane in range(shape[0]):
            found = np.array(total[:, plane])  # (K, H, W)
            labels[plane] = found.argmax(0)
            if unsure is not None and disputed is not None and certain is not None:
                spread = entropy(torch.from_numpy(found), 0)
                unsure[plane] = to_bytes(spread)
                disputed[plane] = to_bytes(spread - torch.from_numpy(certain[plane]))
        return Segmentation(labels, np.array(total) if want_probs else None, unsure, disputed)


def _on_disk(file: object, shape: tuple[int, ...], scratch: Path | None) -> np.ndarray:
    """Zeros in a file. The space is taken at once: a disk that fills up under a mapped file ends the process."""
    size = int(np.prod(shape)) * np.dtype(np.float32).itemsize
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # pyright: ignore[reportAttributeAccessIssue]
    except OSError as error:
        where = scratch or Path(tempfile.gettempdir())
        raise WriteError(
            f"Averaging runs of different preparations needs {size / 1e9:.1f} GB in {where} for a while: {error.strerror}; "
            "free some space."
        ) from error
    return np.memmap(file, np.float32, "w+", shape=shape)  # pyright: ignore[reportArgumentType, reportCallIssue]
