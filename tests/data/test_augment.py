"""Weak augmentation: image and label move together, as a plain reference moves each patch, and nothing happens unless asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from methods.syncs import DEVICE, waits_of
from pydantic import ValidationError
from scipy.ndimage import affine_transform
from scipy.spatial.transform import Rotation
from torch import Tensor

from tailseg.core import IGNORE, Batch
from tailseg.data.augment import Augment, Axis, Changes, apply_changes

EVERYTHING: dict[str, Any] = {
    "flip": ("h", "w"),
    "rot90": True,
    "rotate": 20.0,
    "scale": (0.7, 1.4),
    "bias_field": 0.5,
    "gamma": (0.7, 1.5),
    "brightness": (0.75, 1.25),
    "contrast": (0.75, 1.25),
    "blur": (0.5, 1.0),
    "noise": 0.1,
}
INTENSITIES = {name: value for name, value in EVERYTHING.items() if name not in ("flip", "rot90", "rotate", "scale")}
ALWAYS: dict[str, Any] = {f"{name}_probability": 1.0 for name in EVERYTHING if name not in ("flip", "rot90")}


def batch(shape: tuple[int, ...], count: int = 8) -> Batch:
    """The image holds the label's own values, so that moving together can be seen."""
    y = torch.randint(0, 5, (count, *shape), generator=torch.Generator().manual_seed(0))
    return Batch(y[:, None].float(), y, torch.rand(count, 1, *shape))


def nothing(count: int) -> Changes:
    return Augment().draw(count)


# what is asked for


