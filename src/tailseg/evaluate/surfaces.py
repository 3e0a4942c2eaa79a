"""Where the surface of a mask runs, and how far two surfaces lie apart.

Masks are packed, 64 voxels of a line in a word: what has to look at every voxel looks at a word, a neighbour is a shift, and
only the few places on a surface are ever taken by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import product

import numpy as np
from scipy.ndimage import distance_transform_edt, label
from scipy.spatial import KDTree

Spacing = tuple[float, ...]

REACH = 3
"""Voxels in each direction that are looked up before a tree is asked."""
_LINES = 2000  # that a ball may have before a distance transform of every voxel is the faster way


class Grid:
    """How masks of one shape lie in a row of bits: with nothing around them, and their lines filled up to whole words.

    shape: (D, H, W) or (H, W). margin: voxels of nothing on both sides of every axis, 1 or more, and no fewer than the longest
    step along it: what goes beyond a line is in the next one.
    """

    def __init__(self, shape: Sequence[int], margin: Sequence[int]) -> None:
        *lead, line = (side + 2 * extra for side, extra in zip(shape, margin, strict=True))
        self.sides = (*lead, -(-line // 64) * 64)
        self.inside = tuple(slice(extra, extra + side) for side, extra in zip(shape, margin, strict=True))
        # of all axes but the last they are whole words
        self.strides = tuple(math.prod(self.sides[axis + 1 :]) for axis in range(len(shape)))

    def laid_out(self, mask: np.ndarray) -> np.ndarray:
        """(bits,) bool."""
        line = np.zeros(self.sides, bool)
        line[self.inside] = mask
        return line.ravel()

    def offsets(self, steps: np.ndarray) -> list[int]:
        """Of steps (N, dims) in voxels: in bits."""
        return (steps @ np.array(self.strides)).tolist()


def border_distances(
    pred: np.ndarray, ref: np.ndarray, unknown: np.ndarray | None, spacing: Spacing
) -> tuple[np.ndarray, np.ndarray]:
    """Of each border voxel of pred to the nearest one of ref, and the other way round, in units of spacing, in C order.

    pred, ref, unknown: (D, H, W) or (H, W) bool. A border voxel has a face neighbour that is neither in the mask nor unknown;
    the outside is neither. Both are empty where either has no border.
    """
    grid = Grid(pred.shape, (REACH,) * pred.ndim)
    beyond = None if unknown is None else _packed(grid.laid_out(unknown))
    places = [_places(_border(_packed(grid.laid_out(mask)), beyond, grid)) for mask in (pred, ref)]
    return _nearest(places[0], places[1], grid, spacing), _nearest(places[1], places[0], grid, spacing)


def areas_near(
    pred: np.ndarray, ref: np.ndarray, unknown: np.ndarray | None, spacing: Spacing, tolerance: float
) -> tuple[float, float] | None:
    """Area of both surfaces within tolerance of the other, and of both in all; None if either has none.

    pred, ref, unknown: (D, H, W) or (H, W) bool. A surface element lies between the 2 x 2 x 2 voxels (2 x 2 in 2D) around each
    corner of the grid; there is none beside unknown voxels.
    """
    limit = tolerance * (1 + 1e-9)  # sums of squares round: a distance of 2.0000000000000004 is one of 2
    # further than the far end of the box there is nothing
    ball = tuple(int(min(limit / mm, side + 1)) for side, mm in zip(pred.shape, spacing, strict=True))
    many = math.prod(2 * reach + 1 for reach in ball[:-1]) > _LINES
    grid = Grid(pred.shape, tuple(1 if many else reach + 1 for reach in ball))
    beside = None if unknown is None else ~_joined(_packed(grid.laid_out(unknown)), grid, np.bitwise_or)
    lines = [grid.laid_out(mask) for mask in (pred, ref)]
    cells = []
    for line in lines:
        words = _packed(line)
        cut = _joined(words, grid, np.bitwise_or) & ~_joined(words, grid, np.bitwise_and)
        cells.append(cut if beside is None else cut & beside)
    near = total = 0.0
    for line, own, other in zip(lines, cells, reversed(cells), strict=True):
        places = _places(own)
        if not places.size:
            return None
        areas = _element_areas(spacing)[_corner_codes(line, places, grid)]
        if many:
            away = np.asarray(distance_transform_edt(~_bits(other).reshape(grid.sides), spacing))
            close = away.ravel()[places] <= limit
        else:
            close = _bits(_grown(other, grid, ball, spacing, limit))[places]
        near, total = near + float(areas[close].sum()), total + float(areas.sum())
    return near, total


# --- packed masks


def _packed(line: np.ndarray) -> np.ndarray:
    """(bits,) bool -> (words,) uint64; bit 0 of a word comes first."""
    return np.packbits(line, bitorder="little").view("<u8")


def _bits(words: np.ndarray) -> np.ndarray:
    """The other way round."""
    return np.unpackbits(words.view(np.uint8), bitorder="little").view(bool)


def _places(words: np.ndarray) -> np.ndarray:
    """(N,) the bits that are set, in order."""
    octets = words.view(np.uint8)
    used = np.flatnonzero(octets)
    row, bit = np.unpackbits(octets[used], bitorder="little").reshape(-1, 8).nonzero()
    return used[row] * 8 + bit


def _moved(words: np.ndarray, by: int) -> np.ndarray:
    """Every bit goes by places up, down if by is negative; what comes in is 0."""
    whole, rest = divmod(by, 64)
    moved = np.zeros_like(words)
    _or_into(moved, words << np.uint64(rest) if rest else words, whole)
    if rest:
        _or_into(moved, words >> np.uint64(64 - rest), whole + 1)
    return moved


def _or_into(target: np.ndarray, words: np.ndarray, by: int) -> None:
    """target |= words moved by whole words."""
    kept, first = max(0, len(words) - abs(by)), max(0, by)
    part = target[first : first + kept]
    np.bitwise_or(part, words[first - by : first - by + kept], out=part)


def _border(mask: np.ndarray, unknown: np.ndarray | None, grid: Grid) -> np.ndarray:
    solid = mask if unknown is None else mask | unknown
    inner = mask.copy()
    for stride in grid.strides:
        inner &= _moved(solid, stride)
        inner &= _moved(solid, -stride)
    return mask & ~inner


def _joined(mask: np.ndarray, grid: Grid, join: np.ufunc) -> np.ndarray:
    """For each corner of the grid (its first is where voxel 0 is) the voxels around it, joined by or, or by and."""
    for stride in grid.strides:
        mask = join(mask, _moved(mask, stride))
    return mask


def _grown(mask: np.ndarray, grid: Grid, ball: tuple[int, ...], spacing: Spacing, limit: float) -> np.ndarray:
    """All within limit of mask. ball: how many voxels that is along each axis."""
    *lead, last = ball
    reaches = [range(-reach, reach + 1) for reach in lead]
    grown = np.zeros_like(mask)
    rows: list[tuple[float, int]] = []  # how far a line may reach along the last axis, and where it lies, in words
    for step in product(*reaches):
        left = limit**2 - sum((voxels * mm) ** 2 for voxels, mm in zip(step, spacing, strict=False))
        if left >= 0:
            rows.append((math.sqrt(left), sum(n * stride for n, stride in zip(step, grid.strides, strict=False)) // 64))
    wide = mask  # and what lies up to reach voxels beside it
    for reach in range(last + 1):
        if reach:
            wide = wide | _moved(mask, reach) | _moved(mask, -reach)
        for length, by in rows:
            if int(min(length / spacing[-1], last)) == reach:
                _or_into(grown, wide, by)
    return grown


# --- areas


def _corner_codes(line: np.ndarray, places: np.ndarray, grid: Grid) -> np.ndarray:
    """(N,) uint8, one bit for each voxel around the corners at places."""
    voxels, codes = line.view(np.uint8), np.zeros(len(places), np.uint8)
    around = np.array(list(product((-1, 0), repeat=len(grid.sides))))
    for bit, offset in enumerate(grid.offsets(around)):
        codes |= voxels[places + offset] << np.uint8(bit)
    return codes


@cache
def _element_areas(spacing: Spacing) -> np.ndarray:
    """Area of the surface within a cell for each code of its corners; length in 2D.

    The surface cuts edges at their midpoints. By the divergence theorem the vector area of a piece of it along an axis
    is the difference in covered area between the two faces of the cell across that axis. Corners that touch only along
    a diagonal bound separate pieces.
    """
    dims = len(spacing)
    face_areas = [float(np.prod(spacing)) / side for side in spacing]
    areas = np.zeros(2 ** (2**dims))
    for code in range(areas.size):
        corners = np.array([code >> bit & 1 for bit in range(2**dims)], bool).reshape((2,) * dims)
        pieces = np.empty(corners.shape, np.int32)
        label(corners, output=pieces)
        for piece in range(1, pieces.max() + 1):
            covered = [[_covered(face) for face in np.moveaxis(pieces == piece, axis, 0)] for axis in range(dims)]
            areas[code] += np.hypot.reduce([(a - b) * face for (a, b), face in zip(covered, face_areas, strict=True)])
    return areas


def _covered(face: np.ndarray) -> float:
    """The share of a face (an edge in 2D) on the inner side of a surface that cuts edges at their midpoints."""
    inside = int(face.sum())
    if face.ndim == 1:
        return inside / 2
    diagonal = inside == 2 and face[0, 0] == face[1, 1]
    return 1 / 4 if diagonal else (0, 1 / 8, 1 / 2, 7 / 8, 1)[inside]


# --- distances


@cache
def _short_steps(spacing: Spacing) -> tuple[np.ndarray, np.ndarray]:
    """The shortest steps on the grid (N, dims), shortest first, and their lengths (N,); no shorter one is missing."""
    steps = np.array(list(product(range(-REACH, REACH + 1), repeat=len(spacing))))
    lengths = np.sqrt(np.square(steps * spacing).sum(axis=1))
    # 64: beyond, looking up the few voxels that are left costs more than a tree
    order = np.argsort(lengths, kind="stable")[:64]
    order = order[lengths[order] < (REACH + 1) * min(spacing)]
    return steps[order], lengths[order]


def _nearest(points: np.ndarray, surface: np.ndarray, grid: Grid, spacing: Spacing) -> np.ndarray:
    """Distance (N,) from each of points to the nearest of surface, both (N,) places; empty if either is.

    Most surfaces of a fair prediction lie within a few voxels of each other: nearby voxels are looked up in the order
    of their distance, and only what is further away asks a tree.
    """
    if not points.size or not surface.size:
        return np.empty(0)
    found = np.zeros(math.prod(grid.sides), bool)
    found[surface] = True
    distances, at, left = np.empty(points.size), points, np.arange(points.size)
    steps, lengths = _short_steps(spacing)
    for offset, length in zip(grid.offsets(steps), lengths.tolist(), strict=True):
        hit = found[at + offset]
        distances[left[hit]] = length
        miss = ~hit
        at, left = at[miss], left[miss]
        if not left.size:
            return distances
    # points of a grid are spread evenly: balancing the tree costs more than it saves
    tree = KDTree(_in_mm(surface, grid, spacing), leafsize=32, compact_nodes=False, balanced_tree=False)
    distances[left] = tree.query(_in_mm(at, grid, spacing))[0]
    return distances


def _in_mm(places: np.ndarray, grid: Grid, spacing: Spacing) -> np.ndarray:
    """(N, dims), in units of spacing."""
    return np.stack(np.unravel_index(places, grid.sides), axis=1) * spacing
