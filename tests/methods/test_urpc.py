"""URPC: the worked example of its spec, and where its gradients go."""

from __future__ import annotations

import pytest
import torch
from methods.fixed_networks import EXAMPLE_TASK, HALFWAY, example_batch
from parts.worked_example import LOGITS_A
from torch import Tensor, nn

from tailseg.checks import LATER_STEP, example_task
from tailseg.checks import example_batch as noise_batch
from tailseg.components import make_build
from tailseg.core import BuildNetwork, SegNet, SegOutput
from tailseg.methods.urpc import URPC, pyramid_consistency
from tailseg.parts.losses import log_softmax

SCALES = (1.0, 0.5, 0.0, -0.5)


class _FixedPyramid(nn.Module):
    def __init__(self, *scales: Tensor) -> None:
        super().__init__()
        self.scales = nn.ParameterList(scale.clone() for scale in scales)

    def forward(self, features: Tensor) -> SegOutput:
        finest, *coarse = self.scales
        return SegOutput(finest, finest, tuple(coarse))


def build_pyramid(*scales: Tensor) -> BuildNetwork:
    """A network that answers with these logits, finest first, whatever it sees."""

    def build(**needs: object) -> SegNet:
        assert needs == {"init": "kaiming", "pyramid": True}
        decoders = nn.ModuleList([_FixedPyramid(*scales)])
        return SegNet(nn.Identity(), decoders, size_divisor=1, feature_channels=(1,), embedding_channels=1)

    return build


def test_losses_of_the_spec():
    method = URPC(EXAMPLE_TASK, build_pyramid(*(s * LOGITS_A for s in SCALES)))
    losses = method.step(example_batch(), HALFWAY).losses
    assert losses["sup"].item() == pytest.approx(0.282998, abs=1e-6)
    assert losses["consistency"].item() == pytest.approx(0.1 * 0.28650480 * 0.063302, abs=1e-6)
    assert sum(losses.values()).item() == pytest.approx(0.284811, abs=1e-6)  # pyright: ignore[reportAttributeAccessIssue]


def test_consistency_of_each_scale_of_the_spec():
    consistency, _ = pyramid_consistency([log_softmax(s * LOGITS_A[1:]) for s in SCALES])
    assert consistency.tolist() == pytest.approx([0.113009, 0.013567, 0.013991, 0.112639], abs=1e-6)
    assert consistency.mean().item() == pytest.approx(0.063302, abs=1e-6)


def test_scales_that_agree_cost_nothing():
    consistency, variance = pyramid_consistency([log_softmax(LOGITS_A)] * 4)
    assert consistency.tolist() == pytest.approx([0] * 4, abs=1e-6)
    assert variance.tolist() == pytest.approx([0] * 4, abs=1e-6)


def test_logits_far_apart_stay_finite_with_their_gradients():
    scales = [(s * LOGITS_A).requires_grad_() for s in (1000.0, -1000.0, 0.0)]
    consistency, _ = pyramid_consistency([log_softmax(scale) for scale in scales])
    consistency.sum().backward()
    assert torch.isfinite(consistency).all()
    assert all(scale.grad is not None and torch.isfinite(scale.grad).all() for scale in scales)


def test_the_mean_over_the_scales_is_no_fixed_target():
    scales = [(s * LOGITS_A[1:]).requires_grad_() for s in SCALES]
    consistency, _ = pyramid_consistency([log_softmax(scale) for scale in scales])
    (through_mean,) = torch.autograd.grad(consistency[0], scales[3])
    assert through_mean.abs().max() > 0.001


def test_labelled_voxels_get_no_consistency_and_unlabelled_no_supervision():
    method = URPC(EXAMPLE_TASK, build_pyramid(*(s * LOGITS_A for s in SCALES)))
    losses = method.step(example_batch(), HALFWAY).losses
    scales = list(method.parameters())
    for loss, silent in (("sup", 1), ("consistency", 0)):
        gradients = torch.autograd.grad(losses[loss], scales, retain_graph=True)
        assert all(not gradient[silent].any() and gradient[1 - silent].any() for gradient in gradients)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_coarse_scales_are_interpolated_to_the_finest(spatial_dims: int):
    sides = (8,) * spatial_dims
    coarse = torch.randn(2, 3, *[4] * spatial_dims)
    full = nn.Upsample(scale_factor=2, mode="trilinear" if spatial_dims == 3 else "bilinear")(coarse)
    task = example_task(3, 1, spatial_dims)
    batch = noise_batch(task, 1, 1, side=8)
    finest = torch.randn(2, 3, *sides)
    small = URPC(task, build_pyramid(finest, coarse)).step(batch, LATER_STEP).losses
    large = URPC(task, build_pyramid(finest, full)).step(batch, LATER_STEP).losses
    assert all(torch.equal(small[name], large[name]) for name in small)


def test_on_its_own_network_every_parameter_learns():
    task = example_task(3)
    method = URPC(task, make_build("urpc_unet", {"width": 2}, task))
    output = method(noise_batch(task, 1, 1, side=32), LATER_STEP)
    torch.stack([*output.losses.values()]).sum().backward()
    assert [name for name, p in method.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
