"""How to run what was exported: a line or two for the terminal, and an example for the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SHORT = {
    "onnx": 'onnxruntime.InferenceSession("model.onnx").run(None, {"patch": patches})[0]; '
    "MODEL_CARD.md tells how to prepare a scan",
    "torch": 'torch.export.load("model.pt2").module()(patches); MODEL_CARD.md tells how to prepare a scan',
    "safetensors": "tailseg.export.load_safetensors(FOLDER)(patches); MODEL_CARD.md tells how to prepare a scan",
    "monai-bundle": "cd FOLDER && python -m monai.bundle run --config_file configs/inference.json --dataset_dir SCANS "
    "--output_dir LABELS   (pip install 'monai[nibabel,fire]'; TailSeg is not needed)",
}


def in_short(file_format: str) -> str:
    return _SHORT[file_format]


def in_full(file_format: str, description: Mapping[str, Any]) -> str:
    """Markdown."""
    if file_format == "monai-bundle":
        return _BUNDLE
    network = description["network"]
    shape = [1, network["input"]["channels"], *network["input"]["patch_size"]]
    text = (
        f"Patches go in as {network['input']['axes']} float32, {network['input']['batch']} at once, "
        f"{network['input']['size']}; "
        f"probabilities come out as {network['output']['axes']}. The patch size it was trained with is {shape[2:]}. "
        "Preparing a scan, sliding the windows and restoring the labels are up to you, as the next section says.\n\n"
    )
    return text + f"```python\n{_CODE[file_format].format(shape=tuple(shape))}```"


_CODE = {
    "onnx": """import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
patches = np.zeros({shape}, np.float32)  # prepared
probabilities = session.run(None, {{"patch": patches}})[0]
""",
    "torch": """import torch

network = torch.export.load("model.pt2").module()
patches = torch.zeros({shape})  # prepared
probabilities = network(patches)
""",
    "safetensors": """import torch
from tailseg.export import load_safetensors

network = load_safetensors(".")
patches = torch.zeros({shape})  # prepared
with torch.inference_mode():
    probabilities = network(patches)
""",
}
_BUNDLE = """```sh
pip install 'monai[nibabel,fire]' torch     # TailSeg is not needed
cd BUNDLE                                   # the folder of this file's bundle
python -m monai.bundle run --config_file configs/inference.json --dataset_dir SCANS --output_dir LABELS
```

`SCANS` is a folder of NIfTI files, `<case>_0000.nii.gz`, `<case>_0001.nii.gz`, ... being the channels of one case; every case
gets `LABELS/<case>.nii.gz` on its own grid. The network of the bundle takes its axes in the order of a NIfTI file, (W, H, D).

What MONAI cannot be configured for is done by small classes in `scripts/`: the crop, whose margin is in mm; the resampling,
which keeps the field of view (MONAI's `Spacing` moves the grid by part of a voxel); and Gaussian window weights, which MONAI
raises to 0.001 where they are smaller. Inverting the preparation holds the probabilities of all classes on the scan's own grid
in memory at once, 4 bytes a voxel and class.
"""
