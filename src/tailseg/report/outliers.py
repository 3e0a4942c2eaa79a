"""Predicted volumes that no other scan has: where to look first among scans that nobody labelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LIMIT = 3.5
"""Robust z beyond which a volume is one to look at, after Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993."""
FEWEST = 5
"""Scans below which nothing is unusual."""
_USUAL = 0.8
_SPREAD = 0.1  # few scans may agree by chance: healthy organs differ by 10 % at least


@dataclass(frozen=True)
class Outlier:
    """volume: predicted; median: over the scans in which the class was predicted. z: robust, of the logarithms; None where
    nothing was predicted."""

    case: str
    name: str
    volume: float
    median: float
    z: float | None


def outliers(volumes: Mapping[str, Mapping[str, float]], classes: Sequence[str]) -> tuple[Outlier, ...]:
    """The most unusual first. volumes: case -> class -> ml, or voxels.

    z is 0.6745 times the distance from the median over the median absolute distance, of the logarithms. A class that was
    predicted in most scans and not in this one comes before all.
    """
    found: list[Outlier] = []
    for name in classes:
        cases = [case for case in volumes if name in volumes[case]]
        sizes = np.array([volumes[case][name] for case in cases])
        held = sizes > 0
        if held.sum() < FEWEST:
            continue
        median, logs = float(np.median(sizes[held])), np.log(sizes[held])
        away = logs - np.median(logs)
        spread = float(np.median(np.abs(away)))
        z = 0.6745 * away / max(spread, _SPREAD)
        for case, value, score in zip(np.array(cases)[held], sizes[held], z, strict=True):
            if abs(score) > LIMIT:
                found.append(Outlier(str(case), name, float(value), median, float(score)))
        if held.mean() >= _USUAL:
            found += [Outlier(str(case), name, 0.0, median, None) for case in np.array(cases)[~held]]
    return tuple(sorted(found, key=lambda one: (one.z is not None, -abs(one.z or 0))))
