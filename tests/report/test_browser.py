"""The page in a browser, from a file, without a network."""

from __future__ import annotations

from pathlib import Path

import pytest
from report.browser import Opened, browser, opened, phantom_cases
from report.folders import make_whole, tiny_data

from tailseg import app
from tailseg.data.phantom import CLASSES
from tailseg.report.colours import class_colours
from tailseg.report.page import MOST_BYTES
from tailseg.report.viewer import viewer_html

pytestmark = pytest.mark.browser

DESKTOP, PHONE = (1280, 900), (390, 844)
COLOURS = class_colours(CLASSES[1:])
RAREST = len(CLASSES) - 1  # the first scan's prediction lacks it
MISSED, EXTRA = "#2f9bff", "#ff9500"
HOST = """<!doctype html><html lang="en"><meta charset="utf-8"><title>host</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>:root {{ color-scheme: light dark }} body {{ margin: 0 auto; padding: 1rem; max-width: 75rem }}</style>
{above}{viewer}</html>"""


@pytest.fixture(scope="module")
def chromium():
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("viewer")
    html = viewer_html(phantom_cases(folder), CLASSES, range(len(CLASSES)), COLOURS, budget=3_000_000)
    path = folder / "page.html"
    path.write_text(HOST.format(above="", viewer=html), encoding="utf-8")
    (folder / "below.html").write_text(
        HOST.format(above='<div style="height:5000px"></div>', viewer=html), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return app.report([make_whole(folder / "out", tiny_data(folder))], folder / "report.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_report_asks_nothing_of_the_network_and_fits_its_window(chromium, report, size, scheme):
    assert report.stat().st_size <= MOST_BYTES
    with opened(chromium, report, size=size, scheme=scheme, has_touch=size == PHONE) as window:
        assert window.overflow() <= 0
        for button in window.page.locator("main button:not(.tsv *)").all():
            if button.is_visible():
                button.click()
                window.page.keyboard.press("Escape")
        window.page.locator("#tsv-canvas").scroll_into_view_if_needed()
        window.ready()
        assert window.pixels().std() > 10
        window.page.locator("#tsv-find-2").click()
        window.page.locator("#tsv-opacity").fill("100")
        assert window.coloured(class_colours(["box", "core"])[1]) > 10
        window.choose("show", "disagreement")
        assert window.page.locator("#tsv-agree").is_visible()  # this prediction is the reference
        assert window.overflow() <= 0
        assert window.faults == []


@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")], ids=["desktop", "phone"])
def test_every_control_of_the_viewer_works(chromium, page, size, scheme):
    with opened(chromium, page, size=size, scheme=scheme, has_touch=size == PHONE) as window:
        window.ready()
        use_every_control(window)
        assert window.overflow() <= 0
        assert window.faults == []


def use_every_control(window: Opened) -> None:
    here = window.page.locator("#tsv-here")
    window.page.locator(f"#tsv-find-{RAREST}").click()
    assert "is not predicted anywhere in this scan" in here.inner_text()
    assert window.coloured(COLOURS[RAREST - 1]) == 0
    window.choose("show", "reference")
    assert f"reference: {CLASSES[RAREST]}" in here.inner_text()
    assert window.coloured(COLOURS[RAREST - 1]) > 10  # its few voxels are seen, and nothing else
    window.choose("show", "disagreement")
    assert window.coloured(MISSED) > 10
    assert not window.page.locator("#tsv-agree").is_visible()
    assert window.coloured(EXTRA) == 0
    window.choose("show", "nothing")
    plain = window.pixels()
    assert window.coloured(MISSED) == 0
    window.page.locator("#tsv-all").click()
    window.choose("show", "prediction")
    liver = COLOURS[CLASSES.index("liver") - 1]
    assert (window.pixels() != plain).any()
    assert window.coloured(liver) > 10
    for view in ("axial", "coronal", "sagittal", "render"):
        before = window.pixels()
        window.choose("view", view)
        assert (window.pixels() != before).mean() > 0.02, view
    window.page.locator("#tsv-none").click()
    assert window.coloured(liver) == 0
    window.page.locator(f"#tsv-class-{CLASSES.index('liver')}").check()
    assert window.pixels().std() > 10
    window.choose("view", "axial")
    window.page.locator("#tsv-case").select_option(label="phantom_3")
    window.ready()
    assert window.page.locator("#tsv-show input[value=reference]").is_disabled()
    assert "reference" not in here.inner_text()
    window.page.locator("#tsv-opacity").fill("100")
    assert window.coloured(liver) > 1000


@pytest.mark.parametrize("case", [0, 1, 2], ids=["RAS", "LAS", "LPS"])
def test_the_patients_right_is_on_the_left(chromium, page, case):
    with opened(chromium, page, size=PHONE, scheme="light") as window:
        window.ready()
        window.page.locator("#tsv-case").select_option(str(case))
        window.ready()
        window.choose("view", "axial")
        window.page.locator("#tsv-opacity").fill("100")
        middle = window.pixels().shape[1] / 2
        assert window.where(COLOURS[CLASSES.index("liver") - 1])[:, 1].mean() < middle - 30
        assert window.where(COLOURS[CLASSES.index("aorta") - 1])[:, 1].mean() > middle - 30
        assert window.faults == []


def test_the_keyboard_moves_the_crosshair(chromium, page):
    with opened(chromium, page, size=DESKTOP, scheme="light") as window:
        window.ready()
        window.page.locator("#tsv-canvas").focus()
        before = window.page.locator("#tsv-here").inner_text()
        for _ in range(12):
            window.page.keyboard.press("PageUp")
        assert window.page.locator("#tsv-here").inner_text() != before
        assert window.faults == []


def test_nothing_is_unpacked_before_the_viewer_is_scrolled_to(chromium, page):
    with opened(chromium, page.with_name("below.html"), size=DESKTOP, scheme="light") as window:
        window.page.wait_for_timeout(500)
        assert window.page.evaluate("typeof globalThis.niivue") == "undefined"
        window.page.locator("#tsv-canvas").scroll_into_view_if_needed()
        window.ready()
        assert window.faults == []


def test_without_webgl_a_sentence_says_so(chromium, page):
    with opened(chromium, page, size=PHONE, scheme="light") as window:
        window.page.add_init_script("HTMLCanvasElement.prototype.getContext = () => null;")
        window.page.reload()
        assert "WebGL 2" in window.page.locator("#tsv-trouble").inner_text()
        assert not window.page.locator("#tsv-canvas").is_visible()
        assert window.faults == []
