"""The table of the samples that were removed from a cache: their rows, and how their keys are recognized.

A removed sample keeps its row, so that the rows of all others stay: its key is `removed-` with its row, its other
columns are null, its captions are empty, and its items have no path and no feature. The source may still have it, so
the table holds a keyed digest of its key, by which an extraction leaves it out. A cache that is cut or
merged from others does not have the rows, and keeps these digests in a table of its own.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from embedcache.arrays import Ints
from embedcache.errors import CorruptError
from embedcache.files import reading, replacing
from embedcache.provenance import digest_file
from embedcache.store.layout import SUBSET, CacheInfo, removed_before_path, removed_path
from embedcache.store.tables import RESTORE_TABLE, read_table, write_table

Marks: TypeAlias = Mapping[str, Iterable[bytes]]
"""Salt -> the digests of keys with it; each cache from which samples were removed has a salt of its own."""

_DIGEST_BYTES = 16
_SCHEMA = pa.schema([("row", pa.int64()), ("key_digest", pa.binary(_DIGEST_BYTES))])
_BEFORE_SCHEMA = pa.schema([("salt", pa.string()), ("key_digest", pa.binary(_DIGEST_BYTES))])
_SALT = b"salt"


@dataclass(frozen=True, kw_only=True)
class RemovedSamples:
    """Samples that were removed.

    Args:
        table: `row`, ascending, and `key_digest`, the keyed BLAKE2b-128 of the key.
        salt: key of the digests.
        before: marks of samples that were removed from the caches that the cache was cut or merged from.
    """

    table: pa.Table
    salt: str
    before: Marks = field(default_factory=dict)

    @property
    def rows(self) -> Ints:
        """(M,) int64 rows of the sample table, ascending."""
        rows: Ints = self.table["row"].to_numpy()
        return rows

    @cached_property
    def _digests(self) -> dict[bytes, int]:
        return dict(zip(self.table["key_digest"].to_pylist(), self.rows.tolist(), strict=True))

    def row_of(self, key: str) -> int | None:
        """Return the row that a key had; None if no sample of that key was removed, as far as digests tell."""
        return self._digests.get(digest_key(key, self.salt)) if self._digests else None

    def has(self, key: str) -> bool:
        """Return whether a sample of that key was removed, also before the cache was cut or merged from others."""
        return self.row_of(key) is not None or any(
            digest_key(key, salt) in digests for salt, digests in self.before.items()
        )

    @property
    def marks(self) -> Marks:
        """Marks of all samples, those that were removed before included."""
        return merge_marks([{self.salt: self._digests.keys()}, self.before])

    def merge(self, other: "RemovedSamples") -> "RemovedSamples":
        """Return the samples of both, whose digests have one salt."""
        table = pa.concat_tables([self.table, other.table.filter(~np.isin(other.rows, self.rows))])
        return RemovedSamples(table=table.sort_by("row"), salt=self.salt)


def digest_key(key: str, salt: str) -> bytes:
    """Return the keyed BLAKE2b-128 of a key."""
    return hashlib.blake2b(key.encode(), digest_size=_DIGEST_BYTES, key=salt.encode()[:64]).digest()


def make_removed(rows: Ints, keys: Sequence[str], salt: str) -> RemovedSamples:
    """Return the table of some samples."""
    digests = [digest_key(key, salt) for key in keys]
    return RemovedSamples(table=pa.table([rows, digests], schema=_SCHEMA), salt=salt)


def no_removed(salt: str, before: Marks | None = None) -> RemovedSamples:
    """Return an empty table."""
    return RemovedSamples(table=_SCHEMA.empty_table(), salt=salt, before=before or {})


def read_removed(cache_path: Path, info: CacheInfo) -> RemovedSamples:
    """Read the samples that were removed from a cache, and from those that it was cut or merged from.

    Raises:
        CorruptError: a table is missing or has changed.
    """
    before = _read_marks(removed_before_path(cache_path), info.source.get(SUBSET, {}).get("removed"))
    if not info.removed:
        return no_removed(info.index_digest, before)
    path = removed_path(cache_path, info.removed)
    if not path.is_file() or digest_file(path) != info.removed["digest"]:
        raise CorruptError(
            f"{path}: expected the table of removed samples that cache.json was written for, got "
            f"{'another file' if path.is_file() else 'none'}; restore the file"
        )
    with reading(path, RESTORE_TABLE):
        table = read_table(path)
        return RemovedSamples(table=table.cast(_SCHEMA), salt=table.schema.metadata[_SALT].decode(), before=before)


def write_removed(path: Path, removed: RemovedSamples) -> None:
    """Write a table of removed samples, atomically."""
    with replacing(path) as temporary:
        write_table(temporary, removed.table.cast(_SCHEMA.with_metadata({_SALT: removed.salt})))


def merge_marks(parts: Iterable[Marks]) -> Marks:
    """Return the marks of several caches, without salts that have none."""
    merged: dict[str, set[bytes]] = {}
    for salt, digests in (pair for part in parts for pair in part.items()):
        merged.setdefault(salt, set()).update(digests)
    return {salt: digests for salt, digests in merged.items() if digests}


def digest_marks(marks: Marks) -> str:
    """Return the SHA-256 of marks: of each salt, in order, as ASCII, followed by its digests in order."""
    return hashlib.sha256(b"".join(salt.encode() + b"".join(sorted(marks[salt])) for salt in sorted(marks))).hexdigest()


def write_marks(cache_path: Path, marks: Marks) -> None:
    """Write the marks of a cache that is cut or merged from others, atomically; its source has their digest."""
    rows = [(salt, mark) for salt in sorted(marks) for mark in sorted(marks[salt])]
    with replacing(removed_before_path(cache_path)) as temporary:
        write_table(temporary, pa.table(list(zip(*rows, strict=True)), schema=_BEFORE_SCHEMA))


def _read_marks(path: Path, expected: str | None) -> Marks:
    """Read marks whose digest is in the source of their cache; none if it has no digest."""
    if expected is None:
        return {}
    with reading(path, RESTORE_TABLE):
        table = read_table(path).cast(_BEFORE_SCHEMA)
    pairs = zip(table["salt"].to_pylist(), table["key_digest"].to_pylist(), strict=True)
    marks = merge_marks({salt: [mark]} for salt, mark in pairs)
    if digest_marks(marks) != expected:
        raise CorruptError(f"{path}: expected the marks that cache.json was written for, got others; restore the file")
    return marks
