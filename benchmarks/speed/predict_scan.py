"""A whole scan through sliding windows and two networks: with real ones, with ready-made logits, and while training."""

from __future__ import annotations

import contextlib
import io
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import yaml
from peers import load, on_cpu
from suite import ROOT, Benchmark, Contestant, Settings
from torch import Tensor, nn
from training_step import BF16_ROUNDING, copy_weights, default_precision

from tailseg.checks import example_batch, example_task
from tailseg.components import make_build, make_method
from tailseg.core import Batch, Method, Progress, SegOutput
from tailseg.data.preparation import PREPARATIONS
from tailseg.data.store import TrainingStore
from tailseg.evaluate.predictor import Predictor
from tailseg.evaluate.sliding_window import sliding_window
from tailseg.evaluate.validate import Validator
from tailseg.runtime import Runtime, RuntimeOptions, keep_freed_memory

SHAPE, PATCH, CLASSES = (160, 384, 384), (64, 128, 128), 14
WIDTH = 8
OVERLAP = 0.25  # of the scan with real networks: 48 windows
DENSE = 0.5  # of the scan without: 100 windows

Logits = Callable[[Tensor], Tensor]


# --- what is predicted


def scan() -> np.ndarray:
    """(D, H, W) float32."""
    return np.random.default_rng(0).random(SHAPE, np.float32)


def two_networks(width: int, runtime: Runtime) -> Method:
    """DHC in evaluation mode, with running statistics as if it had been trained."""
    torch.manual_seed(0)
    task = example_task(CLASSES, 1, 3)
    method = make_method("dhc", {}, task, make_build("vnet", {"width": width}, task))
    for module in method.modules():
        if isinstance(module, nn.BatchNorm3d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    runtime.place(method)
    return method.eval()


class ReadyMade(nn.Module):
    """A network whose logits lie ready; which of them a window gets follows from its first voxel."""

    def __init__(self, seed: int, layout: torch.memory_format) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        made = [torch.randn(1, CLASSES, *PATCH, generator=random) for _ in range(3)]
        self.logits = [each.contiguous(memory_format=layout) for each in made]

    def forward(self, x: Tensor) -> Tensor:
        chosen = [self.logits[int(first * 1000) % len(self.logits)] for first in x[:, 0, 0, 0, 0].tolist()]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen)


class AsSegNet(nn.Module):
    def __init__(self, net: ReadyMade) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> SegOutput:
        return SegOutput(self.net(x), x)


# --- the contestants


def summary(labels: np.ndarray | Tensor, probs: Tensor) -> dict[str, Any]:
    """Of the whole scan: voxels of each class, and a share of the probabilities."""
    counts = torch.as_tensor(labels).flatten().bincount(minlength=CLASSES)
    return {"voxels": counts.double(), "probs": probs.clone()}


def sample(probs: Tensor, start: int = 0) -> Tensor:
    """Every eighth voxel along each axis of a slab (K, d, H, W) that begins at slice start."""
    return probs[:, -start % 8 :: 8, ::8, ::8]


def tailseg(
    method: Method, runtime: Runtime, image: np.ndarray, overlap: float, batch_size: int | None = None
) -> Callable[[], Any]:
    predictor = Predictor(method, PREPARATIONS["dhc-p23-half"], PATCH, runtime, overlap, batch_size=batch_size)

    def work() -> Any:
        labels = np.empty(image.shape, np.uint8)
        samples = []
        slabs = sliding_window(
            predictor.predict,
            torch.from_numpy(image)[None],
            PATCH,
            overlap=overlap,
            batch_size=predictor.batch_size,
            device=runtime.device,
        )
        for start, probs in slabs:
            labels[start : start + probs.shape[1]] = probs.max(0).indices.to(torch.uint8).cpu().numpy()
            samples.append(sample(probs, start).clone())
        return summary(labels, torch.cat(samples, 1))

    return work


def strides(overlap: float) -> tuple[int, int, int]:
    z, y, x = (round(side * (1 - overlap)) for side in PATCH)
    return z, y, x


def starts(overlap: float) -> Iterator[tuple[int, int, int]]:
    axes = []
    for size, side, stride in zip(SHAPE, PATCH, strides(overlap), strict=True):
        axes.append(sorted({min(first, size - side) for first in range(0, size - side + stride, stride)}))
    return ((z, y, x) for z in axes[0] for y in axes[1] for x in axes[2])


def plain(net_a: Logits, net_b: Logits, image: np.ndarray, overlap: float) -> Callable[[], Any]:
    """A window at a time; its probabilities are added to those of the whole scan in numpy."""

    def work() -> Any:
        total, count = np.zeros((CLASSES, *SHAPE), np.float32), np.zeros(SHAPE, np.float32)
        for z, y, x in starts(overlap):
            place = slice(z, z + PATCH[0]), slice(y, y + PATCH[1]), slice(x, x + PATCH[2])
            window = torch.from_numpy(np.ascontiguousarray(image[place]))[None, None]
            with torch.no_grad():
                probs = torch.softmax((net_a(window) + net_b(window)) / 2, 1)
            total[:, *place] += probs[0].numpy()
            count[place] += 1
        total /= count
        return summary(total.argmax(0), sample(torch.from_numpy(total)))

    return work


