"""The table of the samples that were removed from a cache: their rows, and how their keys are recognized.

A removed sample keeps its row, so that the rows of all others stay: its key is `removed-` with its row, its other
columns are null, its captions are empty, and its items have no path and no feature. The source may still have it, so
the table holds a keyed digest of its key, by which an extraction leaves it out, unless the user asked for none.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa

from embedcache.arrays import Ints
from embedcache.errors import CorruptError
from embedcache.files import replacing
from embedcache.provenance import digest_file
from embedcache.store.layout import CacheInfo, removed_path
from embedcache.store.tables import read_table, table_errors, write_table

RecordKeys: TypeAlias = Literal["digest", "none", "full"]
"""What is kept of the keys of removed samples."""

_DIGEST_BYTES = 16
_SCHEMA = pa.schema([("row", pa.int64()), ("key_digest", pa.binary(_DIGEST_BYTES)), ("key", pa.string())])
_SALT = b"salt"


@dataclass(frozen=True, kw_only=True)
class RemovedSamples:
    """Samples that were removed, or are being removed.

    Args:
        table: `row`, ascending; `key_digest`, the keyed BLAKE2b-128 of the key, and `key`, both null if not recorded.
        salt: key of the digests.
    """

    table: pa.Table
    salt: str

    @property
    def rows(self) -> Ints:
        """(M,) int64 rows of the sample table, ascending."""
        rows: Ints = self.table["row"].to_numpy()
        return rows

    @cached_property
    def _digests(self) -> dict[bytes, int]:
        digests, rows = self.table["key_digest"].to_pylist(), self.rows.tolist()
        return {value: row for value, row in zip(digests, rows, strict=True) if value is not None}

    def row_of(self, key: str) -> int | None:
        """Return the row that a key had; None if no sample of that key was removed, as far as digests tell."""
        return self._digests.get(digest_key(key, self.salt)) if self._digests else None

    def merge(self, other: "RemovedSamples") -> "RemovedSamples":
        """Return the samples of both, whose digests have one salt."""
        table = pa.concat_tables([self.table, other.table.filter(~np.isin(other.rows, self.rows))])
        return RemovedSamples(table=table.sort_by("row"), salt=self.salt)

    def with_keys(self, record_keys: RecordKeys) -> "RemovedSamples":
        """Return the table with what is to be recorded of the keys."""
        table = self.table
        for name in {"digest": ["key"], "none": ["key", "key_digest"], "full": []}[record_keys]:
            place = table.schema.get_field_index(name)
            table = table.set_column(place, _SCHEMA.field(name), pa.nulls(len(table), _SCHEMA.field(name).type))
        return RemovedSamples(table=table, salt=self.salt)


def digest_key(key: str, salt: str) -> bytes:
    """Return the keyed BLAKE2b-128 of a key."""
    return hashlib.blake2b(key.encode(), digest_size=_DIGEST_BYTES, key=salt.encode()[:64]).digest()


def make_removed(rows: Ints, keys: Sequence[str], salt: str) -> RemovedSamples:
    """Return the table of some samples, with their keys and digests."""
    digests = [digest_key(key, salt) for key in keys]
    return RemovedSamples(table=pa.table([rows, digests, keys], schema=_SCHEMA), salt=salt)


def no_removed(salt: str) -> RemovedSamples:
    """Return an empty table."""
    return RemovedSamples(table=_SCHEMA.empty_table(), salt=salt)


def read_removed(cache_path: Path, info: CacheInfo) -> RemovedSamples:
    """Read the samples that were removed from a cache.

    Raises:
        CorruptError: the table is missing or has changed.
    """
    if not info.removed:
        return no_removed(info.index_digest)
    path = removed_path(cache_path)
    if not path.is_file() or digest_file(path) != info.removed.get("digest"):
        raise CorruptError(
            f"{path}: expected the table of removed samples that cache.json was written for, got "
            f"{'another file' if path.is_file() else 'none'}; if embedcache cache remove was interrupted, run it "
            "again; else restore the file"
        )
    return read_removed_file(path)


def read_removed_file(path: Path) -> RemovedSamples:
    """Read a table of removed samples."""
    with table_errors(path):
        table = read_table(path)
        return RemovedSamples(table=table.cast(_SCHEMA), salt=table.schema.metadata[_SALT].decode())


def write_removed(path: Path, removed: RemovedSamples) -> None:
    """Write a table of removed samples, atomically."""
    with replacing(path) as temporary:
        write_table(temporary, removed.table.cast(_SCHEMA.with_metadata({_SALT: removed.salt})))
