"""What is asked of a machine: that it says what it has, and that a small network can be timed on it."""

from __future__ import annotations

from pathlib import Path

import torch

from tailseg.data.machine import free_ram, look_at_machine, measure_cost
from tailseg.networks.unet import UNet
from tailseg.networks.vnet import VNet


def test_a_machine_says_what_it_has(tmp_path: Path):
    found = look_at_machine("cpu", tmp_path / "not" / "yet" / "there")
    assert not found.is_gpu and found.memory == found.ram and found.cores >= 1 and found.disk > 0
    assert 10**8 < free_ram() < 10**14


def test_what_a_pass_keeps_grows_with_the_width_and_the_random_state_stays():
    state = torch.get_rng_state()
    narrow, wide = (measure_cost(lambda width=width: VNet(1, 3, 3, width=width), 3, 1, "cpu") for width in (2, 4))
    assert 1.8 < wide.kept / narrow.kept < 2.2
    assert wide.parameters > 3 * narrow.parameters
    assert narrow.seconds > 0 and torch.equal(torch.get_rng_state(), state)


def test_what_a_pass_keeps_is_counted_by_hand_for_one_convolution_and_its_norm():
    # a U-Net of width 2 keeps at its finest stage alone two inputs of norms and two of convolutions, each 2 values a voxel
    cost = measure_cost(lambda: UNet(1, 2, 2, width=2, dropout=0.0), 2, 1, "cpu")
    assert cost.kept > 2 * (2 + 2) * 2  # encoder and decoder
    assert cost.kept < 100
