"""WebDataset: tar shards in which the files of one sample share a name and stand together.

The shards that a WebDataset location means: a tar, a folder of tars, a pattern, or several of these.

The table that img2dataset writes beside each tar: `00000.parquet` beside `00000.tar`.

It has a row for every URL of the shard. The files in the tar are named after a row's `key`; a row whose picture could
not be had (its `status` says so) has none and is no sample.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from embedcache.errors import PathError
from embedcache.files import is_remote, open_path
from embedcache.sources.base import ImageItem, Sample
from embedcache.sources.byte_ranges import ByteRanges
from embedcache.sources.captions import (
    SIDECAR_SUFFIXES,
    Scalar,
    Sidecar,
    caption_list,
    read_sidecar,
    scalar_columns,
    text_items,
)
from embedcache.sources.files import (
    IMAGE_SUFFIXES,
    TAR_SUFFIXES,
    file_size,
    has_suffix,
    is_folder,
    place_of,
    reading,
    relative_to,
    split_of,
    walk_files,
)
from embedcache.sources.settings import SourceSettings
from embedcache.sources.table_files import Row, open_table_file
from embedcache.sources.tar_headers import Member, TarBytes, members

_NOTHING = Sidecar()
_LABEL_SUFFIX = ".cls"
_LABEL = re.compile(rb"\s*-?[0-9]{1,18}\s*")
_MOST_LABEL_BYTES = 32


class WebdatasetSource:
    """The samples of tar shards, shard after shard, in the order they stand in.

    A sample's key is the member name up to the first dot of its last part, or the `key` of its
    `.json`. Where img2dataset left a table beside a shard, its columns are the samples' and its captions
    are those of samples without a file of captions. A `.cls` is the number of the sample's class, in the column
    `label`, unless a `.json` says a label; one that is no whole number is the reason in the column `label_error`.
    Of shards below a folder named `train`, `val`, `valid`, `validation` or `test`, in either case, right in the
    source's folder, that name is the column `split`, and keys begin with it: such shards are numbered from 0 in each
    folder. Going through the samples reads headers, captions and labels, no image.

    Args:
        location: a tar, a folder of tars, a pattern such as `shards/{00000..00009}.tar` or `{train,val}.tar`, or
            several of these with `::` between; paths or URLs.
        settings: none of them is used.

    Raises:
        PathError: a shard is missing.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.allow_only("webdataset")
        self._location = absolute(location)
        self._shards = find_shards(self._location)
        self._root = root_of(self._location)
        self._ranges = ByteRanges()

    def describe(self) -> Mapping[str, Any]:
        """Give what reopens it."""
        return {"type": "webdataset", "path": self._location, "settings": {}}

    def samples(self) -> Iterator[Sample]:
        """Go through all samples. Memory holds one sample at a time, and img2dataset's table of one shard."""
        for shard in self._shards:
            yield from self._samples_of(shard)

    def read(self, item: ImageItem) -> bytes:
        """Get the bytes of one image from its shard."""
        return self._ranges.read(place_of(self._root, item.path), item.offset, item.length)

    def _samples_of(self, shard: Path) -> Iterator[Sample]:
        size = file_size(shard)
        if size is None:
            raise PathError(f"no such shard: {shard}")
        tar = TarBytes(str(shard), size, partial(self._fetch, shard))
        path = relative_to(str(self._root), str(shard))
        table = read_beside_shard(shard)
        split = split_of(path)
        for key, group in groupby(_files(members(tar)), key=itemgetter(0)):
            sample = _sample(tar, path, key, group, table.get(key, _NOTHING))
            yield _in_split(sample, split) if split else sample

    def _fetch(self, shard: Path, offset: int, length: int) -> bytes:
        with reading(shard):
            return self._ranges.read(shard, offset, length)


class _File(NamedTuple):
    """One file of a shard: its key and lower-case suffix (`.jpg`), and where its bytes are."""

    key: str
    suffix: str
    offset: int
    length: int


def _files(found: Iterable[Member]) -> Iterator[_File]:
    """Split names into key and suffix; hidden files are left out."""
    for name, offset, length in found:
        plain = PurePosixPath(name).as_posix() if "./" in name or "//" in name else name
        folder, slash, file_name = plain.rpartition("/")
        stem, dot, suffix = file_name.partition(".")
        if stem:
            yield _File(folder + slash + stem, (dot + suffix).lower(), offset, length)


