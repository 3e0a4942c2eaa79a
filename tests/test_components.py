"""Names to classes: built-in ones, those of a person's own module, and wrong ones."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from tiny import make_tiny, tiny_recipe

from tailseg import app
from tailseg.checks import example_task
from tailseg.components import (
    FAMILIES,
    Kind,
    builtin_names,
    check_component,
    component_options,
    find,
    make_build,
    method_card,
    method_cards,
    parse_card,
    summary,
)
from tailseg.methods.dhc import DHC
from tailseg.options import OptionError
from tailseg.recipe import load_recipe
from tailseg.train.checkpoint import load_checkpoint

MY_METHOD = '''
"""My idea."""
import torch
from tailseg.core import Method, StepOutput
from tailseg.parts.counts import count_classes
from tailseg.parts.losses import cross_entropy, log_softmax

class MyMethod(Method):
    def __init__(self, task, build, *, scale: float = 1.0):
        super().__init__(task)
        self.net, self.scale = build(), scale

    def step(self, batch, progress):
        logits = self.net(batch.x_l).logits
        loss = self.scale * cross_entropy(log_softmax(logits), batch.y_l)
        return StepOutput({"sup": loss}, count_classes(logits.argmax(1), self.task.num_classes))

    def predict(self, x):
        return torch.softmax(self.net(x).logits.float(), 1)
'''


def test_a_file_in_methods_is_a_method():
    assert {"cps", "dhc", "supervised"} <= set(builtin_names("methods"))
    assert find("methods", "dhc") is DHC
    assert summary("methods", "dhc").startswith("DHC: ")


CARD = """\
MT: a network agrees with its running average.

Paper: A. One, B. Two, "Mean, 1998: a title",
    NeurIPS 2017, https://example.org/a.pdf; its port, MICCAI 2019
Family: mean teacher
Needs: an EMA teacher
    (no gradients)
Cost: x1.7
Idea: One sentence.
Another one.
Algorithm:
    for x:
        p = f(x)

    q = g(x)    Paper: not a field
Constants: train.py
Deviations: two of them:
    - the first, in
      two lines
    - the second
"""


def test_a_card_is_read_from_a_docstring():
    card = parse_card("mt", CARD)
    assert asdict(card) == {
        "name": "mt",
        "title": "MT: a network agrees with its running average.",
        "paper": 'A. One, B. Two, "Mean, 1998: a title", NeurIPS 2017, https://example.org/a.pdf; its port, MICCAI 2019',
        "venue": "NeurIPS 2017",
        "family": "mean teacher",
        "needs": "an EMA teacher (no gradients)",
        "cost": "x1.7",
        "idea": "One sentence. Another one.",
        "algorithm": "for x:\n    p = f(x)\n\nq = g(x)    Paper: not a field",
        "constants": "train.py",
        "deviations": "two of them:\n- the first, in two lines\n- the second",
    }
    assert card.year == 2017 and card.link == "https://example.org/a.pdf"


def test_a_card_without_fields_is_empty():
    card = parse_card("mine", "")
    assert set(asdict(card).values()) == {"mine", ""} and card.year == 0 and not card.link
    assert parse_card("mine", "T.\n\nPaper: A. One, CVPR 2021, https://example.org").venue == "CVPR 2021"


@pytest.mark.parametrize("name", builtin_names("methods"))
def test_the_card_of_every_method_is_complete(name: str):
    card = method_card(name)
    missing = [field for field, text in asdict(card).items() if not text]
    assert not missing, f"methods/{name}.py says nothing of {', '.join(missing)}"
    assert re.match(r"[A-Z][^:]*: \S.*\.$", card.title), "the first line is '<Short name>: <what it does>.'"
    assert card.family in FAMILIES
    assert re.fullmatch(r"x\d+(\.\d+)?", card.cost), f"cost is 'x' and a number, not '{card.cost}'"
    assert card.year >= 2014 and card.link
    assert len(card.algorithm.splitlines()) >= 3


def test_cards_are_sorted_by_family_and_year():
    cards = method_cards()
    assert [card.name for card in sorted(cards, key=lambda card: card.name)] == builtin_names("methods")
    families = [card.family for card in cards if card.family in FAMILIES]
    assert families == sorted(families, key=FAMILIES.index)


@pytest.mark.parametrize("kind", ["methods", "networks"])
def test_options_read_from_the_source_are_those_of_the_class(kind: Kind):
    for name in builtin_names(kind):
        checked = check_component(kind, name, {})
        read = {option.name: option for option in component_options(kind, name)}
        assert set(read) == set(checked), name
        for option, value in checked.items():
            words = {"True": "true", "False": "false", "None": "null", "": '""'}.get(str(value), str(value))
            default = read[option].default
            assert default is not None
            assert default == words or " " in default, f"{name}.{option}"  # 2 / 3 stays as it is written


def test_options_tell_choices_and_meaning():
    norm, dropout = component_options("networks", "vnet")[1:3]
    assert (norm.name, norm.type, norm.default) == ("norm", "batch | instance", "batch")
    assert dropout.type == "float" and dropout.meaning.startswith("probability of dropping a channel")
    ramp = next(option for option in component_options("methods", "dhc") if option.name == "ramp")
    assert set(ramp.type.split(" | ")) == {"epoch", "step"} and ramp.default == "epoch"


def test_cards_and_options_are_read_without_torch():
    code = "import sys; from tailseg.components import *; method_cards(); component_options('methods', 'dhc')"
    check = f"{code}\nassert not {{'torch', 'numpy'}} & set(sys.modules), 'too much is imported'"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_a_method_of_ones_own_trains_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "method_by_its_path.py").write_text(MY_METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    tree = tiny_recipe(make_tiny(tmp_path / "tiny"), epochs=1)
    tree["method"] = {"name": "method_by_its_path:MyMethod", "scale": 2}
    run = app.train(load_recipe(tree), tmp_path / "run")
    assert load_checkpoint(run / "last.pt")["step"] == 4
    with pytest.raises(OptionError, match=r"MyMethod has no option 'scael'\. Did you mean 'scale'\?"):
        load_recipe({**tree, "method": {"name": "method_by_its_path:MyMethod", "scael": 2}})
    sys.modules.pop("method_by_its_path")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no.such.module:X", r"cannot be imported"),
        ("tailseg.core:Nothing", r"cannot be imported"),
        ("tailseg.core:Task", r"is no subclass of tailseg\.core\.Method"),
    ],
)
def test_a_path_that_is_no_method_is_refused(name: str, message: str):
    with pytest.raises(OptionError, match=message):
        find("methods", name)


def test_networks_are_built_afresh_for_the_task():
    build = make_build("vnet", {"width": 4}, example_task(3, in_channels=2))
    first, second = build(), build(num_decoders=2, num_classes=5)
    assert first is not second and len(second.decoders) == 2
