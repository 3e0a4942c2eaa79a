"""Scans of a folder one after the other: prepared, predicted in sliding windows, brought back to their own grid, saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.data.dataset import Dataset

ENDINGS = (".nii.gz", ".nii")


def find_scans(folder: str, channels: int) -> list[dict[str, list[str]]]:
    """Scans of a folder: <case>_0000.nii.gz, <case>_0001.nii.gz, ... are the channels of one; of one channel, any name goes."""
    files = sorted(str(path) for path in Path(folder).iterdir() if path.name.endswith(ENDINGS) and path.name[0] != ".")
    found: dict[str, list[str]] = {}
    for file in files:
        found.setdefault(case_name(file) if channels > 1 else file, []).append(file)
    for case, paths in found.items():
        if len(paths) != channels:
            raise ValueError(f"{case} has {len(paths)} files in {folder}; the network takes {channels} channels")
    if not found:
        raise ValueError(f"{folder} holds no scan that ends in {' or '.join(ENDINGS)}")
    return [{"image": paths} for paths in found.values()]


def case_name(file: str) -> str:
    """Without folder, ending and the number of the channel."""
    name = Path(file).name
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    has_number = len(name) > 5 and name[-5] == "_" and name[-4:].isdigit()
    return name[:-5] if has_number else name


def output_name(meta: Mapping[str, Any], saver: Any) -> dict[str, Any]:
    """For SaveImaged: the label file is called like the case."""
    return {"subject": case_name(str(meta["filename_or_obj"])), "idx": None}


class Inference:
    """run() writes a label file for every scan of the dataset."""

    def __init__(
        self,
        dataset: Dataset,
        network: torch.nn.Module,
        inferer: Callable[..., torch.Tensor],
        postprocessing: Callable[[dict[str, Any]], Any],
        device: torch.device,
    ) -> None:
        self.dataset, self.network, self.inferer = dataset, network, inferer
        self.postprocessing, self.device = postprocessing, device

    def run(self) -> None:
        for index in range(len(self.dataset)):
            item: Any = self.dataset[index]
            data: dict[str, Any] = dict(item)
            with torch.inference_mode():
                patch = data["image"].unsqueeze(0).to(self.device)
                data["pred"] = self.inferer(patch, self.network)[0].cpu()
                self.postprocessing(data)
