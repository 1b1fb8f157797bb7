"""Stored features: gather any rows from memory maps, or iterate over checked chunks in order."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from embedcache.arrays import Array, Bools, Ints
from embedcache.errors import DataError, UnfinishedError
from embedcache.store.arrays import check_chunk, map_chunk, max_maps, read_metadata
from embedcache.store.columns import HASH, Column, is_missing, to_array
from embedcache.store.group import Commit, EncoderGroup, chunk_shape, read_axis, read_feature


class Feature:
    """One named output of one encoder over all items of its modality, read-only.

    Opening reads no vectors. Memory: the commits (under 100 bytes per item) once rows are read, and memory maps, which
    the system may drop at any time.
    """

    def __init__(self, group: EncoderGroup, feature: str) -> None:
        attributes = read_feature(group, feature)
        self.group = group
        self.feature = feature
        self.item_shape: tuple[int, ...] = tuple(attributes["item_shape"])
        self.dtype: str = attributes["dtype"]
        self.axis = read_axis(attributes, self.name)
        self.num_items = group.info.num_items[group.modality]
        self._maps: OrderedDict[int, Array] = OrderedDict()

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
        folder = self.group.path / self.feature / "values"
        chunks = [commit.chunk for commit in self.commits if commit is not None]
        return sum(int(read_metadata(folder / f"{chunk:05d}")["shape"][0]) for chunk in chunks)

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of items, then the shape of one item; -1 where it varies."""
        return (self.num_items, *self.item_shape)

    @cached_property
    def commits(self) -> list[Commit | None]:
        """Commit of each chunk; None if this feature is not committed."""
        commits = self.group.commits()
        return [commit if commit is not None and self.feature in commit.features else None for commit in commits]

    @cached_property
    def valid(self) -> Bools:
        """(N,) bool, whether each item has this feature."""
        valid = np.zeros(self.num_items, bool)
        for chunk, commit in enumerate(self.commits):
            if commit is not None:
                valid[self._rows(chunk)] = is_missing(commit.failures[self.feature])
        return valid

    @cached_property
    def failures(self) -> dict[int, str]:
        """Row of each failed item -> reason, in row order."""
        return {
            self._rows(commit.chunk).start + offset: failure
            for commit in self.commits
            if commit is not None
            for reasons in [to_array(commit.failures[self.feature], pa.string())]
            for offset, failure in zip(
                np.flatnonzero(reasons.is_valid()).tolist(), reasons.drop_null().to_pylist(), strict=True
            )
        }

    @property
    def hashes(self) -> Column[bytes | None]:
        """BLAKE2b-128 of each item's raw bytes or text, in row order, of committed chunks only."""
        arrays = [to_array(commit.hashes, HASH) for commit in self.commits if commit is not None]
        return Column(pa.chunked_array(arrays, HASH))

    def require_complete(self) -> None:
        """Check that every chunk is committed, or raise an `UnfinishedError`."""
        missing = sum(commit is None or not commit.is_complete(self.feature) for commit in self.commits)
        if missing:
            raise UnfinishedError(
                f"feature {self.name} is not finished: {missing} of {len(self.commits)} chunks are missing; "
                f"run the same {self.group.command} again to resume it"
            )

    def gather(self, rows: Ints) -> Array:
        """Copy rows in the given order: (B,) int -> (B, D) or (B, T, D) in the dtype on disk.

        Checksums are not checked; `chunks` and `load` check them.

        Raises:
            DataError: the feature is ragged, or a row is out of range, failed or not committed.
        """
        self._require_fixed()
        rows = self._check_rows(rows)
        out = np.empty((len(rows), *self.item_shape), self.dtype)
        size = self._chunk_shape[0]
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        numbers, starts = np.unique(ordered // size, return_index=True)
        for number, (start, stop) in zip(numbers, pairwise([*starts, len(rows)]), strict=True):
            out[order[start:stop]] = self._map(int(number))[ordered[start:stop] - number * size]
        return out

    def gather_tokens(self, rows: Ints) -> list[Array]:
        """Copy rows in the given order, as `gather` does, but as one (D,) or (T, D) array per item."""
        if not self.is_ragged:
            return list(self.gather(rows))
        rows = self._check_rows(rows)
        tokens: list[Array | None] = [None] * len(rows)
        for chunk in np.unique(rows // self.group.info.chunk_size):
            start = self._rows(int(chunk)).start
            items = self._ragged_chunk(int(chunk))
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
                    self._lengths(commit.chunk)[: rows.stop - rows.start] if self.is_ragged else num_tokens
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
            yield self._rows(commit.chunk), self._ragged_chunk(commit.chunk, commit=commit)
            return
        path, crcs = self.group.path / self.feature, commit.features[self.feature]
        rows, size = self._rows(commit.chunk), self._chunk_shape[0]
        for start in range(rows.start, rows.stop, size):
            number = start // size
            if f"{self.feature}/{number}" not in crcs:
                return  # of samples that were appended later
            values = map_chunk(path, number, self._chunk_shape, self.dtype)
            check_chunk(path, number, values, crcs[f"{self.feature}/{number}"])
            stop = min(start + size, rows.stop)
            yield slice(start, stop), values[: stop - start]

    def items(self, commit: Commit) -> list[Array | None]:
        """Read one committed chunk as one array per item, None for a failed item; raises what `read_chunk` raises."""
        items = [item for _, values in self.read_chunk(commit) for item in values]
        reasons = commit.failures[self.feature][: len(items)]
        return [item if reason is None else None for item, reason in zip(items, reasons, strict=True)]

    def load(self) -> Array:
        """Read the complete feature into memory: (N, D) or (N, T, D), with checksums checked.

        Failed rows are NaN, of integers -1.

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
        return out

    def _require_fixed(self) -> None:
        if self.is_ragged:
            raise DataError(f"feature {self.name} has a varying number of tokens; use gather_tokens or chunks")

    def _rows(self, chunk: int) -> slice:
        return self.group.info.chunk_rows(self.modality, chunk)

    @cached_property
    def _chunk_shape(self) -> tuple[int, ...]:
        return chunk_shape(self.group.info, self.item_shape, self.dtype)

    def _check_rows(self, rows: Ints) -> Ints:
        rows = np.asarray(rows, np.int64)
        outside = (rows < 0) | (rows >= self.num_items)
        if outside.any():
            raise DataError(
                f"feature {self.name}: expected rows from 0 to {self.num_items - 1}, got {rows[outside][0]}"
            )
        if not self.valid[rows].all():
            row = int(rows[~self.valid[rows]][0])
            reason = self.failures.get(row, "its chunk is not committed")
            raise DataError(f"row {row} has no feature {self.name}: {reason}")
        return rows

    def _map(self, number: int) -> Array:
        if number not in self._maps:
            path = self.group.path / self.feature
            self._maps[number] = map_chunk(path, number, self._chunk_shape, self.dtype)
            chunk_bytes = int(np.prod(self._chunk_shape)) * np.dtype(self.dtype).itemsize
            if len(self._maps) > max_maps(path, chunk_bytes):
                self._maps.popitem(last=False)
        return self._maps[number]

    def _lengths(self, chunk: int) -> Array:
        """Map the number of tokens of each item of one chunk."""
        return map_chunk(self.group.path / self.feature / "lengths", chunk, (self.group.info.chunk_size,), "int32")

    def _ragged_chunk(self, chunk: int, *, commit: Commit | None = None) -> list[Array | None]:
        """Map one chunk of tokens; check its checksums if its commit is given."""
        path = self.group.path / self.feature
        values_path = path / "values" / f"{chunk:05d}"
        num_tokens, width = read_metadata(values_path)["shape"]
        values = map_chunk(values_path, 0, (max(num_tokens, 1), width), self.dtype)
        lengths = self._lengths(chunk)
        if commit is not None:
            crcs = commit.features[self.feature]
            check_chunk(values_path, 0, values, crcs[f"{self.feature}/values/{chunk:05d}/0"])
            check_chunk(path / "lengths", chunk, lengths, crcs[f"{self.feature}/lengths/{chunk}"])
        lengths = lengths[: self.group.info.count_items(self.modality, [chunk])]
        stops = np.cumsum(np.maximum(lengths, 0))
        return [
            None if length < 0 else values[stop - length : stop] for length, stop in zip(lengths, stops, strict=True)
        ]
