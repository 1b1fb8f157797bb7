"""Files that a user names to write to: reports, selections, exports.

A command replaces a file only with `--overwrite`, and never a link, a device or a folder. JSON reports have a digest,
which their readers compare.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedcache.errors import CorruptError, PathError
from embedcache.files import is_remote, remove_leftovers, replacing
from embedcache.provenance import add_digest, check_record, read_json

if TYPE_CHECKING:
    import pyarrow as pa

_METADATA = "embedcache"
"""Key of the schema metadata of Parquet."""
_WRITE_AGAIN = "write it again with the command that made it"
_REPLACES_FILES: ContextVar[bool] = ContextVar("replaces_files", default=True)


@contextmanager
def replacing_files(is_allowed: bool) -> Iterator[None]:  # noqa: FBT001
    """Replace existing outputs while this context lasts, or refuse to; without it, functions replace them."""
    token = _REPLACES_FILES.set(is_allowed)
    try:
        yield
    finally:
        _REPLACES_FILES.reset(token)


def check_output(path: Path) -> None:
    """Check that an output may be written to a path.

    Raises:
        PathError: the path is a folder, a link or a device; or a file that must not be replaced, see `replacing_files`;
            or files cannot be made in its folder.
    """
    exists = path.exists() if is_remote(path) else os.path.lexists(path)
    if exists and path.is_dir():
        raise PathError(f"{path}: expected a file, got a folder; name a file in it")
    if not is_remote(path):
        _check_folder(path)
    if not exists:
        return
    if not is_remote(path) and (path.is_symlink() or not path.is_file()):
        raise PathError(f"{path}: expected a new or regular file, got a link or a device; name another file")
    if not _REPLACES_FILES.get():
        raise PathError(f"{path}: expected a new file, got one that exists; name another file, or add --overwrite")


def _check_folder(path: Path) -> None:
    """Check that a file can be made in the folder of a path, or in the first folder above that exists."""
    folder = next(above for above in path.absolute().parents if os.path.lexists(above))
    if not folder.is_dir():
        raise PathError(f"{path}: expected a file in a folder, but {folder} is a file; name another file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PathError(f"{path}: no permission to write into {folder}; name a file in another folder")


def check_table_output(name: str, path: Path) -> None:
    """Check that an output ends in `.parquet`, and may be written there as by `check_output`.

    Args:
        name: name of the output in the error, such as `scores`.
        path: the file.

    Raises:
        PathError: the path has another suffix; or the errors of `check_output`.
    """
    if path.suffix != ".parquet":
        raise PathError(f"{name} {path}: expected a path that ends in .parquet, got {path.suffix or 'no suffix'}")
    check_output(path)


@contextmanager
def new_output(path: Path) -> Iterator[Path]:
    """Create a temporary local path whose file becomes the output `path` after the block; see `check_output`.

    After an error nothing is left; what a killed process left of the same output is removed.
    """
    check_output(path)
    remove_leftovers(path)
    with replacing(path) as temporary:
        yield temporary
        check_output(path)  # another process may have written it meanwhile


def write_output(path: Path, data: bytes) -> None:
    """Write an output atomically; see `check_output`."""
    with new_output(path) as temporary:
        temporary.write_bytes(data)


def write_report_json(path: Path, record: Any) -> None:
    """Write a report, an object or a list of objects, as JSON; each object has a digest."""
    digested = [add_digest(part) for part in record] if isinstance(record, list) else add_digest(record)
    write_output(path, (json.dumps(digested, indent=2, ensure_ascii=False) + "\n").encode())


def read_report_json(path: Path) -> Any:
    """Read a report or other JSON; `PathError` if there is none, `CorruptError` if a report has changed."""
    report = read_json(path)
    for part in report if isinstance(report, list) else [report]:
        if isinstance(part, dict):
            check_record(path, part, next_step=_WRITE_AGAIN)
    return report


def to_metadata(record: Mapping[str, Any]) -> dict[str, str]:
    """Return schema metadata of Parquet that says what a table belongs to."""
    return {_METADATA: json.dumps(record)}


def read_metadata(path: Path, schema: "pa.Schema") -> dict[str, Any]:
    """Return the record in the metadata of a table's schema; empty if it has none, `CorruptError` if it is none."""
    written = (schema.metadata or {}).get(_METADATA.encode())
    try:
        return {} if written is None else dict(json.loads(written))
    except (ValueError, TypeError) as error:
        raise CorruptError(f"{path} has changed since it was written: {error}; {_WRITE_AGAIN}") from error
