"""SS-Net: the worked example of its spec, the selectors against one network per class, and the adversarial noise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from methods.fixed_networks import EXAMPLE_TASK, HALFWAY
from parts.worked_example import LOGITS_A, TARGET
from torch import Tensor, nn

from tailseg.checks import LATER_STEP, example_batch, example_task, make_example
from tailseg.core import IGNORE, Batch, BuildNetwork, SegNet, SegOutput, Task
from tailseg.methods.ssnet import (
    ClassSelectors,
    SSNet,
    blocks_by_class,
    dice_to_labels,
    dice_to_probs,
    frozen_statistics,
    unit,
)
from tailseg.parts.losses import cross_entropy, log_softmax


class _Answer(nn.Module):
    """Logits and embedding are what it sees."""

    def forward(self, x: Tensor) -> SegOutput:
        return SegOutput(x, x)


class _Linear(nn.Module):
    """Two classes: logits x (1, -1) + (0, .3)."""

    def forward(self, x: Tensor) -> SegOutput:
        return SegOutput(torch.cat([x, 0.3 - x], 1), x)


class _First(nn.Module):
    """A selector of every class: s(u) = u[0]."""

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return features[:, 0]


def build(decoder: nn.Module, embedding_channels: int) -> BuildNetwork:
    def make(**needs: object) -> SegNet:
        return SegNet(
            nn.Identity(),
            nn.ModuleList([decoder]),
            size_divisor=1,
            feature_channels=(1,),
            embedding_channels=embedding_channels,
        )

    return make


def plain(**options: object) -> SSNet:
    """Features of two numbers that P, Q and S leave alone, K = 3."""
    method = SSNet(EXAMPLE_TASK, build(_Answer(), 1), **options)  # pyright: ignore[reportArgumentType]
    method.projection, method.prediction = nn.Sequential(), nn.Sequential()
    method.selectors = _First()
    return method


def memorise(method: SSNet, memories: dict[int, list[tuple[float, float]]]) -> None:
    for c, rows in memories.items():
        method.memory[c, : len(rows)] = torch.tensor(rows)
        method.memory_count[c] = len(rows)


@pytest.mark.parametrize(
    ("rank", "kept"), [("lowest", [[1.0, 0.0], [2.0, 0.0]]), ("highest", [[3.0, 0.0], [2.0, 0.0]])]
)
def test_the_selection_of_the_spec(rank: str, kept: list[list[float]]):
    method = plain(memory_size=2, memory_rank=rank)
    features = torch.tensor([[3.0, 0], [1, 0], [0, 7], [9, 9], [2, 0]])
    method.remember(features, torch.tensor([[1, 1, 2, IGNORE, 1]]))
    assert method.memory[1].tolist() == kept
    assert method.memory[2].tolist() == [[0, 7], [0, 0]]
    assert method.memory_count.tolist() == [0, 2, 1]


def test_a_class_not_seen_keeps_its_memory_and_a_seen_one_forgets_all_of_it():
    method = plain(memory_size=2)
    memorise(method, {1: [(5, 5), (6, 6)], 2: [(7, 7), (8, 8)]})
    method.remember(torch.tensor([[1.0, 2.0]]), torch.tensor([[1]]))
    assert method.memory[1].tolist() == [[1, 2], [0, 0]]
    assert method.memory[2].tolist() == [[7, 7], [8, 8]]
    assert method.memory_count.tolist() == [0, 1, 2]


def test_the_contrast_of_the_spec():
    method = plain(memory_size=2)
    memorise(method, {1: [(1, 0), (0, 2)], 2: [(1, 1), (1, 0)]})
    u = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 0], [0, 3]])
    assert method.contrast(u, torch.tensor([[1, 1, 2, 1, 2]])).item() == pytest.approx(0.283175, abs=1e-6)
    ignored = torch.cat([u, torch.tensor([[1.0, -5.0]])])
    labels = torch.tensor([[1, 1, 2, 1, 2, IGNORE]])
    assert method.contrast(ignored, labels).item() == pytest.approx(0.283175, abs=1e-6)


def test_a_class_with_one_feature_or_one_memory_adds_nothing():
    method = plain(memory_size=2)
    memorise(method, {1: [(1, 0), (0, 2)], 2: [(1, 1)]})
    u = torch.tensor([[0.0, 1], [1, 0], [1, 1]])
    assert method.contrast(u, torch.tensor([[1, 2, 2]])) == 0
    assert method.contrast(u, torch.tensor([[2, 2, 2]])) == 0
    assert method.contrast(u, torch.tensor([[0, 0, 0]])) == 0
    assert method.contrast(u[:0], torch.empty(1, 0, dtype=torch.int64)) == 0


def test_the_supervised_dice_of_the_spec():
    assert dice_to_labels(log_softmax(LOGITS_A[:1]), TARGET).item() == pytest.approx(-0.645340, abs=1e-6)


def test_vectors_of_the_spec_become_units():
    d = torch.tensor([[3.0, 4.0], [0.0, 2.0]]).view(2, 1, 2)
    assert unit(d).flatten(1).tolist() == [pytest.approx([0.6, 0.8]), pytest.approx([0, 1])]


def test_the_adversarial_noise_of_the_spec(monkeypatch: pytest.MonkeyPatch):
    task = Task(("background", "a"), 1, 3, (1.0,) * 3, (10, 10))
    method = SSNet(task, build(_Linear(), 1))
    x = torch.tensor([0.1, 0.4, 0.2, 0.9]).view(1, 1, 1, 1, 4)
    raw = torch.tensor([0.5, 0.1, -0.3, -0.1]).view_as(x)
    assert unit(raw).flatten().tolist() == pytest.approx([0.833333, 0.166667, -0.5, -0.166667], abs=1e-6)
    monkeypatch.setattr(torch, "rand_like", lambda like: raw + 0.5)
    seen = []
    method.net.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    assert method.smoothness(x).item() == pytest.approx(-0.418400, abs=1e-6)
    direction = ((seen[2] - x) / 10).flatten().tolist()
    assert direction == pytest.approx([0, -0.033096, 0.0000907, -0.999452], abs=1e-6)
    clean = log_softmax(method.net(x).logits)
    assert dice_to_probs(clean, clean.exp()).item() == pytest.approx(-0.536092, abs=1e-6)


def test_with_ce_adds_the_cross_entropy():
    batch = Batch(LOGITS_A[:1], TARGET, LOGITS_A[1:])
    sup = [
        SSNet(EXAMPLE_TASK, build(_Answer(), 3), with_ce=ce).step(batch, HALFWAY).losses["sup"] for ce in (False, True)
    ]
    assert sup[0].item() == pytest.approx(-0.645340, abs=1e-6)
    ce = cross_entropy(log_softmax(LOGITS_A[:1]), TARGET)
    assert sup[1].item() == pytest.approx(-0.645340 + ce.item(), abs=1e-6)


def one_by_one(selectors: ClassSelectors, features: Tensor, labels: Tensor) -> Tensor:
    """Scores as the authors' code makes them: a network per class on the features of the class."""
    scores = features.new_zeros(len(features))
    for c in labels[labels != IGNORE].unique().tolist():
        of_c = labels == c
        hidden = features[of_c] @ selectors.weight[c] + selectors.bias[c]
        hidden = F.batch_norm(hidden, None, None, selectors.scale[c, 0], selectors.shift[c, 0], training=True)
        scores[of_c] = (F.leaky_relu(hidden, 0.2) @ selectors.out_weight[c] + selectors.out_bias[c]).squeeze(1)
    return scores


