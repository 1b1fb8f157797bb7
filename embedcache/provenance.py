"""What every stage leaves on disk: fingerprints, manifests, and a record of the run."""

import hashlib
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from embedcache.errors import ArtifactError, CorruptError, FingerprintError, PathError
from embedcache.files import make_folder, remove_partials, write_atomic

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_RECORDED_PACKAGES = ("embedcache", "numpy", "torch", "zarr", "pyarrow", "onnxruntime", "faiss-cpu")
STORED_NAMES = {"index_digest": "spine"}
"""Field in code -> key on disk, where they differ; format 1 keeps the old key."""

T = TypeVar("T")


def canonical_json(value: Any) -> bytes:
    """Write JSON so that equal values give equal bytes: keys sorted, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode()


def digest(value: Any) -> str:
    """Get the SHA-256 of a JSON value as 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def digest_file(path: Path) -> str:
    """Get the SHA-256 of a file's bytes as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that people can read, atomically."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        PathError: there is no such file.
        CorruptError: it is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PathError(f"{path} does not exist") from error
    except ValueError as error:
        raise CorruptError(f"{path} is not valid JSON: {error}") from error


def read_manifest(path: Path, *, kind: str, latest_format: int, make: str) -> dict[str, Any]:
    """Read the JSON file whose presence says that its folder is complete.

    Args:
        path: the file.
        kind: what the folder is: `cache`, `run`, `index`.
        latest_format: the newest format that this version reads.
        make: the command that makes such a folder.

    Raises:
        PathError: there is no such folder, or it is not complete.
        ArtifactError: it is of a later format.
        CorruptError: the file is not JSON.
    """
    if not path.is_file():
        state = f"is not a finished {kind}: it has no {path.name}" if path.parent.exists() else "does not exist"
        raise PathError(f"{path.parent} {state}; make one with: {make}")
    values = read_json(path)
    found = values.get("format") if isinstance(values, dict) else None
    if found is None:
        raise ArtifactError(
            f"{path} was not written by embedcache; give the path of a {kind}, or make one with: {make}"
        )
    if not isinstance(found, int) or not 1 <= found <= latest_format:
        raise ArtifactError(
            f"{path.parent} has {kind} format {found}; this version reads 1 to {latest_format}: upgrade embedcache"
        )
    return dict(values)


def fields_of(path: Path, make: Callable[[], T]) -> T:
    """Build a dataclass from what `read_manifest` gave.

    Raises:
        CorruptError: fields are missing, or there are others.
    """
    try:
        return make()
    except (KeyError, TypeError) as error:
        raise CorruptError(f"{path} does not hold the fields of its format: {error}") from error


def to_record(artifact: "DataclassInstance", stored_names: Mapping[str, str] = STORED_NAMES) -> dict[str, Any]:
    """Return a dataclass as JSON values, under the names that its fields have on disk."""
    return {stored_names.get(name, name): value for name, value in asdict(artifact).items()}


def from_record(record: Mapping[str, Any], stored_names: Mapping[str, str] = STORED_NAMES) -> dict[str, Any]:
    """Return the values of a record under the names of the dataclass's fields."""
    names = {stored: name for name, stored in stored_names.items()}
    return {names.get(stored, stored): value for stored, value in record.items()}


def claim_folder(path: Path, *, kind: str, sign: str, ours: Collection[str]) -> None:
    """Create a folder for a stage's output, or take one that an earlier try of the same stage left.

    Args:
        path: the folder.
        kind: what it becomes, with its article: `a run`, `an index`.
        sign: the file that every earlier try has left.
        ours: names that the stage writes, or patterns of them.

    Raises:
        PathError: a file is in the way, or the folder holds other things; nothing is touched.
    """
    make_folder(path)
    remove_partials(path)
    names = {entry.name for entry in path.iterdir()}
    is_ours = sign in names
    foreign = sorted(name for name in names if not (is_ours and any(fnmatch(name, pattern) for pattern in ours)))
    if foreign:
        raise PathError(
            f"{path} is not {kind} and not empty: it holds {', '.join(foreign[:3])}; give the path of a new folder"
        )


def check_same(what: str, found: Mapping[str, Any], asked: Mapping[str, Any], *, next_step: str) -> None:
    """Refuse an artifact made with other settings than asked.

    Raises:
        FingerprintError: names each field that differs with both values.
    """
    differences = name_differences(found, asked)
    if differences:
        raise FingerprintError(f"{what} was made with other settings: {'; '.join(differences)}; {next_step}")


def name_differences(found: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Name each field that differs, with both values."""
    flat_found, flat_asked = _flatten(found), _flatten(asked)
    differing = [name for name in {**flat_found, **flat_asked} if flat_found.get(name) != flat_asked.get(name)]
    return [f"{name}: {flat_found.get(name)!r} there, {flat_asked.get(name)!r} asked" for name in differing]


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


@contextmanager
def run_record(path: Path, stage: str, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Keep who ran what, on what, and how long it took, as JSON at `path`.

    Args:
        path: where the record goes when the stage ends without an error.
        stage: `extract`, `train`, …
        settings: the stage's inputs and settings, as JSON values.

    Yields:
        A dict for the stage to put its outcome in.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    outcome: dict[str, Any] = {}
    yield outcome
    write_json(
        path,
        {
            "stage": stage,
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - clock, 3),
            "peak_memory_bytes": peak_memory_bytes(),
            "settings": dict(settings),
            "outcome": outcome,
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "packages": _installed_packages(),
        },
    )


def peak_memory_bytes() -> int:
    """Get the largest resident size this process has had, without that of the process that started it on Linux."""
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _installed_packages() -> dict[str, str]:
    installed = {}
    for name in _RECORDED_PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed
