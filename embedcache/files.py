"""A path on this machine, or a URL (`s3://bucket/folder`, `gs://`, `https://`) that answers like one.

Files that are whole or absent, here or behind a URL; locks between processes; and what a full disk says.
"""

import errno
import fcntl
import os
import platform
import re
import shutil
import tempfile
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import cast
from uuid import uuid4

from embedcache.errors import DiskFullError, PathError
from embedcache.registry import require

_SERVICES = frozenset({"aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "s3fs"})
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss"})
_LONGEST_REASON = 300
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def open_path(location: str | Path) -> Path:
    """Turn what a user typed into a path.

    A URL becomes an object with the methods of `Path` (of the package universal-pathlib, which reads and writes
    through fsspec); credentials, regions and endpoints come from the environment as that service's own tools take them.

    Raises:
        MissingExtraError: a URL, and the packages that read it are not installed.
        PathError: a URL of a kind that fsspec does not know, or of a server that does not answer.
    """
    if isinstance(location, Path) or not is_url(str(location)):
        return Path(location)
    upath = require("upath", extra="remote")
    try:
        path = upath.UPath(str(location), use_listings_cache=False)  # other processes write there too
        path.fs  # noqa: B018  # imports what reads such URLs
    except ValueError as error:
        raise PathError(f"{location} is a URL of a kind that cannot be read: {error}") from None
    except OSError as error:  # some file systems connect at once
        raise PathError(f"cannot reach {location}: {io_reason(error)}") from None
    except ImportError as error:
        raise PathError(f"{location} needs a package that is not installed: {error}") from None
    return cast(Path, path)


def is_url(location: str) -> bool:
    """Say whether a text is a URL rather than a path on this machine."""
    return _URL.match(location) is not None


def is_remote(path: Path) -> bool:
    """Say whether a path from `open_path` is elsewhere: no locks, no renames, no memory maps."""
    return not isinstance(path, Path)


def has_no_folders(path: Path) -> bool:
    """Say whether a remote path is in an object store, where a folder is but a part of a name, the first a bucket."""
    protocols: str | tuple[str, ...] = path.fs.protocol  # type: ignore[attr-defined]
    return not _OBJECT_STORES.isdisjoint({protocols} if isinstance(protocols, str) else protocols)


def is_io_error(error: BaseException) -> bool:
    """Say whether an error is a disk's or a service's, rather than a mistake of ours. The services' share no base."""
    gives_no_parts = isinstance(error, ValueError) and "range requests" in str(error)  # fsspec, of a web server
    return isinstance(error, OSError) or gives_no_parts or any(library_of(k) in _SERVICES for k in type(error).__mro__)


def io_reason(error: BaseException) -> str:
    """Give a disk's or a service's reason in one line; fsspec hides that of a web server in the cause."""
    if isinstance(error, FileNotFoundError) and error.__cause__:
        return _one_line(error.__cause__)
    return (isinstance(error, OSError) and error.strerror) or _one_line(error)


def library_of(kind: type) -> str:
    """Name the library that a class comes from."""
    return kind.__module__.partition(".")[0]


def _one_line(error: BaseException) -> str:
    return (str(error).partition("\n")[0] or type(error).__name__)[:_LONGEST_REASON]


_PARTIAL = re.compile(r"\..+\.(?P<node>[^.]*)\.(?P<process>\d+)\.[0-9a-f]{8}\.partial")
_NODE = platform.node().replace(".", "-")
LOCK = ".lock"
"""The file in a folder that its locks stand in."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_TAKEN = (errno.EACCES, errno.EAGAIN)


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
        raise DiskFullError(disk_full_message(f" of {path}")) from error


def disk_full_message(disk: str = "") -> str:
    """Return the text of a full disk's error."""
    return f"no space left on the disk{disk}; finished work is kept: free some space and rerun the same command"


def _is_full(error: Exception) -> bool:
    """Say whether a disk is full, by number or, for libraries that write on their own, by text."""
    return getattr(error, "errno", None) in _NO_SPACE or "No space left on device" in str(error)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old one, the new one, or none.

    Raises:
        DiskFullError: nothing of it is left behind.
    """
    if is_remote(path):
        _put(path, data)
        return
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path on this machine; after the block its file is flushed and takes the place of `path`."""
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / path.name
            yield temporary
            put_file(temporary, path)
        return
    make_folder(path.parent)
    temporary = partial_path(path)
    try:
        with disk_errors(path):
            yield temporary
            put_file(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """Give a folder to fill, of the same name and on the same disk; after the block it is `folder`, or nothing is.

    Raises:
        DiskFullError: nothing of it is left behind.
    """
    make_folder(folder.parent)
    remove_leftovers(folder)
    scratch = partial_path(folder)
    temporary = scratch / folder.name
    try:
        with disk_errors(folder):
            temporary.mkdir(parents=True)
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                flush(path)
            temporary.rename(folder)
            flush(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def put_file(file: Path, path: Path) -> None:
    """Put a file of this machine in the place of `path`, flushed; a URL's object appears whole or not at all."""
    if is_remote(path):
        with _service_errors(path):
            make_folder(path.parent)
            path.fs.put_file(str(file), path.path)  # type: ignore[attr-defined]
        return
    flush(file)
    make_folder(path.parent)
    file.replace(path)
    flush(path.parent)


def _put(path: Path, data: bytes) -> None:
    with _service_errors(path):
        make_folder(path.parent)
        path.fs.pipe_file(path.path, data)  # type: ignore[attr-defined]


@contextmanager
def _service_errors(path: Path) -> Iterator[None]:
    """Turn what a service says when it does not take a file into our error.

    Raises:
        PathError: names the URL and the reason.
    """
    try:
        yield
    except Exception as error:
        if not is_io_error(error):
            raise
        raise PathError(f"cannot write {path}: {io_reason(error)}; what is committed is kept") from error


def partial_path(path: Path) -> Path:
    """Name a hidden sibling of `path` that `remove_partials` knows as unfinished work of this process."""
    return path.with_name(f".{path.name}.{_NODE}.{os.getpid()}.{uuid4().hex[:8]}.partial")


def remove_partials(folder: Path) -> None:
    """Remove what killed processes of this machine left below a folder; a living one's files stay."""
    if is_remote(folder):
        return
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            _remove_left(Path(parent, name))


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes of this machine left beside `path` when they wrote it; living ones keep theirs."""
    if not is_remote(path):
        for left in path.parent.glob(f".{path.name}.*.partial"):
            _remove_left(left)


def _remove_left(path: Path) -> None:
    """Remove a file or folder whose name says that a process wrote it that is no more."""
    writer = _PARTIAL.fullmatch(path.name)
    if writer and writer["node"] == _NODE and not _is_alive(int(writer["process"])):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, and is another user's
        return True
    return True


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk; behind a URL they are there once written."""
    if is_remote(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder for a stage's output.

    Raises:
        PathError: a file is in the way.
    """
    if is_remote(path):
        if not has_no_folders(path):
            with _service_errors(path):
                path.mkdir(parents=True, exist_ok=True)
        return
    missing = [parent for parent in (path, *path.parents) if not parent.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        for created in missing:
            flush(created.parent)
    except (FileExistsError, NotADirectoryError) as error:
        raise PathError(f"{path} is a file, or lies below one; give the path of a folder") from error


def remove_folder(path: Path) -> None:
    """Remove a folder and all that is in it."""
    if is_remote(path):
        path.fs.rm(path.path, recursive=True)  # type: ignore[attr-defined]
    else:
        shutil.rmtree(path)


_IN_THIS_PROCESS: dict[tuple[str, int], threading.Lock] = defaultdict(threading.Lock)


@contextmanager
def locked(folder: Path, number: int = 0) -> Iterator[None]:
    """Let one thread of one process at a time at a numbered piece of a folder; others wait. The killed hold nothing.

    Behind a URL there are no locks, so nobody waits: there the last writer wins.
    """
    if is_remote(folder):
        yield
        return
    path = folder / LOCK
    with _IN_THIS_PROCESS[str(folder.absolute()), number]:
        descriptor = _open_shared(path)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, number)
            try:
                yield
            finally:
                fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, number)
        finally:
            _close_shared(path)


_SHARED: dict[Path, int] = {}
_USERS: Counter[Path] = Counter()
_SHARED_GUARD = threading.RLock()  # a thread that holds it may be made to collect garbage, claims too


def _open_shared(path: Path) -> int:
    """Open a file for record locks once in a process: closing any descriptor of it would drop all its locks."""
    path = path.absolute()
    with _SHARED_GUARD:
        _USERS[path] += 1
        try:
            if path not in _SHARED:
                make_folder(path.parent)
                _SHARED[path] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        except BaseException:
            _USERS[path] -= 1
            raise
        return _SHARED[path]


def _close_shared(path: Path) -> None:
    """Close it with the last who opened it."""
    path = path.absolute()
    with _SHARED_GUARD:
        _USERS[path] -= 1
        if not _USERS[path]:
            os.close(_SHARED.pop(path))


class Leases:
    """Which of a folder's numbered pieces of work this process has taken. A killed process has taken nothing.

    They are record locks on one file, so they hold between the processes of a machine and, where the file system
    supports it, of a cluster. Behind a URL everything can be taken by everybody.

    Args:
        folder: where the file `.claims` lies; it is made when something is taken.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _descriptor(self) -> int | None:
        if is_remote(self._folder):
            return None
        path = self._folder / ".claims"
        descriptor = _open_shared(path)
        weakref.finalize(self, _close_shared, path)
        return descriptor

    def take(self, number: int, *, waits: bool = False) -> bool:
        """Take a piece of work unless another process has it; or wait until that is done with it."""
        if self._descriptor is None:
            return True
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB), 1, number)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            return False
        return True

    def give_back(self, number: int) -> None:
        """Let others have it."""
        if self._descriptor is not None:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, number)
