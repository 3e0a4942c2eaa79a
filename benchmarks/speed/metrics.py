"""Dice, HD95, ASD, ASSD and NSD of 13 organs in full resolution, and of a whole test set by several workers."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from suite import Benchmark, Contestant, Settings

from tailseg.data.image import Image, write_image
from tailseg.data.phantom import CLASSES, make_case
from tailseg.evaluate.metrics import asd, assd, compare_classes, dice, hd95, nsd

SHAPE, SPACING = (150, 512, 512), (3.0, 0.8, 0.8)
TOLERANCE = 2.0  # mm, of NSD
CASES, CASE_SHAPE = 8, (76, 256, 256)
"""Of the test set that workers share."""


# --- what is compared


@cache
def abdomen(shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Labels (D, H, W) uint8 of a phantom: drawn at half the resolution, its masks interpolated to the whole."""
    d, h, w = (side // 2 for side in shape)
    z, y, x = (2 * mm for mm in SPACING)
    _, label = make_case(0, shape=(d, h, w), spacing=(z, y, x))
    padded, whole = np.pad(label.array, 1), np.zeros(shape, np.uint8)
    for value, box in enumerate(ndimage.find_objects(label.array), start=1):
        wider = tuple(slice(side.start, side.stop + 2) for side in box)  # a voxel more on every side
        mask = (padded[wider] == value).astype(np.float32)
        fine = np.asarray(ndimage.zoom(mask, 2, order=1, mode="nearest", grid_mode=True))[2:-2, 2:-2, 2:-2] >= 0.5
        whole[tuple(slice(2 * side.start, 2 * side.stop) for side in box)][fine] = value
    return whole


def predicted(ref: np.ndarray) -> np.ndarray:
    """A fair prediction of ref: each organ a little elsewhere, worn off on its rim; one has a piece far away."""
    pred = np.zeros_like(ref)
    for value in range(1, len(CLASSES)):
        organ = ndimage.shift((ref == value).view(np.uint8), (value % 2, 1, -(value % 3)), order=0).view(bool)
        pred[np.array(ndimage.binary_erosion(organ), bool) if value % 2 else organ] = value
    pred[5:8, 20:26, 20:26] = 1
    return pred


# --- the contestants: (13 organs, 5 values)


def tailseg(pred: np.ndarray, ref: np.ndarray) -> dict[str, list[float]]:
    comparisons = compare_classes(pred, ref, len(CLASSES), SPACING)
    return {
        "dice": [dice(each) for each in comparisons],
        "hd95": [hd95(each) for each in comparisons],
        "asd": [asd(each) for each in comparisons],
        "assd": [assd(each) for each in comparisons],
        "nsd": [nsd(each, TOLERANCE) for each in comparisons],
    }


def plain(pred: np.ndarray, ref: np.ndarray) -> dict[str, list[float]]:
    """Whole volumes, a distance transform for each surface; NSD over border voxels is another number, so it is left out."""

    def border(mask: np.ndarray) -> np.ndarray:
        return mask & np.logical_not(ndimage.binary_erosion(mask))

    found: dict[str, list[float]] = {"dice": [], "hd95": [], "asd": [], "assd": []}
    for value in range(1, len(CLASSES)):
        a, b = pred == value, ref == value
        edge_a, edge_b = border(a), border(b)
        to_b = np.asarray(ndimage.distance_transform_edt(~edge_b, SPACING))[edge_a]
        to_a = np.asarray(ndimage.distance_transform_edt(~edge_a, SPACING))[edge_b]
        both = np.concatenate([to_b, to_a])
        found["dice"].append(2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b)))
        found["hd95"].append(float(np.percentile(both, 95)))
        found["asd"].append(float(to_b.mean()))
        found["assd"].append(float(both.mean()))
    return found


def medpy(pred: np.ndarray, ref: np.ndarray) -> dict[str, list[float]]:
    from medpy.metric import binary

    found: dict[str, list[float]] = {"dice": [], "hd95": [], "asd": [], "assd": []}
    for value in range(1, len(CLASSES)):
        a, b = pred == value, ref == value
        found["dice"].append(float(binary.dc(a, b)))
        for name in ("hd95", "asd", "assd"):
            found[name].append(float(getattr(binary, name)(a, b, SPACING)))
    return found


