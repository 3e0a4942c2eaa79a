"""The verb report: one page about runs, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tailseg.components import method_cards
from tailseg.files import write_text
from tailseg.progress import Report, silent
from tailseg.train.checkpoint import load_checkpoint
from tailseg.train.metrics_log import read_metrics
from tailseg.trained import load_run

if TYPE_CHECKING:
    from tailseg.report.collect import Card, Trained

METRICS_FILE = "metrics.jsonl"


def report(
    folders: Sequence[Path],
    output: Path | None = None,
    *,
    protocol: str | None = None,
    cases: int = 30,
    progress: Report = silent,
) -> Path:
    """Write one offline HTML page about runs, side by side; returns its path, default <first folder>/report.html.

    folders: of runs, or of `tailseg run`. protocol: whose scores are shown; None takes native where there are such scores.
    cases: scans that are shown, as slices and in 3D. Raises ReportError for a folder that holds no run.
    """
    from tailseg.report.collect import collect, run_folders  # here: matplotlib costs half a second
    from tailseg.report.page import report_page

    members = run_folders(folders)
    material = collect(
        folders,
        protocol=protocol,
        trained={folder: trained for folder in members if (trained := _trained(folder)) is not None},
        lines={folder: read_metrics(folder / METRICS_FILE) for folder in members if (folder / METRICS_FILE).exists()},
        cards=_report_cards(),
    )
    path = output or folders[0] / "report.html"
    write_text(path, report_page(material, cases=cases, progress=progress))
    return path


def _trained(folder: Path) -> Trained | None:
    """What the run's checkpoint tells a report; None without one."""
    from tailseg.report.collect import Trained

    path = next((path for name in ("best.pt", "last.pt") if (path := folder / name).exists()), None)
    if path is None:
        return None
    run, state = load_run(folder, path.stem), load_checkpoint(path)
    parameters = sum(parameter.numel() for group in run.method.param_groups() for parameter in group["params"])
    return Trained(
        run.task.classes, run.task.class_voxels, run.step, parameters, state["versions"], run.method.caveat()
    )


def _report_cards() -> dict[str, Card]:
    from tailseg.report.collect import Card

    return {card.name: Card(card.title, card.paper, card.idea, card.needs, card.cost) for card in method_cards()}
