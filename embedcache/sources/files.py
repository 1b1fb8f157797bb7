"""Files below a folder, in an order that never changes, and the bytes of one of them."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from embedcache.errors import ItemError, PathError, SourceError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
TABLE_SUFFIXES = frozenset({".parquet", ".csv", ".tsv", ".jsonl"})
TAR_SUFFIXES = frozenset({".tar"})
TEXT_SUFFIXES = frozenset({".npy", ".txt"})


def has_suffix(name: str, suffixes: frozenset[str]) -> bool:
    """Say whether a file name ends in one of `suffixes`, in either case."""
    return PurePosixPath(name).suffix.lower() in suffixes


def walk_files(root: Path) -> Iterator[tuple[str, frozenset[str]]]:
    """Go through all files below a folder, sorted by path.

    Hidden files and folders are left out, and so is a link that leads back to a folder above it.
    Only one folder's names are held at a time (and those of the folders above it).

    Yields:
        the path relative to `root`, with `/`, and the names of all files of the same folder.

    Raises:
        PathError: a folder cannot be listed.
        SourceError: a name is not valid Unicode.
    """
    return _walk(root, "", ())


def relative_to(root: Path, path: str | Path) -> str:
    """Give the path below the root as text, or the whole path where it lies elsewhere. Text only: rows are many."""
    normal = os.path.normpath(path)
    prefix = os.path.join(root, "")  # noqa: PTH118
    return normal.removeprefix(prefix)


def read_file(path: Path) -> bytes:
    """Get all bytes of an image file.

    Raises:
        ItemError: says why they cannot be had.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ItemError("no such file") from None
    except OSError as error:
        raise ItemError(f"cannot read {path}: {error.strerror}") from None


def read_beside(path: Path) -> bytes:
    """Get all bytes of a caption file.

    Raises:
        PathError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise PathError(f"cannot read {path}: {error.strerror}") from None


def _walk(folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, frozenset[str]]]:
    identity = _identity(folder)
    if identity in above:
        return
    names = _list(folder)
    files = frozenset(name for name in names if not name.endswith("/"))
    for name in names:
        if name.endswith("/"):
            yield from _walk(folder / name, prefix + name, (*above, identity))
        else:
            yield prefix + name, files


def _list(folder: Path) -> list[str]:
    """List a folder, sorted; a folder's name ends in `/`, which sorts it as its files' paths do."""
    try:
        with os.scandir(folder) as entries:
            names = [_typed_name(entry) for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise PathError(f"cannot list {folder}: {error.strerror}") from None
    return sorted(check_name(name, folder) for name in names if name)


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


def _typed_name(entry: os.DirEntry[str]) -> str:
    """Give the name of a file, or of a folder with `/`, or nothing for a pipe or a device."""
    try:
        if entry.is_dir():
            return entry.name + "/"
        return entry.name if entry.is_file() or entry.is_symlink() else ""
    except OSError:  # a link to itself: as a file, it becomes an item that cannot be read
        return entry.name


def _identity(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()
    except OSError as error:
        raise PathError(f"cannot open {folder}: {error.strerror}") from None
    return status.st_dev, status.st_ino
