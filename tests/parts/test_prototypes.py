"""Class proxies: the worked numbers of the authors' module, tokens against torch's pooling, where gradients land."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailseg.core import IGNORE
from tailseg.options import OptionError
from tailseg.parts.prototypes import (
    ClassProxies,
    PriorHead,
    align_by_set,
    align_by_token,
    anchor_loss,
    class_shares,
    class_tokens,
    pool_tokens,
    sharpen,
    spread_tokens,
    token_grid,
)

TOKENS = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [-1.0, 1.0]]])  # (1, 3, 2)
GIVEN = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])  # w of labelled tokens


def unit_proxies(tau: float = 0.2, **options: bool) -> ClassProxies:
    """mu = I, sigma near 0, and tokens that are their own embedding, in evaluation."""
    proxies = ClassProxies(2, 2, dim=2, tau=tau, **options)
    proxies.embed = nn.Sequential()
    proxies.proxies.data = torch.cat([torch.eye(2), torch.full((2, 2), -50.0)], 1)
    return proxies.eval()


def close(found: Tensor, expected: list[object], digits: int = 5) -> None:
    torch.testing.assert_close(found.detach(), torch.tensor(expected), atol=0.6 * 10**-digits, rtol=0)


def test_cosines_assignment_and_prior_of_the_worked_example():
    proxies = unit_proxies()
    cosines = proxies.cosines(TOKENS, proxies.centres())
    close(cosines[0], [[0.6, 0.8], [1, 0], [-0.70711, 0.70711]])
    close(proxies.assign(cosines)[0], [[0.26894, 0.73106], [0.99331, 0.00669], [0.00085, 0.99915]])
    close(proxies.priors(TOKENS)[0, :, :2], [[0.34526, 0.93851], [0.99998, 0.00674], [0.00085, 1.0]])


def test_alignment_by_token_of_the_worked_example():
    proxies = unit_proxies()
    sampled = proxies.cosines(TOKENS, proxies.sampled())
    p2e, e2p = align_by_token(sampled, sharpen(proxies.assign(sampled)))
    assert p2e.item() == pytest.approx(0.7461766, abs=1e-6)
    assert e2p.item() == pytest.approx(0.1722599, abs=1e-6)
    assert (p2e + 0.1 * e2p).item() == pytest.approx(0.7634026, abs=1e-6)
    p2e, e2p = align_by_token(sampled, GIVEN)
    assert p2e.item() == pytest.approx(0.8547282, abs=1e-6)
    assert e2p.item() == pytest.approx(0.2309644, abs=1e-6)
    assert (p2e + 0.1 * e2p).item() == pytest.approx(0.8778247, abs=1e-6)


@pytest.mark.parametrize(("tau", "p2e", "e2p"), [(1.0, 0.6579152, 0.3761487), (0.2, 0.4545363, 0.1848582)])
def test_alignment_by_set_of_the_worked_example(tau: float, p2e: float, e2p: float):
    proxies = unit_proxies(tau)
    sampled, centred = (proxies.cosines(TOKENS, to) for to in (proxies.sampled(), proxies.centres()))
    found = align_by_set(sampled, centred, proxies.assign(centred))
    assert [loss.item() for loss in found] == pytest.approx([p2e, e2p], abs=1e-6)


def test_anchors_of_the_worked_example():
    instances = torch.tensor([[[2.0, 0.0], [0.0, -1.0]], [[2.0, 2.0], [9.0, 9.0]]])  # (2, K, 2)
    there = torch.tensor([[True, True], [True, False]])
    loss, cosines = anchor_loss(torch.eye(2), instances, there)
    assert loss.item() == pytest.approx(1.0380602, abs=1e-6)
    close(cosines, [0.9239, -1.0], digits=4)


def test_a_class_without_an_instance_has_no_anchor():
    loss, cosines = anchor_loss(torch.eye(2), torch.ones(1, 2, 2), torch.tensor([[True, False]]))
    assert loss.item() == pytest.approx(1 - 0.5**0.5)
    assert cosines[1] == 0
    loss, _ = anchor_loss(torch.eye(2), torch.ones(1, 2, 2), torch.zeros(1, 2, dtype=torch.bool))
    assert loss == 0


def test_the_module_has_the_authors_size():
    proxies = ClassProxies(16, 14, dim=256)
    assert sum(parameter.numel() for parameter in proxies.parameters()) == 410_112


def test_the_mean_direction_of_the_samples_gives_the_mean_cosine():
    proxies = ClassProxies(4, 3, dim=8, samples=50)
    embedded = torch.randn(2, 5, 8)
    torch.manual_seed(1)
    fast = proxies.cosines(embedded, proxies.sampled())
    torch.manual_seed(1)
    samples = proxies.mu + proxies.sigma * torch.randn(50, 3, 8)
    every = F.cosine_similarity(embedded[:, :, None, None], samples.transpose(0, 1), dim=4)  # (2, 5, K, S)
    torch.testing.assert_close(fast, every.mean(3))


def test_evaluation_expects_what_training_samples():
    torch.manual_seed(0)
    proxies = ClassProxies(4, 3, dim=64, samples=40_000)
    drawn = proxies.sampled()
    expected = proxies.eval().sampled()
    assert (drawn - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("sides", [(16, 24), (13, 7), (16, 24, 8), (9, 12, 10)])
def test_tokens_are_torchs_pooling_and_spread_by_its_interpolation(sides: tuple[int, ...]):
    x, grid = torch.randn(2, 3, *sides), tuple(range(3, 3 + len(sides)))
    pool = nn.AdaptiveAvgPool2d if len(sides) == 2 else nn.AdaptiveAvgPool3d
    coarse = pool(grid)(x)  # pyright: ignore[reportArgumentType] - as many sides as the pooling has
    tokens = pool_tokens(x, grid)
    torch.testing.assert_close(tokens, coarse.flatten(2).mT)
    mode = "bilinear" if len(sides) == 2 else "trilinear"
    fine = F.interpolate(coarse, sides, mode=mode, align_corners=False)
    torch.testing.assert_close(spread_tokens(tokens, grid, sides), fine)


def test_a_token_is_no_smaller_than_asked_for():
    assert token_grid((96, 96, 96), 12, 8) == (12, 12, 12)
    assert token_grid((64, 128, 256), 12, 8) == (8, 12, 12)
    assert token_grid((4, 32), 12, 8) == (1, 4)
    assert token_grid((96, 96), 32, 1) == (32, 32)


def test_class_shares_are_those_of_annotated_voxels():
    labels = torch.tensor([[[0, 1, IGNORE, IGNORE], [1, 1, 2, IGNORE]]])  # two tokens of 2 x 2 pixels
    shares = class_shares(labels, 3, (1, 2))
    close(shares[0], [[0.25, 0.75, 0], [0, 0, 1]])
    assert class_shares(torch.full_like(labels, IGNORE), 3, (1, 2)).abs().max() == 0


def test_tokens_that_nobody_annotated_are_left_out():
    cosines = torch.rand(1, 3, 2)
    unknown = GIVEN.clone()
    unknown[0, 2] = 0
    fewer = align_by_token(cosines[:, :2], GIVEN[:, :2])
    assert align_by_token(cosines, unknown) == fewer
    assert [loss.item() for loss in align_by_token(cosines, torch.zeros_like(GIVEN))] == [0, 0]


def test_class_tokens_are_means_weighed_by_the_classes_of_the_tokens():
    weights = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    means, there = class_tokens(TOKENS, weights)
    close(means[0, :2], [[(1.5 + 1) / 1.5, 2 / 1.5], [0.5 / 1.5, 3 / 1.5]])
    assert there.tolist() == [[True, True, False]]
    assert means[0, 2].abs().max() == 0


def test_anchors_pull_the_means_alone():
    proxies = ClassProxies(2, 2, dim=4)
    instances = torch.randn(3, 2, 4, requires_grad=True)
    anchor_loss(proxies.centres(), instances, torch.ones(3, 2, dtype=torch.bool))[0].backward()
    assert instances.grad is None
    assert proxies.proxies.grad is not None
    mean, deviation = proxies.proxies.grad.chunk(2, 1)
    assert mean.abs().max() > 0 and deviation.abs().max() == 0


def test_alignment_trains_embedding_and_proxies_but_not_its_weights():
    proxies = ClassProxies(2, 2, dim=4)
    features = torch.randn(1, 3, 2, requires_grad=True)
    embedded = proxies.embed(features)
    weights = sharpen(proxies.assign(proxies.cosines(embedded, proxies.centres())))
    assert not weights.requires_grad
    sum(align_by_token(proxies.cosines(embedded, proxies.sampled()), weights)).backward()
    assert features.grad is not None and features.grad.abs().max() > 0
    assert proxies.proxies.grad is not None and (proxies.proxies.grad.abs().sum(0) > 0).all()


def test_noise_is_trained_where_it_is_injected_only():
    assert ClassProxies(2, 2, dim=4).noise.requires_grad
    assert not ClassProxies(2, 2, dim=4, z_sam=False).noise.requires_grad


@pytest.mark.parametrize(
    ("options", "channels"),
    [({"z_sam": False}, 2), ({}, 4), ({"r_dist": True}, 6), ({"z_sam": False, "r_dist": True}, 4)],
)
def test_priors_are_unit_vectors_side_by_side(options: dict[str, bool], channels: int):
    proxies = unit_proxies(**options)
    priors = proxies.priors(TOKENS)
    assert priors.shape == (1, 3, channels) and proxies.prior_channels == channels
    torch.testing.assert_close(priors.unflatten(2, (-1, 2)).norm(dim=3), torch.ones(1, 3, channels // 2))
    torch.testing.assert_close(priors, proxies.priors(TOKENS))  # nothing is drawn in evaluation


def make_head() -> PriorHead:
    torch.manual_seed(0)
    return PriorHead(nn.Conv2d(6, 3, 1), 6, ClassProxies(6, 3, dim=8), tokens=2, token_size=2)


def test_a_head_adds_the_spread_priors_to_the_embedding():
    head, embedding = make_head().eval(), torch.randn(2, 6, 8, 8)
    tokens = pool_tokens(embedding, (2, 2))
    prior = spread_tokens(head.project(head.proxies.priors(head.proxies.embed(tokens))), (2, 2), (8, 8))
    torch.testing.assert_close(head(embedding), head.head(embedding + prior))
    assert not torch.allclose(head(embedding), head.head(embedding))


def test_a_head_hears_the_first_embedding_and_forgets_it_once_taken():
    head, first, second = make_head(), torch.randn(2, 6, 8, 8), torch.randn(1, 6, 4, 4)
    head(first)
    assert head.heard is None
    head.listen()
    for embedding in (first, second):
        head(embedding)
    heard = head.take()
    torch.testing.assert_close(heard.features, pool_tokens(first, (2, 2)))
    assert heard.grid == (2, 2)
    head(first)
    assert head.heard is None
    copy.deepcopy(head)(first)  # as a teacher does


def test_a_head_goes_through_torch_compile():
    head, embedding = make_head().eval(), torch.randn(2, 6, 8, 8)
    logits = head(embedding)
    head.compile(backend="eager")
    head.listen()
    torch.testing.assert_close(head(embedding), logits)
    assert head.take().features.shape == (2, 4, 6)


def test_proxies_compute_in_float32_under_autocast():
    head = make_head()
    head.listen()
    with torch.autocast("cpu", torch.bfloat16):
        head(torch.randn(2, 6, 8, 8).bfloat16())
        heard, proxies = head.take(), head.proxies
        cosines = proxies.cosines(heard.embedded, proxies.sampled())
        shares = torch.ones(2, 4, 3) / 3
        losses = [*align_by_token(cosines, shares), *align_by_set(cosines, cosines, proxies.assign(cosines))]
        losses += [anchor_loss(proxies.centres(), *class_tokens(torch.randn(2, 4, 8).bfloat16(), shares))[0]]
    assert heard.features.dtype == cosines.dtype == torch.float32
    assert {loss.dtype for loss in losses} == {torch.float32}


@pytest.mark.parametrize("options", [{"samples": 0}, {"dim": 0}, {"draws": 0}, {"tau": 0.0}])
def test_impossible_options_are_named(options: dict[str, Any]):
    with pytest.raises(OptionError, match=next(iter(options))):
        ClassProxies(2, 2, **options)
