"""The few types that everything else speaks: Task, Batch, Progress, StepOutput, SegNet, Companion, Method.

Axes are always (B, C, *S) with S = (D, H, W) in 3D and (H, W) in 2D. K counts the classes, background included.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

IGNORE = 255
"""Label of a voxel that nobody annotated: no loss, statistic or metric counts it. It fits the uint8 of the store."""

Init = Literal["default", "kaiming", "xavier"]
Unit = Literal["epoch", "step"]


@dataclass(frozen=True)
class Task:
    """What is segmented; fixed by data set and split.

    classes: names, background first. spacing: mm per voxel after preparation, in the order of the axes (D, H, W).
    class_voxels: (K,) voxels of each class over the labelled training cases, each case once.
    """

    classes: tuple[str, ...]
    in_channels: int
    spatial_dims: Literal[2, 3]
    spacing: tuple[float, ...]
    class_voxels: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise ValueError(f"a task needs the background and at least one class, got {self.classes}")
        if len(self.classes) > IGNORE:
            raise ValueError(f"at most {IGNORE} classes fit a label file of bytes, got {len(self.classes)}")
        if len(self.class_voxels) != len(self.classes):
            raise ValueError(f"class_voxels counts {len(self.class_voxels)} classes, classes names {len(self.classes)}")

    @property
    def num_classes(self) -> int:
        return len(self.classes)


@dataclass(frozen=True)
class Batch:
    """One step's patches. Unlabelled images have no label field, so that no method can peek."""

    x_l: Tensor  # (B_l, C, *S) labelled images, weakly augmented
    y_l: Tensor  # (B_l, *S) int64; IGNORE marks voxels nobody annotated
    x_u: Tensor  # (B_u, C, *S) unlabelled images, weakly augmented; B_u may be 0
    # (B_l + B_u, C_t, k, g, g) what a frozen teacher says of these patches, labelled first; None unless the method asked
    features: Tensor | None = None

    @property
    def x(self) -> Tensor:
        """(B_l + B_u, C, *S) all images, labelled first; one forward pass shares its batch statistics."""
        return torch.cat([self.x_l, self.x_u])

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.preserve_format) -> Batch:
        return Batch(
            self.x_l.to(device, non_blocking=True, memory_format=memory_format),
            self.y_l.to(device, non_blocking=True),
            self.x_u.to(device, non_blocking=True, memory_format=memory_format),
            None if self.features is None else self.features.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Progress:
    """Where the run is. step counts optimiser steps already done; epochs are spans of steps_per_epoch."""

    step: int
    total_steps: int
    steps_per_epoch: int

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    @property
    def total_epochs(self) -> int:
        return -(-self.total_steps // self.steps_per_epoch)

    def fraction(self, unit: Unit) -> float:
        """How far the run is, in [0, 1), as schedules and ramps see it.

        "step" moves every step. "epoch" is held over an epoch and set at its end, so that epochs 0 and 1 both see 0, as the
        authors' loops of DHC and its rivals do.
        """
        if unit == "step":
            return self.step / self.total_steps
        return max(self.epoch - 1, 0) / self.total_epochs


@dataclass(frozen=True)
class StepOutput:
    """losses: weighted scalars whose sum is minimised. predicted: (K,) voxels that this step's predictions gave each
    class, for the alarm on classes never predicted. logs: detached scalars or (K,) vectors, only reported."""

    losses: Mapping[str, Tensor]
    predicted: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)


class SegOutput(NamedTuple):
    """What a decoder returns. embedding: (B, E, *S) features before the last convolution. pyramid: logits (B, K, *S / 2),
    (B, K, *S / 4), ... of networks built with pyramid=True, finest first."""

    logits: Tensor  # (B, K, *S)
    embedding: Tensor
    pyramid: tuple[Tensor, ...] = ()


class SegNet(nn.Module):
    """An encoder and one or more decoders.

    encoder: x -> list of features, finest first. decoders: features -> SegOutput; the submodule `head` of each makes logits
    of an embedding. size_divisor: every spatial side of x must be a multiple of it. feature_channels: of the encoder's
    features, finest first. embedding_channels: E of SegOutput.embedding.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoders: nn.ModuleList,
        *,
        size_divisor: int,
        feature_channels: tuple[int, ...],
        embedding_channels: int,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoders = decoders
        self.size_divisor = size_divisor
        self.feature_channels = feature_channels
        self.embedding_channels = embedding_channels

    def forward(self, x: Tensor) -> SegOutput:
        return self.decoders[0](self.encoder(x))

    def head(self, embedding: Tensor) -> Tensor:
        """Logits (B, K, *S) of an embedding (B, E, *S) that a method has changed on its way."""
        return self.decoders[0].head(embedding)  # pyright: ignore[reportCallIssue]


class BuildNetwork(Protocol):
    """Makes a fresh network for the task; the recipe chose its name and options, the method says what it needs of it.

    num_classes: None means the task's. pyramid: heads on the coarser stages of the decoder too (deep supervision).
    """

    def __call__(
        self,
        *,
        init: Init = "default",
        num_decoders: int = 1,
        in_channels: int | None = None,
        num_classes: int | None = None,
        pyramid: bool = False,
    ) -> SegNet: ...


class Companion(Protocol):
    """What a frozen teacher says of whole scans: made once, kept in the store, and cut beside every patch.

    key: a file name for all that the arrays depend on besides the prepared scan: the teacher, its weights, its options.
    """

    @property
    def key(self) -> str: ...

    def encode(self, scans: Iterable[Tensor]) -> Iterator[np.ndarray]:
        """Scans (C, D, H, W), on the device that shall do it -> their arrays (D, g_y, g_x, C_t) float16, one after the
        other; the teacher need not outlive the last."""
        ...

    def cut(
        self, array: np.ndarray, shape: tuple[int, ...], start: tuple[int, ...], patch_size: tuple[int, ...]
    ) -> Tensor:
        """(C_t, k, g, g) for the patch at voxel start (d, h, w) of a scan of this shape; called from several threads. The
        patch may reach beyond the scan. Mirrored patches mirror their k, g, g."""
        ...


class Method(nn.Module, ABC):
    """One algorithm. What it remembers is a submodule or a buffer, so that state_dict() is its whole state.

    Subclasses take (task, build, *, <options>); the keyword-only arguments are its options in a recipe.
    Concrete methods are final and subclass Method alone; what two of them share is a part, not a parent.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def check_batch(self, labelled: int, unlabelled: int, patch_size: tuple[int, ...]) -> None:
        """Raises ValueError where no step can be made of so many patches (of one process) of this size. The text names
        data.batch or data.patch_size, the rule and the way out. Default: anything goes."""

    @abstractmethod
    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """The losses of one batch, called several times per optimiser step when gradients accumulate."""

    @abstractmethod
    def predict(self, x: Tensor) -> Tensor:
        """Class probabilities (B, K, *S) of images (B, C, *S), in evaluation mode and without gradients."""

    def predict_each(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """predict(x), and beside it the class probabilities (B, K, *S) of every network that it is the average of: how far
        they disagree tells where not to trust it. Default: there is one."""
        probs = self.predict(x)
        return probs, (probs,)

    def after_step(self, progress: Progress) -> None:
        """Called after every optimiser step; teachers follow here, never in step()."""

    def class_sampling(self) -> Tensor | None:
        """(K,) odds of the class at the centre of the next labelled patches; None leaves it to the recipe."""
        return None

    def companion(self, patch_size: tuple[int, ...]) -> Companion | None:
        """What fills Batch.features; None leaves them None. patch_size: (d, h, w) or (h, w), as the recipe has it."""
        return None

    def caveat(self) -> str:
        """What whoever reads this run's numbers must be told; it goes with the run, its predictions and their scores."""
        return ""

    def param_groups(self) -> list[dict[str, Any]]:
        """What the optimiser trains; a group may set its own lr_scale (a factor on train.lr) or weight_decay."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """The one door: DDP wraps the method and synchronises gradients of what happens in here."""
        return self.step(batch, progress)
