"""A table of the commits of many chunks beside them, so that a reader opens one file in place of thousands.

It is derived and may be deleted at any time. A commit whose file has another size, time or inode than when the table
was written is read itself, as are all commits without a table. Hashes are read when they are first used.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedcache.files import replacing
from embedcache.store.columns import HASH, HASH_BYTES, Column, is_missing, to_array, to_bytes
from embedcache.store.commits import Commit, commit_metadata, make_commit
from embedcache.store.layout import commit_name, commit_path

MIN_CHUNKS = 1000
"""Encoders with fewer chunks have no table."""

_CHUNKS_PER_GROUP = 256
_FAILURES = pa.list_(pa.struct([("feature", pa.string()), ("offset", pa.int32()), ("reason", pa.string())]))
_SCHEMA = pa.schema(
    [
        ("chunk", pa.int64()),
        ("size", pa.int64()),
        ("time_ns", pa.int64()),
        ("inode", pa.int64()),
        ("num_rows", pa.int64()),
        ("metadata", pa.string()),
        ("failures", _FAILURES),
        ("hashes", pa.large_binary()),
        ("without_hash", pa.list_(pa.int32())),
    ]
)
_HASH_COLUMNS = ("hashes", "without_hash")


class Stamp(NamedTuple):
    """What tells whether a file is the one that was read."""

    size: int
    time_ns: int
    inode: int


def table_path(encoder_folder: Path) -> Path:
    """Return the path of the table of an encoder."""
    return encoder_folder / "commits.parquet"


def read_stamps(encoder_folder: Path) -> dict[str, Stamp]:
    """Return the stamp of each commit by the name of its file."""
    folder = commit_path(encoder_folder, 0).parent
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        statuses = ((entry.name, entry.stat()) for entry in entries if entry.name.endswith(".parquet"))
        return {name: Stamp(status.st_size, status.st_mtime_ns, status.st_ino) for name, status in statuses}


def write_compacted(encoder_folder: Path, stamps: Mapping[str, Stamp], commits: Iterator[Commit]) -> None:
    """Write the table, whole or not at all. Memory: the commits of 256 chunks.

    Args:
        stamps: those of the commits' files before the commits were read.
        commits: in the order of their chunks.
    """
    with (
        replacing(table_path(encoder_folder)) as temporary,
        pq.ParquetWriter(temporary, _SCHEMA, write_page_checksum=True) as writer,
    ):
        rows: list[dict[str, Any]] = []
        for commit in commits:
            stamp = stamps.get(commit_name(commit.chunk))
            if stamp is not None:
                rows.append(_row(commit, stamp))
            if len(rows) == _CHUNKS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
                rows = []
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))


def _row(commit: Commit, stamp: Stamp) -> dict[str, Any]:
    failures = [
        {"feature": feature, "offset": offset, "reason": reason}
        for feature, reasons in commit.failures.items()
        for array in [to_array(reasons, pa.string())]
        for offset, reason in zip(np.flatnonzero(~is_missing(reasons)), array.drop_null().to_pylist(), strict=True)
    ]
    missing = is_missing(commit.hashes)
    hashes = np.array(to_bytes(to_array(commit.hashes, HASH)))
    hashes[missing] = 0
    return {
        "chunk": commit.chunk,
        "size": stamp.size,
        "time_ns": stamp.time_ns,
        "inode": stamp.inode,
        "num_rows": len(missing),
        "metadata": json.dumps(commit_metadata(commit)),
        "failures": failures,
        "hashes": hashes.tobytes(),
        "without_hash": np.flatnonzero(missing),
    }


def read_compacted(encoder_folder: Path, stamps: Mapping[str, Stamp]) -> dict[int, Commit]:
    """Return the commits in the table whose files have these stamps now; empty if there is no readable table."""
    path = table_path(encoder_folder)
    if not path.is_file():
        return {}
    try:
        columns = [name for name in _SCHEMA.names if name not in _HASH_COLUMNS]
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            groups = [file.read_row_group(group, columns, use_threads=False) for group in range(file.num_row_groups)]
            found = {}
            for group, table in enumerate(groups):
                load, failures = cache(partial(_read_hashes, path, group)), _Failures(table["failures"])
                for position, row in enumerate(table.drop_columns("failures").to_pylist()):
                    stamp = Stamp(row["size"], row["time_ns"], row["inode"])
                    if stamps.get(commit_name(row["chunk"])) == stamp:
                        metadata, num_rows = json.loads(row["metadata"]), row["num_rows"]
                        found[row["chunk"]] = make_commit(
                            metadata,
                            Column[bytes | None].deferred(num_rows, partial(_hashes_of, load, position)),
                            {name: failures.column(position, name, num_rows) for name in metadata["features"]},
                        )
            return found
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError):
        return {}  # it is derived: the commits themselves are read


class _Failures:
    """Failures of the chunks in a row group of the table."""

    def __init__(self, lists: pa.ChunkedArray) -> None:
        failures = lists.combine_chunks()
        self._bounds = failures.offsets.to_numpy()
        features, offsets, self._reasons = failures.values.flatten()
        encoded = features.dictionary_encode()
        self._codes = encoded.indices.to_numpy()
        self._code = {name: code for code, name in enumerate(encoded.dictionary.to_pylist())}
        self._offsets = offsets.to_numpy()

    def column(self, position: int, feature: str, num_rows: int) -> Column[str | None]:
        """Return the reason for each item of a chunk whose feature failed, null for the others."""
        start, stop = self._bounds[position : position + 2].tolist()
        offsets, reasons = self._offsets[start:stop], self._reasons.slice(start, stop - start)
        if len(self._code) > 1 or feature not in self._code:
            own = np.flatnonzero(self._codes[start:stop] == self._code.get(feature, -1))
            offsets, reasons = offsets[own], reasons.take(pa.array(own))
        return Column.sparse(num_rows, offsets, reasons)


def _read_hashes(path: Path, group: int) -> Sequence[pa.Array]:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        table = file.read_row_group(group, list(_HASH_COLUMNS), use_threads=False)
    arrays = []
    for data, missing in zip(table["hashes"], table["without_hash"], strict=True):
        values = data.as_buffer()
        is_present = np.ones(len(values) // HASH_BYTES, bool)
        is_present[missing.values.to_numpy()] = False
        validity = None if is_present.all() else pa.array(is_present).buffers()[1]  # one bit each
        arrays.append(pa.FixedSizeBinaryArray.from_buffers(HASH, len(is_present), [validity, values]))
    return arrays


def _hashes_of(load: Callable[[], Sequence[pa.Array]], position: int) -> pa.Array:
    return load()[position]
