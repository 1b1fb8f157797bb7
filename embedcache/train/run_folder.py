"""The folder of a run while it is trained: its lease, its settings, and its reuse once it is finished."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from embedcache.errors import PathError
from embedcache.files import Leases
from embedcache.projectors.saved import split_path
from embedcache.provenance import check_same, fields_of, prepare_folder, read_json, write_json
from embedcache.train.checkpoint import checkpoint_path
from embedcache.train.distributed import process_rank

T = TypeVar("T")
_FILES = (
    ".claims",
    "started.json",
    "split.parquet",
    "losses.jsonl",
    "checkpoint.pt",
    "last.safetensors",
    "record.json",
    "model.safetensors",
    "tensorboard",
)


def start_run(run_path: Path, values: Mapping[str, Any]) -> Leases:
    """Acquire a lease on the folder, for a new run or for an interrupted one with the same config values."""
    prepare_folder(run_path, kind="a run", marker="started.json", allowed=_FILES)
    leases = Leases(run_path)
    if not leases.acquire(0):
        raise PathError(f"another process trains into {run_path}; wait for it, or give the path of a new folder")
    path = run_path / "started.json"
    if checkpoint_path(run_path).is_file():
        next_step = "use the same settings to resume, or give the path of a new folder"
        check_same(f"the unfinished run {run_path}", read_json(path), values, next_step=next_step)
    else:
        split_path(run_path).unlink(missing_ok=True)
    write_json(path, values)
    return leases


def finish_run(run_path: Path, leases: Leases) -> None:
    """Remove the checkpoint of a run whose config was written, and release its lease."""
    checkpoint_path(run_path).unlink(missing_ok=True)
    leases.release(0)


def reuse_run(run_path: Path, stored: Mapping[str, Any], expected: Mapping[str, Any], make: Callable[[Any], T]) -> T:
    """Return the report in the record of a finished run; a config other than the expected one is refused."""
    next_step = "give the path of a new folder, or use the same settings"
    check_same(f"run {run_path}", stored, expected, next_step=next_step)
    if process_rank() == 0:
        checkpoint_path(run_path).unlink(missing_ok=True)
    path = run_path / "record.json"
    record = read_json(path)
    return fields_of(path, lambda: make(record["outcome"]))
