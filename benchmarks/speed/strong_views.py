"""Two strong views of one left atrium patch: bias field, gamma and blur, with the very same parameters for everybody.

Every perturbation is applied to both views, where training applies them with probabilities of 0.8 and 0.5. What TailSeg draws
for a seed is drawn again here and handed to the others. The patch lies in [0, 1], where gamma means the same to all. Views are
compared away from the border: there TailSeg rescales the cut kernel, and scipy mirrors the image.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peers import load
from scipy import ndimage
from suite import Benchmark, Contestant, Settings
from torch import Tensor

from tailseg.data.phantom import make_case
from tailseg.parts.perturb import strong_view

SHAPE = (36, 36, 28) if "TAILSEG_SPEED_SMALL" in os.environ else (112, 112, 80)
ORDER = 3
VIEWS = 2
BORDER = 9
"""Voxels beside the border, out of reach of scipy's kernel, which ends 4 standard deviations of at most 2 voxels away."""
SEED = 3


@dataclass(frozen=True)
class View:
    """coefficients: of the powers of the three coordinates, in TorchIO's order. sigma: voxels."""

    coefficients: tuple[float, ...]
    gamma: float
    sigma: tuple[float, float, float]


def powers() -> list[tuple[int, int, int]]:
    """Exponents of the cubic's terms, in TorchIO's order."""
    every = range(ORDER + 1)
    return [(a, b, c) for a in every for b in every for c in every if a + b + c <= ORDER]


def views() -> list[View]:
    """What strong_view draws after torch.manual_seed(SEED): which are chosen, coefficients, gamma; then sigma."""
    torch.manual_seed(SEED)
    torch.rand(VIEWS, 1)
    grid = (torch.rand(VIEWS, (ORDER + 1) ** 3) - 0.5).view(VIEWS, *[ORDER + 1] * 3)
    gamma = (torch.rand(VIEWS, 1) - 0.5).exp()
    sigma = 0.1 + 1.9 * torch.rand(VIEWS, 3)
    return [
        View(
            tuple(float(grid[view, a, b, c]) for a, b, c in powers()),
            float(gamma[view]),
            (float(sigma[view, 0]), float(sigma[view, 1]), float(sigma[view, 2])),
        )
        for view in range(VIEWS)
    ]


def make_patch() -> Tensor:
    """(1, D, H, W) in [0, 1], both ends reached."""
    image, _ = make_case(0, shape=SHAPE, spacing=(3.0, 3.0, 3.0))
    voxels = torch.from_numpy(image.array.astype(np.float32))[None]
    return (voxels - voxels.min()) / (voxels.max() - voxels.min())


def inner(views: Tensor) -> Tensor:
    """(VIEWS, 1, D, H, W) without the border."""
    within = slice(BORDER, -BORDER)
    return views[..., within, within, within]


def mine(voxels: Tensor) -> Callable[[], Tensor]:
    def work() -> Tensor:
        torch.manual_seed(SEED)
        return inner(strong_view(voxels.expand(VIEWS, -1, -1, -1, -1), intensity=1.0, blur=1.0))

    return work


def plain(voxels: Tensor, drawn: Iterable[View]) -> Callable[[], Tensor]:
    """The polynomial evaluated at every voxel, term by term, and scipy's blur."""
    image = voxels[0].numpy()

    def work() -> Tensor:
        x, y, z = np.meshgrid(*(np.linspace(-1, 1, side) for side in SHAPE), indexing="ij")
        made = []
        for view in drawn:
            field = np.zeros(SHAPE)
            for coefficient, (a, b, c) in zip(view.coefficients, powers(), strict=True):
                field += coefficient * x**a * y**b * z**c
            bright = (image * np.exp(field).astype(np.float32)) ** np.float32(view.gamma)
            made.append(torch.from_numpy(ndimage.gaussian_filter(bright, view.sigma)))
        return inner(torch.stack(made)[:, None])

    return work


def crossmatch(checkout: Path, voxels: Tensor, drawn: list[View]) -> Callable[[], Tensor]:
    """Its LAHeart, from the read image on: its file holds the patch, its random numbers are the views', its boxes are none."""
    code = load(checkout / "LA" / "code", "dataloaders.la_heart", stubs=("h5py",))
    folder = {"image": voxels.numpy(), "label": np.zeros(SHAPE, np.uint8)}
    dataset: Any = code.LAHeart.__new__(code.LAHeart)
    dataset.image_list, dataset._base_dir, dataset.mode = ["a"], "", "train_u"
    dataset.transform = lambda sample: {key: torch.from_numpy(value) for key, value in sample.items()}
    tiot = code.tiot

    def work() -> Tensor:
        with ExitStack() as fixed:
            for kind, values in (
                (tiot.RandomBiasField, [list(view.coefficients) for view in drawn]),
                (tiot.RandomGamma, [view.gamma for view in drawn]),
                (tiot.RandomBlur, [view.sigma for view in drawn]),
            ):
                fixed.enter_context(patch.object(kind, "get_params", side_effect=values))
            fixed.enter_context(patch.object(random, "random", return_value=0.0))  # every perturbation is chosen
            fixed.enter_context(patch.object(code, "obtain_cutmix_box", return_value=None))
            fixed.enter_context(patch.object(code.h5py, "File", return_value=folder))
            _, first, second, *_ = dataset[0]
        return inner(torch.stack([first, second]))

    return work


def contestants(settings: Settings) -> list[Contestant]:
    voxels, drawn = make_patch(), views()
    found = [Contestant("tailseg", mine(voxels)), Contestant("plain", plain(voxels, drawn), own_allocator=True)]
    if "crossmatch" in settings.peers and importlib.util.find_spec("torchio") is None:
        print("  crossmatch is left out: its LAHeart needs torchio 0.19.3, which is not installed")
        settings = replace(settings, peers={})
    if "crossmatch" in settings.peers:
        work = crossmatch(settings.peers["crossmatch"], voxels, drawn)
        found.append(Contestant("crossmatch", work, own_allocator=True))
    return found


_TAIL = 1e-4  # what scipy's kernel, cut off at 4 standard deviations, lacks
BENCHMARKS = (
    Benchmark(
        "strong-views",
        "Two strong views of a left atrium patch of 112 x 112 x 80: cubic bias field, gamma and blur.",
        ">= 30x",
        contestants,
        tolerance={"plain": _TAIL, "crossmatch": _TAIL},
        remark=(
            "All perturbations are applied to both views. plain evaluates the polynomial voxel by voxel and blurs with scipy, "
            "whose kernel ends at 4 standard deviations, hence the difference. Compared is what lies 9 voxels from the border."
        ),
    ),
)
