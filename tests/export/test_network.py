from __future__ import annotations

import pytest
import torch
from export.models import example
from methods.examples import METHODS

from tailseg.export.network import PredictionNetwork, program_callable, trace


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("spatial_dims", "network"), [(2, "unet"), (3, "vnet")])
def test_what_predict_does_not_need_is_left_out(name: str, spatial_dims: int, network: str):
    method = example(name, spatial_dims, network)
    made = PredictionNetwork([method])
    before = method.state_dict().keys()
    unused = made.drop_unused()
    x = made.example()
    with torch.inference_mode():
        assert torch.equal(made(x), method.predict(x))
    kept = made.state_dict().keys()
    assert len(kept) + len(unused) >= len(before) and not {f"methods.0.{key}" for key in before} - kept - set(unused)
    assert not any("weighter" in key or "num_batches_tracked" in key for key in kept)
    assert method.state_dict().keys() == before  # the method itself stays whole


def test_the_teacher_that_does_not_predict_is_left_out():
    made = PredictionNetwork([example("mean_teacher", 2)])
    made.drop_unused()
    assert not any(".teacher." in key for key in made.state_dict())


def test_several_methods_are_averaged():
    methods = [example("supervised", 2, seed=seed) for seed in (0, 1)]
    made = PredictionNetwork(methods)
    x = made.example()
    with torch.inference_mode():
        torch.testing.assert_close(made(x), (methods[0].predict(x) + methods[1].predict(x)) / 2)


def test_reversed_axes_give_the_same_probabilities():
    method = example("supervised", 3)
    x = PredictionNetwork([method]).example(sides=(32, 16, 48))
    with torch.inference_mode():
        reversed_ = PredictionNetwork([method], reverse_axes=True)(x.permute(0, 1, 4, 3, 2))
        torch.testing.assert_close(reversed_.permute(0, 1, 4, 3, 2), method.predict(x))


# vnet in 3D: its two-slice convolution asks for the depth of its input, and must not fix it; the example has just that depth
FAST = [("supervised", 2, "urpc_unet"), ("dhc", 3, "vnet")]
SIZED = {"scdl"}  # its grid of tokens follows the size of the patch
SLOW = [
    (name, dims, network)
    for name in METHODS
    for dims in (2, 3)
    for network in ("unet", "vnet", "urpc_unet")
    if (name, dims, network) not in FAST and name not in SIZED
]


@pytest.mark.parametrize(
    ("name", "spatial_dims", "network"), [*FAST, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)]
)
def test_the_traced_program_takes_any_batch_and_any_size(name: str, spatial_dims: int, network: str):
    method = example(name, spatial_dims, network)
    made = PredictionNetwork([method])
    made.drop_unused()
    traced = trace(made, (64,) * spatial_dims)
    assert all(traced.free) and not traced.reason
    program = program_callable(traced.program)
    for batch, side in ((1, 32), (3, 48)):
        x = made.example(batch, (side, *(32,) * (spatial_dims - 1)))
        with torch.inference_mode():
            torch.testing.assert_close(program(x), method.predict(x), atol=1e-6, rtol=0)


def test_patches_of_the_least_size_are_fixed_and_said_to_be():
    method = example("supervised", 2, "vnet")
    traced = trace(PredictionNetwork([method]), (16, 16))
    assert traced.free == (False, False) and traced.other_size is None and "sides below 32" in traced.reason
    x = torch.rand(3, 1, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(program_callable(traced.program)(x), method.predict(x))


def test_a_thin_axis_is_fixed_and_the_other_free():
    made = PredictionNetwork([example("supervised", 2, "vnet")], reverse_axes=True)
    traced = trace(made, (16, 32))
    assert traced.free == (False, True) and traced.other_size == (16, 48)
    x = made.example(1, traced.other_size)
    with torch.inference_mode():
        torch.testing.assert_close(program_callable(traced.program)(x), made(x), atol=1e-6, rtol=0)


def test_a_network_that_depends_on_the_patch_size_keeps_it():
    method = example("scdl", 2, "vnet")
    made = PredictionNetwork([method])
    made.drop_unused()
    traced = trace(made, (64, 64))
    assert traced.free == (False, False) and traced.reason.startswith("Guard failed")
    x = made.example(3, (64, 64))
    with torch.inference_mode():
        torch.testing.assert_close(program_callable(traced.program)(x), method.predict(x), atol=1e-6, rtol=0)
