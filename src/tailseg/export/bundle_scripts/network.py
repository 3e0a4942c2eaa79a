"""The network, read from a torch.export program."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass


class ExportedNetwork(nn.Module):
    """Patches (B, C, *S) float32 -> class probabilities (B, K, *S). Evaluation mode is all it has."""

    def __init__(self, path: str, device: torch.device) -> None:
        super().__init__()
        program = torch.export.load(path)
        if device.type != "cpu":
            program = move_to_device_pass(program, str(device))
        self.program = program.module()

    def forward(self, patch: Tensor) -> Tensor:
        return self.program(patch)

    def train(self, mode: bool = True) -> ExportedNetwork:
        return self  # an exported program refuses to switch
