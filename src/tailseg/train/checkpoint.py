"""Checkpoints: everything a run needs to go on bit for bit, in one file that is whole or absent."""

from __future__ import annotations

import io
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tailseg.core import Task
from tailseg.files import written_whole

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, written, or does not belong to this run."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """state: nested dicts and lists of tensors, numbers, text; loads with weights_only=True."""
    buffer = io.BytesIO()  # torch reports a full disk as a RuntimeError without a cause; plain writing says ENOSPC
    torch.save({"format": FORMAT, **state}, buffer)
    with written_whole(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path: Path, task: Task | None = None) -> dict[str, Any]:
    """Raises CheckpointError for a missing, damaged or foreign file, and for one of another task."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; train first, or name another checkpoint.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no TailSeg checkpoint; train again or name another.") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of this version of TailSeg.")
    if task is not None:
        refuse_other_task(path, load_task(state["task"]), task)
    return state


def load_task(values: dict[str, Any]) -> Task:
    tuples = {key: tuple(values[key]) for key in ("classes", "spacing", "class_voxels")}
    return Task(**{**values, **tuples})


def dump_task(task: Task) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(task).items()}


def refuse_other_task(path: Path, saved: Task, wanted: Task) -> None:
    for key in ("classes", "in_channels", "spatial_dims"):
        if getattr(saved, key) != getattr(wanted, key):
            raise CheckpointError(
                f"{path} was trained for {key} {getattr(saved, key)}, this task has {getattr(wanted, key)}; "
                "choose another checkpoint or the data set it was trained on."
            )


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """This rank's generators."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def all_random_states(device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Every rank's generators, on every rank."""
    mine = random_state(device)
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, mine)
    return states


def restore_random_state(states: list[dict[str, torch.Tensor]], rank: int, device: torch.device) -> None:
    if rank >= len(states):
        raise CheckpointError(f"the checkpoint is of a run on {len(states)} processes; resume it on as many.")
    torch.set_rng_state(states[rank]["cpu"])
    if device.type == "cuda" and "cuda" in states[rank]:
        torch.cuda.set_rng_state(states[rank]["cuda"], device)