def test_by_default_nothing_happens():
    given = batch((4, 6, 6))
    assert Augment()(given) is given
    x, y = apply_changes(nothing(8), given.x_l, given.y_l)
    assert torch.equal(x, given.x_l) and torch.equal(y, given.y_l)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"gamma": (1.5, 0.7)}, "gamma is .1.5, 0.7.; it is a range"),
        ({"blur": (2.0, 1.0)}, "blur is .2.0, 1.0.; it is a range"),
        ({"gamma_probability": 0.5}, "gamma_probability does nothing while augment.gamma is .1.0, 1.0."),
        ({"noise_probability": 0.5}, "noise_probability does nothing while augment.noise is 0.0"),
        ({"rotate_about": ("d", "h")}, "rotate_about does nothing while augment.rotate is 0.0"),
        ({"rotate": 10.0, "rotate_about": ()}, "needs an axis"),
        ({"scale": (0.0, 1.0)}, "greater than 0"),
        ({"noise": -1.0}, "greater than or equal to 0"),
        ({"rotate": 10.0, "rotate_probability": 1.5}, "less than or equal to 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], told: str):
    with pytest.raises(ValidationError, match=told):
        Augment(**options)


def test_an_augmentation_reads_back_from_what_it_writes():
    for one in (Augment(), Augment(**EVERYTHING), Augment(rotate=5.0)):
        assert Augment(**one.model_dump()) == one


@pytest.mark.parametrize(
    ("options", "size", "told"),
    [
        ({"rot90": True}, (8, 6, 8), "square patches"),
        ({"flip": ("d",)}, (6, 6), "'d' needs 3D"),
        ({"rotate": 9.0, "rotate_about": ("d", "h")}, (6, 6), "need 3D patches"),
    ],
)
def test_patches_that_cannot_be_augmented_so_are_refused(options: dict[str, Any], size: tuple[int, ...], told: str):
    with pytest.raises(ValueError, match=told):
        Augment(**options).check(size)
    with pytest.raises(ValueError, match=told):
        Augment(**options)(batch(size))


# what is drawn


def test_one_augmentation_does_not_move_the_draws_of_another():
    drawn: list[Changes] = []
    for augment in (Augment(flip=("h",)), Augment(**EVERYTHING)):
        torch.manual_seed(0)
        drawn.append(augment.draw(50))
    assert torch.equal(drawn[0].mirrored[:, 1], drawn[1].mirrored[:, 1])
    assert torch.equal(drawn[0].seeds, drawn[1].seeds)
    assert not drawn[0].mirrored[:, [0, 2]].any() and not drawn[0].angles.any() and (drawn[0].gamma == 1).all()


def test_parameters_fill_their_ranges_as_often_as_asked():
    torch.manual_seed(0)
    drawn = Augment(**EVERYTHING, rotate_about=("d", "w")).draw(4000)
    assert drawn.mirrored.float().mean(0).tolist() == pytest.approx([0, 0.5, 0.5], abs=0.03)
    assert drawn.quarter_turns.bincount().tolist() == pytest.approx([1000] * 4, abs=100)
    assert not drawn.angles[:, 1].any()
    assert (drawn.angles[:, 0] != 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    for values, low, high, often in (
        (drawn.angles[:, 2], -20, 20, 0.5),
        (drawn.scale, 0.7, 1.4, 0.2),
        (drawn.gamma, 0.7, 1.5, 0.3),
        (drawn.brightness, 0.75, 1.25, 0.15),
        (drawn.contrast, 0.75, 1.25, 0.15),
        (drawn.blur, 0.5, 1.0, 0.2),
        (drawn.noise, 0.0, 0.1, 0.1),
    ):
        there = values[values != (1 if low > 0 and high > 1 else 0)]
        assert len(there) / 4000 == pytest.approx(often, abs=0.03)
        assert low <= there.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < there.max() <= high
    bent = drawn.field.flatten(1)[drawn.field.flatten(1).any(1)]
    assert len(bent) / 4000 == pytest.approx(0.3, abs=0.03) and 0.49 < bent.abs().max() <= 0.5


def test_factors_enlarge_as_often_as_they_shrink():
    drawn = Augment(scale=(0.5, 2.0), scale_probability=1.0).draw(4000)
    assert (drawn.scale > 1).double().mean().item() == pytest.approx(0.5, abs=0.03)


# how patches move


def moved_one_by_one(changes: Changes, x: Tensor) -> Tensor:
    """x (B, ..., H, W)."""
    moved = []
    for one, mirrored, turns in zip(x, changes.mirrored.tolist(), changes.quarter_turns.tolist(), strict=True):
        along = [axis for axis, chosen in zip((-3, -2, -1), mirrored, strict=True) if chosen]
        moved.append(torch.rot90(one.flip(along), turns, (-2, -1)))
    return torch.stack(moved)


@pytest.mark.parametrize("shape", [(6, 6), (4, 6, 6)])
def test_mirrors_and_quarter_turns_are_those_of_each_patch_exactly(shape: tuple[int, ...]):
    count, dims = 32, len(shape)
    given = batch(shape, count)
    every = torch.cartesian_prod(*[torch.tensor([0, 1])] * 3, torch.arange(4))  # (32, 4)
    mirrored = every[:, :3].bool() & torch.tensor([dims == 3, True, True])
    changes = replace(nothing(count), mirrored=mirrored, quarter_turns=every[:, 3])
    x, y = apply_changes(changes, given.x_l, given.y_l)
    assert torch.equal(x, moved_one_by_one(changes, given.x_l)) and torch.equal(y, moved_one_by_one(changes, given.y_l))
    assert len({one.numpy().tobytes() for one in (x - given.x_l).abs().flatten(1).bool()}) > 8


def transformed_one_by_one(changes: Changes, x: Tensor, order: int, outside: float) -> Tensor:
    """x (B, *S) by SciPy, in voxels: first about the axes, then larger."""
    moved = []
    for one, angles, scale in zip(x, changes.angles.numpy(), changes.scale.tolist(), strict=True):
        volume = one.double().numpy().reshape((1,) * (3 - one.dim()) + one.shape)
        turn = Rotation.from_euler("ZYX", angles, degrees=True).as_matrix()[::-1, ::-1]  # from w, h, d to d, h, w
        matrix = turn / scale
        if one.dim() == 2:
            matrix[0] = matrix[:, 0] = (1, 0, 0)
        centre = (np.array(volume.shape) - 1) / 2
        found = affine_transform(
            volume, matrix, centre - matrix @ centre, order=order, mode="grid-constant", cval=outside
        )
        moved.append(torch.from_numpy(found.reshape(one.shape)))
    return torch.stack(moved)


@pytest.mark.parametrize(
    ("shape", "about", "scale"),
    [
        ((20, 26), ("d",), (1.0, 1.0)),
        ((20, 26), ("d",), (0.6, 1.6)),
        ((6, 20, 26), ("d",), (1.0, 1.0)),
        ((12, 20, 26), ("d",), (0.6, 1.6)),
        ((12, 20, 26), ("d", "h", "w"), (0.6, 1.6)),
    ],
)
def test_turning_and_scaling_is_that_of_scipy_in_voxels(
    shape: tuple[int, ...], about: tuple[Axis, ...], scale: tuple[float, float]
):
    torch.manual_seed(0)
    x, y = torch.rand(6, 2, *shape), torch.randint(0, 5, (6, *shape))
    options: dict[str, Any] = {} if scale == (1.0, 1.0) else {"scale": scale, "scale_probability": 0.7}
    changes = Augment(rotate=70.0, rotate_about=about, **options).draw(6)
    assert (changes.angles != 0).any(1).sum() >= 2
    moved, labels = apply_changes(changes, x, y)
    for channel in (0, 1):
        expected = transformed_one_by_one(changes, x[:, channel], order=1, outside=0.0)
        assert (moved[:, channel] - expected).abs().max() < 1e-5
    expected = transformed_one_by_one(changes, y, order=0, outside=IGNORE)
    assert labels.dtype == y.dtype and (labels == IGNORE).any()
    assert (labels != expected).float().mean() < 1e-3  # two voxels may be equally near


@pytest.mark.parametrize("shape", [(24, 24), (24, 24, 24)])
def test_image_and_label_move_alike(shape: tuple[int, ...]):
    torch.manual_seed(0)
    ball = sum(
        (torch.arange(side) - 9.0).reshape(-1, *(1,) * (len(shape) - 1 - axis)) ** 2 for axis, side in enumerate(shape)
    )
    y = (ball < 36).long().expand(16, *shape).clone()
    about: tuple[Axis, ...] = ("d", "h", "w") if len(shape) == 3 else ("d",)
    spatial = Augment(flip=("h", "w"), rot90=True, rotate=30.0, rotate_about=about, scale=(0.8, 1.25))
    moved = spatial(Batch(y[:, None].float(), y, y[:0, None].float()))
    assert not torch.equal(moved.y_l, y)
    known = moved.y_l != IGNORE
    assert ((moved.x_l[:, 0] > 0.5) == (moved.y_l == 1))[known].float().mean() > 0.99


def test_a_factor_above_one_enlarges():
    y = torch.zeros(1, 21, 21, dtype=torch.int64)
    y[0, 8:13, 8:13] = 1
    larger, smaller = (
        apply_changes(replace(nothing(1), scale=torch.tensor([scale]).double()), y[:, None].float(), y)[1]
        for scale in (2.0, 0.5)
    )
    assert (larger == 1).sum() > 80 and 0 < (smaller == 1).sum() < 10
    assert (larger != IGNORE).all() and (smaller == IGNORE).any()


def test_turning_and_scaling_never_mirror():
    """A left kidney stays one. The corner marked first, then those along d, h, w: their triple product keeps its sign."""
    torch.manual_seed(0)
    y = torch.zeros(24, 25, 25, 25, dtype=torch.int64)
    for label, place in enumerate(((12, 12, 12), (18, 12, 12), (12, 18, 12), (12, 12, 18)), start=1):
        y[(slice(None), *(slice(at - 1, at + 2) for at in place))] = label
    options: dict[str, Any] = {
        "rot90": True,
        "rotate": 180.0,
        "rotate_about": ("d", "h", "w"),
        "rotate_probability": 1.0,
    }
    moved = Augment(**options, scale=(0.8, 1.25))(Batch(y[:, None].float(), y, y[:0, None].float()))
    for one in moved.y_l:
        centre, *others = ((one == label).nonzero().double().mean(0) for label in (1, 2, 3, 4))
        assert torch.linalg.det(torch.stack([other - centre for other in others])) > 0


@pytest.mark.parametrize("shape", [(6, 6), (4, 6, 6)])
def test_features_are_mirrored_with_their_patches(shape: tuple[int, ...]):
    given = batch(shape)
    features = torch.cat([given.x_l, given.x_u]).reshape(16, 1, -1, 6, 6)  # the patches themselves
    flip: tuple[Axis, ...] = ("h", "w") if len(shape) == 2 else ("d", "h", "w")
    torch.manual_seed(0)
    moved = Augment(flip=flip)(Batch(given.x_l, given.y_l, given.x_u, features))
    assert moved.features is not None and not torch.equal(moved.features, features)
    assert torch.equal(moved.features, torch.cat([moved.x_l, moved.x_u]).reshape(16, 1, -1, 6, 6))
    torch.manual_seed(0)
    without = Augment(flip=flip)(given)
    assert without.features is None and torch.equal(without.x_u, moved.x_u)


def test_features_are_never_turned_but_intensities_may_change_beside_them():
    given = batch((6, 6))
    features = torch.rand(16, 2, 1, 3, 3)
    for augment in (Augment(rot90=True), Augment(rotate=1.0), Augment(scale=(0.9, 1.1))):
        assert augment.turns
        with pytest.raises(AssertionError, match="cannot be turned"):
            augment(Batch(given.x_l, given.y_l, given.x_u, features))
    brighter = Augment(brightness=(0.5, 2.0), brightness_probability=1.0)
    assert not brighter.turns and not Augment(flip=("h",)).turns
    moved = brighter(Batch(given.x_l, given.y_l, given.x_u, features))
    assert moved.features is features and not torch.equal(moved.x_u, given.x_u)


def test_rotation_turns_about_the_centre_and_marks_the_outside():
    y = torch.zeros(1, 33, 33, dtype=torch.int64)
    y[0, 16, 20:28] = 1  # a bar to the right of the centre
    changes = replace(nothing(1), angles=torch.tensor([[50.0, 0.0, 0.0]]).double())
    x, turned = apply_changes(changes, y[:, None].float(), y)
    bar = turned == 1
    assert bar.any() and x[0, 0][bar[0]].mean() > 0.4  # nearest label lies where the interpolated image is bright
    assert turned[0, 16, 16] == 0 and (turned[0, [0, 0, -1, -1], [0, -1, 0, -1]] == IGNORE).all()


# how intensities change


def changed(x: Tensor, **values: float) -> Tensor:
    """All patches of x changed by the same values."""
    told = {name: torch.full((len(x),), value, dtype=torch.float64) for name, value in values.items()}
    return apply_changes(replace(nothing(len(x)), **told), x)[0]


def test_gamma_brightness_and_contrast_work_on_each_channels_own_range():
    x = torch.rand(2, 2, 9, 9) * torch.tensor([1.0, 300.0]).reshape(2, 1, 1) - 100
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    unit, mean = (x - low) / (high - low), x.mean((2, 3), keepdim=True)
    for found, expected in (
        (changed(x, gamma=1.4), low + unit**1.4 * (high - low)),
        (changed(x, brightness=0.8), low + 0.8 * (x - low)),
        (changed(x, contrast=0.8), mean + 0.8 * (x - mean)),
        (changed(x, contrast=1.25), torch.minimum(torch.maximum(mean + 1.25 * (x - mean), low), high)),
    ):
        assert torch.allclose(found, expected, rtol=1e-5, atol=2e-4)


def test_a_field_varies_slowly_and_over_the_whole_patch():
    torch.manual_seed(0)
    x = torch.ones(3, 1, 16, 16)
    x[..., 0, 0] = 0.0
    field = Augment(bias_field=0.5, bias_field_probability=1.0)(Batch(x, x[:, 0].long(), x)).x_u[:, 0, 1:, 1:]
    assert (field.amax((1, 2)) / field.amin((1, 2)) > 1.2).all()
    assert (field.diff(dim=1).abs().amax((1, 2)) < 0.5 * (field.amax((1, 2)) - field.amin((1, 2)))).all()


def test_blur_is_the_same_along_all_axes_and_keeps_a_constant():
    x = torch.zeros(1, 1, 21, 21, 21)
    x[0, 0, 10, 10, 10] = 1.0
    spot = changed(x, blur=1.0)[0, 0]
    assert spot.sum().item() == pytest.approx(1.0, abs=1e-4)
    assert spot[10, 10, 11].item() / spot[10, 10, 10].item() == pytest.approx(np.exp(-0.5), abs=1e-4)
    assert torch.allclose(spot, spot.movedim(0, 2), atol=1e-7)


def test_noise_is_a_share_of_the_range():
    x = torch.linspace(-1000, 1000, 64 * 64).reshape(1, 1, 64, 64)
    noise = changed(x, noise=0.05) - x
    assert noise.std().item() == pytest.approx(100, rel=0.05) and abs(noise.mean().item()) < 5


def test_constant_patches_and_those_that_are_not_chosen_stay_exactly_as_they_are():
    torch.manual_seed(0)
    x = torch.full((6, 1, 8, 8), -1000.0)
    always: dict[str, Any] = {f"{name}_probability": 1.0 for name in INTENSITIES}
    moved = Augment(**INTENSITIES, **always)(Batch(x, x[:, 0].long(), torch.rand(64, 1, 8, 8)))
    assert torch.equal(moved.x_l, x)
    u = torch.rand(64, 1, 8, 8)
    some = Augment(noise=0.1)(Batch(x, x[:, 0].long(), u)).x_u
    same = (some == u).flatten(1).all(1)
    assert 0.7 < same.float().mean() < 1 and (some != u).flatten(1)[~same].float().mean() > 0.9


# the batch


@pytest.mark.parametrize("shape", [(12, 12), (8, 12, 12)])
def test_the_generator_of_the_cpu_decides_alone_and_the_given_batch_stays(shape: tuple[int, ...]):
    given = batch(shape)
    before = given.x_l.clone(), given.y_l.clone(), given.x_u.clone()
    moved = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        moved.append(Augment(**EVERYTHING, **ALWAYS)(given))
    assert torch.equal(moved[0].x, moved[1].x) and torch.equal(moved[0].y_l, moved[1].y_l)
    assert not torch.allclose(moved[0].x, moved[2].x, atol=1e-2) and not torch.equal(moved[0].y_l, moved[2].y_l)
    for old, new in zip(before, (given.x_l, given.y_l, given.x_u), strict=True):
        assert torch.equal(old, new)


def test_a_batch_without_unlabelled_patches_keeps_none():
    given = batch((12, 12))
    moved = Augment(**EVERYTHING, **ALWAYS)(Batch(given.x_l, given.y_l, given.x_u[:0]))
    assert moved.x_u.shape == (0, 1, 12, 12) and moved.x_l.isfinite().all()


@pytest.mark.parametrize(("dims", "layout"), [(2, torch.channels_last), (3, torch.channels_last_3d)])
def test_the_memory_layout_is_kept(dims: int, layout: torch.memory_format):
    x, y = torch.randn(4, 3, *(8,) * dims), torch.zeros(4, *(8,) * dims, dtype=torch.int64)
    augment = Augment(**EVERYTHING, **ALWAYS)
    for _ in range(4):
        assert augment(Batch(x, y, x)).x_u.is_contiguous()
        kept = x.contiguous(memory_format=layout)
        moved = augment(Batch(kept, y, kept))
        assert moved.x_l.is_contiguous(memory_format=layout) and moved.x_u.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("shape", [(12, 12), (8, 12, 12)])
def test_the_host_waits_for_nothing(shape: tuple[int, ...]):
    torch.manual_seed(0)
    given = batch(shape).to(DEVICE)
    for augment in (Augment(**EVERYTHING, **ALWAYS), Augment(**EVERYTHING)):
        moved: list[Batch] = []
        assert not waits_of(lambda: moved.append(augment(given))).found  # noqa: B023
        assert moved[0].x_l.shape == given.x_l.shape and moved[0].y_l.device == DEVICE
