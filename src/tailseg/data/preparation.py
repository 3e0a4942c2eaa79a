"""The recipe of a prepared store, the named recipes, and what one does to one scan.

Labels take part in the resampling and in nothing before it: what needs labels could not be repeated on a new scan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator

from tailseg.core import IGNORE
from tailseg.data.geometry import Geometry, Spacing
from tailseg.data.image import Image, Shape
from tailseg.data.intensity import Intensity, MinMax, Window, ZScore

Voxels = Annotated[int, Field(ge=1)]
Millimetres = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Crop(BaseModel):
    """The box of all voxels of the first channel above the threshold, widened on every side.

    threshold: in the scan's own intensities, HU for CT. margin: mm.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: Annotated[float, Field(allow_inf_nan=False)]
    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class Preparation(BaseModel):
    """How a scan becomes arrays: orientation, crop, resampling, intensity, in this order.

    Axes are (D, H, W) after the orientation; null in spacing or grid keeps that axis as it is.

    orientation: "canonical" turns the axes to the nearest of right, anterior, superior; "file" leaves them as stored.
    crop: to what is brighter than a threshold, null for the whole scan.
    spacing: mm per voxel, reached as closely as a whole number of voxels over the same field of view allows.
    grid: voxels over the same field of view. image_interpolation: of the resampling. label_interpolation: "legacy-nearest"
    takes voxel floor(i * old / new), up to half a voxel beside "nearest". intensity: the normalisation of each channel.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    orientation: Literal["canonical", "file"] = "canonical"
    crop: Crop | None = None
    spacing: tuple[Millimetres | None, Millimetres | None, Millimetres | None] | None = None
    grid: tuple[Voxels | None, Voxels | None, Voxels | None] | None = None
    image_interpolation: Literal["linear", "nearest"] = "linear"
    label_interpolation: Literal["nearest", "legacy-nearest"] = "nearest"
    intensity: Intensity

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.spacing is not None and self.grid is not None:
            raise ValueError("a preparation has a spacing or a grid, not both; set one of them to null")
        return self

    def describe(self) -> str:
        """In a few words, in the order of what happens."""
        steps = ["turned to RAS+" if self.orientation == "canonical" else "axes as stored"]
        if self.crop:
            steps.append(f"cropped to what is above {self.crop.threshold:g}, {self.crop.margin:g} mm around it")
        if target := self.grid or self.spacing:
            sides = " x ".join("own" if side is None else f"{side:g}" for side in target)
            unit = "voxels" if self.grid else "mm"
            how = f"{self.image_interpolation} image, {self.label_interpolation} label"
            steps.append(f"resampled to {sides} {unit} ({how})")
        options = self.intensity.model_dump(exclude={"name"})
        told = ", ".join(f"{key} {value}" for key, value in options.items())
        steps.append(self.intensity.name + (f" ({told})" if told else ""))
        return "; ".join(steps)

    def target_shape(self, shape: Shape, spacing: Spacing) -> Shape:
        """Voxels (D, H, W) after resampling of a scan that has this shape and spacing after orientation and crop."""
        if self.grid is not None:
            d, h, w = (old if new is None else new for old, new in zip(shape, self.grid, strict=True))
        elif self.spacing is not None:
            d, h, w = (
                size if new is None else max(1, round(size * old / new))
                for size, old, new in zip(shape, spacing, self.spacing, strict=True)
            )
        else:
            return shape
        return d, h, w


def _dhc(grid: tuple[int, int, int]) -> Preparation:
    """DHC's first release, the one behind its published tables: the whole volume, as stored, onto one grid in raw HU."""
    window = Window(low=-75, high=275, rescale="volume")
    return Preparation(orientation="file", grid=grid, label_interpolation="legacy-nearest", intensity=window)


def _acdc(side: int) -> Preparation:
    """SSL4MIS rescales each volume and then zooms its slices, image and label, by nearest neighbour.

    Two deviations: its zoom aligns the centres of the corner voxels, ours the edges of the field of view; and our min-max
    comes after the zoom, which matters where a larger slice loses its extremes.
    """
    return Preparation(
        orientation="file", grid=(None, side, side), image_interpolation="nearest", intensity=MinMax()
    )  # fmt: skip


PREPARATIONS: Mapping[str, Preparation] = MappingProxyType(
    {
        "dhc-p23": _dhc((80, 160, 160)),
        "dhc-p23-half": _dhc((40, 80, 80)),
        "acdc": _acdc(256),
        "acdc-half": _acdc(128),
        # UA-MT also crops around the label, which a scan without one could not follow.
        "la": Preparation(orientation="file", intensity=ZScore()),
        "ct": Preparation(
            crop=Crop(threshold=-300, margin=5),
            spacing=(3.0, 1.5, 1.5),
            intensity=Window(low=-160, high=240, rescale="window"),
        ),
        "mr": Preparation(intensity=ZScore(nonzero=True)),
    }
)


