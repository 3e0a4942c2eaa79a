"""Cubes go back to where they came from."""

from __future__ import annotations

import pytest
import torch

from tailseg.parts.cubes import cut_cubes, draw_orders, exchange, join_cubes


@pytest.mark.parametrize("sides", [(6, 9, 12), (6, 9)])
def test_joining_undoes_cutting(sides: tuple[int, ...]):
    x = torch.randn(2, 3, *sides)
    cubes = cut_cubes(x, 3)
    assert cubes.shape == (2, 3 ** len(sides), 3, *(side // 3 for side in sides))
    assert torch.equal(join_cubes(cubes, 3), x)


def test_cubes_are_listed_with_the_last_axis_fastest():
    x = torch.randn(1, 1, 6, 6, 6)
    cubes = cut_cubes(x, 3)
    for i, j, k in [(0, 0, 1), (0, 1, 0), (1, 0, 0), (2, 0, 1)]:
        expected = x[0, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 2 * k : 2 * k + 2]
        assert torch.equal(cubes[0, 9 * i + 3 * j + k], expected)


def test_transposed_recovery_leaves_a_third_of_the_voxels_in_place():
    x = torch.randn(1, 1, 6, 6, 6)
    cubes = cut_cubes(x, 3)
    wrong = join_cubes(cubes, 3, transposed=True)
    assert (wrong == x).float().mean().item() == pytest.approx(9 / 27)
    # cube (i, j, k) stands where (k, j, i) belongs
    swapped = cubes.view(1, 3, 3, 3, 1, 2, 2, 2).transpose(1, 3).reshape(1, 27, 1, 2, 2, 2)
    assert torch.equal(cut_cubes(wrong, 3), swapped)


def test_the_inverse_of_an_order_gives_the_cubes_back():
    order = torch.tensor([2, 0, 3, 1]).view(4, 1)
    assert order.argsort(0).flatten().tolist() == [1, 3, 0, 2]
    cubes = torch.randn(4, 1, 2, 3, 3)
    mixed = exchange(cubes, order)
    assert torch.equal(mixed[0], cubes[2])
    assert torch.equal(exchange(mixed, order.argsort(0)), cubes)


def test_cubes_change_the_sample_but_never_the_place():
    sample, place = torch.meshgrid(torch.arange(4), torch.arange(27), indexing="ij")
    cubes = torch.stack([sample, place], 2)  # (B, P, 2)
    torch.manual_seed(0)
    order = draw_orders(cubes)
    mixed = exchange(cubes, order)
    assert torch.equal(mixed[..., 1], place)
    assert torch.equal(mixed[..., 0], order)
    assert torch.equal(order.sort(0).values, sample)  # of each place every sample serves once
    assert len({tuple(column.tolist()) for column in order.T}) > 10  # places draw on their own
