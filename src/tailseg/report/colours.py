"""One colour for each class, the same in every chart, slice and volume of a page.

Chosen for the greatest distance to all before them, to normal sight and to sight without red or green cones (Machado et al.,
IEEE TVCG 2009), among those that stand out against a white page, a dark page and a scan.
"""

from __future__ import annotations

from collections.abc import Sequence

_PALETTE = (
    "#2a78d6", "#e8590c", "#12a594", "#d6336c", "#e2a300", "#7048e8", "#903000", "#b8a0f8", "#882088", "#d000b0", "#70c080",
    "#f870c0", "#a82058", "#b84800", "#8088f8", "#c08068", "#187888", "#7000d0", "#58a8c8", "#6068b0", "#00a030", "#006040",
    "#9860f8", "#e07898",
)  # fmt: skip


def class_colours(classes: Sequence[str]) -> list[str]:
    """A colour like "#2a78d6" for each class. classes: the foreground, in the data set's order; beyond 24 colours repeat."""
    return [_PALETTE[index % len(_PALETTE)] for index in range(len(classes))]
