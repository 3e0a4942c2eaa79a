"""DePL: its worked example per voxel and with one distribution, the adaptive margin, and the floor under the log."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods.fixed_networks import EXAMPLE_TASK, HALFWAY, build_fixed, example_batch
from parts.worked_example import Z1, Z4, Rows, logits

from tailseg.core import Batch
from tailseg.methods.depl import DePL
from tailseg.options import OptionError, check_options
from tailseg.parts.losses import log_softmax, masked_cross_entropy
from tailseg.parts.ramps import ramp_up

Z2_SURE: Rows = [[0, 4, 0, 2], [1, 0, 0, 0], [0, 0, 1, 1]]
Z3_SURE: Rows = [[1, 0, 0, 0], [0, 2, 0, 5], [0, 0, 1, 0]]
A, B = logits(Z1, Z2_SURE), logits(Z3_SURE, Z4)
QHAT = torch.tensor([0.7, 0.2, 0.1]).reshape(3, 1, 1, 1)
ALL_WEIGHT = 1 / ramp_up(HALFWAY)  # the cps loss as such
BY_VOXEL: Any = (1, 1, 4)


def make(**options: Any) -> DePL:
    method = DePL(EXAMPLE_TASK, build_fixed(A, B), cps_weight=ALL_WEIGHT, **options)
    method.qhat_a.copy_(QHAT)
    method.qhat_b.copy_(QHAT)
    return method


@pytest.mark.parametrize("qhat", ["global", BY_VOXEL])
def test_pseudo_labels_and_confidences_of_the_worked_example(qhat: Any):
    method = make(qhat=qhat)
    labels, confidence = method._debias(log_softmax(A), method.qhat_a)
    assert labels.flatten().tolist() == [0, 1, 2, 2, 1, 0, 2, 2]  # argmax of the logits: 0, 1, 2, 0, 1, 0, 2, 0
    expected = [0.548792, 0.543222, 0.890241, 0.479694, 0.543222, 0.838705, 0.808738, 0.636025]
    assert confidence.flatten().tolist() == pytest.approx(expected, abs=1e-6)
    labels, confidence = method._debias(log_softmax(B), method.qhat_b)
    assert labels.flatten().tolist() == [2, 1, 2, 1, 1, 0, 1, 2]
    expected = [0.529570, 0.763745, 0.808738, 0.984833, 0.763745, 0.413049, 0.543222, 0.968987]
    assert confidence.flatten().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("qhat", ["global", BY_VOXEL])
def test_losses_of_the_worked_example(qhat: Any):
    output = make(qhat=qhat).step(example_batch(), HALFWAY)
    assert output.losses["cps"].item() == pytest.approx(0.300648, abs=1e-6)
    assert output.logs["kept_a"].item() == 0
    assert output.logs["kept_b"].item() == 2 / 8


def test_qhat_by_voxel_follows_the_worked_example():
    method = make(qhat=BY_VOXEL)
    method.step(example_batch(), HALFWAY)
    assert method.qhat_a[:, 0, 0, 1].tolist() == pytest.approx([0.702647, 0.198177, 0.099177], abs=1e-6)


def test_global_qhat_follows_the_mean_over_the_unlabelled_voxels():
    method = make()
    method.step(example_batch(), HALFWAY)
    mean = A[1:].softmax(1).mean((0, 2, 3, 4))
    assert method.qhat_a.flatten().tolist() == pytest.approx((0.99 * QHAT.flatten() + 0.01 * mean).tolist(), abs=1e-6)


def test_without_unlabelled_patches_qhat_stays():
    method, batch = make(), example_batch()
    method.net_a.decoders[0].logits.data, method.net_b.decoders[0].logits.data = A[:1], B[:1]
    method.step(Batch(batch.x_l, batch.y_l, batch.x_u[:0]), HALFWAY)
    assert torch.equal(method.qhat_a, QHAT) and torch.equal(method.qhat_b, QHAT)


def test_the_uniform_start_debiases_nothing():
    method = DePL(EXAMPLE_TASK, build_fixed(A, B))
    labels, confidence = method._debias(log_softmax(A), method.qhat_a)
    assert torch.equal(labels, A.argmax(1))
    torch.testing.assert_close(confidence, A.softmax(1).amax(1))


def test_margin_adds_the_others_bias_to_the_unlabelled_half():
    method = make(margin=True, threshold=0.5)
    pseudo_a, confidence_a = method._debias(log_softmax(A), QHAT)
    pseudo_b, confidence_b = method._debias(log_softmax(B), QHAT)
    loss = method.step(example_batch(), HALFWAY).losses["cps"]
    moved_a, moved_b = A.clone(), B.clone()
    moved_a[1] += method.qhat_b.log()  # moved by this step already
    moved_b[1] += method.qhat_a.log()
    expected = masked_cross_entropy(log_softmax(moved_a), pseudo_b, confidence_b >= 0.5)
    expected += masked_cross_entropy(log_softmax(moved_b), pseudo_a, confidence_a >= 0.5)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    plain = make(threshold=0.5).step(example_batch(), HALFWAY).losses["cps"]
    assert abs(loss.item() - plain.item()) > 0.01


@pytest.mark.parametrize("qhat", ["global", BY_VOXEL])
def test_a_class_whose_share_has_run_to_zero_gives_no_nan(qhat: Any):
    method = make(qhat=qhat, margin=True)
    method.qhat_a[2], method.qhat_b[2] = 0, 0
    total = torch.stack([*method.step(example_batch(), HALFWAY).losses.values()]).sum()
    total.backward()
    gradient = method.net_a.decoders[0].logits.grad
    assert isinstance(gradient, torch.Tensor)
    assert torch.isfinite(total) and torch.isfinite(gradient).all()


def test_qhat_by_voxel_is_tied_to_its_patch_size():
    method = make(qhat=BY_VOXEL)
    method.check_batch(1, 1, (1, 1, 4))
    make().check_batch(1, 1, (8, 8, 8))
    with pytest.raises(ValueError, match=r"data\.patch_size is \[2, 2, 4\]; set method\.qhat=\[2, 2, 4\]"):
        method.check_batch(1, 1, (2, 2, 4))


def test_qhat_of_a_recipe_is_a_word_or_a_list():
    assert check_options(DePL, {"qhat": [64, 128, 128]}, reserved=())["qhat"] == (64, 128, 128)
    assert check_options(DePL, {})["qhat"] == "global"
    with pytest.raises(OptionError, match="qhat"):
        check_options(DePL, {"qhat": "position"})
