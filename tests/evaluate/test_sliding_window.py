from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tailseg.evaluate.sliding_window import batch_for, sliding_window


def random_image(*shape: int) -> torch.Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def pointwise(x: torch.Tensor) -> torch.Tensor:
    """Probabilities of three classes that depend on nothing but the voxel itself."""
    return torch.softmax(torch.stack([x[:, 0], x[:, 1] * 2, x.sum(1).sin()], 1), 1)


def placed(x: torch.Tensor) -> torch.Tensor:
    """Probabilities that depend on the voxel, its neighbours and where it lies in the window."""
    where = torch.arange(math.prod(x.shape[2:])).view(x.shape[2:]).sin()
    return torch.softmax(torch.stack([x[:, 0] * where, x[:, 1].roll(1, -1) + where, x[:, 0].cumsum(1)], 1), 1)


def whole(slabs) -> torch.Tensor:
    return torch.cat([slab for _, slab in slabs], 1)


def naive(predict, image, patch_size, overlap, weighting) -> np.ndarray:
    """The plain way: whole volumes of sums and of weights in float64, one window at a time."""
    patch = (1, *patch_size)[-3:]
    missing = [max(0, p - s) for p, s in zip(patch, image.shape[1:], strict=True)]
    padded = np.pad(image.numpy(), [(0, 0), *((m // 2, m - m // 2) for m in missing)])
    weight = np.ones(patch)
    if weighting == "gaussian":
        for axis, p in enumerate(patch):
            curve = np.exp(-(((np.arange(p) - (p - 1) / 2) / (p / 8)) ** 2) / 2)
            weight = weight * curve.reshape([-1 if a == axis else 1 for a in range(3)])
    sums, total = 0.0, np.zeros(padded.shape[1:])
    grids = []
    for size, p in zip(padded.shape[1:], patch, strict=True):
        stride = max(1, round(p * (1 - overlap)))
        grids.append([min(i * stride, size - p) for i in range(math.ceil((size - p) / stride) + 1)])
    for z in grids[0]:
        for y in grids[1]:
            for x in grids[2]:
                at = (slice(z, z + patch[0]), slice(y, y + patch[1]), slice(x, x + patch[2]))
                window = torch.from_numpy(padded[:, *at].copy())[None]
                probs = predict(window[:, :, 0])[:, :, None] if len(patch_size) == 2 else predict(window)
                if not isinstance(sums, np.ndarray):
                    sums = np.zeros((probs.shape[1], *total.shape))
                sums[:, *at] += probs[0].double().numpy() * weight
                total[at] += weight
    inside = [slice(m // 2, m // 2 + s) for m, s in zip(missing, image.shape[1:], strict=True)]
    return (sums / total)[:, *inside]


SHAPES = [
    ((20, 24, 17), (8, 12, 8)),
    ((9, 9, 9), (9, 9, 9)),
    ((16, 8, 8), (8, 8, 8)),
    ((5, 7, 21), (8, 8, 8)),  # smaller than the patch along two axes
    ((3, 4, 5), (8, 9, 10)),
    ((13, 10, 10), (1, 4, 4)),
    ((3, 20, 18), (8, 12)),
    ((4, 6, 18), (8, 8)),
]


@pytest.mark.parametrize(("shape", "patch"), SHAPES)
@pytest.mark.parametrize("weighting", ["uniform", "gaussian"])
def test_a_pointwise_prediction_comes_back_as_if_there_were_no_windows(shape, patch, weighting):
    image = random_image(*shape)
    slabs = sliding_window(pointwise, image, patch, weighting=weighting, device="cpu")
    torch.testing.assert_close(whole(slabs), pointwise(image[None])[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("shape", "patch"), SHAPES)
@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.75])
@pytest.mark.parametrize("weighting", ["uniform", "gaussian"])
def test_results_equal_a_plain_implementation(shape, patch, overlap, weighting):
    image = random_image(*shape)
    slabs = sliding_window(placed, image, patch, overlap=overlap, weighting=weighting, batch_size=3, device="cpu")
    expected = naive(placed, image, patch, overlap, weighting)
    np.testing.assert_allclose(whole(slabs).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.8])
@pytest.mark.parametrize(("shape", "patch"), SHAPES)
def test_slabs_cover_every_slice_once_in_order_and_are_thin(shape, patch, overlap):
    image = random_image(*shape)
    stride = max(1, round((1, *patch)[-3] * (1 - overlap)))
    next_slice = 0
    for start, slab in sliding_window(placed, image, patch, overlap=overlap, device="cpu"):
        assert start == next_slice
        assert slab.shape[0] == 3 and slab.shape[2:] == shape[1:]
        assert 1 <= slab.shape[1] <= stride
        next_slice += slab.shape[1]
    assert next_slice == shape[0]


@pytest.mark.parametrize(("batch_size", "expected"), [(1, [1] * 5), (2, [2, 2, 1]), (4, [3, 2]), (9, [5])])
def test_the_last_batch_is_no_smaller_than_the_others_but_for_a_window(batch_size, expected):
    sizes: list[int] = []

    def predict(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return pointwise(x)

    for _ in sliding_window(predict, random_image(24, 8, 8), (8, 8, 8), batch_size=batch_size, device="cpu"):
        pass
    assert sizes == expected


@pytest.mark.parametrize(
    ("patch", "expected"), [((64, 128, 128), 2), ((32, 64, 64), 4), ((256, 256), 8), ((8, 8), 8192)]
)
def test_large_windows_are_predicted_two_at_a_time_and_small_ones_more(patch, expected):
    assert batch_for(patch) == expected


def test_slabs_are_thinner_where_planes_are_large(monkeypatch):
    image = random_image(20, 24, 17)
    expected = whole(sliding_window(placed, image, (8, 12, 8), device="cpu"))
    monkeypatch.setattr("tailseg.evaluate.sliding_window.SLAB_VALUES", 3 * 3 * 24 * 17 + 1)
    slabs = list(sliding_window(placed, image, (8, 12, 8), device="cpu"))
    assert max(slab.shape[1] for _, slab in slabs) == 3
    assert torch.equal(whole(slabs), expected)


def test_windows_of_the_p23_protocol_start_at_0_16_and_0_32_and_0_32():
    # the voxel's value is its own index, so that a window tells where it starts
    index = torch.arange(80 * 160 * 160, dtype=torch.int32).view(1, 80, 160, 160)
    firsts: list[int] = []

    def predict(x: torch.Tensor) -> torch.Tensor:
        assert x.shape[1:] == (1, 64, 128, 128)
        firsts.extend(x[:, 0, 0, 0, 0].int().tolist())
        return torch.ones_like(x)

    for _ in sliding_window(predict, index, (64, 128, 128), overlap=0.75, batch_size=2, device="cpu"):
        pass
    found = np.stack(np.unravel_index(firsts, (80, 160, 160)), 1).tolist()
    assert found == [[z, y, x] for z in (0, 16) for y in (0, 32) for x in (0, 32)]


def test_slabs_are_handed_out_as_soon_as_no_window_can_touch_them():
    image = random_image(40, 8, 8)
    asked = []

    def predict(x: torch.Tensor) -> torch.Tensor:
        asked.append(len(x))
        return pointwise(x)

    slabs = sliding_window(predict, image, (16, 8, 8), overlap=0.5, batch_size=1, device="cpu")
    assert asked == []  # nothing is predicted before somebody asks
    seen = [(start, slab.shape[1], sum(asked)) for start, slab in slabs]
    # windows start at 0, 8, 16, 24: each but the first finishes the eight slices above it
    assert seen == [(0, 8, 2), (8, 8, 3), (16, 8, 4), (24, 8, 4), (32, 8, 4)]


@pytest.mark.parametrize("overlap", [0.3, 0.5, 0.75])
def test_memory_is_that_of_a_patch_depth_however_deep_the_image(overlap):
    class Largest(TorchDispatchMode):
        """The most voxels that any tensor of floats had, after the image itself."""

        voxels = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result._base is None:
                self.voxels = max(self.voxels, result.numel())
            return result

    largest = []
    for depth in (24, 240):
        image = random_image(depth, 32, 32)
        with Largest() as seen:
            for _ in sliding_window(pointwise, image, (16, 8, 8), overlap=overlap, batch_size=1, device="cpu"):
                pass
        largest.append(seen.voxels)
    assert largest == [3 * 16 * 32 * 32] * 2  # K times a patch depth of slices


@pytest.mark.parametrize(("shape", "patch"), [((20, 24, 17), (8, 12, 8)), ((3, 20, 18), (8, 12))])
def test_batch_size_changes_no_result(shape, patch):
    image = random_image(*shape)
    results = [
        whole(sliding_window(placed, image, patch, batch_size=size, device="cpu")).numpy() for size in (1, 2, 7, 1000)
    ]
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], atol=1e-6)


@pytest.mark.parametrize("weighting", ["uniform", "gaussian"])
def test_layout_of_the_predictions_is_kept_and_changes_no_result(weighting):
    image = random_image(20, 12, 17)

    def predict(x: torch.Tensor) -> torch.Tensor:
        return placed(x).contiguous(memory_format=torch.channels_last_3d)

    expected = whole(sliding_window(placed, image, (8, 12, 8), weighting=weighting, device="cpu"))
    slabs = list(sliding_window(predict, image, (8, 12, 8), weighting=weighting, device="cpu"))
    torch.testing.assert_close(whole(slabs), expected)
    assert all(slab.stride(0) == 1 for _, slab in slabs)


def test_gaussian_weights_are_largest_in_the_centre_and_never_zero():
    # each window says which it is; where two overlap, the mixture shows their weights
    image = torch.zeros(1, 1, 1, 24)
    calls = iter([0.0, 1.0])
    slabs = sliding_window(
        lambda x: torch.full_like(x, next(calls)), image, (1, 1, 16), weighting="gaussian", batch_size=1, device="cpu"
    )
    share = whole(slabs)[0, 0, 0]  # of the second window, which covers 8..23
    assert (share[:8] == 0).all() and (share[16:] == 1).all()
    assert (share[8:16].diff() > 0).all()
    curve = torch.exp(-0.5 * ((torch.arange(16) - 7.5) / 2) ** 2)
    torch.testing.assert_close(share[8:16], curve[:8] / (curve[:8] + curve[8:]))


def test_a_single_gaussian_window_keeps_its_corners():
    image = random_image(16, 16, 16)
    slabs = sliding_window(placed, image, (16, 16, 16), weighting="gaussian", device="cpu")
    torch.testing.assert_close(whole(slabs), placed(image[None])[0])


def test_gradients_are_off_inside_predict_and_as_they_were_outside():
    modes = []

    def predict(x: torch.Tensor) -> torch.Tensor:
        modes.append(torch.is_inference_mode_enabled())
        return pointwise(x)

    for _, slab in sliding_window(predict, random_image(20, 8, 8), (8, 8, 8), device="cpu"):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert not slab.is_inference() and not slab.requires_grad
    assert modes and all(modes)


def test_half_precision_images_and_predictions_are_summed_in_float32():
    image = random_image(12, 8, 8).half()

    def predict(x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.float32
        return torch.full((len(x), 2, *x.shape[2:]), 1 / 3, dtype=torch.bfloat16)

    for weighting in ("uniform", "gaussian"):
        result = whole(sliding_window(predict, image, (8, 8, 8), weighting=weighting, device="cpu"))
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, torch.full_like(result, torch.tensor(1 / 3, dtype=torch.bfloat16).item()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": (8,)}, r"patch_size \(8,\)"),
        ({"patch_size": (0, 8, 8)}, r"patch_size \(0, 8, 8\)"),
        ({"overlap": 1.0}, r"overlap is 1\.0"),
        ({"weighting": "linear"}, "weighting is 'linear'; use uniform or gaussian"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"image": torch.zeros(8, 8, 8)}, r"\(C, D, H, W\)"),
    ],
)
def test_what_cannot_be_predicted_is_refused_at_once(options, message):
    given = {"image": random_image(8, 8, 8), "patch_size": (8, 8, 8), "device": "cpu"} | options
    with pytest.raises(ValueError, match=message):
        sliding_window(pointwise, **given)


def test_a_prediction_of_the_wrong_size_is_refused():
    with pytest.raises(ValueError, match=r"must make \(B, K, \*patch\)"):
        list(sliding_window(lambda x: x[..., :4], random_image(8, 8, 8), (8, 8, 8), device="cpu"))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_probabilities_are_gone_before_the_next_windows_are_predicted(batch_size: int):
    made: list[StorageWeakRef] = []

    def predict(x: torch.Tensor) -> torch.Tensor:
        assert all(earlier.expired() for earlier in made)
        probs = torch.cat([x, 1 - x], 1)
        made.append(StorageWeakRef(probs.untyped_storage()))
        return probs

    image = torch.rand(1, 12, 8, 8)
    slabs = list(sliding_window(predict, image, (4, 8, 8), batch_size=batch_size, device="cpu"))
    assert len(made) == 5 // batch_size + 5 % batch_size
    torch.testing.assert_close(torch.cat([slab for _, slab in slabs], 1)[:1], image)
