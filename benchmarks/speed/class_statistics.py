"""What the class statistics of DHC cost: class weights, Dice counts and histograms of pseudo-labels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from peers import on_cpu
from step_dhc import SIDE, Authors, K, Plain, trainee
from suite import Benchmark, Contestant, Settings
from torch import Tensor

from tailseg.methods.dhc import DHC
from tailseg.parts.counts import count_classes


class Given:
    """Logits of both networks for the batch of the step, and their argmax, which the losses need anyway."""

    def __init__(self, method: DHC, x: Tensor) -> None:
        with torch.no_grad():
            nets = (method.net_a, method.net_b)
            self.logits_a, self.logits_b = (net(x).logits.contiguous() for net in nets)  # (B, K, *S)
        self.pseudo_a, self.pseudo_b = self.logits_a.argmax(1), self.logits_b.argmax(1)  # (B, *S)


def ours(method: DHC, given: Given, y: Tensor) -> Mapping[str, Tensor]:
    """What DHC.step does besides networks and losses."""
    w_a, w_b = method.weighter_a.update(given.pseudo_a, y), method.weighter_b.update(given.pseudo_b, y)
    _ = count_classes(given.pseudo_a, K) + count_classes(given.pseudo_b, K)  # for the alarm on classes never predicted
    return {"weights_a": w_a, "weights_b": w_b}


def plain(like: Plain, given: Given, y: Tensor) -> Mapping[str, Tensor]:
    n = len(y)
    return {
        "weights_a": like.difficulty.update(given.pseudo_a[:n], y),
        "weights_b": like.distribution.update(given.pseudo_b[n:]),
    }


def authors(like: Authors, given: Given, y: Tensor) -> Mapping[str, Tensor]:
    n = len(y)
    with on_cpu():
        return {
            "weights_a": like.diffdw.cal_weights(given.logits_a[:n], y.unsqueeze(1)),
            "weights_b": like.distdw.get_ema_weights(given.logits_b[n:]),
        }


def contestants(settings: Settings) -> Sequence[Contestant]:
    trained = trainee(settings)
    method, y = cast(DHC, trained.method), trained.batch.y_l
    given = Given(method, trained.batch.x)
    textbook = Plain(trained)
    made = [
        Contestant("tailseg", lambda: ours(method, given, y)),
        Contestant("plain", lambda: plain(textbook, given, y), own_allocator=True),
    ]
    if folder := settings.peers.get("dhc"):
        code = Authors(folder, trained)
        made.append(Contestant("dhc", lambda: authors(code, given, y), own_allocator=True))
    return made


def share(settings: Settings) -> Mapping[str, str]:
    """Of the step: statistics and whole steps take turns."""
    trained = trainee(settings)
    method, y = cast(DHC, trained.method), trained.batch.y_l
    given = Given(method, trained.batch.x)
    trained.step()
    found = []
    for _ in range(settings.rounds):
        start = time.process_time()
        ours(method, given, y)
        middle = time.process_time()
        trained.step()
        found.append((middle - start) / (time.process_time() - middle))
    low, middle, high = min(found), statistics.median(found), max(found)
    return {"share of a step of DHC": f"{middle:.2%}, from {low:.2%} to {high:.2%}"}


BENCHMARKS = (
    Benchmark(
        "statistics",
        f"The class statistics of a step of DHC, from given predictions: 2 + 2 patches of {SIDE}^3, {K} classes.",
        "<= 2 % of the step",
        contestants,
        {"plain": 1e-5, "dhc": 1e-5},
        share,
        "DiffDW on network A and DistDW on network B. TailSeg counts what both networks predicted too, for its alarm.",
    ),
)
