"""The commit of a chunk: which features it has, in which files with which checksums, of which items.

A commit is written after the arrays of its chunk; without it the chunk does not exist.

For each feature, `Commit.failures` has the state of each row: None, the arrays hold its value; `PENDING`, it was not
tried; `REMOVED`, its sample is no longer in the cache; any other reason, it failed.

A chunk that is not full is committed with the rows that there are. When samples are appended to the cache, it has more
rows than its commit, which stays valid, so that nothing is encoded twice. The new rows are pending:

1. `Commit.resize` adds them whenever a commit is read; readers find items without a value.
2. `Commit.is_complete` is false for them, so that the next extraction works on the chunk again.
3. `Commit.stored_starts` tells extraction after how many of the stored rows it can begin. For the rows before, as for
   all rows that it does not try, it passes `PENDING` to `commit_chunk`.
4. `commit_chunk` writes the chunk again: values and reasons of the commit stay, and pending rows get the new ones.
"""

import hashlib
import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedcache.arrays import Array, Bools, Ints
from embedcache.errors import CorruptError, PathError, UnfinishedError, one_line
from embedcache.files import flush, io_reason, read_file, remove_file, write_atomic
from embedcache.modalities import MODALITIES
from embedcache.provenance import canonical_json, digest
from embedcache.store.arrays import REPAIR
from embedcache.store.columns import Column, is_none, to_array
from embedcache.store.layout import commit_path
from embedcache.store.tables import column_checksum, read_table

PENDING = "not extracted yet"
"""Reason of a row that was not tried: the next extraction encodes it."""

REMOVED = "removed"
"""Reason of an item whose sample was removed from the cache."""

HASH_BYTES = 16
HASH = pa.binary(HASH_BYTES)
"""Type of a hash of `hash_item`; null for an item that was not read."""

_FAILURE = "failure of "
_METADATA_KEY = b"embedcache"


@dataclass(frozen=True, kw_only=True)
class Commit:
    """The record of one chunk of one encoder.

    Args:
        encoder: digest of the encoder's fingerprint.
        index_digest: identity of the cache's rows.
        features: feature name -> file below the encoder's folder -> CRC-32C of its rows.
        hashes: BLAKE2b-128 of each item's raw bytes or UTF-8 text; None if they could not be read.
        failures: feature name -> reason for each failed item, None for the others.
        attributes: feature name -> digest of the attributes in its metadata.
    """

    chunk: int
    encoder: str
    index_digest: str
    features: Mapping[str, Mapping[str, str]]
    hashes: Sequence[bytes | None]
    failures: Mapping[str, Sequence[str | None]]
    attributes: Mapping[str, str]

    def resize(self, num_rows: int) -> "Commit":
        """Return the commit with the number of rows of the caller's tables; appended rows are pending."""
        added = num_rows - len(self.hashes)
        if not added:
            return self
        failures = {
            feature: [*reasons[:num_rows], *[PENDING] * max(added, 0)] for feature, reasons in self.failures.items()
        }
        return replace(self, hashes=[*self.hashes[:num_rows], *[None] * max(added, 0)], failures=failures)

    def without(self, features: Collection[str]) -> "Commit":
        """Return the commit without some features."""
        files = {name: files for name, files in self.features.items() if name not in features}
        return replace(self, features=files, attributes={k: v for k, v in self.attributes.items() if k in files})

    def used_rows(self) -> list[int]:
        """Return the rows, counted from the start of the chunk, that have at least one feature."""
        failures = list(self.failures.values())
        return [row for row in range(len(self.hashes)) if any(reasons[row] is None for reasons in failures)]

    def is_complete(self, feature: str) -> bool:
        """Return whether every row has the feature or a reason why not."""
        return feature in self.features and PENDING not in self.failures[feature]

    def check_keeps(self, earlier: "Commit", feature: str) -> None:
        """Check that rows that had a feature in an earlier commit of the chunk have it still.

        Raises:
            UnfinishedError: their samples were removed since.
        """
        had, has = is_none(earlier.failures[feature]), is_none(self.failures[feature])
        size = min(len(had), len(has))
        if (had[:size] & ~has[:size]).any():
            raise UnfinishedError("samples were removed from the cache while it was read; run the same command again")

    def stored_starts(self, feature: str, batch_size: int) -> Bools:
        """Return after how many rows from the start of the chunk extraction can begin: (R + 1,) bool.

        No row before is pending, and those with a value are whole batches: all others are then encoded together with
        the same rows as if all were encoded, to the same bits.
        """
        reasons = to_array(self.failures[feature], pa.string())
        is_pending = pc.is_in(reasons, value_set=pa.array([PENDING]))
        num_pending, num_values = (
            np.cumsum(np.append(0, mask.to_numpy(zero_copy_only=False))) for mask in (is_pending, reasons.is_null())
        )
        is_start: Bools = (num_pending == 0) & (num_values % batch_size == 0)
        return is_start


