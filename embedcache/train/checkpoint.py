"""What an unfinished run has on disk: its checkpoint, from which it resumes, and the log of its losses."""

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from embedcache.errors import CorruptError, FingerprintError
from embedcache.files import replacing
from embedcache.registry import require
from embedcache.train.distributed import gather_objects, num_processes, process_rank

_NAMES = ("objective", "optimizer", "best", "step", "epoch", "pairs", "log_bytes", "generators")


def checkpoint_path(run_path: Path) -> Path:
    """Return the path of the checkpoint of an unfinished run."""
    return run_path / "checkpoint.pt"


def save_checkpoint(run_path: Path, device: str, state: Mapping[str, Any]) -> None:
    """Write the state of a run with the random generators of all processes, which must all call it."""
    cuda = torch.cuda.get_rng_state(device) if device.startswith("cuda") else None
    generators = gather_objects({"cpu": torch.get_rng_state(), "cuda": cuda})
    if process_rank() == 0:
        buffer = io.BytesIO()  # torch.save into a file does not raise OSError when the disk is full
        torch.save({**state, "generators": generators}, buffer)
        with replacing(checkpoint_path(run_path)) as temporary:
            temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(run_path: Path, device: str) -> dict[str, Any] | None:
    """Read the state of a run and restore this process's random generators; return None without a checkpoint.

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
        raise CorruptError(
            f"{path}: expected a checkpoint, got an error: {error}; delete it to restart training"
        ) from error
    if len(generators) != num_processes():
        raise FingerprintError(
            f"{path}: expected {len(generators)} processes, which wrote it, got {num_processes()}; start "
            f"{len(generators)} processes, or delete it to restart training"
        )
    own = generators[process_rank()]
    torch.set_rng_state(own["cpu"].cpu())
    if own["cuda"] is not None and device.startswith("cuda"):
        torch.cuda.set_rng_state(own["cuda"].cpu(), device)
    return state


class RunLog:
    """The log of a run: `losses.jsonl`, and TensorBoard events if enabled; of several processes, only the first writes.

    Lines after the first `num_bytes` and events from `step` on are cut off.
    """

    def __init__(self, run_path: Path, *, num_bytes: int, step: int, tensorboard: bool) -> None:
        self._file = self._events = None
        if process_rank():
            return
        self._file = (run_path / "losses.jsonl").open("ab")
        self._file.truncate(min(num_bytes, self._file.seek(0, os.SEEK_END)))
        if tensorboard:
            require("tensorboard", extra="tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(run_path / "tensorboard"), purge_step=step)

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def write(self, line: Mapping[str, Any], step: int, scalars: Mapping[str, float]) -> None:
        """Write a line of JSON, and the scalars of a step as events."""
        if self._file is not None:
            self._file.write(json.dumps(line).encode() + b"\n")
        if self._events is not None:
            for name, value in scalars.items():
                self._events.add_scalar(name, value, step)

    def flush(self) -> int:
        """Flush all lines to the disk and return their size in bytes."""
        if self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()
