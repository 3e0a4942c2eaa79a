"""Boxes cut from one image and pasted into another, for images, labels and confidences alike.

Mixers choose what is pasted where; they are parts with one interface: `method.mixer=cutmix`. A mixer with options is a
mapping: `method.mixer={name: pic, beta: 1.0}`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from tailseg.core import IGNORE, Progress, Task
from tailseg.options import OptionError, check_options, suggest


def cutmix_boxes(
    count: int,
    sides: Sequence[int],
    *,
    probability: float = 0.5,
    area: tuple[float, float] = (0.02, 0.4),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    device: torch.device | None = None,
) -> Tensor:
    """(count, *S) bool, true inside one box per sample; a box is there with the given probability.

    sides: S. area: range of the share of the image (volume) that the box covers, before its sides are rounded down. aspect:
    range of r; the last two sides are (size r)^(1/dims) and (size / r)^(1/dims) long, in 3D the first one size^(1/3).
    Drawn from torch's CPU generator. Source: UniMatch's and CrossMatch's released code; the box lies anywhere fully inside.
    """
    dims = len(sides)
    draws = torch.rand(count, 3 + dims, dtype=torch.float64)
    there, place = draws[:, 0] < probability, draws[:, 3:]
    size = math.prod(sides) * (area[0] + draws[:, 1] * (area[1] - area[0]))
    ratio = aspect[0] + draws[:, 2] * (aspect[1] - aspect[0])
    *first, height, width = sides
    plane, edges = size, []
    for side in first:
        edges.append((size ** (1 / dims)).clamp(max=side).maximum(size / (height * width)))
        plane = size / edges[-1]
    # the field draws the aspect again until the box fits; ending it where the box just fits keeps the area as drawn too
    tall = (plane * ratio ** (2 / dims)).sqrt().clamp(max=height).maximum(plane / width)
    edges += [tall, plane / tall]
    limits = torch.tensor(sides, dtype=torch.float64)
    whole = (torch.stack(edges, 1) + 1e-9).floor().clamp_min(1).minimum(limits) * there[:, None]  # (count, dims)
    starts = (place * (limits - whole + 1)).floor()
    corners = torch.stack([starts, starts + whole]).long().to(device, non_blocking=True)  # (2, count, dims)
    return _boxes(corners[0], corners[1], sides)


def _boxes(starts: Tensor, stops: Tensor, sides: Sequence[int]) -> Tensor:
    """(B, *S) bool, true from starts up to before stops on every axis. starts, stops: (B, dims) voxels."""
    boxes = torch.ones(len(starts), *(1 for _ in sides), dtype=torch.bool, device=starts.device)
    for axis, side in enumerate(sides):
        at = torch.arange(side, device=starts.device)
        inside = (at >= starts[:, axis, None]) & (at < stops[:, axis, None])  # (B, side)
        boxes = boxes & inside.reshape(-1, *(side if other == axis else 1 for other in range(len(sides))))
    return boxes


def paste(inside: Tensor, outside: Tensor, boxes: Tensor) -> Tensor:
    """inside where boxes is true, outside elsewhere. boxes: (B, *S) bool. The others: (B, C, *S) or (B, *S)."""
    return torch.where(boxes.unsqueeze(1) if inside.dim() > boxes.dim() else boxes, inside, outside)


@dataclass(frozen=True)
class Samples:
    """Images with labels, given or guessed, and how sure these are: 1 where somebody annotated."""

    x: Tensor  # (B, C, *S)
    labels: Tensor  # (B, *S) int64; IGNORE marks voxels nobody annotated
    confidence: Tensor  # (B, *S) in [0, 1]

    @classmethod
    def annotated(cls, x: Tensor, labels: Tensor) -> Self:
        return cls(x, labels, torch.ones_like(labels, dtype=torch.float32))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: slice | Tensor) -> Samples:
        return Samples(self.x[index], self.labels[index], self.confidence[index])

    def paste(self, source: Samples, boxes: Tensor) -> Samples:
        """Those of source inside the boxes (B, *S), these elsewhere."""
        return Samples(
            paste(source.x, self.x, boxes),
            paste(source.labels, self.labels, boxes),
            paste(source.confidence, self.confidence, boxes),
        )


class Mixer(nn.Module, ABC):
    """Makes new samples of a batch's own. A sample for which there is no source stays as it is."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    @abstractmethod
    def forward(self, labelled: Samples, unlabelled: Samples, progress: Progress) -> tuple[Samples, Samples]:
        """The mixed (labelled, unlabelled); either may be empty. The given ones stay as they are."""


