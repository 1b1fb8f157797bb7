"""A table of the commits of many chunks beside them, so that a reader opens one file in place of thousands.

It is derived and may be deleted at any time. A commit whose file has another size, time or inode than when the table
was written is read itself, as are all commits without a table. Hashes are read when they are first used. The metadata
has a checksum of each column of each row group; a table that differs from them, or has none, is not used.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedcache.errors import ArtifactError, CorruptError, PathError, one_line
from embedcache.files import replacing
from embedcache.store.columns import Column, DeferredColumn, SparseColumn, is_none, to_array
from embedcache.store.commits import HASH, HASH_BYTES, Commit, commit_metadata, make_commit, read_commit, to_bytes
from embedcache.store.layout import commit_name, commit_path
from embedcache.store.tables import column_checksum, open_table

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
_CHECKSUMS = "checksums"
"""Key of the metadata whose value is a JSON list with column -> checksum for each row group."""

_UNREADABLE = (pa.ArrowException, OSError, ValueError, LookupError, TypeError)
"""What reading a table raises that is damaged or of another version."""


class Stamp(NamedTuple):
    """What tells whether a file is the one that was read: its size in bytes, its time of change and its inode."""

    size: int
    time_ns: int
    inode: int


def compacted_path(encoder_folder: Path) -> Path:
    """Return the path of the table of an encoder's commits."""
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
    checksums: list[dict[str, str]] = []
    known = ((stamps.get(commit_name(commit.chunk)), commit) for commit in commits)
    rows = (_row(commit, stamp) for stamp, commit in known if stamp is not None)
    with replacing(compacted_path(encoder_folder)) as temporary, pq.ParquetWriter(temporary, _SCHEMA) as writer:
        while group := list(islice(rows, _CHUNKS_PER_GROUP)):
            table = pa.Table.from_pylist(group, _SCHEMA)
            writer.write_table(table)
            checksums.append({name: _checksum(table[name]) for name in table.column_names})
        writer.add_key_value_metadata({_CHECKSUMS: json.dumps(checksums)})


def _row(commit: Commit, stamp: Stamp) -> dict[str, Any]:
    failures = [
        {"feature": feature, "offset": offset, "reason": reason}
        for feature, reasons in commit.failures.items()
        for array in [to_array(reasons, pa.string())]
        for offset, reason in zip(np.flatnonzero(~is_none(reasons)), array.drop_null().to_pylist(), strict=True)
    ]
    without_hash = is_none(commit.hashes)
    hashes = np.array(to_bytes(to_array(commit.hashes, HASH)))
    hashes[without_hash] = 0
    return {
        "chunk": commit.chunk,
        "size": stamp.size,
        "time_ns": stamp.time_ns,
        "inode": stamp.inode,
        "num_rows": len(without_hash),
        "metadata": json.dumps(commit_metadata(commit)),
        "failures": failures,
        "hashes": hashes.tobytes(),
        "without_hash": np.flatnonzero(without_hash),
    }


def read_compacted(encoder_folder: Path, stamps: Mapping[str, Stamp]) -> dict[int, Commit]:
    """Return the commits in the table whose files have these stamps now; empty if there is no readable table."""
    try:
        return dict(_iterate_commits(encoder_folder, stamps))
    except _UNREADABLE:
        return {}  # it is derived: the commits themselves are read


def check_compacted(encoder_folder: Path, stamps: Mapping[str, Stamp]) -> str | None:
    """Return why a table is not what its commits say; None if it is, or if there is none. Memory: 256 chunks.

    Commits that cannot be read are not compared.
    """
    path = compacted_path(encoder_folder)
    try:
        with open_table(path) as file:
            for group, checksums in enumerate(_read_checksums(file)):
                _read_group(file, group, _SCHEMA.names, checksums)
        for chunk, commit in _iterate_commits(encoder_folder, stamps):
            with suppress(ArtifactError, PathError):
                if read_commit(encoder_folder, chunk) != commit:
                    return f"it differs from the commit of chunk {chunk}"
    except FileNotFoundError:
        return None
    except _UNREADABLE as error:
        return one_line(error)
    return None


