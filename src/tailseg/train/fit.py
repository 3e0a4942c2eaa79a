"""The training loop. It knows batches, losses and checkpoints; it knows no method, no network and no data set."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from tailseg.core import Batch, Method, Progress, Unit
from tailseg.data.augment import Augment
from tailseg.data.stream import PatchBatchRequest, PatchStream
from tailseg.runtime import Runtime, RuntimeOptions, average_batch_norm
from tailseg.train.checkpoint import (
    CheckpointError,
    all_random_states,
    load_checkpoint,
    restore_random_state,
    save_checkpoint,
)
from tailseg.train.host_copy import HostCopy
from tailseg.train.watch import Watch


class TrainOptions(RuntimeOptions):
    """The `train` part of a recipe.

    epochs: passes over the unlabelled cases, over the labelled ones where there are none. steps_per_epoch: length of an epoch
    instead of such a pass. optimizer: sgd has Nesterov momentum. lr: learning rate at the start. momentum: of sgd.
    weight_decay: of every optimiser. schedule: of the learning rate; poly is lr (1 - t)^schedule_power. schedule_power: of
    poly. schedule_unit: whether the learning rate moves every epoch or every step (Progress.fraction). accumulate: batches
    per step. clip_norm: the longest that the gradient of a step may be, null for any. validate_every, checkpoint_every: epochs
    between two. log_every: steps between two lines of metrics.jsonl. alarm_after: steps without one prediction of a class
    before the alarm names it.
    """

    epochs: int = Field(default=300, ge=1)
    steps_per_epoch: int | None = Field(default=None, ge=1)
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(default=0.03, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=3e-5, ge=0)
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    schedule_power: float = 0.9
    schedule_unit: Unit = "epoch"
    accumulate: int = Field(default=1, ge=1)
    clip_norm: float | None = Field(default=None, gt=0)
    validate_every: int = Field(default=10, ge=1)
    checkpoint_every: int = Field(default=10, ge=1)
    log_every: int = Field(default=10, ge=1)
    alarm_after: int = Field(default=200, ge=1)


FUSED = ("cpu", "cuda")
"""Devices whose optimisers run in one kernel for all parameters. Apple's has kernels too, which nobody has tried here."""


class NonFiniteLoss(RuntimeError):
    """A loss became NaN or infinite; the text names the step, the losses, the cases and where the batch lies."""


class Validate(Protocol):
    def __call__(self, method: Method) -> Tensor:
        """(K - 1,) Dice per foreground class, mean over validation cases; NaN for a class none of them holds."""
        ...


@dataclass
class Best:
    """The best validation so far: strictly better replaces it. score: mean over classes."""

    score: float = -1.0
    step: int = -1


def make_optimizer(method: Method, options: TrainOptions) -> torch.optim.Optimizer:
    """In one kernel for all parameters where torch has a trusted one; the same arithmetic otherwise."""
    groups = []
    for group in method.param_groups():
        scale = group.pop("lr_scale", 1.0)
        groups.append({"weight_decay": options.weight_decay, **group, "lr": options.lr * scale, "lr_scale": scale})
    # null is torch's own choice: a kernel for many parameters at once on other GPUs
    fused = True if all(p.device.type in FUSED for group in groups for p in group["params"]) else None
    if options.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            groups, lr=options.lr, momentum=options.momentum, nesterov=options.momentum > 0, fused=fused
        )
        _start_momentum(optimizer)
        return optimizer
    make = torch.optim.Adam if options.optimizer == "adam" else torch.optim.AdamW
    return make(groups, lr=options.lr, fused=fused)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take over the state that an optimiser of the same parameters had, whichever kernels and device it used."""
    groups = [{**group, "fused": optimizer.defaults["fused"]} for group in state["param_groups"]]
    optimizer.load_state_dict({**state, "param_groups": groups})
    if isinstance(optimizer, torch.optim.SGD):
        _start_momentum(optimizer)


def _start_momentum(optimizer: torch.optim.SGD) -> None:
    """Zeros where there is no momentum yet, from which the first gradient becomes the first momentum just as without them.

    The fused kernel wants all parameters of a step to have theirs or none, while some methods train a part only later.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def learning_rate(options: TrainOptions, progress: Progress) -> float:
    t = progress.fraction(options.schedule_unit)
    if options.schedule == "poly":
        return options.lr * (1 - t) ** options.schedule_power
    return options.lr * (0.5 * (1 + math.cos(math.pi * t)) if options.schedule == "cosine" else 1.0)


class _Pending(NamedTuple):
    """A batch whose losses nobody has looked at yet."""

    step: int
    batch: Batch
    request: PatchBatchRequest
    names: tuple[str, ...]
    losses: HostCopy  # of one number a name


