"""What a run writes while it is trained: the checkpoint, from which it resumes to the bit, and the log of losses."""

import io
import json
import lzma
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch

from embedcache.devices import AUTO, torch_device
from embedcache.errors import CorruptError, FingerprintError, one_line
from embedcache.files import replacing
from embedcache.runs import CHECKPOINT, LOG, MANIFEST, read_info
from embedcache.settings import replace_fields
from embedcache.train.distributed import gather_objects, num_processes, process_rank
from embedcache.train.settings import MachineSettings
from embedcache.train.trackers import Trackers

_UNREADABLE = (
    *(RuntimeError, KeyError, EOFError, ValueError, TypeError, AttributeError),
    *(UnpicklingError, BadZipFile, zlib.error, lzma.LZMAError, OSError),
)
"""Errors of reading a damaged checkpoint."""

_NAMES = (
    *("module", "optimizer", "scaler", "best", "step", "epoch", "samples", "log_bytes", "is_small", "generators"),
    "run_id",
)


def name_device(machine: MachineSettings, run_path: Path, *, needs_float64: bool = False) -> MachineSettings:
    """Return the settings with the device named: `auto` is that of the run in the folder, else the fastest.

    So the same command reuses a finished run, and resumes an interrupted one, also on a machine with another GPU.

    Raises:
        SettingError: the run is not finished, and its device does not exist.
    """
    stored = read_info(run_path) if (run_path / MANIFEST).is_file() else None
    is_finished = stored is not None and stored.is_finished
    device = machine.device
    if device == AUTO and stored is not None and (is_finished or (run_path / CHECKPOINT).is_file()):
        device = str(stored.settings.get("machine", {}).get("device", AUTO))
    if not is_finished or device == AUTO:
        device = str(torch_device(device, needs_float64=needs_float64))
    return replace_fields(machine, device=device)


def save_checkpoint(run_path: Path, device: str, state: Mapping[str, Any]) -> None:
    """Write the state of a run with the random generators of all processes, which must all call it."""
    own = {"cpu": torch.get_rng_state()}
    if device.startswith("cuda"):
        own["cuda"] = torch.cuda.get_rng_state(device)
    if device == "mps":
        own["mps"] = torch.mps.get_rng_state()
    generators = gather_objects(own)
    if process_rank() == 0:
        buffer = io.BytesIO()  # torch.save into a file does not raise OSError when the disk is full
        torch.save({**state, "generators": generators}, buffer)
        with replacing(run_path / CHECKPOINT) as temporary:
            temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(run_path: Path, device: str) -> dict[str, Any] | None:
    """Read the state of a run and restore this process's random generators; return None without a checkpoint.

    Raises:
        CorruptError: it cannot be read, or has changed since it was written.
        FingerprintError: another number of processes wrote it.
    """
    path = run_path / CHECKPOINT
    if not path.is_file():
        return None
    try:
        with ZipFile(path) as file:  # torch.load does not compare the checksums
            if file.testzip():
                raise ValueError("other bytes than were written")
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        generators = {name: state[name] for name in _NAMES}["generators"]
    except _UNREADABLE as error:
        reason = "objects that are no tensors" if isinstance(error, UnpicklingError) else f"an error: {one_line(error)}"
        raise CorruptError(f"{path}: expected a checkpoint, got {reason}; delete it to restart training") from error
    if len(generators) != num_processes():
        raise FingerprintError(
            f"{path}: expected {len(generators)} processes, which wrote it, got {num_processes()}; start "
            f"{len(generators)} processes, or delete it to restart training"
        )
    own = generators[process_rank()]
    torch.set_rng_state(own["cpu"].cpu())
    if device.startswith("cuda"):
        torch.cuda.set_rng_state(own["cuda"].cpu(), device)
    if device == "mps":
        torch.mps.set_rng_state(own["mps"].cpu())
    return state


class RunLog:
    """The log of a run: `losses.jsonl`, and trackers if named; of several processes, only the first writes.

    A context manager: it ends with the training. What follows the first `num_bytes`, which were written before the
    checkpoint, is cut off. A log that was deleted begins at the checkpoint.

    Raises:
        CorruptError: the log is shorter than that.
    """

    def __init__(
        self, run_path: Path, *, num_bytes: int, step: int, report_to: tuple[str, ...] = (), run_id: str = ""
    ) -> None:
        self._file, self._trackers = None, None
        if process_rank():
            return
        path = run_path / LOG
        size = path.stat().st_size if path.is_file() else 0
        if 0 < size < num_bytes:
            raise CorruptError(
                f"{path}: expected the {num_bytes:,} bytes of losses before the checkpoint, got {size:,}; delete it to "
                f"go on without them, or {CHECKPOINT} to restart training"
            )
        if report_to:
            config = read_info(run_path).settings
            self._trackers = Trackers(report_to, run_path, run_id=run_id, first_step=step, config=config)
        self._file = path.open("ab")
        self._file.truncate(min(size, num_bytes))

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._trackers is not None:
            self._trackers.finish(failed=kind is not None)

    def write(self, line: Mapping[str, Any], step: int, scalars: Mapping[str, float]) -> None:
        """Write a line of JSON, and report the scalars of a step to the trackers."""
        if self._file is not None:
            self._file.write(json.dumps(line).encode() + b"\n")
        if self._trackers is not None:
            self._trackers.log(step, scalars)

    def flush(self) -> int:
        """Flush all lines to the disk and return the number of bytes."""
        if self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()