def _iterate_commits(encoder_folder: Path, stamps: Mapping[str, Stamp]) -> Iterator[tuple[int, Commit]]:
    """Iterate over the chunks whose commits have these stamps, with the commits; raises errors of `_UNREADABLE`."""
    columns = [name for name in _SCHEMA.names if name not in _HASH_COLUMNS]
    path = compacted_path(encoder_folder)
    with open_table(path) as file:
        for group, checksums in enumerate(_read_checksums(file)):
            table = _read_group(file, group, columns, checksums)
            failures = _Failures(table["failures"])
            read_hashes = cache(partial(_read_hashes, path, group, checksums))
            for position, row in enumerate(table.drop_columns("failures").to_pylist()):
                chunk, num_rows, metadata = row["chunk"], row["num_rows"], json.loads(row["metadata"])
                if stamps.get(commit_name(chunk)) != Stamp(row["size"], row["time_ns"], row["inode"]):
                    continue
                load = partial(_hashes_of, read_hashes, position, encoder_folder, chunk, num_rows)
                reasons = {name: failures.column(position, name, num_rows) for name in metadata["features"]}
                yield chunk, make_commit(metadata, DeferredColumn[bytes | None](num_rows, load), reasons)


def _read_checksums(file: pq.ParquetFile) -> list[dict[str, str]]:
    checksums: list[dict[str, str]] = json.loads((file.metadata.metadata or {})[_CHECKSUMS.encode()])
    if len(checksums) != file.num_row_groups:
        raise ValueError(f"expected {len(checksums)} groups of rows, got {file.num_row_groups}")
    return checksums


def _read_group(file: pq.ParquetFile, group: int, columns: Sequence[str], checksums: Mapping[str, str]) -> pa.Table:
    """Read columns of a row group; ValueError if one differs from its checksum."""
    table = file.read_row_group(group, list(columns), use_threads=False).cast(
        pa.schema([_SCHEMA.field(name) for name in columns])
    )
    for name in columns:
        if _checksum(table[name]) != checksums[name]:
            raise ValueError(f"its column {name!r} has changed since it was written")
    return table


def _checksum(column: pa.ChunkedArray) -> str:
    """Return the checksums of the values of a column; of lists, those of their lengths and of all elements."""
    values = column.combine_chunks()
    if not pa.types.is_list(values.type):
        return column_checksum(column)
    elements = values.flatten()
    fields = elements.flatten() if pa.types.is_struct(elements.type) else [elements]
    return "".join(column_checksum(pa.chunked_array([part])) for part in (pc.list_value_length(values), *fields))


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
        own = np.flatnonzero(self._codes[start:stop] == self._code.get(feature))  # none where it has no code
        return SparseColumn(num_rows, offsets[own], reasons.take(pa.array(own)))


def _read_hashes(path: Path, group: int, checksums: Mapping[str, str]) -> Sequence[pa.Array] | None:
    """Read the hashes of a row group; None if the table is not the one that was opened, or is damaged."""
    try:
        with open_table(path) as file:
            table = _read_group(file, group, _HASH_COLUMNS, checksums)
    except _UNREADABLE:
        return None
    arrays = []
    for data, missing in zip(table["hashes"], table["without_hash"], strict=True):
        values = data.as_buffer()
        is_present = np.ones(len(values) // HASH_BYTES, bool)
        is_present[missing.values.to_numpy()] = False
        validity = None if is_present.all() else pa.array(is_present).buffers()[1]  # one bit each
        arrays.append(pa.FixedSizeBinaryArray.from_buffers(HASH, len(is_present), [validity, values]))
    return arrays


def _hashes_of(
    read_hashes: Callable[[], Sequence[pa.Array] | None],
    position: int,
    encoder_folder: Path,
    chunk: int,
    num_rows: int,
) -> pa.Array:
    """Return the hashes of a chunk, from its commit if the table cannot be used."""
    arrays = read_hashes()
    if arrays is not None:
        return arrays[position]
    commit = read_commit(encoder_folder, chunk)
    if commit is None or len(commit.hashes) != num_rows:
        raise CorruptError(f"chunk {chunk} in {encoder_folder} was changed by another process; run it again")
    return to_array(commit.hashes, HASH)
