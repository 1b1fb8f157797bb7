"""Batches of loaded items: collected and encoded while the next one is filled; the outputs of a chunk are kept."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from math import log2

from embedcache.arrays import Array
from embedcache.errors import SettingError
from embedcache.extract.feature_writer import FeatureWriter
from embedcache.extract.loading import LoadedItem
from embedcache.modalities import MODALITIES
from embedcache.units import format_bytes

_MAX_CHUNK_BYTES = 2 * 2**30
"""Outputs of one chunk that are kept in memory; those of two chunks are, while one is committed."""


class BatchBuffer:
    """Buffer that collects prepared items into batches, runs the encoder on them and keeps the outputs of some rows.

    While the encoder runs one batch, the next one is filled.
    """

    def __init__(self, writer: FeatureWriter, features: Sequence[str], num_rows: int) -> None:
        self.writer = writer
        self.features: Mapping[str, list[Array | None]] = {name: [None] * num_rows for name in features}
        self._num_rows, self._num_encoded, self._num_bytes = num_rows, 0, 0
        self._rows: list[int] = []
        self._batch: list[Array] = []
        self._running: tuple[list[int], Future[dict[str, list[Array]]]] | None = None

    def add(self, row: int, inputs: Array) -> None:
        """Add one item; a full batch starts once the encoder has finished the one before."""
        self._rows.append(row)
        self._batch.append(inputs)
        if len(self._batch) == self.writer.encoder.batch_size:
            self._start()

    def flush(self) -> None:
        """Wait until all added items are encoded."""
        if self._batch:
            self._start()
        self._collect()

    def copy(self, from_row: int, to_row: int) -> None:
        """Copy the outputs of one row to another."""
        for items in self.features.values():
            items[to_row] = items[from_row]

    def _start(self) -> None:
        rows, batch = self._rows, self._batch
        self._rows, self._batch = [], []
        started = self.writer.executor.submit(self.writer.encode, batch, list(self.features))
        self._collect()
        self._running = rows, started

    def _collect(self) -> None:
        if self._running is None:
            return
        rows, running = self._running
        self._running = None
        encoded = running.result()
        for name, items in self.features.items():
            for row, item in zip(rows, encoded[name], strict=True):
                stored = self.writer.cast(name, item)
                items[row] = stored
                self._num_bytes += stored.nbytes
        self._num_encoded += len(rows)
        self._check_memory()

    def _check_memory(self) -> None:
        """Check that the outputs of the whole chunk fit in memory, as far as the batches up to now tell."""
        is_text = MODALITIES[self.writer.group.modality].kind == "texts"  # the longest come first: no estimate
        num_items = self._num_encoded if is_text else self._num_rows
        item_bytes = self._num_bytes / self._num_encoded
        if num_items * item_bytes <= _MAX_CHUNK_BYTES or self.writer.group.has_commits:
            return
        chunk_size = 2 ** int(log2(max(_MAX_CHUNK_BYTES / item_bytes, 1)))
        raise SettingError(
            f"chunk_size: expected a chunk of at most {format_bytes(_MAX_CHUNK_BYTES)} in memory, got "
            f"{self._num_rows:,} items of {format_bytes(round(item_bytes))} of {self.writer.group.name}; extract "
            f"into a new folder with --chunk-size {min(chunk_size, self._num_rows)}"
        )


def add_loaded(buffer: BatchBuffer, items: Iterable[tuple[int, LoadedItem]], number: int) -> None:
    """Encode the loaded items of some rows; `number` is the writer's position in their inputs."""
    for row, item in items:
        inputs = item.inputs[number]
        if inputs is not None:
            buffer.add(row, inputs)
    buffer.flush()


def add_distinct(buffer: BatchBuffer, loaded: Sequence[LoadedItem], number: int) -> None:
    """Encode loaded items, each distinct item once and the longest first."""
    first_row: dict[bytes | None, int] = {}
    lengths: dict[int, int] = {}
    for row, item in enumerate(loaded):
        inputs = item.inputs[number]
        if inputs is not None and item.hash not in first_row:
            first_row[item.hash], lengths[row] = row, len(inputs)
    rows = sorted(lengths, key=lambda row: (-lengths[row], row))
    add_loaded(buffer, ((row, loaded[row]) for row in rows), number)
    for row, item in enumerate(loaded):
        if item.inputs[number] is not None:
            buffer.copy(first_row[item.hash], row)
