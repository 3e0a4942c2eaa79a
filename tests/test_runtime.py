"""Precision: auto takes bf16 where the device computes in it; asking for an emulated one is said."""

from __future__ import annotations

import pytest
import torch

from tailseg import runtime
from tailseg.runtime import Runtime, RuntimeOptions, start_runtime

CPU = torch.device("cpu")


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bf16_only_where_the_device_computes_in_it(
    native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(runtime, "computes_in_bf16", lambda device: native)
    with Runtime(CPU, RuntimeOptions(precision="auto")).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_an_emulated_precision_is_used_as_asked_and_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime, "computes_in_bf16", lambda device: False)
    options = RuntimeOptions(device="cpu", precision="bf16")
    with (
        pytest.warns(UserWarning, match=r"only emulates bf16; train\.precision=auto"),
        start_runtime(options, 0) as made,
        made.autocast(),
    ):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_whether_this_cpu_computes_in_bf16_is_known():
    assert runtime.computes_in_bf16(CPU) in (True, False)
