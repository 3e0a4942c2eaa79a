"""A made-up abdomen: CT-like scans with the 13 organs of Synapse, for trying things out and for tests.

Organs are ellipsoids and tubes placed in mm (right, anterior, superior) about the first lumbar vertebra, bent by a smooth
random displacement, so that every case differs and small organs stay small: 700 voxels of liver to one of right adrenal.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from tailseg.data.image import Image, write_image
from tailseg.data.raw import DataError, RawDataset, read_raw
from tailseg.files import write_json

SPLIT = "phantom"
VAL, TEST = 2, 3
MESENTERY = -95  # HU of the fat between the organs
MIN_VOXELS = 8  # of every organ, however coarse the grid
_FIELD = np.array([320.0, 320.0, 240.0])  # mm of right, anterior, superior that the anatomy below is drawn for
_ORIENTATIONS = ((1, 1, 1), (-1, 1, 1), (-1, -1, 1))  # RAS, LAS, LPS: the signs of file axes i, j, k

Point = tuple[float, float, float]


@dataclass(frozen=True)
class Ellipsoid:
    """center and radii in mm (right, anterior, superior)."""

    center: Point
    radii: Point


@dataclass(frozen=True)
class Tube:
    """A bent tube through points in mm, its radius at each of them."""

    points: tuple[Point, ...]
    radii: tuple[float, ...]


@dataclass(frozen=True)
class Organ:
    """value: in the label files. hu: mean and its spread between patients. enhances: HU gained at full contrast phase."""

    name: str
    value: int
    hu: tuple[float, float]
    enhances: float
    wander: float  # mm by which its place varies between patients
    parts: tuple[Ellipsoid | Tube, ...]


# Later organs are drawn over earlier ones: the small ones last, so that none is lost.
ORGANS = (
    Organ("liver", 6, (58, 6), 50, 4, (
        Ellipsoid((74, 2, 38), (60, 80, 70)), Ellipsoid((15, 44, 52), (62, 38, 34)))),
    Organ("stomach", 7, (38, 8), 12, 6, (
        Tube(((-62, -8, 78), (-72, 18, 45), (-50, 48, 8), (-5, 52, -8)), (32, 34, 28, 17)),)),
    Organ("spleen", 1, (50, 4), 62, 5, (Ellipsoid((-92, -34, 40), (27, 42, 52)),)),
    Organ("right_kidney", 2, (34, 4), 125, 4, (Ellipsoid((58, -43, -38), (26, 28, 52)),)),
    Organ("left_kidney", 3, (34, 4), 125, 4, (Ellipsoid((-58, -43, -28), (26, 28, 54)),)),
    Organ("pancreas", 11, (42, 6), 52, 3, (
        Tube(((-72, -18, 22), (-38, 2, 18), (0, 14, 6), (26, 8, -12), (24, 4, -30)), (10, 11, 10, 14, 12)),)),
    Organ("gallbladder", 4, (8, 5), 2, 4, (Ellipsoid((52, 56, -30), (15, 18, 27)),)),
    Organ("inferior_vena_cava", 9, (40, 3), 85, 2, (
        Tube(((18, -32, -130), (20, -30, -20), (26, -22, 50), (24, -10, 110)), (10, 11, 12, 12)),)),
    Organ("aorta", 8, (42, 3), 140, 2, (
        Tube(((-4, -32, -130), (-8, -32, -20), (-12, -34, 50), (-16, -38, 130)), (9, 10, 11, 12)),)),
    Organ("esophagus", 5, (38, 5), 22, 2, (
        Tube(((-4, -14, 130), (-10, -10, 100), (-22, -4, 80), (-42, -2, 72)), (9, 9, 9, 9)),)),
    Organ("portal_and_splenic_vein", 10, (40, 3), 110, 1, (
        Tube(((-88, -30, 34), (-50, -10, 28), (-6, 0, 18), (14, 4, 16), (34, 8, 32), (52, 6, 44)), (5, 5.5, 6, 7.5, 7, 6)),
        Tube(((6, 4, 14), (8, 10, -8)), (6, 5)))),
    Organ("right_adrenal_gland", 12, (28, 5), 42, 1.5, (Ellipsoid((40, -42, 24), (5.2, 7.5, 9.5)),)),
    Organ("left_adrenal_gland", 13, (28, 5), 42, 1.5, (Ellipsoid((-36, -40, 32), (6, 8, 10.5)),)),
)  # fmt: skip
CLASSES = ("background", *(organ.name for organ in sorted(ORGANS, key=lambda organ: organ.value)))


def make_phantom(
    root: Path,
    *,
    cases: int = 16,
    labelled: int = 9,
    shape: tuple[int, int, int] = (48, 80, 80),
    spacing: tuple[float, float, float] = (5.0, 4.0, 4.0),
    seed: int = 0,
) -> RawDataset:
    """Write a data set in nnU-Net's raw layout with the split "phantom", the same for the same arguments.

    labelled: cases with label files, of which 2 are for validation and 3 for test. shape, spacing: (D, H, W), mm; the
    anatomy is scaled to fill them. An interrupted folder is completed. Raises DataError if root holds anything else.
    """
    if not VAL + TEST < labelled <= cases:
        raise DataError(
            f"labelled={labelled} of cases={cases}: {VAL + TEST} labelled cases go to validation and test, so give "
            f"from {VAL + TEST + 1} to {cases}."
        )
    if min(shape) < 8 or min(spacing) <= 0 or seed < 0:
        raise DataError(
            f"shape {shape} must be 8 or more along every axis, spacing {spacing} above 0, seed {seed} not below."
        )
    made = {"cases": cases, "labelled": labelled, "shape": list(shape), "spacing": list(spacing), "seed": seed}
    if not _may_write(root, made):
        raise DataError(f"{root} holds something other than the phantom {made}; give an empty folder, or delete it.")
    ids = [f"phantom_{index:03d}" for index in range(cases)]
    description = {
        "channel_names": {"0": "CT"},
        "labels": {name: value for value, name in enumerate(CLASSES)},
        "numTraining": labelled,
        "file_ending": ".nii.gz",
        "name": "Phantom",
        "phantom": made,
    }
    write_json(root / "dataset.json", description)
    for index, case in enumerate(ids):
        image, label = make_case(index, shape=shape, spacing=spacing, seed=seed)
        write_image(root / "imagesTr" / f"{case}_0000.nii.gz", image)
        if index < labelled:
            write_image(root / "labelsTr" / f"{case}.nii.gz", label)
    train = labelled - VAL - TEST
    split = {
        "labelled": ids[:train],
        "unlabelled": ids[labelled:],
        "val": ids[train : train + VAL],
        "test": ids[train + VAL : labelled],
    }
    write_json(root / "splits.json", {SPLIT: split})
    return read_raw(root)


def make_case(
    index: int,
    *,
    shape: tuple[int, int, int] = (48, 80, 80),
    spacing: tuple[float, float, float] = (5.0, 4.0, 4.0),
    seed: int = 0,
) -> tuple[Image, Image]:
    """One scan, int16 HU, and its labels, uint8: (D, H, W), turned and tilted in a way that depends on the index."""
    rng = np.random.default_rng([seed, index])
    affine = _affine(index, shape, spacing, rng)
    k, j, i = np.indices(shape, dtype=np.float32)
    grid = np.stack([i, j, k], axis=-1)
    scale = np.array(shape[::-1]) * spacing[::-1] / _FIELD * rng.uniform(0.96, 1.04, 3)
    drawn = (grid @ affine[:3, :3].T + affine[:3, 3]) / scale
    body = drawn.astype(np.float32)  # (D, H, W, 3) right, anterior, superior in mm
    body += np.stack([5 * _smooth(rng, shape, 0.22) for _ in range(3)], axis=-1)
    within = body + np.stack([3 * _smooth(rng, shape, 0.12) for _ in range(3)], axis=-1)  # organs vary more than bones
    hu, cavity = _draw_body(body, rng)
    hu = _draw_bowel(hu, rng)
    label = np.zeros(shape, np.uint8)
    texture = 4 * _smooth(rng, shape, 0.06)
    phase = rng.uniform(0.55, 1.0)  # portal venous contrast, weaker or stronger
    for organ in ORGANS:
        inside = _draw_organ(organ, within, cavity, rng)
        label[inside] = organ.value
        mean = rng.normal(*organ.hu) + phase * organ.enhances
        hu[inside] = mean + texture[inside]
    hu = ndimage.gaussian_filter(hu, 0.55)  # partial volume: no organ has a sharp border
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), (0.4, 0.7, 0.7))
    hu += rng.uniform(9, 16) * noise / noise.std()
    scan = np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
    return Image(scan, affine), Image(label, affine)


def _may_write(root: Path, made: dict[str, object]) -> bool:
    """Whether root is empty, or this very phantom, whole or interrupted."""
    if not root.exists():
        return True
    if not root.is_dir():
        return False
    try:
        return json.loads((root / "dataset.json").read_text(encoding="utf-8")).get("phantom") == made
    except (OSError, ValueError, AttributeError):
        return not any(root.iterdir())


def _affine(
    index: int, shape: tuple[int, int, int], spacing: tuple[float, float, float], rng: np.random.Generator
) -> np.ndarray:
    """RAS, LAS and LPS in turn, every third or so a few degrees oblique, spacing up to 4 % off; centred near 0."""
    signs = np.array(_ORIENTATIONS[index % len(_ORIENTATIONS)])
    steps = np.array(spacing[::-1]) * rng.uniform(0.96, 1.04, 3)
    angles = np.radians(rng.uniform(2, 5, 3) * rng.choice((-1, 1), 3)) * (index % 4 in (1, 2))
    affine = np.eye(4)
    affine[:3, :3] = _rotation(angles) * (signs * steps)
    centre = (np.array(shape[::-1]) - 1) / 2
    affine[:3, 3] = -affine[:3, :3] @ centre
    return affine


def _rotation(angles: np.ndarray) -> np.ndarray:
    """(3, 3), about the axes right, anterior, superior one after the other; angles in radians."""
    turned = np.eye(3)
    for axis, angle in enumerate(angles):
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[[first, second], [first, second]] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        turned = turn @ turned
    return turned


def _smooth(rng: np.random.Generator, shape: tuple[int, int, int], length: float) -> np.ndarray:
    """Smooth noise (D, H, W) float32 of mean 0 and standard deviation 1; length: of its waves, as part of the field."""
    noise = rng.standard_normal([round(1 / length) + 5] * 3, np.float32)
    for size in shape:
        places = np.linspace(2, noise.shape[0] - 3, size, dtype=np.float32)
        weights = np.exp(-0.5 * (places[:, None] - np.arange(noise.shape[0], dtype=np.float32)) ** 2 / 0.6**2)
        noise = np.tensordot(noise, weights, axes=(0, 1))  # the next axis comes to the front
    return (noise - noise.mean()) / noise.std()


def _draw_body(body: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """HU of everything but the organs, and the mask of the cavity within ribs and muscles, both (D, H, W)."""
    x, y, z = np.moveaxis(body, -1, 0)
    fat = rng.uniform(10, 24)  # mm under the skin
    width, depth = 128 + fat, 88 + fat
    skin = 1 - np.sqrt((x / width) ** 2 + ((y + 8) / (depth + 9)) ** 2)
    wall = 1 - np.sqrt((x / 128) ** 2 + ((y - 1) / 88) ** 2)
    hu = np.full(x.shape, -1000, np.float32)
    hu[skin > 0] = -105
    hu[(wall > 0) | ((skin * depth > 0.9 * fat) & (y < -40))] = 52
    cavity = (wall * 88 > 9) & (np.hypot(x / 1.3, y + 66) > 25)
    hu[cavity] = MESENTERY
    psoas = (np.hypot(np.abs(x) - 38 + z * 0.12, y + 50) < 15) & (z < 0)
    erector = np.hypot((np.abs(x) - 38) / 1.5, y + 78) < 18
    hu[psoas | erector] = 55
    # above the diaphragm, two domes: the right one stands higher
    dome = 106 - ((x - 60) / 75) ** 2 * 40 * (x > 0) - ((x + 60) / 75) ** 2 * 40 * (x <= 0) - ((y - 5) / 80) ** 2 * 70
    dome = dome - 12 * (x < 0)
    lung = cavity & (z > dome + 5) & (np.hypot(x / 1.3, y - 25) > 42)
    hu[lung] = -850
    hu[cavity & ~lung & (z > dome)] = 48
    hu[cavity & (z > dome) & (np.hypot(x / 1.3, y - 25) <= 42)] = 95  # heart
    disc = np.cos(2 * np.pi * z / 36) > 0.82
    vertebra = np.hypot(x / 1.15, y + 62) < 19
    hu[vertebra] = np.where(disc[vertebra], 85, 230)
    hu[vertebra & (np.hypot(x / 1.15, y + 62) > 16) & ~disc] = 420
    arch = np.hypot(x / 1.15, y + 90) < 12
    hu[arch] = 330
    hu[np.hypot(x, y + 89) < 7.5] = 25
    slope = z + 0.45 * (y + 60)  # ribs run downwards to the front
    rib = (np.abs(wall * 88 - 4.5) < 4) & (np.cos(2 * np.pi * slope / 30) > 0.72) & (z > -40 + 0.3 * y) & (y < 70)
    hu[rib] = 380
    return hu, cavity


def _draw_bowel(hu: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Loops of soft tissue with some gas in the fat that the organs leave."""
    folds = _smooth(rng, hu.shape, 0.09)
    free = hu == MESENTERY
    hu = np.where(free & (folds > 0.35), 32, hu)
    return np.where(free & (folds > 1.9), -650, hu).astype(np.float32)


