"""Boxes and mixers: where boxes may lie, what is pasted, and how PIC goes from rare classes to all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tailseg.core import IGNORE, Progress, Task
from tailseg.options import OptionError
from tailseg.parts.mixing import PIC, CutMix, NoMixer, Samples, cutmix_boxes, make_mixer, paste

START = Progress(step=0, total_steps=100, steps_per_epoch=10)


def task(*class_voxels: int) -> Task:
    return Task(tuple(f"c{index}" for index in range(len(class_voxels))), 1, 3, (1, 1, 1), class_voxels)


EXAMPLE = task(10**6, 8000, 1500, 400, 100)


def at(fraction: float) -> Progress:
    return Progress(step=round(fraction * 1000), total_steps=1000, steps_per_epoch=10)


def edges(boxes: Tensor) -> Tensor:
    """(B, dims) voxels per side of the boxes (B, *S), which are asserted to be boxes."""
    dims = boxes.dim() - 1
    axes = range(1, dims + 1)
    lines = [boxes.any(dim=tuple(other for other in axes if other != axis)) for axis in axes]  # of (B, side)
    found = torch.stack([line.sum(1) for line in lines], 1)
    assert torch.equal(boxes.sum(tuple(axes)), found.prod(1))
    for line in lines:  # the covered voxels of an axis follow each other
        assert (line[:, 1:] & ~line[:, :-1]).sum(1).max() <= 1
    return found


def samples(*labels: list[int], confidence: float | list[list[float]] = 1.0, base: float = 0.0) -> Samples:
    """One line of voxels per sample, as (B, 1, 1, V) images whose values name their place: base + 100 * sample + voxel."""
    y = torch.tensor(labels).reshape(len(labels), 1, 1, -1)
    x = base + torch.arange(len(labels)).reshape(-1, 1, 1, 1, 1) * 100.0 + torch.arange(y.shape[-1])
    sure = (
        torch.tensor(confidence).reshape(y.shape) if isinstance(confidence, list) else torch.full(y.shape, confidence)
    )
    return Samples(x, y, sure)


def no_samples(like: Samples) -> Samples:
    return like[:0]


# boxes


def test_box_area_is_that_of_the_field_in_2d():
    torch.manual_seed(0)
    shares = cutmix_boxes(4000, (256, 256), probability=1.0).float().mean((1, 2))
    assert shares.mean().item() == pytest.approx(0.207, abs=0.005)
    assert shares.min() > 0.015 and shares.max() <= 0.4


def test_box_volume_is_as_drawn_in_3d():
    torch.manual_seed(0)
    shares = cutmix_boxes(1000, (28, 28, 20), probability=1.0, area=(0.3, 0.3)).float().mean((1, 2, 3))
    assert shares.mean().item() == pytest.approx(0.28, abs=0.01)  # three sides are rounded down, by half a voxel each


@pytest.mark.parametrize("sides", [(32, 24), (12, 48), (8, 32, 32), (32, 8, 8), (16, 16, 16)])
def test_boxes_are_boxes_anywhere_inside(sides: tuple[int, ...]):
    torch.manual_seed(0)
    boxes = cutmix_boxes(600, sides, probability=1.0)
    found = edges(boxes)
    assert (found <= torch.tensor(sides)).all() and (found > 0).all()
    for axis in range(len(sides)):  # also at both ends
        assert boxes.any(0).any(dim=tuple(other for other in range(len(sides)) if other != axis)).all()


def test_a_box_is_there_with_the_given_probability():
    torch.manual_seed(0)
    assert cutmix_boxes(2000, (8, 8), probability=0.3).any((1, 2)).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert not cutmix_boxes(50, (8, 8), probability=0.0).any()
    assert cutmix_boxes(50, (8, 8), probability=1.0).any((1, 2)).all()


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_aspect_is_that_of_the_last_two_sides(ratio: float):
    found = edges(cutmix_boxes(20, (400, 400), probability=1.0, area=(0.2, 0.2), aspect=(ratio, ratio)))
    assert (found[:, 0] / found[:, 1] - ratio).abs().max() < 0.02
    found = edges(cutmix_boxes(3, (100, 100, 100), probability=1.0, area=(0.1, 0.1), aspect=(ratio, ratio)))
    size = 0.1 * 100**3
    assert (
        found.tolist() == [[int(size ** (1 / 3)), int((size * ratio) ** (1 / 3)), int((size / ratio) ** (1 / 3))]] * 3
    )


def test_no_side_is_cut_more_than_it_must_be():
    """A box too tall for the image becomes as tall as the image and wider; its area stays."""
    found = edges(cutmix_boxes(5, (40, 40), probability=1.0, area=(0.4, 0.4), aspect=(3.0, 3.0)))
    assert found.tolist() == [[40, 16]] * 5
    found = edges(cutmix_boxes(5, (8, 40, 40), probability=1.0, area=(0.4, 0.4), aspect=(1.0, 1.0)))
    assert found.tolist() == [[8, 25, 25]] * 5
    assert edges(cutmix_boxes(2, (9, 7, 5), probability=1.0, area=(1.0, 1.0))).tolist() == [[9, 7, 5]] * 2


def test_no_boxes_for_no_samples():
    assert cutmix_boxes(0, (4, 5, 6)).shape == (0, 4, 5, 6)


def test_paste_takes_what_is_inside_the_boxes():
    boxes = torch.tensor([[True, False, False, True]])
    assert paste(torch.ones(1, 4), torch.zeros(1, 4), boxes).tolist() == [[1, 0, 0, 1]]
    assert paste(torch.ones(1, 2, 4), torch.zeros(1, 2, 4), boxes).tolist() == [[[1, 0, 0, 1]] * 2]


# CutMix


def test_cutmix_pastes_other_unlabelled_samples_and_leaves_the_labelled():
    torch.manual_seed(0)
    mixer, labelled = CutMix(task(1, 1), probability=1.0), samples([1] * 20)
    unlabelled = samples([0] * 20, [1] * 20, [2] * 20, confidence=[[0.5] * 20, [0.6] * 20, [0.7] * 20])
    first, mixed = mixer(labelled, unlabelled, START)
    assert first is labelled
    origin = mixed.x[:, 0].long() // 100
    changed = origin != torch.arange(3).reshape(-1, 1, 1, 1)
    assert changed.any((1, 2, 3)).all()
    assert torch.equal(mixed.labels, origin) and torch.equal(
        mixed.x[:, 0].long() % 100, torch.arange(20).expand(3, 1, 1, 20)
    )
    assert torch.equal(mixed.confidence, torch.tensor([0.5, 0.6, 0.7])[origin])


def test_cutmix_draws_every_other_sample():
    torch.manual_seed(0)
    mixer, unlabelled = CutMix(task(1, 1), probability=1.0), samples([0] * 20, [1] * 20, [2] * 20)
    mixed = torch.stack([mixer(unlabelled[:0], unlabelled, START)[1].labels for _ in range(50)])  # (50, 3, 1, 1, 20)
    for target in range(3):
        assert set(mixed[:, target].flatten().tolist()) == {0, 1, 2}
        assert (mixed[:, target] != target).any((1, 2, 3)).all()


@pytest.mark.parametrize("name", ["none", "cutmix", "pic"])
def test_a_sample_alone_stays_as_it_is(name: str):
    mixer, alone = make_mixer(name, task(10, 5)), samples([1] * 8)
    for labelled, unlabelled in ((alone[:0], alone), (alone, alone[:0])):
        for _ in range(10):
            mixed = mixer(labelled, unlabelled, START)
            assert torch.equal(torch.cat([part.x for part in mixed]), alone.x)
            assert torch.equal(torch.cat([part.labels for part in mixed]), alone.labels)


def test_no_mixer_returns_what_it_gets():
    labelled, unlabelled = samples([0, 1]), samples([1, 1])
    mixed = NoMixer(task(1, 1))(labelled, unlabelled, START)
    assert mixed[0] is labelled and mixed[1] is unlabelled


# PIC: the odds


@pytest.mark.parametrize(
    ("share", "odds"),
    [
        (0.0, [0.059788, 0.138074, 0.267379, 0.534759]),
        (0.25, [0.107341, 0.166056, 0.263035, 0.463569]),
        (0.5, [0.154894, 0.194037, 0.258690, 0.392379]),
        (1.0, [0.25] * 4),
    ],
)
def test_pic_goes_from_the_tail_to_uniform_as_in_the_worked_example(share: float, odds: list[float]):
    found = PIC(EXAMPLE).class_odds(at(0.8 * share))
    assert found.tolist() == pytest.approx([0, *odds], abs=1e-6)


def test_pic_options_of_the_worked_example():
    beta1 = PIC(EXAMPLE, beta=1.0).class_odds(START)
    assert beta1.tolist() == pytest.approx([0, 0.009404, 0.050157, 0.188088, 0.752351], abs=1e-6)
    exponent = PIC(EXAMPLE, anneal="exponent", t_pic=1.0).class_odds(at(0.5))
    assert exponent.tolist() == pytest.approx([0, 0.131146, 0.199298, 0.277339, 0.392217], abs=1e-6)
    cosine = PIC(EXAMPLE, anneal="cosine", t_pic=1.0).class_odds(at(0.25))
    q, blend = torch.tensor([0.059788, 0.138074, 0.267379, 0.534759]), 0.146447
    assert cosine.tolist() == pytest.approx([0, *((1 - blend) * q + blend / 4).tolist()], abs=2e-6)


@pytest.mark.parametrize("anneal", ["linear", "cosine", "exponent"])
def test_pic_starts_at_the_tail_and_is_uniform_from_t_pic_on(anneal: str):
    mixer = make_mixer({"name": "pic", "anneal": anneal}, EXAMPLE)
    assert isinstance(mixer, PIC)
    assert mixer.class_odds(at(0)).tolist() == pytest.approx([0, 0.059788, 0.138074, 0.267379, 0.534759], abs=1e-6)
    for late in (0.8, 0.9, 0.999):
        assert mixer.class_odds(at(late)).tolist() == pytest.approx([0, *[0.25] * 4])
    assert PIC(EXAMPLE, t_pic=0.0).class_odds(at(0)).tolist() == [0, *[0.25] * 4]


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_pic_never_draws_a_class_without_labelled_voxels(fraction: float):
    odds = PIC(task(100, 40, 0, 10)).class_odds(at(fraction))
    assert odds[2] == 0 and odds.sum().item() == pytest.approx(1) and torch.isfinite(odds).all()
    assert PIC(task(100, 0, 0)).class_odds(at(fraction)).tolist() == [0, 0, 0]


# PIC: the boxes


def always(task: Task = EXAMPLE, **options: float | tuple[float, float]) -> PIC:
    return PIC(task, **{"probability": 1.0, **options})


def test_pic_pastes_image_label_and_confidence_from_the_same_place():
    torch.manual_seed(0)
    labelled, unlabelled = samples([0] * 12 + [3] * 8, [1] * 20), samples([2] * 20, [4] * 20, confidence=0.9, base=1000)
    everything = torch.cat([labelled.x, unlabelled.x])[:, 0].flatten().tolist()
    labels = torch.cat([labelled.labels, unlabelled.labels]).flatten().tolist()
    label_of = dict(zip(everything, labels, strict=True))
    for _ in range(20):
        for mixed in always()(labelled, unlabelled, START):
            values = mixed.x[:, 0]
            assert torch.equal(values.long() % 100, torch.arange(20).expand(values.shape))
            assert mixed.labels.flatten().tolist() == [label_of[value] for value in values.flatten().tolist()]
            assert torch.equal(mixed.confidence, torch.where(values >= 1000, torch.tensor(0.9), 1.0))


def test_pic_boxes_hold_a_voxel_of_the_class_and_are_shares_of_the_patch():
    torch.manual_seed(0)
    y = torch.zeros(2, 16, 32, 48, dtype=torch.int64)
    y[0, 3, 30, 5] = y[0, 12, 0, 47] = 1  # the only foreground, at two corners
    labelled = Samples.annotated(y[:, None].float(), y)
    held = 0
    for _ in range(40):
        mixed, _ = always(task(1000, 2))(Samples(labelled.x, y, labelled.confidence), labelled[:0], START)
        assert torch.equal(mixed.labels[0], y[0])  # the other sample holds no foreground, so there is nothing to take
        taken = mixed.labels[1].sum().item()
        assert taken in (1, 2)
        held += taken
    assert 40 <= held <= 44
    marked = Samples(torch.arange(2.0).reshape(2, 1, 1, 1, 1).expand(2, 1, 16, 32, 48), y, labelled.confidence)
    boxes = torch.cat([always(task(1000, 2))(marked, marked[:0], START)[0].x[1] == 0 for _ in range(60)])
    found = edges(boxes)
    assert (found.float() <= torch.tensor([8, 16, 24])).all()
    assert (found > torch.tensor([2, 3, 2])).all()  # cut by the border to half of a quarter at least


def test_pic_draws_the_centre_among_all_voxels_of_the_class():
    torch.manual_seed(0)
    y = torch.zeros(2, 8, 8, dtype=torch.int64)
    y[0, 1, 2] = y[0, 6, 7] = y[0, 4, 0] = 1
    x = torch.arange(2.0).reshape(2, 1, 1, 1).expand(2, 1, 8, 8)
    mixer = always(Task(("a", "b"), 1, 2, (1, 1), (10, 1)), sides=(0.01, 0.01))
    hits = torch.zeros(8, 8)
    for _ in range(300):
        mixed, _ = mixer(Samples.annotated(x, y), Samples.annotated(x, y)[:0], START)
        hits += mixed.x[1, 0] == 0
    assert torch.equal(hits > 0, y[0] == 1)  # a side of one voxel is the centre itself
    assert hits.max() < 130


def test_pic_draws_classes_by_their_odds_among_those_the_sources_hold():
    torch.manual_seed(0)
    labelled = samples([0] * 4, [1, 2, 4, 0])
    mixer, counts = always(sides=(0.01, 0.01)), torch.zeros(5)
    for _ in range(2000):
        mixed, _ = mixer(labelled, labelled[:0], START)
        counts += torch.bincount(mixed.labels[0].flatten(), minlength=5)
    odds = mixer.class_odds(START).float() * torch.tensor([0, 1, 1, 0, 1])
    assert torch.allclose(counts[1:] / counts[1:].sum(), (odds / odds.sum())[1:], atol=0.03)


def test_pic_targets_take_from_the_subsets_they_may():
    torch.manual_seed(0)
    labelled, unlabelled = samples([1] * 8, [1] * 8), samples([1] * 8, [1] * 8, base=1000)
    for cross, origins in ((0.0, {"u"}), (1.0, {"l"}), (0.5, {"u", "l"})):
        seen: set[str] = set()
        for _ in range(30):
            first, second = always(cross_subset=cross)(labelled, unlabelled, START)
            assert (first.x < 1000).all()  # a labelled target never takes a guessed label
            assert ((first.x // 100) != torch.arange(2).reshape(-1, 1, 1, 1, 1)).any((1, 2, 3, 4)).all()
            own = 10 + torch.arange(2).reshape(-1, 1, 1, 1, 1)
            taken = second.x[(second.x // 100) != own]
            seen |= {"u" if value >= 1000 else "l" for value in taken.tolist()}
        assert seen == origins


def test_pic_takes_only_confident_voxels_of_unlabelled_sources():
    torch.manual_seed(0)
    sure = [[0.9] * 8, [0.74] * 7 + [0.76]]
    unlabelled = samples([0] * 8, [1] * 8, confidence=sure, base=1000)
    mixer = always(cross_subset=0.0, sides=(0.01, 0.01))
    for _ in range(10):
        _, mixed = mixer(unlabelled[:0], unlabelled, START)
        assert mixed.labels[0].flatten().tolist() == [0] * 7 + [1]
        assert mixed.confidence[0, 0, 0, -1].item() == pytest.approx(0.76)
    doubtful = samples([0] * 8, [1] * 8, confidence=0.7)
    assert torch.equal(mixer(doubtful[:0], doubtful, START)[1].labels, doubtful.labels)


def test_pic_applies_with_its_probability():
    torch.manual_seed(0)
    labelled = samples([1] * 8, [1] * 8)
    mixer = PIC(EXAMPLE, probability=0.3)
    changed = [(mixer(labelled, labelled[:0], START)[0].x != labelled.x).any((1, 2, 3, 4)) for _ in range(500)]
    assert torch.stack(changed).float().mean().item() == pytest.approx(0.3, abs=0.04)


def test_pic_leaves_batches_without_foreground_or_annotation():
    for label in (0, IGNORE):
        given = samples([label] * 8, [label] * 8)
        for mixed in always()(given, given, START):
            assert torch.equal(mixed.x, given.x) and torch.equal(mixed.labels, given.labels)


def test_pic_keeps_unannotated_voxels_unannotated():
    torch.manual_seed(0)
    labelled = samples([IGNORE] * 3 + [1] + [IGNORE] * 4, [0] * 8)
    mixed, _ = always(sides=(0.5, 0.5))(labelled, labelled[:0], START)
    assert mixed.labels[1].flatten().tolist() == [0, *[IGNORE] * 2, 1, IGNORE, 0, 0, 0]


def test_mixers_change_nothing_in_place():
    torch.manual_seed(0)
    labelled, unlabelled = samples([1] * 8, [2] * 8), samples([3] * 8, [1] * 8)
    before = [part.x.clone() for part in (labelled, unlabelled)]
    for name in ("cutmix", "pic"):
        make_mixer(name, EXAMPLE)(labelled, unlabelled, START)
    assert torch.equal(before[0], labelled.x) and torch.equal(before[1], unlabelled.x)


def test_mixers_repeat_under_the_same_seed():
    labelled, unlabelled = samples([1] * 8, [2] * 8), samples([3] * 8, [1] * 8)
    for name in ("cutmix", "pic"):
        mixer, images = make_mixer(name, EXAMPLE), []
        for _ in range(2):
            torch.manual_seed(3)
            images.append(mixer(labelled, unlabelled, START)[1].x)
        assert torch.equal(*images)


def test_mixers_remember_nothing():
    for name in ("none", "cutmix", "pic"):
        assert not make_mixer(name, EXAMPLE).state_dict()


def test_mixers_are_made_by_name_and_options():
    made = make_mixer({"name": "pic", "beta": 1.0, "sides": [0.1, 0.2]}, EXAMPLE)
    assert isinstance(made, PIC) and made.beta == 1.0 and made.sides == (0.1, 0.2)
    with pytest.raises(OptionError, match=r"No mixer is called 'cutmx'\. Did you mean 'cutmix'\?"):
        make_mixer("cutmx", EXAMPLE)
    with pytest.raises(OptionError, match=r"PIC has no option 'bta'\. Did you mean 'beta'\?"):
        make_mixer({"name": "pic", "bta": 1.0}, EXAMPLE)
    with pytest.raises(OptionError, match=r"t_pic is 2\.0; it is a probability or a share, from 0 to 1"):
        make_mixer({"name": "pic", "t_pic": 2.0}, EXAMPLE)
    with pytest.raises(OptionError, match=r"area is \(0\.4, 0\.2\); it is a range"):
        make_mixer({"name": "cutmix", "area": (0.4, 0.2)}, EXAMPLE)
