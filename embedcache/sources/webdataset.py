"""WebDataset shards: tars in which the files of one sample are adjacent and share a name.

Tars are listed from their headers, without reading the content, and read as ranges of bytes. Plain POSIX (ustar and
pax) and GNU headers are read 6 to 9 times as fast as by `tarfile`, which handles all other members, such as those with
a long name or more than 8 GiB. Remote files are fetched in blocks by fsspec.
"""

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any, BinaryIO, NamedTuple

from embedcache.errors import ItemError, PathError, SourceError
from embedcache.files import is_remote, open_path, reading
from embedcache.modalities import FileItem, Sample, Scalar
from embedcache.sources.files import (
    MEDIA_SUFFIXES,
    SHARD_SEPARATOR,
    SIDECAR_SUFFIXES,
    TAR_SUFFIXES,
    add_sound,
    check_read_allowed,
    check_utf8_name,
    file_size,
    has_suffix,
    is_folder,
    open_binary,
    read_sidecar,
    relative_to,
    resolve_item,
    split_from_path,
    walk_files,
)
from embedcache.sources.open import SourceSettings

BLOCK_BYTES = 512
"""Size of a block of a tar: a header is one, and content is padded to whole ones."""

_ZERO_BLOCK = bytes(BLOCK_BYTES)
_CHECKSUM_BLANKS = 8 * ord(" ")
_OVERRIDES = re.compile(rb" path=| size=|GNU\.sparse|hdrcharset")  # pax records that override fields of the header
_MAX_REMOTE_FILES = 8
_REMOTE_BLOCK_BYTES = 8 * 2**20

_MODALITIES = {suffix: modality for modality, suffixes in MEDIA_SUFFIXES.items() for suffix in suffixes}
_LABEL_SUFFIX = ".cls"
_LABEL = re.compile(rb"\s*-?[0-9]{1,18}\s*")
_BRACES = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}")
_MAX_SHARDS = 1_000_000


class Member(NamedTuple):
    """One file in a tar: its name with `/`, and the offset and length of its content in bytes."""

    name: str
    offset: int
    length: int


class _File(NamedTuple):
    """One file of a shard: its key and lower-case suffix (`.jpg`), and the offset and length of its content."""

    key: str
    suffix: str
    offset: int
    length: int


