"""The extraction loop: chunk by chunk, items are loaded ahead on threads while the encoders run, then committed."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TypeAlias, TypeVar

import pyarrow as pa

from embedcache.arrays import Array
from embedcache.errors import ItemError
from embedcache.extract.feature_writer import ChunkTask, FeatureWriter
from embedcache.progress import Progress
from embedcache.sources.base import ImageItem, Source
from embedcache.sources.images import decode_image
from embedcache.store.cache import Cache
from embedcache.store.group import hash_item
from embedcache.store.writer import commit_chunk

T = TypeVar("T")
R = TypeVar("R")

_CommitFunction: TypeAlias = "Callable[[ChunkTask, Sequence[BatchBuffer], Sequence[LoadedItem]], None]"

_IMAGES_AHEAD = 256


def encode_chunks(
    cache: Cache,
    source: Source,
    modality: str,
    tasks: Iterable[ChunkTask],
    progress: Progress,
    *,
    threads: int,
) -> None:
    """Encode leased chunks, each requested when it is needed, commit them, and release their leases.

    Args:
        threads: number of threads that read and decode items.
    """
    encode = _encode_image_chunks if modality == "image" else _encode_text_chunks
    with ThreadPoolExecutor(threads) as executor, _commit_thread() as commit:
        encode(cache, source, tasks, executor, commit, progress)


def _encode_image_chunks(
    cache: Cache,
    source: Source,
    tasks: Iterable[ChunkTask],
    executor: Executor,
    commit: _CommitFunction,
    progress: Progress,
) -> None:
    """Encode chunks of images, each image read and decoded once for all encoders, in row order.

    Memory: `_IMAGES_AHEAD` images prepared for each encoder, and the outputs of two chunks.
    """

    def load(task_item: tuple[ChunkTask, ImageItem]) -> tuple[ChunkTask, LoadedItem]:
        task, item = task_item
        return task, _load_image(source, item, list(task.missing))

    task_items = ((task, item) for task in tasks for item in _image_items(cache.items("image", chunk=task.chunk)))
    with closing(_prefetch_map(executor, load, task_items, window=_IMAGES_AHEAD)) as stream:
        for task, group in groupby(stream, key=itemgetter(0)):
            num_items = cache.info.count_items("image", [task.chunk])
            buffers = [BatchBuffer(writer, names, num_items) for writer, names in task.missing.items()]
            loaded = []
            for row, (_, item) in enumerate(group):
                if item.failure is None:
                    for buffer, inputs in zip(buffers, item.inputs, strict=True):
                        buffer.add(row, inputs)
                loaded.append(LoadedItem(hash=item.hash, failure=item.failure))  # without the inputs
                progress.advance(1)
            commit(task, buffers, loaded)


def _encode_text_chunks(
    cache: Cache,
    _: Source,
    tasks: Iterable[ChunkTask],
    executor: Executor,
    commit: _CommitFunction,
    progress: Progress,
) -> None:
    """Encode chunks of texts, each distinct text once per chunk and the longest first, so that batches are padded less.

    Memory: the token ids of two chunks, and the outputs of two chunks.
    """

    def load(task: ChunkTask) -> tuple[ChunkTask, list[LoadedItem]]:
        return task, _load_texts(cache.items("text", chunk=task.chunk), list(task.missing))

    with closing(_prefetch_map(executor, load, tasks, window=2)) as stream:
        for task, loaded in stream:
            buffers = [BatchBuffer(writer, names, len(loaded)) for writer, names in task.missing.items()]
            for number, buffer in enumerate(buffers):
                add_distinct(buffer, loaded, number)
            progress.advance(len(loaded))
            commit(task, buffers, loaded)


@dataclass(frozen=True, kw_only=True)
class LoadedItem:
    """One item as one array per feature writer, or the reason why it failed; `hash` is None if it was not read."""

    hash: bytes | None
    failure: str | None = None
    inputs: Sequence[Array] = ()


def load_items(
    source: Source, table: pa.Table, writers: Sequence[FeatureWriter], executor: Executor
) -> list[LoadedItem]:
    """Load rows of an item table, all of the writers' modality, for every writer; images on several threads."""
    if "text" in table.column_names:
        return _load_texts(table, writers)
    return list(executor.map(lambda item: _load_image(source, item, writers), _image_items(table)))


def _image_items(table: pa.Table) -> list[ImageItem]:
    return [ImageItem(**row) for row in table.drop_columns("sample").to_pylist()]


def _load_image(source: Source, item: ImageItem, writers: Sequence[FeatureWriter]) -> LoadedItem:
    """Read and decode one image, and prepare it for every writer."""
    content_hash = None
    try:
        data = source.read(item)
        content_hash = hash_item(data)
        writers[0].gate.wait()
        image = decode_image(data)
    except ItemError as error:
        return LoadedItem(hash=content_hash, failure=str(error))
    return LoadedItem(hash=content_hash, inputs=[writer.prepare([image])[0] for writer in writers])


def _load_texts(table: pa.Table, writers: Sequence[FeatureWriter]) -> list[LoadedItem]:
    """Tokenize texts for every writer; equal texts share their inputs."""
    texts = table["text"].to_pylist()
    distinct = [text for text in dict.fromkeys(texts) if text.strip()]
    prepared = [writer.prepare(distinct) for writer in writers]
    inputs = {text: list(arrays) for text, *arrays in zip(distinct, *prepared, strict=True)}
    return [
        LoadedItem(
            hash=hash_item(text.encode()),
            failure=None if text in inputs else "empty caption",
            inputs=inputs.get(text, ()),
        )
        for text in texts
    ]


def _prefetch_map(
    executor: Executor, function: Callable[[T], R], items: Iterable[T], *, window: int
) -> Generator[R, None, None]:
    """Yield results in order, with up to `window` calls running or waiting to be consumed."""
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(executor.submit(function, item))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


class BatchBuffer:
    """Buffer that collects prepared items into batches, runs the encoder on them and keeps the outputs of some rows.

    While the encoder runs one batch, the next one is filled.
    """

    def __init__(self, writer: FeatureWriter, features: Sequence[str], num_rows: int) -> None:
        self.writer = writer
        self.features: Mapping[str, list[Array | None]] = {name: [None] * num_rows for name in features}
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
                items[row] = self.writer.cast(name, item)


def add_loaded(buffer: BatchBuffer, items: Iterable[tuple[int, LoadedItem]], number: int) -> None:
    """Encode the loaded items of some rows; `number` is the writer's position in their inputs."""
    for row, item in items:
        if item.failure is None:
            buffer.add(row, item.inputs[number])
    buffer.flush()


def add_distinct(buffer: BatchBuffer, loaded: Sequence[LoadedItem], number: int) -> None:
    """Encode loaded items, each distinct item once and the longest first."""
    first_row: dict[bytes | None, int] = {}
    for row, item in enumerate(loaded):
        if item.failure is None:
            first_row.setdefault(item.hash, row)
    rows = sorted(first_row.values(), key=lambda row: (-len(loaded[row].inputs[number]), row))
    add_loaded(buffer, ((row, loaded[row]) for row in rows), number)
    for row, item in enumerate(loaded):
        if item.failure is None:
            buffer.copy(first_row[item.hash], row)


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
    hashes = [item.hash for item in loaded]
    failures = [item.failure for item in loaded]
    for buffer in buffers:
        buffer.flush()
        reasons = dict.fromkeys(buffer.features, failures)
        commit_chunk(buffer.writer.group, task.chunk, buffer.features, hashes, reasons)
        buffer.writer.mark_complete(task.chunk)
    task.release()
