"""Reading the inputs of a derivation: the features of the same items, or of other items of the same samples."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from embedcache.arrays import Array, Bools, Ints, distinct
from embedcache.derive.rules import Block
from embedcache.errors import DataError, UnfinishedError
from embedcache.store.cache import Cache
from embedcache.store.commits import Commit
from embedcache.store.feature import Feature


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Items of the first input, and the rows of every input that belong to them.

    Args:
        hashes: hash of each item, as the first input has it.
        reasons: reason why each item lacks an input; None if it has all.
        valid: positions of the items that have all inputs.
        input_rows: per input, the row of each item with all inputs.
    """

    hashes: Sequence[bytes | None]
    reasons: Sequence[str | None]
    valid: Ints
    input_rows: Sequence[Ints]

    def where(self, mask: Bools) -> "Rows":
        """Return the rows without some of the items that have all inputs; `mask` has an element per such item."""
        return replace(self, valid=self.valid[mask], input_rows=[rows[mask] for rows in self.input_rows])


class ChunkReader:
    """Reads the inputs of a derivation, chunk by chunk of the first input's modality, with checksums checked."""

    def __init__(self, cache: Cache, inputs: Sequence[Feature]) -> None:
        self.cache = cache
        self.inputs = inputs
        self.modality = inputs[0].modality
        self._commits: dict[tuple[int, int], Commit] = {}

    def require_complete(self) -> None:
        """Check that every chunk of the inputs is committed, or raise an `UnfinishedError`; keeps no commits."""
        for feature in self.inputs:
            for chunk in range(self.cache.info.num_chunks(feature.modality)):
                _read_commit(feature, chunk)

    def open_chunk(self, chunk: int) -> Rows:
        """Return the rows of one chunk of the first input's modality."""
        rows = self.cache.info.chunk_rows(self.modality, chunk)
        return self.open_rows(np.arange(rows.start, rows.stop))

    def open_first(self) -> Rows:
        """Return the first item of the first chunk that has all inputs, if there is one."""
        rows = self.open_chunk(0)
        return rows.where(np.arange(len(rows.valid)) == 0)

    def open_rows(self, rows: Ints) -> Rows:
        """Return some rows of the first input's modality, ascending."""
        self._commits.clear()
        reasons: list[str | None] = [None] * len(rows)
        found = []
        for number, feature in enumerate(self.inputs):
            input_rows = self._rows_of(feature.modality, rows)
            found.append(input_rows)
            for position, reason in enumerate(self._reasons(number, input_rows)):
                reasons[position] = reasons[position] or reason
        valid = np.flatnonzero([reason is None for reason in reasons])
        return Rows(
            hashes=self._hashes(rows),
            reasons=reasons,
            valid=valid,
            input_rows=[input_rows[valid] for input_rows in found],
        )

    def samples_of(self, rows: Rows) -> Ints:
        """Return the sample of each item that has all inputs."""
        samples: Ints = self._own_samples[rows.input_rows[0]]
        return samples

    def blocks(self, rows: Rows) -> list[Block]:
        """Read the values of each input for the items that have all inputs."""
        return [self._read(number, input_rows) for number, input_rows in enumerate(rows.input_rows)]

    def _read(self, number: int, rows: Ints) -> Block:
        """Read rows of an input, chunk by chunk."""
        feature, size = self.inputs[number], self.cache.info.chunk_size
        if feature.is_ragged:
            tokens: list[Any] = [None] * len(rows)
            for chunk in distinct(rows // size).tolist():
                items = feature.items(self._commit(number, chunk))
                for position in np.flatnonzero(rows // size == chunk).tolist():
                    tokens[position] = items[rows[position] - chunk * size]
            lengths = np.array([len(item) for item in tokens], np.int64)
            return Block(np.concatenate(tokens), lengths)
        values = np.empty((len(rows), *feature.item_shape), feature.dtype)
        for chunk in distinct(rows // size).tolist():
            for part, stored in feature.read_chunk(self._commit(number, chunk)):
                is_here = (rows >= part.start) & (rows < part.stop)
                values[is_here] = stored[rows[is_here] - part.start]
        return Block(values)

    def _reasons(self, number: int, rows: Ints) -> list[str | None]:
        """Return the reason why each row lacks an input; a row of -1 is an item that its sample lacks."""
        feature, size = self.inputs[number], self.cache.info.chunk_size
        reasons: list[str | None] = []
        for row in rows.tolist():
            if row < 0:
                reasons.append(f"no {feature.modality} in its sample")
            else:
                chunk, offset = divmod(row, size)
                reasons.append(self._commit(number, chunk).failures[feature.feature][offset])
        return reasons

    def _hashes(self, rows: Ints) -> list[bytes | None]:
        located = (divmod(row, self.cache.info.chunk_size) for row in rows.tolist())
        return [self._commit(0, chunk).hashes[offset] for chunk, offset in located]

    def _commit(self, number: int, chunk: int) -> Commit:
        """Return the commit of a chunk of an input, kept until other rows are opened."""
        if (number, chunk) not in self._commits:
            self._commits[number, chunk] = _read_commit(self.inputs[number], chunk)
        return self._commits[number, chunk]

    def _rows_of(self, modality: str, rows: Ints) -> Ints:
        """Return the row of a modality in the sample of each row; -1 if the sample has none."""
        if modality == self.modality:
            return rows
        samples, own_rows = self._unique_samples(modality)
        wanted = self._own_samples[rows]
        positions = np.minimum(np.searchsorted(samples, wanted), max(len(samples) - 1, 0))
        found: Ints = np.where(samples[positions] == wanted, own_rows[positions], -1)
        return found

    @cached_property
    def _own_samples(self) -> Ints:
        return self._samples(self.modality)

    def _unique_samples(self, modality: str) -> tuple[Ints, Ints]:
        """Return the samples with an item of a modality, ascending, and the row of each one's item.

        Raises:
            DataError: a sample has several.
        """
        if modality not in self._links:
            samples = self._samples(modality)
            order = np.argsort(samples, kind="stable")
            samples = samples[order]
            is_repeated = samples[1:] == samples[:-1]
            if is_repeated.any():
                first = int(samples[1:][is_repeated][0])
                key = self.cache.key(first)
                raise DataError(
                    f"expected one {modality} per sample, got {int((samples == first).sum())} in the sample {key!r}: "
                    f"which of them belongs to its {self.modality} is not defined; make the {modality} the first "
                    "input, or use a cache with one per sample"
                )
            self._links[modality] = samples, order
        return self._links[modality]

    @cached_property
    def _links(self) -> dict[str, tuple[Ints, Ints]]:
        return {}

    def _samples(self, modality: str) -> Ints:
        samples: Array = self.cache.items(modality, columns=["sample"])["sample"].to_numpy()
        return samples.astype(np.int64)


def _read_commit(feature: Feature, chunk: int) -> Commit:
    commit = feature.group.commit(chunk)
    if commit is None or not commit.is_complete(feature.feature):
        raise UnfinishedError(
            f"feature {feature.name} is not finished: chunk {chunk} is missing; run the same {feature.group.command} "
            "again first"
        )
    return commit
