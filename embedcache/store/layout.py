"""File names of a cache, and its manifest `cache.json`."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.errors import CorruptError, quoted
from embedcache.files import AnyPath, is_remote, is_url, open_path
from embedcache.locks import LOCK
from embedcache.modalities import MODALITIES
from embedcache.provenance import (
    DIGEST,
    construct,
    digest,
    digest_file,
    read_manifest,
    write_record,
)
from embedcache.sources.open import is_description

FORMAT_VERSION = 1
SUBSET = "subset"
"""Key in the description of a source; present if the cache holds only some of the source's samples."""

SAMPLES = "samples"
"""Name of the sample table, where item tables are named by their modality."""

DEFAULT_CHUNK_SIZE = 2048
_MAX_ROWS = 2**40
_TOKEN_CHUNK_BYTES = 16 * 2**20
_UNCHECKED = ("source",)
"""Keys that the digest leaves out: the path of a source that has moved may be corrected by hand."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive samples that were indexed together, with the SHA-256 of them in row order."""

    num_samples: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class TableVersion:
    """An earlier version of the sample and item tables; chunks committed for it, with its digest, stay valid."""

    index_digest: str
    num_items: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """The content of `cache.json`.

    Args:
        chunk_size: items per chunk; the last chunk of a modality may hold fewer.
        source: what reopens the source.
        index_digest: digest of all samples and items in row order, the identity of the rows.
        num_samples: rows of `samples.parquet`.
        num_items: modality -> rows of its `items.parquet`; a modality without items is absent.
        segments: groups of samples that were added one after another; empty if all were indexed together.
        earlier_versions: versions of the tables before this one, oldest first.
        table_digests: `samples` or a modality -> digest of the keys, or of its items, in row order.
        table_checksums: `samples` or a modality -> column -> CRC-32C of its values, 8 hex digits per block: 65,536
            samples, or the items of a chunk.
        removed: of a cache from which samples were removed, `num_samples`, their number, and `digest`, the SHA-256 of
            `removed.parquet`, which lists their rows.
    """

    chunk_size: int
    source: Mapping[str, Any]
    index_digest: str
    num_samples: int
    num_items: Mapping[str, int]
    format: int = FORMAT_VERSION
    segments: Sequence[Segment] = ()
    earlier_versions: Sequence[TableVersion] = ()
    table_digests: Mapping[str, str] = field(default_factory=dict)
    table_checksums: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    removed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_partial(self) -> bool:
        """Whether the source may have samples that the cache leaves out: it was cut, or samples were removed."""
        return bool(self.removed) or SUBSET in self.source

    @property
    def all_segments(self) -> list[Segment]:
        """All segments; a single one if all samples were indexed together."""
        return list(self.segments) or [Segment(num_samples=self.num_samples, digest=self.index_digest)]

    def num_chunks(self, modality: str) -> int:
        """Return the number of chunks of the items of a modality; 0 without items."""
        return -(-self.num_items.get(modality, 0) // self.chunk_size)

    def chunk_rows(self, modality: str, chunk: int) -> slice:
        """Return the item rows of one chunk; the last chunk may be shorter."""
        start = chunk * self.chunk_size
        return slice(start, min(start + self.chunk_size, self.num_items[modality]))

    def chunk_shape(self, item_shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
        """Return the chunk shape of an array: a commit's rows for vectors, an exact fraction of them for tokens."""
        rows = self.chunk_size
        item_bytes = math.prod(item_shape) * np.dtype(dtype).itemsize
        if len(item_shape) > 1:
            while rows % 2 == 0 and rows * item_bytes > _TOKEN_CHUNK_BYTES:
                rows //= 2
        return (rows, *item_shape)

    def count_items(self, modality: str, chunks: Iterable[int]) -> int:
        """Return the number of items in some chunks."""
        rows = [self.chunk_rows(modality, chunk) for chunk in chunks]
        return sum(row.stop - row.start for row in rows)

    def has_rows_of(self, index_digest: str) -> bool:
        """Return whether the rows of that digest are the same rows in this cache, which may have more now."""
        return any(index_digest == version.index_digest for version in self._versions())

    def num_samples_since(self, index_digest: str) -> int:
        """Return the number of samples that were appended since the rows of that digest; 0 if it is not known."""
        segments = self.all_segments
        for count in range(1, len(segments)):
            if combined_digest(segments[:count], self.removed) == index_digest:
                return sum(segment.num_samples for segment in segments[count:])
        return 0

    def num_chunk_rows(self, index_digest: str, modality: str, chunk: int) -> int | None:
        """Return the number of rows that a chunk had in a version of the tables; None for an unknown version."""
        for version in self._versions():
            if version.index_digest == index_digest:
                num_left = version.num_items.get(modality, 0) - chunk * self.chunk_size
                return min(max(num_left, 0), self.chunk_size)
        return None

    def _versions(self) -> list[TableVersion]:
        return [*self.earlier_versions, TableVersion(index_digest=self.index_digest, num_items=self.num_items)]


def combined_digest(segments: Sequence[Segment], removed: Mapping[str, Any] | None = None) -> str:
    """Return the index digest of a cache with these segments, from which samples may have been removed."""
    digests = [segment.digest for segment in segments] + ([removed["digest"]] if removed else [])
    return digests[0] if len(digests) == 1 else digest(digests)


def info_path(cache_path: Path) -> Path:
    """Return the path of the manifest, which is written after the tables."""
    return cache_path / "cache.json"


def samples_path(cache_path: Path) -> Path:
    """Return the path of the sample table."""
    return cache_path / "samples.parquet"


def items_path(cache_path: Path, modality: str) -> Path:
    """Return the path of the item table of a modality."""
    return cache_path / modality / "items.parquet"


def table_path(cache_path: Path, name: str) -> Path:
    """Return the path of a table: `samples`, or a modality for that of its items."""
    return samples_path(cache_path) if name == SAMPLES else items_path(cache_path, name)


def removed_path(cache_path: Path) -> Path:
    """Return the path of the table of removed samples."""
    return cache_path / "removed.parquet"


def removed_before_path(cache_path: Path) -> Path:
    """Return the path of the marks of samples that were removed before a cache was cut or merged from others."""
    return cache_path / "removed-before.parquet"


def removing_path(cache_path: Path) -> Path:
    """Return the path of the table of samples that are being removed; the file exists until the removal is finished."""
    return cache_path / "removing.parquet"


INTERRUPTED_REMOVAL = "a removal of samples was interrupted; run the same embedcache cache remove again"


def encoder_path(cache_path: Path, modality: str, encoder: str) -> Path:
    """Return the folder of all features of one encoder."""
    return cache_path / modality / encoder


def commit_path(encoder_folder: Path, chunk: int) -> Path:
    """Return the path of a chunk's commit, which is written after its arrays."""
    return encoder_folder / "chunks" / commit_name(chunk)


def commit_name(chunk: int) -> str:
    """Return the name of the file of a chunk's commit."""
    return f"{chunk:05d}.json"


def fit_path(encoder_folder: Path) -> Path:
    """Return the path of the arrays that a rule was fitted to, of derived features."""
    return encoder_folder / "fit.safetensors"


def checked_fit_path(encoder_folder: Path, fingerprint: Mapping[str, Any]) -> Path:
    """Return that path, after the file was compared with the fingerprint of the features; `CorruptError` if it differs.

    Memory: a block of the file.
    """
    path = fit_path(encoder_folder)
    if not path.is_file() or digest_file(path) != fingerprint["weights"]:
        raise CorruptError(
            f"{path} is missing or not the file that the features were derived with; restore it, or derive under "
            "another name"
        )
    return path


def write_info(cache_path: Path, info: CacheInfo) -> None:
    """Write `cache.json`, which completes the tables.

    Its last key is a digest of all others but `source`, whose path may be corrected by hand when files have moved.
    """
    write_record(info_path(cache_path), asdict(info), unchecked=_UNCHECKED)


def is_cache_at(location: AnyPath, cache: AnyPath) -> bool:
    """Return whether a cache is at this location, however both are written."""
    one, other = (str(open_path(place)).rstrip("/") for place in (location, cache))
    if one != other and (is_url(one) or is_url(other) or os.path.realpath(one) != os.path.realpath(other)):
        return False
    return info_path(open_path(cache)).is_file()


def read_info(cache_path: Path) -> CacheInfo:
    """Read `cache.json`.

    Raises:
        PathError: the folder is not a cache.
        ArtifactError: the cache has a later format, missing or unknown fields, or values that have changed.
    """
    path = info_path(cache_path)
    record = read_manifest(
        path,
        kind="cache",
        make=_how_to_make(cache_path),
        next_step="restore the file, or extract into a new folder",
        unchecked=_UNCHECKED,
    )
    del record[DIGEST]
    return construct(path, lambda: _parse(record))


def _how_to_make(path: Path) -> str:
    """Return the command that makes a cache at a path, or of what is there, if that can only be a source."""
    if is_remote(path) or not path.exists():
        return f"embedcache extract SOURCE {quoted(path)}"
    if path.is_dir() and ((path / LOCK).exists() or next(path.iterdir(), None) is None):
        return f"embedcache extract SOURCE {quoted(path)}"
    prompts = f" ({quoted(f'prompts:{path}')} if it lists classes or concepts)"
    names = prompts if path.suffix in {".txt", ".json"} else ""
    return f"embedcache extract {quoted(path)} CACHE{names}"


def _parse(values: Mapping[str, Any]) -> CacheInfo:
    segments = tuple(Segment(**record) for record in values["segments"])
    versions = tuple(TableVersion(**record) for record in values["earlier_versions"])
    info = CacheInfo(**{**values, "segments": segments, "earlier_versions": versions})
    _check_count("chunk_size", info.chunk_size, minimum=1)
    _check_count("num_samples", info.num_samples)
    for counts in (info.num_items, *(version.num_items for version in versions)):
        for modality, count in counts.items():
            if modality not in MODALITIES:
                raise ValueError(f"num_items: expected one of {', '.join(MODALITIES)}, got {modality!r}")
            _check_count(f"num_items of {modality}", count)
    objects = (info.source, info.removed, info.table_digests, info.table_checksums, *info.table_checksums.values())
    if not all(isinstance(value, Mapping) for value in objects):
        raise TypeError("expected objects as source, tables and checksums")
    tables = {SAMPLES, *info.num_items}
    if not (tables <= info.table_digests.keys() and tables <= info.table_checksums.keys()):
        raise ValueError("expected digests and checksums of all tables")
    if not is_description(info.source):
        raise TypeError("source: expected texts as type and path")
    return info


def _check_count(name: str, count: object, *, minimum: int = 0) -> None:
    if type(count) is not int or not minimum <= count < _MAX_ROWS:
        raise ValueError(f"{name}: expected a whole number of at least {minimum}, got {count!r}")
