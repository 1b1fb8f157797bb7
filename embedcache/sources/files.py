"""Files of sources, local and remote: names and types, listing, reading, and captions in `.txt` and `.json` sidecars.

What the sources of caches read is restricted to regular files below some folders and URLs.
"""

import json
import os
import posixpath
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from embedcache.errors import ItemError, PathError, SourceError
from embedcache.files import decode_text, is_missing, is_remote, is_url, open_path, read_file, reading, split_lines
from embedcache.modalities import FileItem, Sample, Scalar, TextItem

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})

MEDIA_SUFFIXES: Mapping[str, frozenset[str]] = {
    "image": IMAGE_SUFFIXES,
    "video": frozenset({".mp4", ".mkv", ".webm", ".avi", ".mov"}),
    "audio": frozenset({".wav", ".flac", ".mp3", ".ogg", ".m4a", ".opus"}),
    "points": frozenset({".npz"}),
}
"""Modality -> suffixes of its files, lower case."""

TABLE_SUFFIXES = frozenset({".parquet", ".csv", ".tsv", ".jsonl"})
_SINGLE_ITEM_SUFFIXES = frozenset[str]().union(*MEDIA_SUFFIXES.values())
JSON_SUFFIXES = frozenset({".json"})
TAR_SUFFIXES = frozenset({".tar"})
TEXT_SUFFIXES = frozenset({".txt"})
_SPLIT_FOLDERS = frozenset({"train", "val", "valid", "validation", "test"})

SHARD_SEPARATOR = "::"
"""Separates several paths or patterns in the location of a WebDataset."""

_WINDOW_BYTES = 2**17  # of a local file: the headers of several small members of a tar
_READ_AHEAD_BYTES = 2**18  # one request for small columns that are adjacent in the file
_RESTRICTION: ContextVar[tuple[Sequence[str], int | None] | None] = ContextVar("restriction", default=None)

SIDECAR_SUFFIXES = frozenset({".json", ".txt"})
CAPTION_ERROR = "caption_error"

_SCALARS = (str, int, float, bool, type(None))
_CAPTION_FIELDS = ("caption", "captions", "text", "texts")
_RESERVED = frozenset({*_CAPTION_FIELDS, "key", "language"})
"""Fields of a `.json` that are not columns."""


def is_key_of_file(key: str, path: str) -> bool:
    """Return whether the key of a sample is the path of an item, with or without its suffix."""
    return key in (path, str(PurePosixPath(path).with_suffix("") if path else ""))


def file_name_beside_key(path: str | None, key: str) -> str | None:
    """Return the name of an item's file to show beside the key; None if it would tell nothing more.

    So it is for a file that holds many items, such as a table or a shard, and for one that the key is named after.
    """
    file = PurePosixPath((path or "").partition("?")[0])  # of a URL, without its query
    is_single = file.suffix.lower() in _SINGLE_ITEM_SUFFIXES
    return file.name if is_single and file.stem != PurePosixPath(key).name else None


@contextmanager
def restrict_reads(places: Sequence[str], max_bytes: int | None = None) -> Iterator[None]:
    """Restrict reads of this thread to regular files below some folders and URLs, and to `max_bytes` of a local file.

    Any other read raises `ItemError`. The folders are resolved, and so are links to files.
    """
    token = _RESTRICTION.set((places, max_bytes))
    try:
        yield
    finally:
        _RESTRICTION.reset(token)


def is_below(path: Path | str, places: Sequence[str]) -> bool:
    """Return whether a local path without links, or a URL, is one of some places or below one."""
    if isinstance(path, Path):
        return any(path.is_relative_to(place) for place in places if not is_url(place))
    url = str(path)
    return ".." not in url.split("/") and any(f"{url}/".startswith(f"{place}/") for place in places if is_url(place))


