"""Which classes are left and right of each other, by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable

_LEFT, _RIGHT = {"left", "l", "lt"}, {"right", "r", "rt"}
_HEART = {"v", "a", "ventricle", "atrium", "heart", "cavity", "myocardium"}
"""The chambers of a heart are called left and right, but are no mirror images of each other."""


def sided_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """(left, right) of every pair of names: left_kidney and right_kidney, kidney-L and kidney-R, LK and RK, lkidney and
    rkidney. A class without its other side makes no pair."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for name in names:
        for key, side in _readings(name):
            if not set(key) - {"*"} <= _HEART:
                found.setdefault(key, {}).setdefault(side, name)
    pairs = [(sides["left"], sides["right"]) for sides in found.values() if len(sides) == 2]
    return list(dict.fromkeys(pairs))


def _readings(name: str) -> Iterable[tuple[tuple[str, ...], str]]:
    """The name with its side replaced by *, and the side: of a word of it, or of its first letter."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)]
    for index, word in enumerate(words):
        if word in _LEFT | _RIGHT:
            yield (*words[:index], "*", *words[index + 1 :]), "left" if word in _LEFT else "right"
    if len(words) == 1 and len(words[0]) > 1 and words[0][0] in "lr" and words[0] not in _LEFT | _RIGHT:
        yield ("*", words[0][1:]), "left" if words[0][0] == "l" else "right"
