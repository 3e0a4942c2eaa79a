"""Preparing scans: one large CT beside the way of a textbook, and a whole data set beside the speed of its codec.

The large scan is made up: a phantom, enlarged to 512 x 512 x 150 and with noise, in NIfTI compressed with gzip. The data set
is Synapse's 30 scans where they are (--data), else 30 phantoms of about their size.
"""

from __future__ import annotations

import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from draw import make_scan, scratch, write_dataset
from suite import Benchmark, Contestant, Settings, number

from tailseg.data.case_folder import write_case
from tailseg.data.image import Image
from tailseg.data.intensity import Window
from tailseg.data.phantom import make_phantom
from tailseg.data.preparation import PREPARATIONS
from tailseg.data.prepare import prepare_case, prepare_dataset
from tailseg.data.raw import RawDataset, load_case, read_raw

SMALL = "TAILSEG_SPEED_SMALL" in os.environ
SHAPE = (30, 96, 96) if SMALL else (150, 512, 512)
SPACING = (3.0, 4.0, 4.0) if SMALL else (3.0, 0.75, 0.75)  # of a field of 384 x 384 x 450 mm
CASES = 7 if SMALL else 30
PREPARATION = PREPARATIONS["ct"]


@cache
def large_scan() -> RawDataset:
    voxels, label = make_scan(SHAPE)
    d, h, w = SPACING
    image = Image(voxels, np.diag([-w, -h, d, 1.0]))  # LPS, as most CTs are stored
    return write_dataset(scratch() / "large", image, label, 1, ".nii.gz")


def mine(raw: RawDataset) -> Callable[[], Any]:
    """Raw files to a fresh store, in this process."""

    def work() -> list[torch.Tensor]:
        with tempfile.TemporaryDirectory(dir=scratch()) as folder:
            store = prepare_dataset(raw, PREPARATION, Path(folder))
            return _loaded(store.path / "cases" / "c00")

    return work


def plain(raw: RawDataset) -> Callable[[], Any]:
    """nibabel's get_fdata, whole arrays in float64 until they are written."""
    case = raw.cases["c00"]
    window, crop = PREPARATION.intensity, PREPARATION.crop
    assert isinstance(window, Window) and crop is not None and case.label is not None

    def work() -> list[torch.Tensor]:
        nifti: Any = nib.as_closest_canonical(nib.load(case.images[0]))  # pyright: ignore[reportPrivateImportUsage]
        truth: Any = nib.as_closest_canonical(nib.load(case.label))  # pyright: ignore[reportPrivateImportUsage, reportArgumentType]
        volume, label = nifti.get_fdata().transpose(2, 1, 0), truth.get_fdata().transpose(2, 1, 0)
        spacing = nifti.header.get_zooms()[::-1]
        body = np.argwhere(volume > crop.threshold)
        margin = [int(np.ceil(crop.margin / mm)) for mm in spacing]
        start = np.maximum(body.min(0) - margin, 0)
        box = tuple(slice(a, b) for a, b in zip(start, body.max(0) + 1 + margin, strict=True))
        volume, label = np.ascontiguousarray(volume[box]), np.ascontiguousarray(label[box])
        shape = PREPARATION.target_shape(volume.shape, spacing)
        voxels = F.interpolate(torch.from_numpy(volume)[None, None], size=shape, mode="trilinear")
        values = F.interpolate(torch.from_numpy(label)[None, None], size=shape, mode="nearest-exact")
        voxels = (voxels.clamp(window.low, window.high) - window.low) / (window.high - window.low)
        with tempfile.TemporaryDirectory(dir=scratch()) as folder:
            np.save(Path(folder) / "image.npy", voxels[0].numpy().astype(np.float16))
            np.save(Path(folder) / "label.npy", values[0, 0].numpy().astype(np.uint8))
            return _loaded(Path(folder))

    return work


def _loaded(folder: Path) -> list[torch.Tensor]:
    return [torch.from_numpy(np.load(folder / name)) for name in ("image.npy", "label.npy")]


def contestants(settings: Settings) -> list[Contestant]:
    raw = large_scan()
    return [Contestant("tailseg", mine(raw)), Contestant("plain", plain(raw), own_allocator=True)]


# --- facts


def facts(settings: Settings) -> Mapping[str, str]:
    return {**stages(large_scan()), **whole_set(settings)}


