"""The loop: schedules, accumulation, what happens when a loss breaks or somebody stops it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tiny, tiny_recipe
from torch import Tensor, nn

from tailseg import app, runtime
from tailseg.core import Batch, Method, Progress, StepOutput, Task
from tailseg.data.splits import Split
from tailseg.options import OptionError
from tailseg.recipe import Recipe, load_recipe
from tailseg.train.checkpoint import load_checkpoint
from tailseg.train.fit import NonFiniteLoss, Trainer, TrainOptions, learning_rate, load_optimizer, make_optimizer
from tailseg.train.metrics_log import read_metrics


def recipe_of(tmp_path: Path, method: str = "dhc", **train: Any) -> Recipe:
    return load_recipe(tiny_recipe(make_tiny(tmp_path / "tiny"), method, **train))


def test_poly_schedule_is_dhcs():
    options = TrainOptions(lr=0.03, epochs=300)

    def lr(epoch: int) -> float:
        return learning_rate(options, Progress(8 * epoch, 2400, 8))

    assert lr(0) == lr(1) == 0.03  # the rate is set after an epoch, so the second one still uses the first
    assert [lr(2), lr(151), lr(300)] == pytest.approx([0.029909985, 0.016076602, 0.000176894], abs=1e-9)


def test_cosine_and_constant_schedules_by_step():
    half = Progress(50, 100, 10)
    assert learning_rate(TrainOptions(lr=1, schedule="cosine", schedule_unit="step"), half) == pytest.approx(0.5)
    assert learning_rate(TrainOptions(lr=1, schedule="constant"), half) == 1
    assert learning_rate(TrainOptions(lr=1, schedule_unit="step"), half) == pytest.approx(0.5**0.9)


class Layers(Method):
    """Kernels of every kind that networks have, some of them trained late, and two groups."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        # a bias before the normalisation has a gradient of mere rounding, of which Adam would make steps
        self.body = nn.Sequential(
            nn.Conv3d(1, 4, 3, padding=1, bias=False),
            nn.InstanceNorm3d(4, affine=True),
            nn.ReLU(),
            nn.Conv3d(4, 8, 2, stride=2),
        )
        self.head = nn.Conv3d(8, 3, 1)
        self.late = nn.Conv3d(8, 3, 1, bias=False)

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        features = self.body(batch.x_l)
        logits = self.head(features) + (self.late(features) if progress.step >= 2 else 0)
        return StepOutput({"sup": logits.square().mean() + logits.mean()}, torch.ones(3))

    def predict(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).softmax(1)

    def param_groups(self) -> list[dict[str, Any]]:
        heads = [*self.head.parameters(), *self.late.parameters()]
        return [{"params": [*self.body.parameters()]}, {"params": heads, "lr_scale": 10.0, "weight_decay": 0.0}]


OPTIMIZERS = pytest.mark.parametrize(
    "options",
    [
        TrainOptions(optimizer="sgd", lr=0.01, weight_decay=0.01),
        TrainOptions(optimizer="sgd", lr=0.01, momentum=0.0),
        TrainOptions(optimizer="adam", lr=0.001, weight_decay=0.01),
        TrainOptions(optimizer="adamw", lr=0.001, weight_decay=0.01),
    ],
    ids=lambda options: f"{options.optimizer}-{options.momentum}",
)


def layers() -> Layers:
    torch.manual_seed(0)
    method = Layers(Task(("background", "a", "b"), 1, 3, (1.0, 1.0, 1.0), (8, 1, 1)))
    return method.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]


def plain_optimizer(method: Method, options: TrainOptions) -> torch.optim.Optimizer:
    """One parameter after the other, as torch has always done it."""
    groups = [{"weight_decay": options.weight_decay, **group} for group in method.param_groups()]
    groups = [{**group, "lr": options.lr * group.get("lr_scale", 1)} for group in groups]
    if options.optimizer == "sgd":
        nesterov = options.momentum > 0
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=nesterov, foreach=False)
    make = torch.optim.Adam if options.optimizer == "adam" else torch.optim.AdamW
    return make(groups, lr=options.lr, foreach=False)


