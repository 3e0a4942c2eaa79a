"""What the site has beyond docs/: the pages of benchmarks/, and links that lead out of docs/.

Pages in this repository link to each other by their places in it. On the site, what was measured lies under benchmarks/,
and a link to a file that is no page (the source of a method, a recipe) becomes its path as text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tailseg.components import method_cards

ROOT = Path(__file__).parents[1]
GUESTS = ("benchmarks/*.md", "benchmarks/results/*.*")
"""Files of the repository that are pages and pictures of the site, at the same place; the results hold the findings."""
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(((?!\w+:)[^)#\s]+)(#[^)\s]*)?\)")


def guests() -> dict[str, Path]:
    """Place on the site -> file."""
    return {path.relative_to(ROOT).as_posix(): path for pattern in GUESTS for path in sorted(ROOT.glob(pattern))}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill in what follows from the files: an entry of nav that names a folder stands for its pages."""
    made = {"methods/": method_entries, "benchmarks/": benchmark_entries}
    for entry in config.nav or []:
        for title, target in entry.items():
            if isinstance(target, str) and target in made:
                entry[title] = made[target]()
    return config


def method_entries() -> list[Any]:
    """The index, and a section for each family."""
    families: dict[str, list[dict[str, str]]] = {}
    for card in method_cards():
        families.setdefault(card.family, []).append({card.title.partition(":")[0]: f"methods/{card.name}.md"})
    return ["methods/index.md", *({family.capitalize(): pages} for family, pages in families.items())]


def benchmark_entries() -> list[Any]:
    places = [place for place in guests() if place.endswith(".md")]
    results = [place for place in places if "/results/" in place]
    return [
        {kind: [{Path(place).stem.replace("_", " "): place} for place in found]}
        for kind, found in (("Results", results), ("Published and planned", [p for p in places if p not in results]))
    ]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for place, path in guests().items():
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    parts = FENCED.split(markdown)  # text, code, text, ...
    return "".join(part if index % 2 else _relinked(part, page.file, files) for index, part in enumerate(parts))


def _relinked(markdown: str, file: File, files: Files) -> str:
    """Links as they lead on the site: file is a page, at its place in the repository and at its place on the site."""
    assert file.abs_src_path is not None
    folder = Path(file.abs_src_path).parent

    def relink(found: re.Match[str]) -> str:
        text, link, anchor = found[1], found[2], found[3] or ""
        target = (folder / link).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return found[0]  # mkdocs says what is wrong with it
        place = target.relative_to(ROOT).as_posix().removeprefix("docs/")
        if files.get_file_from_path(place) is None:
            return text
        return f"[{text}]({posixpath.relpath(place, posixpath.dirname(file.src_uri) or '.')}{anchor})"

    return LINK.sub(relink, markdown)