def dhc(folder: Path, net_a: Logits, net_b: Logits, image: np.ndarray, overlap: float) -> Callable[[], Any]:
    theirs = load(folder / "code", "utils")
    z, y, x = strides(overlap)
    assert y == x

    def work() -> Any:
        with on_cpu(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            labels, probs = theirs.test_single_case_AB(net_a, net_b, image, x, z, PATCH, CLASSES)
        return summary(labels, sample(torch.from_numpy(probs)))

    return work


def peer_network(folder: Path, source: nn.Module, width: int) -> nn.Module:
    made = load(folder / "code", "models.vnet").VNet(1, CLASSES, width, "batchnorm", has_dropout=False).eval()
    copy_weights(source, made, torch.zeros(1, 1, 16, 16, 16))
    return made


def runtimes() -> tuple[Runtime, Runtime]:
    cpu = torch.device("cpu")
    exact = RuntimeOptions(precision="fp32")
    return Runtime(cpu, exact), Runtime(cpu, exact.model_copy(update={"channels_last": False}))


def with_networks(settings: Settings) -> Sequence[Contestant]:
    ours, contiguous = runtimes()
    image, fast, slow = scan(), two_networks(WIDTH, ours), two_networks(WIDTH, contiguous)
    nets = [getattr(slow, name) for name in ("net_a", "net_b")]
    logits_a, logits_b = (lambda x, net=net: net(x).logits for net in nets)
    made = [
        Contestant("tailseg, fp32", tailseg(fast, ours, image, OVERLAP)),
        Contestant("plain", plain(logits_a, logits_b, image, OVERLAP), own_allocator=True),
    ]
    if default_precision(settings) == "bf16":
        rounded = Runtime(ours.device, RuntimeOptions(precision="bf16"))
        work = tailseg(two_networks(WIDTH, rounded), rounded, image, OVERLAP)
        made.insert(0, Contestant("tailseg, bf16", work, rounding=BF16_ROUNDING))
    if folder := settings.peers.get("dhc"):
        peer_a, peer_b = (peer_network(folder, net, WIDTH) for net in nets)
        made.append(Contestant("dhc", dhc(folder, peer_a, peer_b, image, OVERLAP), own_allocator=True))
    return made


def without_networks(settings: Settings) -> Sequence[Contestant]:
    ours, _ = runtimes()
    image, method = scan(), two_networks(1, ours)
    method.net_a, method.net_b = (AsSegNet(ReadyMade(seed, ours.memory_format(3))) for seed in (0, 1))
    net_a, net_b = (ReadyMade(seed, torch.contiguous_format) for seed in (0, 1))
    made = [
        Contestant("tailseg", tailseg(method, ours, image, DENSE, batch_size=1)),
        Contestant("plain", plain(net_a, net_b, image, DENSE), own_allocator=True),
    ]
    if folder := settings.peers.get("dhc"):
        made.append(Contestant("dhc", dhc(folder, net_a, net_b, image, DENSE), own_allocator=True))
    return made


# --- while training

RECIPE = "recipes/synapse_mini/dhc_20p.yaml"
STEPS, CASES, GRID = 8, 4, (40, 80, 80)
"""Steps of its epoch, its validation cases, and their grid."""


class MadeUp:
    """As much of a store as validation asks."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self._image = random.random((1, *GRID), np.float32)
        self._label = random.integers(0, CLASSES, GRID, np.uint8)
        self.cases = {"case": SimpleNamespace(unannotated=())}

    def image(self, case: str) -> np.ndarray:
        return self._image

    def label(self, case: str) -> np.ndarray:
        return self._label


def validation_share(settings: Settings) -> Mapping[str, str]:
    recipe = yaml.safe_load((ROOT / RECIPE).read_text(encoding="utf-8"))
    patch, every = tuple(recipe["data"]["patch_size"]), recipe["train"]["validate_every"]
    runtime, _ = runtimes()
    keep_freed_memory()
    method = two_networks(recipe["network"]["width"], runtime)
    optimizer = torch.optim.SGD(method.param_groups(), lr=1e-4)
    made = example_batch(method.task, *recipe["data"]["batch"], side=max(patch))
    parts = [part[..., : patch[0], : patch[1], : patch[2]] for part in (made.x_l, made.y_l, made.x_u)]
    batch = Batch(*(part.contiguous() for part in parts)).to(runtime.device, runtime.memory_format(3))

    def step() -> None:
        output = method(batch, Progress(0, 100, 10))
        torch.stack([*output.losses.values()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    store = cast(TrainingStore, MadeUp())
    validate = Validator(store, ("case",), patch, runtime, recipe["evaluate"]["overlap"])
    method.train()
    step_seconds = seconds(step)
    method.eval()
    case_seconds = seconds(lambda: validate(method))
    share = CASES * case_seconds / (every * STEPS * step_seconds)
    return {
        f"Validation while training ({RECIPE})": f"{case_seconds:.2f} s of the processor a case, {step_seconds:.2f} s a step: "
        f"{CASES} cases every {every * STEPS} steps take {share:.1%} of the time of the steps (target: under 10 %)"
    }


def seconds(work: Callable[[], object], times: int = 3) -> float:
    """Median of the processor's, after one to warm up."""
    taken = []
    for _ in range(times + 1):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken[1:])


BENCHMARKS = (
    Benchmark(
        "predict",
        f"A scan of 160x384x384 voxels, windows of 64x128x128, a quarter overlapping, two V-Nets of width {WIDTH}, "
        f"{CLASSES} classes: from the prepared scan to its labels.",
        ">= 4x DHC, memory <= 1/2",
        with_networks,
        {"plain": 1e-5, "dhc": 1e-4},
        validation_share,
        remark="DHC keeps the probabilities of the whole scan, twice for a moment; TailSeg keeps one row of windows.",
    ),
    Benchmark(
        "predict-stitch",
        "The same with half overlapping and logits that lie ready, a window at a time: all but the networks.",
        ">= 1.7x DHC, memory <= 1/2",
        without_networks,
        {"plain": 1e-5, "dhc": 1e-4},
    ),
)
