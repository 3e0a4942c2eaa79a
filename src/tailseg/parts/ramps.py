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


def ramp_over(progress: Progress, share: float = 1.0, *, hold: int = 1) -> float:
    """Gaussian ramp over the first `share` of the run's steps, 1 from there on; share 0: 1 from the start.

    hold: steps for which the value stays. SSL4MIS and UA-MT write exp(-5 (1 - min(k, R) / R)^2) with k = step // 150, where
    150 R is the length of the run: hold=150.
    """
    return gaussian_ramp(progress.step // hold * hold / (share * progress.total_steps)) if share else 1.0
