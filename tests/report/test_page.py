"""The whole page: the answer first, nothing from the network, and well-formed whatever is missing."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report.folders import make_run, make_whole, scored, tiny_data, training_lines

from tailseg.data.splits import Split
from tailseg.report.collect import Card, Trained, collect
from tailseg.report.page import MOST_BYTES, report_page

VOID = {"meta", "link", "br", "wbr", "input", "image", "use", "path", "circle", "line", "rect", "hr", "img"}
TRAINED = Trained(
    ("background", "box", "core"), (9000, 900, 100), 12, 1_180_000, {"tailseg": "0.1", "torch": "2.6"}, ""
)


class Page(HTMLParser):
    """Raises AssertionError for a tag that is closed and was not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def all(self, name: str) -> list[str]:
        return [value for _, found, value in self.attributes if found == name]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    return make_whole(root / "out", tiny_data(root), folds=2)


@pytest.fixture(scope="module")
def text(whole: Path) -> str:
    folders = [whole / f"fold{fold}{ending}" for fold in (0, 1) for ending in ("", "_labelled_only")]
    card = Card("DHC", "A. Author", "two networks", "nothing", "x2")
    material = collect(
        [whole],
        trained=dict.fromkeys(folders, TRAINED),
        lines={folder: training_lines() for folder in folders},
        cards={"dhc": card},
    )
    return report_page(material)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_the_page_is_well_formed_and_no_id_stands_twice(page: Page):
    twice = [each for each, times in Counter(page.all("id")).items() if times > 1]
    assert not twice
    targets = {link.removeprefix("#") for link in page.all("href") if link.startswith("#")}
    assert targets <= set(page.all("id"))


def test_nothing_is_asked_of_the_network(page: Page, text: str):
    places = [*page.all("src"), *page.all("href"), *page.all("xlink:href"), *page.all("data")]
    assert [place[:60] for place in places if not place.startswith(("#", "data:"))] == []
    assert not re.search(r"@import|url\(\s*['\"]?(?:https?:)?//", text.partition("<body>")[0])
    assert len(text.encode()) < MOST_BYTES


def test_the_answer_comes_first(page: Page, text: str):
    sections = re.findall(r'<section id="(\w+)"', text)
    assert "tsv-canvas" in text
    assert sections == ["verdict", "classes", "training", "scans", "volume", "volumes", "data", "recipe"]
    links = [link.removeprefix("#") for tag, name, link in page.attributes if tag == "a" and name == "href"]
    assert links == sections


def test_what_others_wrote_is_escaped(text: str):
    assert "Boxes &lt;in&gt; boxes" in text and "<in>" not in text


def test_a_class_has_one_colour_everywhere(text: str):
    for name, colour in (("box", "#2a78d6"), ("core", "#e8590c")):
        swatches = re.findall(rf'class="swatch" style="--c:(#\w+)"></span>{name}\b', text)
        assert len(swatches) > 5 and set(swatches) == {colour}


def test_a_reason_can_be_read_without_a_mouse(page: Page, text: str):
    verdict = text[text.index('id="verdict"') : text.index('id="classes"')]
    reasons = re.findall(r"<details><summary class=\"answer \w+\">[^<]+</summary><p>([^<]+)</p>", verdict)
    assert len(reasons) == 3 and all("case" in reason for reason in reasons)
    assert "chosen on these very cases" in verdict


def test_every_picture_says_what_it_is(page: Page):
    pictures = [index for index, (_, name, value) in enumerate(page.attributes) if (name, value) == ("role", "img")]
    labels = [value for _, name, value in page.attributes if name == "aria-label"]
    assert len(pictures) > 20 and len(labels) >= len(pictures) and all(labels)


def test_a_page_of_a_bare_run_says_what_is_missing(tmp_path: Path):
    data = tiny_data(tmp_path)
    text = report_page(collect([make_run(tmp_path / "run", data)]))
    Page(text)
    assert "nothing has been scored" in text and f"tailseg predict {tmp_path}/run test" in text
    assert "method=supervised &#39;data.batch=[4,0]&#39;" in text and 'id="classes"' not in text


def test_a_caveat_stands_above_the_verdict(tmp_path: Path):
    data = tiny_data(tmp_path)
    run = scored(make_run(tmp_path / "run", data), data, ("t",), caveat="RANDOM TEACHER: nothing counts.")
    text = report_page(collect([run]), cases=0)
    assert text.index("RANDOM TEACHER") < text.index("Nobody can tell yet")


def test_protocols_are_never_mixed_in_one_table(tmp_path: Path):
    data = tiny_data(tmp_path)
    first = scored(make_run(tmp_path / "a", data), data, ("t",))
    second = scored(make_run(tmp_path / "b", data, "cps"), data, ("t",), protocol="dhc-p23")
    text = report_page(collect([first, second]), cases=0)
    Page(text)
    assert "tables of their own" in text
    tables = re.findall(r"<table.*?</table>", text[text.index('id="classes"') : text.index('id="data"')], re.S)
    assert len(tables) == 2 and "ASD (voxels)" in tables[1] and "HD95" not in tables[1]


def test_six_runs_stand_side_by_side(tmp_path: Path):
    data = tiny_data(tmp_path)
    split = Split("s", ("a", "b"), ("u0",), ("v1",), ("t", "v2"))
    methods = ["supervised", "dhc", "cps", "uamt", "bcp", "crest"]
    runs = [
        scored(
            make_run(tmp_path / name, data, name, split=split, labelled_only=name == "supervised"),
            data,
            ("t", "v2"),
            shift=shift,
        )
        for shift, name in enumerate(methods)
    ]
    text = report_page(collect(runs), cases=2)
    Page(text)
    assert text.count('class="verdict"') == 5 and "uamt against supervised (labelled only)" in text
    assert len(set(re.findall(r"fill:var\(--run(\d)\)", text[: text.index('id="classes"')]))) == 6


def test_a_page_without_room_for_the_viewer_says_so(whole: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tailseg.report.page.MOST_BYTES", 1_000_000)
    text = report_page(collect([whole]), cases=2)
    assert "leaves no room for the scans in 3D" in text and "tsv-canvas" not in text
