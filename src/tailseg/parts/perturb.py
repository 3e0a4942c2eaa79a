"""Perturbations of images and features that leave every voxel where it is.

Source of the strong views: the released code of UniMatch (2D, github.com/LiheYoung/UniMatch) and CrossMatch (3D,
github.com/AiEson/CrossMatch, with TorchIO's bias field, gamma and blur).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tailseg.parts.intensity import (
    FIELD_TERMS,
    bias_field_and_gamma,
    change_some,
    column,
    gaussian_blur,
    unit_range,
)

_FIELD_COEFFICIENT = 0.5  # TorchIO's default, as is the order of the bias field's polynomial
_LOG_GAMMA = 0.5
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 0.5, 0.5, 0.25, 0.25
_SIGMA = (0.1, 2.0)  # voxels


def add_noise(x: Tensor, std: float = 0.1, limit: float = 0.2) -> Tensor:
    """x plus Gaussian noise clipped to +-limit, both in the units of x."""
    return x + (torch.randn_like(x) * std).clamp_(-limit, limit)


def drop_channels(features: list[Tensor], p: float) -> list[Tensor]:
    """Each (B, C, *S) with whole channels set to 0 with probability p, the others scaled by 1 / (1 - p).

    Also in evaluation mode: this perturbation belongs to the loss, not to the network.
    """
    return [torch.feature_dropout(feature, p, True) for feature in features]


@contextlib.contextmanager
def unperturbed(net: nn.Module) -> Iterator[None]:
    """Within, the network's own dropout rests and normalisation reads its running statistics without moving them."""
    training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(training)


@torch.no_grad()
def strong_view(x: Tensor, *, intensity: float = 0.8, blur: float = 0.5) -> Tensor:
    """(B, C, *S) images of any range with their intensities changed, each sample on its own, in float32.

    With probability `intensity`, in 3D: times the exponential of a random cubic polynomial of the position, then to the power
    exp(U(-.5, .5)); in 2D: brightness and contrast jittered by .5, for three channels (taken as RGB) also saturation and hue
    by .25, in this order. Then with probability `blur`: Gaussian blur, sigma U(.1, 2) voxels, in 3D each axis its own; the
    kernel is cut off and rescaled at the border. Each sample is brought to [0, 1] by its own extremes over all channels, and
    back at the end; a constant one stays so. Parameters are drawn from torch's CPU generator.
    Deviations: the authors jitter bytes of images in [0, 1] in a random order (here nothing is rounded and the order is
    fixed), and apply gamma to z-scored voxels by their absolute value.
    """
    if not len(x):
        return x
    dims = x.dim() - 2
    with torch.autocast(x.device.type, enabled=False):
        view, low, extent = unit_range(x, per_channel=False)
        view = _field_and_gamma(view, intensity) if dims == 3 else _jitter(view, intensity)
        sigma = _uniform(len(x), 3 if dims == 3 else 1, *_SIGMA).expand(-1, dims)
        view = change_some(view, _chosen(len(x), blur), gaussian_blur, sigma)
        return view.mul_(extent).add_(low)


def _uniform(rows: int, columns: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(rows, columns)


def _chosen(count: int, probability: float) -> Tensor:
    """Rows of a batch, on the CPU, so that nothing waits for the device to know how many they are."""
    return (torch.rand(count) < probability).nonzero()[:, 0]


def _field_and_gamma(x: Tensor, probability: float) -> Tensor:
    """x: (B, C, D, H, W) in [0, 1], changed in place."""
    chosen = _chosen(len(x), probability)
    coefficients = _uniform(len(x), FIELD_TERMS**3, -_FIELD_COEFFICIENT, _FIELD_COEFFICIENT)
    gamma = _uniform(len(x), 1, -_LOG_GAMMA, _LOG_GAMMA)[:, 0].exp()
    coefficients = coefficients.view(-1, FIELD_TERMS, FIELD_TERMS, FIELD_TERMS)
    return change_some(x, chosen, bias_field_and_gamma, coefficients, gamma)


def _jitter(x: Tensor, probability: float) -> Tensor:
    """x: (B, C, H, W) in [0, 1], changed in place; so is what comes out."""
    chosen = _chosen(len(x), probability)
    strength = torch.tensor([_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE])
    return change_some(x, chosen, _change_colours, strength * _uniform(len(x), 4, -1, 1))


def _change_colours(x: Tensor, changes: Tensor) -> Tensor:
    """changes: (B, 4) of brightness, contrast, saturation and hue, on the CPU. x: (B, C, H, W) in [0, 1], changed in place."""
    brightness, contrast, saturation, hue = (column(change, x) for change in changes.unbind(1))
    x = x.mul_(1 + brightness).clamp_(0, 1)
    mean = _grey(x).mean((1, 2, 3), keepdim=True)
    x = x.lerp_(mean, -contrast).clamp_(0, 1)
    if x.shape[1] != 3:
        return x
    x = x.lerp_(_grey(x), -saturation).clamp_(0, 1)
    return x.copy_(_turn_hue(x, hue))


def _grey(x: Tensor) -> Tensor:
    """(B, 1, H, W) luma of RGB, the mean of any other channels."""
    if x.shape[1] != 3:
        return x if x.shape[1] == 1 else x.mean(1, keepdim=True)
    red, green, blue = x.split(1, 1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Hue plus turn (full circles), value and saturation as they are. x: (B, 3, H, W) in [0, 1]."""
    red, green, blue = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    scale = 1 / torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale)
    hue = torch.where(value == red, (green - blue) * scale, hue) + 6 * turn.squeeze(1)  # sixths of a circle
    offset = torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)  # of red, green and blue
    distance = (hue.unsqueeze(1) + offset) % 6
    share = torch.minimum(distance, 4 - distance).clamp_(0, 1)
    return value.unsqueeze(1) - chroma.unsqueeze(1) * share
