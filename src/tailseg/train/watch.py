"""What a person sees of a run: the terminal, metrics.jsonl, TensorBoard, and an alarm when a class is never predicted.

The kinds of lines in metrics.jsonl:
train       losses and logs, means over the steps since the line before; seconds_per_step without validation; predicted:
            share of each class among the voxels that this process predicted in them, by the method's own account
validation  Dice per foreground class (null: no validation case holds it), their mean, whether it is the best so far, and the
            seconds it took (null: right after a resume)
alarm       a class that no prediction of this process held for absent_steps; alarm_cleared when one does again
Everywhere step counts the optimiser steps done and epoch the one they fell in, from 1.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from tailseg.core import Progress, StepOutput, Task
from tailseg.train.host_copy import HostCopy
from tailseg.train.metrics_log import MetricsLog
from tailseg.train.terminal import Terminal

Values = dict[str, float | list[float]]


class Watch:
    """Collects on the device, asks for the numbers every log_every steps, and writes them once they are there: with the step
    after on a GPU, so that no step waits for it. A validation, a checkpoint and the last step write what is due.

    folder: of the run; receives metrics.jsonl and tensorboard/. log_every, alarm_after: steps.
    plain_every: seconds between lines when the console is no terminal.
    enabled: false on every process but the first; it then does and keeps nothing.
    Files open at the first call, so that load_state_dict can say before from which step on they are written again.
    """

    def __init__(
        self,
        folder: Path,
        task: Task,
        *,
        log_every: int = 10,
        alarm_after: int = 200,
        plain_every: float = 30.0,
        enabled: bool = True,
        console: Console | None = None,
    ) -> None:
        self.folder, self.task, self.enabled = folder, task, enabled
        self.log_every, self.alarm_after = log_every, alarm_after
        self._terminal = Terminal(console or Console(), plain_every)
        self._files: tuple[MetricsLog, SummaryWriter] | None = None
        self._step = 0
        self._last_seen = torch.zeros(task.num_classes, dtype=torch.int64)  # (K,) on the device of the predictions
        self._alarmed_at: dict[int, int] = {}
        self._sums, self._pace = _Sums(), _Pace()
        self._due: _Due | None = None
        self._best: float | None = None
        self._losses_text = self._dice_text = ""

    def step(self, progress: Progress, output: StepOutput, lr: float) -> None:
        """One optimiser step is done. progress: as the method saw it. Raises ValueError for a log of another shape."""
        if not self.enabled:
            return
        self._open()
        self._step = progress.step + 1
        self._sums.add("losses", output.losses)
        self._sums.add("logs", self._checked(output.logs))
        predicted = output.predicted.detach()  # (K,)
        self._sums.add("predicted", {"voxels": predicted})
        self._last_seen = torch.where(predicted > 0, self._step, self._last_seen.to(predicted.device))
        self._pace.lap()
        self._write_due()  # of a step before, which the device has done by now
        if self._step % self.log_every == 0 or self._step == progress.total_steps:
            self._due = _Due(progress, lr, self._pace.take(), self._sums.take(), HostCopy(self._last_seen))
            if self._due.here or self._step == progress.total_steps:
                self._write_due()
        self._terminal.progress(progress, f"{self._losses_text}{self._dice_text}")

    def _write_due(self) -> None:
        """Write the line that waits, if one does."""
        if self._due is not None:
            due, self._due = self._due, None
            self._log(due)

    def validation(self, progress: Progress, dice: Sequence[float], *, is_best: bool) -> None:
        """progress: step counts the steps done. dice: (K - 1,) per foreground class, NaN where no case holds it."""
        if not self.enabled:
            return
        self._write_due()
        scores = dict(zip(self.task.classes[1:], dice, strict=True))
        held = [value for value in dice if not math.isnan(value)]
        mean = sum(held) / len(held) if held else math.nan
        epoch = _epoch(progress.step, progress)
        took = self._pace.since_lap()
        values = {"epoch": epoch, "dice": scores, "mean": mean, "best": is_best, "seconds": took}
        self._write("validation", progress.step, values)
        self._tensorboard({"dice": {**scores, "mean": mean}}, progress.step)
        self._best = mean if is_best else self._best
        best = "" if self._best is None else f" (best {self._best:.3f})"
        self._dice_text = f"  Dice {mean:.3f}{best}"
        self._terminal.validation(f"epoch {epoch}/{progress.total_epochs}{self._dice_text}", self.task, scores)
        self._pace.pause()

    def say(self, text: str) -> None:
        """A warning that is about the whole run."""
        if self.enabled:
            self._terminal.say(text, style="yellow")

    def close(self) -> None:
        self._write_due()
        self._terminal.close()
        for file in self._files or ():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """What the alarm remembers; what is summed for the next line is not kept."""
        self._write_due()
        alarmed_at = [self._alarmed_at.get(index, -1) for index in range(self.task.num_classes)]
        return {"step": self._step, "last_seen": self._last_seen.cpu(), "alarmed_at": torch.tensor(alarmed_at)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there: lines and points of later steps are dropped when the files open."""
        assert self._files is None, "the files are open already"
        self._step, self._last_seen = state["step"], state["last_seen"].clone()
        self._alarmed_at = {index: step for index, step in enumerate(state["alarmed_at"].tolist()) if step >= 0}

    def _open(self) -> tuple[MetricsLog, SummaryWriter]:
        if self._files is None:
            log = MetricsLog(self.folder / "metrics.jsonl", until=self._step)
            self._best = next((line["mean"] for line in reversed(log.kept) if line.get("best")), None)
            points = self.folder / "tensorboard"
            purge_step = self._step + 1 if points.exists() else None
            self._files = log, SummaryWriter(str(points), purge_step=purge_step)
        return self._files

    def _checked(self, logs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        for name, value in logs.items():
            if tuple(value.shape) not in ((), (self.task.num_classes,)):
                raise ValueError(
                    f"log '{name}' has shape {tuple(value.shape)}; "
                    f"give a scalar or one value for each of the {self.task.num_classes} classes."
                )
        return logs

    def _log(self, due: _Due) -> None:
        means, step = due.sums.means(), due.progress.step + 1
        losses, logs = means["losses"], {name: self._by_class(value) for name, value in means["logs"].items()}
        predicted = self._by_class(_shares(means["predicted"]["voxels"]))
        line = {
            "epoch": _epoch(step, due.progress),
            "lr": due.lr,
            "losses": losses,
            "seconds_per_step": due.pace,
            "logs": logs,
            "predicted": predicted,
        }
        self._write("train", step, line)
        points = {"lr": due.lr, "seconds_per_step": due.pace, "loss": losses, "predicted": predicted, **logs}
        self._tensorboard(points, step)
        self._losses_text = "  ".join([*(f"{name} {value:.4g}" for name, value in losses.items()), f"lr {due.lr:.3g}"])
        self._alarm(step, due.last_seen.read().tolist())

    def _by_class(self, value: float | list[float]) -> float | dict[str, float]:
        return dict(zip(self.task.classes, value, strict=True)) if isinstance(value, list) else value

    def _alarm(self, step: int, last_seen: list[int]) -> None:
        """step: done by then. last_seen: (K,) step of the last prediction of each class. The background is left out."""
        silent: dict[str, tuple[int, float]] = {}
        for index, name in enumerate(self.task.classes[1:], start=1):
            absent, alarmed_at = step - last_seen[index], self._alarmed_at.get(index)
            if alarmed_at is not None and last_seen[index] > alarmed_at:
                del self._alarmed_at[index]
                self._write("alarm_cleared", step, {"class": name})
                self._terminal.say(f"Class '{name}' is predicted again.", style="green")
            elif absent >= self.alarm_after and step - (alarmed_at or 0) >= self.alarm_after:
                self._alarmed_at[index] = step
                share = self.task.class_voxels[index] / max(sum(self.task.class_voxels), 1)
                self._write("alarm", step, {"class": name, "absent_steps": absent, "share": share})
                silent[name] = absent, share
        if silent:
            self._terminal.alarm(silent)

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        log, _ = self._open()
        log.write(kind, {"step": step, **values})

    def _tensorboard(self, values: Mapping[str, Any], step: int) -> None:
        """values: scalars, or scalars by name; what is not finite has no point."""
        _, writer = self._open()
        for name, value in values.items():
            points = (
                {f"{name}/{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
            )
            for tag, point in points.items():
                if point is not None and math.isfinite(point):
                    writer.add_scalar(tag, point, step)


class _Sums:
    """Running sums by group and name, on the device."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, group: str, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            value, key = value.detach().float(), (group, name)
            self._sums[key] = self._sums[key] + value if key in self._sums else value
            self._counts[key] += 1

    def take(self) -> _TakenSums:
        """What was summed, on its way to the host in one copy; then everything starts anew."""
        taken = _TakenSums(
            {key: (self._counts[key], tuple(total.shape)) for key, total in self._sums.items()},
            HostCopy(torch.cat([total.reshape(-1) for total in self._sums.values()])),
        )
        self._sums, self._counts = {}, Counter()
        return taken


@dataclass(frozen=True)
class _TakenSums:
    """parts: (steps that gave a name, shape of what they gave) by group and name. flat: their sums, one after the other."""

    parts: Mapping[tuple[str, str], tuple[int, tuple[int, ...]]]
    flat: HostCopy

    def means(self) -> dict[str, Values]:
        """Means over the steps in which a name was given, as numbers or lists."""
        means: dict[str, Values] = {"losses": {}, "logs": {}, "predicted": {}}
        flat = iter(self.flat.read().tolist())
        for (group, name), (count, shape) in self.parts.items():
            values = [next(flat) / count for _ in range(math.prod(shape))]
            means[group][name] = values if shape else values[0]
        return means


@dataclass(frozen=True)
class _Due:
    """A line of the log whose numbers may still be on the device."""

    progress: Progress
    lr: float
    pace: float | None
    sums: _TakenSums
    last_seen: HostCopy  # (K,) the last of its copies

    @property
    def here(self) -> bool:
        return self.last_seen.here


class _Pace:
    """Mean seconds of a step, from the end of one to the end of the next; the first after a pause is left out."""

    def __init__(self) -> None:
        self._laps, self._seconds, self._since = 0, 0.0, None

    def lap(self) -> None:
        now = time.monotonic()
        if self._since is not None:
            self._laps, self._seconds = self._laps + 1, self._seconds + now - self._since
        self._since = now

    def since_lap(self) -> float | None:
        return None if self._since is None else time.monotonic() - self._since

    def pause(self) -> None:
        self._since = None

    def take(self) -> float | None:
        """None where no step was timed."""
        mean = self._seconds / self._laps if self._laps else None
        self._laps, self._seconds = 0, 0.0
        return mean


def _shares(counts: float | list[float]) -> list[float]:
    assert isinstance(counts, list)
    total = max(sum(counts), 1e-9)
    return [count / total for count in counts]


def _epoch(steps_done: int, progress: Progress) -> int:
    return -(-steps_done // progress.steps_per_epoch)