def take_steps(method: Method, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        x = torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(step))
        batch = Batch(x.contiguous(memory_format=torch.channels_last_3d), torch.zeros(2, 8, 8, 8).long(), x)
        sum(method(batch, Progress(step, 10, 10)).losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def assert_same_weights(first: Method, second: Method) -> None:
    for (name, ours), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@OPTIMIZERS
def test_the_fused_optimiser_steps_like_the_plain_one(options: TrainOptions):
    """Over kernels in channels_last, one of a voxel and one of a channel among them, and one trained from a later step on."""
    fused, plain = layers(), layers()
    optimizer = make_optimizer(fused, options)
    assert all(group["fused"] for group in optimizer.param_groups)
    take_steps(fused, optimizer, 0, 6)
    take_steps(plain, plain_optimizer(plain, options), 0, 6)
    assert_same_weights(fused, plain)
    assert not torch.equal(plain.late.weight, layers().late.weight)


def test_gradients_lie_in_memory_as_their_parameters_do():
    """Fused kernels walk both side by side; along an axis of one voxel a stride means nothing."""
    method = layers()
    for parameter in method.parameters():
        parameter.grad = None
    x = torch.rand(2, 1, 8, 8, 8)
    batch = Batch(x, torch.zeros(2, 8, 8, 8).long(), x)
    sum(method(batch, Progress(5, 10, 10)).losses.values()).backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None
        strides = [
            (mine, its)
            for side, mine, its in zip(parameter.shape, parameter.stride(), parameter.grad.stride(), strict=True)
            if side > 1
        ]
        assert all(mine == its for mine, its in strides), name


@OPTIMIZERS
@pytest.mark.parametrize("broken_off", [1, 4])
def test_a_checkpoint_of_a_plain_optimiser_goes_on_in_the_fused_one(options: TrainOptions, broken_off: int):
    unbroken, before = layers(), layers()
    take_steps(unbroken, plain_optimizer(unbroken, options), 0, 6)
    plain = plain_optimizer(before, options)
    take_steps(before, plain, 0, broken_off)
    resumed = layers()
    resumed.load_state_dict(before.state_dict())
    optimizer = make_optimizer(resumed, options)
    load_optimizer(optimizer, plain.state_dict())
    assert all(group["fused"] for group in optimizer.param_groups)
    take_steps(resumed, optimizer, broken_off, 6)
    assert_same_weights(resumed, unbroken)


def test_where_nobody_tried_fused_kernels_torch_chooses():
    method = layers().to("meta")
    optimizer = make_optimizer(method, TrainOptions())
    assert not any(group["fused"] for group in optimizer.param_groups)
    load_optimizer(optimizer, make_optimizer(layers(), TrainOptions()).state_dict())
    assert not any(group["fused"] for group in optimizer.param_groups)  # nor do they come with a checkpoint


def test_a_broken_loss_stops_the_run_and_names_the_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train_step = Trainer._train_step

    def poisoned(self: Trainer) -> None:
        if self.step == 6:
            for parameter in self.method.parameters():
                parameter.data.fill_(torch.nan)
        train_step(self)

    monkeypatch.setattr(Trainer, "_train_step", poisoned)
    with pytest.raises(NonFiniteLoss, match=r"Loss 'sup' is nan.* at step 6, on patches of (a, )?(b, )?u0, u1\."):
        app.train(recipe_of(tmp_path), tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "bad_batch.pt", weights_only=True)
    assert saved["x_l"].shape == (2, 1, 16, 16, 16) and set(saved["cases"]) <= {"a", "b", "u0", "u1"}
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    assert last["step"] == 4 and all(torch.isfinite(value).all() for value in last["method"].values())


def test_a_stopped_run_leaves_a_checkpoint_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train_step = Trainer._train_step

    def interrupted(self: Trainer) -> None:
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        train_step(self)

    recipe = recipe_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupted)
        app.train(recipe, tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 6
    app.train(recipe, tmp_path / "run", resume=True)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 12


def test_accumulated_batches_make_one_step(tmp_path: Path):
    run = app.train(recipe_of(tmp_path, "supervised", accumulate=3, clip_norm=0.5, epochs=1), tmp_path / "run")
    state = load_checkpoint(run / "last.pt")
    assert state["step"] == 4
    assert state["optimizer"]["param_groups"][0]["lr"] == 0.03


@pytest.mark.filterwarnings("ignore:This device only emulates bf16")
@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"precision": "fp16", "clip_norm": 1.0},
        {"optimizer": "adamw", "lr": 0.001},
    ],
)
def test_other_precisions_and_optimisers_train(tmp_path: Path, options: dict[str, Any]):
    run = app.train(recipe_of(tmp_path, epochs=1, log_every=1, **options), tmp_path / "run")
    losses = [line["losses"]["sup"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]
    assert len(losses) == 4 and all(loss is not None for loss in losses)


def test_zero_unlabelled_cases_and_no_validation_train(tmp_path: Path):
    tree = tiny_recipe(make_tiny(tmp_path / "tiny", unlabelled=0), "dhc", epochs=1)
    run = app.train(load_recipe(tree), tmp_path / "run")
    assert load_checkpoint(run / "last.pt")["step"] == 4


def test_training_never_reads_a_test_scan(tmp_path: Path):
    recipe = recipe_of(tmp_path, "supervised", epochs=1)
    for folder, name in (("imagesTr", "t_0000.nii.gz"), ("labelsTr", "t.nii.gz")):
        (tmp_path / "tiny" / folder / name).write_bytes(b"whoever opens this fails")
    app.train(recipe, tmp_path / "run")


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = recipe_of(tmp_path, "supervised", epochs=1)
    run = app.train(recipe, tmp_path / "run")
    before = (run / "last.pt").read_bytes()
    write_bytes = Path.write_bytes

    def full(path: Path, data: Any) -> int:
        if path.name.endswith("last.pt"):
            write_bytes(path, bytes(data[:100]))
            raise OSError(28, "No space left on device")
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match=r"last\.pt could not be written: the disk is full"):
        app.train(load_recipe(run / "recipe.yaml", ["train.epochs=2"]), run, resume=True)
    assert (run / "last.pt").read_bytes() == before
    assert not list(run.glob(".*tmp*"))


