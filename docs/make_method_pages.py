"""Write docs/methods/: one page a method and an index.

    python docs/make_method_pages.py            writes the pages
    python docs/make_method_pages.py --check    fails, naming them, if any page is not what it would write

A page is made of the method's module docstring, its options, the rows of benchmarks/published.csv that name it (and
what benchmarks/published.md says of their protocols), and the tables of benchmarks/results/*.md. Needs no torch.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tailseg.components import MethodCard, component_options, method_cards

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "methods"
PUBLISHED = ROOT / "benchmarks" / "published.csv"
PROTOCOLS = ROOT / "benchmarks" / "published.md"
RESULTS = ROOT / "benchmarks" / "results"
BASELINE = "supervised"  # labelled-only and upper bound stand beside every method
MADE = "<!-- Made by docs/make_method_pages.py. Edit the method's docstring, or benchmarks/, and run it again. -->"

METRICS = {"dice": "Dice", "jaccard": "Jaccard", "hd95": "HD95", "asd": "ASD"}
CLASSES = {
    "spleen": "Sp",
    "right kidney": "RK",
    "left kidney": "LK",
    "gallbladder": "Ga",
    "esophagus": "Es",
    "liver": "Li",
    "stomach": "St",
    "aorta": "Ao",
    "inferior vena cava": "IVC",
    "portal and splenic vein": "PSV",
    "pancreas": "PA",
    "right adrenal gland": "RAG",
    "left adrenal gland": "LAG",
    "duodenum": "Du",
    "bladder": "Bl",
    "prostate or uterus": "P/U",
}

Row = Mapping[str, str]
Table = list[list[str]]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> list[str]:
    """Markdown; the first `left` columns are text, the others numbers."""
    rule = ["---" if index < left else "---:" for index in range(len(header))]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def index_page(cards: Sequence[MethodCard]) -> str:
    rows = [
        [f"[{card.name}]({card.name}.md)", card.family, card.venue, cell(card.title), cell(card.needs), card.cost]
        for card in cards
    ]
    return lines_of(
        MADE,
        "# Methods",
        "",
        "Cost is the time of a training step relative to `supervised`, on the same patches and networks.",
        "",
        *table(["name", "family", "venue", "what it does", "needs", "cost"], rows, 5),
    )


def method_page(card: MethodCard, published: Sequence[Row], pages: Sequence[ResultPage]) -> str:
    return lines_of(
        MADE,
        f"# {card.title.rstrip('.')}",
        "",
        card.paper,
        "",
        *(f"- **{name}:** {text}" for name, text in (("Family", card.family), ("Needs", card.needs))),
        f"- **Cost of a step:** {card.cost}, where `supervised` is x1.0",
        f"- **Source:** [`src/tailseg/methods/{card.name}.py`](../../src/tailseg/methods/{card.name}.py)",
        "",
        "## Idea",
        "",
        card.idea,
        "",
        "## Algorithm",
        "",
        "```text",
        card.algorithm,
        "```",
        "",
        "## Options",
        "",
        *options(card.name),
        "",
        "## Deviations",
        "",
        card.deviations,
        "",
        f"Constants: {card.constants.rstrip('.')}.",
        "",
        "## Published numbers",
        "",
        *published_numbers(card.name, published),
        "## Measured here",
        "",
        *measured_numbers(card.name, pages),
    )


def options(name: str) -> list[str]:
    found = component_options("methods", name)
    if not found:
        return ["None."]
    meanings = any(option.meaning for option in found)
    rows = [
        [
            f"`{option.name}`",
            f"`{cell(option.type)}`",
            "must be set" if option.default is None else f"`{option.default}`",
            *([cell(option.meaning)] if meanings else []),
        ]
        for option in found
    ]
    return [
        f"In a recipe: `method: {{name: {name}, {found[0].name}: {found[0].default or '...'}}}`.",
        "",
        *table(["option", "type", "default", *(["meaning"] if meanings else [])], rows, 4),
    ]


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def lines_of(*lines: str) -> str:
    """One text; never two empty lines in a row, except in code."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip("\n") + "\n"


# --- published numbers


