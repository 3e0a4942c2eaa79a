"""Does the exported network do what TailSeg does? Loaded back fresh, on real patches and on one whole scan."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from tailseg.core import Batch, Method, Progress, StepOutput
from tailseg.data.image import Image, ImageError, read_geometry, read_image, write_image
from tailseg.data.preparation import prepare_case
from tailseg.data.raw import Case, DataError, load_images
from tailseg.evaluate.predict import Predictor
from tailseg.export import monai_bundle
from tailseg.export.trained import ExportError, TrainedModel
from tailseg.runtime import Runtime, RuntimeOptions

Network = Callable[[Tensor], Tensor]
PROBABILITY_LIMIT = 1e-4
EQUAL_VOXELS = 0.9999
EQUAL_VOXELS_MONAI = 0.999
_RUNTIME = Runtime(torch.device("cpu"), RuntimeOptions(device="cpu", precision="fp32", channels_last=False))


@dataclass(frozen=True)
class Scan:
    """What the check runs on. what: in words, for the card; it names no case. real: whether it is a scan of the data set."""

    what: str
    image: Image
    real: bool


@dataclass(frozen=True)
class Checked:
    """probability_difference: largest, over patches and classes. equal_voxels: share of the scan's voxels with the same label.
    dice: class -> of the two label maps, for the classes that either has."""

    on: str
    real: bool
    patches: int
    probability_difference: float
    probability_limit: float
    voxels: int
    equal_voxels: float
    equal_voxels_limit: float
    dice: dict[str, float]
    by: str

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def sentences(self) -> list[str]:
        least = min(self.dice.values(), default=1.0)
        patches = (
            f"Patches: {self.patches}, cut from {self.on}; largest difference of a probability "
            f"{self.probability_difference:.1e} (limit {self.probability_limit:.0e})."
        )
        scan = (
            f"Labels of {self.on}, {self.by}: {100 * self.equal_voxels:.4f} % of {self.voxels} voxels equal (limit "
            f"{100 * self.equal_voxels_limit:g} %); lowest Dice of a class between the two {least:.4f}."
        )
        if len(self.dice) == 1:
            scan += f" All of them are {next(iter(self.dice))}, so that this says little."
        return [patches, scan]


@final
class _StandIn(Method):
    """A network in the place of a method."""

    def __init__(self, like: Method, network: Network) -> None:
        super().__init__(like.task)
        self.network = network

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        raise NotImplementedError

    def predict(self, x: Tensor) -> Tensor:
        return self.network(x)


def check_network(model: TrainedModel, network: Network, scan: Scan, *, other_size: tuple[int, ...] | None) -> Checked:
    """Raises ExportError where the network differs from the model's own prediction. other_size: of one more
    patch, where not only the usual size is promised."""
    difference, patches = patch_difference(model, network, scan, other_size)
    ours = labels(model, reference(model), scan.image)
    theirs = labels(model, network, scan.image)
    by = "both through TailSeg's sliding windows"
    return _judged(model, scan, difference, patches, ours, theirs, EQUAL_VOXELS, by)


def check_bundle(
    model: TrainedModel, network: Network, folder: Path, scan: Scan, *, other_size: tuple[int, ...] | None
) -> Checked:
    """As check_network, but the labels are those that the whole bundle makes of the scan's NIfTI files. network: with the axes
    (D, H, W)."""
    difference, patches = patch_difference(model, network, scan, other_size)
    ours = labels(model, reference(model), scan.image)
    with tempfile.TemporaryDirectory() as name:
        scans, output = Path(name) / "scans", Path(name) / "labels"
        for number, channel in enumerate(scan.image.array):
            write_image(scans / f"case_{number:04d}.nii.gz", Image(np.ascontiguousarray(channel), scan.image.affine))
        monai_bundle.run_bundle(folder, scans, output)
        made = read_image(output / "case.nii.gz").array
    values = np.array(model.label_values)
    theirs = np.searchsorted(values, made.astype(np.int64)).astype(np.uint8)
    by = "TailSeg's against what the bundle made of it in a process of its own, preparation and all"
    return _judged(model, scan, difference, patches, ours, theirs, EQUAL_VOXELS_MONAI, by)


def _judged(
    model: TrainedModel,
    scan: Scan,
    difference: float,
    patches: int,
    ours: np.ndarray,
    theirs: np.ndarray,
    limit: float,
    by: str,
) -> Checked:
    if ours.shape != theirs.shape:
        raise ExportError(f"the exported network made labels of the shape {theirs.shape}, TailSeg {ours.shape}.")
    equal = float((ours == theirs).mean())
    dice = {}
    for index, name in enumerate(model.task.classes):
        a, b = ours == index, theirs == index
        if total := int(a.sum()) + int(b.sum()):
            dice[name] = 2 * int((a & b).sum()) / total
    if equal < limit:
        raise ExportError(
            f"only {100 * equal:.3f} % of the voxels of {scan.what} get the same label from the exported network as from "
            f"TailSeg; at least {100 * limit:g} % must. Nothing was written."
        )
    return Checked(
        scan.what, scan.real, patches, difference, PROBABILITY_LIMIT, ours.size, equal, limit, dice, by
    )  # fmt: skip


def reference(model: TrainedModel) -> Network:
    """What TailSeg predicts: the methods themselves, as they were loaded."""
    for method in model.methods:
        method.to("cpu", torch.float32).eval()

    def mean(x: Tensor) -> Tensor:
        return torch.stack([method.predict(x) for method in model.methods]).mean(0)

    return mean


def labels(model: TrainedModel, network: Network, image: Image) -> np.ndarray:
    """(D, H, W) uint8 class indices on the scan's own grid, by TailSeg's Predictor around the network."""
    recipe = model.recipe
    predictor = Predictor(
        _StandIn(model.methods[0], network),
        recipe.data.prepare,
        recipe.data.patch_size,
        _RUNTIME,
        overlap=recipe.evaluate.overlap,
        weighting=recipe.evaluate.weighting,
        batch_size=recipe.evaluate.batch,
    )
    return predictor.labels(image)


def patch_difference(
    model: TrainedModel, network: Network, scan: Scan, other_size: tuple[int, ...] | None
) -> tuple[float, int]:
    """Largest difference of a probability, and over how many patches. One patch alone, two together, and one of
    other_size. Raises ExportError above the limit."""
    prepared = torch.from_numpy(prepare_case(scan.image, None, model.recipe.data.prepare).image)
    size = model.recipe.data.patch_size
    batches = [_patches(prepared, size, [0.5]), _patches(prepared, size, [0.3, 0.7])]
    if other_size is not None:
        batches.append(_patches(prepared, other_size, [0.5]))
    own = reference(model)
    worst = 0.0
    with torch.inference_mode():
        for x in batches:
            ours, theirs = own(x), network(x)
            if ours.shape != theirs.shape or not bool(torch.isfinite(theirs).all()):
                raise ExportError(
                    f"the exported network made {tuple(theirs.shape)} of {tuple(x.shape)}, or no numbers."
                )
            worst = max(worst, float((ours - theirs).abs().max()))
    if worst > PROBABILITY_LIMIT:
        raise ExportError(
            f"probabilities of the exported network differ by up to {worst:.1e} from TailSeg's, more than "
            f"{PROBABILITY_LIMIT:.0e}. Nothing was written."
        )
    return worst, sum(len(x) for x in batches)


def _patches(image: Tensor, size: tuple[int, ...], places: list[float]) -> Tensor:
    """(B, C, *size) of a prepared image (C, D, H, W), padded with 0 where it is smaller.

    places: of each patch, as a share of the way.
    """
    sides = (1, *size)[-3:]
    cut = []
    for place in places:
        patch = torch.zeros(len(image), *sides)
        starts = [int(place * max(0, have - want)) for have, want in zip(image.shape[1:], sides, strict=True)]
        part = image[:, *(slice(start, start + side) for start, side in zip(starts, sides, strict=True))]
        patch[:, *(slice(0, side) for side in part.shape[1:])] = part
        cut.append(patch)
    x = torch.stack(cut)
    return x.squeeze(2) if len(size) == 2 else x


def find_scan(model: TrainedModel) -> Scan:
    """The smallest validation scan, else the smallest labelled one, else one of made-up noise."""
    dataset = model.dataset
    reason = model.unreachable
    for each, words in (("val", "a validation scan"), ("labelled", "a labelled training scan")):
        if dataset is None:
            break
        cases = [dataset.cases[case] for case in getattr(model.splits[0], each) if case in dataset.cases]
        try:
            if cases:
                smallest = min(cases, key=_voxels)
                return Scan(words, load_images(smallest, model.task.in_channels), True)
        except (ImageError, DataError, OSError) as error:
            reason = str(error)
    return Scan(f"a made-up volume of noise, because the data set was not there ({reason})", _noise(model), False)


def _voxels(case: Case) -> int:
    return prod(read_geometry(case.images[0])[0])


def _noise(model: TrainedModel) -> Image:
    """Smooth blobs whose intensities reach over the range that the preparation looks at, about one and a half patches wide."""
    recipe, prepare = model.recipe, model.recipe.data.prepare
    sides = (4, *recipe.data.patch_size)[-3:]
    spacing = [1.0 if side is None else side for side in prepare.spacing or (1.0, 1.0, 1.0)]
    shape = [side + side // 2 for side in sides]
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, model.task.in_channels, *(max(2, side // 6) for side in shape), generator=generator)
    array = torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear")[0].numpy()
    intensity: Any = prepare.intensity
    if intensity.name == "window":
        middle, half = (intensity.low + intensity.high) / 2, (intensity.high - intensity.low) / 2
        array = middle + half * array
    if prepare.crop:
        array = np.maximum(array, prepare.crop.threshold + 1)
    return Image(array.astype(np.float32), np.diag([*spacing[::-1], 1.0]))
