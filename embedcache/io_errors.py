"""Errors of disks and remote services: which errors are theirs, their reason in one line, and errors of this package.

The classes of services have no common base class, and are recognized by the library that defines or raised them, so
that none of these libraries has to be imported.
"""

import errno
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedcache.errors import DiskFullError, EmbedcacheError, PathError

_SERVICES = frozenset(
    {"aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "s3fs", "upath", "yarl"}
    | {"huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2"}
)
_UNCLASSIFIED = (ValueError, NotImplementedError)
"""What file systems also raise: of a URL that they cannot parse, an unexpected answer, a server that takes no files."""
_HUB_REASONS = {
    "GatedRepoError": "its access is restricted: accept its terms on its page, and run: hf auth login",
    "RepositoryNotFoundError": "no such repository, or a private one: check the name, or run: hf auth login",
    "RevisionNotFoundError": "no such revision",
    "EntryNotFoundError": "no such file",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
}
"""Class of the Hub's library, the more special ones first -> reason; their own texts are paragraphs."""
_LONGEST_REASON = 300
_ARROW_REASON = re.compile(r".* Detail: \[errno \d+\] ", re.DOTALL)
"""What Arrow writes in front of the reason of the operating system: what it was about to do, with the file."""


def is_io_error(error: BaseException) -> bool:
    """Return whether an error comes from a disk or a remote service; those of services have no common base class."""
    is_of_service = any(library_of(kind) in _SERVICES for kind in type(error).__mro__)
    return isinstance(error, OSError) or is_of_service or (isinstance(error, _UNCLASSIFIED) and _is_from_service(error))


def _is_from_service(error: BaseException) -> bool:
    """Return whether a library for remote services raised an error, or had the standard library raise it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames]
    return next((name in _SERVICES for name in reversed(names) if name not in sys.stdlib_module_names), False)


def io_reason(error: BaseException) -> str:
    """Return the reason of a disk or service in one line; for web servers, fsspec has it in the cause."""
    names = {kind.__name__ for kind in type(error).__mro__ if library_of(kind) == "huggingface_hub"}
    if "LocalEntryNotFoundError" in names:  # of what is neither here nor could be asked for
        return io_reason(error.__cause__) if error.__cause__ else "not downloaded yet, and HF_HUB_OFFLINE is set"
    if names & set(_HUB_REASONS):
        return next(reason for name, reason in _HUB_REASONS.items() if name in names)
    if isinstance(error, FileNotFoundError) and error.__cause__:
        return _first_line(error.__cause__)
    if isinstance(error, NotImplementedError):
        return "not supported by URLs of this protocol"
    reason = (isinstance(error, OSError) and error.strerror) or _first_line(error)
    return _ARROW_REASON.sub("", reason)


def library_of(kind: type) -> str:
    """Return the name of the library that defines a class."""
    return kind.__module__.partition(".")[0]


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's message: those of services continue with paragraphs of advice."""
    return (str(error).partition("\n")[0] or type(error).__name__)[:_LONGEST_REASON]


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Raise errors of the system as `PathError`; those of libraries for damaged files, which have no number, stay."""
    try:
        yield
    except OSError as error:
        if isinstance(error, EmbedcacheError) or error.errno is None:
            raise
        raise PathError(f"cannot read {path}: {io_reason(error)}") from error


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise errors of a full disk as `DiskFullError`, which some libraries report only by its message.

    Other errors of the system get the path if they name no file, as those of a write or a flush do not.
    """
    try:
        yield
    except Exception as error:
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if not is_full and "No space left on device" not in str(error):
            if isinstance(error, OSError) and error.errno is not None and error.filename is None:
                error.filename = str(path)
            raise
        raise DiskFullError(disk_full_message(f" of {path}")) from error


def disk_full_message(disk: str = "") -> str:
    """Return the text of a full disk's error."""
    return f"no space left on the disk{disk}; free some space and rerun the same command"


@contextmanager
def service_errors(path: Path) -> Iterator[None]:
    """Raise write errors of a remote service as `PathError`."""
    try:
        yield
    except Exception as error:
        if not is_io_error(error):
            raise
        raise PathError(f"cannot write {path}: {io_reason(error)}; what is committed is kept") from error
