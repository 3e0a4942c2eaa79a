"""Patches: what is drawn, what is cut, and that a resumed stream goes on with the very same ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from threading import current_thread

import numpy as np
import pytest
import torch
from torch import Tensor

from tailseg.core import IGNORE, Batch
from tailseg.data.stream import PatchRequest, PatchSampler, PatchStream, cut

SHAPE = (6, 10, 12)


class Volumes:
    """Cases whose voxels hold their own index, so that a patch tells where it was cut."""

    def __init__(self, *cases: str) -> None:
        self.cases = cases

    def image(self, case: str) -> np.ndarray:
        offset = 1000 * self.cases.index(case)
        return (np.arange(np.prod(SHAPE)).reshape(1, *SHAPE) + offset).astype(np.float32)

    def label(self, case: str) -> np.ndarray:
        label = np.zeros(SHAPE, dtype=np.uint8)
        label[3, 5, 6] = 1
        if case == "b":
            label[0, 0, 0] = 2
        return label

    def positions(self, case: str) -> Mapping[int, np.ndarray]:
        label = self.label(case)
        return {int(value): np.argwhere(label == value).astype(np.uint16) for value in np.unique(label)}


def sampler(batch: tuple[int, int] = (2, 2), patch_size: tuple[int, ...] = (4, 4, 4), **options) -> PatchSampler:
    shapes = dict.fromkeys("abcd", SHAPE)
    return PatchSampler(Volumes(*"abcd"), shapes, ["a", "b"], ["c", "d"], patch_size, batch, seed=0, **options)


def test_patches_are_what_the_request_says():
    stream = PatchStream(sampler())
    batch, request = next(stream)
    assert batch.x_l.shape == (2, 1, 4, 4, 4) and batch.y_l.dtype == torch.int64
    source = Volumes(*"abcd")
    for row, patch in zip(batch.x_u, request.unlabelled, strict=True):
        d, h, w = patch.start
        expected = source.image(patch.case)[:, d : d + 4, h : h + 4, w : w + 4]
        torch.testing.assert_close(row, torch.from_numpy(expected))


def test_every_start_is_drawn_the_last_one_too():
    drawn = sampler()
    starts = [patch.start[0] for _ in range(200) for patch in drawn.draw().unlabelled]
    assert set(starts) == {0, 1, 2}


def test_an_epoch_passes_once_over_each_case():
    drawn = sampler(batch=(1, 1))
    for _ in range(5):
        first, second = drawn.draw(), drawn.draw()
        assert {first.unlabelled[0].case, second.unlabelled[0].case} == {"c", "d"}
        assert {first.labelled[0].case, second.labelled[0].case} == {"a", "b"}


def test_slices_in_two_dimensions():
    batch = next(PatchStream(sampler(patch_size=(4, 4)))).batch
    assert batch.x_l.shape == (2, 1, 4, 4) and batch.y_l.shape == (2, 4, 4)


def test_no_unlabelled_cases_give_an_empty_unlabelled_half():
    shapes = dict.fromkeys("ab", SHAPE)
    drawn = PatchSampler(Volumes("a", "b"), shapes, ["a", "b"], [], (4, 4, 4), (2, 2), seed=0)
    assert next(PatchStream(drawn)).batch.x_u.shape == (0, 1, 4, 4, 4)


def test_foreground_patches_hold_their_class_and_rare_classes_come_as_often():
    stream = PatchStream(sampler(batch=(4, 0), foreground=1.0))
    seen: Counter[int] = Counter()
    for _ in range(100):
        batch = next(stream).batch
        for label in batch.y_l:
            classes = set(label.unique().tolist()) - {0}
            assert classes
            seen.update(classes)
    assert 120 < seen[2] < 280  # class 2 has one voxel in one case, and half of the 400 patches


def test_class_odds_of_the_method_are_followed():
    stream = PatchStream(sampler(batch=(4, 0), foreground=1.0, class_odds=lambda: torch.tensor([0.0, 0.0, 1.0])))
    assert all((label == 2).any() for _ in range(10) for label in next(stream).batch.y_l)


@pytest.mark.parametrize("handed_out", [0, 1, 5])
def test_a_resumed_stream_continues_exactly_though_odds_moved(handed_out: int):
    odds = {"now": torch.tensor([0.0, 1.0, 1.0])}

    def current() -> Tensor | None:
        return odds["now"]

    unbroken = PatchStream(sampler(foreground=0.5, class_odds=current))
    for _ in range(handed_out):
        next(unbroken)
    odds["now"] = torch.tensor([0.0, 0.0, 1.0])
    state = unbroken.state_dict()
    resumed = PatchStream(sampler(foreground=0.5, class_odds=current))
    resumed.load_state_dict(state)
    for _ in range(10):
        first, second = next(unbroken), next(resumed)
        assert first.request == second.request
        torch.testing.assert_close(first.batch.x_l, second.batch.x_l)


def test_two_ranks_share_the_batch_of_one():
    whole = PatchStream(sampler())
    halves = [PatchStream(sampler(), rank=rank, ranks=2) for rank in (0, 1)]
    for _ in range(3):
        expected = next(whole).batch
        parts = [next(half).batch for half in halves]
        torch.testing.assert_close(expected.x_l, torch.cat([part.x_l for part in parts]))
        torch.testing.assert_close(expected.x_u, torch.cat([part.x_u for part in parts]))


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ValueError, match="3 labelled patches, which 2 processes cannot share"):
        PatchStream(sampler(batch=(3, 2)), ranks=2)


def test_a_patch_larger_than_a_case_is_refused_by_name_or_padded():
    with pytest.raises(ValueError, match=r"patch_size \(8, 8, 8\) exceeds case 'a' \(6, 10, 12\)"):
        sampler(patch_size=(8, 8, 8))
    batch = next(PatchStream(sampler(patch_size=(8, 8, 8), pad=True))).batch
    assert (batch.y_l[:, 0] == IGNORE).all() and (batch.x_l[:, :, 0] == 0).all()
    assert (batch.y_l[:, 1:7] != IGNORE).all()


def told(patch: PatchRequest, extent: tuple[int, ...]) -> Tensor:
    """A companion's features that say which patch they are of."""
    return torch.tensor(["abcd".index(patch.case), *patch.start, *extent]).reshape(7, 1, 1, 1)


