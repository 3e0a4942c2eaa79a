"""Weak augmentation: image and label move together, nothing happens unless asked."""

from __future__ import annotations

import pytest
import torch

from tailseg.core import IGNORE, Batch
from tailseg.data.augment import Augment, Axis


def batch(shape: tuple[int, ...]) -> Batch:
    """The image holds the label's own values, so that moving together can be seen."""
    y = torch.randint(0, 5, (8, *shape), generator=torch.Generator().manual_seed(0))
    return Batch(y[:, None].float(), y, torch.rand(8, 1, *shape))


def test_by_default_nothing_happens():
    given = batch((4, 6, 6))
    assert Augment()(given) is given


@pytest.mark.parametrize("shape", [(6, 6), (4, 6, 6)])
@pytest.mark.parametrize("options", [{"flip": ("h", "w")}, {"rot90": True}, {"flip": ("w",), "rot90": True}])
def test_flips_and_turns_move_image_and_label_together(shape: tuple[int, ...], options: dict):
    torch.manual_seed(0)
    given = batch(shape)
    moved = Augment(**options)(given)
    assert torch.equal(moved.x_l[:, 0].long(), moved.y_l)
    assert not torch.equal(moved.y_l, given.y_l) and not torch.equal(moved.x_u, given.x_u)
    assert torch.equal(moved.x_u.flatten(1).sort().values, given.x_u.flatten(1).sort().values)


def test_flip_along_one_axis_only():
    torch.manual_seed(0)
    given = batch((3, 4, 5))
    moved = Augment(flip=("d",))(given)
    for before, after in zip(given.y_l, moved.y_l, strict=True):
        assert torch.equal(after, before) or torch.equal(after, before.flip(0))


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


def test_features_are_never_turned():
    given = batch((6, 6))
    with pytest.raises(AssertionError, match="cannot be turned"):
        Augment(rot90=True)(Batch(given.x_l, given.y_l, given.x_u, torch.zeros(16, 2, 1, 3, 3)))
    assert not Augment(flip=("h",)).turns and Augment(rotate=1.0).turns and Augment(rot90=True).turns


def test_rotation_turns_about_the_centre_and_marks_the_outside():
    y = torch.zeros(1, 33, 33, dtype=torch.int64)
    y[0, 16, 20:28] = 1  # a bar to the right of the centre
    x = y[:, None].float()
    torch.manual_seed(3)
    turned = Augment(rotate=60.0)(Batch(x, y, x[:0]))
    while not (turned.y_l == IGNORE).any():  # every second patch is left as it is, and small angles have no outside
        turned = Augment(rotate=60.0)(Batch(x, y, x[:0]))
    bar = turned.y_l == 1
    inside = turned.x_l[0, 0][bar[0]]
    assert bar.any() and inside.mean() > 0.4  # nearest label lies where the interpolated image is bright
    assert turned.y_l[0, 16, 16] == 0
