"""WebDataset: tar shards in which the files of one sample share a name and stand together."""

import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from embedcache.errors import ItemError, PathError, SourceError
from embedcache.sources.byte_ranges import ByteRanges
from embedcache.sources.contract import ImageItem, Sample
from embedcache.sources.files import (
    IMAGE_SUFFIXES,
    TAR_SUFFIXES,
    check_name,
    has_suffix,
    relative_to,
    walk_files,
)
from embedcache.sources.settings import SourceSettings
from embedcache.sources.sidecar import SIDECAR_SUFFIXES, read_sidecar

BLOCK_BYTES = 512
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class WebdatasetSource:
    """The samples of tar shards, shard after shard, in the order they stand in.

    A sample's key is the member name up to the first dot of its last part, or the `key` of its
    `.json`. Going through the samples reads headers and captions, no image.

    Args:
        location: a tar, a folder of tars, or a pattern such as `shards/{00000..00009}.tar`.
        settings: none of them is used.

    Raises:
        PathError: a shard is missing.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.allow_only("webdataset")
        self._location = Path(location).absolute()
        self._shards = find_shards(self._location)
        self._root = _root(self._location)
        self._ranges = ByteRanges()

    def describe(self) -> Mapping[str, Any]:
        """Give what reopens it."""
        return {"type": "webdataset", "path": self._location.as_posix(), "settings": {}}

    def samples(self) -> Iterator[Sample]:
        """Go through all samples. Memory holds one sample at a time."""
        for shard in self._shards:
            members = _members(shard)
            for key, group in groupby(members, key=lambda member: member.key):
                yield self._sample(shard, key, list(group))

    def read(self, item: ImageItem) -> bytes:
        """Get the bytes of one image from its shard."""
        return self._ranges.read(self._root / item.path, item.offset, item.length)

    def _sample(self, shard: Path, key: str, members: "list[_Member]") -> Sample:
        beside = {m.suffix: self._beside(shard, m) for m in members if m.suffix in SIDECAR_SUFFIXES}
        sidecar = read_sidecar(beside, f"{shard}: {key}")
        path = relative_to(self._root, shard)
        return Sample(
            key=sidecar.key or key,
            images=tuple(
                ImageItem(path=path, offset=m.offset, length=m.length) for m in members if m.suffix in IMAGE_SUFFIXES
            ),
            texts=sidecar.texts,
            columns=sidecar.columns,
        )

    def _beside(self, shard: Path, member: "_Member") -> bytes:
        try:
            return self._ranges.read(shard, member.offset, member.length)
        except ItemError as error:
            raise SourceError(f"{shard}: {member.key}{member.suffix}: {error}") from None


def find_shards(location: Path) -> list[Path]:
    """List the shards that a location means, in order.

    Raises:
        PathError: there is none, or one of a pattern is missing.
    """
    if location.is_dir():
        names = [n for n, _ in walk_files(location) if has_suffix(n, TAR_SUFFIXES)]
        shards = [location / name for name in names]
    else:
        shards = [Path(path) for path in expand_braces(location.as_posix())]
    if not shards:
        raise PathError(f"no .tar file below {location}")
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise PathError(f"no such shard: {missing[0]} ({len(missing)} of {len(shards)} are missing)")
    return shards


def expand_braces(pattern: str) -> list[str]:
    """Write out ranges: `{08..10}.tar` -> `08.tar`, `09.tar`, `10.tar`. A plain path stays as it is."""
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    head, tail = pattern[: found.start()], pattern[found.end() :]
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    return [path for number in numbers for path in expand_braces(f"{head}{number}{tail}")]


def _root(location: Path) -> Path:
    """Give the folder that item paths are relative to: the one before the first range or the tar."""
    if location.is_dir():
        return location
    return Path(_RANGE.split(location.as_posix(), maxsplit=1)[0] + "_").parent


@dataclass(frozen=True, kw_only=True)
class _Member:
    """One file of a shard: its key and lower-case suffix (`.jpg`), and where its bytes are."""

    key: str
    suffix: str
    offset: int
    length: int


def _members(shard: Path) -> Iterator[_Member]:
    """Go through the files of a tar by its headers.

    Raises:
        SourceError: it is no tar, or is cut short or damaged; names the offset.
    """
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in _infos(tar):
                if info.isreg() and not PurePosixPath(info.name).name.startswith("."):
                    yield _member(shard, info)
            _check_end(shard, tar)
    except tarfile.TarError as error:
        raise SourceError(_damaged(shard, str(error))) from None
    except OSError as error:
        raise PathError(f"cannot read {shard}: {error.strerror}") from None


def _infos(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Go through the headers, forgetting each: `tarfile` would keep them all."""
    while True:
        start = tar.offset
        try:
            info = tar.next()
        except tarfile.ReadError as error:
            raise tarfile.ReadError(f"{error} after offset {start}") from None
        if info is None:
            return
        tar.members = []  # type: ignore[attr-defined]  # public, but not in typeshed
        yield info


def _check_end(shard: Path, tar: tarfile.TarFile) -> None:
    """Refuse a tar without the zero block that ends it: `tarfile` takes a broken header for the end."""
    with shard.open("rb") as file:
        file.seek(tar.offset)
        if file.read(BLOCK_BYTES) != bytes(BLOCK_BYTES):
            raise SourceError(_damaged(shard, f"no valid header at offset {tar.offset}"))


def _damaged(shard: Path, reason: str) -> str:
    return f"{shard} is no tar, or is cut short or damaged: {reason}; copy or make it again"


def _member(shard: Path, info: tarfile.TarInfo) -> _Member:
    path = PurePosixPath(check_name(info.name, shard))
    stem, dot, suffix = path.name.partition(".")
    return _Member(
        key=path.with_name(stem).as_posix(),
        suffix=(dot + suffix).lower(),
        offset=info.offset_data,
        length=info.size,
    )
