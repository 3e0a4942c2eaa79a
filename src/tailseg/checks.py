"""check_method: the contract that every method keeps. Public, so that a method of one's own can be tested too."""

from __future__ import annotations

import copy
import inspect
from itertools import product
from typing import Any

import torch
from torch import Tensor

from tailseg.components import check_component, make_build
from tailseg.core import IGNORE, Batch, Method, Progress, StepOutput, Task

FIRST_STEP = Progress(step=0, total_steps=100, steps_per_epoch=10)
LATER_STEP = Progress(step=50, total_steps=100, steps_per_epoch=10)


def example_task(num_classes: int = 4, in_channels: int = 1, spatial_dims: int = 3) -> Task:
    """A task with unevenly frequent classes."""
    return Task(
        classes=("background", *(f"organ{i}" for i in range(1, num_classes))),
        in_channels=in_channels,
        spatial_dims=2 if spatial_dims == 2 else 3,
        spacing=(1.0,) * spatial_dims,
        class_voxels=tuple(10 ** max(5 - i, 1) for i in range(num_classes)),
    )


def example_batch(task: Task, labelled: int = 2, unlabelled: int = 2, side: int = 16, seed: int = 0) -> Batch:
    """Noise with blocks of every class as labels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (side,) * task.spatial_dims
    blocks = torch.randint(0, task.num_classes, (labelled, *(side // 4 for _ in shape)), generator=generator)
    y = blocks
    for axis in range(1, y.dim()):
        y = y.repeat_interleave(4, axis)

    def images(count: int, offset: Tensor | float) -> Tensor:
        return torch.randn(count, task.in_channels, *shape, generator=generator) * 0.5 + offset

    return Batch(images(labelled, y.unsqueeze(1).float()), y, images(unlabelled, 0.0))


def accepted_batch(model: Method) -> Batch:
    """The smallest example batch that the method's check_batch accepts."""
    reasons = []
    for side, labelled in product((16, 32, 48), (2, 4)):
        try:
            model.check_batch(labelled, 4, (side,) * model.task.spatial_dims)
        except ValueError as reason:
            reasons.append(str(reason))
        else:
            return example_batch(model.task, labelled, 4, side)
    raise AssertionError(f"{type(model).__name__}.check_batch accepts no example batch: {reasons[-1]}")


def make_example(
    method: type[Method], task: Task, network: str = "unet", width: int = 4, seed: int = 0, **options: Any
) -> Method:
    """The method on small networks without dropout; unknown options raise OptionError."""
    torch.manual_seed(seed)
    build = make_build(network, {"width": width, "dropout": 0.0}, task)
    name = f"{method.__module__}:{method.__qualname__}"
    make: Any = method  # subclasses add (build, *, options) to what Method itself takes
    return make(task, build, **check_component("methods", name, options))


def check_method(method: type[Method], task: Task | None = None, **options: Any) -> None:
    """Raises AssertionError that names what the method breaks of the contract of tailseg.core.Method."""
    task = task or example_task()
    _check_class(method)
    model = make_example(method, task, **options)
    batch = accepted_batch(model)
    model.train()
    before = copy.deepcopy(batch)
    _check_losses(method, model(batch, LATER_STEP), task)
    _check_batch_untouched(method, before, batch)
    _check_gradients(method, make_example(method, task, **options), batch)
    _check_state(method, task, batch, options)
    _check_hard_batches(method, task, batch, options)
    _check_predict(method, model, batch)


def _check_class(method: type[Method]) -> None:
    assert method.__bases__ == (Method,), f"{method.__name__} must subclass Method alone, not {method.__bases__}"
    parameters = list(inspect.signature(method.__init__).parameters.values())
    assert [p.name for p in parameters[1:3]] == ["task", "build"], (
        f"{method.__name__} must take (task, build, *, options)"
    )
    for parameter in parameters[3:]:
        assert parameter.kind is parameter.KEYWORD_ONLY, f"option '{parameter.name}' must be keyword-only"
        assert parameter.default is not parameter.empty, f"option '{parameter.name}' needs a default"


