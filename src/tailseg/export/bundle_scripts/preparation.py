"""Two steps of the preparation that MONAI's own transforms cannot be configured for; both undo themselves."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.config.type_definitions import KeysCollection
from monai.data.meta_tensor import MetaTensor
from monai.transforms.croppad.array import CropForeground, SpatialCrop
from monai.transforms.inverse import InvertibleTransform
from monai.transforms.spatial.array import Resize
from monai.transforms.transform import MapTransform


class CropBrightd(MapTransform, InvertibleTransform):
    """Crop to the box of all voxels of the first channel above threshold, widened by margin mm, not beyond the scan."""

    def __init__(self, keys: KeysCollection, threshold: float, margin: float) -> None:
        super().__init__(keys)
        self.threshold, self.margin = threshold, margin
        self.crop = SpatialCrop(roi_start=[0, 0, 0], roi_end=[1, 1, 1])

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        made = dict(data)
        for key in self.key_iterator(made):
            image = made[key]
            if not bool((image[0] > self.threshold).any()):
                raise ValueError(f"no voxel is above the crop threshold {self.threshold:g}")
            margin = [math.ceil(self.margin / float(side)) for side in image.pixdim]
            finder = CropForeground(lambda x: x > self.threshold, channel_indices=0, margin=margin, allow_smaller=True)
            start, end = finder.compute_bounding_box(image)
            self.crop.slices = SpatialCrop.compute_slices(
                roi_start=np.maximum(start, 0), roi_end=np.minimum(end, image.shape[1:])
            )
            made[key] = self.crop(image)
        return made

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return {**data, **{key: self.crop.inverse(data[key]) for key in self.key_iterator(dict(data))}}


class ResampleOverFieldOfViewd(MapTransform, InvertibleTransform):
    """Resample to spacing (mm) or grid (voxels), both in the order of the axes of the array, over the same field of view.

    spacing is reached as closely as a whole number of voxels allows; None keeps an axis as it is. mode: of the image. The
    inverse is trilinear: what it brings back are probabilities.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spacing: Sequence[float | None] | None = None,
        grid: Sequence[int | None] | None = None,
        mode: str = "trilinear",
    ) -> None:
        super().__init__(keys)
        self.spacing, self.grid, self.mode = spacing, grid, mode

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        made = dict(data)
        for key in self.key_iterator(made):
            image = made[key]
            before = image.shape[1:]
            resized: Any = Resize(self.target(image), mode=self.mode)(image)
            resized.applied_operations.pop()
            self.push_transform(resized, orig_size=tuple(before))
            made[key] = resized
        return made

    def target(self, image: MetaTensor) -> list[int]:
        """Voxels after the resampling, (W, H, D)."""
        sides = [int(side) for side in image.shape[1:]]
        if self.grid is not None:
            return [old if new is None else new for old, new in zip(sides, self.grid, strict=True)]
        # as numpy gives it: rounding of the spacing decides about halves
        old_spacing = np.linalg.norm(np.asarray(image.affine, dtype=np.float64)[:3, :3], axis=0)
        return [
            side if new is None else max(1, round(side * float(old) / new))
            for side, old, new in zip(sides, old_spacing, self.spacing or (), strict=True)
        ]

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        made = dict(data)
        for key in self.key_iterator(made):
            size = self.pop_transform(made[key])["orig_size"]
            restored: Any = Resize([int(side) for side in size], mode="trilinear")(made[key])
            restored.applied_operations.pop()
            made[key] = restored
        return made