class NoMixer(Mixer):
    """Everything stays as it is."""

    def forward(self, labelled: Samples, unlabelled: Samples, progress: Progress) -> tuple[Samples, Samples]:
        return labelled, unlabelled


class CutMix(Mixer):
    """A box of another unlabelled sample in each unlabelled one; the labelled stay as they are.

    probability, area, aspect: see cutmix_boxes. Source: French et al., BMVC 2020, https://arxiv.org/abs/1906.01916.
    """

    def __init__(
        self,
        task: Task,
        *,
        probability: float = 0.5,
        area: tuple[float, float] = (0.02, 0.4),
        aspect: tuple[float, float] = (0.3, 1 / 0.3),
    ) -> None:
        super().__init__(task)
        _check_share("probability", probability)
        _check_range("area", area, 1.0)
        _check_range("aspect", aspect, math.inf)
        self.probability, self.area, self.aspect = probability, area, aspect

    def forward(self, labelled: Samples, unlabelled: Samples, progress: Progress) -> tuple[Samples, Samples]:
        count, device = len(unlabelled), unlabelled.x.device
        if count < 2:
            return labelled, unlabelled
        source = (torch.arange(count) + torch.randint(1, count, (count,))) % count  # any but oneself
        sides = unlabelled.x.shape[2:]
        options: dict[str, Any] = {"probability": self.probability, "area": self.area, "aspect": self.aspect}
        boxes = cutmix_boxes(count, sides, device=device, **options)
        return labelled, unlabelled.paste(unlabelled[source.to(device, non_blocking=True)], boxes)


class PIC(Mixer):
    """Progressive imbalance-aware CutMix: boxes around rare classes at first, around all classes alike later.

    A target takes, with `probability`, one box: a class c is drawn from p(t) among the foreground classes that its sources
    hold, then a source that holds it, then the centre among the source's voxels of c; each side of the box is a share of the
    patch drawn from `sides`, clipped to the patch; the box lies at the same place in the target. Labelled targets take from
    other labelled samples; unlabelled ones from labelled samples with probability `cross_subset`, otherwise from other
    unlabelled ones, where only voxels at least `confidence` sure count. A target whose sources hold no class stays as it is.

    p starts at q_c ~ f_c^-beta, with f_c the voxels of the labelled training scans (a class in none of them is never drawn)
    and is uniform from the share `t_pic` of the run on. anneal: "linear" and "cosine" blend q with the uniform distribution,
    "exponent" lowers the exponent, p_c ~ f_c^(-beta (1 - t)).
    Source: after X. Liu, G. Sun, DINO-Mix, 2026, https://arxiv.org/abs/2602.07819; its formulas are not public, these are ours.
    """

    def __init__(
        self,
        task: Task,
        *,
        beta: float = 0.5,
        t_pic: float = 0.8,
        probability: float = 0.5,
        anneal: Literal["linear", "cosine", "exponent"] = "linear",
        cross_subset: float = 0.5,
        confidence: float = 0.75,
        sides: tuple[float, float] = (0.25, 0.5),
    ) -> None:
        super().__init__(task)
        for name, value in (("t_pic", t_pic), ("probability", probability), ("cross_subset", cross_subset)):
            _check_share(name, value)
        _check_range("sides", sides, 1.0)
        self.beta, self.t_pic, self.anneal = beta, t_pic, anneal
        self.probability, self.cross_subset, self.confidence, self.sides = probability, cross_subset, confidence, sides

    def class_odds(self, progress: Progress) -> Tensor:
        """(K,) p(t) on the CPU; 0 for the background and for classes without labelled voxels."""
        t = min(progress.fraction("step") / self.t_pic, 1.0) if self.t_pic else 1.0
        if self.anneal == "exponent":
            return self._rarity(self.beta * (1 - t))
        blend = (1 - math.cos(math.pi * t)) / 2 if self.anneal == "cosine" else t
        return (1 - blend) * self._rarity(self.beta) + blend * self._rarity(0.0)

    def _rarity(self, beta: float) -> Tensor:
        """f^-beta over its sum."""
        voxels = torch.tensor(self.task.class_voxels, dtype=torch.float64)
        drawn = (voxels > 0) & (torch.arange(len(voxels)) > 0)
        powers = torch.where(drawn, voxels.clamp_min(1) ** -beta, 0.0)
        return powers / powers.sum().clamp_min(torch.finfo(torch.float64).tiny)

    def forward(self, labelled: Samples, unlabelled: Samples, progress: Progress) -> tuple[Samples, Samples]:
        n, pool = len(labelled), _cat(labelled, unlabelled)
        count, sides, device = len(pool), pool.x.shape[2:], pool.x.device

        # all that is drawn is drawn here, on the CPU and in one place
        gumbel = -torch.empty(count, self.task.num_classes, dtype=torch.float64).exponential_().log()
        class_scores = (self.class_odds(progress).log() + gumbel).float().to(device, non_blocking=True)  # (N, K)
        source_scores = torch.rand(count, count).to(device, non_blocking=True)
        at = torch.rand(count).to(device, non_blocking=True)
        shares = self.sides[0] + torch.rand(count, len(sides)) * (self.sides[1] - self.sides[0])
        lengths = (shares * torch.tensor(sides)).long().clamp_min(1).to(device, non_blocking=True)  # (N, dims)
        chosen = (torch.rand(count) < self.probability).to(device, non_blocking=True)
        is_labelled = torch.arange(count) < n
        takes_labelled = is_labelled | (torch.rand(count) < self.cross_subset)
        allowed = (takes_labelled[:, None] == is_labelled) & ~torch.eye(
            count, dtype=torch.bool
        )  # (N, N) target, source
        allowed = allowed.to(device, non_blocking=True)

        sure = torch.where(pool.confidence >= self.confidence, pool.labels, IGNORE)
        held = _classes_held(sure, self.task.num_classes)  # (N, K)
        offered = (allowed.float() @ held.float()) > 0  # (N, K) classes that a target's sources hold
        scores = class_scores.masked_fill(~offered, -math.inf)
        best, drawn = scores.max(1)  # the Gumbel-max trick: the class is drawn from p restricted to what is offered
        chosen = chosen & (best > -math.inf)
        candidates = allowed & held.T[drawn]  # (N, N)
        source = source_scores.masked_fill(~candidates, -1.0).argmax(1)

        wanted = (sure[source].flatten(1) == drawn[:, None]).cumsum(
            1, dtype=torch.int32
        )  # (N, V) voxels of the class so far
        rank = (at[:, None] * wanted[:, -1:]).int().minimum(wanted[:, -1:] - 1)
        centre = _unravel(torch.searchsorted(wanted, rank + 1)[:, 0], sides)  # (N, dims)
        starts = centre - lengths // 2
        stops = torch.where(chosen[:, None], starts + lengths, starts)
        mixed = pool.paste(pool[source], _boxes(starts, stops, sides))  # what lies outside the patch has no voxels
        return mixed[:n], mixed[n:]


