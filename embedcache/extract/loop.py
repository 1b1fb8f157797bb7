"""The extraction loop: chunk by chunk, items are loaded ahead on threads while the encoders run, then committed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import TypeAlias

from embedcache.extract.batches import (
    BatchBuffer,
    LoadedItem,
    add_distinct,
    check_length,
    load_file,
    load_texts,
    not_encoded,
)
from embedcache.extract.feature_writer import ChunkTask
from embedcache.modalities import MODALITIES, Modality, noun
from embedcache.processes import prefetch_map
from embedcache.progress import Progress
from embedcache.sources.base import FileItem, Source
from embedcache.store.cache import Cache
from embedcache.store.commits import PENDING, REMOVED
from embedcache.store.tables import to_file_item
from embedcache.store.writer import commit_chunk

_CommitFunction: TypeAlias = "Callable[[ChunkTask, Sequence[BatchBuffer], Sequence[LoadedItem]], None]"


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
    with ThreadPoolExecutor(threads) as executor, _commit_thread() as commit:
        if MODALITIES[modality].kind == "texts":
            _encode_text_chunks(cache, tasks, executor, commit, progress)
        else:
            _encode_file_chunks(cache, source, MODALITIES[modality], tasks, executor, commit, progress)


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
            return task, not_encoded(len(task.missing), item, hash=None)
        loaded = load_file(source, item, decode, list(task.missing))
        check_length(item, loaded, modality.name)
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
        progress.note(f"{num_blank:,} {noun(modality.name)} have a single color; they are encoded like all others")


def _list_items(cache: Cache, modality: str, tasks: Iterable[ChunkTask]) -> Iterator[tuple[ChunkTask, FileItem | str]]:
    """Iterate over the items of chunks in row order: the location of each, or the reason why it is not encoded."""
    removed = set(cache.removed.tolist())
    for task in tasks:
        for number, row in enumerate(cache.items(modality, chunk=task.chunk).to_pylist()):
            if number < task.num_stored:
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
        loaded = load_texts(table, list(task.missing))
        for row, sample in enumerate(table["sample"].to_pylist() if removed else ()):
            if sample in removed:
                loaded[row] = not_encoded(len(task.missing), REMOVED, hash=loaded[row].hash)
        return task, loaded

    with closing(prefetch_map(executor, load, tasks, window=2)) as stream:
        for task, loaded in stream:
            buffers = [BatchBuffer(writer, names, len(loaded)) for writer, names in task.missing.items()]
            for number, buffer in enumerate(buffers):
                add_distinct(buffer, loaded, number)
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
    hashes = [item.hash for item in loaded]
    for number, buffer in enumerate(buffers):
        buffer.flush()
        failures = [item.failures[number] for item in loaded]
        reasons = dict.fromkeys(buffer.features, failures)
        commit_chunk(buffer.writer.group, task.chunk, buffer.features, hashes, reasons)
        buffer.writer.mark_complete(task.chunk)
    task.release()
