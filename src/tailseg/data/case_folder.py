"""One case's folder in a store: written under a temporary name, then moved into place whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from tailseg.core import IGNORE
from tailseg.data.preparation import PreparedCase, count_labels
from tailseg.data.store import CaseInfo

POSITIONS_PER_CLASS = 1000
FLOAT16_MAX = 65504.0
TEMPORARY = ".tmp"
"""Folder of a store in which its cases are written before they are complete."""


def write_case(
    store: Path,
    case: str,
    prepared: PreparedCase,
    num_classes: int,
    source: Mapping[str, tuple[int, int]],
    unannotated: tuple[int, ...] = (),
) -> CaseInfo:
    """Writes store/cases/<case>, replacing an older one; on failure nothing of it stays. source, unannotated: see CaseInfo.

    Raises ValueError if an intensity does not fit float16: clamping it would hide that the normalisation failed.
    """
    low, high = float(prepared.image.min()), float(prepared.image.max())
    if not (low >= -FLOAT16_MAX and high <= FLOAT16_MAX):
        raise ValueError(
            f"intensities from {low:g} to {high:g} after normalisation exceed float16's {FLOAT16_MAX:g}; "
            "choose another prepare.intensity"
        )
    folder = store / "cases" / case
    temporary, old = (store / TEMPORARY / f"{case}.{os.getpid()}.{age}" for age in ("new", "old"))
    temporary.mkdir(parents=True)
    try:
        info = _write_files(temporary, case, prepared, num_classes, source, unannotated)
        folder.parent.mkdir(exist_ok=True)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return info


def read_case_info(store: Path, case: str) -> CaseInfo | None:
    """The entry of a complete case folder; None if there is none that can be read."""
    try:
        return CaseInfo.from_dict(json.loads((store / "cases" / case / "case.json").read_bytes()))
    except (OSError, ValueError, TypeError, LookupError):
        return None


def _write_files(
    folder: Path,
    case: str,
    prepared: PreparedCase,
    num_classes: int,
    source: Mapping[str, tuple[int, int]],
    unannotated: tuple[int, ...],
) -> CaseInfo:
    geometry = prepared.geometry
    planes = (plane for channel in prepared.image for plane in channel)
    _write_array(folder / "image.npy", np.dtype(np.float16), prepared.image.shape, planes)
    class_voxels: tuple[int, ...] | None = None
    ignored: int | None = None
    if prepared.label is not None:
        counts = count_labels(prepared.label)  # (D, 256)
        totals = counts.sum(0)
        class_voxels, ignored = tuple(totals[:num_classes].tolist()), int(totals[IGNORE])
        _write_array(folder / "label.npy", np.dtype(np.uint8), prepared.label.shape, prepared.label)
        voxels, drawn = sample_positions(prepared.label, counts[:, :num_classes], case)
        with (folder / "positions.npz").open("wb") as file:
            np.savez(file, voxels=voxels, counts=drawn)
    info = CaseInfo(
        geometry.shape, prepared.spacing, class_voxels, ignored, prepared.constant_channels, prepared.lost_classes,
        geometry, source, unannotated,
    )  # fmt: skip
    (folder / "case.json").write_text(json.dumps(info.to_dict(), allow_nan=False), encoding="utf-8")
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return info


def _write_array(path: Path, dtype: np.dtype, shape: tuple[int, ...], planes: Iterable[np.ndarray]) -> None:
    """An .npy file, plane by plane: converts without a second array, and names a full disk as ndarray.tofile does not."""
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for plane in planes:
            file.write(np.ascontiguousarray(plane, dtype).data)


def sample_positions(label: np.ndarray, counts: np.ndarray, case: str) -> tuple[np.ndarray, np.ndarray]:
    """Up to POSITIONS_PER_CLASS voxels of every class, drawn evenly; the same ones for the same case and label.

    label: (D, H, W) uint8. counts: (D, K) voxels of each class in each plane.
    Returns voxels (n, 3) uint16, class after class and each in raster order, and how many there are of each class, (K,).
    """
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(case.encode()).digest()[:8]))
    drawn = np.minimum(counts.sum(0), POSITIONS_PER_CLASS)  # (K,)
    classes = np.repeat(np.arange(len(drawn)), drawn)  # (n,), as are planes, within and flat
    planes, within, flat = (np.empty(len(classes), np.int64) for _ in range(3))
    for c in np.flatnonzero(drawn):
        ends = counts[:, c].cumsum()  # (D,)
        ranks = np.sort(rng.choice(ends[-1], drawn[c], replace=False))  # among the class's voxels in raster order
        planes[classes == c] = at = np.searchsorted(ends, ranks, side="right")
        within[classes == c] = ranks - (ends - counts[:, c])[at]
    for d in np.unique(planes):
        here = planes == d
        order = np.argsort(label[d], axis=None, kind="stable")  # class after class, each in raster order
        firsts = counts[d].cumsum() - counts[d]  # (K,)
        flat[here] = order[firsts[classes[here]] + within[here]]
    rows, columns = np.unravel_index(flat, label.shape[1:])
    return np.column_stack([planes, rows, columns]).astype(np.uint16), drawn
