"""What a data set's dataset.json says of channels and labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tailseg.data.errors import DataError


def read_description(root: Path) -> dict[str, Any]:
    """root: the data set's folder. Raises DataError."""
    path = root / "dataset.json"
    if not root.is_dir():
        raise DataError(f"No data set at {root}: the folder does not exist; give data.root.")
    if not path.is_file():
        raise DataError(f"{path} is missing; it names the channels and labels, see nnU-Net's raw layout.")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no JSON: {error}.") from error
    if not isinstance(description, dict):
        raise DataError(f"{path} must hold an object with channel_names and labels.")
    return description


def channel_names(root: Path, description: Mapping[str, Any]) -> tuple[str, ...]:
    """In order of their numbers. Raises DataError."""
    channels = description.get("channel_names", description.get("modality"))
    numbers = [str(number) for number in range(len(channels))] if isinstance(channels, dict) else []
    if not isinstance(channels, dict) or not channels or set(channels) != set(numbers):
        raise DataError(f'{root}/dataset.json: channel_names must be like {{"0": "CT"}}, counting from 0.')
    return tuple(str(channels[number]) for number in numbers)


def class_labels(
    root: Path, description: Mapping[str, Any]
) -> tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]:
    """Class names in order of their values, the values, and the values to ignore. Raises DataError.

    "ignore" may have one value, as in nnU-Net, or a list of them.
    """
    labels = description.get("labels")
    if not isinstance(labels, dict) or len(labels) < 2:
        raise DataError(f'{root}/dataset.json: labels must be like {{"background": 0, "liver": 1}}.')
    if all(key.isdigit() for key in labels):  # the first nnU-Net and the Decathlon wrote value -> name
        if len(set(map(str, labels.values()))) != len(labels):
            raise DataError(f"{root}/dataset.json: two labels have the same name; every value needs a name of its own.")
        labels = {str(name): int(value) for value, name in labels.items()}
    ignored = labels.get("ignore", [])
    ignored = ignored if isinstance(ignored, list) else [ignored]
    classes = {name: value for name, value in labels.items() if name != "ignore"}
    pairs = [*classes.items(), *(("ignore", value) for value in ignored)]
    for name, value in pairs:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 255:
            raise DataError(f"{root}/dataset.json: label '{name}' is {value!r}; it must be one integer from 0 to 255.")
    if len({value for _, value in pairs}) != len(pairs) or 0 not in classes.values():
        raise DataError(f"{root}/dataset.json: every label needs a value of its own, and the background has 0.")
    if len(classes) < 2:
        raise DataError(
            f"{root}/dataset.json: labels name no class beside the background; add what is to be segmented."
        )
    names = sorted(classes, key=lambda name: classes[name])
    return tuple(names), tuple(classes[name] for name in names), tuple(ignored)
