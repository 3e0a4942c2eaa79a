from __future__ import annotations

import numpy as np
import pytest
import torch

from tailseg.data.geometry import Geometry
from tailseg.evaluate.mirror import PLAIN, Mirror
from tailseg.options import OptionError

SIDED = ("background", "left_kidney", "right_kidney", "liver")
PLAIN_CLASSES = ("background", "liver")
RAS = np.diag([1.0, 1.0, 2.0, 1.0])
LEFT_RIGHT_FIRST = np.array(
    [[0.0, 0, -2, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
)  # k runs to the left, i upwards


def geometry(affine: np.ndarray, *, canonical: bool = True) -> Geometry:
    return Geometry.whole((4, 5, 6), affine, canonical=canonical)


def test_three_axes_make_eight_views_and_slices_four():
    assert len(Mirror(("all",), PLAIN_CLASSES, 3).views(geometry(RAS))) == 8
    views = Mirror(("all",), PLAIN_CLASSES, 2).views(geometry(RAS))
    assert [view.dims for view in views] == [(), (-2,), (-1,), (-2, -1)]
    assert views[0] == PLAIN
    assert len(Mirror(("lr", "ap"), PLAIN_CLASSES, 3).views(geometry(RAS))) == 4


def test_left_and_right_change_places_in_views_mirrored_along_left_right_alone():
    views = Mirror(("all",), SIDED, 3).views(geometry(RAS))
    assert [view.classes for view in views] == [(0, 2, 1, 3) if -1 in view.dims else None for view in views]
    probs = torch.arange(4.0).view(1, 4, 1, 1, 1).expand(1, 4, 2, 2, 2)
    assert views[-1].back(probs)[0, :, 0, 0, 0].tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize(("canonical", "dim"), [(True, -1), (False, -3)])
def test_the_axis_of_left_and_right_is_told_by_the_header(canonical: bool, dim: int):
    turned = geometry(LEFT_RIGHT_FIRST, canonical=canonical)
    _, view = Mirror(("lr",), SIDED, 3).views(turned)
    assert view.dims == (dim,) and view.classes == (0, 2, 1, 3)


def test_a_view_and_back_is_the_same():
    x = torch.randn(2, 4, 3, 4, 5)
    for view in Mirror(("all",), SIDED, 3).views(geometry(RAS)):
        seen = view.of(x)
        assert torch.equal(view.back(seen), x if view.classes is None else x[:, [0, 2, 1, 3]])


def test_an_axis_across_slices_is_refused():
    mirror = Mirror(("si",), PLAIN_CLASSES, 2)
    with pytest.raises(OptionError, match=r"'si' runs from slice to slice in this scan.*Mirror along ap and lr"):
        mirror.views(geometry(RAS))


def test_pictures_are_mirrored_along_rows_and_columns():
    picture = Geometry.whole((1, 5, 6), np.eye(4), canonical=True)
    views = Mirror(("all",), PLAIN_CLASSES, 2).views(picture, picture=True)
    assert [view.dims for view in views] == [(), (-2,), (-1,), (-2, -1)]
    with pytest.raises(
        OptionError, match="does not say how the patient lay: it is mirrored along h, w or all, not along 'lr'"
    ):
        Mirror(("lr",), PLAIN_CLASSES, 2).check(picture=True)
    with pytest.raises(OptionError, match="A scan is mirrored along si, ap, lr or all, not along 'w'"):
        Mirror(("w",), PLAIN_CLASSES, 2).check(picture=False)


def test_pictures_of_classes_with_sides_are_not_mirrored():
    with pytest.raises(OptionError, match=r"shows left_kidney where right_kidney was.*without mirroring"):
        Mirror(("w",), SIDED, 2).check(picture=True)


@pytest.mark.parametrize(
    ("axes", "message"), [(("rl",), "Did you mean 'lr'"), (("all", "lr"), "leaves nothing for all, lr")]
)
def test_unknown_axes_are_named(axes: tuple[str, ...], message: str):
    with pytest.raises(OptionError, match=message):
        Mirror(axes, SIDED, 3)


def test_axes_that_training_never_mirrored_are_known():
    assert Mirror(("all",), SIDED, 3).untrained(("h", "w")) == ("d",)
    assert Mirror(("lr", "ap"), SIDED, 3).untrained(()) == ("w", "h")
    assert Mirror(("all",), SIDED, 2).untrained(("h", "w")) == ()