def _sample(tar: TarBytes, path: str, key: str, files: Iterable[_File], row: Sidecar) -> Sample:
    images = []
    beside = {}
    columns = row.columns
    for _, suffix, offset, length in files:
        if suffix in IMAGE_SUFFIXES:
            images.append(ImageItem(path=path, offset=offset, length=length))
        elif suffix in SIDECAR_SUFFIXES:
            beside[suffix] = tar.read(offset, length)
        elif suffix == _LABEL_SUFFIX:
            columns = {**columns, **_label(tar.read(offset, min(length, _MOST_LABEL_BYTES)), key)}
    said = read_sidecar(beside, key) if beside else row
    return Sample(
        key=said.key or key,
        images=tuple(images),
        texts=said.texts or row.texts,
        columns={**columns, **said.columns} if columns else said.columns,
    )


def _label(content: bytes, key: str) -> Mapping[str, Scalar]:
    if _LABEL.fullmatch(content):
        return {"label": int(content)}
    return {"label_error": f"{key}{_LABEL_SUFFIX} holds {content!r}; expected the number of a class"}


def _in_split(sample: Sample, split: str) -> Sample:
    return replace(sample, key=f"{split}/{sample.key}", columns={"split": split, **sample.columns})


BETWEEN = "::"
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_AT_ONCE = 32  # shards that a service is asked about at the same time


def is_pattern(location: str) -> bool:
    """Say whether a location names tars by braces or as a list."""
    return BETWEEN in location or ("{" in location and has_suffix(location, TAR_SUFFIXES))


def absolute(location: str) -> str:
    """Make each part of a location absolute, so that it means the same in another folder."""
    return BETWEEN.join(str(open_path(part).absolute()) for part in location.split(BETWEEN))


def find_shards(location: str) -> list[Path]:
    """List the shards that a location means, in order.

    Raises:
        PathError: there is none, or one of a pattern is missing.
    """
    return [shard for part in location.split(BETWEEN) for shard in _shards_of(part)]


def expand_braces(pattern: str) -> list[str]:
    """Write out ranges and lists: `{08..10}` -> `08`, `09`, `10`; `{a,b}` -> `a`, `b`. A plain path stays as it is."""
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    first, last, listed = found.groups()
    values = listed.split(",") if listed else _range(first, last)
    tails = expand_braces(pattern[found.end() :])
    return [f"{pattern[: found.start()]}{value}{tail}" for value in values for tail in tails]


def root_of(location: str) -> Path:
    """Give the folder that item paths are relative to: the one before the first brace or the tar of the first part."""
    part = location.split(BETWEEN)[0]
    if is_folder(open_path(part), TAR_SUFFIXES):
        return open_path(part)
    return open_path(_BRACES.split(part, maxsplit=1)[0] + "_").parent


def _shards_of(part: str) -> list[Path]:
    folder = open_path(part)
    if is_folder(folder, TAR_SUFFIXES):
        shards = [folder / name for name, _ in walk_files(folder) if has_suffix(name, TAR_SUFFIXES)]
        if not shards:
            raise PathError(f"no .tar file below {part}")
        return shards
    shards = [open_path(path) for path in expand_braces(part)]
    missing = [shard for shard, size in zip(shards, _sizes(shards), strict=True) if size is None]
    if missing:
        raise PathError(f"no such shard: {missing[0]} ({len(missing)} of {len(shards)} are missing)")
    return shards


def _sizes(shards: list[Path]) -> Iterable[int | None]:
    if not is_remote(shards[0]):
        return map(file_size, shards)
    with ThreadPoolExecutor(_AT_ONCE) as executor:
        return list(executor.map(file_size, shards))


def _range(first: str, last: str) -> Iterator[str]:
    """Count up or down, with zeros in front where one of both has them, as a shell does."""
    has_zeros = any(len(end) > 1 and end.startswith("0") for end in (first, last))
    width = max(len(first), len(last)) if has_zeros else 0
    step = 1 if int(first) <= int(last) else -1
    return (str(number).zfill(width) for number in range(int(first), int(last) + step, step))


_MARKS = frozenset({"key", "status"})
_NOT_COLUMNS = frozenset({"key", "status", "error_message", "caption"})


def read_beside_shard(shard: Path) -> Mapping[str, Sidecar]:
    """Get what the table beside a shard says of its samples, by key; nothing where there is no such table.

    Memory: the rows of one shard.

    Raises:
        SourceError: the table is damaged.
        PathError: it cannot be read.
    """
    path = shard.with_suffix(".parquet")
    if file_size(path, forbidden_is_missing=True) is None:
        return {}
    file = open_table_file(path)
    if not set(file.columns) >= _MARKS:
        return {}
    return dict(_said(file.rows(file.plain), str(path)))


def _said(rows: Iterator[Row], place: str) -> Iterator[tuple[str, Sidecar]]:
    for row in rows:
        columns: dict[str, Scalar] = scalar_columns({n: row[n] for n in row if n not in _NOT_COLUMNS})
        texts = text_items(caption_list(row.get("caption"), f"{place}: caption"), None)
        yield row["key"], Sidecar(texts=texts, columns=columns)
