"""The extraction loop: chunk by chunk, items are loaded ahead on threads while the encoders run, then committed.

A loaded item is the input of each feature writer's model, or the reason why it failed; inputs are encoded in batches,
which are filled while the batch before is encoded.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import log2
from operator import itemgetter
from typing import Any, TypeAlias

import pyarrow as pa
from PIL.Image import Image

from embedcache.arrays import Array
from embedcache.errors import FingerprintError, ItemError, SettingError, pluralize
from embedcache.extract.feature_writer import ChunkTask, FeatureWriter
from embedcache.modalities import MODALITIES, Modality, noun, one_noun
from embedcache.processes import prefetch_map
from embedcache.progress import NullProgress, Progress
from embedcache.samples import FileItem, Source
from embedcache.sources import reopen_source
from embedcache.store.cache import Cache
from embedcache.store.commits import PENDING, REMOVED, hash_item
from embedcache.store.producer import ChunkFeatures
from embedcache.store.tables import to_file_item
from embedcache.store.writer import commit_chunk
from embedcache.units import format_bytes

_MAX_CHUNK_BYTES = 2 * 2**30
"""Outputs of one chunk that are kept in memory; those of two chunks are, while one is committed."""


def encode_chunks(
    cache: Cache,
    source: Source | None,
    modality: str,
    tasks: Iterable[ChunkTask],
    progress: Progress,
    *,
    threads: int,
) -> None:
    """Encode leased chunks, each requested when it is needed, commit them, and release their leases.

    Args:
        source: see `reopen_item_source`.
        threads: number of threads that read and decode items.
    """
    with ThreadPoolExecutor(threads) as executor, _commit_thread() as commit:
        _encode_chunks(cache, source, modality, tasks, executor, commit, progress)


def encode_chunk(cache: Cache, source: Source | None, task: ChunkTask, *, threads: int) -> list[ChunkFeatures]:
    """Encode one chunk without committing it; return its features for each writer of the task."""
    encoded: list[ChunkFeatures] = []

    def keep(_: ChunkTask, buffers: Sequence[BatchBuffer], loaded: Sequence[LoadedItem]) -> None:
        encoded.extend(_finish(buffer, loaded, number) for number, buffer in enumerate(buffers))

    modality = next(iter(task.missing)).group.modality
    with ThreadPoolExecutor(threads) as executor:
        _encode_chunks(cache, source, modality, [task], executor, keep, NullProgress())
    return encoded


def _encode_chunks(
    cache: Cache,
    source: Source | None,
    modality: str,
    tasks: Iterable[ChunkTask],
    executor: Executor,
    commit: "_CommitFunction",
    progress: Progress,
) -> None:
    if MODALITIES[modality].kind == "texts":
        _encode_text_chunks(cache, tasks, executor, commit, progress)
    else:
        assert source is not None
        _encode_file_chunks(cache, source, MODALITIES[modality], tasks, executor, commit, progress)


def reopen_item_source(cache: Cache, modality: str) -> Source | None:
    """Open the source of a cache again to read items; None for texts, which are in the tables of the cache."""
    if MODALITIES[modality].kind == "texts":
        return None
    return reopen_source(cache.info.source, cache.info.index_digest)


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


_CommitFunction: TypeAlias = Callable[[ChunkTask, Sequence[BatchBuffer], Sequence[LoadedItem]], None]


def _encode_file_chunks(
    cache: Cache,
    source: Source,
    modality: Modality,
    tasks: Iterable[ChunkTask],
    executor: Executor,
    commit: _CommitFunction,
    progress: Progress,
) -> None:
    """Encode chunks of items in files, each item read and decoded once for all encoders, in row order.

    Memory: `modality.num_ahead` items prepared for each encoder, and the outputs of two chunks.
    """
    decode = modality.load_decoder()

    def load(task_item: tuple[ChunkTask, FileItem | str]) -> tuple[ChunkTask, LoadedItem]:
        task, item = task_item
        if isinstance(item, str):
            return task, _not_encoded(len(task.missing), item, hash=None)
        loaded = _load_file(source, item, decode, list(task.missing))
        if not task.allows_changes:
            _check_length(item, loaded, modality.name)
        return task, loaded

    num_blank = 0
    items = _list_items(cache, modality.name, tasks)
    with closing(prefetch_map(executor, load, items, window=modality.num_ahead)) as stream:
        for task, group in groupby(stream, key=itemgetter(0)):
            num_items = cache.info.count_items(modality.name, [task.chunk])
            buffers = [BatchBuffer(writer, names, num_items) for writer, names in task.missing.items()]
            loaded = []
            for row, (_, item) in enumerate(group):
                num_blank += item.is_blank
                _add_item(buffers, row, item)
                loaded.append(replace(item, inputs=[]))
                item.inputs.clear()  # the last item stays referenced while the chunk is committed
                progress.advance(1)
            commit(task, buffers, loaded)
    if num_blank:
        is_blank = pluralize(num_blank, f"{one_noun(modality.name)} has", f"{noun(modality.name)} have")
        progress.note(f"{is_blank} a single color; encoded like any other")


def _list_items(cache: Cache, modality: str, tasks: Iterable[ChunkTask]) -> Iterator[tuple[ChunkTask, FileItem | str]]:
    """Iterate over the items of chunks in row order: the location of each, or the reason why it is not encoded."""
    removed = set(cache.removed.tolist())
    for task in tasks:
        for number, row in enumerate(cache.items(modality, chunk=task.chunk).to_pylist()):
            if number not in task.rows:
                yield task, PENDING  # not tried: what is stored stays
            elif row["sample"] in removed:
                yield task, REMOVED
            else:
                yield task, to_file_item(row)


def _add_item(buffers: Sequence[BatchBuffer], row: int, item: LoadedItem) -> None:
    """Add an item of a row of the chunk to the batches of the writers that it did not fail for."""
    for buffer, inputs in zip(buffers, item.inputs, strict=True):
        if inputs is not None:
            buffer.add(row, inputs)


def _encode_text_chunks(
    cache: Cache,
    tasks: Iterable[ChunkTask],
    executor: Executor,
    commit: _CommitFunction,
    progress: Progress,
) -> None:
    """Encode chunks of texts, each distinct text once per chunk and the longest first, so that batches are padded less.

    Memory: the token ids of two chunks, and the outputs of two chunks.
    """
    removed = set(cache.removed.tolist())

    def load(task: ChunkTask) -> tuple[ChunkTask, list[LoadedItem]]:
        table = cache.items("text", chunk=task.chunk)
        loaded = _load_texts(table, list(task.missing))
        for row, sample in enumerate(table["sample"].to_pylist()):
            if row not in task.rows:
                loaded[row] = _not_encoded(len(task.missing), PENDING, hash=loaded[row].hash)
            elif sample in removed:
                loaded[row] = _not_encoded(len(task.missing), REMOVED, hash=loaded[row].hash)
        return task, loaded

    with closing(prefetch_map(executor, load, tasks, window=2)) as stream:
        for task, loaded in stream:
            buffers = [BatchBuffer(writer, names, len(loaded)) for writer, names in task.missing.items()]
            for number, buffer in enumerate(buffers):
                _add_distinct(buffer, loaded, number)
            progress.advance(len(loaded))
            commit(task, buffers, loaded)


@contextmanager
def _commit_thread() -> Iterator[_CommitFunction]:
    """Yield a function that commits one chunk after the other on a thread, so that no encoder waits for the disk."""
    with ThreadPoolExecutor(1, thread_name_prefix="commit") as thread:
        running: Future[None] | None = None

        def commit(task: ChunkTask, buffers: Sequence[BatchBuffer], loaded: Sequence[LoadedItem]) -> None:
            nonlocal running
            if running is not None:
                running.result()
            running = thread.submit(_commit, task, buffers, loaded)

        yield commit
        if running is not None:
            running.result()


def _commit(task: ChunkTask, buffers: Sequence[BatchBuffer], loaded: Sequence[LoadedItem]) -> None:
    """Encode what is left in the buffers, commit the chunk for each writer, and release its leases."""
    for number, buffer in enumerate(buffers):
        commit_chunk(buffer.writer.group, task.chunk, *_finish(buffer, loaded, number))
        buffer.writer.mark_complete(task.chunk)
    task.release()


def _finish(buffer: BatchBuffer, loaded: Sequence[LoadedItem], number: int) -> ChunkFeatures:
    """Encode what is left in a buffer, and return the features of its chunk; `number` is the writer's in its inputs."""
    buffer.flush()
    failures = [item.failures[number] for item in loaded]
    hashes = [item.hash for item in loaded]
    return ChunkFeatures(buffer.features, hashes, dict.fromkeys(buffer.features, failures))


