"""Scans and label maps small enough for a page: reduced by whole blocks of voxels, as NIfTI.

Arrays here are indexed [i, j, k] along right, anterior, superior, as the page's viewer expects them.
"""

from __future__ import annotations

import base64
import gzip
import math
from collections.abc import Sequence

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from scipy import ndimage

from tailseg.data.image import Image

UNKNOWN = 255
"""Label of voxels whose value is none of the classes, such as an ignore value."""

Shape = tuple[int, int, int]


def turned_to_ras(image: Image) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (I, J, K) in the order nearest to right, anterior, superior, and their affine. image: (D, H, W)."""
    orientation = io_orientation(image.affine)
    array = image.array.T
    return apply_orientation(array, orientation), image.affine @ inv_ornt_aff(orientation, array.shape)


def reduced_shape(shape: Sequence[int], spacing: Sequence[float], target: float) -> Shape:
    """(I, J, K) of a grid over the same field of view whose blocks are no longer than target (mm), and never finer."""
    i, j, k = (min(n, math.ceil(n * step / target - 1e-6)) for n, step in zip(shape, spacing, strict=True))
    return i, j, k


def reduced_affine(affine: np.ndarray, old: Shape, new: Shape) -> np.ndarray:
    """Centres of blocks -> RAS+ mm. old, new: the shapes of both grids."""
    scale = np.array(old) / np.array(new)
    step = np.diag([*scale, 1.0])
    step[:3, 3] = (scale - 1) / 2
    return affine @ step


def reduce_image(array: np.ndarray, shape: Shape) -> np.ndarray:
    """Means over the blocks of a grid of this shape, float32. What is not finite counts as 0."""
    array = np.nan_to_num(array.astype(np.float32), nan=0, posinf=0, neginf=0)
    return _summed(array, [_overlaps(old, new) for old, new in zip(array.shape, shape, strict=True)]) / np.float32(
        math.prod(array.shape) / math.prod(shape)
    )


def reduce_labels(labels: np.ndarray, shape: Shape) -> np.ndarray:
    """labels: (I, J, K) uint8, 0 is the background. Every class keeps its share of the volume, and one block at least.

    From the rarest class to the largest, each takes those free blocks that hold most of it, as many as its volume fills;
    what nobody takes is background. A majority vote would lose every organ thinner than half a block.
    """
    reduced = np.zeros(shape, np.uint8)
    free = np.ones(shape, bool)
    block = math.prod(labels.shape) / math.prod(shape)  # voxels
    axes = [_overlaps(old, new) for old, new in zip(labels.shape, shape, strict=True)]
    boxes = {value: box for value, box in enumerate(ndimage.find_objects(labels), start=1) if box is not None}
    inside = {value: int((labels[box] == value).sum()) for value, box in boxes.items()}  # voxels
    for value in sorted(inside, key=lambda value: (inside[value], value)):
        weights = [axis[:, side] for axis, side in zip(axes, boxes[value], strict=True)]
        touched = [np.flatnonzero(axis.any(1)) for axis in weights]
        corner = tuple(slice(at[0], at[-1] + 1) for at in touched)
        parts = [axis[side] for axis, side in zip(weights, corner, strict=True)]
        held = _summed((labels[boxes[value]] == value).astype(np.float32), parts)  # voxels in each block
        held = np.where(free[corner], held, 0)
        best = np.argsort(-held, axis=None, kind="stable")[: max(1, round(inside[value] / block))]
        best = best[held.ravel()[best] > 0]
        at = np.stack(np.unravel_index(best, held.shape)) + np.array([[side.start] for side in corner])
        if not best.size:  # rarer classes took all of its blocks: the nearest free one
            spots = np.argwhere(free)
            middle = [(side.start + side.stop - 1) / 2 for side in corner]
            at = spots[np.square(spots - middle).sum(1).argmin()][:, None]
        reduced[tuple(at)] = value
        free[tuple(at)] = False
    return reduced


def class_indices(array: np.ndarray, label_values: Sequence[int]) -> np.ndarray:
    """Values of a label file -> positions in label_values, uint8; any other value -> UNKNOWN."""
    order = np.argsort(label_values)
    values = np.asarray(label_values)[order]
    indices = np.empty(array.shape, np.uint8)
    for plane, out in zip(array, indices, strict=True):  # slices: the positions are 64 bit
        at = np.clip(np.searchsorted(values, plane), 0, len(values) - 1)
        out[...] = np.where(values[at] == plane, order[at], UNKNOWN)
    return indices


def to_grey(array: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """uint8 in even steps. The window is that of the organs, half as wide again to either side; without any, of the scan.

    array: (I, J, K) float32. labels: (I, J, K) uint8.
    """
    organs = (labels > 0) & (labels < UNKNOWN)
    low, high = np.percentile(array[organs] if organs.any() else array, (1, 99))
    margin = (high - low) / 2 if organs.any() else 0
    low, high = low - margin, high + margin
    grey = np.clip((array - low) / max(high - low, 1e-6), 0, 1)
    return (2 * np.rint(grey * 127)).astype(np.uint8)  # the last bit is noise, and the half of what does not compress


def to_nifti_text(array: np.ndarray, affine: np.ndarray) -> str:
    """A gzipped NIfTI-1 file of uint8 (I, J, K) as base64."""
    nifti = nib.Nifti1Image(array, affine)  # pyright: ignore[reportPrivateImportUsage]
    nifti.header.set_xyzt_units("mm")
    nifti.set_qform(affine, code=1)
    nifti.set_sform(affine, code=1)
    nifti.header["cal_min"], nifti.header["cal_max"] = 0, 255
    return packed(nifti.to_bytes())


def packed(data: bytes) -> str:
    """Gzipped, as base64: the same for the same bytes."""
    return base64.b64encode(gzip.compress(data, compresslevel=9, mtime=0)).decode()


def _overlaps(old: int, new: int) -> np.ndarray:
    """(new, old) float32: how much of each voxel lies in each block, along one axis."""
    edges = np.arange(new + 1) * (old / new)
    voxels = np.arange(old)
    low, high = np.maximum(edges[:-1, None], voxels), np.minimum(edges[1:, None], voxels + 1)
    overlaps = np.clip(high - low, 0, 1)
    return np.where(overlaps < 1e-6, 0, overlaps).astype(np.float32)


def _summed(array: np.ndarray, weights: Sequence[np.ndarray]) -> np.ndarray:
    """Sums over the voxels of each block. array: (I, J, K) float32. weights: of every axis, (blocks, voxels)."""
    for axis in weights:
        array = np.tensordot(array, axis, axes=(0, 1))  # the next axis comes to the front
    return array
