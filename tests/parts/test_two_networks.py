from __future__ import annotations

import pytest
import torch
from methods.examples import METHODS, OPTIONS

from tailseg.checks import accepted_batch, example_task, make_example
from tailseg.components import find
from tailseg.parts.two_networks import mean_and_each

TWO_NETWORKS = {"adsh", "cld", "cps", "crest", "depl", "dhc", "dst", "galoss", "simis", "scdl"}


def test_the_mean_is_of_the_logits_and_each_is_its_own():
    a, b = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mean, (first, second) = mean_and_each(a, b)
    assert torch.equal(mean, torch.softmax((a + b) / 2, 1))
    assert torch.equal(first, torch.softmax(a, 1)) and torch.equal(second, torch.softmax(b, 1))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_predicts_the_same_when_it_also_tells_what_each_network_says(name: str):
    model = make_example(find("methods", name), example_task(spatial_dims=2), **OPTIONS.get(name, {})).eval()
    x = accepted_batch(model).x_l
    with torch.inference_mode():
        probs, each = model.predict_each(x)
        assert torch.equal(probs, model.predict(x))
    assert len(each) == (2 if name in TWO_NETWORKS else 1)
    assert all(one.shape == probs.shape and torch.allclose(one.sum(1), torch.ones(()), atol=1e-5) for one in each)
    assert len(each) == 1 or not torch.allclose(each[0], each[1])
