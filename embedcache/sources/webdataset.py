"""WebDataset shards: tars in which the files of one sample are adjacent and share a name; also those of img2dataset."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from embedcache.errors import PathError, SourceError
from embedcache.files import open_path, reading
from embedcache.samples import FileItem, Sample, Scalar
from embedcache.sources.captions import (
    SIDECAR_SUFFIXES,
    Sidecar,
    parse_captions,
    read_sidecar,
    to_scalar_columns,
    to_text_items,
)
from embedcache.sources.files import (
    MEDIA_SUFFIXES,
    SHARD_SEPARATOR,
    TAR_SUFFIXES,
    add_sound,
    file_size,
    has_suffix,
    is_folder,
    relative_to,
    resolve_item,
    split_from_path,
    walk_files,
)
from embedcache.sources.settings import SourceSettings
from embedcache.sources.table import open_table_file
from embedcache.sources.tars import ByteRanges, Member, iter_members, open_tar

_EMPTY = Sidecar()
_MODALITIES = {suffix: modality for modality, suffixes in MEDIA_SUFFIXES.items() for suffix in suffixes}
_LABEL_SUFFIX = ".cls"
_LABEL = re.compile(rb"\s*-?[0-9]{1,18}\s*")
_BRACES = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}")
_MAX_SHARDS = 1_000_000

_DROPPED_COLUMNS = frozenset({"key", "status", "error_message", "caption"})  # of the tables that img2dataset writes


class _File(NamedTuple):
    """One file of a shard: its key and lower-case suffix (`.jpg`), and the offset and length of its content."""

    key: str
    suffix: str
    offset: int
    length: int


class WebdatasetSource:
    """The samples of tar shards, shard by shard, in the order of the tars.

    The key of a sample is the member name up to the first dot after the last slash, or the `key` in its `.json`. If
    img2dataset wrote a table beside a shard, the samples have its columns, and its captions if they have no caption
    files. A `.cls` holds the class number, for the column `label`, unless the `.json` has a label; invalid content is
    reported in the column `label_error`. For shards in a top folder named `train`, `val`, `valid`, `validation` or
    `test`, in any case, that name is the column `split` and the first part of the keys, as shards are numbered from 0
    in each such folder. Images, recordings, videos and point clouds are told apart by their suffixes; a video is a
    recording too, unless its sample has one. Hidden members are skipped, and so are members of other kinds, which
    `skipped` counts by suffix; all after the first dot is the suffix, so that `1.2.jpg` is no image of the sample `1`.
    Iterating over the samples reads headers, captions and labels only.

    The location is a tar, a folder of tars, a pattern such as `shards/{00000..00009}.tar` or `{train,val}.tar`, or
    several of these joined by `::`; paths or URLs.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("webdataset")
        self._settings = settings
        written = location.split(SHARD_SEPARATOR)
        if not all(written):
            raise SourceError(f"{location}: expected a path on both sides of {SHARD_SEPARATOR}, got nothing on one")
        parts = [str(open_path(part).absolute()) for part in written]
        self._location = SHARD_SEPARATOR.join(parts)
        self._shards = [shard for part in parts for shard in _find_shards(part)]
        self._root = shard_root(self._location)
        self._ranges = ByteRanges()
        self.skipped: Counter[str] = Counter()

    def describe(self) -> Mapping[str, Any]:
        return {"type": "webdataset", "path": self._location, "settings": self._settings.to_json()}

    def samples(self) -> Iterator[Sample]:
        """Iterate over all samples. Memory holds one sample, and the table of img2dataset for one shard."""
        self.skipped.clear()
        for shard in self._shards:
            yield from self._samples_of(shard)

    def read(self, item: FileItem) -> bytes:
        return self._ranges.read(resolve_item(self._root, item.path), item.offset, item.length)

    def _samples_of(self, shard: Path) -> Iterator[Sample]:
        path = relative_to(str(self._root), str(shard))
        table = _read_shard_table(shard)
        split = split_from_path(path)
        with reading(shard), open_tar(shard) as tar:
            for key, group in groupby(_files(iter_members(tar, str(shard))), key=itemgetter(0)):
                sample = self._sample(tar, path, key, group, table.get(key, _EMPTY))
                if split:
                    columns = {"split": split, **sample.columns}
                    sample = replace(sample, key=f"{split}/{sample.key}", columns=columns)
                yield sample

    def _sample(self, tar: BinaryIO, path: str, key: str, files: Iterable[_File], row: Sidecar) -> Sample:
        """Return the sample of adjacent files of one key; `row` is that of the table beside the shard."""
        items: dict[str, list[FileItem]] = {}
        sidecar_files = {}
        columns = row.columns
        for _, suffix, offset, length in files:
            if suffix in _MODALITIES:
                item = FileItem(path=path, offset=offset, length=length)
                items.setdefault(_MODALITIES[suffix], []).append(item)
            elif suffix in SIDECAR_SUFFIXES:
                tar.seek(offset)
                sidecar_files[suffix] = tar.read(length)
            elif suffix == _LABEL_SUFFIX:
                tar.seek(offset)
                columns = {**columns, **_label(tar.read(length), key)}
            else:
                self.skipped[_skipped_kind(suffix)] += 1
        sidecar = read_sidecar(sidecar_files, key) if sidecar_files else row
        found = {name: tuple(members) for name, members in items.items()}
        return Sample(
            key=sidecar.key or key,
            images=found.get("image", ()),
            texts=sidecar.texts or row.texts,
            columns={**columns, **sidecar.columns} if columns else sidecar.columns,
            files=add_sound(found) if len(found) > ("image" in found) else {},
        )


