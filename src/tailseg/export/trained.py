"""What is exported: the networks of one run, or of several folds whose probabilities are averaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tailseg.core import Method, Task
from tailseg.data.raw import RawDataset
from tailseg.data.splits import Split
from tailseg.recipe import Recipe


class ExportError(ValueError):
    """What keeps a run from being exported; nothing is left of the export."""


@dataclass(frozen=True)
class TrainedModel:
    """One trained run, or the folds of one.

    source: the folder that the user named. folders, recipes, methods, splits, steps: one each of every run. checkpoint: best or
    last. versions: of TailSeg and torch that trained the first run. dataset: None where the raw data are not reachable, and
    unreachable says why.
    """

    source: Path
    folders: tuple[Path, ...]
    recipes: tuple[Recipe, ...]
    methods: tuple[Method, ...]
    splits: tuple[Split, ...]
    steps: tuple[int, ...]
    label_values: tuple[int, ...]
    checkpoint: str
    versions: Mapping[str, str]
    dataset: RawDataset | None
    unreachable: str = ""

    def __post_init__(self) -> None:
        """Raises ExportError for folds that no single preparation and window serves."""
        for name, recipe, method in zip(self.names, self.recipes, self.methods, strict=True):
            same = {
                "data.prepare": recipe.data.prepare == self.recipe.data.prepare,
                "data.patch_size": recipe.data.patch_size == self.recipe.data.patch_size,
                "evaluate": recipe.evaluate == self.recipe.evaluate,
                "classes": method.task.classes == self.task.classes,
                "channels": method.task.in_channels == self.task.in_channels,
            }
            if differing := [key for key, equal in same.items() if not equal]:
                raise ExportError(
                    f"{self.names[0]} and {name} differ in {', '.join(differing)}, so that they cannot be averaged; "
                    f"export one of them with --fold {name}."
                )

    @property
    def recipe(self) -> Recipe:
        return self.recipes[0]

    @property
    def task(self) -> Task:
        return self.methods[0].task

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(folder.name for folder in self.folders)

    @property
    def channels(self) -> tuple[str, ...]:
        """Their names, where the data set is there to name them."""
        if self.dataset is not None:
            return self.dataset.channels
        return tuple(f"channel {number}" for number in range(self.task.in_channels))

    @property
    def data_name(self) -> str:
        return self.dataset.name if self.dataset else self.recipe.data.root.stem