def check_read_allowed(path: Path | str, num_bytes: int | None = None) -> None:
    """Check that a path names a regular file that this thread may read, or that a URL is one that it may read.

    Errors of the disk are raised unchanged.

    Args:
        path: local path, remote path, or URL as text.
        num_bytes: number of bytes to read of a local file. If None, all.

    Raises:
        ItemError: it is a device or a pipe, which may never end; or `restrict_reads` forbids to read it.
    """
    if "\0" in str(path):  # no file can have that name, and Python raises a ValueError
        raise ItemError(f"expected a path without null characters, got {str(path)!r}")
    places, max_bytes = _RESTRICTION.get() or (None, None)
    if places is not None and not is_below(path.resolve() if isinstance(path, Path) else path, places):
        raise ItemError(f"outside the source and --image-folder: {path}")
    if not isinstance(path, Path):
        return

    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ItemError(f"not a regular file: {path}")
    size = status.st_size if num_bytes is None else num_bytes
    if max_bytes is not None and size > max_bytes:
        raise ItemError(f"too large: {path} has {size:,} bytes, more than {max_bytes:,}")


def is_folder(path: Path, file_suffixes: frozenset[str]) -> bool:
    """Return whether a path is a folder; PathError if the disk or service does not answer.

    A remote path that ends in one of `file_suffixes` counts as a file: a web server would have to send all of it to
    find out.
    """
    if is_remote(path) and path.suffix.lower() in file_suffixes:
        return False
    with reading(path):
        return path.is_dir()


def file_size(path: Path) -> int | None:
    """Return the size of a file in bytes, None if there is none; PathError if the disk or service does not answer."""
    with reading(path):
        try:
            if is_remote(path):
                return _remote_size(path)
            return path.stat().st_size if path.is_file() else None
        except OSError as error:
            if is_missing(error):
                return None
            raise


def require_file(path: Path) -> None:
    """Check that a path is a file, or raise a PathError."""
    if file_size(path) is None:
        state = "is a folder" if is_folder(path, frozenset()) else "does not exist"
        raise PathError(f"expected a file, got {path}, which {state}; check the path")


def _remote_size(path: Path) -> int | None:
    filesystem, name = remote_filesystem(path)
    info = filesystem.info(name)
    if info["type"] != "file":
        return None
    if info["size"] is None:
        raise PathError(_no_range_requests(path))
    return int(info["size"])


def read_bytes(path: Path) -> bytes:
    """Read a whole file, with one request if it is remote. Errors of the disk or service are raised unchanged."""
    check_read_allowed(path)
    return read_file(path)


def read_item_file(path: Path) -> bytes:
    """Read the bytes of an item's file; ItemError with the reason if it cannot be read."""
    with reading(path, error_class=ItemError):
        return read_bytes(path)


def open_binary(path: Path, *, num_bytes: int = _READ_AHEAD_BYTES, cache_type: str = "readahead") -> BinaryIO:
    """Open a file for random access; of a remote file, only the parts read are fetched.

    Args:
        path: the file.
        num_bytes: bytes of a remote file that are fetched at once.
        cache_type: which of them fsspec keeps, such as `readahead` or `background`.

    Raises:
        PathError: the web server has no range requests. Other errors are raised unchanged.
    """
    check_read_allowed(path, 0)
    if not is_remote(path):
        return path.open("rb", buffering=_WINDOW_BYTES)
    filesystem, name = remote_filesystem(path)
    file = cast(BinaryIO, filesystem.open(name, "rb", block_size=num_bytes, cache_type=cache_type))
    if not file.seekable():
        file.close()
        raise PathError(_no_range_requests(path))
    return file


def _no_range_requests(path: Path) -> str:
    """Return the text of the error for a web server that sends whole files only."""
    return f"{path}: the server does not support HTTP range requests; copy the file to this machine first"


def remote_filesystem(path: Path) -> tuple[Any, str]:
    """Return the fsspec file system of a remote path, and the name of the path in it."""
    return path.fs, path.path  # type: ignore[attr-defined]