@dataclass(frozen=True)
class PreparedCase:
    """image: (C, D, H, W) float32. label: (D, H, W) uint8 or None. spacing: mm, (D, H, W), exact for this grid.

    constant_channels: those without contrast, see data.intensity.
    lost_classes: those of which the label held voxels and, after crop and resampling, holds none.
    """

    image: np.ndarray
    label: np.ndarray | None
    spacing: Spacing
    geometry: Geometry
    constant_channels: tuple[int, ...] = ()
    lost_classes: tuple[int, ...] = ()


def prepare_case(image: Image, label: np.ndarray | None, preparation: Preparation) -> PreparedCase:
    """image: array (C, D, H, W). label: (D, H, W) class indices and IGNORE, on the same grid.

    Raises ValueError if the crop finds no voxel above its threshold.
    """
    geometry = _plan(image, preparation)
    array = np.empty((len(image.array), *geometry.shape), np.float32)
    constant: list[int] = []
    for c, channel in enumerate(image.array):
        array[c] = _resample(geometry.view(channel), geometry.shape, preparation.image_interpolation)
        if preparation.intensity.apply(array[c]):
            constant.append(c)
    if label is None:
        return PreparedCase(array, None, geometry.spacing, geometry, tuple(constant))
    inside = geometry.view(label)
    prepared = np.ascontiguousarray(_resample(inside, geometry.shape, preparation.label_interpolation))
    before, after = (count_labels(labels).sum(0)[:IGNORE] for labels in (label, prepared))
    lost = tuple(np.flatnonzero((before > 0) & (after == 0)).tolist())
    return PreparedCase(array, prepared, geometry.spacing, geometry, tuple(constant), lost)


def count_labels(label: np.ndarray) -> np.ndarray:
    """(D, 256) voxels of each value in each plane of label (D, H, W) uint8; of a whole scan bincount makes int64 first."""
    return np.stack([np.bincount(plane.ravel(), minlength=256) for plane in label])


def _plan(image: Image, preparation: Preparation) -> Geometry:
    _, d, h, w = image.array.shape
    geometry = Geometry.whole((d, h, w), image.affine, canonical=preparation.orientation == "canonical")
    if preparation.crop is not None:
        first = geometry.view(image.array[0])
        geometry = geometry.cropped(*_foreground_box(first, preparation.crop, geometry.spacing))
    return geometry.resampled(preparation.target_shape(geometry.shape, geometry.spacing))


def _foreground_box(array: np.ndarray, crop: Crop, spacing: Spacing) -> tuple[Shape, Shape]:
    """First voxel and end of the crop on each axis of array (D, H, W)."""
    foreground = array > crop.threshold  # (D, H, W) bool
    box: list[tuple[int, int]] = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        hit = np.flatnonzero(foreground.any(axis=others))
        if hit.size == 0:
            raise ValueError(
                f"no voxel is above the crop threshold {crop.threshold:g} (maximum {array.max():g}); "
                "lower crop.threshold or set crop to null"
            )
        margin = int(np.ceil(crop.margin / spacing[axis]))
        box.append((max(0, int(hit[0]) - margin), min(array.shape[axis], int(hit[-1]) + 1 + margin)))
    (d0, d1), (h0, h1), (w0, w1) = box
    return (d0, h0, w0), (d1, h1, w1)


def _resample(array: np.ndarray, shape: Shape, mode: Literal["linear", "nearest", "legacy-nearest"]) -> np.ndarray:
    """array (D, H, W) on another number of voxels over the same field of view; the array itself if that is the same."""
    if array.shape == shape:
        return array
    if mode == "linear":
        voxels = torch.from_numpy(np.require(array, np.float32, ["C", "W"]))[None, None]
        return F.interpolate(voxels, size=shape, mode="trilinear", align_corners=False)[0, 0].numpy()
    planes, rows, columns = (nearest_index(old, new, mode) for old, new in zip(array.shape, shape, strict=True))
    made = np.empty(shape, array.dtype)
    for plane, source in zip(made, planes, strict=True):  # np.ix_ over all axes at once takes twice as long or more
        np.take(array[source].take(rows, 0), columns, 1, out=plane)
    return made


def nearest_index(old: int, new: int, mode: Literal["nearest", "legacy-nearest"]) -> np.ndarray:
    """(new,) index into an axis of old voxels, rounded as torch rounds, whose legacy mode the published labels used."""
    index = torch.arange(old, dtype=torch.float32)[None, None]
    rounding = "nearest-exact" if mode == "nearest" else "nearest"
    return F.interpolate(index, size=new, mode=rounding)[0, 0].long().numpy()