@pytest.mark.parametrize("patch_size", [(4, 4, 4), (4, 4)])
def test_a_companion_is_cut_beside_every_patch_labelled_first(patch_size: tuple[int, ...]):
    batch, request = next(PatchStream(sampler(patch_size=patch_size), companion=told))
    extent = (4, 4, 4) if len(patch_size) == 3 else (1, 4, 4)
    assert batch.features is not None
    assert torch.equal(batch.features, torch.stack([told(patch, extent) for part in request for patch in part]))
    assert next(PatchStream(sampler(patch_size=patch_size))).batch.features is None


def test_a_resumed_stream_cuts_the_companion_of_the_pending_batches():
    unbroken, resumed = PatchStream(sampler(), companion=told), PatchStream(sampler(), companion=told)
    next(unbroken)
    resumed.load_state_dict(unbroken.state_dict())
    for _ in range(5):
        first, second = next(unbroken).batch.features, next(resumed).batch.features
        assert first is not None and second is not None and torch.equal(first, second)


def test_two_ranks_share_the_companion_of_one_batch():
    whole = next(PatchStream(sampler(), companion=told)).batch.features
    halves = [next(PatchStream(sampler(), rank=rank, ranks=2, companion=told)).batch.features for rank in (0, 1)]
    for rank, half in enumerate(halves):
        assert whole is not None and half is not None
        assert torch.equal(half, whole[rank::2])  # one labelled, one unlabelled patch each


def test_a_batch_moves_with_its_companion():
    batch = next(PatchStream(sampler(), companion=told)).batch.to(torch.device("meta"))
    assert batch.features is not None and batch.features.device.type == batch.x_u.device.type == "meta"


def test_cut_pads_only_outside():
    volume = np.arange(8).reshape(2, 2, 2)
    patch = cut(volume, PatchRequest("a", (-1, 0, 1)), (2, 2, 2), fill=-5)
    assert patch.tolist() == [[[-5, -5], [-5, -5]], [[1, -5], [3, -5]]]


def test_a_batch_is_sent_by_the_thread_that_cut_it_and_received_by_the_one_that_asks():
    threads: list[tuple[str, str]] = []

    def send(batch: Batch) -> Callable[[], Batch]:
        cut_by = current_thread().name

        def receive() -> Batch:
            threads.append((cut_by, current_thread().name))
            return replace(batch, x_l=batch.x_l + 1000)

        return receive

    sent, plain = next(PatchStream(sampler(), send=send)).batch, next(PatchStream(sampler())).batch
    assert torch.equal(sent.x_l, plain.x_l + 1000)
    ((cut_by, received_by),) = threads
    assert cut_by.startswith("patches") and received_by == current_thread().name
