"""Drawing patches: from the memory-mapped store, from whole prepared volumes, and as the released loaders do; and whether a
step ever waits for the loader.

Scans are made up: a phantom's anatomy, enlarged to the size of a real scan, with noise. They lie in a temporary folder and in
the page cache. Every contestant cuts the same patches, as tensors of one batch, image and label; flips and turns, which
TailSeg does on the device for whole batches, are left out for all.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from peers import load
from suite import Benchmark, Contestant, Settings, number
from torch import Tensor

from tailseg.checks import example_task
from tailseg.components import make_build, make_method
from tailseg.core import Batch, Progress
from tailseg.data.image import Image, write_image
from tailseg.data.intensity import MinMax, Window, ZScore
from tailseg.data.phantom import CLASSES, make_case
from tailseg.data.preparation import Preparation
from tailseg.data.prepare import prepare_dataset
from tailseg.data.raw import RawDataset, read_raw
from tailseg.data.store import Store
from tailseg.data.stream import PatchBatchRequest, PatchRequest, PatchSampler, PatchStream
from tailseg.files import write_json
from tailseg.runtime import Runtime, RuntimeOptions, keep_freed_memory

Shape = tuple[int, int, int]
SMALL = "TAILSEG_SPEED_SMALL" in os.environ
SAMPLES, BATCHES = 2, 10
"""Of a turn: patches of a batch, and batches, so that what counts is a loader under way and not its first memory."""
SEED = 7
HU = (-75, 275)


@dataclass(frozen=True)
class Scans:
    """Made-up scans of one kind. scan: voxels as stored by their maker. prepared: on the grid that patches are cut from."""

    name: str
    scan: Shape
    prepared: Shape
    patch: tuple[int, ...]
    preparation: Preparation
    batch: tuple[int, int] = (2, 2)
    cases: int = 4


_DHC = Preparation(
    orientation="file",
    grid=(None, 48, 48) if SMALL else (None, 256, 256),
    label_interpolation="legacy-nearest",
    intensity=Window(low=HU[0], high=HU[1], rescale="volume"),
)
if SMALL:
    CT = Scans("DHC", (30, 96, 96), (30, 48, 48), (16, 32, 32), _DHC)
    LA = Scans("LA", (40, 44, 24), (40, 44, 24), (28, 28, 20), Preparation(orientation="file", intensity=ZScore()))
    ACDC = Scans("ACDC", (10, 32, 32), (10, 32, 32), (32, 32), Preparation(intensity=MinMax()), (6, 6), 4)
else:
    CT = Scans("DHC", (150, 512, 512), (150, 256, 256), (64, 128, 128), _DHC)
    # what UA-MT's preparation leaves of a scan of 576 x 576 x 88: a box around the atrium, 25 voxels wider
    LA = Scans(
        "LA", (176, 184, 88), (176, 184, 88), (112, 112, 80), Preparation(orientation="file", intensity=ZScore())
    )
    ACDC = Scans("ACDC", (10, 256, 256), (10, 256, 256), (256, 256), Preparation(intensity=MinMax()), (12, 12), 24)


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tailseg-speed-")


def scratch() -> Path:
    """A folder that goes with this process."""
    return Path(_scratch().name)


def make_scan(shape: Shape, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """HU int16 and labels uint8, (D, H, W): a phantom, its voxels repeated up to shape, with noise."""
    small = tuple(max(8, side // 4) for side in shape)
    image, label = make_case(seed, shape=(small[0], small[1], small[2]), spacing=(12.0, 6.0, 6.0))
    at = np.ix_(*(np.arange(side) * few // side for side, few in zip(shape, small, strict=True)))
    noise = np.random.default_rng(seed).integers(-12, 13, shape, np.int16)
    return image.array[at] + noise, label.array[at]


@cache
def raw_scan(scans: Scans) -> tuple[np.ndarray, np.ndarray]:
    """All within DHC's window, whose two bounds are reached in a whole block of voxels: clipping and averaging then commute."""
    scan, label = make_scan(scans.scan)
    scan = scan.clip(*HU)
    scan[:2, :4, :4], scan[:2, :4, 4:8] = HU
    return scan, label


@cache
def store_of(scans: Scans) -> Store:
    """All cases hold the one scan, each in files of its own."""
    image, label = raw_scan(scans)
    raw = write_dataset(scratch() / scans.name, Image(image, np.eye(4)), label, scans.cases, ".nii")
    return prepare_dataset(raw, scans.preparation, scratch() / "stores")


def write_dataset(root: Path, image: Image, label: np.ndarray, cases: int, ending: str) -> RawDataset:
    """Cases c00, c01, ... that are one and the same file."""
    for folder, suffix, array in (("imagesTr", "_0000", image.array), ("labelsTr", "", label)):
        first = root / folder / f"c00{suffix}{ending}"
        write_image(first, Image(array, image.affine))
        for case in range(1, cases):
            (root / folder / f"c{case:02d}{suffix}{ending}").hardlink_to(first)
    labels = {name: value for value, name in enumerate(CLASSES)}
    description = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": cases, "file_ending": ending}
    write_json(root / "dataset.json", description)
    return read_raw(root)


