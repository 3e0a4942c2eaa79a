"""Features of whole slices: how many places they have, and that a patch reads what lies where it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tailseg.parts.dense_teacher import RANDOM_TINY, DINOv3, slice_positions, slices_as_rgb
from tailseg.parts.slice_features import SliceFeatures

transformers: Any = pytest.importorskip("transformers", reason="DINOv3 needs the extra tailseg[dino]")


def make(
    patch_size: tuple[int, ...] = (8, 32, 48),
    *,
    teacher: str = RANDOM_TINY,
    slices: int = 3,
    slice_size: int = 64,
    context: Literal["neighbours", "repeat"] = "neighbours",
) -> SliceFeatures:
    return SliceFeatures(teacher, patch_size, slices=slices, slice_size=slice_size, context=context)


def coordinates(depth: int, height: int, width: int, grid: tuple[int, int]) -> np.ndarray:
    """Features that name the slice, and the voxel coordinates of the centre of their place, of a scan of this shape."""
    z, y, x = np.meshgrid(
        np.arange(depth),
        (np.arange(grid[0]) + 0.5) * height / grid[0],
        (np.arange(grid[1]) + 0.5) * width / grid[1],
        indexing="ij",
    )
    return np.stack([z, y, x], -1).astype(np.float16)  # (D, g_y, g_x, 3)


@pytest.mark.parametrize("context", ["neighbours", "repeat"])
@pytest.mark.parametrize("patch_size", [(5, 32, 48), (32, 48)])
def test_a_patch_that_is_the_whole_slice_reads_what_the_teacher_says_of_it_alone(
    patch_size: tuple[int, ...], context: Literal["neighbours", "repeat"]
):
    torch.manual_seed(0)
    scan = torch.rand(1, 5, 32, 48)
    companion = make(patch_size, context=context)
    (array,) = companion.encode([scan])
    assert array.shape == (5, 4, 4, 32) and array.dtype == np.float16
    flat = len(patch_size) == 2
    start, extent = ((2, 0, 0), (1, 32, 48)) if flat else ((0, 0, 0), (5, 32, 48))
    cut = companion.cut(array, (5, 32, 48), start, extent)  # (C_t, k, g, g)
    patch = scan[None, :, 2] if flat else scan[None]
    images = slices_as_rgb(patch, slice_positions(extent[0], 3), context)
    live = DINOv3(RANDOM_TINY)(F.interpolate(images, size=(64, 64), mode="bilinear", antialias=True))
    assert live.std() > 0.1
    torch.testing.assert_close(cut.transpose(0, 1).float(), live, atol=4e-3, rtol=0)


def test_a_patch_gets_as_many_places_as_it_would_alone():
    companion = make((8, 32, 48), slice_size=64)
    assert companion.grid(32, 48) == (4, 4)
    assert companion.grid(80, 80) == (10, 7)  # 6.67 places across
    assert companion.grid(3, 3) == (1, 1)
    (array,) = companion.encode([torch.rand(1, 2, 80, 80)])
    assert array.shape == (2, 10, 7, 32)
    assert companion.cut(array, (2, 80, 80), (0, 20, 30), (2, 32, 48)).shape == (32, 2, 4, 4)


@pytest.mark.parametrize("start", [(0, 0, 0), (3, 17, 9), (12, 48, 32)])
def test_a_patch_reads_its_own_slices_and_places(start: tuple[int, int, int]):
    shape, patch_size = (20, 80, 80), (8, 32, 48)
    companion = make(patch_size)
    array = coordinates(*shape, companion.grid(80, 80))
    cut = companion.cut(array, shape, start, patch_size).float()  # (3, k, g, g)
    z, y, x = (value.to(torch.float32) for value in cut)
    assert z[:, 1, 2].tolist() == [start[0] + at for at in slice_positions(8, 3)]
    half = 40 / torch.tensor(companion.grid(80, 80))  # of a place: beyond the outermost centre nothing is known
    for axis, read in ((1, y[0, :, 0]), (2, x[0, 0])):
        wanted = start[axis] + (torch.arange(4) + 0.5) * patch_size[axis] / 4
        edge = float(half[axis - 1])
        torch.testing.assert_close(read, wanted.clamp(edge, 80 - edge), atol=0.05, rtol=0)


def test_what_lies_outside_of_the_scan_is_zero():
    companion = make((8, 32, 48))
    array = np.ones((4, *companion.grid(16, 24), 2), np.float16)
    cut = companion.cut(array, (4, 16, 24), (-2, -8, -12), (8, 32, 48))  # as a padded patch lies about a small scan
    assert cut.shape == (2, 3, 4, 4)
    inside = torch.tensor([[0.0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    assert [-2 + z for z in slice_positions(8, 3)] == [-1, 2, 4]
    assert torch.equal(cut[0].float(), torch.stack([inside * 0, inside, inside * 0]))
    assert not companion.cut(array, (4, 16, 24), (0, 100, 0), (8, 32, 48)).any()


def test_several_scans_are_encoded_one_after_the_other():
    companion, scans = make(slice_size=32), [torch.rand(1, 9, 32, 48), torch.rand(3, 2, 64, 48)]
    first, second = companion.encode(scans)
    assert first.shape == (9, 2, 2, 32) and second.shape == (2, 4, 2, 32)
    assert np.array_equal(second, next(companion.encode(scans[1:])))


def test_the_key_tells_everything_the_arrays_depend_on(tmp_path: Path):
    def key(**options: Any) -> str:
        return make(**options).key

    assert key() == key(slices=5) == key(patch_size=(4, 32, 48))
    assert len({key(), key(slice_size=32), key(context="repeat"), key(patch_size=(8, 32, 32))}) == 4
    assert key(patch_size=(32, 48)) == key(context="repeat")  # single slices have no neighbours
    config = transformers.DINOv3ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    keys = [key()]
    for seed, folder in enumerate(("one", "two")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformers.DINOv3ViTModel(config).save_pretrained(tmp_path / folder)
        keys.append(key(teacher=str(tmp_path / folder)))
    assert len(set(keys)) == 3
    (tmp_path / "one").rename(tmp_path / "elsewhere")
    assert key(teacher=str(tmp_path / "elsewhere")) == keys[1]