def stages(raw: RawDataset, rounds: int = 3) -> dict[str, str]:
    """Where the processor's time goes for the large scan: medians, and inflating alone as the codec's limit."""
    case = raw.cases["c00"]
    found: dict[str, list[float]] = {"read": [], "resample and normalise": [], "write": [], "inflate alone": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=scratch()) as folder:
            (Path(folder) / "cases").mkdir()
            times = [time.process_time()]
            read = load_case(case, raw)
            times.append(time.process_time())
            prepared = prepare_case(*read, PREPARATION)
            times.append(time.process_time())
            write_case(Path(folder), case.id, prepared, len(raw.classes), {})
            times.append(time.process_time())
            inflate(_files(raw))
            times.append(time.process_time())
        for name, start, end in zip(found, times, times[1:], strict=False):
            found[name].append(end - start)
    seconds = {name: sorted(each)[rounds // 2] for name, each in found.items()}
    limit = seconds.pop("inflate alone")
    total = sum(seconds.values())
    shares = ", ".join(f"{name} {100 * each / total:.0f} %" for name, each in seconds.items())
    size = np.prod(SHAPE) * 4 / 1e6
    return {
        "one large scan and its label": f"{number(total)} s of processor ({shares}); inflating alone {number(limit)} s",
        "one large scan in float32": f"{size:.0f} MB",
    }


def whole_set(settings: Settings) -> dict[str, str]:
    """Seconds for all cases with one and two workers, beside those of inflating the same files on one core."""
    folder = settings.data / "Dataset110_Synapse" if settings.data else None
    if folder is not None and folder.is_dir() and not SMALL:
        raw = read_raw(folder)
    else:
        shape = (20, 32, 32) if SMALL else (94, 105, 128)
        raw = make_phantom(scratch() / "phantoms", cases=CASES, labelled=CASES, shape=shape, spacing=(3.0, 3.0, 2.5))
    begin, cpu = time.perf_counter(), time.process_time()
    content = inflate(_files(raw)) / 1e6
    limit, limit_cpu = time.perf_counter() - begin, time.process_time() - cpu
    what = f"{len(raw.cases)} scans of {raw.name}, {content:.0f} MB inflated"
    found = {f"{what}: inflating alone, one core": _speed(content, limit, limit_cpu)}
    for workers in (1, 2):
        peaks: list[int] = []
        with tempfile.TemporaryDirectory(dir=scratch()) as store:
            begin, cpu = time.perf_counter(), time.process_time()
            prepare_dataset(
                raw, PREPARATION, Path(store), workers=workers,
                progress=lambda done, total, case, peaks=peaks: peaks.extend(_peaks_of_workers()),
            )  # fmt: skip
            seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        told = _speed(content, seconds, cpu if workers == 1 else None)
        held = f"; the largest process held {max(peaks) / 1e6:.0f} MB, libraries included" if peaks else ""
        found[f"{what}: {workers} worker{'s' * (workers > 1)}"] = told + held
    return found


def _speed(megabytes: float, wall: float, cpu: float | None) -> str:
    processor = "" if cpu is None else f", {number(cpu)} s of processor"
    return f"{number(wall)} s{processor}, {number(megabytes / wall)} MB/s"


def _files(raw: RawDataset) -> list[Path]:
    return [path for case in raw.cases.values() for path in (*case.images, *([case.label] if case.label else []))]


def inflate(paths: Iterable[Path]) -> int:
    """Bytes inside gzip files; zlib alone, nothing kept."""
    total = 0
    for path in paths:
        member = zlib.decompressobj(16 + zlib.MAX_WBITS)
        with path.open("rb") as file:
            while piece := file.read(2**17):
                total += len(member.decompress(piece))
    return total


def _peaks_of_workers() -> list[int]:
    """Bytes that each process below this one held at most so far; none where there is no /proc."""
    parents: dict[int, int] = {}
    peaks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        except OSError:
            continue  # it has just ended
        if "VmHWM" in lines:
            parents[int(path.parent.name)] = int(lines["PPid"])
            peaks[int(path.parent.name)] = int(lines["VmHWM"].split()[0]) * 1024
    below = {os.getpid()}
    while more := {process for process, parent in parents.items() if parent in below} - below:
        below |= more
    return [peaks[process] for process in below - {os.getpid()}]


BENCHMARKS = (
    Benchmark(
        "prepare",
        "A CT of 512 x 512 x 150 with its label, from NIfTI to the store: turned, cropped, resampled, windowed.",
        ">= codec speed per core x cores; memory of one scan per worker",
        contestants,
        tolerance={"plain": 2**-10},  # of two half-precision numbers, either side of a tie
        facts=facts,
        remark="plain: nibabel's get_fdata and whole arrays in float64; it samples no positions and counts no voxels.",
    ),
)