@pytest.mark.parametrize(
    ("batch", "unlabelled", "steps"), [((2, 2), 16, 8), ((4, 0), 16, 8), ((12, 12), 134, 12), ((2, 2), 0, 1)]
)
def test_labelled_only_runs_take_as_many_steps(batch: tuple[int, int], unlabelled: int, steps: int, tmp_path: Path):
    tree = tiny_recipe(tmp_path, steps_per_epoch=None)
    tree["data"]["batch"] = list(batch)
    split = Split("s", ("a", "b"), tuple(f"u{index}" for index in range(unlabelled)))
    assert app.steps_per_epoch(load_recipe(tree), split) == steps


def test_going_on_in_another_precision_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Auto is what the device computes in, and train.device may change on a resume."""
    recipe = recipe_of(tmp_path, "supervised", epochs=1, precision="auto")
    monkeypatch.setattr(runtime, "computes_in_bf16", lambda device: False)
    run = app.train(recipe, tmp_path / "run")
    assert load_checkpoint(run / "last.pt")["precision"] == "fp32"
    app.train(load_recipe(run / "recipe.yaml", ["train.epochs=2"]), run, resume=True)
    assert "began in" not in capsys.readouterr().out
    monkeypatch.setattr(runtime, "computes_in_bf16", lambda device: True)
    app.train(load_recipe(run / "recipe.yaml", ["train.epochs=3"]), run, resume=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "The run began in fp32, which train.precision=auto was there; on this device it is bf16" in said


def test_another_precision_of_the_recipe_is_refused_on_resume(tmp_path: Path):
    run = app.train(recipe_of(tmp_path, "supervised", epochs=1), tmp_path / "run")
    with pytest.raises(OptionError, match=r"trained with another train\.precision"):
        app.train(load_recipe(run / "recipe.yaml", ["train.precision=auto"]), run, resume=True)