class Trainer:
    """One run: method, optimiser, stream, watch and where they are. fit() goes on from there to the end.

    folder receives last.pt (whole state), best.pt (the same at the best validation) and bad_batch.pt (on a broken loss).
    meta: what a checkpoint carries beside state: recipe, task, split digest, versions.
    """

    def __init__(
        self,
        method: Method,
        stream: PatchStream,
        options: TrainOptions,
        runtime: Runtime,
        watch: Watch,
        folder: Path,
        *,
        steps_per_epoch: int,
        seed: int,
        meta: Mapping[str, Any],
        augment: Augment | None = None,
        validate: Validate | None = None,
    ) -> None:
        self.method, self.stream, self.options, self.runtime = method, stream, options, runtime
        self.watch, self.folder, self.meta = watch, folder, meta
        self.augment = augment or Augment()
        self.validate = validate
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = options.epochs * steps_per_epoch
        self.step = 0
        self.best = Best()
        self.stopped = False
        self.pending: _Pending | None = None
        runtime.place(method)
        self.door = runtime.wrap(method)
        self.optimizer = make_optimizer(method, options)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=options.precision == "fp16")
        torch.manual_seed(seed + 7919 * runtime.rank)  # from here on each rank has noise of its own

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of this task, bit for bit; where auto means another precision on this device, that is said.

        Raises CheckpointError when it is no checkpoint of this task.
        """
        state = load_checkpoint(path, self.method.task)
        if state["split"] != self.meta["split"]:
            raise CheckpointError(
                f"{path} was trained on other cases: the split has changed since. Restore the split file, or start a run anew."
            )
        self.method.load_state_dict(state["method"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.stream.load_state_dict(state["stream"])
        self.watch.load_state_dict(state["watch"])
        self.step, self.best = state["step"], Best(**state["best"])
        restore_random_state(state["random"], self.runtime.rank, self.runtime.device)
        before = state.get("precision", self.runtime.precision)
        if before != self.runtime.precision:
            self.watch.say(
                f"The run began in {before}, which train.precision={self.options.precision} was there; on this device it is "
                f"{self.runtime.precision}, and the run goes on in that."
            )

    def fit(self) -> None:
        """Train to the last step. Raises NonFiniteLoss. SIGINT and SIGTERM end it after the step, with a checkpoint."""
        self.method.train()
        with _stop_on_signal(self):
            while self.step < self.total_steps and not self.stopped:
                self._train_step()
                done_epoch = self.step % self.steps_per_epoch == 0
                epoch, last = self.step // self.steps_per_epoch, self.step == self.total_steps
                if self.validate and (last or (done_epoch and epoch % self.options.validate_every == 0)):
                    self._validate(self.validate)
                if last or self.stopped or (done_epoch and epoch % self.options.checkpoint_every == 0):
                    self.save("last.pt")
        self._check_finite()

    def _train_step(self) -> None:
        progress = Progress(self.step, self.total_steps, self.steps_per_epoch)
        lr = learning_rate(self.options, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        output = None
        for turn in range(self.options.accumulate):
            drawn = next(self.stream)
            batch = drawn.batch.to(self.runtime.device, self.runtime.memory_format(self.method.task.spatial_dims))
            batch = self.augment(batch)
            with self._synchronised(turn), self.runtime.autocast():
                output = self.door(batch, progress)
                losses = torch.stack([*output.losses.values()])
                total = losses.sum() / self.options.accumulate
            told = HostCopy(losses)
            self.scaler.scale(total).backward()
            self._check_finite()
            self.pending = _Pending(self.step, batch, drawn.request, tuple(output.losses), told)
        assert output is not None
        if self.options.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.method.parameters(), self.options.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(progress)
        self.step += 1
        self.watch.step(progress, output, lr)

    def _synchronised(self, turn: int) -> contextlib.AbstractContextManager[None]:
        """DDP exchanges gradients only in the last of the accumulated turns."""
        if isinstance(self.door, nn.parallel.DistributedDataParallel) and turn < self.options.accumulate - 1:
            return self.door.no_sync()
        return contextlib.nullcontext()

    def _check_finite(self) -> None:
        """Look at the losses of the batch before: the device has long computed them and works on the next ones."""
        if self.pending is None:
            return
        step, batch, request, names, losses = self.pending
        self.pending = None
        values = zip(names, losses.read().tolist(), strict=True)
        broken = {name: value for name, value in values if not math.isfinite(value)}
        if not broken:
            return
        cases = sorted({patch.case for part in request for patch in part})
        path = self.folder / "bad_batch.pt"
        if self.runtime.is_main:
            extra = {} if batch.features is None else {"features": batch.features}
            save_checkpoint(path, {"x_l": batch.x_l, "y_l": batch.y_l, "x_u": batch.x_u, "cases": cases, **extra})
        told = ", ".join(f"'{name}' is {value}" for name, value in broken.items())
        raise NonFiniteLoss(
            f"Loss {told} at step {step}, on patches of {', '.join(cases)}. The batch is saved in {path}, the last good "
            "state is last.pt. Look at these scans, lower train.lr, set train.clip_norm=1, or use train.precision=fp32."
        )

    def _validate(self, validate: Validate) -> None:
        self._check_finite()
        average_batch_norm(self.method, self.runtime.ranks)
        self.method.eval()
        with torch.inference_mode():
            dice = validate(self.method)  # (K - 1,), equal on all ranks, so that they agree on what is best
        self.method.train()
        score = float(dice.nanmean())
        better = score > self.best.score
        if better:
            self.best = Best(score, self.step)
            self.save("best.pt")
        self.watch.validation(
            Progress(self.step, self.total_steps, self.steps_per_epoch), dice.tolist(), is_best=better
        )

    def save(self, name: str) -> None:
        """Every rank calls it; the first one writes."""
        self._check_finite()
        average_batch_norm(self.method, self.runtime.ranks)
        random = all_random_states(self.runtime.device)
        if self.runtime.is_main:
            state = {
                **self.meta,
                "method": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "precision": self.runtime.precision,
                "stream": self.stream.state_dict(),
                "watch": self.watch.state_dict(),
                "random": random,
                "step": self.step,
                "best": {"score": self.best.score, "step": self.best.step},
            }
            save_checkpoint(self.folder / name, state)


class _stop_on_signal:
    """Turns SIGINT and SIGTERM into a stop after the current step, for a run of one process in the main thread."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.before: dict[signal.Signals, Callable[..., Any] | int | None] = {}

    def __enter__(self) -> None:
        if self.trainer.runtime.ranks > 1:
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.before[number] = signal.signal(number, self._stop)
            except ValueError:  # not in the main thread: whoever runs us there handles signals
                return

    def _stop(self, number: int, frame: object) -> None:
        self.trainer.stopped = True

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
