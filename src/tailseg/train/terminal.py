"""A run on the terminal: a live bar, or plain lines every few seconds where the output goes to a file."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from datetime import timedelta

from rich import progress as bar
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from tailseg.core import Progress, Task


class Terminal:
    """plain_every: seconds between plain lines. The bar appears with the first step."""

    def __init__(self, console: Console, plain_every: float) -> None:
        self._console, self._plain_every = console, plain_every
        self._bar: bar.Progress | None = None
        self._row = bar.TaskID(0)
        self._first: tuple[int, float] | None = None  # step and time at which this process took up the run
        self._last_plain = -math.inf

    def progress(self, progress: Progress, news: str) -> None:
        """One step is done. progress: as the method saw it. news: the newest losses, or nothing yet."""
        step, now = progress.step + 1, time.monotonic()
        first_step, since = self._first = self._first or (step, now)
        left = (progress.total_steps - step) * (now - since) / (step - first_step) if step > first_step else None
        eta = f"{timedelta(seconds=round(left))} left" if left is not None else ""
        words = [f"epoch {progress.epoch + 1}/{progress.total_epochs}", *filter(None, [eta, news])]
        if self._console.is_interactive:
            self._live().update(self._row, completed=step, total=progress.total_steps, description="  ".join(words))
        elif now - self._last_plain >= self._plain_every or step == progress.total_steps:
            self._last_plain = now
            self.say("  ".join([f"step {step}/{progress.total_steps}", *words]))

    def validation(self, when: str, task: Task, dice: Mapping[str, float]) -> None:
        """dice: per foreground class, NaN where no case holds it; shown from the commonest to the rarest class."""
        order = sorted(range(1, task.num_classes), key=lambda index: -task.class_voxels[index])
        rare = set(order[-(len(order) // 3) :]) if len(order) >= 3 else set()
        line = Text(f"validation {when}", style="bold")
        for index in order:
            value = dice[task.classes[index]]
            style = "red" if value == 0 else "yellow" if index in rare else ""
            score = "no case" if math.isnan(value) else f"{value:.3f}"
            line.append(f"  {'*' if index in rare else ''}{task.classes[index]} {score}", style=f"not bold {style}")
        self.say(line.append("  (* the rarest third)", style="not bold dim") if rare else line)

    def alarm(self, silent: Mapping[str, tuple[int, float]]) -> None:
        """silent: per class the steps without a prediction of it, and its share of the labelled voxels."""
        lines = [
            f"Class '{name}' has not been predicted for {steps} steps; "
            + (f"it is {share:.4%} of the labelled voxels." if share else "no labelled training case holds it.")
            for name, (steps, share) in silent.items()
        ]
        if any(share for _, share in silent.values()):
            lines.append(
                "If it stays so, try a class weighting (co-training methods: method.weighter_a=dist) or more labelled "
                "patches around the organs (data.foreground=0.5)."
            )
        if not all(share for _, share in silent.values()):
            lines.append("What no labelled case holds cannot be learnt: choose another split.")
        if self._console.is_interactive:
            self._console.print(Panel(Text("\n".join(lines)), title="alarm", style="bold red"))
        else:
            for line in lines:
                self.say(f"ALARM: {line}")

    def say(self, text: str | Text, style: str = "") -> None:
        """A line that stays; in a file it is not wrapped."""
        line = Text(text, style=style) if isinstance(text, str) else text
        self._console.print(line, soft_wrap=not self._console.is_interactive)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _live(self) -> bar.Progress:
        if self._bar is None:
            columns = (
                bar.BarColumn(bar_width=20),
                bar.MofNCompleteColumn(),
                bar.TextColumn("{task.description}", markup=False),
            )
            self._bar = bar.Progress(*columns, console=self._console)
            self._row = self._bar.add_task("", total=None)
            self._bar.start()
        return self._bar
