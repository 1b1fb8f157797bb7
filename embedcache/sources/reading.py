"""What goes wrong when a file here or elsewhere is read, as our errors; and what a path is."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from embedcache.errors import EmbedcacheError, ItemError, PathError
from embedcache.paths import io_reason, is_io_error, is_remote, library_of

_NOT_FOUND = 404
_FORBIDDEN = 403
_READ_AHEAD_BYTES = 2**18  # joins small columns that lie side by side


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
    if not is_remote(path):
        return path.read_bytes()
    filesystem, name = remote_parts(path)
    return cast(bytes, filesystem.cat_file(name))


def open_binary(path: Path) -> BinaryIO:
    """Open a file to read any part of it; of a remote one, only the parts read are fetched.

    Raises:
        PathError: a web server that gives whole files only. What else goes wrong is raised as it comes.
    """
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