def has_suffix(name: str, suffixes: frozenset[str]) -> bool:
    """Return whether a file name ends in one of `suffixes`, ignoring case."""
    return PurePosixPath(name).suffix.lower() in suffixes


def add_sound(files: Mapping[str, tuple[FileItem, ...]]) -> dict[str, tuple[FileItem, ...]]:
    """Return the files of a sample by modality, without images; a video is also a recording if there is no other."""
    sound = files.get("audio") or files.get("video", ())
    return {name: items for name, items in {**files, "audio": sound}.items() if items and name != "image"}


def split_from_path(path: str) -> str | None:
    """Return the top folder of a relative path if it is the name of a split, ignoring case; else None."""
    top, slash, _ = path.partition("/")
    return top if slash and top.lower() in _SPLIT_FOLDERS else None


def walk_files(folder: Path) -> Iterator[str]:
    """Iterate over the paths of all files below a folder, as `walk_groups` does."""
    return (path for _, files in walk_groups(folder) for path in files)


def walk_groups(folder: Path, *, prefix: str = "", above: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, int]]]:
    """Iterate over all files below a folder: groups of those that differ in their suffix only, sorted by path.

    Hidden files and folders are skipped, and so are links to a folder above them. Memory holds the names of one folder
    and of those above it.

    Args:
        folder: the folder.
        prefix: prepended to the paths.
        above: the folders above, without links.

    Yields:
        the path of a group relative to `folder`, with `/` and without a suffix; and the path of each file -> its size
        in bytes, or -1 if the listing does not contain sizes.
    """
    place = str(folder if is_remote(folder) else folder.resolve())
    if place in above:
        return
    sizes = _list_remote(folder) if is_remote(folder) else _list(folder)
    for stem, names in groupby(sorted(sizes, key=lambda name: (_stem(name), name)), key=_stem):
        if stem.endswith("/"):
            yield from walk_groups(folder / stem[:-1], prefix=prefix + stem, above=(*above, place))
        else:
            yield prefix + stem, {prefix + name: sizes[name] for name in names}


def _stem(name: str) -> str:
    """Return the name of a file without its suffix; that of a folder, with its `/`, is unchanged."""
    stem, _, suffix = name.rpartition(".")
    return stem if stem and not suffix.endswith("/") else name


def _list(folder: Path) -> dict[str, int]:
    """List a folder; names of folders end in `/`."""
    names = []
    with reading(folder), os.scandir(folder) as entries:
        for entry in entries:
            is_folder = entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and Path(entry).is_dir())
            if is_folder or entry.is_symlink() or entry.is_file(follow_symlinks=False):  # no pipe, no device
                names.append(entry.name + "/" * is_folder)
    return {check_utf8_name(name, folder): -1 for name in names if not name.startswith(".")}


def _list_remote(folder: Path) -> dict[str, int]:
    """List a remote folder with sizes, as asking for each size would cost one request per file."""
    filesystem, here = remote_filesystem(folder)
    with reading(folder):
        entries = filesystem.ls(here, detail=True)
        filesystem.invalidate_cache(here)  # fsspec would keep the listings of all folders
    sizes = {}
    for entry in entries:
        name = entry["name"].rstrip("/").removeprefix(here.rstrip("/") + "/")
        if not name.startswith(".") and "/" not in name:  # the listing contains the folder itself if it is an object
            sizes[name + "/" * (entry["type"] == "directory")] = -1 if entry["size"] is None else entry["size"]
    return sizes


def relative_to(root: str, path: str) -> str:
    """Return a path relative to the root, or the whole path if it is not below it. Text only, as it runs per row."""
    return _normal(path).removeprefix(f"{_normal(root).rstrip('/')}/")


def item_path(root: str, folder: str, written: str) -> str:
    """Return the path of an item as stored: relative to the root if it lies below it, else whole; URLs are unchanged.

    A relative path as `written` in a table is relative to `folder`.
    """
    if is_url(written):
        return written
    return relative_to(root, written if written.startswith("/") else f"{folder}/{written}")


