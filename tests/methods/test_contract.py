"""check_method over every file in methods/, in 2D and 3D, for few and many classes, one and three channels."""

from __future__ import annotations

from typing import final

import pytest
import torch
from methods.examples import METHODS, OPTIONS
from torch import Tensor

from tailseg.checks import LATER_STEP, accepted_batch, check_method, example_task, make_example
from tailseg.components import find
from tailseg.core import Batch, BuildNetwork, Method, Progress, StepOutput, Task


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("num_classes", "in_channels", "spatial_dims"),
    [
        (2, 1, 2),
        (4, 3, 3),
        (14, 1, 2),
        *(pytest.param(*task, marks=pytest.mark.slow) for task in [(2, 1, 3), (4, 3, 2), (14, 1, 3)]),
    ],
)
def test_method_keeps_the_contract(name: str, num_classes: int, in_channels: int, spatial_dims: int):
    task = example_task(num_classes, in_channels, spatial_dims)
    check_method(find("methods", name), task, **OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", METHODS)
def test_losses_decrease_on_a_fixed_batch(name: str):
    task = example_task(3)
    model = make_example(find("methods", name), task, **OPTIONS.get(name, {}))
    batch = accepted_batch(model)
    optimizer = torch.optim.Adam(model.param_groups(), lr=0.01)
    totals = []
    for _ in range(20):
        total = torch.stack([*model(batch, LATER_STEP).losses.values()]).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < totals[0] - 0.1


@pytest.mark.parametrize("name", [name for name in METHODS if name != "supervised"])
def test_unlabelled_images_change_the_losses(name: str):
    task = example_task()
    model = make_example(find("methods", name), task, **OPTIONS.get(name, {}))
    batch = accepted_batch(model)
    other = Batch(batch.x_l, batch.y_l, batch.x_u + 1.0)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(0)
    first = torch.stack([*model(batch, LATER_STEP).losses.values()]).sum()
    model.load_state_dict(state)
    torch.manual_seed(0)
    assert first != torch.stack([*model(other, LATER_STEP).losses.values()]).sum()


@final
class Forgetful(Method):
    """Counts its steps in a plain attribute, which a resume forgets."""

    def __init__(self, task: Task, build: BuildNetwork) -> None:
        super().__init__(task)
        self.net = build()
        self.steps = 0

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        self.steps += 1
        logits = self.net(batch.x_l).logits
        return StepOutput({"sup": logits.square().mean() * self.steps}, torch.ones(self.task.num_classes))

    def predict(self, x: Tensor) -> Tensor:
        return torch.softmax(self.net(x).logits, 1)


@final
class Idle(Method):
    """Has a parameter that no loss touches."""

    def __init__(self, task: Task, build: BuildNetwork) -> None:
        super().__init__(task)
        self.net, self.unused = build(), torch.nn.Linear(2, 2)

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        logits = self.net(batch.x_l).logits
        return StepOutput({"sup": logits.square().mean()}, torch.ones(self.task.num_classes))

    def predict(self, x: Tensor) -> Tensor:
        return torch.softmax(self.net(x).logits, 1)


def test_the_contract_catches_state_outside_the_state_dict(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tailseg.components._by_path", lambda kind, name: Forgetful)
    with pytest.raises(AssertionError, match=r"remembers something outside state_dict"):
        check_method(Forgetful)


def test_the_contract_names_a_parameter_without_gradient(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tailseg.components._by_path", lambda kind, name: Idle)
    with pytest.raises(AssertionError, match=r"unused.weight is trainable but got no gradient"):
        check_method(Idle)
