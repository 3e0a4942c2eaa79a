"""DST: the worked example of its spec, which head learns what, and the reversal of gradients."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from methods.fixed_networks import EXAMPLE_TASK, HALFWAY, example_batch
from parts.worked_example import LOGITS_A, LOGITS_B, TARGET
from torch import Tensor, nn

from tailseg.checks import LATER_STEP, example_task, make_example
from tailseg.checks import example_batch as noise_batch
from tailseg.core import BuildNetwork, Progress, SegNet, SegOutput
from tailseg.methods.dst import DST, error_loss, reversal_strength
from tailseg.parts.losses import cross_entropy, log_softmax, masked_cross_entropy

MAIN, WORST = LOGITS_A, LOGITS_B
SURE = 10 * MAIN


class _Encoder(nn.Module):
    """Its one feature has a weight of its own, so that gradients into the encoder can be told by decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.weight.expand(len(x), 1, 1, 1, 1) * 1]


class _Fixed(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, features: list[Tensor]) -> SegOutput:
        logits = self.logits * features[0]
        return SegOutput(logits, logits)


def build_heads(*networks: Sequence[Tensor]) -> BuildNetwork:
    """Each network built takes the next (main, pseudo, worst) logits."""
    left = iter(networks)

    def build(**needs: object) -> SegNet:
        assert needs["num_decoders"] == 3
        decoders = nn.ModuleList(_Fixed(logits) for logits in next(left))
        return SegNet(_Encoder(), decoders, size_divisor=1, feature_channels=(1,), embedding_channels=1)

    return build


def test_the_worst_case_of_the_spec():
    worst, main = log_softmax(WORST), MAIN.argmax(1)
    assert main.flatten(1).tolist() == [[0, 1, 2, 0], [1, 0, 2, 0]]
    agree, error = cross_entropy(worst[:1], main[:1]), error_loss(worst[1:], main[1:])
    assert agree.item() == pytest.approx(0.723470, abs=1e-6)
    assert error.item() == pytest.approx(0.844326, abs=1e-6)
    heads = (MAIN, SURE, WORST)
    losses = DST(EXAMPLE_TASK, build_heads(heads, heads)).step(example_batch(), HALFWAY).losses
    assert losses["worst"].item() == pytest.approx(0.1 * 0.28650480 * 2 * 2.291265, abs=1e-6)


def test_masked_pseudo_labels_of_the_spec():
    mask = torch.tensor([1.0, 0, 1, 0]).view(1, 1, 1, 4)
    assert masked_cross_entropy(log_softmax(MAIN[:1]), TARGET, mask).item() == pytest.approx(0.109053, abs=1e-6)


def test_the_reversal_of_the_spec_grows_with_the_steps_done():
    steps = (0, 100, 500, 1000, 2400)
    expected = [0, 0.009967, 0.046212, 0.076159, 0.098367]
    assert [reversal_strength(step, 0.1, 500) for step in steps] == pytest.approx(expected, abs=1e-6)


def test_an_error_never_earns_a_negative_loss():
    probs = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
    log_probs = probs.log().clamp_min(-200)
    assert error_loss(log_probs, torch.tensor([[[1, 0]]])).item() == 0
    assert error_loss(log_probs, torch.tensor([[[0, 1]]])).item() == pytest.approx(13.815511, abs=1e-5)


@pytest.mark.parametrize("step", [151, 1000])
def test_the_worst_head_descends_and_the_encoder_ascends_by_the_strength(step: int):
    method = DST(EXAMPLE_TASK, build_heads((MAIN, SURE, WORST), (MAIN, SURE, WORST)))
    output = method.step(example_batch(), Progress(step, 2 * step, 1))
    sought = [method.net_a.get_parameter("encoder.weight"), method.net_a.get_parameter("decoders.2.logits")]
    gradient, into_head = torch.autograd.grad(output.losses["worst"], sought)
    # d loss / d weight through the head alone is <gradient of the logits, logits>
    plain = (into_head * WORST).sum()
    assert plain.abs() > 1e-3
    assert gradient.item() == pytest.approx(-reversal_strength(step, 0.1, 500) * plain.item(), rel=1e-4)


def test_official_pseudo_heads_teach_the_main_head_of_the_other_network_and_learn_nothing():
    heads_a, heads_b = (MAIN, SURE, WORST), (WORST, 0 * MAIN, MAIN)  # B is never sure
    method = DST(EXAMPLE_TASK, build_heads(heads_a, heads_b))
    output = method.step(example_batch(), HALFWAY)
    mask = log_softmax(SURE).exp().amax(1) > 0.95
    expected = masked_cross_entropy(log_softmax(WORST), SURE.argmax(1), mask)
    assert output.logs["kept_a"] == mask.float().mean() > 0
    assert output.logs["kept_b"] == 0
    assert output.losses["cps"].item() == pytest.approx(0.1 * 0.28650480 * expected.item(), rel=1e-6)
    torch.stack([*output.losses.values()]).sum().backward()
    for net in (method.net_a, method.net_b):
        assert [p.requires_grad for p in net.decoders[1].parameters()] == [False]
        assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_faithful_main_heads_teach_the_pseudo_head_of_the_other_network():
    heads_a, heads_b = (SURE, WORST, MAIN), (0 * MAIN, MAIN, WORST)  # B is never sure
    method = DST(EXAMPLE_TASK, build_heads(heads_a, heads_b), variant="faithful")
    output = method.step(example_batch(), HALFWAY)
    mask = log_softmax(SURE).exp().amax(1) > 0.95
    expected = masked_cross_entropy(log_softmax(MAIN), MAIN.argmax(1), mask)
    assert output.losses["cps"].item() == pytest.approx(0.1 * 0.28650480 * expected.item(), rel=1e-6)
    logits = [head for net in (method.net_a, method.net_b) for head in net.decoders.parameters()]
    gradients = torch.autograd.grad(output.losses["cps"], logits, allow_unused=True)
    taught = [gradient is not None and bool(gradient.any()) for gradient in gradients]
    assert taught == [False, False, False, False, True, False]


def test_the_threshold_may_keep_everything():
    heads = (MAIN, WORST, MAIN)
    method = DST(EXAMPLE_TASK, build_heads(heads, heads), threshold=0.0)
    output = method.step(example_batch(), HALFWAY)
    assert output.logs["kept_a"] == 1
    expected = 2 * cross_entropy(log_softmax(MAIN), WORST.argmax(1))
    assert output.losses["cps"].item() == pytest.approx(0.1 * 0.28650480 * expected.item(), rel=1e-6)


def test_the_frozen_pseudo_head_keeps_its_weights_but_moves_its_running_statistics():
    method = make_example(DST, example_task(3, 1, 2), width=2)
    pseudo = method.net_a.decoders[1]
    before = {name: value.clone() for name, value in pseudo.state_dict().items()}
    batch = noise_batch(method.task)
    optimizer = torch.optim.SGD(method.param_groups(), lr=0.1, weight_decay=0.1)
    torch.stack([*method(batch, LATER_STEP).losses.values()]).sum().backward()
    optimizer.step()
    moved = {name for name, value in pseudo.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all("running_" in name or "num_batches" in name for name in moved)