def _load_file(
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
        return replace(_not_encoded(len(writers), str(error), hash=content_hash), num_bytes=num_bytes)
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


def _load_texts(table: pa.Table, writers: Sequence[FeatureWriter]) -> list[LoadedItem]:
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


def _not_encoded(num_writers: int, reason: str, *, hash: bytes | None) -> LoadedItem:
    """Return an item without inputs and with one reason for all writers: it failed, was removed, or is stored."""
    return LoadedItem(hash=hash, failures=[reason] * num_writers, inputs=[None] * num_writers)


def _check_length(item: FileItem, loaded: LoadedItem, modality: str) -> None:
    """Check that a file is as long as when it was indexed, or raise a `FingerprintError` that names it."""
    if item.length and loaded.num_bytes not in (None, item.length):
        raise FingerprintError(
            f"{modality} {item.path}: expected {item.length:,} bytes, as when the source was indexed, got "
            f"{loaded.num_bytes:,}; put the old file back, or extract into a new folder; if all encoders had failed on "
            "it, give its source, not the cache, with --retry-failed"
        )


def _add_distinct(buffer: BatchBuffer, loaded: Sequence[LoadedItem], number: int) -> None:
    """Encode loaded items, each distinct item once and the longest first."""
    first_row: dict[bytes | None, int] = {}
    lengths: dict[int, int] = {}
    for row, item in enumerate(loaded):
        inputs = item.inputs[number]
        if inputs is not None and item.hash not in first_row:
            first_row[item.hash], lengths[row] = row, len(inputs)
    for row in sorted(lengths, key=lambda row: (-lengths[row], row)):
        inputs = loaded[row].inputs[number]
        assert inputs is not None
        buffer.add(row, inputs)
    buffer.flush()
    for row, item in enumerate(loaded):
        if item.inputs[number] is not None:
            buffer.copy(first_row[item.hash], row)
