"""Numbers that are looked at later are those of the moment they were asked for."""

from __future__ import annotations

import pytest
import torch

from tailseg.train.host_copy import HostCopy


def test_a_copy_keeps_the_values_of_its_moment():
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    copy = HostCopy(values)
    with torch.no_grad():
        values.add_(1)
    assert copy.here
    assert copy.read().tolist() == [1.0, 2.0] and not copy.read().requires_grad


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_before_the_reading():
    matrix = torch.rand(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    first = HostCopy(matrix[0, :4])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(200):  # seconds of work
            matrix = matrix @ matrix / 4096
        late = HostCopy(matrix[0, :4])
        assert first.read().isfinite().all()
        assert not late.here  # the first was read while the GPU was busy
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(late.read(), matrix[0, :4].cpu())
