"""Scans for a page's 3D viewer, and a browser that notes what a page should not do."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from tailseg.data.image import Image, write_image
from tailseg.data.phantom import CLASSES, make_case
from tailseg.report.viewer import ViewerCase

FLAGS = (
    "--no-sandbox",
    "--use-angle=swiftshader",  # WebGL 2 without a graphics card
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
    "--disable-background-networking",
    "--disable-component-update",
)
LOCAL = ("file:", "data:", "blob:")


def phantom_cases(folder: Path, *, shape: tuple[int, int, int] = (32, 48, 48)) -> list[ViewerCase]:
    """Two test cases, the first without its rarest class in the prediction, one for validation and one unlabelled."""
    spacing = (240 / shape[0], 320 / shape[1], 320 / shape[2])
    cases = []
    for index, (group, score) in enumerate((("test", 0.5), ("test", 0.75), ("validation", None), ("unlabelled", None))):
        image, label = make_case(index, shape=shape, spacing=spacing)
        predicted = np.roll(label.array, 1, axis=2)
        if index == 0:
            predicted[predicted == len(CLASSES) - 1] = 0
        paths = [folder / f"{name}_{index}.nii.gz" for name in ("image", "prediction", "reference")]
        written = (image, Image(predicted, label.affine), label)
        for path, one in zip(paths, written, strict=True):
            write_image(path, one)
        reference = None if group == "unlabelled" else paths[2]
        cases.append(ViewerCase(f"phantom_{index}", group, paths[0], paths[1], reference, score))
    return cases


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Headless Chromium. Skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="drives the browser: pip install 'tailseg[test]'")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium or Chrome is installed")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, args=list(FLAGS))
        yield opened
        opened.close()


@dataclass
class Opened:
    """A page in a window, and what it did wrong: errors, warnings, and what it asked of the network."""

    page: Any
    faults: list[str] = field(default_factory=list)

    def ready(self) -> None:
        """Waits for the 3D viewer to show its scan."""
        self.page.wait_for_function(
            "() => document.querySelector('#tsv-loading').textContent === ''"
            " && document.querySelector('#tsv-here').textContent !== ''"
        )

    def choose(self, group: str, value: str) -> None:
        self.page.locator(f"#tsv-{group} label", has=self.page.locator(f"input[value={value}]")).click()

    def pixels(self) -> np.ndarray:
        """(H, W, 3) uint8 of the viewer's picture."""
        shot = self.page.locator("#tsv-canvas").screenshot()
        return np.asarray(Pillow.open(io.BytesIO(shot)).convert("RGB"))

    def where(self, colour: str) -> np.ndarray:
        """(N, 2) rows and columns of the picture in a colour like "#2a78d6", to a few grey levels."""
        wanted = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)])
        return np.argwhere(np.abs(self.pixels().astype(int) - wanted).max(-1) <= 6)

    def coloured(self, colour: str) -> int:
        """How many pixels that are."""
        return len(self.where(colour))

    def overflow(self) -> int:
        """CSS pixels by which the document is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@contextlib.contextmanager
def opened(browser: Any, path: Path, *, size: tuple[int, int], scheme: str, **options: Any) -> Iterator[Opened]:
    """The file in a window of its own. scheme: "light" or "dark"."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, **options)
    context.set_default_timeout(90_000)
    window = Opened(context.new_page())
    window.page.on("console", lambda said: said.type in ("error", "warning") and window.faults.append(said.text))
    window.page.on("pageerror", lambda error: window.faults.append(str(error)))
    window.page.on("request", lambda asked: asked.url.startswith(LOCAL) or window.faults.append(asked.url))
    window.page.goto(path.as_uri())
    yield window
    context.close()
