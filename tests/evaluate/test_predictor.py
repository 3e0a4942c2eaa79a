"""Several networks, runs and views asked about one scan: what is averaged, and where they disagree."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tailseg.core import Batch, Method, Progress, StepOutput, Task
from tailseg.data.image import Image
from tailseg.data.preparation import Preparation
from tailseg.evaluate.mirror import Mirror
from tailseg.evaluate.predictor import Ensemble, Predictor
from tailseg.evaluate.uncertainty import STEPS
from tailseg.runtime import Runtime, RuntimeOptions

SIDED = ("background", "left_kidney", "right_kidney")
INTENSITY = {"name": "window", "low": 0, "high": 1, "rescale": "window"}
AFFINE = np.array([[0.0, -1.9, 0.3, 5.0], [1.2, 0.0, 0.0, -7.0], [0.0, -0.6, -1.9, 3.0], [0, 0, 0, 1]])


class Says(Method):
    """Networks with fixed probabilities (networks, K), the same everywhere; predict is their mean."""

    probs: Tensor

    def __init__(self, task: Task, probs: Sequence[Sequence[float]]) -> None:
        super().__init__(task)
        self.register_buffer("probs", torch.tensor(probs))
        self.asked = 0

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        raise AssertionError("prediction takes no step")

    def predict(self, x: Tensor) -> Tensor:
        return self.predict_each(x)[0]

    def predict_each(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        self.asked += len(x)
        shape = (len(x), -1, *x.shape[2:])
        each = tuple(one.view(1, -1, *[1] * (x.dim() - 2)).expand(shape) for one in self.probs.unbind())
        return torch.stack(each).mean(0), each


class Positioned(Method):
    """Calls what is bright left_kidney in the half of the window with the lower last index, right_kidney in the other."""

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        raise AssertionError("prediction takes no step")

    def predict(self, x: Tensor) -> Tensor:
        bright = 0.8 * (x[:, :1] > 0.5).float()
        first = (torch.arange(x.shape[-1]) < x.shape[-1] // 2).float()
        return torch.cat([1 - bright, bright * first, bright * (1 - first)], 1)


class Blurred(Method):
    """Class 1 as far as the scan is bright."""

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        raise AssertionError("prediction takes no step")

    def predict(self, x: Tensor) -> Tensor:
        return torch.cat([1 - x, x], 1)


def task(classes: tuple[str, ...] = SIDED) -> Task:
    return Task(classes, 1, 3, (1.0,) * 3, (10,) * len(classes))


def predictor(method: Method, patch_size: tuple[int, ...] = (4, 4, 4), **preparation: object) -> Predictor:
    recipe = Preparation.model_validate({"intensity": INTENSITY, **preparation})
    return Predictor(
        method, recipe, patch_size, Runtime(torch.device("cpu"), RuntimeOptions(precision="fp32")), overlap=0.0
    )


def says(*probs: Sequence[float]) -> Predictor:
    return predictor(Says(task(), probs))


def scan(seed: int = 0, shape: tuple[int, int, int] = (5, 6, 8), affine: np.ndarray = AFFINE) -> Image:
    return Image(np.random.default_rng(seed).random((1, *shape)).astype(np.float32), affine)


def entropy_of(*probs: float) -> float:
    """Divided by log K."""
    return -sum(p * np.log(p) for p in probs if p) / np.log(len(probs))


def test_one_run_alone_is_that_run():
    one, image = predictor(Blurred(task(("background", "bright")))), scan()
    found = Ensemble((one,)).segment(image, probs=True)
    np.testing.assert_array_equal(found.labels, one.labels(image))
    assert found.probs is not None
    np.testing.assert_array_equal(found.probs, one.probs(image))
    assert found.entropy is None and found.disagreement is None


def test_two_runs_give_the_mean_of_their_probabilities():
    first, second, image = says((0.5, 0.4, 0.1)), predictor(Positioned(task())), scan()
    found = Ensemble((first, second)).segment(image, probs=True)
    assert found.probs is not None
    np.testing.assert_allclose(found.probs, (first.probs(image) + second.probs(image)) / 2, atol=1e-6)
    np.testing.assert_array_equal(found.labels, found.probs.argmax(0))
    assert len(Ensemble((first, second)).groups) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"grid": (3, 4, 4)},
        {"orientation": "file", "grid": (None, 9, 5)},
        {"crop": {"threshold": 0.5}, "spacing": (1.0, 1.0, 1.0)},
    ],
)
def test_runs_of_different_preparations_are_averaged_on_the_scans_own_grid(other: dict[str, object], tmp_path: Path):
    box = np.zeros((7, 9, 8), np.float32)
    box[2:6, 1:7, 3:7] = np.random.default_rng(1).uniform(0.6, 1, (4, 6, 4))
    image, named = Image(box[None], AFFINE), task(("background", "bright"))
    members = tuple(predictor(Blurred(named), (4, 4, 4), **preparation) for preparation in ({}, other, other))
    assert [len(group) for group in Ensemble(members).groups] == [1, 2]
    found = Ensemble(members).segment(image, probs=True, uncertainty=True, scratch=tmp_path)
    expected = sum(member.probs(image) for member in members) / 3
    assert found.probs is not None and not list(tmp_path.iterdir())
    np.testing.assert_allclose(found.probs, expected, atol=1e-5)
    np.testing.assert_array_equal(found.labels, expected.argmax(0))
    np.testing.assert_array_equal(Ensemble(members).segment(image).labels, found.labels)


def test_the_same_runs_through_other_windows_agree_with_themselves():
    image, method = scan(), Blurred(task(("background", "bright")))
    found = Ensemble((predictor(method), predictor(method, (5, 6, 8)))).segment(image, uncertainty=True)
    assert found.disagreement is not None and found.disagreement.max() == 0


def test_mirrored_views_are_averaged_with_left_and_right_put_back():
    """The network goes by the place in its window, so views that were not put back would fall on the other side."""
    affine = np.diag([1.0, 1, 1, 1])
    image = Image(np.ones((1, 4, 4, 4), np.float32), affine)
    one = predictor(Positioned(task()))
    plain = one.probs(image)
    found = Ensemble((one,), Mirror(("lr",), SIDED, 3)).segment(image, probs=True).probs
    assert found is not None
    np.testing.assert_allclose(found, plain, atol=1e-6)  # mirrored, its left half is the right one, and swapped back
    unsided = Ensemble((one,), Mirror(("lr",), ("background", "a", "b"), 3)).segment(image, probs=True).probs
    assert unsided is not None
    np.testing.assert_allclose(unsided[1:], 0.4, atol=1e-6)  # without the swap both sides are mixed
    along = Ensemble((one,), Mirror(("ap", "si"), SIDED, 3)).segment(image, probs=True).probs
    assert along is not None
    np.testing.assert_allclose(along, plain, atol=1e-6)


@pytest.mark.parametrize("orientation", ["canonical", "file"])
def test_a_scan_stored_in_another_way_is_mirrored_along_the_same_patient_axis(orientation: str):
    """Its slices are sagittal: left-right is the first axis of the file."""
    affine = np.array([[0.0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    image = Image(np.ones((1, 4, 4, 4), np.float32), affine)
    one = predictor(Positioned(task()), orientation=orientation)
    found = Ensemble((one,), Mirror(("lr",), SIDED, 3)).segment(image, probs=True).probs
    assert found is not None
    if orientation == "canonical":
        np.testing.assert_allclose(found, one.probs(image), atol=1e-6)
    else:  # this network's halves run along the file's last axis, front to back, and know nothing of left and right
        np.testing.assert_allclose(found[1:], 0.4, atol=1e-6)


def test_entropy_and_disagreement_of_known_probabilities():
    sure, other = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)
    for members, expected in (
        ((says(sure), says(other)), entropy_of(0.5, 0.5, 0)),
        ((says(sure, other),), entropy_of(0.5, 0.5, 0)),  # two networks of one run
        ((says((0.5, 0.25, 0.25)), says((0.5, 0.25, 0.25))), 0.0),
        (
            (says((0.7, 0.2, 0.1)), says((0.1, 0.8, 0.1))),
            entropy_of(0.4, 0.5, 0.1) - (entropy_of(0.7, 0.2, 0.1) + entropy_of(0.1, 0.8, 0.1)) / 2,
        ),
    ):
        found = Ensemble(members).segment(scan(), probs=True, uncertainty=True)
        assert found.entropy is not None and found.disagreement is not None and found.probs is not None
        mean = found.probs[:, 0, 0, 0]
        np.testing.assert_allclose(found.entropy / STEPS, entropy_of(*mean), atol=0.51 / STEPS)
        np.testing.assert_allclose(found.disagreement / STEPS, expected, atol=0.51 / STEPS)


def test_disagreement_between_and_within_runs_adds_up_where_they_are_prepared_differently():
    a, b, c, d = (0.7, 0.2, 0.1), (0.1, 0.8, 0.1), (0.3, 0.3, 0.4), (0.9, 0.05, 0.05)
    apart = (says(a, b), predictor(Says(task(), (c, d)), grid=(4, 4, 4)))
    found = Ensemble(apart).segment(scan(), uncertainty=True).disagreement
    mean = np.mean([a, b, c, d], 0)
    expected = entropy_of(*mean) - np.mean([entropy_of(*one) for one in (a, b, c, d)])
    assert found is not None
    np.testing.assert_allclose(found / STEPS, expected, atol=0.51 / STEPS)


def test_a_single_network_has_entropy_and_nothing_to_disagree_with():
    one = says((0.5, 0.25, 0.25))
    found = Ensemble((one,)).segment(scan(), uncertainty=True)
    assert found.disagreement is None and found.entropy is not None
    np.testing.assert_allclose(found.entropy / STEPS, entropy_of(0.5, 0.25, 0.25), atol=0.51 / STEPS)
    mirrored = Ensemble((one,), Mirror(("lr",), ("background", "a", "b"), 3)).segment(scan(), uncertainty=True)
    assert mirrored.disagreement is not None and mirrored.disagreement.max() == 0


def test_where_all_agree_on_a_border_nobody_disputes_it():
    """Between two sure voxels of the prepared grid the scan's own are in between, and that is no disagreement."""
    shape = np.zeros((8, 8, 8), np.float32)
    shape[:, :, 4:] = 1
    named = task(("background", "bright"))
    members = tuple(predictor(Blurred(named), grid=(4, 4, 4)) for _ in range(2))
    found = Ensemble(members).segment(Image(shape[None], np.eye(4)), uncertainty=True)
    assert found.entropy is not None and found.disagreement is not None
    assert found.entropy.max() > 0.5 * STEPS and found.disagreement.max() == 0


def test_labels_are_the_same_with_and_without_uncertainty():
    image = scan(3, (9, 11, 10))
    members = predictor(Blurred(task(("background", "bright"))), grid=(5, 6, 7))
    plain, told = (Ensemble((members,)).segment(image, uncertainty=wanted) for wanted in (False, True))
    np.testing.assert_array_equal(plain.labels, told.labels)


def test_every_window_is_asked_once_for_each_view():
    one = says((0.5, 0.25, 0.25))
    assert isinstance(one.method, Says)
    Ensemble((one,)).segment(scan(shape=(4, 4, 8), affine=np.eye(4)))
    assert one.method.asked == 2
    Ensemble((one,), Mirror(("all",), ("background", "a", "b"), 3)).segment(scan(shape=(4, 4, 8), affine=np.eye(4)))
    assert one.method.asked == 2 + 8 * 2
