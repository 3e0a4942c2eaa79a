"""Ramp-ups of loss weights."""

from __future__ import annotations

import math

from tailseg.core import Progress, Unit


def gaussian_ramp(fraction: float) -> float:
    """exp(-5 (1 - t)^2) with t = fraction clipped to [0, 1]. Source: Laine & Aila, ICLR 2017."""
    return math.exp(-5.0 * (1.0 - min(max(fraction, 0.0), 1.0)) ** 2)


def ramp_up(progress: Progress, unit: Unit = "epoch") -> float:
    """Gaussian ramp over the whole run; unit: see Progress.fraction."""
    return gaussian_ramp(progress.fraction(unit))
