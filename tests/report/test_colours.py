"""Colours that can be told apart, on white, on dark, and by who sees no red or green."""

from __future__ import annotations

import numpy as np

from tailseg.report.colours import class_colours

MANY = [f"class {index}" for index in range(24)]
WHITE, DARK = 1.0, 0.0085  # relative luminance of the page
# Machado et al. 2009, severity 1: what is left without red or green cones
BLIND = (
    np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
)


def linear(colours: list[str]) -> np.ndarray:
    """(N, 3)"""
    rgb = np.array([[int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)] for colour in colours])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Björn Ottosson's space, in which distances are about those that eyes see."""
    cones = np.clip(rgb, 0, None) @ np.array(
        [[0.4122, 0.2119, 0.0883], [0.5363, 0.6807, 0.2817], [0.0514, 0.1074, 0.6300]]
    )
    return np.cbrt(cones) @ np.array([[0.2105, 1.9780, 0.0259], [0.7936, -2.4286, 0.7828], [-0.0041, 0.4506, -0.8087]])


def closest(colours: np.ndarray) -> float:
    away = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    return float(away[np.triu_indices(len(colours), 1)].min())


def test_every_class_has_a_colour_and_keeps_it():
    assert class_colours(MANY[:3]) == class_colours(MANY)[:3]
    assert len(set(class_colours(MANY))) == 24 and len(class_colours(MANY * 5)) == 120


def test_colours_stand_out_against_a_white_and_a_dark_page():
    luminance = linear(class_colours(MANY)) @ (0.2126, 0.7152, 0.0722)
    assert ((WHITE + 0.05) / (luminance + 0.05)).min() > 2.1
    assert ((luminance + 0.05) / (DARK + 0.05)).min() > 2.1


def test_colours_can_be_told_apart_by_every_eye():
    rgb = linear(class_colours(MANY))
    assert closest(oklab(rgb)) > 0.06
    for left in BLIND:
        assert closest(oklab(rgb[:8] @ left.T)) > 0.04