class WebdatasetSource:
    """The samples of tar shards, shard by shard, in the order of the tars.

    The key of a sample is the member name up to the first dot after the last slash, or the `key` in its `.json`. A
    `.cls` holds the class number, for the column `label`, unless the `.json` has a label; invalid content is reported
    in the column `label_error`. For shards in a top folder named `train`, `val`, `valid`, `validation` or `test`, in
    any case, that name is the column `split` and the first part of the keys, as shards are numbered from 0 in each
    such folder. Images, recordings, videos and point clouds are told apart by their suffixes; a video is a
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
        """Iterate over all samples. Memory holds one sample."""
        self.skipped.clear()

        for shard in self._shards:
            yield from self._samples_of(shard)

    def read(self, item: FileItem) -> bytes:
        return self._ranges.read(resolve_item(self._root, item.path), item.offset, item.length)

    def _samples_of(self, shard: Path) -> Iterator[Sample]:
        path = relative_to(str(self._root), str(shard))
        split = split_from_path(path)

        with reading(shard), open_tar(shard) as tar:
            for key, group in groupby(_files(iter_members(tar, str(shard))), key=itemgetter(0)):
                sample = self._sample(tar, path, key, group)

                # Shards of each split are numbered from 0, so keys need the split to be unique.
                if split:
                    columns = {"split": split, **sample.columns}
                    sample = replace(sample, key=f"{split}/{sample.key}", columns=columns)

                yield sample

    def _sample(self, tar: BinaryIO, path: str, key: str, files: Iterable[_File]) -> Sample:
        """Return the sample of adjacent files of one key."""
        items: dict[str, list[FileItem]] = {}
        sidecar_files = {}
        columns: Mapping[str, Scalar] = {}

        # Media stay in the tar as ranges; only captions and labels are read here.
        for _, suffix, offset, length in files:
            if suffix in _MODALITIES:
                item = FileItem(path=path, offset=offset, length=length)
                items.setdefault(_MODALITIES[suffix], []).append(item)
            elif suffix in SIDECAR_SUFFIXES:
                tar.seek(offset)
                sidecar_files[suffix] = tar.read(length)
            elif suffix == _LABEL_SUFFIX:
                tar.seek(offset)
                columns = _label(tar.read(length), key)
            else:
                self.skipped[_skipped_kind(suffix)] += 1

        sidecar = read_sidecar(sidecar_files, key)
        found = {name: tuple(members) for name, members in items.items()}

        return Sample(
            key=sidecar.key or key,
            images=found.get("image", ()),
            texts=sidecar.texts,
            columns={**columns, **sidecar.columns},
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

    # One more than the limit is enough to tell that a pattern is too long.
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


def open_tar(path: Path) -> BinaryIO:
    """Open a tar to read its headers; a remote one in blocks, of which the next is fetched ahead.

    Raises:
        PathError: the web server has no range requests. Other errors are raised unchanged.
    """
    return open_binary(path, num_bytes=_REMOTE_BLOCK_BYTES, cache_type="background")


def iter_members(tar: BinaryIO, location: str) -> Iterator[Member]:
    """Iterate over the files of a tar, in order. The tar may be read elsewhere between them. Errors name the offset."""
    size = tar.seek(0, os.SEEK_END)
    offset = 0
    while (header := _read(tar, offset, BLOCK_BYTES)) != _ZERO_BLOCK:
        if len(header) < BLOCK_BYTES:
            raise _damaged(location, f"the file ends at offset {offset}, where a header was expected")

        member, after = _plain_member(tar, offset, header) or _other_member(tar, location, offset)

        # A size that leads backwards would loop for ever.
        if after <= offset:
            raise _damaged(location, f"the header at offset {offset} has no valid size")
        if after > size:
            raise _damaged(location, f"the member at offset {offset} ends {after - size} bytes after the file")

        offset = after
        if member is not None:
            yield member


def _read(tar: BinaryIO, offset: int, length: int) -> bytes:
    tar.seek(offset)
    return tar.read(length)


def _damaged(location: str, reason: str) -> SourceError:
    return SourceError(f"{location} is not a tar, or is truncated or damaged: {reason}; copy or create it again")


def _plain_member(tar: BinaryIO, offset: int, header: bytes) -> tuple[Member, int] | None:
    """Return a file with a plain header, and the offset of the next header; None if `tarfile` must read it."""
    kind = header[156:157]
    if kind == b"x":
        size = _size(header)
        if size is None or not _has_valid_checksum(header):
            return None
        records = _read(tar, offset + BLOCK_BYTES, size)
        if _OVERRIDES.search(records):
            return None

        # The other records say nothing that is needed; the header of the file follows them.
        offset += BLOCK_BYTES + _padded(size)
        header = _read(tar, offset, BLOCK_BYTES)
        kind = header[156:157]

    size = _size(header)
    name = _name(header)
    if kind not in {b"0", b"\0"} or size is None or name is None or not _has_valid_checksum(header):
        return None

    start = offset + BLOCK_BYTES
    return Member(name, start, size), start + _padded(size)


def _size(header: bytes) -> int | None:
    digits = header[124:135]
    try:
        return int(digits, 8) if digits.isdigit() and header[135:136] in {b"\0", b" "} else None
    except ValueError:  # a digit 8 or 9
        return None


def _name(header: bytes) -> str | None:
    name = header[:100].partition(b"\0")[0]
    if header[345:346] > b"\0":
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    try:
        return None if name.endswith(b"/") else name.decode()
    except UnicodeDecodeError:
        return None


def _has_valid_checksum(header: bytes) -> bool:
    """Check the sum of all bytes of the header, with the 8 bytes of the checksum itself replaced by blanks."""
    field = header[148:156]
    try:
        expected = int(field.strip(b" \0"), 8)
    except ValueError:
        return False
    sum_all = sum(header.translate(None, b"\0"))  # most bytes are zero; skipping them halves the time
    return sum_all - sum(field) + _CHECKSUM_BLANKS == expected


def _padded(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _other_member(tar: BinaryIO, location: str, offset: int) -> tuple[Member | None, int]:
    """Return the member at an offset as read by `tarfile`, None if it is not a file, and the next header's offset."""
    tar.seek(offset)
    try:
        with tarfile.TarFile(fileobj=tar) as archive:
            info = archive.next()
            after = archive.offset
    except (tarfile.TarError, RecursionError) as error:  # it calls itself for every extended header before a member
        raise _damaged(location, f"{error} at offset {offset}") from None

    if info is None:
        raise _damaged(location, f"no valid header at offset {offset}")
    if info.issparse():
        raise _damaged(location, f"{info.name} is a sparse file; create the tar without --sparse")

    if not info.isreg():
        return None, after
    return Member(check_utf8_name(info.name, location), info.offset_data, info.size), after


class ByteRanges:
    """Reader of byte ranges that keeps the last remote files open, with some of their blocks: a request takes long."""

    def __init__(self) -> None:
        self._open_remote = lru_cache(_MAX_REMOTE_FILES)(open_tar)
        self._lock = Lock()

    def read(self, path: Path, offset: int, length: int) -> bytes:
        """Read `length` bytes of a file, starting at `offset`. Thread-safe.

        Raises:
            ItemError: the file cannot be read or is too short.
        """
        with reading(path, error_class=ItemError):
            check_read_allowed(path, length)

            # Remote files are shared by all threads, and a read moves their position.
            if is_remote(path):
                with self._lock:
                    data = _read(self._open_remote(path), offset, length)
            else:
                with path.open("rb") as file:
                    data = _read(file, offset, length)

        if len(data) < length:
            raise ItemError(f"truncated tar: {path} ends {length - len(data)} bytes before the image does")

        return data
