from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tailseg.data import geometry as geometry_module
from tailseg.data.geometry import Geometry, restore_labels, restore_probs
from tailseg.data.image import Image
from tailseg.data.intensity import MinMax
from tailseg.data.preparation import Crop, Preparation, prepare_case

TURNS = [
    (axes, signs)
    for axes in itertools.permutations(range(3))
    for signs in [(1, 1, 1), (-1, -1, 1), (1, -1, -1), (-1, 1, -1)]
]


def tilted_affine(axes: tuple[int, ...] = (0, 1, 2), signs: tuple[int, ...] = (1, 1, 1)) -> np.ndarray:
    """An oblique affine whose file axis i runs nearest to anatomical axis axes[i], backwards where the sign is negative."""
    angle = 0.2
    tilt = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = tilt @ np.eye(3)[:, list(axes)] * np.array(signs) * np.array([1.5, 2.0, 3.0])
    affine[:3, 3] = [-40, 25, 7]
    return affine


def slabs_of(probs: Tensor, sizes: list[int]) -> list[tuple[int, Tensor]]:
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    assert sum(sizes) == probs.shape[1]
    return [(start, probs[:, start : start + size]) for start, size in zip(starts, sizes, strict=True)]


def grid_to_grid(prepared: tuple[int, int, int], native: tuple[int, int, int]) -> Geometry:
    return Geometry.whole(native, np.eye(4), canonical=False).resampled(prepared)


