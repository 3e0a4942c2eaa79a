"""SCDL: on every host, with and without its options; the alignment itself is tested with its part."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tailseg.checks import LATER_STEP, check_method, example_batch, example_task, make_example
from tailseg.core import IGNORE, Batch, Method, Progress
from tailseg.methods.cps import CPS
from tailseg.methods.galoss import GALoss
from tailseg.methods.scdl import SCDL
from tailseg.options import OptionError
from tailseg.parts.prototypes import PriorHead

SMALL: dict[str, Any] = {"dim": 8, "samples": 5}
MAGICNET = {"name": "magicnet", "cubes": 2}
OWN = ("p2e", "e2p", "sac")
WARM = Progress(1000, 2000, 100)


def scdl(host: str | dict[str, Any] = "galoss", dims: int = 2, **options: Any) -> SCDL:
    made = make_example(SCDL, example_task(3, 1, dims), host=host, **{**SMALL, **options})
    assert isinstance(made, SCDL)
    return made


def losses(method: Method, batch: Batch, progress: Progress = WARM, seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(method.step(batch, progress).losses)


@pytest.mark.parametrize("host", ["cps", "dhc", MAGICNET])
def test_other_hosts_keep_the_contract(host: str | dict[str, Any]):
    check_method(SCDL, example_task(3, 1, 2), host=host, **SMALL)


@pytest.mark.parametrize(
    "options",
    [{"networks": "both", "r_dist": True}, {"p2e": "set", "z_sam": False, "tokens": 3, "token_size": 1}],
)
def test_options_keep_the_contract(options: dict[str, Any]):
    check_method(SCDL, example_task(3, 1, 2), **{**SMALL, **options})


def test_hosts_use_the_losses_of_galoss_unless_told_otherwise():
    assert scdl("cps").host.sup_loss.__name__ == scdl("dhc").host.sup_loss.__name__ == "ga_loss"
    assert scdl("dhc").host.cps_loss.__name__ == "ga_ce"
    assert scdl(MAGICNET).host.dice.__name__ == "ga_dice"
    plain = scdl({"name": "dhc", "sup": "ce_dice", "cps_weight": 0.5}).host
    assert plain.sup_loss.__name__ == "dice_ce" and plain.cps_loss.__name__ == "ga_ce" and plain.cps_weight == 0.5


def test_unknown_hosts_and_options_are_named():
    with pytest.raises(OptionError, match="Did you mean 'galoss'"):
        scdl("galos")
    with pytest.raises(OptionError, match="Did you mean 'cps_weight'"):
        scdl({"name": "dhc", "cps_wieght": 0.1})


def test_the_batch_must_suit_the_host():
    with pytest.raises(ValueError, match=r"data\.patch_size"):
        scdl(MAGICNET).check_batch(2, 2, (40, 40))
    scdl().check_batch(2, 0, (40, 40))


@pytest.mark.parametrize(
    ("make", "host"), [(GALoss, "galoss"), (CPS, {"name": "cps", "sup": "ce_dice", "unsup": "ce"})]
)
def test_without_priors_the_host_is_as_it_was(make: type[Method], host: str | dict[str, Any]):
    method, batch = scdl(host), example_batch(example_task(3, 1, 2))
    for head in method.heads:
        torch.nn.init.zeros_(head.project.weight)
    state = {
        name.replace("head.head.", "head."): value.clone()
        for name, value in method.host.state_dict().items()
        if "head.proxies." not in name and "head.project." not in name
    }
    plain = make_example(make, example_task(3, 1, 2))
    plain.load_state_dict(state)
    with_proxies = losses(method, batch)
    alone = losses(plain, batch)
    assert set(with_proxies) == {*alone, *OWN}
    for name, loss in alone.items():
        assert loss.item() == pytest.approx(with_proxies[name].item(), rel=1e-6)


def test_its_losses_warm_up():
    method, batch = scdl(), example_batch(example_task(3, 1, 2))
    state = copy.deepcopy(method.state_dict())
    found = {}
    for step in (0, 250, 1000, 3000):
        method.load_state_dict(state)
        found[step] = losses(method, batch, Progress(step, 4000, 100))
    for name in OWN:
        assert found[0][name] == 0 < found[1000][name] == found[3000][name]
        assert found[250][name].item() == pytest.approx(0.25 * found[1000][name].item())


def test_its_weights_are_options():
    batch = example_batch(example_task(3, 1, 2))
    one = losses(scdl(), batch)
    other = losses(scdl(scdl_weight=0.1, proxy_weight=0.3, sac_weight=0.1, e2p_weight=1.0), batch)
    factors = {"p2e": 0.03, "e2p": 0.3, "sac": 0.01}
    for name in OWN:
        assert other[name].item() == pytest.approx(factors[name] * one[name].item(), rel=1e-4)


def test_anchors_know_the_labels_and_what_nobody_annotated_counts_nowhere():
    batch = example_batch(example_task(3, 1, 2))
    method = scdl(sac_weight=1.0)
    first = method.step(batch, WARM)
    nothing = method.step(Batch(batch.x_l, torch.full_like(batch.y_l, IGNORE), batch.x_u), WARM)
    assert first.losses["sac"] > 0 and nothing.losses["sac"] == 0
    only_organ = torch.where(batch.y_l == 1, 1, IGNORE)
    cosines = method.step(Batch(batch.x_l, only_organ, batch.x_u), WARM).logs["anchor_cosine"]
    assert (cosines != 0).tolist() == [False, True, False]


def test_alignment_reaches_the_decoder_of_its_network_alone():
    method, batch = scdl(), example_batch(example_task(3, 1, 2))
    found = losses(method, batch)
    (found["p2e"] + found["e2p"]).backward()
    a, b = (net.decoders[0].blocks[0][0].weight.grad for net in (method.host.net_a, method.host.net_b))
    assert a is not None and a.abs().max() > 0 and b is None


def test_both_networks_can_have_proxies():
    one, both = scdl(), scdl(networks="both")
    heads = [isinstance(net.decoders[0].head, PriorHead) for net in (one.host.net_a, one.host.net_b)]
    assert heads == [True, False]
    assert len(both.heads) == 2 and both.heads[0].proxies is not both.heads[1].proxies


def test_the_teacher_copies_the_proxies_and_learns_nothing_from_them():
    method = scdl(MAGICNET)
    batch = example_batch(example_task(3, 1, 2), side=32)
    net, teacher = method.host.net, method.host.teacher.net
    assert method.heads == (net.decoders[0].head,)
    sum(losses(method, batch).values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert teacher.decoders[0].head.heard is None and net.decoders[0].head.heard is None
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert net.decoders[0].head.proxies.proxies.grad is not None
    with torch.no_grad():
        net.decoders[0].head.proxies.proxies.add_(1.0)
    method.after_step(Progress(0, 10, 1))
    ours, theirs = (part.decoders[0].head.proxies.proxies for part in (net, teacher))
    torch.testing.assert_close(ours, theirs)


def test_its_parameters_decay_by_themselves():
    method = scdl(weight_decay=0.01)
    groups = method.param_groups()
    assert [group.get("weight_decay") for group in groups] == [None, 0.01]
    own = {id(parameter) for head in method.heads for parameter in head.own_parameters()}
    assert {id(parameter) for parameter in groups[1]["params"]} == own
    everything = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in method.parameters() if parameter.requires_grad]
    assert sorted(everything) == sorted(trainable)


def test_the_network_still_says_what_it_is():
    net, plain = scdl().host.net_a, make_example(CPS, example_task(3, 1, 2)).net_a
    for name in ("size_divisor", "feature_channels", "embedding_channels"):
        assert getattr(net, name) == getattr(plain, name)
    output = net.eval()(torch.randn(1, 1, 16, 16))
    torch.testing.assert_close(net.head(output.embedding), output.logits)


def test_prediction_uses_the_priors_and_draws_nothing():
    method, x = scdl().eval(), torch.randn(1, 1, 16, 16)
    before = method.predict(x)
    assert torch.equal(before, method.predict(x))
    with torch.no_grad():
        method.heads[0].proxies.proxies.neg_()
    assert not torch.equal(before, method.predict(x))


def test_a_method_can_be_copied_after_a_step():
    method, batch = scdl(), example_batch(example_task(3, 1, 2))
    losses(method, batch, LATER_STEP)
    twin = copy.deepcopy(method)
    assert twin.heads[0] is twin.host.net_a.decoders[0].head
    first, second = losses(method, batch), losses(twin, batch)
    assert {name: loss.item() for name, loss in first.items()} == {name: loss.item() for name, loss in second.items()}