def _files(tar_members: Iterable[Member]) -> Iterator[_File]:
    """Split names into key and suffix; hidden files are skipped."""
    for name, offset, length in tar_members:
        plain = PurePosixPath(name).as_posix() if "./" in name or "//" in name else name
        folder, slash, file_name = plain.rpartition("/")
        stem, dot, suffix = file_name.partition(".")
        if stem:
            yield _File(folder + slash + stem, (dot + suffix).lower(), offset, length)


def _skipped_kind(suffix: str) -> str:
    """Return the kind of a member that is skipped, without the parts of its name that may be others in each sample."""
    last = suffix[suffix.rfind(".") :] if suffix else "files without a suffix"
    return last if len(last) >= len(suffix) else f"{last} after another dot in the name"


def _label(content: bytes, key: str) -> Mapping[str, Scalar]:
    if _LABEL.fullmatch(content):
        return {"label": int(content)}
    return {"label_error": f"{key}{_LABEL_SUFFIX} holds {content!r:.60}; expected the number of a class"}


def shard_root(location: str) -> Path:
    """Return the folder that item paths are relative to: the one before the first brace or tar of the first part."""
    part = location.split(SHARD_SEPARATOR)[0]
    if is_folder(open_path(part), TAR_SUFFIXES):
        return open_path(part)
    return open_path(_BRACES.split(part, maxsplit=1)[0] + "_").parent


def expand_braces(pattern: str) -> Iterator[str]:
    """Expand ranges and lists: `{08..10}` -> `08`, `09`, `10`; `{a,b}` -> `a`, `b`. Other text is unchanged."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, listed = match.groups()
    for value in listed.split(",") if listed else _range(first, last):
        for tail in expand_braces(pattern[match.end() :]):
            yield f"{pattern[: match.start()]}{value}{tail}"


def _find_shards(part: str) -> list[Path]:
    folder = open_path(part)
    if is_folder(folder, TAR_SUFFIXES):
        shards = [folder / name for name in walk_files(folder) if has_suffix(name, TAR_SUFFIXES)]
        if not shards:
            raise PathError(f"{part}: expected .tar files, got none; check the path")
        return shards
    paths = list(islice(expand_braces(part), _MAX_SHARDS + 1))
    if len(paths) > _MAX_SHARDS:
        raise SourceError(f"{part}: expected at most {_MAX_SHARDS:,} shards, got more; name fewer")
    shards = [open_path(path) for path in paths]
    for shard in (shards[0], shards[-1]):  # a wrong range is named at once, without a request for each shard
        if file_size(shard) is None:
            raise PathError(f"expected a shard, got no file at {shard}; check the path")
    return shards


def _range(first: str, last: str) -> Iterator[str]:
    """Count up or down, padded with zeros if the first number is."""
    width = len(first) if first.startswith("0") else 0
    step = 1 if int(first) <= int(last) else -1
    return (str(number).zfill(width) for number in range(int(first), int(last) + step, step))


def _read_shard_table(shard: Path) -> Mapping[str, Sidecar]:
    """Return the captions and columns in the table that img2dataset writes beside a shard, by key; empty without one.

    The table has one row per URL; rows whose download failed have no files in the tar and are not samples.
    """
    path = shard.with_suffix(".parquet")
    if file_size(path, forbidden_is_missing=True) is None:
        return {}
    file = open_table_file(path)
    sidecars: dict[str, Sidecar] = {}
    if {"key", "status"} <= set(file.columns):
        for row in file.rows(file.plain_columns):
            columns = to_scalar_columns({name: row[name] for name in row if name not in _DROPPED_COLUMNS})
            texts = to_text_items(parse_captions(row.get("caption"), f"{path}: caption"), None)
            sidecars[row["key"]] = Sidecar(texts=texts, columns=columns)
    return sidecars
