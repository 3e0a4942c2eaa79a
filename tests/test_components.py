"""Names to classes: built-in ones, those of a person's own module, and wrong ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny import make_tiny, tiny_recipe

from tailseg import app
from tailseg.checks import example_task
from tailseg.components import builtin_names, find, make_build, summary
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
    assert summary("methods", "dhc") == "DHC: dual-debiased heterogeneous co-training."


def test_a_method_of_ones_own_trains_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_lab.py").write_text(MY_METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    tree = tiny_recipe(make_tiny(tmp_path / "tiny"), epochs=1)
    tree["method"] = {"name": "my_lab:MyMethod", "scale": 2}
    run = app.train(load_recipe(tree), tmp_path / "run")
    assert load_checkpoint(run / "last.pt")["step"] == 4
    with pytest.raises(OptionError, match=r"MyMethod has no option 'scael'\. Did you mean 'scale'\?"):
        load_recipe({**tree, "method": {"name": "my_lab:MyMethod", "scael": 2}})
    sys.modules.pop("my_lab")


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