def find_root(location: str) -> str:
    """Return a folder of items as an absolute path, a URL unchanged; PathError if there is no such local folder."""
    if is_url(location):
        return location
    folder = open_path(location).absolute()
    if not folder.is_dir():
        raise PathError(f"root: expected a folder, got {folder}, which is none; check the path")
    return str(folder)


def resolve_item(root: Path, written: str) -> Path:
    """Return the path of an item from the result of `item_path`; ItemError if the scheme of a URL is unsupported."""
    if is_url(written):
        check_read_allowed(written)
    elif not written.startswith("/"):
        return root / written
    with reading(written, error_class=ItemError):
        return open_path(written)


def check_utf8_name(name: str, location: Path | str) -> str:
    """Return a name if it is valid Unicode, so that a table can store it; else raise SourceError."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise SourceError(f"{location} holds a name that is not UTF-8: {name!r}; rename it") from None
    return name


def _normal(path: str) -> str:
    """Remove `.`, `..` and repeated slashes from a path; the `//` of a URL stays."""
    scheme, mark, rest = path.partition("://") if is_url(path) else ("", "", path)
    return scheme + mark + posixpath.normpath(rest)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sidecar:
    """Content of the files beside one image.

    Args:
        key: key of the sample, if a file names it.
        texts: captions.
        columns: other fields, and `caption_error` if a file is invalid.
    """

    key: str | None = None
    texts: tuple[TextItem, ...] = ()
    columns: Mapping[str, Scalar] = field(default_factory=dict)


def to_sidecar(key: str, texts: Sequence[TextItem], columns: Mapping[str, Scalar]) -> bytes:
    """Return the content of a `.json` from which `read_sidecar` reads the same key, captions, languages and columns.

    Columns with a name that has another meaning there, such as `text` or `language`, are left out.
    """
    fields: dict[str, Any] = {name: value for name, value in columns.items() if name not in _RESERVED}
    fields |= {"key": key, "captions": [text.text for text in texts], "language": [text.language for text in texts]}
    return json.dumps(fields, ensure_ascii=False).encode()


def read_sidecar(files: Mapping[str, bytes | ItemError], name: str) -> Sidecar:
    """Read the sidecar files of one image; a caption in both, whatever its spaces, counts once.

    An invalid file yields only the reason, in the column `caption_error`: one among millions must not stop the rest.

    Args:
        files: suffix (`.json` or `.txt`) -> content of the file, or why it cannot be read.
        name: name of the files in the source, without the suffix.
    """
    of_json = _read_file(files[".json"], name + ".json") if ".json" in files else Sidecar()
    of_txt = _read_file(files[".txt"], name + ".txt") if ".txt" in files else Sidecar()
    captions = [text.text.split() for text in of_json.texts]
    more_texts = [text for text in of_txt.texts if text.text.split() not in captions]
    columns = dict(of_json.columns)
    errors = [sidecar.columns.get(CAPTION_ERROR) for sidecar in (of_json, of_txt)]
    if any(errors):
        columns[CAPTION_ERROR] = "; ".join(str(error) for error in errors if error)
    return Sidecar(key=of_json.key, texts=(*of_json.texts, *more_texts), columns=columns)


def parse_captions(value: Any, location: str) -> list[str]:
    """Return the captions in a string, a list of strings or None; the error for other types starts with `location`."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    for caption in values:
        if not isinstance(caption, str):
            raise SourceError(f"{location} holds {caption!r:.60}; expected a string or a list of strings")
    return values


def to_text_items(captions: Iterable[str], language: str | None) -> tuple[TextItem, ...]:
    """Create the text items of captions in one language; blank captions become "", which extraction reports."""
    return tuple(TextItem(text=caption.strip(), language=language or None) for caption in captions)


