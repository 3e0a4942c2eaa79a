"""Endless batches. PatchSampler holds all randomness and draws in the main thread; PatchStream's threads only cut.

Threads, not processes: a cut is a copy out of a memory map, which releases the interpreter lock, and costs a millisecond.
So there is nothing to pickle, no shared memory to run out of, and nothing that draws from a global generator.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tailseg.core import IGNORE, Batch

Shape = tuple[int, ...]


class PatchSource(Protocol):
    """Where patches are cut from; a TrainingStore is one."""

    def image(self, case: str) -> np.ndarray: ...  # (C, D, H, W)
    def label(self, case: str) -> np.ndarray: ...  # (D, H, W) uint8
    def positions(self, case: str) -> Mapping[int, np.ndarray]: ...  # class -> (n, 3) sampled voxels


@dataclass(frozen=True)
class PatchRequest:
    """One patch: a case and the first voxel (D, H, W); a negative start pads."""

    case: str
    start: tuple[int, int, int]


class PatchBatchRequest(NamedTuple):
    labelled: list[PatchRequest]
    unlabelled: list[PatchRequest]


class _Shuffled:
    """Cases in endlessly repeated random order, each once per round."""

    def __init__(self, cases: Sequence[str]) -> None:
        self.cases = sorted(cases)
        self.order: list[int] = []

    def draw(self, rng: np.random.Generator) -> str:
        if not self.order:
            self.order = rng.permutation(len(self.cases)).tolist()
        return self.cases[self.order.pop()]


class PatchSampler:
    """Draws which patches make the next batch.

    shapes: (D, H, W) of every case. labelled, unlabelled: case ids. patch_size: (d, h, w), or (h, w) for patches of single
    slices. batch: patches of each kind. foreground: share of labelled patches that hold, anywhere in their middle half, a
    voxel of a foreground class; the class is drawn by class_odds() or evenly, then a case that has it.
    Raises ValueError where a case is smaller than the patch and pad is false.
    """

    def __init__(
        self,
        source: PatchSource,
        shapes: Mapping[str, Shape],
        labelled: Sequence[str],
        unlabelled: Sequence[str],
        patch_size: Shape,
        batch: tuple[int, int],
        *,
        seed: int,
        foreground: float = 0.0,
        pad: bool = False,
        class_odds: Callable[[], Tensor | None] = lambda: None,
    ) -> None:
        if batch[1] and not unlabelled:
            batch = (batch[0], 0)
        self.spatial_dims = len(patch_size)
        self.extent = (1, *patch_size) if len(patch_size) == 2 else tuple(patch_size)  # (d, h, w)
        self.source, self.shapes, self.batch, self.foreground = source, shapes, batch, foreground
        self.class_odds = class_odds
        self.rng = np.random.default_rng(seed)
        self.labelled, self.unlabelled = _Shuffled(labelled), _Shuffled(unlabelled)
        for case in (*labelled, *(unlabelled if batch[1] else ())):
            if not pad and any(size < side for size, side in zip(shapes[case], self.extent, strict=True)):
                raise ValueError(
                    f"data.patch_size {tuple(patch_size)} exceeds case '{case}' {tuple(shapes[case])} after preparation; "
                    "lower data.patch_size or set data.pad=true."
                )
        self.having: dict[int, list[str]] = {}  # class -> labelled cases with at least one voxel of it
        if foreground:
            for case in self.labelled.cases:
                for label in source.positions(case):
                    if label:
                        self.having.setdefault(int(label), []).append(case)
            if not self.having:
                raise ValueError("data.foreground is set, but no labelled case holds a foreground voxel; set it to 0.")

    def draw(self) -> PatchBatchRequest:
        return PatchBatchRequest(
            [self._labelled_patch() for _ in range(self.batch[0])],
            [self._anywhere(self.unlabelled.draw(self.rng)) for _ in range(self.batch[1])],
        )

    def _labelled_patch(self) -> PatchRequest:
        if self.foreground and self.rng.random() < self.foreground:
            return self._around_a_class()
        return self._anywhere(self.labelled.draw(self.rng))

    def _anywhere(self, case: str) -> PatchRequest:
        starts = []
        for size, side in zip(self.shapes[case], self.extent, strict=True):
            slack = size - side
            starts.append(int(self.rng.integers(0, slack + 1)) if slack >= 0 else slack // 2)
        return PatchRequest(case, (starts[0], starts[1], starts[2]))

    def _around_a_class(self) -> PatchRequest:
        labels = sorted(self.having)
        odds = self.class_odds()
        weights = np.ones(len(labels)) if odds is None else odds.double().cpu().numpy()[labels]
        if weights.sum() <= 0:
            weights = np.ones(len(labels))
        label = labels[int(self.rng.choice(len(labels), p=weights / weights.sum()))]
        cases = self.having[label]
        case = cases[int(self.rng.integers(len(cases)))]
        positions = self.source.positions(case)[label]
        voxel = positions[int(self.rng.integers(len(positions)))]
        starts = []
        for centre, size, side in zip(voxel.tolist(), self.shapes[case], self.extent, strict=True):
            start = centre - side // 4 - int(self.rng.integers(0, side - 2 * (side // 4)))
            slack = size - side
            starts.append(min(max(start, 0), slack) if slack >= 0 else slack // 2)
        return PatchRequest(case, (starts[0], starts[1], starts[2]))

    def state_dict(self) -> dict[str, Any]:
        return {
            "rng": self.rng.bit_generator.state,
            "labelled": list(self.labelled.order),
            "unlabelled": list(self.unlabelled.order),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rng.bit_generator.state = state["rng"]
        self.labelled.order, self.unlabelled.order = list(state["labelled"]), list(state["unlabelled"])


def cut(array: np.ndarray, request: PatchRequest, extent: Shape, fill: float) -> np.ndarray:
    """The patch of array (..., D, H, W) at request.start with sides extent; what lies outside is fill."""
    spans = list(zip(request.start, extent, array.shape[-3:], strict=True))
    inside = tuple(slice(max(start, 0), start + side) for start, side, _ in spans)
    patch = array[(..., *inside)]
    missing = [(max(-start, 0), max(start + side - size, 0)) for start, side, size in spans]
    if any(before or after for before, after in missing):
        return np.pad(patch, [(0, 0)] * (array.ndim - 3) + missing, constant_values=fill)
    return np.array(patch)  # a copy, since torch cannot share a read-only memory map


class DrawnBatch(NamedTuple):
    batch: Batch
    request: PatchBatchRequest  # which patches these are, to name the cases when something is wrong with them


class PatchStream:
    """Endless batches of this rank's share of the global batch, cut ahead of time by threads.

    What was drawn but not handed out is part of state_dict(), so a resumed run sees the very patches of the unbroken one,
    however the odds of the classes moved in between. companion: cuts Batch.features of a patch with these sides. send: starts
    a batch on its way to the device, in the thread that cut it; what it returns is called where the batch is handed out.
    """

    AHEAD = 3  # batches drawn before they are asked for; part of the run's arithmetic when class odds change, so fixed

    def __init__(
        self,
        sampler: PatchSampler,
        *,
        workers: int = 2,
        rank: int = 0,
        ranks: int = 1,
        companion: Callable[[PatchRequest, Shape], Tensor] | None = None,
        send: Callable[[Batch], Callable[[], Batch]] = lambda batch: lambda: batch,
    ) -> None:
        for name, count in zip(("labelled", "unlabelled"), sampler.batch, strict=True):
            if count % ranks:
                raise ValueError(
                    f"data.batch holds {count} {name} patches, which {ranks} processes cannot share evenly."
                )
        self.sampler, self.rank, self.ranks, self.companion = sampler, rank, ranks, companion
        self.send = send
        self.pool = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="patches")
        self.queue: deque[tuple[PatchBatchRequest, Future[Callable[[], Batch]]]] = deque()

    def __iter__(self) -> PatchStream:
        return self

    def __next__(self) -> DrawnBatch:
        while len(self.queue) < self.AHEAD:
            self._submit(self.sampler.draw())
        request, future = self.queue.popleft()
        return DrawnBatch(future.result()(), request)

    def _submit(self, request: PatchBatchRequest) -> None:
        mine = PatchBatchRequest(*(part[self.rank :: self.ranks] for part in request))
        self.queue.append((request, self.pool.submit(lambda: self.send(self._cut_batch(mine)))))

    def _cut_batch(self, request: PatchBatchRequest) -> Batch:
        source, extent = self.sampler.source, self.sampler.extent
        channels = source.image(self.sampler.labelled.cases[0]).shape[0]

        def images(patches: list[PatchRequest]) -> Tensor:
            x = torch.empty(len(patches), channels, *extent)
            for row, patch in zip(x, patches, strict=True):
                row.copy_(torch.from_numpy(cut(source.image(patch.case), patch, extent, 0.0)))
            return x

        y = torch.empty(len(request.labelled), *extent, dtype=torch.int64)
        for row, patch in zip(y, request.labelled, strict=True):
            row.copy_(torch.from_numpy(cut(source.label(patch.case), patch, extent, IGNORE)))
        x_l, x_u = images(request.labelled), images(request.unlabelled)
        features = None
        if self.companion is not None:
            features = torch.stack([self.companion(patch, extent) for part in request for patch in part])
        if self.sampler.spatial_dims == 2:
            return Batch(x_l.squeeze(2), y.squeeze(1), x_u.squeeze(2), features)
        return Batch(x_l, y, x_u, features)

    def state_dict(self) -> dict[str, Any]:
        pending = [[[asdict(patch) for patch in part] for part in request] for request, _ in self.queue]
        return {"sampler": self.sampler.state_dict(), "pending": pending}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])
        self.queue.clear()
        for parts in state["pending"]:
            labelled, unlabelled = (
                [PatchRequest(patch["case"], tuple(patch["start"])) for patch in part] for part in parts
            )
            self._submit(PatchBatchRequest(labelled, unlabelled))

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