@pytest.mark.parametrize("block", [1, 4, 1000])
def test_selectors_score_like_one_network_per_class(block: int):
    torch.manual_seed(0)
    selectors = ClassSelectors(5, 6, block=block)
    with torch.no_grad():
        selectors.scale.uniform_(0.5, 2)
        selectors.shift.normal_()
    features = torch.randn(50, 6)
    labels = torch.tensor([0, 1, 1, 4, IGNORE] * 10)
    labels[0] = 2  # alone in its class is left out below: torch refuses it
    known = (labels != IGNORE) & (labels != 2)
    scores = selectors(features, labels)
    expected = one_by_one(selectors, features, labels.where(known, IGNORE))
    torch.testing.assert_close(scores[known], expected[known], atol=1e-5, rtol=1e-4)
    assert torch.isfinite(scores).all()

    target = torch.randn(int(known.sum()))
    parameters = list(selectors.parameters())
    mine = torch.autograd.grad((scores[known] * target).sum(), parameters)
    theirs = torch.autograd.grad((expected[known] * target).sum(), parameters)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        assert not a[3].any()  # a class that is not there gets a gradient, and it is 0


@pytest.mark.parametrize("block", [1, 3, 8])
def test_every_label_gets_a_slot_of_its_own_in_a_block_of_its_class(block: int):
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 9, 40):
        labels = torch.randint(0, 5, (length,), generator=generator)
        labels[labels == 4] = IGNORE
        slots, owners = blocks_by_class(labels, 4, block)
        assert len(slots.unique()) == length
        assert torch.equal(owners[slots // block], labels.clamp(max=4))


def test_frozen_statistics_normalise_by_the_batch_and_leave_the_running_ones_alone():
    norm = nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5) + 2
    expected = nn.BatchNorm2d(3)(x)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with frozen_statistics(norm):
        torch.testing.assert_close(norm(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    norm(x)
    assert norm.state_dict()["num_batches_tracked"] == 1


def test_the_search_for_noise_leaves_gradients_and_statistics_alone():
    method = make_example(SSNet, example_task(3, 1, 2), width=2)
    x = example_batch(method.task).x
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter)
    norm = next(module for module in method.net.modules() if isinstance(module, nn.BatchNorm2d))
    loss = method.smoothness(x)
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in method.parameters())
    assert norm.num_batches_tracked == 1  # by the clean pass
    assert loss.requires_grad


def test_the_noise_found_does_more_harm_than_noise():
    method = make_example(SSNet, example_task(3, 1, 2), width=4)
    assert isinstance(method, SSNet)
    x = example_batch(method.task).x
    torch.manual_seed(1)
    with torch.no_grad(), frozen_statistics(method.net):
        clean = log_softmax(method.net(x).logits).exp()
        noise = x + 10 * unit(torch.rand_like(x) - 0.5)
        random = dice_to_probs(log_softmax(method.net(noise).logits), clean)
    assert method.smoothness(x) > random


def test_every_part_of_the_method_learns_once_the_memory_is_filled():
    method = make_example(SSNet, example_task(3, 1, 2), width=2, voxels=200)
    batch = example_batch(method.task)
    method.memory.normal_()
    method.memory_count.fill_(32)
    losses = method(batch, LATER_STEP).losses
    losses["contrast"].backward()
    for part in (method.projection, method.prediction, method.selectors):
        assert all(p.grad is not None for p in part.parameters())
        assert any(p.grad is not None and p.grad.any() for p in part.parameters())
    head = method.net.get_submodule("decoders.0.head")
    assert all(p.grad is None or not p.grad.any() for p in head.parameters())  # the contrast is of features


def test_the_memory_holds_projections_of_correct_foreground_voxels_only():
    method = SSNet(EXAMPLE_TASK, build(_Answer(), 3), memory_size=8)
    batch = Batch(LOGITS_A[:1], TARGET, LOGITS_A[1:])  # predicts 0, 1, 2, 0 where 0, 1, 2, 1 is right
    h = LOGITS_A[:1].movedim(1, -1).flatten(0, -2)
    method.projection.eval()
    expected = method.projection(h).detach()
    method.train()
    method.step(batch, HALFWAY)
    assert method.memory_count.tolist() == [0, 1, 1]
    torch.testing.assert_close(method.memory[1, 0], expected[1])
    torch.testing.assert_close(method.memory[2, 0], expected[2])