def join_captions(rows: Iterable[tuple[str, Sample]]) -> Iterator[Sample]:
    """Join adjacent samples of one key, which differ in their captions only, into one with all captions, in order.

    Args:
        rows: place of each sample, for errors, and the sample.

    Raises:
        SourceError: two of them name other items or have other columns.
    """
    for key, group in groupby(rows, key=lambda row: row[1].key):
        (place, first), *others = group
        for other_place, other in others:
            if replace(other, texts=first.texts) != first:
                difference = f"other {_difference(first, other)} for the key {key!r}"
                raise SourceError(f"{place} and {other_place}: expected other captions only, got {difference}")
        texts = tuple(text for _, sample in ((place, first), *others) for text in sample.texts)
        yield replace(first, texts=texts) if others else first


def _difference(one: Sample, other: Sample) -> str:
    """Return the items or the column that two samples differ in, beside their captions."""
    first, second = ({"images": sample.images, **sample.files, **sample.columns} for sample in (one, other))
    return next((name for name in (*first, *second) if first.get(name) != second.get(name)), "columns")


def to_scalar_columns(fields: Mapping[str, Any]) -> dict[str, Scalar]:
    """Return the fields that fit a column of the sample table; lists, objects and bytes are dropped.

    Dates, times, durations and decimals become text: of a date and a time in the form of ISO 8601.
    """
    columns = ((name, _to_scalar(value)) for name, value in fields.items())
    return {name: value for name, value in columns if isinstance(value, _SCALARS)}


def _to_scalar(value: Any) -> Any:
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    return str(value) if isinstance(value, Decimal | timedelta) else value


def parse_json(text: str, location: str) -> Any:
    """Parse JSON in which no name occurs twice in one object; the error for other text starts with `location`."""
    try:
        return json.loads(text, object_pairs_hook=_unique_fields)
    except (ValueError, RecursionError) as error:  # invalid, too deep, or a number of thousands of digits
        raise SourceError(f"{location} is not valid JSON: {error}; repair or remove it") from None


def parse_json_object(text: str, location: str) -> dict[str, Any]:
    """Parse a JSON object as `parse_json` does; the error for other text starts with `location`."""
    fields = parse_json(text, location)
    if not isinstance(fields, dict):
        example = '{"caption": "a dog"}'
        raise SourceError(f"{location} is not a JSON object such as {example}: {fields!r:.60}")
    return fields


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name occurs twice in one object")
    return fields


def _read_file(content: bytes | ItemError, name: str) -> Sidecar:
    try:
        if isinstance(content, ItemError):
            raise content
        if name.endswith(".json"):
            return _read_json(content, name)
        lines = [line for line in split_lines(decode_text(content, name, SourceError)) if line.strip()]
        return Sidecar(texts=to_text_items(lines or [""], None))
    except (ItemError, SourceError) as error:
        return Sidecar(columns={CAPTION_ERROR: str(error)})


def _read_json(content: bytes, name: str) -> Sidecar:
    fields = parse_json_object(decode_text(content, name, SourceError), name)
    _check_unicode(fields, name)
    key = fields.pop("key", None)
    language = fields.pop("language", None)
    if not isinstance(key, str | None):
        raise SourceError(f"{name}: key is {key!r:.60}; expected a string")

    captions = []
    for caption_field in _CAPTION_FIELDS:
        captions += parse_captions(fields.pop(caption_field, None), f"{name}: {caption_field}")
    languages = language if isinstance(language, list) else [language] * len(captions)
    if len(languages) != len(captions) or not all(isinstance(each, str | None) for each in languages):
        raise SourceError(f"{name}: language is {language!r:.60}; expected a string, or one for each caption")
    texts = tuple(to_text_items([caption], of)[0] for caption, of in zip(captions, languages, strict=True))
    return Sidecar(key=key or None, texts=texts, columns=to_scalar_columns(fields))


def _check_unicode(fields: Mapping[str, Any], name: str) -> None:
    """Check that no text holds half of a character, which JSON can write and no table can hold."""
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise SourceError(f"{name} holds {error.object[error.start]!r}, which is no character; repair it") from None
