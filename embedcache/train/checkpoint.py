"""What a run writes while it is trained: the checkpoint, from which it resumes to the bit, and the log of losses.

Trackers, TensorBoard and Weights & Biases, get the values of the log, too.
"""

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple
from zipfile import ZipFile

import torch

from embedcache.devices import AUTO, torch_device
from embedcache.errors import CorruptError, FingerprintError, SettingError, one_line
from embedcache.files import replacing
from embedcache.registry import require, unknown_name
from embedcache.runs import CHECKPOINT, LOG, MANIFEST, read_info
from embedcache.settings import replace_fields
from embedcache.train.distributed import gather_objects, num_processes, process_rank
from embedcache.train.settings import MachineSettings

TRACKERS = ("tensorboard", "wandb")


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
        generators = state["generators"]
    except Exception as error:  # a damaged file raises any
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

    Args:
        run_path: folder of the run, as the user named it.
        num_bytes: bytes of the log before the checkpoint.
        step: step that is logged next; above 0, the run resumes.
        report_to: names of trackers.
        run_id: random text that stays the same when the run resumes.

    Raises:
        CorruptError: the log is shorter than that.
        SettingError: a tracker cannot start, such as without a login.
    """

    def __init__(
        self, run_path: Path, *, num_bytes: int, step: int, report_to: Sequence[str] = (), run_id: str = ""
    ) -> None:
        self._file = None
        self._trackers: list[_Tracker] = []
        if process_rank():
            return
        path = run_path / LOG
        size = path.stat().st_size if path.is_file() else 0
        if 0 < size < num_bytes:
            raise CorruptError(
                f"{path}: expected the {num_bytes:,} bytes of losses before the checkpoint, got {size:,}; delete it to "
                f"go on without them, or {CHECKPOINT} to restart training"
            )
        self._trackers = [_open_tracker(name, run_path, run_id=run_id, first_step=step) for name in report_to]
        self._file = path.open("ab")
        self._file.truncate(min(size, num_bytes))

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.finish(kind is not None)

    def write(self, line: Mapping[str, Any], step: int, scalars: Mapping[str, float]) -> None:
        """Write a line of JSON, and report the scalars of a step to the trackers."""
        if self._file is not None:
            self._file.write(json.dumps(line).encode() + b"\n")
        for tracker in self._trackers:
            tracker.log(step, scalars)

    def flush(self) -> int:
        """Flush all lines to the disk and return the number of bytes."""
        if self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()


class _Tracker(NamedTuple):
    log: Callable[[int, Mapping[str, float]], object]
    finish: Callable[[bool], object]


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers exist, and that their libraries are installed.

    Raises:
        UnknownNameError: there is no tracker of a name.
        MissingExtraError: its library is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise unknown_name("tracker", name, TRACKERS)
        require(name, package=name)


def _open_tracker(name: str, run_path: Path, *, run_id: str, first_step: int) -> _Tracker:
    """Open a tracker: event files in the folder `tensorboard` of the run, or a run in the project WANDB_PROJECT.

    Steps that a resumed run repeats are hidden in TensorBoard, and ignored by Weights & Biases.
    """
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(run_path / name), purge_step=first_step)

            def log(step: int, scalars: Mapping[str, float]) -> None:
                for key, value in scalars.items():
                    writer.add_scalar(key, value, step)

            return _Tracker(log, lambda _: writer.close())

        wandb = require("wandb", package="wandb")
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "embedcache",
            id=run_id,
            name=str(run_path),
            config=dict(read_info(run_path).settings),
            resume="allow",
            reinit="create_new",  # a run that the caller has open stays open
            settings=wandb.Settings(console="off"),  # prints are not copied
        )
        return _Tracker(lambda step, scalars: run.log(dict(scalars), step=step), lambda failed: run.finish(int(failed)))
    except Exception as error:
        raise SettingError(f"report_to: {name} cannot start: {one_line(error)}; check it, or omit it") from error