def starts(scans: Scans) -> list[list[Shape]]:
    """Where the released RandomCrop goes after np.random.seed(SEED), batch by batch: three numbers a sample."""
    random = np.random.RandomState(SEED)
    free = [size - side for size, side in zip(scans.prepared, scans.patch, strict=True)]
    drawn = [[[int(random.randint(0, slack)) for slack in free] for _ in range(SAMPLES)] for _ in range(BATCHES)]
    return [[(d, h, w) for d, h, w in batch] for batch in drawn]


class _InTurn(PatchStream):
    """Cuts a batch when it is asked for, so that its time falls into the turn."""

    AHEAD = 1


class _Fixed(PatchSampler):
    """Draws the very same batches again and again, all of labelled patches of the first case."""

    batches: Iterator[list[PatchRequest]] = iter(())

    def draw(self) -> PatchBatchRequest:
        return PatchBatchRequest(next(self.batches), [])


def sampler(scans: Scans, kind: type[PatchSampler] = PatchSampler) -> PatchSampler:
    store = store_of(scans)
    cases = sorted(store.cases)
    half = len(cases) // 2
    shapes = {case: store.shape(case) for case in cases}
    return kind(store, shapes, cases[:half], cases[half:], scans.patch, scans.batch, seed=SEED)


def mine(scans: Scans) -> Callable[[], list[Tensor]]:
    drawn = sampler(scans, _Fixed)
    assert isinstance(drawn, _Fixed)
    drawn.batches = cycle([[PatchRequest("c00", start) for start in batch] for batch in starts(scans)])
    stream = _InTurn(drawn, workers=1)
    return partial(in_turn, lambda: labelled(next(stream).batch))


def labelled(batch: Batch) -> list[Tensor]:
    return [batch.x_l, batch.y_l]


def in_turn(draw: Callable[[], list[Tensor]]) -> list[Tensor]:
    """BATCHES one after the other, each forgotten as after a step; the last one."""
    for _ in range(BATCHES - 1):
        draw()
    return draw()


def plain(scans: Scans) -> Callable[[], list[Tensor]]:
    """The prepared arrays read whole for every sample, cropped afterwards."""
    folder = store_of(scans).path / "cases" / "c00"
    d, h, w = scans.patch
    drawn = cycle(starts(scans))

    def batch() -> list[Tensor]:
        images, labels = [], []
        for k, j, i in next(drawn):
            image, label = np.load(folder / "image.npy"), np.load(folder / "label.npy")
            images.append(torch.from_numpy(image[:, k : k + d, j : j + h, i : i + w]).float())
            labels.append(torch.from_numpy(label[k : k + d, j : j + h, i : i + w]).long())
        return [torch.stack(images), torch.stack(labels)]

    return partial(in_turn, batch)


def released(dataset: Any) -> list[Tensor]:
    """The batches from a released data set, collated as its DataLoader does."""

    def batch() -> list[Tensor]:
        samples = [dataset[0] for _ in range(SAMPLES)]
        return [torch.stack([sample[key] for sample in samples]) for key in ("image", "label")]

    np.random.seed(SEED)  # noqa: NPY002
    return in_turn(batch)


