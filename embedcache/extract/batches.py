"""Items as the inputs of models, loaded for each feature writer, and their batches, encoded while others are filled."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from math import log2
from typing import Any

import pyarrow as pa
from PIL.Image import Image

from embedcache.arrays import Array
from embedcache.errors import FingerprintError, ItemError, SettingError
from embedcache.extract.feature_writer import FeatureWriter
from embedcache.modalities import MODALITIES
from embedcache.processes import prefetch_map
from embedcache.sources.base import FileItem, Source
from embedcache.store.commits import hash_item
from embedcache.store.tables import to_file_item
from embedcache.units import format_bytes

_MAX_CHUNK_BYTES = 2 * 2**30
"""Outputs of one chunk that are kept in memory; those of two chunks are, while one is committed."""


@dataclass(frozen=True, kw_only=True)
class LoadedItem:
    """One item as one array per feature writer.

    Args:
        hash: hash of its content; None if it was not read.
        failures: for each writer why it failed, or None.
        inputs: for each writer the model's input; None for a failed item.
        num_bytes: number of bytes of its file; None if it was not read, and of a text.
        is_blank: whether it is an image of a single color.
    """

    hash: bytes | None
    failures: Sequence[str | None]
    inputs: list[Array | None] = field(default_factory=list)
    num_bytes: int | None = None
    is_blank: bool = False


def load_items(
    source: Source, table: pa.Table, writers: Sequence[FeatureWriter], executor: Executor
) -> list[LoadedItem]:
    """Load rows of an item table, all of the writers' modality, for every writer; files on several threads."""
    modality = MODALITIES[writers[0].group.modality]
    if modality.kind == "texts":
        return load_texts(table, writers)
    decode = modality.load_decoder()
    items = [to_file_item(row) for row in table.to_pylist()]
    loaded = prefetch_map(executor, lambda item: load_file(source, item, decode, writers), items, window=len(items) + 1)
    return list(loaded)


def load_file(
    source: Source, item: FileItem, decode: Callable[..., Any], writers: Sequence[FeatureWriter]
) -> LoadedItem:
    """Read and decode one item, and prepare it for every writer; an image once per background color.

    What raises an `ItemError` is returned as an item with a reason.
    """
    content_hash = num_bytes = None
    interval = (item.start_s, item.stop_s)
    try:
        data = source.read(item)
        num_bytes = len(data)
        content_hash = hash_item(data, interval=interval)
        writers[0].gate.wait()
        colors = [writer.background for writer in writers]
        raws = {color: _decode(decode, data, interval, color) for color in dict.fromkeys(colors)}
        del data  # an hour of sound is 115 MB
    except ItemError as error:
        return replace(not_encoded(len(writers), str(error), hash=content_hash), num_bytes=num_bytes)
    inputs, failures = list[Array | None](), list[str | None]()
    for writer, color in zip(writers, colors, strict=True):
        prepared, failure = _prepare(writer, raws[color])
        inputs.append(prepared)
        failures.append(failure)
    raw = raws[colors[0]]
    is_blank = isinstance(raw, Image) and raw.getcolors(1) is not None  # stops at the second color
    return LoadedItem(hash=content_hash, failures=failures, inputs=inputs, num_bytes=num_bytes, is_blank=is_blank)


def _decode(decode: Callable[..., Any], data: bytes, interval: tuple[float | None, float | None], color: str) -> Any:
    """Decode an item; an image onto a color."""
    if color != "white":
        return decode(data, background=color)
    return decode(data) if interval == (None, None) else decode(data, *interval)


def _prepare(writer: FeatureWriter, raw: Any) -> tuple[Array | None, str | None]:
    """Return the model's input for one raw item, or why the model cannot take it."""
    try:
        return writer.prepare([raw])[0], None
    except ItemError as error:
        return None, str(error)


def load_texts(table: pa.Table, writers: Sequence[FeatureWriter]) -> list[LoadedItem]:
    """Tokenize texts for every writer; equal texts share their inputs."""
    texts = table["text"].to_pylist()
    distinct = [text for text in dict.fromkeys(texts) if text.strip()]
    prepared = [writer.prepare(distinct) for writer in writers]
    inputs: dict[str, list[Array | None]] = {
        text: list(arrays) for text, *arrays in zip(distinct, *prepared, strict=True)
    }
    return [
        LoadedItem(
            hash=hash_item(text.encode()),
            failures=[None if text in inputs else "empty caption"] * len(writers),
            inputs=inputs.get(text, [None] * len(writers)),
        )
        for text in texts
    ]


def not_encoded(num_writers: int, reason: str, *, hash: bytes | None) -> LoadedItem:
    """Return an item without inputs and with one reason for all writers: it failed, was removed, or is stored."""
    return LoadedItem(hash=hash, failures=[reason] * num_writers, inputs=[None] * num_writers)


def check_length(item: FileItem, loaded: LoadedItem, modality: str) -> None:
    """Check that a file is as long as when it was indexed, or raise a `FingerprintError` that names it."""
    if item.length and loaded.num_bytes not in (None, item.length):
        raise FingerprintError(
            f"{modality} {item.path}: expected {item.length:,} bytes, as when the source was indexed, got "
            f"{loaded.num_bytes:,}; put the old file back, or extract into a new folder"
        )


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
