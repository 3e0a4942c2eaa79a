"""Weak augmentation of whole batches, on the device they are on.

All that happens to a batch is drawn first, from torch's CPU generator (whose state is in the checkpoint), as one table with
a row for every patch, and then done to images and labels on their device, many patches at once, which the host does not
wait for. On the CPU and on a GPU the parameters are exactly the same, noise included, and the arithmetic is to rounding: a
voxel's nearest label may differ where two are equally near. By default nothing is done: the published abdominal runs used no
augmentation.

A teacher's features of the patch are mirrored with it. That is not quite what the teacher says of a mirrored patch: no vision
transformer is equivariant, and along d the slices that were read may end up one off. They cannot be turned or scaled, and
what happens to intensities afterwards leaves them alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self, overload

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from tailseg.core import IGNORE, Batch
from tailseg.parts.intensity import (
    FIELD_TERMS,
    bias_field_and_gamma,
    change_some,
    column,
    gaussian_blur,
    gaussian_noise,
    unit_range,
)

Axis = Literal["d", "h", "w"]
Factor = Annotated[float, Field(gt=0)]
Deviation = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class Changes:
    """What is done to each of B patches, on the CPU, where looking at it costs nothing. 2D patches lie in the (h, w) plane."""

    mirrored: Tensor  # (B, 3) bool, along d, h, w
    quarter_turns: Tensor  # (B,) 0 to 3 in the (h, w) plane, after the mirrors, as torch.rot90 counts them
    angles: Tensor  # (B, 3) degrees about d, h and w, after the quarter turns; 0 does nothing
    scale: Tensor  # (B,) above 1 enlarges
    field: Tensor  # (B, 4, 4, 4) coefficients of the bias field's polynomial; all 0 is no field
    gamma: Tensor  # (B,); like the two below, 1 does nothing
    brightness: Tensor  # (B,)
    contrast: Tensor  # (B,)
    blur: Tensor  # (B,) sigma in voxels; like the one below, 0 does nothing
    noise: Tensor  # (B,) deviation, as a share of the range of intensities
    seeds: Tensor  # (B,) of the noise, in [0, 2^32)

    def __len__(self) -> int:
        return len(self.scale)

    def __getitem__(self, rows: slice) -> Changes:
        return Changes(**{name: values[rows] for name, values in vars(self).items()})


class Augment(BaseModel):
    """flip: axes mirrored, each with probability 1/2; w is the patient's left-right, so do not flip it where classes have
    sides. rot90: a quarter turn in the (h, w) plane drawn evenly from four; needs square patches. rotate: degrees; a patch is
    turned by an angle within +- that, what comes from outside is 0 and has no label. rotate_about: axes it is turned about,
    each by an angle of its own; about d is in the (h, w) plane, the others need 3D patches of about cubic voxels.
    rotate_probability: of a patch to be turned. scale: range of the factor by which a patch is enlarged, alike along all
    axes; drawn, as every range of a factor or a power, so that [0.5, 2] enlarges as often as it shrinks. scale_probability:
    of a patch to be scaled. bias_field: largest coefficient of the cubic polynomial of the position whose exponential the
    intensities are multiplied by; this and all that follows take each channel of a patch in [0, 1], by its extremes there,
    and in this order. bias_field_probability: of a patch to get one. gamma: range of the power that intensities are raised
    to. gamma_probability: of a patch to get another than 1. brightness: range of the factor that intensities are multiplied
    by. brightness_probability: of a patch to get another than 1. contrast: range of the factor by which intensities move away
    from their mean, within the range that they had. contrast_probability: of a patch to get another than 1. blur: range of
    the sigma of a Gaussian, in voxels along all axes. blur_probability: of a patch to be blurred. noise: largest deviation of
    Gaussian noise, as a share of the range of intensities. noise_probability: of a patch to be noisy.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    flip: tuple[Axis, ...] = ()
    rot90: bool = False
    rotate: float = Field(default=0.0, ge=0.0, le=180.0)
    rotate_about: tuple[Axis, ...] = ("d",)
    rotate_probability: Probability = 0.5
    scale: tuple[Factor, Factor] = (1.0, 1.0)
    scale_probability: Probability = 0.2
    bias_field: Deviation = 0.0
    bias_field_probability: Probability = 0.3
    gamma: tuple[Factor, Factor] = (1.0, 1.0)
    gamma_probability: Probability = 0.3
    brightness: tuple[Factor, Factor] = (1.0, 1.0)
    brightness_probability: Probability = 0.15
    contrast: tuple[Factor, Factor] = (1.0, 1.0)
    contrast_probability: Probability = 0.15
    blur: tuple[Deviation, Deviation] = (0.0, 0.0)
    blur_probability: Probability = 0.2
    noise: Deviation = 0.0
    noise_probability: Probability = 0.1

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        for name, off in _OFF.items():
            value = getattr(self, name)
            if isinstance(value, tuple) and value[0] > value[1]:
                raise ValueError(f"augment.{name} is {list(value)}; it is a range, its lower end first")
            for key, field in type(self).model_fields.items():
                if value == off and key.startswith(f"{name}_") and getattr(self, key) != field.default:
                    shown = list(off) if isinstance(off, tuple) else off
                    raise ValueError(
                        f"augment.{key} does nothing while augment.{name} is {shown}; set that, or leave it out"
                    )
        if self.rotate and not self.rotate_about:
            raise ValueError("augment.rotate needs an axis to turn about; augment.rotate_about is []")
        return self

    def check(self, patch_size: tuple[int, ...]) -> None:
        """Raises ValueError where patches of this size cannot be augmented so."""
        if self.rot90 and patch_size[-1] != patch_size[-2]:
            raise ValueError(f"augment.rot90 needs square patches, patch_size is {list(patch_size)}")
        if len(patch_size) == 2 and "d" in self.flip:
            raise ValueError("augment.flip 'd' needs 3D patches; patch_size has two sides")
        if len(patch_size) == 2 and set(self.rotate_about) != {"d"}:
            raise ValueError(
                "augment.rotate_about 'h' and 'w' need 3D patches; patch_size has two sides, leave it at ['d']"
            )

    @property
    def turns(self) -> bool:
        """Whether patches are turned or scaled, which features cannot be."""
        return self.rot90 or self.rotate > 0 or self.scale != _OFF["scale"]

    def __call__(self, batch: Batch) -> Batch:
        if not (self.flip or self.rot90 or any(getattr(self, name) != off for name, off in _OFF.items())):
            return batch
        self.check(tuple(batch.x_l.shape[2:]))
        assert batch.features is None or not self.turns, "features cannot be turned"
        n = len(batch.x_l)
        changes = self.draw(n + len(batch.x_u))
        x_l, y_l = apply_changes(changes[:n], batch.x_l, batch.y_l)
        x_u, _ = apply_changes(changes[n:], batch.x_u)
        features = None if batch.features is None else _mirror(batch.features, changes)
        return Batch(x_l, y_l, x_u, features)

    def draw(self, count: int) -> Changes:
        """What happens to count patches. As many numbers are drawn whatever is asked for."""
        draws = torch.rand(count, _DRAWS, dtype=torch.float64)
        shares = iter(draws.unbind(1))
        coefficients = 2 * draws[:, -(FIELD_TERMS**3) :] - 1

        def happens(probability: float) -> Tensor:
            return next(shares) < probability

        def factor(limits: tuple[float, float], probability: float) -> Tensor:
            low, high = map(math.log, limits)
            return torch.where(happens(probability), (low + (high - low) * next(shares)).exp(), 1.0)

        def amount(limits: tuple[float, float], probability: float) -> Tensor:
            low, high = limits
            return torch.where(happens(probability), low + (high - low) * next(shares), 0.0)

        turned = happens(self.rotate_probability)[:, None]
        about = torch.tensor([axis in self.rotate_about for axis in "dhw"])
        bent = happens(self.bias_field_probability)[:, None]
        return Changes(
            mirrored=torch.stack([happens(0.5 if axis in self.flip else 0.0) for axis in "dhw"], 1),
            quarter_turns=(4 * next(shares)).long() * self.rot90,
            angles=turned * about * self.rotate * (2 * torch.stack([next(shares) for _ in "dhw"], 1) - 1),
            scale=factor(self.scale, self.scale_probability),
            field=(bent * self.bias_field * coefficients).reshape(count, FIELD_TERMS, FIELD_TERMS, FIELD_TERMS),
            gamma=factor(self.gamma, self.gamma_probability),
            brightness=factor(self.brightness, self.brightness_probability),
            contrast=factor(self.contrast, self.contrast_probability),
            blur=amount(self.blur, self.blur_probability),
            noise=amount((0.0, self.noise), self.noise_probability),
            seeds=(next(shares) * 2**32).long(),
        )