@pytest.mark.parametrize(
    ("prepared", "native", "sizes"),
    [
        ((8, 6, 7), (19, 15, 13), [1, 3, 4]),
        ((8, 6, 7), (19, 15, 13), [8]),
        ((17, 12, 14), (5, 6, 9), [4, 1, 11, 1]),
        ((9, 10, 11), (9, 21, 5), [2, 7]),
        ((1, 4, 4), (6, 8, 8), [1]),
        ((6, 4, 4), (1, 3, 3), [1, 1, 1, 1, 1, 1]),
        ((40, 8, 8), (73, 8, 8), [7] * 5 + [5]),
    ],
)
def test_slabs_restore_what_trilinear_interpolation_of_the_whole_gives(
    prepared: tuple[int, int, int], native: tuple[int, int, int], sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(geometry_module, "CHUNK_VALUES", 5 * native[1] * native[2] * 2)  # two planes at a time
    probs = torch.rand(5, *prepared, generator=torch.Generator().manual_seed(0)).softmax(0)
    expected = F.interpolate(probs[None], size=native, mode="trilinear", align_corners=False)[0]
    geometry = grid_to_grid(prepared, native)

    restored = torch.from_numpy(restore_probs(slabs_of(probs, sizes), geometry))
    torch.testing.assert_close(restored, expected, atol=1e-6, rtol=0)

    labels = restore_labels(slabs_of(probs, sizes), geometry)
    best = expected.topk(2, dim=0).values
    clear = (best[0] - best[1] > 1e-6).numpy()
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(labels[clear], expected.argmax(0).numpy()[clear])
    np.testing.assert_array_equal(labels, restored.argmax(0).numpy())


def test_equal_grids_are_restored_bit_for_bit() -> None:
    probs = torch.rand(3, 5, 6, 7, generator=torch.Generator().manual_seed(1))
    geometry = grid_to_grid((5, 6, 7), (5, 6, 7))
    np.testing.assert_array_equal(restore_probs(slabs_of(probs, [2, 3]), geometry), probs.numpy())


def test_half_precision_slabs_are_interpolated_in_float32() -> None:
    probs = torch.rand(3, 4, 4, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    geometry = grid_to_grid((4, 4, 4), (9, 9, 9))
    expected = restore_probs([(0, probs.float())], geometry)
    np.testing.assert_array_equal(restore_probs([(0, probs)], geometry), expected)


@pytest.mark.parametrize(("axes", "signs"), TURNS)
def test_labels_come_back_to_the_scan_they_were_prepared_from(axes: tuple[int, ...], signs: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    label = np.zeros((6, 8, 7), np.uint8)
    label[1:5, 2:7, 1:6] = rng.integers(0, 4, (4, 5, 5))
    image = Image((label > 0).astype(np.float32)[None], tilted_affine(axes, signs))
    preparation = Preparation(crop=Crop(threshold=0.5, margin=0), intensity=MinMax())

    prepared = prepare_case(image, label, preparation)
    assert prepared.label is not None
    assert np.prod(prepared.label.shape) < label.size
    onehot = F.one_hot(torch.from_numpy(prepared.label).long(), 4).movedim(-1, 0).float()
    sizes = [1, prepared.label.shape[0] - 1]

    np.testing.assert_array_equal(restore_labels(slabs_of(onehot, sizes), prepared.geometry), label)
    np.testing.assert_array_equal(restore_probs(slabs_of(onehot, sizes), prepared.geometry).argmax(0), label)


@pytest.mark.parametrize(("axes", "signs"), TURNS[::3])
@pytest.mark.parametrize("orientation", ["canonical", "file"])
def test_prepared_affine_says_where_a_voxel_lies_in_the_patient(
    axes: tuple[int, ...], signs: tuple[int, ...], orientation: str
) -> None:
    affine = tilted_affine(axes, signs)
    k, j, i = np.meshgrid(np.arange(12), np.arange(14), np.arange(10), indexing="ij")
    position = np.einsum("ab,bkji->akji", affine, np.stack([i, j, k, np.ones_like(i)]))[:3]  # (3, D, H, W) mm
    inside = np.zeros(i.shape, np.float32)
    inside[1:11, 2:13, 1:9] = 1
    recipe = {"orientation": orientation, "spacing": (1.1, 2.3, None), "crop": {"threshold": 0.5}}
    preparation = Preparation.model_validate(recipe | {"intensity": {"name": "window", **_same(position)}})
    prepared = prepare_case(Image(np.stack([inside, *position]).astype(np.float32), affine), None, preparation)

    found = prepared.image[1:] * (position.max() - position.min()) + position.min()
    d, h, w = prepared.geometry.shape
    k, j, i = np.meshgrid(np.arange(d), np.arange(h), np.arange(w), indexing="ij")
    expected = np.einsum("ab,bkji->akji", prepared.geometry.prepared_affine, np.stack([i, j, k, np.ones_like(i)]))[:3]
    within = (slice(None), slice(2, -2), slice(2, -2), slice(2, -2))  # the interpolation repeats voxels at the border
    np.testing.assert_allclose(found[within], expected[within], atol=1e-3)
    spacing = np.linalg.norm(prepared.geometry.prepared_affine[:3, :3], axis=0)[::-1]
    np.testing.assert_allclose(spacing, prepared.spacing)


def _same(values: np.ndarray) -> dict[str, float | str]:
    """A window that changes nothing but the scale."""
    return {"low": float(values.min()), "high": float(values.max()), "rescale": "window"}


def test_outside_the_crop_is_background() -> None:
    geometry = Geometry.whole((6, 6, 6), np.eye(4), canonical=False).cropped((2, 2, 2), (4, 5, 6)).resampled((1, 3, 2))
    probs = torch.zeros(3, 1, 3, 2)
    probs[2] = 1
    labels = restore_labels([(0, probs)], geometry)
    assert labels.dtype == np.uint8
    assert (labels[2:4, 2:5, 2:6] == 2).all()
    assert np.count_nonzero(labels) == 2 * 3 * 4
    restored = restore_probs([(0, probs)], geometry)
    np.testing.assert_array_equal(restored.sum(0), np.ones((6, 6, 6)))
    np.testing.assert_array_equal(restored.argmax(0), labels)


@pytest.mark.parametrize(
    "slabs",
    [
        [(0, torch.zeros(2, 3, 4, 4))],
        [(0, torch.zeros(2, 2, 4, 4)), (3, torch.zeros(2, 2, 4, 4))],
        [(0, torch.zeros(2, 3, 4, 4)), (2, torch.zeros(2, 3, 4, 4))],
        [(0, torch.zeros(2, 5, 4, 3))],
        [],
    ],
)
def test_slabs_that_do_not_cover_the_grid_are_refused(slabs: list[tuple[int, Tensor]]) -> None:
    with pytest.raises(ValueError, match="prepared grid"):
        restore_labels(slabs, grid_to_grid((5, 4, 4), (7, 7, 7)))
    with pytest.raises(ValueError, match="prepared grid"):
        restore_probs(slabs, grid_to_grid((5, 4, 4), (7, 7, 7)))


def test_geometry_survives_json_exactly() -> None:
    geometry = Geometry.whole((9, 8, 7), tilted_affine((2, 0, 1), (1, -1, -1)), canonical=True)
    geometry = geometry.cropped((1, 2, 0), (6, 7, 5)).resampled((11, 4, 5))
    assert Geometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry
