"""The folder of a run while it is trained: lease, settings, checkpoint, log of losses; its reuse once finished."""

import hashlib
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, TypeVar
from zipfile import BadZipFile, ZipFile

import torch

from embedcache.dataset.inputs import PLAIN
from embedcache.dataset.splits import check_split
from embedcache.devices import AUTO, torch_device
from embedcache.errors import CorruptError, FingerprintError, PathError, one_line, pluralize
from embedcache.files import replacing, writing
from embedcache.locks import Leases
from embedcache.modalities import noun
from embedcache.projectors.saved import checked_weights_path, config_path, read_run_record, split_path
from embedcache.provenance import (
    check_same,
    construct,
    digest,
    prepare_folder,
    read_json,
    write_json,
)
from embedcache.records import record_stage
from embedcache.settings import replace_fields
from embedcache.store.cache import Cache
from embedcache.train.data import TrainData, parse_views
from embedcache.train.distributed import gather_objects, num_processes, process_rank, run_on_first
from embedcache.train.settings import MachineSettings
from embedcache.train.trackers import TrackedRun, Trackers

T = TypeVar("T")
R = TypeVar("R", bound="_Report")

FAILED = "failed "
"""Start of the names of `failed_digests` in the config of a run."""
_FILES = (
    ".claims",
    "started.json",
    "split.parquet",
    "selection.*",
    "losses.jsonl",
    "checkpoint.pt",
    "last.safetensors",
    "record.json",
    "model.safetensors",
    "tensorboard",
)
"""What the folder of a run may hold before it is finished."""
_UNREADABLE = (
    *(RuntimeError, KeyError, EOFError, ValueError, TypeError, AttributeError),
    *(UnpicklingError, BadZipFile, zlib.error, lzma.LZMAError, OSError),
)
"""Errors of reading a damaged checkpoint."""
_NAMES = ("objective", "optimizer", "scaler", "best", "step", "epoch", "pairs", "log_bytes", "generators", "run_id")


class _Report(Protocol):
    def to_json(self) -> dict[str, Any]: ...


def name_device(machine: MachineSettings, run_path: Path, *, needs_float64: bool = False) -> MachineSettings:
    """Return the settings with the device named: `auto` is that of the run in the folder, else the fastest.

    So the same command reuses a finished run, and resumes an interrupted one, also on a machine with another GPU.

    Raises:
        SettingError: the run is not finished, and its device does not exist.
    """
    device, is_finished = machine.device, config_path(run_path).is_file()
    if device == AUTO and is_finished:
        device = _recorded_device(config_path(run_path))
    elif device == AUTO and checkpoint_path(run_path).is_file():
        device = _recorded_device(run_path / "started.json")
    if not is_finished or device == AUTO:
        device = str(torch_device(device, needs_float64=needs_float64))
    return replace_fields(machine, device=device)


def _recorded_device(path: Path) -> str:
    """Return the device in the config of a run; `auto` of a file that cannot be read, which is reported later."""
    try:
        return str(read_json(path)["training"]["machine"]["device"])
    except (OSError, ValueError, LookupError, TypeError):
        return AUTO


def train_run(
    run_path: Path,
    config: Mapping[str, Any],
    fit: Callable[[], tuple[T, R]],
    save: Callable[[T], None],
    *,
    recorded: Mapping[str, Any],
) -> R:
    """Train into the folder of a run under its lease: a new run, or an interrupted one with the same config.

    Of several processes, which must all call it, the first writes the folder.

    Args:
        run_path: folder of the run.
        config: values of its `config.json`, apart from digests of files that training writes.
        fit: trains, and returns what was trained and the report.
        save: writes the weights, then `config.json`.
        recorded: settings in `record.json`.

    Raises:
        PathError: the folder holds other files, or another process trains into it.
        FingerprintError: the interrupted run has another config.
    """
    leases = run_on_first(lambda: _start_run(run_path, config))
    with writing(run_path):
        if leases is None:  # not the first process
            return fit()[1]
        with record_stage(run_path / "record.json", "train", recorded) as outcome:
            trained, report = fit()
            outcome.update(report.to_json())
        save(trained)
        checkpoint_path(run_path).unlink(missing_ok=True)
        leases.release(0)
    return report


def _start_run(run_path: Path, values: Mapping[str, Any]) -> Leases:
    """Acquire a lease on the folder, for a new run or for an interrupted one with the same config values."""
    prepare_folder(run_path, kind="a run", marker="started.json", allowed=_FILES)
    leases = Leases(run_path)
    if not leases.acquire(0):
        raise PathError(f"another process trains into {run_path}; wait for it, or give the path of a new folder")
    if config_path(run_path).is_file():
        leases.release(0)
        raise PathError(f"another process has just finished the run {run_path}; run the same command again to reuse it")
    path = run_path / "started.json"
    if checkpoint_path(run_path).is_file():
        next_step = "use the same settings to resume, or give the path of a new folder"
        stored, what = read_json(path), f"the unfinished run {run_path}"
        construct(path, lambda: _check_config(what, stored, values, next_step=next_step))
    else:
        split_path(run_path).unlink(missing_ok=True)
    write_json(path, values)
    return leases


def reuse_run(run_path: Path, stored: Mapping[str, Any], expected: Mapping[str, Any], make: Callable[[Any], T]) -> T:
    """Return the report in the record of a finished run; a config other than the expected one is refused.

    Raises:
        FingerprintError: the config is another one.
        CorruptError: the weights, the split or the record of the run are missing, or not those of its config.
    """
    next_step = "give the path of a new folder, or use the same settings"
    _check_config(f"run {run_path}", stored, expected, next_step=next_step)
    checked_weights_path(run_path, stored["weights_digest"])
    check_split(split_path(run_path))
    if process_rank() == 0 and checkpoint_path(run_path).exists():  # nothing may be removed on a read-only disk
        checkpoint_path(run_path).unlink(missing_ok=True)
    record = read_run_record(run_path, stored)
    return construct(run_path / "record.json", lambda: make(record["outcome"]))


def _check_config(what: str, stored: Mapping[str, Any], expected: Mapping[str, Any], *, next_step: str) -> None:
    """Check that a run has the expected config, then that no item of its features was retried since."""
    check_same(what, _comparable(stored), _comparable(expected), next_step=next_step)
    check_failed(what, stored.get("file_digests", {}), expected["file_digests"])


def _comparable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without failed items, and without paths of files whose digests it has: they may have moved."""
    digests, training = values.get("file_digests", {}), values["training"]
    if "split" in digests:
        training = {**training, "split": {**training["split"], "kind": "a file"}}
    if "selection" in digests:
        training = {**training, "selection": "a file"}
    digests = {name: value for name, value in digests.items() if not name.startswith(FAILED)}
    return {**values, "training": training, "file_digests": digests}


def check_not_extended(made: str, index_digest: str, caches: Sequence[Cache], *, next_step: str) -> None:
    """Check that no samples were appended to the caches since something was `made` of them (`run x was trained`).

    Raises:
        FingerprintError: names the cache and the number of new samples.
    """
    for stored, grown in zip(index_digest.split("+"), caches, strict=False):
        if num_new := grown.info.num_samples_since(stored):
            raise FingerprintError(
                f"{made} when {grown.path} had {pluralize(num_new, 'sample')} fewer; {next_step}, which stays valid "
                f"for the first {len(grown) - num_new:,} samples"
            )


def failed_digests(data: TrainData, views: Sequence[str] = ()) -> dict[str, str]:
    """Return the SHA-256 of the rows that lack a feature, by names such as `failed image` and `failed image@flip`.

    Sides and views that all items have are left out. Reads commits only.

    Args:
        views: as the setting of training has them.

    Raises:
        UnfinishedError: a feature has missing chunks.
    """
    found = dict(data.sides)
    for modality, weights in parse_views(views).items():
        opened = data.open_views(modality, weights)
        found |= {f"{modality}@{view}": features for view, features in opened.items() if view != PLAIN}
    digests = {}
    for name, features in found.items():
        for feature in features:
            feature.require_complete()
        rows = [feature.failed_rows for feature in features]
        if any(map(len, rows)):
            digests[f"{FAILED}{name}"] = digest([hashlib.sha256(own.tobytes()).hexdigest() for own in rows])
    return digests


def check_failed(what: str, stored: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Check that the items that lack features are those that did when something was trained, by `failed_digests`.

    Raises:
        FingerprintError: items were retried since.
    """
    for name, value in stored.items():
        if name.startswith(FAILED) and now.get(name) != value:
            modality, _, view = name.removeprefix(FAILED).partition("@")
            raise FingerprintError(
                f"{what} was made when other {noun(modality)}{view and ' of the view ' + view} had no features, which "
                "were retried since; give the path of a new folder to train with them"
            )


def checkpoint_path(run_path: Path) -> Path:
    """Return the path of the checkpoint of an unfinished run."""
    return run_path / "checkpoint.pt"


def save_checkpoint(run_path: Path, device: str, state: Mapping[str, Any]) -> None:
    """Write the state of a run with the random generators of all processes, which must all call it."""
    cuda = torch.cuda.get_rng_state(device) if device.startswith("cuda") else None
    own = {"cpu": torch.get_rng_state(), "cuda": cuda}
    if device == "mps":
        own["mps"] = torch.mps.get_rng_state()
    generators = gather_objects(own)
    if process_rank() == 0:
        buffer = io.BytesIO()  # torch.save into a file does not raise OSError when the disk is full
        torch.save({**state, "generators": generators}, buffer)
        with replacing(checkpoint_path(run_path)) as temporary:
            temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(run_path: Path, device: str) -> dict[str, Any] | None:
    """Read the state of a run and restore this process's random generators; return None without a checkpoint.

    Raises:
        CorruptError: it cannot be read, or has changed since it was written.
        FingerprintError: another number of processes wrote it.
    """
    path = checkpoint_path(run_path)
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
        path = run_path / "losses.jsonl"
        size = path.stat().st_size if path.is_file() else 0
        if 0 < size < num_bytes:
            raise CorruptError(
                f"{path}: expected the {num_bytes:,} bytes of losses before the checkpoint, got {size:,}; delete it to "
                f"go on without them, or {checkpoint_path(run_path).name} to restart training"
            )
        if report_to:
            started = run_path / "started.json"
            config = read_json(started) if started.is_file() else {}
            self._trackers = Trackers(report_to, TrackedRun(path=run_path, id=run_id, first_step=step, config=config))
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