_OFF: dict[str, float | tuple[float, float]] = {
    **dict.fromkeys(("scale", "gamma", "brightness", "contrast"), (1.0, 1.0)),
    **dict.fromkeys(("rotate", "bias_field", "noise"), 0.0),
    "blur": (0.0, 0.0),
}
"""Key -> its value that does nothing; the keys that begin with it say how it is done."""
_DRAWS = 22 + FIELD_TERMS**3
_QUARTER_TURNS: tuple[set[int], ...] = (set(), {-1}, {-2, -1}, {-2})  # the axes that each mirrors first


@overload
def apply_changes(changes: Changes, x: Tensor, y: None = None) -> tuple[Tensor, None]: ...
@overload
def apply_changes(changes: Changes, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]: ...
@torch.no_grad()
def apply_changes(changes: Changes, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Images x (B, C, *S) and labels y (B, *S), changed on their device; the given tensors stay as they are.

    What is turned or scaled is interpolated linearly in x and takes the nearest label in y.
    """
    x, y = _mirror(x, changes), None if y is None else _mirror(y, changes)
    x, y = _turn_and_scale(x, y, changes)
    return _change_intensities(x, changes), y


def _mirror(x: Tensor, changes: Changes) -> Tensor:
    """x (B, ..., [D,] H, W) mirrored and quarter-turned without interpolation, patches that move alike at once."""
    # a quarter turn is a mirror along w, then h and w exchanged; a half turn is a mirror along both
    alike: dict[tuple[tuple[int, ...], bool], list[int]] = {}
    for row, (mirrored, turns) in enumerate(
        zip(changes.mirrored.tolist(), changes.quarter_turns.tolist(), strict=True)
    ):
        along = {axis for axis, chosen in zip((-3, -2, -1), mirrored, strict=True) if chosen}
        along ^= _QUARTER_TURNS[turns]
        alike.setdefault((tuple(sorted(along)), turns % 2 == 1), []).append(row)
    if alike.keys() <= {((), False)}:
        return x
    moved = torch.empty_like(x)
    order = torch.tensor([row for rows in alike.values() for row in rows]).to(x.device, non_blocking=True)
    for (along, exchanged), at in zip(alike, order.split([len(rows) for rows in alike.values()]), strict=True):
        some = x.index_select(0, at).flip(along)
        moved.index_copy_(0, at, some.transpose(-2, -1) if exchanged else some)
    return moved


def _turn_and_scale(x: Tensor, y: Tensor | None, changes: Changes) -> tuple[Tensor, Tensor | None]:
    flat = (changes.angles[:, 1:] == 0).all(1) & (changes.scale == 1) if x.dim() == 5 else torch.ones(len(x)).bool()
    moved = changes.angles.any(1) | (changes.scale != 1)
    for rows, dims in (((moved & flat).nonzero()[:, 0], 2), ((moved & ~flat).nonzero()[:, 0], 3)):
        if not len(rows):
            continue
        at = rows.to(x.device, non_blocking=True)
        sides = x.shape[-dims:]  # every slice of a patch that stays in its plane is a channel
        theta = _theta(changes.angles[rows], changes.scale[rows], sides).to(x.device, non_blocking=True)
        grid = F.affine_grid(theta, [len(rows), 1, *sides], align_corners=False)
        x = x.clone().index_copy_(0, at, _sample(x.index_select(0, at), grid, "bilinear"))
        if y is not None:
            shifted = _sample(y.index_select(0, at).unsqueeze(1).float() + 1, grid, "nearest")[:, 0]  # 0 is the outside
            y = y.clone().index_copy_(0, at, torch.where(shifted == 0, IGNORE, shifted - 1).to(y.dtype))
    return x, y


def _sample(x: Tensor, grid: Tensor, mode: str) -> Tensor:
    """x (R, C, *S) at grid (R, *S, dims) of its last dims axes, 0 outside."""
    stacked = x.reshape(len(x), -1, *grid.shape[1:-1])
    return F.grid_sample(stacked, grid, mode=mode, align_corners=False).reshape(x.shape)


def _theta(angles: Tensor, scale: Tensor, sides: Sequence[int]) -> Tensor:
    """(R, dims, dims + 1) float32 for affine_grid: from where in the patch each voxel comes, in shares of its sides.

    angles: (R, 3) degrees about d, h, w, turned in voxels and in the order w, h, d. scale: (R,). sides: of the patch, or h, w
    alone.
    """
    about_d, about_h, about_w = torch.deg2rad(angles).unbind(1)
    # coordinates are (w, h, d), as grid_sample has them
    turn = _turn(0, 1, about_d) @ _turn(2, 0, about_h) @ _turn(1, 2, about_w) / scale[:, None, None]
    dims = len(sides)
    lengths = torch.tensor(sides[::-1], dtype=turn.dtype)
    theta = turn[:, :dims, :dims] * lengths / lengths[:, None]  # a turn of voxels, whatever the sides of the patch
    return F.pad(theta, (0, 1)).float()


def _turn(first: int, second: int, angle: Tensor) -> Tensor:
    """(R, 3, 3) rotations by angle (R,) in radians, from the first axis to the second."""
    turn = torch.eye(3, dtype=angle.dtype).repeat(len(angle), 1, 1)
    turn[:, first, first] = turn[:, second, second] = angle.cos()
    turn[:, second, first] = angle.sin()
    turn[:, first, second] = -angle.sin()
    return turn


def _change_intensities(x: Tensor, changes: Changes) -> Tensor:
    """In the order of a scanner: contrast of the tissue, coil, optics, noise. Patches to which nothing happens stay exact."""
    bent = (changes.gamma != 1) | changes.field.flatten(1).any(1)
    moved = (changes.brightness != 1) | (changes.contrast != 1)
    blurred, noisy = changes.blur > 0, changes.noise > 0
    rows = (bent | moved | blurred | noisy).nonzero()[:, 0]
    if not len(rows):
        return x
    at = rows.to(x.device, non_blocking=True)
    unit, low, extent = unit_range(x.index_select(0, at), per_channel=True)

    def where(chosen: Tensor) -> Tensor:
        return chosen[rows].nonzero()[:, 0]

    dims = x.dim() - 2
    field = changes.field[rows] if dims == 3 else changes.field[rows, 0]
    sigma = changes.blur[rows, None].expand(-1, dims)
    unit = change_some(unit, where(bent), bias_field_and_gamma, field, changes.gamma[rows])
    unit = change_some(unit, where(moved), _brightness_and_contrast, changes.brightness[rows], changes.contrast[rows])
    unit = change_some(unit, where(blurred), gaussian_blur, sigma)
    unit = change_some(unit, where(noisy), _add_noise, changes.noise[rows], changes.seeds[rows])
    return x.clone().index_copy_(0, at, unit.mul(extent).add_(low).to(x.dtype))


def _brightness_and_contrast(x: Tensor, brightness: Tensor, contrast: Tensor) -> Tensor:
    """x: (R, C, *S), changed in place. The others: (R,)."""
    x = x.mul_(column(brightness, x))
    axes = tuple(range(2, x.dim()))
    low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
    return x.lerp_(x.mean(axes, keepdim=True), 1 - column(contrast, x)).clamp_(low, high)


def _add_noise(x: Tensor, deviation: Tensor, seeds: Tensor) -> Tensor:
    """x: (R, C, *S), changed in place. The others: (R,)."""
    return x.addcmul_(gaussian_noise(seeds, x), column(deviation, x))