def _cat(first: Samples, second: Samples) -> Samples:
    x, labels = torch.cat([first.x, second.x]), torch.cat([first.labels, second.labels])
    return Samples(x, labels, torch.cat([first.confidence, second.confidence]))


def _classes_held(labels: Tensor, num_classes: int) -> Tensor:
    """(B, K) bool: which classes appear in each of labels (B, *S)."""
    lines = labels.flatten(1, -2).clamp(max=num_classes)  # (B, S0 * ..., last axis); IGNORE falls into bin K
    found = torch.zeros(*lines.shape[:-1], num_classes + 1, dtype=torch.bool, device=labels.device)
    return found.scatter_(2, lines, True).any(1)[:, :num_classes]


def _unravel(flat: Tensor, sides: Sequence[int]) -> Tensor:
    """(B,) positions in the flattened patch -> (B, dims) voxels."""
    axes: list[Tensor] = []
    for side in reversed(sides):
        axes.insert(0, flat % side)
        flat = flat // side
    return torch.stack(axes, 1)


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise OptionError(f"{name} is {value}; it is a probability or a share, from 0 to 1.")


def _check_range(name: str, value: tuple[float, float], most: float) -> None:
    if not 0 < value[0] <= value[1] <= most:
        raise OptionError(
            f"{name} is {value}; it is a range, its lower end above 0 and its upper end at most {most:g}."
        )


MIXERS: Mapping[str, type[Mixer]] = {"none": NoMixer, "cutmix": CutMix, "pic": PIC}

MixerSpec = str | dict[str, Any]


def make_mixer(spec: MixerSpec, task: Task) -> Mixer:
    """The mixer called by name, or by {name: ..., <options>}. Raises OptionError for unknown names and options."""
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = str(options.pop("name", None))
    if name not in MIXERS:
        raise OptionError(f"No mixer is called '{name}'. {suggest(name, MIXERS)}")
    make = MIXERS[name]
    return make(task, **check_options(make, options))
