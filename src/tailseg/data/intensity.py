"""Ways to normalise intensities, one channel at a time.

Each has apply(channel): in place on a (D, H, W) float32 array. It returns True if the channel had no contrast left; such a
channel is 0 everywhere afterwards, except under a window rescaled by its own bounds, where a constant stays what it is.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

Value = Annotated[float, Field(allow_inf_nan=False)]
Percent = Annotated[float, Field(ge=0, le=100)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Window(_Frozen):
    """Clip to [low, high], then rescale to [0, 1].

    low, high: in the scan's own intensities, HU for CT. rescale: by the extremes of the clipped volume ("volume") or by low and
    high themselves ("window").
    """

    name: Literal["window"] = "window"
    low: Value
    high: Value
    rescale: Literal["volume", "window"]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        return self

    def apply(self, channel: np.ndarray) -> bool:
        np.clip(channel, self.low, self.high, out=channel)
        low, high = float(channel.min()), float(channel.max())
        if self.rescale == "volume":
            return _rescale(channel, low, high)
        _rescale(channel, self.low, self.high)
        return low == high


class Percentiles(_Frozen):
    """Clip to two percentiles of the volume, then z-score what was clipped.

    low, high: percentiles.
    """

    name: Literal["percentiles"] = "percentiles"
    low: Percent = 0.5
    high: Percent = 99.5

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        return self

    def apply(self, channel: np.ndarray) -> bool:
        low, high = np.percentile(channel, [self.low, self.high]).tolist()
        np.clip(channel, low, high, out=channel)
        return _standardise(channel, nonzero=False)


class ZScore(_Frozen):
    """Subtract the mean and divide by the standard deviation of the volume.

    nonzero: take both over the voxels other than 0, and leave the voxels at 0 where they are.
    """

    name: Literal["zscore"] = "zscore"
    nonzero: bool = False

    def apply(self, channel: np.ndarray) -> bool:
        return _standardise(channel, nonzero=self.nonzero)


class MinMax(_Frozen):
    """Rescale the volume's own extremes to 0 and 1."""

    name: Literal["minmax"] = "minmax"

    def apply(self, channel: np.ndarray) -> bool:
        return _rescale(channel, float(channel.min()), float(channel.max()))


Intensity = Annotated[Window | Percentiles | ZScore | MinMax, Field(discriminator="name")]


def _rescale(channel: np.ndarray, low: float, high: float) -> bool:
    """[low, high] to [0, 1]; all 0 and True if they are equal."""
    if low == high:
        channel.fill(0)
        return True
    channel -= low
    channel /= high - low
    return False


def _standardise(channel: np.ndarray, *, nonzero: bool) -> bool:
    """Mean 0 and variance 1; all 0 and True if the values are equal.

    In float64 plane by plane: a float64 copy of a whole scan would be the largest array of the preparation.
    """
    selected = channel != 0 if nonzero else np.broadcast_to(True, channel.shape)
    count = int(np.count_nonzero(selected))
    low = channel.min(initial=np.inf, where=selected)
    if low == channel.max(initial=-np.inf, where=selected) or count == 0:
        channel.fill(0)
        return True
    pairs = list(zip(channel, selected, strict=True))
    mean = sum(float(plane.sum(dtype=np.float64, where=chosen)) for plane, chosen in pairs) / count
    squares = sum(float(np.square(plane[chosen].astype(np.float64) - mean).sum()) for plane, chosen in pairs)
    np.subtract(channel, mean, out=channel, where=selected)
    np.divide(channel, (squares / count) ** 0.5, out=channel, where=selected)
    return False
