"""What every stage leaves on disk: files that are whole or absent, fingerprints, and a record of the run."""

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from embedcache.errors import ArtifactError, CorruptError, DiskFullError, FingerprintError, PathError

_RECORDED_PACKAGES = ("embedcache", "numpy", "torch", "zarr", "pyarrow", "onnxruntime", "faiss-cpu")
T = TypeVar("T")
_PARTIAL = re.compile(r"\..+\.(?P<node>[^.]*)\.(?P<process>\d+)\.[0-9a-f]{8}\.partial")
_NODE = platform.node().replace(".", "-")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


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


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the system's word for a full disk into ours.

    Raises:
        DiskFullError: names the path; what was committed before stays.
    """
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        raise DiskFullError(
            f"no space left on the disk of {path}; what is committed is kept: "
            "free some space and run the same command again"
        ) from error


def _is_full(error: Exception) -> bool:
    """Say whether a disk is full, by number or, for libraries that write on their own, by text."""
    return getattr(error, "errno", None) in _NO_SPACE or "No space left on device" in str(error)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old one, the new one, or none.

    Raises:
        DiskFullError: nothing of it is left behind.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; after the block it is flushed to the disk and takes its place."""
    make_folder(path.parent)
    temporary = partial_path(path)
    try:
        with disk_errors(path):
            yield temporary
            flush(temporary)
            temporary.replace(path)
            flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def partial_path(path: Path) -> Path:
    """Name a hidden sibling of `path` that `remove_partials` knows as unfinished work of this process."""
    return path.with_name(f".{path.name}.{_NODE}.{os.getpid()}.{uuid4().hex[:8]}.partial")


def remove_partials(folder: Path) -> None:
    """Remove what killed processes of this machine left below a folder; a living one's files stay."""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            writer = _PARTIAL.fullmatch(name)
            if writer and writer["node"] == _NODE and not _is_alive(int(writer["process"])):
                path = Path(parent, name)
                shutil.rmtree(path, ignore_errors=True) if name in folders else path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, and is another user's
        return True
    return True


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time into a folder; others wait. A killed process holds nothing."""
    make_folder(folder)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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


def claim_folder(path: Path, *, kind: str, sign: str, ours: Collection[str]) -> None:
    """Create a folder for a stage's output, or take one that an earlier try of the same stage left.

    Args:
        path: the folder.
        kind: what it becomes, with its article: `a run`, `an index`.
        sign: the file that every earlier try has left.
        ours: names that the stage writes.

    Raises:
        PathError: a file is in the way, or the folder holds other things; nothing is touched.
    """
    make_folder(path)
    remove_partials(path)
    names = {entry.name for entry in path.iterdir()}
    foreign = sorted(names - set(ours) if sign in names else names)
    if foreign:
        raise PathError(
            f"{path} is not {kind} and not empty: it holds {', '.join(foreign[:3])}; give the path of a new folder"
        )


def make_folder(path: Path) -> None:
    """Create a folder for a stage's output.

    Raises:
        PathError: a file is in the way.
    """
    missing = [parent for parent in (path, *path.parents) if not parent.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        for created in missing:
            flush(created.parent)
    except (FileExistsError, NotADirectoryError) as error:
        raise PathError(f"{path} is a file, or lies below one; give the path of a folder") from error


def check_same(what: str, found: Mapping[str, Any], asked: Mapping[str, Any], *, next_step: str) -> None:
    """Refuse an artifact made with other settings than asked.

    Raises:
        FingerprintError: names each field that differs with both values.
    """
    flat_found, flat_asked = _flatten(found), _flatten(asked)
    differing = [name for name in {**flat_found, **flat_asked} if flat_found.get(name) != flat_asked.get(name)]
    if differing:
        fields = "; ".join(
            f"{name}: {flat_found.get(name)!r} there, {flat_asked.get(name)!r} asked" for name in differing
        )
        raise FingerprintError(f"{what} was made with other settings: {fields}; {next_step}")


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
    """Get the largest resident size this process has had."""
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
