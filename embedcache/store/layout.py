"""File names of a cache, its manifest `cache.json`, and the axis of the tokens of its features."""

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import Field, ValidationError, field_validator

from embedcache.errors import CorruptError, DataError, quoted
from embedcache.files import LOCK, AnyPath, find_files, is_remote, is_url, open_path
from embedcache.modalities import MERGED, MODALITIES, PARTS
from embedcache.provenance import (
    DIGEST,
    Manifest,
    construct,
    digest,
    digest_file,
    read_manifest,
    write_record,
)
from embedcache.settings import explain, replace_fields

FORMAT_VERSION = 1
SUBSET = "subset"
"""Key in the description of a source. It is present if the cache was cut or merged from other caches."""

SAMPLES = "samples"
"""Name of the sample table. Item tables are named by their modality."""

Count: TypeAlias = Annotated[int, Field(ge=0, lt=2**40)]
"""Number of rows, bytes or files."""

_CHUNK_SIZES = (2048, 4096, 8192, 16_384)
_MANY_CHUNKS = 1000
_TOKEN_CHUNK_BYTES = 16 * 2**20
_UNCHECKED = ("source",)
"""Keys that the digest leaves out: the path of a source that has moved may be corrected by hand."""


class TableFile(Manifest):
    """A file of a table, which is never changed. Other rows get another file.

    Args:
        name: path below the cache, such as `image/items-0.parquet`.
        num_rows: number of rows.
        num_bytes: size of the file.
        checksum: CRC-32C of all its bytes, 8 hex digits.
    """

    name: str = Field(pattern=rf"^({SAMPLES}|({'|'.join(MODALITIES)})/items)-\d+(\.\d+)?\.parquet$")
    num_rows: Annotated[Count, Field(ge=1)]
    num_bytes: Count
    checksum: str


class Part(Manifest):
    """Consecutive samples that were indexed together, and their items.

    Args:
        digest: SHA-256 of the current samples of their source, in row order.
        tables: `samples` or a modality -> file. A modality is absent if the samples have no items of it.
    """

    digest: str
    tables: Mapping[str, TableFile]

    @field_validator("tables")
    @classmethod
    def _check_names(cls, tables: Mapping[str, TableFile]) -> Mapping[str, TableFile]:
        if SAMPLES not in tables or not tables.keys() <= {SAMPLES, *MODALITIES}:
            raise ValueError(f"expected {SAMPLES} and any of {', '.join(MODALITIES)}, got {', '.join(tables)}")
        return tables

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return self.tables[SAMPLES].num_rows


class TableVersion(Manifest):
    """An earlier version of the tables. Chunks that were committed with its digest stay valid."""

    index_digest: str
    num_parts: Count


class CacheInfo(Manifest):
    """The content of `cache.json`.

    Args:
        chunk_size: items per chunk. The last chunk of a modality may have fewer.
        source: description from which the source is reopened.
        index_digest: digest of all samples and items in row order, the identity of the rows.
        parts: samples that were added one after another, in row order.
        earlier_versions: versions of the tables before this one, oldest first.
        removed: empty, or after a removal of samples: `num_samples`, the number of removed samples, `digest`, the
            SHA-256 of the table of their rows, and `is_erased`, whether all chunks were written without their items.
    """

    chunk_size: Annotated[Count, Field(ge=1)]
    source: Mapping[str, Any]
    index_digest: str
    parts: tuple[Part, ...] = Field(strict=False)
    format: int = FORMAT_VERSION
    earlier_versions: tuple[TableVersion, ...] = Field(default=(), strict=False)
    removed: Mapping[str, Any] = {}

    @field_validator("source")
    @classmethod
    def _check_source(cls, source: Mapping[str, Any]) -> Mapping[str, Any]:
        if not is_description(source):
            raise ValueError("expected texts as type and path")
        return source

    @field_validator("removed")
    @classmethod
    def _check_removed(cls, removed: Mapping[str, Any]) -> Mapping[str, Any]:
        if removed and removed.keys() != {"num_samples", "digest", "is_erased"}:
            raise ValueError("expected num_samples, digest and is_erased")
        return removed

    @cached_property
    def num_samples(self) -> int:
        """Number of rows of the sample table."""
        return sum(part.num_samples for part in self.parts)

    @cached_property
    def num_items(self) -> Mapping[str, int]:
        """Modality -> number of rows of its item table. A modality without items is absent."""
        return count_rows(self.parts)

    def files(self, name: str) -> list[TableFile]:
        """Return the files of a table, `samples` or a modality, in row order."""
        return [part.tables[name] for part in self.parts if name in part.tables]

    @property
    def is_partial(self) -> bool:
        """Whether the source may have samples that were removed from the cache."""
        return bool(self.removed)

    @property
    def has_interrupted_removal(self) -> bool:
        """Whether samples were removed from the tables, but not yet from all chunks."""
        return bool(self.removed) and not self.removed["is_erased"]

    def num_chunks(self, modality: str) -> int:
        """Return the number of chunks of a modality, which is 0 without items."""
        return -(-self.num_items.get(modality, 0) // self.chunk_size)

    def chunk_rows(self, modality: str, chunk: int) -> slice:
        """Return the item rows of one chunk. The last chunk may be shorter."""
        start = chunk * self.chunk_size
        return slice(start, min(start + self.chunk_size, self.num_items[modality]))

    def chunk_shape(self, item_shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
        """Return the chunk shape of an array: a commit's rows for vectors, an exact fraction of them for tokens."""
        rows = self.chunk_size
        item_bytes = math.prod(item_shape) * np.dtype(dtype).itemsize

        # Only halved while even, so that the rows of a commit are whole chunks.
        if len(item_shape) > 1:
            while rows % 2 == 0 and rows * item_bytes > _TOKEN_CHUNK_BYTES:
                rows //= 2
        return (rows, *item_shape)

    def count_items(self, modality: str, chunks: Iterable[int]) -> int:
        """Return the number of items in some chunks."""
        num_items = 0
        for chunk in chunks:
            rows = self.chunk_rows(modality, chunk)
            num_items += rows.stop - rows.start
        return num_items

    @cached_property
    def _num_parts(self) -> Mapping[str, int]:
        """Index digest of each version of the tables -> the number of its parts."""
        num_parts = {}
        for version in self.earlier_versions:
            num_parts[version.index_digest] = version.num_parts

        # The current version comes last: it wins if an earlier version has the same digest.
        num_parts[self.index_digest] = len(self.parts)
        return num_parts

    def has_rows_of(self, index_digest: str) -> bool:
        """Return whether this cache has the rows of an index digest, and possibly more."""
        return index_digest in self._num_parts

    def num_chunk_rows(self, index_digest: str, modality: str, chunk: int) -> int | None:
        """Return the number of rows that a chunk had in a version of the tables, or None for an unknown version."""
        if index_digest not in self._num_parts:
            return None

        # Parts are only appended, so an earlier version has the first of them.
        num_items = count_rows(self.parts[: self._num_parts[index_digest]]).get(modality, 0)
        return min(max(num_items - chunk * self.chunk_size, 0), self.chunk_size)

    def item_counts(self, modality: str) -> set[int]:
        """Return the numbers of items of a modality in this version of the cache and in earlier versions."""
        counts = set()
        for num_parts in self._num_parts.values():
            counts.add(count_rows(self.parts[:num_parts]).get(modality, 0))
        return counts

    def next_version(self, parts: Sequence[Part], removed: Mapping[str, Any] | None = None) -> "CacheInfo":
        """Return the manifest with other parts, or with more samples removed."""
        removed = self.removed if removed is None else removed
        this_version = TableVersion(index_digest=self.index_digest, num_parts=len(self.parts))
        return replace_fields(
            self,
            index_digest=combined_digest(parts, removed),
            parts=tuple(parts),
            earlier_versions=(*self.earlier_versions, this_version),
            removed=removed,
        )


def choose_chunk_size(parts: Sequence[Part]) -> int:
    """Return the chunk size of a new cache: 2,048 items, or up to 16,384 if there would be many chunks.

    A kill loses the chunk in work, and readers open one file per chunk.
    """
    num_items = max(count_rows(parts).values(), default=0)
    for size in _CHUNK_SIZES:
        if num_items <= size * _MANY_CHUNKS:
            return size
    return _CHUNK_SIZES[-1]


def is_description(value: Mapping[str, Any]) -> bool:
    """Return whether a JSON object has the types of a source's `describe`."""
    for name in (value.get("type"), value.get("path")):
        if not isinstance(name, str) or "\0" in name:  # no path of a file contains a null character
            return False

    # A merged cache describes the source of each of its parts.
    parts = value.get(PARTS) if value.get("type") == MERGED else []
    if not isinstance(parts, list):
        return False
    for part in parts:
        if not isinstance(part, Mapping) or not is_description(part):
            return False
    return isinstance(value.get("settings", {}), Mapping)


def count_rows(parts: Sequence[Part]) -> dict[str, int]:
    """Return modality -> number of items of some parts. A modality without items is absent."""
    counts = Counter[str]()
    for part in parts:
        for name, file in part.tables.items():
            counts[name] += file.num_rows

    # In the order of the modalities, and without the samples.
    return {name: counts[name] for name in MODALITIES if counts[name]}


def combined_digest(parts: Sequence[Part], removed: Mapping[str, Any] | None = None) -> str:
    """Return the index digest of a cache with these parts, from which samples may have been removed."""
    digests = [part.digest for part in parts]
    if removed:
        digests.append(removed["digest"])

    # The digest of a single part is the digest of its source.
    return digests[0] if len(digests) == 1 else digest(digests)


def info_path(cache_path: Path) -> Path:
    """Return the path of the manifest, which is written after the tables."""
    return cache_path / "cache.json"


def table_name(name: str, number: int, revision: int = 0) -> str:
    """Return the path of a file of a table below the cache.

    Args:
        name: `samples` or a modality.
        number: number of the part.
        revision: how often the file was replaced, such as by a removal.

    Example:
        >>> table_name("image", 0), table_name("samples", 2, 1)
        ('image/items-0.parquet', 'samples-2.1.parquet')
    """
    stem = SAMPLES if name == SAMPLES else f"{name}/items"
    return f"{stem}-{number}{f'.{revision}' if revision else ''}.parquet"


def next_revision(file: TableFile) -> int:
    """Return the revision of the file that replaces a file of a table."""
    stem = Path(file.name).stem
    return 1 + int(stem.partition(".")[2] or 0)


def find_unlisted(cache_path: Path, info: CacheInfo) -> list[Path]:
    """Return the table files that the manifest does not list, which were replaced or left by a killed process."""
    listed_names = {removed_path(cache_path, info.removed).name}
    for part in info.parts:
        for file in part.tables.values():
            listed_names.add(file.name)

    patterns = [f"{SAMPLES}-*.parquet", "removed-[0-9]*.parquet"]
    for name in MODALITIES:
        patterns.append(f"{name}/items-*.parquet")

    unlisted = []
    for pattern in patterns:
        for path in find_files(cache_path, pattern):
            if str(path)[len(str(cache_path)) + 1 :] not in listed_names:
                unlisted.append(path)
    return unlisted


def removed_path(cache_path: Path, removed: Mapping[str, Any]) -> Path:
    """Return the path of the table of removed samples, which is never changed. More samples get another file."""
    return cache_path / f"removed-{removed.get('num_samples', 0)}.parquet"


INTERRUPTED_REMOVAL = "a removal of samples was interrupted; run the same embedcache cache remove again"


def encoder_path(cache_path: Path, modality: str, encoder: str) -> Path:
    """Return the folder of all features of one encoder."""
    return cache_path / modality / encoder


def commit_path(encoder_folder: Path, chunk: int) -> Path:
    """Return the path of a chunk's commit, which is written after its arrays."""
    return encoder_folder / "chunks" / f"{chunk:05d}.json"


def fit_path(encoder_folder: Path) -> Path:
    """Return the path of the fitted arrays of derived features."""
    return encoder_folder / "fit.safetensors"


def checked_fit_path(encoder_folder: Path, fingerprint: Mapping[str, Any]) -> Path:
    """Return `fit_path` after the file was compared with the fingerprint of the features. Memory: a block of the file.

    Raises:
        CorruptError: the file is missing or differs.
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

    Its last key is a digest of all others except `source`, whose path may be corrected by hand if files have moved.
    """
    write_record(info_path(cache_path), info.to_json(), unchecked=_UNCHECKED)


def is_cache_at(location: AnyPath, cache: AnyPath) -> bool:
    """Return whether a cache is at this location, however both are written."""
    location_path = str(open_path(location)).rstrip("/")
    cache_path = str(open_path(cache)).rstrip("/")
    if location_path != cache_path:
        # Links in local paths are resolved, but URLs have none.
        if is_url(location_path) or is_url(cache_path):
            return False
        if os.path.realpath(location_path) != os.path.realpath(cache_path):
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
        make=lambda: _how_to_make(cache_path),
        next_step="restore the file, or extract into a new folder",
        unchecked=_UNCHECKED,
    )
    del record[DIGEST]
    return construct(path, lambda: CacheInfo.model_validate(record))


def _how_to_make(path: Path) -> str:
    """Return the command that makes a cache at a path, or from the file or folder there if it can only be a source."""
    if is_remote(path) or not path.exists():
        return f"embedcache extract SOURCE {quoted(path)}"

    # A folder that is empty or has the lock file of a cache cannot be a source.
    if path.is_dir() and ((path / LOCK).exists() or next(path.iterdir(), None) is None):
        return f"embedcache extract SOURCE {quoted(path)}"

    prompts = f" ({quoted(f'prompts:{path}')} if it lists classes or concepts)"
    names = prompts if path.suffix in {".txt", ".json"} else ""
    return f"embedcache extract {quoted(path)} CACHE{names}"


class Axis(Manifest):
    """The axis of the tokens of one feature, in their order.

    Args:
        kind: `time` (frames at a fixed rate), `grid` (cells row by row), `points` (the item's points in their order)
            or `words` (the tokens of a text).
        rate_hz: frames per second, for `time`.
        start_s: time at which the first frame begins, in seconds from the start of the item, for `time`.
        rows: cells from top to bottom, for `grid`.
        columns: cells from left to right, for `grid`.
        box: x0, y0, x1, y1 of the part of the image that a grid covers, as fractions of its width and height. None if
            it differs between images, as after a center crop.
    """

    kind: Literal["time", "grid", "points", "words"]
    rate_hz: float | None = Field(default=None, gt=0)
    start_s: float | None = None
    rows: int | None = Field(default=None, gt=0)
    columns: int | None = Field(default=None, gt=0)
    box: tuple[float, float, float, float] | None = Field(default=None, strict=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise DataError(f"axis of a feature: {explain(error)}") from None

    def model_post_init(self, _context: object) -> None:
        if self.kind == "time" and self.rate_hz is None:
            raise ValueError("expected rate_hz of the kind time, got none")
        if self.kind == "grid" and None in (self.rows, self.columns):
            raise ValueError(f"expected rows and columns of the kind grid, got {self.rows} and {self.columns}")
        if self.box is not None and not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
            raise ValueError(f"expected a box x0, y0, x1, y1, got {self.box}")

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are set, as JSON values."""
        return self.model_dump(mode="json", exclude_none=True)