def chain(*steps: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def run(sample: Any) -> Any:
        for step in steps:
            sample = step(sample)
        return sample

    return run


def dhc(checkout: Path) -> Callable[[], list[Tensor]]:
    """Its Synapse_AMOS reads whole arrays from .npy, clips, rescales, halves the planes, and crops at last."""
    code = checkout / "code"
    folder = scratch() / "dhc"
    for part in ("npy", "splits"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    image, label = raw_scan(CT)
    np.save(folder / "npy" / "a_image.npy", image.astype(np.float32))
    np.save(folder / "npy" / "a_label.npy", label.astype(np.int8))
    (folder / "splits" / "train.txt").write_text("a\nb\n")
    transforms = load(code, "data.transforms")
    loaders = load(code, "data.data_loaders")
    loaders.read_data.__globals__["Config"] = lambda task: SimpleNamespace(save_dir=str(folder))
    steps = chain(transforms.RandomCrop(CT.patch, "synapse"), transforms.ToTensor())
    return partial(released, loaders.Synapse_AMOS("train", task="synapse", transform=steps))


def uamt(checkout: Path) -> Callable[[], list[Tensor]]:
    """Its LAHeart reads and inflates whole arrays from HDF5, and crops afterwards."""
    import h5py  # pyright: ignore[reportMissingImports]

    folder = scratch() / "uamt" / "data"
    (folder / "a").mkdir(parents=True, exist_ok=True)
    image, label = raw_scan(LA)
    voxels = ((image - np.mean(image)) / np.std(image)).astype(np.float32)
    with h5py.File(folder / "a" / "mri_norm2.h5", "w") as file:
        file.create_dataset("image", data=voxels, compression="gzip")
        file.create_dataset("label", data=label, compression="gzip")
    (folder.parent / "train.list").write_text("a\n")
    code = load(checkout / "code", "dataloaders.la_heart")
    steps = chain(code.RandomCrop(LA.patch), code.ToTensor())
    return partial(released, code.LAHeart(base_dir=str(folder), split="train", transform=steps))


def contestants(
    scans: Scans, peer: str, make: Callable[[Path], Callable[[], list[Tensor]]], settings: Settings
) -> list[Contestant]:
    found = [Contestant("tailseg", mine(scans)), Contestant("plain", plain(scans), own_allocator=True)]
    if peer in settings.peers:
        found.append(Contestant(peer, make(settings.peers[peer]), own_allocator=True))
    return found


def la_contestants(settings: Settings) -> list[Contestant]:
    if importlib.util.find_spec("h5py") is None and "uamt" in settings.peers:
        print("  uamt is left out: its LAHeart needs h5py, which is not installed")
        settings = replace(settings, peers={})
    return contestants(LA, "uamt", uamt, settings)


# --- the loader beside a step


def loader_facts(settings: Settings) -> Mapping[str, str]:
    """Batches a second of PatchStream with two workers, and how long a step of DHC waits for its batch."""
    keep_freed_memory()
    found: dict[str, str] = {}
    for scans in (CT, LA, ACDC):
        cpu, wall = loader_cost(scans)
        sides = "x".join(map(str, scans.patch))
        kind = f"{scans.name}, {scans.batch[0]}+{scans.batch[1]} of {sides}, 2 workers"
        found[f"loader, {kind}"] = f"{number(1 / wall)} batches/s, {number(1000 * cpu)} ms of processor each"
    waited, step, width = waiting(settings)
    found["next(stream) in training"] = (
        f"{100 * waited / step:.2g} % of a step: {1000 * waited:.2g} ms of {step:.2g} s (DHC, two V-Nets of width {width}, "
        f"{settings.threads} thread{'s' * (settings.threads > 1)}, 2 workers)"
    )
    return found


def loader_cost(scans: Scans, batches: int = 40) -> tuple[float, float]:
    """Seconds of processor and of the clock a batch, once the loader is under way."""
    stream = PatchStream(sampler(scans), workers=2)
    for _ in range(2 * len(store_of(scans).cases)):  # every scan has been touched
        next(stream)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(batches):
        next(stream)
    found = (time.process_time() - cpu) / batches, (time.perf_counter() - wall) / batches
    stream.close()
    return found


def waiting(settings: Settings, steps: int = 8, width: int = 4) -> tuple[float, float, int]:
    """Seconds a step spends in next(stream), and seconds of a whole step, means without the first; and the networks' width."""
    runtime = Runtime(torch.device(settings.device), RuntimeOptions())
    torch.manual_seed(SEED)
    task = example_task(len(CLASSES), 1, 3)
    method = make_method("dhc", {}, task, make_build("vnet", {"width": width}, task))
    runtime.place(method)
    method.train()
    optimizer = torch.optim.SGD(method.param_groups(), lr=0.001)
    stream = PatchStream(sampler(CT), workers=2)
    waited: list[float] = []
    whole: list[float] = []
    for index in range(steps + 1):
        begin = time.perf_counter()
        batch = next(stream).batch
        waited.append(time.perf_counter() - begin)
        batch = batch.to(runtime.device, runtime.memory_format(3))
        torch.stack([*method(batch, Progress(index, 1000, 10)).losses.values()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(Progress(index, 1000, 10))
        if settings.device.startswith("cuda"):
            torch.cuda.synchronize()
        whole.append(time.perf_counter() - begin)
    stream.close()
    return sum(waited[1:]) / steps, sum(whole[1:]) / steps, width


_HALF = 2**-11  # the store keeps intensities in half precision
_DRAWN = f"{BATCHES} batches of {SAMPLES} labelled patches"
_NOTE = (
    "plain: the prepared arrays, read whole for every patch. Files are in the page cache for all. The store holds intensities "
    "in half precision, hence the difference from the peer."
)
BENCHMARKS = (
    Benchmark(
        "draw",
        f"{_DRAWN} of 64 x 128 x 128 from a CT of 512 x 512 x 150, halved in its planes as DHC trains on it.",
        ">= 150x DHC; the loader is never the bottleneck with 2 workers",
        partial(contestants, CT, "dhc", dhc),
        tolerance={"plain": 0.0, "dhc": _HALF},
        facts=loader_facts,
        remark=_NOTE,
    ),
    Benchmark(
        "draw-la",
        f"{_DRAWN} of 112 x 112 x 80 from a left atrium scan of 176 x 184 x 88.",
        ">= 20x UA-MT",
        la_contestants,
        tolerance={"plain": 0.0, "uamt": _HALF},
        remark=_NOTE,
    ),
)