def has_failed(reason: str | None) -> bool:
    """Return whether a reason is that of an item that was tried without success."""
    return reason not in (None, PENDING, REMOVED)


def describe_failures(failures: Mapping[str, int]) -> str:
    """Return how many items were removed and how many failed, of what kind, in a phrase such as `failed 1: 1 damaged`.

    Args:
        failures: kind of failure -> number of items, with those that were removed.
    """
    kinds = "; ".join(f"{count:,} {kind}" for kind, count in failures.items() if has_failed(kind))
    num_failed = sum(count for kind, count in failures.items() if has_failed(kind))
    removed = f"removed {failures[REMOVED]:,}, " if REMOVED in failures else ""
    return f"{removed}failed {num_failed:,}{': ' + kinds if kinds else ''}"


def write_commit(encoder_folder: Path, commit: Commit) -> None:
    """Commit a chunk. Its arrays must be on disk already."""
    metadata = {**commit_metadata(commit), "digest": _digest(commit)}
    columns = {"hash": to_array(commit.hashes, HASH)}
    for feature in sorted(commit.features):
        columns[f"{_FAILURE}{feature}"] = to_array(commit.failures[feature], pa.string())
    table = pa.table(columns).replace_schema_metadata({_METADATA_KEY: canonical_json(metadata)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_atomic(commit_path(encoder_folder, commit.chunk), buffer.getvalue())


def remove_commit(encoder_folder: Path, chunk: int) -> None:
    """Remove a commit, so that the chunk no longer exists."""
    path = commit_path(encoder_folder, chunk)
    remove_file(path, missing_ok=True)
    flush(path.parent)


def read_commit(encoder_folder: Path, chunk: int) -> Commit | None:
    """Read the commit of a chunk; None if the chunk is not committed.

    Raises:
        CorruptError: the file cannot be read or its content changed.
    """
    path = commit_path(encoder_folder, chunk)
    try:
        data = read_file(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PathError(f"cannot read {path}: {io_reason(error)}") from error
    try:
        commit, written = _parse(data)
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise CorruptError(f"{path} is not a readable commit: {one_line(error)}; {REPAIR}") from error
    if written != _digest(commit):
        raise CorruptError(f"{path} has changed since it was written; {REPAIR}")
    if commit.chunk != chunk:
        raise CorruptError(f"{path}: expected the commit of chunk {chunk}, got chunk {commit.chunk}; {REPAIR}")
    return commit


def _parse(data: bytes) -> tuple[Commit, str]:
    table = read_table(io.BytesIO(data))
    metadata: dict[str, Any] = json.loads(table.schema.metadata[_METADATA_KEY])
    failures = {
        feature: Column[str | None](table[f"{_FAILURE}{feature}"].combine_chunks().cast(pa.string()))
        for feature in metadata["features"]
    }
    hashes = Column[bytes | None](table["hash"].combine_chunks().cast(HASH))
    return make_commit(metadata, hashes, failures), metadata["digest"]


def commit_metadata(commit: Commit) -> dict[str, Any]:
    """Return all of a commit but its columns, as JSON values."""
    return {
        "chunk": commit.chunk,
        "encoder": commit.encoder,
        "index_digest": commit.index_digest,
        "features": {name: dict(files) for name, files in commit.features.items()},
        "attributes": dict(commit.attributes),
    }


def make_commit(
    metadata: Mapping[str, Any], hashes: Sequence[bytes | None], failures: Mapping[str, Sequence[str | None]]
) -> Commit:
    """Return a commit of its metadata and its columns."""
    return Commit(
        chunk=metadata["chunk"],
        encoder=metadata["encoder"],
        index_digest=metadata["index_digest"],
        features=metadata["features"],
        hashes=hashes,
        failures=failures,
        attributes=metadata["attributes"],
    )


def _digest(commit: Commit) -> str:
    """Return the SHA-256 of everything in a commit."""
    columns = {"hash": column_checksum(to_array(commit.hashes, HASH))}
    for feature in sorted(commit.features):
        columns[f"{_FAILURE}{feature}"] = column_checksum(to_array(commit.failures[feature], pa.string()))
    return digest({**commit_metadata(commit), "columns": columns})


def hash_item(data: bytes, *, interval: tuple[float | None, float | None] = (None, None)) -> bytes:
    """Return the BLAKE2b-128 of an item's raw bytes, or of its text as UTF-8; of an interval also its bounds."""
    content = hashlib.blake2b(data, digest_size=16)
    if interval != (None, None):
        content.update(canonical_json(list(interval)))
    return content.digest()


def removed_hash(modality: str) -> bytes | None:
    """Return the hash in the place of that of a removed item: none, or that of an empty text."""
    return hash_item(b"") if MODALITIES[modality].kind == "texts" else None


def number_contents(hashes: "pa.Array | pa.ChunkedArray") -> Ints:
    """Number hashes in order of first appearance, null as one value: (N,) int64. Memory: about 40 bytes per item.

    Example:
        >>> number_contents(pa.array([b"b" * 16, None, b"a" * 16, b"b" * 16], pa.binary(16))).tolist()
        [0, 1, 2, 0]
    """
    chunks = hashes.chunks if isinstance(hashes, pa.ChunkedArray) else [hashes]
    if not len(hashes):
        return np.empty(0, np.int64)
    missing_N = np.concatenate([chunk.is_null().to_numpy(zero_copy_only=False) for chunk in chunks])
    halves = [_half(chunks, place, missing_N) for place in (0, 1)]
    order_N = np.argsort(halves[0], kind="stable")
    is_first_N = _differs_from_last(halves[0], order_N)
    differs_N = _differs_from_last(halves[1], order_N) | _differs_from_last(missing_N, order_N)
    if (differs_N & ~is_first_N).any():  # equal in one half only
        order_N = np.lexsort((halves[1], halves[0], missing_N))
        is_first_N = np.logical_or.reduce([_differs_from_last(values, order_N) for values in (*halves, missing_N)])
    del halves, missing_N, differs_N
    first_F = order_N[is_first_N]  # the sort is stable, so that it is the lowest row of its hash
    place_N = np.cumsum(is_first_N, dtype=np.int64)
    place_N -= 1
    numbers_N = np.empty(len(order_N), np.int64)
    numbers_N[order_N] = place_N
    del order_N, place_N
    number_F = np.empty(len(first_F), np.int64)
    number_F[np.argsort(first_F)] = np.arange(len(first_F))
    np.take(number_F, numbers_N, out=numbers_N, mode="clip")  # other modes copy the output
    return numbers_N


def _half(chunks: Sequence[pa.Array], place: int, missing_N: Bools) -> Array:
    """Return the first or the second eight bytes of hashes, 0 where they are null: (N,) uint64."""
    half_N = np.concatenate([to_bytes(chunk)[:, 8 * place : 8 * (place + 1)] for chunk in chunks]).view(np.uint64)[:, 0]
    half_N[missing_N] = 0
    return half_N


def _differs_from_last(values_N: Array, order_N: Ints) -> Bools:
    """Return which values, in an order, differ from the one before; the first does."""
    differs_N, ordered_N = np.ones(len(order_N), bool), values_N[order_N]
    np.not_equal(ordered_N[1:], ordered_N[:-1], out=differs_N[1:])
    return differs_N


def to_bytes(hashes: pa.Array) -> Array:
    """Return hashes as (N, 16) uint8; rows of null are undefined."""
    data = np.frombuffer(hashes.buffers()[1], np.uint8)
    start = hashes.offset * HASH_BYTES
    return data[start : start + len(hashes) * HASH_BYTES].reshape(-1, HASH_BYTES)
