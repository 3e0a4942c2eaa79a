"""Validation while training: true sliding windows over whole prepared scans, hard Dice per class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tailseg.core import Method
from tailseg.data.store import TrainingStore
from tailseg.evaluate.sliding_window import sliding_window
from tailseg.parts.counts import hard_dice_counts
from tailseg.parts.ranks import sum_over_ranks
from tailseg.runtime import Runtime


@dataclass(frozen=True)
class Validator:
    """Scores the validation cases on the prepared grid; the ranks share them.

    overlap, weighting, batch_size: of the sliding windows, see sliding_window.
    """

    store: TrainingStore
    cases: Sequence[str]
    patch_size: tuple[int, ...]
    runtime: Runtime
    overlap: float = 0.5
    weighting: Literal["uniform", "gaussian"] = "uniform"
    batch_size: int | None = None

    def __call__(self, method: Method) -> Tensor:
        """(K - 1,) Dice per foreground class: mean over the cases that hold or predict it, NaN where none does.

        Cases in which nobody looked for a class say nothing of it. Of the others they tell only where a class was labelled:
        their background is unknown here, so that Dice is too good where much is predicted there.
        """
        total = torch.zeros(2, method.task.num_classes - 1)
        for case in self.cases[self.runtime.rank :: self.runtime.ranks]:
            dice = self._dice(method, case)
            present = ~dice.isnan()
            total += torch.stack([dice.nan_to_num(0.0), present.float()])
        dice_sum, count = sum_over_ranks(total.to(self.runtime.device)).cpu().unbind()
        return torch.where(count > 0, dice_sum / count.clamp(min=1), torch.nan)

    def _dice(self, method: Method, case: str) -> Tensor:
        num_classes = method.task.num_classes
        image = torch.from_numpy(self.store.image(case).astype("float32"))
        label = torch.from_numpy(self.store.label(case).astype("int64")).to(self.runtime.device)

        def predict(x: Tensor) -> Tensor:
            with self.runtime.autocast():
                x = x.contiguous(memory_format=self.runtime.memory_format(x.dim() - 2))
                return method.predict(x)

        counts = torch.zeros(2, num_classes, dtype=torch.int64, device=self.runtime.device)
        for start, probs in sliding_window(
            predict,
            image,
            self.patch_size,
            overlap=self.overlap,
            weighting=self.weighting,
            batch_size=self.batch_size,
            device=self.runtime.device,
        ):
            # max, since argmax over the first axis takes five times as long on a CPU
            prediction, target = probs.max(0).indices[None], label[None, start : start + probs.shape[1]]
            counts += torch.stack(hard_dice_counts(prediction, target, num_classes))
        hits, sizes = counts[:, 1:].cpu()
        dice = torch.where(sizes > 0, 2 * hits / sizes.clamp(min=1), torch.nan)
        dice[[label - 1 for label in self.store.cases[case].unannotated]] = torch.nan
        return dice
