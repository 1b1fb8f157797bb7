"""The state of an unfinished run on disk: all that decides how it goes on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from embedcache.disk import replacing
from embedcache.errors import CorruptError, FingerprintError
from embedcache.train.distributed import num_processes, of_all, process_number


def checkpoint_path(run_path: Path) -> Path:
    """Get the file of an unfinished run's state."""
    return run_path / "checkpoint.pt"


def save_checkpoint(run_path: Path, state: Mapping[str, Any]) -> None:
    """Write the state, with the random numbers' of every process; all processes call it, the first one writes."""
    generators = of_all(_generators())
    if process_number() == 0:
        with replacing(checkpoint_path(run_path)) as temporary:
            torch.save({**state, "generators": generators}, temporary)


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
        generators = state["generators"]
    except (RuntimeError, KeyError, EOFError, ValueError) as error:
        raise CorruptError(f"{path} cannot be read: {error}; delete it to train from the start") from error
    if len(generators) != num_processes():
        raise FingerprintError(
            f"{path} was written by {len(generators)} processes, and {num_processes()} go on; start as many, or delete "
            "it to train from the start"
        )
    _set_generators(generators[process_number()])
    return state


def _generators() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def _set_generators(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu())
