"""Stored features: gather any rows from memory maps, or iterate over checked chunks in order."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from embedcache.arrays import Array, Bools, Ints, distinct, to_rows
from embedcache.errors import CorruptError, DataError, UnfinishedError
from embedcache.progress import Progress
from embedcache.provenance import digest
from embedcache.store.arrays import REPAIR, max_maps, open_chunk
from embedcache.store.columns import Column, is_none, to_array
from embedcache.store.commits import HASH, Commit
from embedcache.store.group import EncoderGroup, read_feature
from embedcache.store.transaction import finish, is_complete

T = TypeVar("T")


class Feature:
    """One named output of one encoder over all items of its modality, read-only. Open it with `Cache.feature`.

    `load()` reads all rows into one array, `gather(rows)` any rows, and `chunks()` iterates over all without holding
    them. `valid` says which rows have a value, `failures` why the others have none.

    Opening reads no vectors. No byte is used before it was compared with its checksum: each time a chunk is read in
    order, and once in a process when a chunk is mapped for rows in any order.
    Memory: the commits (under 100 bytes per item) once rows are read, and memory maps, which the system may drop at any
    time.
    """

    def __init__(self, group: EncoderGroup, feature: str) -> None:
        attributes = read_feature(group, feature)
        self.group = group
        self.feature = feature
        self.item_shape = attributes.item_shape
        self.dtype = attributes.dtype
        self.axis = attributes.axis
        self.num_items = group.info.num_items[group.modality]
        self._attributes_digest = digest(attributes.to_json())
        self._maps: OrderedDict[int, Array] = OrderedDict()
        self._commits: dict[int, Commit | None] = {}  # of the chunks that were asked for
        self._valid_N = np.zeros(self.num_items, bool)  # of these chunks

    def __repr__(self) -> str:
        shape = ", ".join("any" if size < 0 else str(size) for size in self.shape)
        return f"Feature({self.name}: {self.modality}, ({shape}) {self.dtype})"

    @property
    def name(self) -> str:
        """`encoder/feature`, as on the command line."""
        return f"{self.group.name}/{self.feature}"

    @property
    def modality(self) -> str:
        """Name of the modality of its items."""
        return self.group.modality

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """Everything that decides the values."""
        return self.group.fingerprint

    @property
    def is_ragged(self) -> bool:
        """Whether the number of tokens varies between items."""
        return self.item_shape[0] < 0

    @property
    def num_tokens(self) -> int:
        """Number of vectors of all committed items."""
        if not self.is_ragged:
            return self.num_items * (self.item_shape[0] if len(self.item_shape) > 1 else 1)
        return int(self.lengths().sum())

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of items, then the shape of one item; -1 where it varies."""
        return (self.num_items, *self.item_shape)

    @cached_property
    def commits(self) -> list[Commit | None]:
        """Commit of each chunk; None if this feature is not committed.

        Raises:
            CorruptError: a commit has changed, or the metadata of this feature has since it was committed.
        """
        return [self._find_commit(chunk) for chunk in range(self.group.info.num_chunks(self.modality))]

    def _find_commit(self, chunk: int) -> Commit | None:
        """Return the commit of a chunk, None if this feature is not committed; each is read once."""
        if chunk not in self._commits:
            commit = self._own(self.group.commit(chunk))
            if commit is not None:
                self._valid_N[self._rows(chunk)] = is_none(commit.failures[self.feature])
            self._commits[chunk] = commit
        return self._commits[chunk]

    def _own(self, commit: Commit | None) -> Commit | None:
        """Return a commit if it has this feature, as the metadata describe it."""
        if commit is None or self.feature not in commit.features:
            return None
        self.check_attributes(commit)
        return commit

    def check_attributes(self, commit: Commit | None) -> None:
        """Check that a chunk was committed with the shape, dtype and axis that the metadata states now.

        Raises:
            CorruptError: they differ.
        """
        if commit is not None and commit.attributes.get(self.feature) != self._attributes_digest:
            path = self.group.path / self.feature / "zarr.json"
            raise CorruptError(
                f"{path}: its attributes have changed since chunk {commit.chunk} was committed; restore that file"
            )

    @property
    def valid(self) -> Bools:
        """(N,) bool, whether each item has this feature; `has` tells of a few."""
        _ = self.commits  # now all are read
        return self._valid_N

    def has(self, rows: Ints) -> Bools:
        """Return whether each row has this feature, (B,) bool, False if there is no such row.

        Only the commits of their chunks are read.
        """
        rows = to_rows(rows)
        has_B = (rows >= 0) & (rows < self.num_items)
        rows = rows[has_B]
        if len(self._commits) < self.group.info.num_chunks(self.modality):
            for chunk in distinct(rows // self.group.info.chunk_size).tolist():
                self._find_commit(chunk)
        has_B[has_B] = self._valid_N[rows]
        return has_B

    @cached_property
    def failed(self) -> tuple[Ints, pa.ChunkedArray]:
        """Rows of the failed items, ascending, and the reason of each: (M,) int64 and M strings."""
        rows, reasons = [np.empty(0, np.int64)], [pa.array([], pa.string())]
        for commit in self.commits:
            if commit is not None:
                of_chunk = to_array(commit.failures[self.feature], pa.string())
                rows.append(self._rows(commit.chunk).start + np.flatnonzero(of_chunk.is_valid()))
                reasons.append(of_chunk.drop_null())
        return np.concatenate(rows), pa.chunked_array(reasons)

    @cached_property
    def failures(self) -> dict[int, str]:
        """Row of each failed item -> reason, in row order."""
        rows, reasons = self.failed
        return dict(zip(rows.tolist(), reasons.to_pylist(), strict=True))

    @property
    def hashes(self) -> Column[bytes | None]:
        """BLAKE2b-128 of each item's raw bytes or text, in row order, of committed chunks only."""
        arrays = [to_array(commit.hashes, HASH) for commit in self.commits if commit is not None]
        return Column(pa.chunked_array(arrays, HASH))

    def require_complete(self) -> None:
        """Check that every chunk is committed, or raise an `UnfinishedError`."""
        missing = sum(commit is None or not commit.is_complete(self.feature) for commit in self.commits)
        if missing:
            are = "is" if missing == 1 else "are"
            raise UnfinishedError(
                f"feature {self.name} is not finished: {missing} of {len(self.commits)} chunks {are} missing; "
                f"run the same {self.group.command} again to resume it"
            )

    def gather(self, rows: Ints) -> Array:
        """Copy rows in the given order: (B,) int -> (B, D) or (B, T, D) in the dtype on disk.

        Raises:
            DataError: the feature is ragged, or a row is no integer, out of range, failed or not committed.
            CorruptError: a chunk differs from its checksum, which is compared when this process first maps it.
        """
        self._require_fixed()
        rows = self._check_rows(rows)
        out = np.empty((len(rows), *self.item_shape), self.dtype)
        size = self._chunk_shape[0]
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        numbers, starts = np.unique(ordered // size, return_index=True)
        bounds = pairwise([*starts.tolist(), len(rows)])
        for number, (start, stop) in zip(numbers.tolist(), bounds, strict=True):
            places = ordered[start:stop] - number * size
            out[order[start:stop]] = self._map(number).take(places, axis=0)  # copies whole rows, as an index does not
        return out

    def gather_tokens(self, rows: Ints) -> list[Array]:
        """Copy rows in the given order, as `gather` does, but as one (D,) or (T, D) array per item."""
        if not self.is_ragged:
            return list(self.gather(rows))
        rows = self._check_rows(rows)
        tokens: list[Array | None] = [None] * len(rows)
        for chunk in distinct(rows // self.group.info.chunk_size):
            start = self._rows(int(chunk)).start
            items = self._read(self._commit_of(int(chunk)), partial(self._ragged_items, once=True))
            for position in np.flatnonzero(rows // self.group.info.chunk_size == chunk):
                tokens[position] = items[rows[position] - start]
        assert all(array is not None for array in tokens)  # every row is valid, so every item has tokens
        return [array for array in tokens if array is not None]

    def lengths(self) -> Ints:
        """Return the number of tokens of each item without reading them: (N,) int64, 0 for an item that has none."""
        lengths_N = np.zeros(self.num_items, np.int64)
        for commit in self.commits:
            if commit is not None:
                rows = self._rows(commit.chunk)
                num_tokens = self.item_shape[0] if len(self.item_shape) > 1 else 1
                lengths_N[rows] = (
                    self._read(commit, partial(self._lengths, once=True))[: rows.stop - rows.start]
                    if self.is_ragged
                    else num_tokens
                )
        lengths_N[~self.valid] = 0
        return lengths_N

    def chunks(self) -> Iterator[tuple[slice, Any]]:
        """Iterate over the committed chunks in row order, with checksums checked.

        Yields:
            The rows, and their (rows, D) or (rows, T, D) array: a read-only view, NaN (integers: -1) in failed rows. A
            ragged feature yields a list of (T, D) arrays, None for a failed item.
        """
        for commit in self.commits:
            if commit is not None:
                yield from self.read_chunk(commit)

    def read_chunk(self, commit: Commit) -> Iterator[tuple[slice, Any]]:
        """Read one committed chunk, with checksums checked, as `chunks` yields it.

        Raises:
            CorruptError: a checksum does not match.
            UnfinishedError: a file is missing.
        """
        if self.is_ragged:
            yield self._rows(commit.chunk), self._read(commit, self._ragged_items)
            return
        rows, size = self._rows(commit.chunk), self._chunk_shape[0]
        for start in range(rows.start, rows.stop, size):
            number = start // size
            if f"{self.feature}/{number}" not in commit.features[self.feature]:
                return  # of samples that were appended later
            values = self._read(commit, partial(self._values, number=number))
            stop = min(start + size, rows.stop)
            yield slice(start, stop), values[: stop - start]

    def items(self, commit: Commit) -> list[Array | None]:
        """Read one committed chunk as one array per item, None for a failed item; raises what `read_chunk` raises."""
        items = [item for _, values in self.read_chunk(commit) for item in values]
        reasons = commit.failures[self.feature][: len(items)]
        return [item if reason is None else None for item, reason in zip(items, reasons, strict=True)]

    def load(self, *, progress: Progress | None = None) -> Array:
        """Read the complete feature into memory: (N, D) or (N, T, D), with checksums checked.

        Failed rows are NaN, of integers -1. `progress`, in which the caller has started a step, advances by rows.

        Raises:
            UnfinishedError: chunks are missing.
            CorruptError: a checksum does not match.
            DataError: the feature is ragged.
        """
        self._require_fixed()
        self.require_complete()
        out = np.empty(self.shape, self.dtype)
        for rows, values in self.chunks():
            out[rows] = values
            if progress:
                progress.advance(len(values))
        return out

    def _require_fixed(self) -> None:
        if self.is_ragged:
            raise DataError(f"feature {self.name} has a varying number of tokens; use gather_tokens or chunks")

    def _rows(self, chunk: int) -> slice:
        return self.group.info.chunk_rows(self.modality, chunk)

    @cached_property
    def _chunk_shape(self) -> tuple[int, ...]:
        return self.group.info.chunk_shape(self.item_shape, self.dtype)

    def _check_rows(self, rows: Ints) -> Ints:
        rows = to_rows(rows)
        outside = (rows < 0) | (rows >= self.num_items)
        if outside.any():
            raise DataError(
                f"feature {self.name}: expected rows from 0 to {self.num_items - 1}, got {rows[outside][0]}"
            )
        has_B = self.has(rows)
        if not has_B.all():
            row = int(rows[~has_B][0])
            reason = self.failures.get(row, "its chunk is not committed")
            raise DataError(f"row {row} has no feature {self.name}: {reason}")
        return rows

    def _commit_of(self, chunk: int) -> Commit:
        """Return the commit of a chunk with valid rows."""
        commit = self._find_commit(chunk)
        assert commit is not None  # the caller has checked its rows
        return commit

    def _read(self, commit: Commit, read: Callable[[Commit], T]) -> T:
        """Read files of a chunk; again with its new commit if another process has written the chunk since.

        `--extend` and `--retry-failed` do: values that existed stay the same in the new files. A removal raises.
        """
        try:
            return read(commit)
        except (CorruptError, UnfinishedError):
            current = self._commit_after_writers(commit.chunk)
            if current is None or current.features[self.feature] == commit.features[self.feature]:
                raise
            current.check_keeps(commit, self.feature)
        return read(current)

    def _commit_after_writers(self, chunk: int) -> Commit | None:
        """Read the commit of a chunk after a process that writes it again, or what a killed one has left for others."""
        with suppress(OSError):  # of a cache that this user must not write
            finish(self.group.path, chunk)
        if is_complete(self.group.path, chunk):
            raise UnfinishedError(
                f"chunk {chunk} of feature {self.name} is being written by another process, or was when it ended; "
                f"run the same command again once {self.group.command} has finished"
            )
        return self._own(self.group.commit(chunk))

    def _map(self, number: int) -> Array:
        """Map one chunk, unless it is among those that are kept, of which other threads may remove it at any time."""
        values = self._maps.get(number)
        if values is None:
            commit = self._commit_of(number * self._chunk_shape[0] // self.group.info.chunk_size)
            values = self._maps[number] = self._read(commit, partial(self._values, number=number, once=True))
            chunk_bytes = math.prod(self._chunk_shape) * np.dtype(self.dtype).itemsize
            if len(self._maps) > max_maps(self.group.path / self.feature, chunk_bytes):
                with suppress(KeyError):  # other threads have removed all
                    self._maps.popitem(last=False)
        return values

    def _checksum(self, commit: Commit, file: str) -> str:
        """Return the committed checksum of a file."""
        try:
            return commit.features[self.feature][file]
        except KeyError:
            raise CorruptError(f"the commit of chunk {commit.chunk} of {self.name} lacks {file}; {REPAIR}") from None

    def _values(self, commit: Commit, *, number: int, once: bool = False) -> Array:
        """Map one chunk of the array of a feature with items of one shape."""
        crc = self._checksum(commit, f"{self.feature}/{number}")
        return open_chunk(self.group.path / self.feature, number, self._chunk_shape, self.dtype, crc, once=once)

    def _lengths(self, commit: Commit, *, once: bool = False) -> Array:
        """Map the number of tokens of each item of one chunk; -1 for a failed item."""
        crc = self._checksum(commit, f"{self.feature}/lengths/{commit.chunk}")
        path, shape = self.group.path / self.feature / "lengths", (self.group.info.chunk_size,)
        return open_chunk(path, commit.chunk, shape, "int32", crc, once=once)

    def _ragged_items(self, commit: Commit, *, once: bool = False) -> list[Array | None]:
        """Map one chunk of tokens."""
        lengths = self._lengths(commit, once=once)
        name = f"values/{commit.chunk:05d}"
        shape = (max(int(np.maximum(lengths, 0).sum()), 1), self.item_shape[1])
        crc = self._checksum(commit, f"{self.feature}/{name}/0")
        values = open_chunk(self.group.path / self.feature / name, 0, shape, self.dtype, crc, once=once)
        lengths = lengths[: self.group.info.count_items(self.modality, [commit.chunk])]
        stops = np.cumsum(np.maximum(lengths, 0))
        return [
            None if length < 0 else values[stop - length : stop] for length, stop in zip(lengths, stops, strict=True)
        ]
