"""Files below a folder here or elsewhere, in an order that never changes, and the bytes of one of them.

What goes wrong when a file here or elsewhere is read, as our errors; and what a path is.
"""

import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from embedcache.errors import EmbedcacheError, ItemError, PathError, SourceError
from embedcache.files import io_reason, is_io_error, is_remote, is_url, library_of, open_path

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


IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
TABLE_SUFFIXES = frozenset({".parquet", ".csv", ".tsv", ".jsonl"})
TAR_SUFFIXES = frozenset({".tar"})
TEXT_SUFFIXES = frozenset({".npy", ".txt"})
IDX_IMAGES = re.compile(r"(?P<set>.+)-images[-.]idx3-ubyte(\.gz)?")
SPLIT_FOLDERS = frozenset({"train", "val", "valid", "validation", "test"})


def has_suffix(name: str, suffixes: frozenset[str]) -> bool:
    """Say whether a file name ends in one of `suffixes`, in either case."""
    return PurePosixPath(name).suffix.lower() in suffixes


def split_of(path: str) -> str | None:
    """Give the split that a relative path says: its top folder, where that is a split's name in either case."""
    top, slash, _ = path.partition("/")
    return top if slash and top.lower() in SPLIT_FOLDERS else None


def walk_files(root: Path) -> Iterator[tuple[str, Mapping[str, int]]]:
    """Go through all files below a folder, sorted by path.

    Hidden files and folders are left out, and so is a link that leads back to a folder above it.
    Only one folder's names are held at a time (and those of the folders above it).

    Yields:
        the path relative to `root`, with `/`, and all files of the same folder: name -> size in bytes, where the
        listing says it; else -1.

    Raises:
        PathError: a folder cannot be listed.
        SourceError: a name is not valid Unicode.
    """
    return _walk(root, "", ())


def relative_to(root: str, path: str) -> str:
    """Give the path below the root as text, or the whole path where it lies elsewhere. Text only: rows are many."""
    return _normal(path).removeprefix(f"{_normal(root).rstrip('/')}/")


def item_path(root: str, folder: str, written: str) -> str:
    """Give the path of an item as it is written down: relative to the root where it lies below it, else whole.

    Args:
        root: the source's folder, a path or a URL.
        folder: what `written` is relative to.
        written: a path relative to `folder`, an absolute path or a URL, which stays as it is.
    """
    if is_url(written):
        return written
    return relative_to(root, written if written.startswith("/") else f"{folder}/{written}")


def place_of(root: Path, written: str) -> Path:
    """Turn what `item_path` gave back into a path.

    Raises:
        ItemError: a URL of a kind that cannot be read.
        MissingExtraError: a URL, and the packages that read it are not installed.
    """
    if not is_url(written) and not written.startswith("/"):
        return root / written
    if is_url(written):
        check_reach(written)
    with reading(written, ItemError):
        return open_path(written)


def read_file(path: Path) -> bytes:
    """Get all bytes of an image file.

    Raises:
        ItemError: says why they cannot be had.
    """
    with reading(path, ItemError):
        return read_bytes(path)


def check_name(name: str, place: Path | str) -> str:
    """Refuse a name that no table could store.

    Raises:
        SourceError: it is not valid Unicode.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise SourceError(f"{place} holds a name that is not UTF-8: {name!r}; rename it") from None
    return name


def _normal(path: str) -> str:
    """Take `.`, `..` and doubled slashes out of a path, but for those of `s3://`."""
    scheme, mark, rest = path.partition("://") if is_url(path) else ("", "", path)
    return scheme + mark + posixpath.normpath(rest)


def _walk(folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, Mapping[str, int]]]:
    identity = _identity(folder)
    if identity in above:
        return
    names = _list_remote(folder) if is_remote(folder) else _list(folder)
    files = {name: size for name, size in names.items() if not name.endswith("/")}
    for name in sorted(names):
        if name.endswith("/"):
            yield from _walk(folder / name[:-1], prefix + name, (*above, identity) if identity else ())
        else:
            yield prefix + name, files


def _list(folder: Path) -> dict[str, int]:
    """List a folder; a folder's name ends in `/`, which sorts it as its files' paths do."""
    with reading(folder), os.scandir(folder) as entries:
        names = [_typed_name(entry) for entry in entries if not entry.name.startswith(".")]
    return {check_name(name, folder): -1 for name in names if name}


def _list_remote(folder: Path) -> dict[str, int]:
    """List a remote folder, sizes included: asking for each would be a request a file."""
    filesystem, here = remote_parts(folder)
    with reading(folder):
        entries = filesystem.ls(here, detail=True)
        filesystem.invalidate_cache(here)  # fsspec would keep the listing of every folder there is
    found = {}
    for entry in entries:
        name = entry["name"].rstrip("/").removeprefix(here.rstrip("/") + "/")
        if not name.startswith(".") and "/" not in name:  # the folder itself is listed where it is an object
            found[name + "/" * (entry["type"] == "directory")] = -1 if entry["size"] is None else entry["size"]
    return found


def _typed_name(entry: os.DirEntry[str]) -> str:
    """Give the name of a file, or of a folder with `/`, or nothing for a pipe or a device."""
    try:
        if entry.is_dir():
            return entry.name + "/"
        return entry.name if entry.is_file() or entry.is_symlink() else ""
    except OSError:  # a link to itself: as a file, it becomes an item that cannot be read
        return entry.name


def _identity(folder: Path) -> tuple[int, int] | None:
    """Tell folders apart that links lead to; None elsewhere, where there are no links."""
    if is_remote(folder):
        return None
    with reading(folder):
        status = folder.stat()
    return status.st_dev, status.st_ino
