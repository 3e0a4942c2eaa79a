"""How unsure a prediction is, voxel by voxel: entropy, and what of it comes from disagreement.

The entropy of the averaged probabilities is high at every border that a network is unsure of, however many are asked. The
disagreement is the mutual information between the class and who was asked (networks of one method, runs, mirrored views): the
entropy of the mean less the mean of the entropies. It is high where each is sure of something else, as in a scan unlike those
of training. Both are divided by log K, so that 1 is the most that K classes allow. Where windows overlap, each of them is asked
too.
"""

from __future__ import annotations

import math
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from tailseg.data.pictures import PICTURE_ENDINGS, write_picture
from tailseg.files import written_whole

STEPS = 255
"""Maps are held and written as bytes, in steps of 1 / STEPS."""


def entropy(probs: Tensor, dim: int) -> Tensor:
    """Entropy over the classes along dim, divided by the log of their number: 0 for certainty, 1 for equal odds."""
    return torch.special.entr(probs.float().clamp(min=0)).sum(dim) / math.log(probs.shape[dim])


def to_bytes(values: Tensor) -> np.ndarray:
    """Values in [0, 1] as whole steps, uint8."""
    return (values.clamp(0, 1) * STEPS).round().to(torch.uint8).cpu().numpy()


def write_map(path: Path, steps: np.ndarray, affine: np.ndarray) -> None:
    """steps: (D, H, W) uint8. A NIfTI holds its scale, so that every reader sees values in [0, 1]; a picture holds the steps.

    Whole or not at all; raises WriteError.
    """
    with written_whole(path) as temporary:
        if path.name.endswith(PICTURE_ENDINGS):
            write_picture(temporary, steps[0])
            return
        nifti = nib.Nifti1Image(steps.T, affine)  # pyright: ignore[reportPrivateImportUsage]
        nifti.header.set_slope_inter(1 / STEPS, 0)
        nifti.header.set_xyzt_units("mm")
        nifti.set_qform(affine, code=1)
        nifti.set_sform(affine, code=1)
        nib.save(nifti, temporary)  # pyright: ignore[reportPrivateImportUsage]