def _check_losses(method: type[Method], output: StepOutput, task: Task) -> None:
    assert output.losses, f"{method.__name__}.step returned no losses"
    for name, loss in output.losses.items():
        assert loss.shape == (), f"loss '{name}' must be a scalar, has shape {tuple(loss.shape)}"
        assert loss.dtype == torch.float32, f"loss '{name}' must be computed in float32, is {loss.dtype}"
        assert torch.isfinite(loss), f"loss '{name}' is {loss.item()}"
    assert any(loss.requires_grad for loss in output.losses.values()), "no loss depends on a trainable parameter"
    assert output.predicted.shape == (task.num_classes,), "predicted must count voxels per class, (K,)"
    assert output.predicted.sum() > 0, "predicted counts no voxel"
    for name, value in output.logs.items():
        assert not value.requires_grad, f"log '{name}' must be detached"
        assert value.shape in ((), (task.num_classes,)), f"log '{name}' must be a scalar or (K,)"


def _check_batch_untouched(method: type[Method], before: Batch, after: Batch) -> None:
    for name in ("x_l", "y_l", "x_u"):
        same = torch.equal(getattr(before, name), getattr(after, name))
        assert same, f"{method.__name__}.step changed batch.{name} in place"


def _check_gradients(method: type[Method], model: Method, batch: Batch) -> None:
    model.train()
    torch.stack([*model(batch, LATER_STEP).losses.values()]).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, (
                f"{method.__name__}: {name} is trainable but got no gradient; DDP would stall"
            )
            assert torch.isfinite(parameter.grad).all(), f"{method.__name__}: the gradient of {name} is not finite"
        else:
            assert parameter.grad is None, f"{method.__name__}: {name} is frozen but got a gradient"


def _train(model: Method, batch: Batch, steps: int, seed: int) -> list[float]:
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.SGD(model.param_groups(), lr=0.01)
    totals = []
    for step in range(steps):
        progress = Progress(step + 50, 100, 10)
        total = torch.stack([*model(batch, progress).losses.values()]).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        model.after_step(progress)
        totals.append(total.item())
    return totals


def _check_state(method: type[Method], task: Task, batch: Batch, options: dict[str, Any]) -> None:
    """What state_dict() holds is all the method remembers: a copy made from it goes on identically."""
    model = make_example(method, task, **options)
    _train(model, batch, steps=3, seed=1)
    twin = make_example(method, task, seed=99, **options)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    first, second = _train(model, batch, 2, seed=2), _train(twin, batch, 2, seed=2)
    assert first == second, f"{method.__name__} remembers something outside state_dict(): {first} became {second}"
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), f"{method.__name__}: {name} differs after a resume"


def _check_hard_batches(method: type[Method], task: Task, batch: Batch, options: dict[str, Any]) -> None:
    background = torch.zeros_like(batch.y_l)
    partial = batch.y_l.clone()
    partial[:, : partial.shape[1] // 2] = IGNORE
    hard = {
        "all background": Batch(batch.x_l, background, batch.x_u),
        "nothing annotated": Batch(batch.x_l, torch.full_like(background, IGNORE), batch.x_u),
        "half annotated": Batch(batch.x_l, partial, batch.x_u),
        "one class absent": Batch(batch.x_l, batch.y_l.clamp(max=task.num_classes - 2), batch.x_u),
        "no unlabelled": Batch(batch.x_l, batch.y_l, batch.x_u[:0]),
    }
    for what, case in hard.items():
        model = make_example(method, task, **options)
        if not _accepts(model, case):
            continue
        totals = _train(model, case, steps=2, seed=0)
        assert all(torch.isfinite(torch.tensor(totals))), f"{method.__name__} on a batch with {what}: losses {totals}"
        for name, parameter in model.named_parameters():
            assert torch.isfinite(parameter).all(), f"{method.__name__} on a batch with {what}: {name} is not finite"


def _accepts(model: Method, batch: Batch) -> bool:
    try:
        model.check_batch(len(batch.x_l), len(batch.x_u), tuple(batch.x_l.shape[2:]))
    except ValueError as error:
        reason = str(error)
    else:
        return True
    assert "data.batch" in reason, f"check_batch must name data.batch in its error: {reason}"
    return False


def _check_predict(method: type[Method], model: Method, batch: Batch) -> None:
    model.eval()
    before = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        probs = model.predict(batch.x_l)
    expected = (len(batch.x_l), model.task.num_classes, *batch.x_l.shape[2:])
    assert tuple(probs.shape) == expected, f"{method.__name__}.predict must return (B, K, *S), not {tuple(probs.shape)}"
    assert probs.min() >= 0, f"{method.__name__}.predict returns negative probabilities"
    ones = torch.ones_like(probs[:, 0])
    assert torch.allclose(probs.sum(1), ones, atol=1e-4), f"{method.__name__}.predict must sum to 1 over classes"
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{method.__name__}.predict changed {name}"
