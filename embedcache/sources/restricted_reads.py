"""Limits on what the sources of untrusted caches read: regular local files below some folders."""

import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from embedcache.errors import ItemError
from embedcache.files import is_remote

_MAX_RESTRICTED_BYTES = 2**28
_ALLOWED_FOLDERS: ContextVar[tuple[Path, ...] | None] = ContextVar("allowed_folders", default=None)


@contextmanager
def restrict_reads(folders: Sequence[Path]) -> Iterator[None]:
    """Restrict reads of this thread to regular local files of at most 256 MiB below some folders, links resolved.

    For sources of untrusted caches, whose tables may name any path. Any other read raises `ItemError`.
    """
    token = _ALLOWED_FOLDERS.set(tuple(folder.resolve() for folder in folders))
    try:
        yield
    finally:
        _ALLOWED_FOLDERS.reset(token)


def check_read_allowed(path: Path | str, num_bytes: int | None = None) -> None:
    """Check that `restrict_reads` allows this thread to read `num_bytes`, or all, of a path, or of a URL as text."""
    if "\0" in str(path):  # no file can have that name, and Python raises a ValueError
        raise ItemError(f"expected a path without null characters, got {str(path)!r}")
    folders = _ALLOWED_FOLDERS.get()
    if folders is None:
        return
    if isinstance(path, str) or is_remote(path):
        raise ItemError(f"{path} is a URL; expected a file in the source's folder")
    real = path.resolve()
    if not any(real.is_relative_to(folder) for folder in folders):
        raise ItemError(f"{path} is outside the source's folder")
    if real.exists() and not real.is_file():
        raise ItemError(f"{path} is not a regular file")
    size = num_bytes if num_bytes is not None else real.stat().st_size if real.exists() else 0
    if size > _MAX_RESTRICTED_BYTES:
        raise ItemError(f"{path}: expected at most {_MAX_RESTRICTED_BYTES:,} bytes to read, got {size:,}")


def open_descriptor(path: Path) -> int:
    """Open a local file for reading, and check what was opened: a device or a pipe may never end.

    A check of the name alone could be passed by one file and another one be read, if a link is changed in between.
    Errors of the disk are raised unchanged.

    Raises:
        ItemError: it is not a regular file; or, within `restrict_reads`, it is outside its folders or too large.
    """
    folders = _ALLOWED_FOLDERS.get()
    check_read_allowed(path, 0)  # so that no device is opened, except by a change right now
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for its writer
    try:
        if folders is not None and not any(_opened_path(descriptor).is_relative_to(folder) for folder in folders):
            raise ItemError(f"{path} is outside the source's folder")
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ItemError(f"{path} is not a regular file")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _opened_path(descriptor: int) -> Path:
    """Return the path of an open file."""
    if hasattr(fcntl, "F_GETPATH"):  # macOS
        return Path(os.fsdecode(fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0")))
    return Path(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115
