"""What two networks that predict together say, and what each says alone."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_and_each(first: Tensor, *others: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Class probabilities of the mean of the networks' logits (B, K, *S), and of each network's own; in float32."""
    each = [first.float(), *(logits.float() for logits in others)]
    total = each[0]
    for logits in each[1:]:
        total = total + logits
    return torch.softmax(total / len(each), 1), tuple(torch.softmax(logits, 1) for logits in each)
