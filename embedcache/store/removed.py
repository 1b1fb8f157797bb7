"""The table of the samples that were removed from a cache: their rows, and how their keys are recognized.

A removed sample keeps its row, so that the rows of all others stay: its key is `removed-` with its row, its other
columns are null, its captions are empty, and its items have no path and no feature. The source may still have it, so
the table holds a keyed digest of its key, by which an extraction leaves it out.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from embedcache.arrays import Ints
from embedcache.errors import CorruptError
from embedcache.files import reading, replacing
from embedcache.provenance import digest_file
from embedcache.store.layout import CacheInfo, removed_path
from embedcache.store.tables import RESTORE_TABLE, read_table, write_table

_DIGEST_BYTES = 16
_SCHEMA = pa.schema([("row", pa.int64()), ("key_digest", pa.binary(_DIGEST_BYTES))])
_SALT = b"salt"


@dataclass(frozen=True, kw_only=True)
class RemovedSamples:
    """Samples that were removed.

    Args:
        table: `row`, ascending, and `key_digest`, the keyed BLAKE2b-128 of the key.
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
        return dict(zip(self.table["key_digest"].to_pylist(), self.rows.tolist(), strict=True))

    def row_of(self, key: str) -> int | None:
        """Return the row that a key had; None if no sample of that key was removed, as far as digests tell."""
        return self._digests.get(digest_key(key, self.salt)) if self._digests else None

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


def read_removed(cache_path: Path, info: CacheInfo) -> RemovedSamples:
    """Read the samples that were removed from a cache.

    Raises:
        CorruptError: the table is missing or has changed.
    """
    if not info.removed:
        return make_removed(np.empty(0, np.int64), [], info.index_digest)
    path = removed_path(cache_path, info.removed)
    if not path.is_file() or digest_file(path) != info.removed["digest"]:
        raise CorruptError(
            f"{path}: expected the table of removed samples that cache.json was written for, got "
            f"{'another file' if path.is_file() else 'none'}; restore the file"
        )
    with reading(path, RESTORE_TABLE):
        table = read_table(path)
        return RemovedSamples(table=table.cast(_SCHEMA), salt=table.schema.metadata[_SALT].decode())


def write_removed(path: Path, removed: RemovedSamples) -> None:
    """Write a table of removed samples, atomically."""
    with replacing(path) as temporary:
        write_table(temporary, removed.table.cast(_SCHEMA.with_metadata({_SALT: removed.salt})))