def surface_distance(pred: np.ndarray, ref: np.ndarray) -> dict[str, list[float]]:
    """HD95 and mean distances of it are over surface elements, weighted by area: other numbers, made here but not compared."""
    import surface_distance as theirs

    found: dict[str, list[float]] = {"dice": [], "nsd": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for value in range(1, len(CLASSES)):
            a, b = pred == value, ref == value
            distances = theirs.compute_surface_distances(b, a, SPACING)
            theirs.compute_robust_hausdorff(distances, 95)
            theirs.compute_average_surface_distance(distances)
            found["dice"].append(float(theirs.compute_dice_coefficient(b, a)))
            found["nsd"].append(float(theirs.compute_surface_dice_at_tolerance(distances, TOLERANCE)))
    return found


def monai(pred: np.ndarray, ref: np.ndarray) -> dict[str, list[float]]:
    """Its HD95 is the larger of both directions', and its NSD counts voxels: made here but not compared."""
    import torch
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.meandice import compute_dice
    from monai.metrics.surface_dice import compute_surface_dice
    from monai.metrics.surface_distance import compute_average_surface_distance

    a, b = (
        torch.from_numpy(np.stack([labels == value for value in range(len(CLASSES))])[None]) for labels in (pred, ref)
    )
    compute_hausdorff_distance(a, b, percentile=95, spacing=SPACING)
    compute_surface_dice(a, b, [TOLERANCE] * (len(CLASSES) - 1), spacing=SPACING)
    found = {
        "dice": compute_dice(a, b, include_background=False),
        "asd": compute_average_surface_distance(a, b, spacing=SPACING),
        "assd": compute_average_surface_distance(a, b, symmetric=True, spacing=SPACING),
    }
    return {name: values[0].tolist() for name, values in found.items()}


Measure = Callable[[np.ndarray, np.ndarray], dict[str, list[float]]]


def against(compared: Sequence[str], others: Mapping[str, Measure]) -> Callable[[Settings], Sequence[Contestant]]:
    """TailSeg, which makes all five, beside others that can be imported; compared: the metrics whose definitions agree."""

    def contestants(settings: Settings) -> Sequence[Contestant]:
        ref = abdomen()
        pred = predicted(ref)

        def work(measure: Measure) -> Callable[[], Any]:
            def values() -> dict[str, list[float]]:
                found = measure(pred, ref)
                return {name: found[name] for name in compared}

            return values

        here = {name: measure for name, measure in others.items() if name == "plain" or find_spec(name)}
        first = Contestant("tailseg", work(tailseg))
        return [first, *(Contestant(name, work(measure), own_allocator=True) for name, measure in here.items())]

    return contestants


# --- a whole test set

SCORING = """
import sys, time
from pathlib import Path
from tailseg.evaluate.protocols import PROTOCOLS
from tailseg.evaluate.scores import score_folder
if __name__ == "__main__":
    folder, workers, cases = Path(sys.argv[1]), int(sys.argv[2]), sorted(sys.argv[3:])
    start = time.perf_counter()
    score_folder(folder / "pred", folder / "ref", [PROTOCOLS["native"]], cases=cases, workers=workers)
    status = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else "VmHWM: nan"
    print(time.perf_counter() - start, 1024 * float(status.split("VmHWM:")[1].split()[0]))
"""


def test_set(folder: Path, cases: int) -> list[str]:
    """Writes references and predictions; returns the cases."""
    ref = abdomen(CASE_SHAPE)
    pred = predicted(ref)
    affine = np.diag([*SPACING[::-1], 1.0])
    names = [f"case_{index:02}" for index in range(cases)]
    for kind, labels in (("ref", ref), ("pred", pred)):
        (folder / kind).mkdir()
        values = {name: value for value, name in enumerate(CLASSES)}
        (folder / kind / "labels.json").write_text(json.dumps({"labels": values}))
        for index, name in enumerate(names):
            write_image(folder / kind / f"{name}.nii.gz", Image(np.roll(labels, 8 * index, axis=2), affine))
    return names


def scored(folder: Path, cases: Sequence[str], workers: int) -> tuple[float, float]:
    """Seconds by the clock, and peak bytes of the process, of scoring in a fresh one."""
    command = [sys.executable, "-c", SCORING, str(folder), str(workers), *cases]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak = map(float, done.stdout.split())
    return seconds, peak


def test_set_facts(settings: Settings) -> Mapping[str, str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = test_set(folder, 2 * CASES)
        one, two = scored(folder, cases[:CASES], 1)[0], scored(folder, cases[:CASES], 2)[0]
        few, many = (scored(folder, cases[:number], 2)[1] / 1e6 for number in (CASES // 2, 2 * CASES))
    size = "x".join(map(str, CASE_SHAPE))
    return {
        f"`tailseg evaluate` of {CASES} cases of {size}, by the clock": f"{one:.2f} s by 1 worker, {two:.2f} s by 2: "
        f"{one / two:.2f} times as fast",
        "Its peak memory by 2 workers": f"{few:.0f} MB for {CASES // 2} cases, {many:.0f} MB for {2 * CASES}",
    }


ALL_FIVE = "Dice, HD95, ASD, ASSD and NSD of 13 organs of a phantom of 150x512x512 voxels, 3.0x0.8x0.8 mm"

BENCHMARKS = (
    Benchmark(
        "metrics",
        f"{ALL_FIVE}; the others have no NSD, or define it otherwise, and make the other four.",
        ">= 300x MedPy",
        against(("dice", "hd95", "asd", "assd"), {"plain": plain, "medpy": medpy}),
        {"plain": 1e-9, "medpy": 1e-9},
        test_set_facts,
    ),
    Benchmark(
        "metrics-surface-distance",
        f"{ALL_FIVE}; surface-distance weighs its distances by area, so that Dice and NSD are compared.",
        ">= 4x surface-distance",
        against(("dice", "nsd"), {"surface_distance": surface_distance}),
        {"surface_distance": 0.003},
    ),
    Benchmark(
        "metrics-monai",
        f"{ALL_FIVE}; MONAI's HD95 and NSD are defined otherwise, so that Dice, ASD and ASSD are compared.",
        "faster than MONAI",
        against(("dice", "asd", "assd"), {"monai": monai}),
        {"monai": 1e-5},
        remark="MONAI computes in float32.",
    ),
)