def read_published() -> list[Row]:
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_protocols() -> dict[str, str]:
    """Name of a published protocol -> the first paragraph that PROTOCOLS says of it."""
    sections = re.split(r"^## ", PROTOCOLS.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found = {}
    for section in sections:
        name, _, text = section.partition("\n")
        found[name.strip()] = " ".join(text.strip().split("\n\n")[0].split())
    return found


def published_numbers(name: str, published: Sequence[Row]) -> Iterator[str]:
    own = [row for row in published if row["method"] == name]
    if not own:
        yield from ("None that could be established.", "")
        return
    yield from (
        "What papers report, by their own rules; not measured here. Different protocols do not compare.",
        "Dice and Jaccard in %, distances in voxels.",
        "",
    )
    protocols = read_protocols()
    for protocol, dataset in dict.fromkeys((row["protocol"], row["dataset"]) for row in own):
        beside = [
            row
            for row in published
            if (row["protocol"], row["dataset"]) == (protocol, dataset) and row["method"] in {name, BASELINE}
        ]
        yield from (f"### {dataset}, protocol [{protocol}](../../benchmarks/published.md#{protocol})", "")
        yield from (protocols[protocol], "")
        yield from published_table(beside)
        yield ""


def published_table(rows: Sequence[Row]) -> Iterator[str]:
    """One line for each source of each run, its means and classes as columns."""
    runs: dict[tuple[str, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (int(row["labelled"]), row["method"] == BASELINE)):
        key = (row["labelled"], row["share"], row["row"], row["variant"], row["source"])
        runs.setdefault(key, []).append(row)
    shown = {(row["metric"], row["class"]) for row in rows}
    columns = [(metric, "mean") for metric in METRICS if (metric, "mean") in shown]
    columns += [("dice", one) for one in CLASSES if ("dice", one) in shown]
    sources, remarks, lines = [], [], []
    for (labelled, share, run, variant, source), cells in runs.items():
        note = cells[0]["note"]
        text = f"{source}; {note}" if note else source
        if text not in sources:
            sources.append(text)
        values = {(one["metric"], one["class"]): one for one in cells}
        line = [f"{labelled} ({share})", f"{run} `{variant}`" if variant else run]
        for column in columns:
            one = values.get(column)
            mark = "\\*" if one and one["note"] != note else ""
            if one and mark and one["note"] not in remarks:
                remarks.append(one["note"])
            line.append("" if one is None else one["value"] + (f" ± {one['std']}" if one["std"] else "") + mark)
        lines.append([*line, str(sources.index(text) + 1)])
    heads = [METRICS[metric] if one == "mean" else CLASSES[one] for metric, one in columns]
    yield from table(["labelled", "as published", *heads, "source"], lines, 2)
    yield ""
    yield from (f"{index}. {text}" for index, text in enumerate(sources, 1))
    if remarks:
        yield from ("", f"\\* {'; '.join(remarks)}.")


# --- measured numbers


@dataclass
class ResultPage:
    """A page of RESULTS: its tables under their headings, and the method behind each name of a run."""

    path: Path
    title: str
    tables: list[tuple[str, Table]] = field(default_factory=list)
    methods: dict[str, str] = field(default_factory=dict)


def read_results(cards: Sequence[MethodCard]) -> list[ResultPage]:
    return [read_result(path, cards) for path in sorted(RESULTS.glob("*.md"))]


def read_result(path: Path, cards: Sequence[MethodCard]) -> ResultPage:
    page, heading, current = ResultPage(path, path.stem), "", []
    for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("|"):
            current.append([part.strip() for part in line.strip().strip("|").split("|")])
            continue
        if len(current) > 2:
            page.tables.append((heading, [current[0], *current[2:]]))
        current = []
        if line.startswith("# "):
            page.title = line[2:].strip()
        elif line.startswith("#"):
            heading = line.lstrip("# ").strip()
    known = {plain(card.name): card.name for card in cards} | {
        plain(card.title.partition(":")[0]): card.name for card in cards
    }
    known |= {plain(text): BASELINE for text in ("labelled-only", "fully supervised", "upper bound")}
    for _, rows in page.tables:
        header, *body = rows
        names = header[1:] if "recipe" not in header else []
        page.methods |= {name: known[plain(name)] for name in names if plain(name) in known}
        page.methods |= {row[0]: known[plain(row[0])] for row in body if plain(row[0]) in known}
    for _, (header, *body) in page.tables:  # what a recipe says goes before what a run is called
        if "recipe" in header:
            page.methods |= {row[0]: found for row in body if (found := of_recipe(row[header.index("recipe")]))}
    return page


def plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def of_recipe(text: str) -> str | None:
    """The method of "`recipes/acdc_mini/cps_3.yaml` `method.name=dhc`"."""
    parts = re.findall(r"`([^`]+)`", text)
    for part in reversed(parts):
        if found := re.fullmatch(r"method(?:\.name)?=(\w+)", part):
            return found.group(1)
    path = ROOT / parts[0] if parts else None
    if path is None or not path.is_file():
        return None
    return yaml.safe_load(path.read_text(encoding="utf-8")).get("method", {}).get("name")


def measured_numbers(name: str, pages: Sequence[ResultPage]) -> Iterator[str]:
    found = False
    for page in pages:
        own = [run for run, method in page.methods.items() if method == name]
        beside = [run for run, method in page.methods.items() if method == BASELINE and name != BASELINE]
        sections = [(heading, rows) for heading, rows in page.tables if any(run in flat(rows) for run in own)]
        blocks = [(heading, block) for heading, rows in sections if (block := cut(rows, [*beside, *own])) is not None]
        if not blocks:
            continue
        found = True
        link = page.path.relative_to(ROOT).as_posix()
        yield from (f"### {page.title}", "", f"Conditions, classes and all runs: [`{link}`](../../{link}).", "")
        for header, group in same_header(blocks):
            yield from table(["under", *header], group, 2)
            yield ""
    if not found:
        yield from ("Not yet.", "")


def flat(rows: Table) -> set[str]:
    return {*rows[0], *(row[0] for row in rows[1:])}


def cut(rows: Table, runs: Sequence[str]) -> Table | None:
    """Header and one row a run: the means and their interval where runs are columns, everything where they are rows."""
    header, *body = rows
    if any(run in header[1:] for run in runs):
        means = [row for row in body if re.match(r"mean |95 %", bare(row[0]))]
        if not means:
            return None
        across = [[run, *(bare(row[header.index(run)]) for row in means)] for run in runs if run in header]
        return [["run", *(bare(row[0]) for row in means)], *across]
    if "recipe" in header:
        return None
    return [["run", *map(bare, header[1:])], *([*map(bare, row)] for run in runs for row in body if row[0] == run)]


def bare(text: str) -> str:
    """Without bold type, and without the star of the rare classes."""
    return text.strip("* ")


def same_header(blocks: Sequence[tuple[str, Table]]) -> list[tuple[list[str], Table]]:
    """Tables of one header in a row become one, the heading of each in its first column."""
    merged: list[tuple[list[str], Table]] = []
    for heading, (header, *body) in blocks:
        if not merged or merged[-1][0] != header:
            merged.append((header, []))
        merged[-1][1].extend([heading.removeprefix("Protocol "), *row] for row in body)
    return merged


# --- writing


def make_pages() -> dict[Path, str]:
    """All pages with their text."""
    cards, published = method_cards(), read_published()
    results = read_results(cards)
    pages = {PAGES / f"{card.name}.md": method_page(card, published, results) for card in cards}
    return {PAGES / "index.md": index_page(cards)} | pages


def stale_pages() -> list[str]:
    """What is missing, out of date or left over, by name."""
    pages = make_pages()
    wrong = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    return sorted(path.name for path in {*wrong, *(set(PAGES.glob("*.md")) - set(pages))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    if parser.parse_args().check:
        if stale := stale_pages():
            sys.exit(f"out of date: {', '.join(stale)}; run python docs/make_method_pages.py")
        return
    pages = make_pages()
    PAGES.mkdir(exist_ok=True)
    for path in set(PAGES.glob("*.md")) - set(pages):
        path.unlink()
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
