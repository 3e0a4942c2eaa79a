"""Numbers as a reader wants them: enough digits and no more."""

from __future__ import annotations

import math

from tailseg.evaluate.metrics import METRICS
from tailseg.evaluate.protocols import Protocol

NONE = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def factor(protocol: Protocol, metric: str) -> float:
    """What turns a value into what is shown: overlaps are shown in %, whatever the protocol reports."""
    return 100.0 if METRICS[metric].kind == "overlap" and not protocol.percent else 1.0


def unit(protocol: Protocol, metric: str) -> str:
    """%, mm, voxels or ml."""
    return "%" if METRICS[metric].kind == "overlap" else protocol.unit(metric)


def title(protocol: Protocol, metric: str) -> str:
    """Name and unit, as a heading has them."""
    return f"{METRICS[metric].title} ({unit(protocol, metric)})"


def fixed(value: float | None, digits: int = 1) -> str:
    """83.1; a dash for no number."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:.{digits}f}".replace("-", MINUS)


def signed(value: float, digits: int = 1) -> str:
    """+2.4"""
    if not math.isfinite(value):
        return NONE
    text = f"{value:+.{digits}f}"
    return text.replace("-", MINUS) if float(text) else f"{0:.{digits}f}"


def p_value(value: float) -> str:
    """Two digits of a small one, < 0.001 below."""
    if math.isnan(value):
        return NONE
    if value < 0.001:
        return "< 0.001"
    return f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def percent(share: float) -> str:
    """Of a share of 1: 34, 4.2, 0.31, 0.0042."""
    value = 100 * share
    if not math.isfinite(value):
        return NONE
    if value == 0 or value >= 9.95:
        return f"{value:.0f}"
    digits = 1 - math.floor(math.log10(value))
    return f"{value:.{max(digits, 1) if value >= 0.995 else digits}f}"


def short(value: float) -> str:
    """Three digits that count, thousands as they are."""
    if not math.isfinite(value):
        return NONE
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}".replace("-", MINUS)


def per_case(count: int, word: str) -> str:
    """1 case, 2 cases."""
    return f"{count} {word}{'s' * (count != 1)}"
