"""The verb export: a trained network for others to use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tailseg.data.raw import DataError, read_raw
from tailseg.options import OptionError, suggest
from tailseg.train.checkpoint import load_checkpoint
from tailseg.trained import load_run, member_runs

if TYPE_CHECKING:
    from tailseg.export.write import Exported


def export(
    folder: Path,
    file_format: str,
    output: Path | None = None,
    *,
    fold: str | None = None,
    checkpoint: str = "best",
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Exported:
    """The trained network for others to use, described and checked against TailSeg's own prediction.

    folder: a run, or what `tailseg run` made: then the average over its folds, or the one named. output: default
    <folder>/export/<format>. say: told what is being done. Raises OptionError or ExportError.
    """
    from tailseg.export.trained import TrainedModel  # torch.export costs seconds that other verbs should not
    from tailseg.export.write import write_export

    members = member_runs(folder)
    if fold is not None:
        names = [member.name for member in members]
        if fold not in names:
            raise OptionError(f"{folder} has no {fold}. {suggest(fold, names)}")
        members = [members[names.index(fold)]]
    runs = [load_run(member, checkpoint) for member in members]
    dataset, unreachable = None, ""
    try:
        dataset = read_raw(runs[0].recipe.data.root)
    except (DataError, OSError) as error:
        unreachable = str(error)
    model = TrainedModel(
        source=folder,
        folders=tuple(members),
        recipes=tuple(run.recipe for run in runs),
        methods=tuple(run.method for run in runs),
        splits=tuple(run.split for run in runs),
        steps=tuple(run.step for run in runs),
        label_values=runs[0].label_values,
        checkpoint=checkpoint,
        versions=load_checkpoint(members[0] / f"{checkpoint}.pt")["versions"],
        dataset=dataset,
        unreachable=unreachable,
    )
    return write_export(model, file_format, output or folder / "export" / file_format, force=force, say=say)
