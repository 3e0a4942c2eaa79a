"""Sliding windows whose Gaussian weights are TailSeg's: MONAI raises every weight below 0.001 to that, which changes labels
wherever only the outer parts of windows meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.inferers.inferer import SliceInferer, SlidingWindowInferer
from torch import Tensor


class GaussianWindows(SlidingWindowInferer):
    """Windows in a volume. roi_size: (W, H, D)."""

    def __init__(self, roi_size: Sequence[int], **settings: Any) -> None:
        super().__init__(roi_size=roi_size, mode="gaussian", **settings)
        self.roi_weight_map = window_weights(roi_size)


class GaussianSlices(SliceInferer):
    """Windows in every slice along D. roi_size: (W, H)."""

    def __init__(self, roi_size: Sequence[int], **settings: Any) -> None:
        super().__init__(spatial_dim=2, roi_size=roi_size, mode="gaussian", **settings)
        self.roi_weight_map = window_weights([*roi_size, 1])


def window_weights(sides: Sequence[int]) -> Tensor:
    """(1, 1, *sides): 1 in the middle of a window, falling with sigma = side / 8 on each axis."""
    weights = torch.ones(())
    for side in sides:
        distance = torch.arange(side) - (side - 1) / 2
        weights = weights.unsqueeze(-1) * torch.exp(-0.5 * (distance / (side / 8)) ** 2)
    return weights[None, None]
