"""Checkpoints of a run: whole or not there, sharded, and exact.

    checkpoints/step-00001000/    named so by one rename when all processes have written
        .metadata, __*.distcp     weights and optimizers, by torch.distributed.checkpoint
        progress-0.pt             step, generators of random numbers, schedules and counters of rank 0; one file a rank
        models.json               the models' configurations
        settings.yaml             the run's settings

A run that continues from it takes the same steps as one that was never stopped, bit for bit on the same machine.
"""

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .build import describe
from .parallel import Place
from .settings import Settings, write_settings

_NAME = re.compile(r"step-(\d{8})")
UNFINISHED = ".unfinished"


def finished(output: Path) -> list[Path]:
    """Returns the checkpoints of a run, the oldest first."""
    found = (output / "checkpoints").glob("step-*")
    return sorted(path for path in found if _NAME.fullmatch(path.name) and path.is_dir())


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def save(
    output: Path, step: int, settings: Settings, models: nn.Module, optimizers: list, progress: dict, place: Place,
    keep: int,
) -> Path:  # fmt: skip
    """Writes the checkpoint of a step, all processes together, and removes all but the last ``keep``."""
    import torch.distributed.checkpoint as dcp

    folder = output / "checkpoints" / f"step-{step:08d}"
    beside = folder.with_name(folder.name + UNFINISHED)
    if place.rank == 0:
        for stale in folder.parent.glob(f"*{UNFINISHED}"):
            shutil.rmtree(stale)
        beside.mkdir(parents=True)
    place.barrier()
    with _alone():
        dcp.save(_state(models, optimizers), checkpoint_id=str(beside), no_dist=place.ranks == 1)
    with open(beside / f"progress-{place.rank}.pt", "xb") as file:
        torch.save(progress, file)
        file.flush()
        os.fsync(file.fileno())
    place.barrier()
    if place.rank == 0:
        describe(models, beside)
        write_settings(settings, beside / "settings.yaml")
        if folder.exists():  # the run was told to end here before
            shutil.rmtree(folder)
        os.replace(beside, folder)
        _flush(folder.parent)
        for old in finished(output)[:-keep]:
            shutil.rmtree(old)
    place.barrier()
    return folder


def load(folder: Path, models: nn.Module, optimizers: list, place: Place) -> dict[str, Any] | None:
    """Fills models and optimizers. Returns this rank's progress, None if the run had fewer processes.

    Raises ValueError if the checkpoint is damaged or that of other models.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

    state = _state(models, optimizers)
    try:
        with _alone():
            dcp.load(state, checkpoint_id=str(folder), no_dist=place.ranks == 1)
    except (Exception, CheckpointException) as error:  # torch raises various kinds, some of them about single tensors
        reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
        raise ValueError(f"{folder} cannot be loaded: {reason}") from error
    set_model_state_dict(models, state["models"])
    for index, optimizer in enumerate(optimizers):
        set_optimizer_state_dict(models, optimizer, state[f"optimizer-{index}"])
    path = folder / f"progress-{place.rank}.pt"
    return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None


def load_weights(folder: Path, models: nn.Module) -> None:
    """Fills models alone, in one process, whatever number of them has written the checkpoint."""
    import torch.distributed.checkpoint as dcp

    state = {"models": models.state_dict()}
    with _alone():
        dcp.load(state, checkpoint_id=str(folder), no_dist=True)
    models.load_state_dict(state["models"])


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hides torch's remark that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _state(models: nn.Module, optimizers: list) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    state: dict[str, Any] = {"models": get_model_state_dict(models)}
    for index, optimizer in enumerate(optimizers):
        state[f"optimizer-{index}"] = get_optimizer_state_dict(models, optimizer)
    return state


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
