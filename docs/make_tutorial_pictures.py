"""Draw the pictures of docs/tutorial.md into docs/pictures/.

    python docs/make_tutorial_pictures.py                      the phantom: a slice with its labels, and how rare its organs are
    python docs/make_tutorial_pictures.py --report REPORT      a report of it too, as a browser shows it (needs chromium)

Needs matplotlib, which is in the extra `dev`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tailseg.data.phantom import CLASSES, make_case

PICTURES = Path(__file__).parent / "pictures"
CASE = 5  # its file axes are LPS and not oblique
SLICES = (30, 25)  # planes of the case: the largest organs, and the adrenal glands
RARE = ("right_adrenal_gland", "left_adrenal_gland")


def colours() -> np.ndarray:
    """(K, 4), the background transparent; the rarest in red."""
    table = np.array([(0.0, 0.0, 0.0, 0.0), *plt.get_cmap("tab20")(np.linspace(0, 1, len(CLASSES) - 1))])
    for name in RARE:
        table[CLASSES.index(name)] = (1.0, 0.1, 0.1, 1.0)
    return table


def draw_slices() -> None:
    image, label = make_case(CASE, shape=(48, 160, 160), spacing=(5.0, 2.0, 2.0))
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.9), layout="constrained", facecolor="white")
    shown = (
        (SLICES[0], False, "a scan: that is all an unlabelled case is"),
        (SLICES[0], True, "a labelled case"),
        (SLICES[1], True, "red: the adrenal glands"),
    )
    for axis, (plane, labelled, title) in zip(axes, shown, strict=True):
        axis.imshow(image.array[plane], cmap="gray", vmin=-160, vmax=240)
        if labelled:
            axis.imshow(colours()[label.array[plane]], alpha=0.55 * (label.array[plane] > 0), interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    figure.savefig(PICTURES / "phantom_slices.png", dpi=130)
    plt.close(figure)


def draw_shares() -> None:
    labels = np.concatenate([make_case(index)[1].array.ravel() for index in range(9)])  # the labelled cases
    voxels = np.bincount(labels, minlength=len(CLASSES))
    shares = 100 * voxels[1:] / voxels[1:].sum()  # (K - 1,)
    order = np.argsort(shares)
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained", facecolor="white")
    bars = axis.barh(
        [CLASSES[1 + index].replace("_", " ") for index in order],
        shares[order],
        color=["#d62728" if CLASSES[1 + index] in RARE else "#4c8f8b" for index in order],
    )
    axis.bar_label(bars, [f"{shares[index]:.2g} %" for index in order], padding=3, fontsize=8)
    axis.set_xscale("log")
    axis.set_xlim(0.03, 250)
    axis.set_xlabel("share of the foreground's voxels in %, logarithmic", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURES / "phantom_shares.svg", metadata={"Date": None})
    plt.close(figure)


def draw_report(report: Path) -> None:
    """The first screen of a report."""
    browser = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if browser is None:
        sys.exit("no chromium here; install one, or leave --report away")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--window-size=1280,860",
        ]
        subprocess.run([*command, f"--screenshot={shot}", report.resolve().as_uri()], check=True, capture_output=True)
        shutil.copyfile(shot, PICTURES / "report.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="report.html that `tailseg run` made of the phantom")
    report = parser.parse_args().report
    PICTURES.mkdir(exist_ok=True)
    if report:
        draw_report(report)
    plt.rcParams["svg.hashsalt"] = "tailseg"  # the same bytes again
    draw_slices()
    draw_shares()


if __name__ == "__main__":
    main()