def _draw_organ(organ: Organ, at: np.ndarray, cavity: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mask (D, H, W). at: (D, H, W, 3) mm of the anatomy, already bent."""
    moved = at - rng.normal(0, organ.wander, 3).astype(np.float32)
    growth = rng.normal(1, 0.05)
    depth = np.max([_depth(part, moved, growth) for part in organ.parts], axis=0)
    depth = np.where(cavity, depth, depth - np.float32(_FIELD.max()))
    # on a coarse grid an adrenal fits between the voxels: then take the voxels nearest to it
    least = np.partition(depth.ravel(), -MIN_VOXELS)[-MIN_VOXELS]
    return depth >= min(0.0, float(least))


def _depth(part: Ellipsoid | Tube, at: np.ndarray, growth: float) -> np.ndarray:
    """How deep in the part, about mm, below 0 outside."""
    if isinstance(part, Ellipsoid):
        radii = np.array(part.radii, np.float32) * growth
        return (1 - np.linalg.norm((at - np.array(part.center, np.float32)) / radii, axis=-1)) * radii.min()
    points = np.array(part.points, np.float32)
    depth = np.full(at.shape[:-1], -np.inf, np.float32)
    for start, end, r0, r1 in zip(points, points[1:], part.radii, part.radii[1:], strict=False):
        along = end - start
        share = np.clip((at - start) @ along / (along @ along), 0, 1)
        away = np.linalg.norm(at - start - share[..., None] * along, axis=-1)
        depth = np.maximum(depth, (r0 + (r1 - r0) * share) * growth - away)
    return depth
