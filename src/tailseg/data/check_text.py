"""A CheckReport as a person reads it, for 80 columns and more."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from tailseg.data.check import CheckReport, DatasetFacts
from tailseg.data.problems import RULES, Problem, Severity

SHOWN = 8
"""Findings of one rule that are shown; --json has them all."""
_COLOURS: dict[Severity, str] = {"error": "red", "warning": "yellow", "note": "cyan"}


def check_text(report: CheckReport) -> RenderableType:
    """Facts, errors, warnings and notes by rule, and the verdict last, where a terminal shows it."""
    parts: list[RenderableType] = []
    if report.facts:
        parts += [*_facts(report.facts), ""]
    for rule in RULES:
        if found := [problem for problem in report.problems if problem.rule == rule]:
            parts += [*_group(rule, found), ""]
    return Group(*parts, _verdict(report))


def _facts(facts: DatasetFacts) -> Iterator[RenderableType]:
    channels = f"channel{'s' if len(facts.channels) > 1 else ''} {', '.join(facts.channels)}"
    yield (
        f"[bold]{escape(facts.name)}[/bold]: {_cases(facts.cases)}, {facts.labelled} labelled and "
        f"{facts.unlabelled} unlabelled; {escape(channels)}"
    )
    if facts.size and facts.spacing:
        rows = Table.grid(padding=(0, 2))
        rows.add_row("", *(f"[dim]{name}[/dim]" for name in ("min", "median", "max")))
        for name, spread, form in (
            ("size (D, H, W)", facts.size, "{:.0f}"),
            ("spacing in mm", facts.spacing, "{:.3g}"),
        ):
            triples = (spread.low, spread.median, spread.high)
            rows.add_row(name, *(" x ".join(form.format(side) for side in triple) for triple in triples))
        yield rows
    if facts.labelled:
        yield _classes(facts)


def _classes(facts: DatasetFacts) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("class", overflow="fold")
    table.add_column("cases", justify="right")
    table.add_column("share of voxels", justify="right")
    table.add_column("")
    for each in facts.classes:
        rarest = "rarest" if each.name == facts.rarest and len(facts.classes) > 2 else ""
        table.add_row(escape(each.name), str(each.cases), _percent(each.share), f"[yellow]{rarest}[/yellow]")
    return table


def _percent(share: float) -> str:
    return f"{100 * share:#.2g} %" if 0 < share < 0.0995 else f"{100 * share:.1f} %"


def _group(rule: str, found: list[Problem]) -> Iterator[RenderableType]:
    """What the rule says, then every file; a way out that all of them share stands once."""
    severity, meaning = RULES[rule]
    colour = _COLOURS[severity]
    yield f"[bold {colour}]{severity}[/bold {colour}] [bold]{rule}[/bold]: {meaning}"
    shared = found[0].way_out if len({problem.way_out for problem in found}) == 1 else ""
    rows = Table.grid(padding=(0, 1))
    for problem in found[:SHOWN]:
        where = problem.file or problem.case
        head = f"[cyan]{escape(where)}[/cyan] " if where else ""
        rows.add_row(" -", head + escape(problem.text))
        if not shared:
            rows.add_row("", _way_out(problem.way_out))
    if len(found) > SHOWN:
        rows.add_row(" -", f"and {len(found) - SHOWN} more; --json lists them all")
    if shared:
        rows.add_row("", _way_out(shared))
    yield rows


def _way_out(text: str) -> str:
    return f"[green]way out:[/green] {escape(text)}"


def _verdict(report: CheckReport) -> str:
    errors, warnings = len(report.of("error")), len(report.of("warning"))
    of = f" in {_cases(report.facts.cases)}" if report.facts else ""
    if not errors and not warnings:
        return f"[green]no problems{of}[/green]"
    counts = [f"{n} {name}{'s' if n > 1 else ''}" for n, name in ((errors, "error"), (warnings, "warning")) if n]
    verdict = "[red]repair the errors before training[/red]" if errors else "training can start; have a look first"
    return f"{' and '.join(counts)}{of}: {verdict}"


def _cases(number: int) -> str:
    return f"{number} case{'s' if number != 1 else ''}"
