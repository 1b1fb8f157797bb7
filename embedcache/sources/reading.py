"""What goes wrong when a file here or elsewhere is read, as our errors; and what a path is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO, cast

from embedcache.errors import EmbedcacheError, ItemError, PathError
from embedcache.paths import io_reason, is_io_error, is_remote, library_of

_NOT_FOUND = 404
_FORBIDDEN = 403
_READ_AHEAD_BYTES = 2**18  # joins small columns that lie side by side

MOST_WITHIN_BYTES = 2**28
"""The longest file, or part of one, that is read as a whole within `reading_within`."""

_REACH: ContextVar[tuple[Path, ...] | None] = ContextVar("reach", default=None)


@contextmanager
def reading(path: Path | str, error_class: type[EmbedcacheError] = PathError) -> Iterator[None]:
    """Turn whatever a disk or a service raises into `error_class`, with the path and the reason in one line."""
    try:
        yield
    except (PathError, ItemError) as error:
        raise error_class(str(error)) from None
    except Exception as error:  # the services' own errors share no base
        if not is_io_error(error):
            raise
        if _is_missing(error):
            raise error_class(f"no such file: {path}") from None
        raise error_class(f"cannot read {path}: {io_reason(error)}") from None


@contextmanager
def reading_within(folders: Sequence[Path]) -> Iterator[None]:
    """Let this thread read nothing but files of this machine that lie, links followed, below some folders.

    For sources of a cache that a stranger may have made: what its tables name is read for others to see. Anything else
    is an `ItemError`; so is what is no regular file, and what is longer than 256 MiB.
    """
    token = _REACH.set(tuple(folder.resolve() for folder in folders))
    try:
        yield
    finally:
        _REACH.reset(token)


def check_reach(place: Path | str, num_bytes: int | None = None) -> None:
    """Refuse what `reading_within` does not let this thread read; nothing outside of it.

    Args:
        place: a path, or the text of a URL.
        num_bytes: how many are to be read; None is the whole file.

    Raises:
        ItemError: it lies elsewhere, is no regular file, or is too long.
    """
    folders = _REACH.get()
    if folders is None:
        return
    if isinstance(place, str) or is_remote(place):
        raise ItemError(f"{place} is a URL, and only files of the source's folder are read")
    real = place.resolve()
    if not any(real.is_relative_to(folder) for folder in folders):
        raise ItemError(f"{place} leads out of the source's folder")
    if real.exists() and not real.is_file():
        raise ItemError(f"{place} is no regular file")
    size = num_bytes if num_bytes is not None else real.stat().st_size if real.exists() else 0
    if size > MOST_WITHIN_BYTES:
        raise ItemError(f"{place} has {size:,} bytes to read, more than {MOST_WITHIN_BYTES:,}")


def is_folder(path: Path, file_suffixes: frozenset[str]) -> bool:
    """Say whether there is a folder.

    A remote path that ends in one of `file_suffixes` is a file: a web server would have to send it whole to find out.

    Raises:
        PathError: it cannot be asked.
    """
    if is_remote(path) and path.suffix.lower() in file_suffixes:
        return False
    with reading(path):
        return path.is_dir()


def file_size(path: Path, *, forbidden_is_missing: bool = False) -> int | None:
    """Get the size of a file in bytes; None where there is no file.

    Args:
        path: the file.
        forbidden_is_missing: takes a service's "forbidden" for "there is no file": S3 answers so to those who may
            read files but not list them.

    Raises:
        PathError: it cannot be asked.
    """
    with reading(path):
        try:
            if is_remote(path):
                return _remote_size(path)
            return path.stat().st_size if path.is_file() else None
        except OSError as error:
            if _is_missing(error) or (forbidden_is_missing and _is_forbidden(error)):
                return None
            raise


def read_bytes(path: Path) -> bytes:
    """Get all bytes of a file, from a service by one request. What goes wrong is raised as it comes."""
    check_reach(path)
    if not is_remote(path):
        return path.read_bytes()
    filesystem, name = remote_parts(path)
    return cast(bytes, filesystem.cat_file(name))


def open_binary(path: Path) -> BinaryIO:
    """Open a file to read any part of it; of a remote one, only the parts read are fetched.

    Raises:
        PathError: a web server that gives whole files only. What else goes wrong is raised as it comes.
    """
    check_reach(path, 0)
    if not is_remote(path):
        return path.open("rb")
    filesystem, name = remote_parts(path)
    file = cast(BinaryIO, filesystem.open(name, "rb", block_size=_READ_AHEAD_BYTES, cache_type="readahead"))
    if not file.seekable():
        file.close()
        raise PathError(no_parts(path))
    return file


def no_parts(path: Path) -> str:
    """Say that a server gives whole files only."""
    return f"{path}: the server gives no parts of a file (HTTP range requests); copy the file to this machine first"


def remote_parts(path: Path) -> tuple[Any, str]:
    """Get the fsspec file system of a remote path, and the path's name in it."""
    upath = cast(Any, path)
    return upath.fs, upath.path


def _remote_size(path: Path) -> int | None:
    filesystem, name = remote_parts(path)
    info = filesystem.info(name)
    if info["type"] != "file":
        return None
    if info["size"] is None:
        raise PathError(no_parts(path))
    return int(info["size"])


def _is_missing(error: BaseException) -> bool:
    """Say whether an error means that there is no file; fsspec says so of every answer of a web server, or none."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None and library_of(type(cause)) == "aiohttp":
        return getattr(cause, "status", None) == _NOT_FOUND
    return isinstance(error, FileNotFoundError | NotADirectoryError)


def _is_forbidden(error: OSError) -> bool:
    return isinstance(error, PermissionError) or getattr(error.__cause__, "status", None) == _FORBIDDEN
