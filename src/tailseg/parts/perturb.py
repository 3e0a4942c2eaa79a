"""Perturbations of images and features that leave every voxel where it is.

Source of the strong views: the released code of UniMatch (2D, github.com/LiheYoung/UniMatch) and CrossMatch (3D,
github.com/AiEson/CrossMatch, with TorchIO's bias field, gamma and blur).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

_FIELD_ORDER = 3  # of the bias field's polynomial, and below how large its coefficients are: TorchIO's defaults
_FIELD_COEFFICIENT = 0.5
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
        each = tuple(range(1, x.dim()))
        low, high = x.float().amin(each, keepdim=True), x.float().amax(each, keepdim=True)
        scale = torch.where(high > low, high - low, 1.0)
        view = (x.float() - low).div_(scale)
        view = _field_and_gamma(view, intensity) if dims == 3 else _jitter(view, intensity)
        sigma = _uniform(len(x), 3 if dims == 3 else 1, *_SIGMA).expand(-1, dims)
        chosen = (torch.rand(len(x)) < blur).nonzero()[:, 0]  # on the CPU, so that nothing waits for the device
        if len(chosen):
            at = chosen.to(x.device, non_blocking=True)
            view[at] = _blur(view[at], sigma[chosen].to(x.device, non_blocking=True))
        return view.mul_(scale).add_(low)


def _uniform(rows: int, columns: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(rows, columns)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(B) on the CPU -> (B, 1, 1, ...) on the device of like."""
    return values.to(like.device, non_blocking=True).reshape(-1, *(1 for _ in like.shape[1:]))


def _field_and_gamma(x: Tensor, probability: float) -> Tensor:
    """x: (B, C, D, H, W) in [0, 1], changed in place."""
    terms = _FIELD_ORDER + 1
    chosen = (torch.rand(len(x), 1) < probability).float()  # the others get a flat field and gamma 1
    coefficients = chosen * _uniform(len(x), terms**3, -_FIELD_COEFFICIENT, _FIELD_COEFFICIENT)
    gamma = (chosen * _uniform(len(x), 1, -_LOG_GAMMA, _LOG_GAMMA)).exp()
    order = torch.arange(terms)
    total = order[:, None, None] + order[:, None] + order
    field = (coefficients.view(-1, terms, terms, terms) * (total <= _FIELD_ORDER)).to(x.device, non_blocking=True)
    exponents = torch.arange(terms, device=x.device)[:, None]
    for side in x.shape[2:]:  # a sum of products of powers: one axis at a time, each moving to the end
        at = torch.linspace(-1, 1, side, device=x.device)
        field = torch.einsum("bi...,is->b...s", field, at**exponents)
    return x.mul_(field.exp_().unsqueeze(1)).pow_(_column(gamma, x))


def _jitter(x: Tensor, probability: float) -> Tensor:
    """x: (B, C, H, W) in [0, 1], changed in place; so is what comes out."""
    chosen = (torch.rand(len(x), 1) < probability).float()  # the others get factors of 1 and no turn of the hue
    strength = torch.tensor([_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE])
    changes = chosen * strength * _uniform(len(x), 4, -1, 1)
    brightness, contrast, saturation, hue = (_column(change, x) for change in changes.unbind(1))
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
        return x.mean(1, keepdim=True)
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


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of x (B, C, *S) with sigma (B, dims) in voxels.

    One matrix product per axis: faster than a grouped convolution, and the border costs nothing. Every product leaves the
    axis it blurred in front, so that after all of them the channels are last and the axes are in order again.
    """
    shape = x.shape
    for side, width in zip(reversed(shape[2:]), reversed(sigma.unbind(1)), strict=True):
        at = torch.arange(side, device=x.device, dtype=x.dtype)
        weights = torch.exp(-0.5 * ((at[:, None] - at) / width.view(-1, 1, 1)).square())
        weights = weights / weights.sum(2, keepdim=True)  # (B, side, side): a constant stays one up to the border
        x = torch.bmm(weights, x.reshape(shape[0], -1, side).transpose(1, 2))
    return x.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
