"""Files below a folder here or elsewhere, in an order that never changes, and the bytes of one of them."""

import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from embedcache.errors import ItemError, SourceError
from embedcache.paths import is_remote, is_url, open_path
from embedcache.sources.reading import check_reach, read_bytes, reading, remote_parts

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
