"""The state of an unfinished run on disk: all that decides how it goes on."""

import io
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from embedcache.errors import CorruptError, FingerprintError
from embedcache.files import replacing
from embedcache.train.distributed import num_processes, of_all, process_number

_NAMES = ("objective", "optimizer", "best", "step", "epoch", "pairs", "log_bytes", "generators")


def checkpoint_path(run_path: Path) -> Path:
    """Get the file of an unfinished run's state."""
    return run_path / "checkpoint.pt"


def save_checkpoint(run_path: Path, device: str, state: Mapping[str, Any]) -> None:
    """Write the state, with the random numbers' of every process; all processes call it, the first one writes."""
    generators = of_all(_generators(device))
    if process_number() == 0:
        buffer = io.BytesIO()  # as torch's own writer does not say that a disk is full
        torch.save({**state, "generators": generators}, buffer)
        with replacing(checkpoint_path(run_path)) as temporary:
            temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(run_path: Path, device: str) -> dict[str, Any] | None:
    """Read the state of a run, and set this process's random numbers to it; None where there is none.

    Raises:
        CorruptError: it cannot be read.
        FingerprintError: another number of processes wrote it.
    """
    path = checkpoint_path(run_path)
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        generators = {name: state[name] for name in _NAMES}["generators"]
    except (RuntimeError, KeyError, EOFError, ValueError, TypeError, AttributeError, UnpicklingError) as error:
        raise CorruptError(f"{path} cannot be read: {error}; delete it to train from the start") from error
    if len(generators) != num_processes():
        raise FingerprintError(
            f"{path} was written by {len(generators)} processes, and {num_processes()} go on; start as many, or delete "
            "it to train from the start"
        )
    _set_generators(generators[process_number()], device)
    return state


def _generators(device: str) -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state(device) if device.startswith("cuda") else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_generators(state: Mapping[str, Any], device: str) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"] is not None and device.startswith("cuda"):
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
