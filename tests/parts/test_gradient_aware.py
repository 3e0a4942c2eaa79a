"""GALoss: the worked numbers of the authors' classes, their gradients, IGNORE, and two ranks against one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tailseg.core import IGNORE
from tailseg.parts.gradient_aware import ga_ce, ga_dice, ga_loss
from tailseg.parts.losses import cross_entropy, log_softmax

PROBS = torch.tensor([[[0.6, 0.2], [0.7, 0.5]], [[0.3, 0.7], [0.1, 0.1]], [[0.1, 0.1], [0.2, 0.4]]])[None]
LABELS = torch.tensor([[[0, 1], [0, 0]]])

ROWS = [[2, 0, 1, -1, 3, 0.5, 0, 1, 2, -2], [0, 1, 1, 1, 0, 0.5, 2, 0, 0, 1], [-1, 0, 0, 0, 0, 0, 0, 0, 1, 0]]
TEN = log_softmax(torch.tensor(ROWS).reshape(1, 3, 2, 5))
TEN_LABELS = torch.tensor([0, 1, 0, 2, 0, 0, 1, 0, 2, 1]).reshape(1, 2, 5)


def test_dice_equals_that_of_the_authors_with_the_gradient_of_an_absent_class():
    probs = PROBS.clone().requires_grad_()
    loss = ga_dice(probs.log(), LABELS)
    loss.backward()
    assert loss.item() == pytest.approx(0.1034782, abs=1e-7)
    assert probs.grad is not None
    # p / N over K = 3 classes; without the stop-gradient it would be 2p / N
    expected = torch.tensor([[0.0083333, 0.0083333], [0.0166667, 0.0333333]])
    torch.testing.assert_close(probs.grad[0, 2], expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize(("of", "share"), [(0, 0.1304348), (1, 0.1250000), (2, 0.0550000)])
def test_dice_of_each_class_equals_that_of_the_authors(of: int, share: float):
    weight = torch.nn.functional.one_hot(torch.tensor(of), 3).float()
    assert 3 * ga_dice(PROBS.log(), LABELS, weight).item() == pytest.approx(share, abs=2e-7)


@pytest.mark.parametrize(
    ("percent", "gamma", "loss"),
    [
        (100, 0.5, 1.2104543),
        (50, 0.5, 1.5025563),
        (30, 0.5, 1.7024188),
        (100, 1.0, 0.6591442),
        (100, 0.0, 2.3148522),
    ],
)
def test_cross_entropy_equals_that_of_the_authors(percent: float, gamma: float, loss: float):
    assert ga_ce(TEN, TEN_LABELS, percent=percent, gamma=gamma).item() == pytest.approx(loss, abs=1e-6)


def test_with_gamma_one_it_is_the_plain_cross_entropy():
    assert ga_ce(TEN, TEN_LABELS, gamma=1.0).item() == pytest.approx(cross_entropy(TEN, TEN_LABELS).item(), abs=1e-6)


def test_only_kept_voxels_get_a_gradient():
    log_probs = TEN.clone().requires_grad_()
    ga_ce(log_probs, TEN_LABELS, percent=30).backward()
    assert log_probs.grad is not None
    kept = log_probs.grad.abs().sum(1).flatten() > 0
    assert kept.nonzero().flatten().tolist() == [3, 5, 8]  # losses 1.41, .96 and 1.41 of ten


def test_class_weights_multiply_the_share_of_each_class():
    parts = [ga_ce(TEN, TEN_LABELS, torch.eye(3)[k]).item() for k in range(3)]
    assert ga_ce(TEN, TEN_LABELS).item() == pytest.approx(sum(parts))
    weight = torch.tensor([1.0, 2.0, 3.0])
    assert ga_ce(TEN, TEN_LABELS, weight).item() == pytest.approx(parts[0] + 2 * parts[1] + 3 * parts[2])


def plain(log_probs: Tensor, target: Tensor, percent: float) -> Tensor:
    """The formulas as the paper writes them, on the annotated voxels alone, with boolean indexing and one-hot targets."""
    known = target != IGNORE
    columns, y = log_probs.movedim(1, -1)[known], target[known]
    losses = -columns.gather(1, y[:, None])[:, 0]
    kept = losses.detach().topk(int(len(y) * percent / 100)).indices
    ce = log_probs.new_zeros(())
    dice = log_probs.new_zeros(())
    probs, onehot = columns.exp(), torch.nn.functional.one_hot(y, log_probs.shape[1]).float()
    for k in range(log_probs.shape[1]):
        mine = kept[y[kept] == k]
        if len(mine):
            ce = ce + losses[mine].sum() / (len(mine) * len(kept)) ** 0.5
        p, t = probs[:, k], onehot[:, k]
        if t.any():
            dice = dice + 1 - (2 * (p * t).sum() + 1e-10) / (p.square().sum() + t.sum() + 1e-10)
        else:
            dice = dice + ((p / len(y)).detach() * p).sum()
    return ce + dice / log_probs.shape[1]


@pytest.mark.parametrize("shape", [(9, 8), (6, 5, 7)])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_loss_equals_the_plain_formula_with_its_gradient(shape: tuple[int, ...], ignored: float):
    torch.manual_seed(0)
    logits = torch.randn(2, 5, *shape, requires_grad=True)
    target = torch.randint(0, 4, (2, *shape))  # the last class is absent
    target[torch.rand(target.shape) < ignored] = IGNORE
    fast, slow = ga_loss(log_softmax(logits), target), plain(log_softmax(logits), target, 10.0)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (fast, slow)))


def test_an_unannotated_batch_gives_no_gradient():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = ga_loss(log_softmax(logits), torch.full((2, 4, 4), IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None and logits.grad.abs().max() == 0


SHARED = """
import sys
import torch
import torch.distributed as dist
from tailseg.core import IGNORE
from tailseg.parts.gradient_aware import ga_loss
from tailseg.parts.losses import log_softmax

rank, port = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
logits = torch.randn(4, 3, 9, 7)
logits[2:] *= 3  # the hard voxels are not shared evenly
target = torch.randint(0, 2, (4, 9, 7))
target[0] = 2  # a class that only the first rank holds
target[3, :4] = IGNORE
alone = logits.clone().requires_grad_()
loss_alone = ga_loss(log_softmax(alone), target)
loss_alone.backward()
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
mine = slice(2 * rank, 2 * rank + 2)
shared = logits[mine].clone().requires_grad_()
loss_shared = ga_loss(log_softmax(shared), target[mine])
loss_shared.backward()
torch.testing.assert_close(loss_shared, loss_alone)
torch.testing.assert_close(shared.grad / 2, alone.grad[mine])  # DDP averages over the ranks
dist.destroy_process_group()
"""


def test_two_ranks_minimise_what_one_would():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, "-c", SHARED, str(rank), port], env=environment) for rank in (0, 1)]
    assert [rank.wait(timeout=100) for rank in ranks] == [0, 0]
