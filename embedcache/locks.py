"""Locks between processes: a piece of a folder for one thread of one process, and leases on pieces of work."""

import errno
import fcntl
import os
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from embedcache.errors import PathError
from embedcache.files import io_reason, is_remote, make_folder

LOCK = ".lock"
"""File in a folder on which its locks are taken."""

SKIP_LOCKS = "EMBEDCACHE_SKIP_LOCKS"
"""Environment variable: with 1, a file system without record locks is used without: one process per folder or shard."""

_LEASES = ".claims"
"""File in a folder on which its leases are taken: piece n is byte n."""
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of NFS; of Lustre without the option flock
_IN_THIS_PROCESS: dict[tuple[str, int], threading.Lock] = defaultdict(threading.Lock)


@contextmanager
def locked(folder: Path, number: int = 0) -> Iterator[None]:
    """Lock a numbered piece of a folder for one thread of one process. The lock of a killed process is released.

    Behind a URL there are no locks: the last writer wins.

    Raises:
        PathError: the file system has no record locks; see `SKIP_LOCKS`.
    """
    lock = Leases(folder, LOCK)
    with _IN_THIS_PROCESS[str(folder.absolute()), number]:
        lock.acquire(number, wait=True)
        try:
            yield
        finally:
            lock.release(number)


def has_locks(folder: Path) -> bool:
    """Return whether processes can exclude each other in a folder: it is local, and locks are not skipped."""
    return not (is_remote(folder) or _skips_locks())


class Leases:
    """Leases of this process on numbered pieces of work in a folder. Those of a killed process are released.

    They are record locks on one file, so they exclude other processes of the machine and, if the file system supports
    it, of a cluster: `name` in the folder. Behind a URL every lease is granted to every process.
    """

    def __init__(self, folder: Path, name: str = _LEASES) -> None:
        self._path = folder / name

    @cached_property
    def _descriptor(self) -> int | None:
        if is_remote(self._path):
            return None
        descriptor = _open_shared(self._path)
        weakref.finalize(self, _close_shared, self._path)
        return descriptor

    def acquire(self, number: int | None, *, wait: bool = False) -> bool:
        """Acquire a lease, or all if None; return whether no other process has it. With `wait`, wait until it is free.

        Raises:
            PathError: the file system has no record locks; see `SKIP_LOCKS`.
        """
        if self._descriptor is None:
            return True
        return _lock(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), number, self._path)

    def release(self, number: int | None) -> None:
        """Release a lease, or all if None."""
        if self._descriptor is not None:
            _lock(self._descriptor, fcntl.LOCK_UN, number, self._path)


def _lock(descriptor: int, kind: int, number: int | None, path: Path) -> bool:
    """Take or release the record lock on a byte of a file, or on all; return whether no other process has it."""
    try:
        fcntl.lockf(descriptor, kind, int(number is not None), number or 0)  # a length of 0 is all of the file
    except OSError as error:
        if kind & fcntl.LOCK_NB and error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in _WITHOUT_LOCKS:
            raise
        if not _skips_locks():
            raise PathError(
                f"{path.parent}: its file system has no record locks ({io_reason(error)}); set {SKIP_LOCKS}=1 if no "
                "other process writes to this folder, or each extracts another --shard i/n"
            ) from error
    return True


def _skips_locks() -> bool:
    return os.environ.get(SKIP_LOCKS, "0") != "0"


_SHARED: dict[Path, int] = {}  # file -> its only descriptor in this process
_USERS: Counter[Path] = Counter()  # file -> locks and leases that use it
_SHARED_GUARD = threading.RLock()  # reentrant: garbage collection may finalize `Leases` in it


def _open_shared(path: Path) -> int:
    """Open a file for record locks once per process: closing any of its descriptors drops all of its locks."""
    path = path.absolute()
    with _SHARED_GUARD:
        _USERS[path] += 1
        try:
            if path not in _SHARED:
                make_folder(path.parent)
                _SHARED[path] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except BaseException:
            _USERS[path] -= 1
            raise
        return _SHARED[path]


def _close_shared(path: Path) -> None:
    """Close the file once its last user has closed it."""
    path = path.absolute()
    with _SHARED_GUARD:
        _USERS[path] -= 1
        if not _USERS[path]:
            os.close(_SHARED.pop(path))
