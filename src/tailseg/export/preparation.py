"""How a scan becomes patches and probabilities become labels, in enough detail to write it anew: as JSON and in prose."""

from __future__ import annotations

from typing import Any

from tailseg.data.intensity import MinMax, Percentiles, Window, ZScore
from tailseg.data.preparation import Preparation
from tailseg.export.network import AXES, PredictionNetwork, Traced
from tailseg.export.trained import TrainedModel

FILE = "preparation.json"


def describe(model: TrainedModel, network: PredictionNetwork, traced: Traced | None) -> dict[str, Any]:
    """Plain values for preparation.json. traced: None where TailSeg itself runs the network."""
    recipe = model.recipe
    patch, evaluate = recipe.data.patch_size, recipe.evaluate
    sides = list(patch)
    order = "(W, H, D)" if network.reverse_axes else "(D, H, W)"
    if len(sides) == 2:
        order = "(W, H)" if network.reverse_axes else "(H, W)"
    return {
        "tailseg_preparation": 1,
        "axes": "Scans are (C, D, H, W): the file's axes i, j, k reversed, so that W runs along i. Distances are in mm.",
        "channels": list(model.channels),
        "steps": _steps(recipe.data.prepare),
        "settings": recipe.data.prepare.model_dump(mode="json"),
        "network": {
            "input": {
                "name": "patch",
                "dtype": "float32",
                "axes": f"(B, C, *S), S = {order}",
                "channels": model.task.in_channels,
                "patch_size": sides[::-1] if network.reverse_axes else sides,
                "batch": "any number from 1",
                "size": _sizes(network, traced),
            },
            "output": {
                "name": "probabilities",
                "dtype": "float32",
                "axes": f"(B, K, *S), S = {order}",
                "classes": model.task.num_classes,
                "values": "0 to 1, summing to 1 over the classes: softmax is inside",
            },
            "averaged_over": list(model.names) if len(model.methods) > 1 else [],
        },
        "windows": {
            "patch_size": sides,
            "slices": len(sides) == 2,
            "overlap": evaluate.overlap,
            "stride": [stride(side, evaluate.overlap) for side in sides],
            "weighting": evaluate.weighting,
            "steps": _window_steps(sides, evaluate.overlap, evaluate.weighting),
        },
        "restoring": _restoring(recipe.data.prepare),
        "classes": [
            {"index": index, "name": name, "label_value": value}
            for index, (name, value) in enumerate(zip(model.task.classes, model.label_values, strict=True))
        ],
    }


def _sizes(network: PredictionNetwork, traced: Traced | None) -> str:
    if traced is None:
        return f"with sides that are multiples of {network.size_divisor}"
    names = [name for name, free in zip(AXES[-len(traced.free) :], traced.free, strict=True) if free]
    if not names:
        return "of the patch size alone, because the network could not be traced for others"
    rest = "" if all(traced.free) else "; the others as in the patch size"
    return f"with any {', '.join(names)} that is a multiple of {traced.divisor} and at least {2 * traced.divisor}{rest}"


def prose(description: dict[str, Any]) -> list[str]:
    """One sentence or two a step, from scan to labels."""
    return [*description["steps"], *description["windows"]["steps"], *description["restoring"]]


def stride(side: int, overlap: float) -> int:
    """Of the sliding windows, in voxels."""
    return max(1, round(side * (1 - overlap)))


def _steps(preparation: Preparation) -> list[str]:
    steps = [
        "Turn the axes, by transposing and mirroring alone, to the nearest of right, anterior, superior (RAS+): W runs to the "
        "patient's right, H to anterior, D to superior. An oblique scan stays oblique."
        if preparation.orientation == "canonical"
        else "Keep the axes as the file stores them."
    ]
    if crop := preparation.crop:
        steps.append(
            f"Crop to the box of all voxels of the first channel above {crop.threshold:g}, widened on every side by "
            f"ceil({crop.margin:g} mm / spacing) voxels of that axis, and not beyond the scan."
        )
    target = preparation.spacing or preparation.grid
    if target:
        steps.append(_resampling(preparation))
    return [*steps, f"Normalise each channel on its own, after the resampling: {_intensity(preparation)}."]


def _resampling(preparation: Preparation) -> str:
    if preparation.grid:
        sides = " x ".join("the scan's own" if side is None else str(side) for side in preparation.grid)
        size = f"to {sides} voxels (D x H x W)"
    else:
        spacing = preparation.spacing or ()
        sides = " x ".join("the scan's own" if side is None else f"{side:g}" for side in spacing)
        size = (
            f"to a spacing of {sides} mm (D x H x W), as closely as whole voxels allow: "
            "max(1, round(voxels * spacing / target)) of them on each axis, halves to the even number"
        )
    how = (
        "trilinear, without smoothing (torch's interpolate, align_corners=False)"
        if preparation.image_interpolation == "linear"
        else "nearest neighbour (torch's nearest-exact)"
    )
    return f"Resample {size}, over the same field of view, so that the outer edges of the volume stay in place: {how}."


def _intensity(preparation: Preparation) -> str:
    match preparation.intensity:
        case Window(low=low, high=high, rescale="window"):
            return f"clip to [{low:g}, {high:g}], then (x - {low:g}) / {high - low:g}, which gives 0 to 1"
        case Window(low=low, high=high):
            return (
                f"clip to [{low:g}, {high:g}], then rescale the extremes of the clipped volume to 0 and 1; a constant "
                "channel becomes 0"
            )
        case Percentiles(low=low, high=high):
            return (
                f"clip to the volume's percentiles {low:g} and {high:g} (interpolated linearly), then subtract the mean and "
                "divide by the standard deviation (ddof=0) of the clipped volume; a constant channel becomes 0"
            )
        case ZScore(nonzero=True):
            return (
                "subtract the mean and divide by the standard deviation (ddof=0), both over the voxels other than 0; voxels "
                "at 0 stay 0; a channel without contrast becomes 0"
            )
        case ZScore():
            return (
                "subtract the mean and divide by the standard deviation (ddof=0) of the volume; a constant channel "
                "becomes 0"
            )
        case MinMax():
            return "rescale the extremes of the volume to 0 and 1; a constant channel becomes 0"


def _window_steps(sides: list[int], overlap: float, weighting: str) -> list[str]:
    strides = " x ".join(str(stride(side, overlap)) for side in sides)
    size = " x ".join(map(str, sides))
    where = "in every slice along D" if len(sides) == 2 else "over the volume"
    weights = (
        "All voxels of a window count alike."
        if weighting == "uniform"
        else "A window's voxels are weighted by a Gaussian of their distance to its centre, sigma = side / 8 on each axis."
    )
    slide = (
        f"Slide windows of {size} {where}, starting at min(i * stride, size - window) with strides of {strides}, and average "
        f"the probabilities where windows overlap. {weights} Cut the padding off again."
    )
    return [f"Where the volume is smaller than {size}, pad it with 0 on both sides, the odd voxel behind.", slide]


def _restoring(preparation: Preparation) -> list[str]:
    steps = []
    if preparation.spacing or preparation.grid:
        steps.append(
            "Interpolate the probabilities trilinearly (align_corners=False) to the voxels that the scan had before the "
            "resampling."
        )
    outside = "; outside the crop everything is background" if preparation.crop else ""
    turned = ", turn the axes back" if preparation.orientation == "canonical" else ""
    steps.append(
        f"Take the class of the highest probability at each voxel{turned}{outside}. Write the label value of the class, "
        "as listed under classes."
    )
    return steps
