"""The tensors that the worked examples of CPS, DHC and the supervised loss share: K = 3, 4 voxels per sample."""

from __future__ import annotations

import torch
from torch import Tensor

Rows = list[list[float]]

Z1: Rows = [[2, 0, -1, 0.6], [0, 1, 0, 0.5], [-1, 0, 1.5, 0]]
Z2: Rows = [[0, 1, 0, 2], [1, 0, 0, 0], [0, 0, 1, 1]]
Z3: Rows = [[1, 0, 0, 0], [0, 2, 0, 1], [0, 0, 1, 0]]
Z4: Rows = [[0, 2, 0, 0], [2, 0, 1, 0], [0, 0, 0, 3]]


def logits(*samples: Rows) -> Tensor:
    """(B, 3, 1, 1, 4)."""
    return torch.tensor(samples, dtype=torch.float32)[:, :, None, None, :]


LOGITS_A = logits(Z1, Z2)
LOGITS_B = logits(Z3, Z4)
TARGET = torch.tensor([0, 1, 2, 1]).reshape(1, 1, 1, 4)  # of the first sample
