"""The loop: chunk by chunk, loading ahead on threads while the encoders run.

Raw items to model inputs, ahead of the encoder, on threads.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TypeVar

from embedcache.arrays import Array
from embedcache.errors import ItemError
from embedcache.extract.outputs import Target, Work
from embedcache.progress import Progress
from embedcache.sources.base import ImageItem, Source
from embedcache.sources.images import decode_image
from embedcache.store.cache import Cache
from embedcache.store.group import hash_item
from embedcache.store.writer import commit_chunk

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """One item, ready for every target, or the reason why it is not.

    Args:
        hash: BLAKE2b-128 of the raw bytes or text; None where they could not be read.
        failure: the reason; None where all is well.
        inputs: one array a target; empty after a failure.
    """

    hash: bytes | None
    failure: str | None = None
    inputs: Sequence[Array] = ()


def load_image(source: Source, item: ImageItem, targets: Sequence[Target]) -> Loaded:
    """Read, decode and prepare one image once for all targets."""
    content_hash = None
    try:
        data = source.read(item)
        content_hash = hash_item(data)
        targets[0].turns.wait()
        image = decode_image(data)
    except ItemError as error:
        return Loaded(hash=content_hash, failure=str(error))
    return Loaded(hash=content_hash, inputs=[target.encoder.prepare([target.look(image)])[0] for target in targets])


def load_texts(texts: Sequence[str], targets: Sequence[Target]) -> list[Loaded]:
    """Tokenize a chunk of texts for all targets; equal texts share their inputs."""
    distinct = [text for text in dict.fromkeys(texts) if text.strip()]
    prepared = [target.encoder.prepare([target.look(text) for text in distinct]) for target in targets]
    inputs = {text: list(arrays) for text, *arrays in zip(distinct, *prepared, strict=True)}
    return [
        Loaded(
            hash=hash_item(text.encode()),
            failure=None if text in inputs else "empty caption",
            inputs=inputs.get(text, ()),
        )
        for text in texts
    ]


def ahead(executor: Executor, call: Callable[[T], R], items: Iterable[T], *, window: int) -> Generator[R, None, None]:
    """Map in order with at most `window` calls under way or waiting to be taken."""
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(executor.submit(call, item))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


_IMAGES_AHEAD = 256


def encode_images(cache: Cache, source: Source, works: Iterable[Work], executor: Executor, progress: Progress) -> None:
    """Encode chunks of images: each image is read and decoded once for all encoders that miss it, in row order.

    Memory: `_IMAGES_AHEAD` images prepared for each encoder, and two chunks of outputs.
    """

    def load(job: tuple[Work, ImageItem]) -> tuple[Work, Loaded]:
        work, item = job
        return work, load_image(source, item, work.targets)

    jobs = ((work, item) for work in works for item in image_items(cache, work.chunk))
    with _Writer() as writer, closing(ahead(executor, load, jobs, window=_IMAGES_AHEAD)) as stream:
        for work, loaded in groupby(stream, key=itemgetter(0)):
            writer.write(work, *_encode_images(cache, work, (item for _, item in loaded), progress))


def encode_texts(cache: Cache, works: Iterable[Work], executor: Executor, progress: Progress) -> None:
    """Encode chunks of texts: in each chunk equal texts once, and longest first, so that batches hold little padding.

    Memory: two chunks of token ids, and two chunks of outputs.
    """

    def load(work: Work) -> tuple[Work, list[Loaded]]:
        return work, load_texts(cache.items("text", chunk=work.chunk)["text"].to_pylist(), work.targets)

    with _Writer() as writer, closing(ahead(executor, load, works, window=2)) as stream:
        for work, loaded in stream:
            outputs = [Outputs(target, target.missing(work.chunk), len(loaded)) for target in work.targets]
            for number, output in enumerate(outputs):
                add_distinct(output, loaded, number)
            progress.advance(len(loaded))
            writer.write(work, outputs, loaded)


def image_items(cache: Cache, chunk: int) -> Iterator[ImageItem]:
    """Go through the items of a chunk of images."""
    for row in cache.items("image", chunk=chunk).drop_columns("sample").to_pylist():
        yield ImageItem(**row)


def add_distinct(output: "Outputs", loaded: Sequence[Loaded], number: int) -> None:
    """Encode what was loaded: equal items once, and the longest first."""
    first_row: dict[bytes | None, int] = {}
    for row, item in enumerate(loaded):
        if item.failure is None:
            first_row.setdefault(item.hash, row)
    for row in sorted(first_row.values(), key=lambda row: (-len(loaded[row].inputs[number]), row)):
        output.add(row, loaded[row].inputs[number])
    output.flush()
    for row, item in enumerate(loaded):
        if item.failure is None:
            output.copy(first_row[item.hash], row)


def _encode_images(
    cache: Cache, work: Work, items: Iterable[Loaded], progress: Progress
) -> tuple[list["Outputs"], list[Loaded]]:
    """Give the images of a chunk to its encoders; give what will hold their outputs, and what was loaded."""
    rows = cache.info.chunk_rows("image", work.chunk)
    outputs = [Outputs(target, target.missing(work.chunk), rows.stop - rows.start) for target in work.targets]
    kept = []
    for row, item in enumerate(items):
        if item.failure is None:
            for output, array in zip(outputs, item.inputs, strict=True):
                output.add(row, array)
        kept.append(Loaded(hash=item.hash, failure=item.failure))
        progress.advance(1)
    return outputs, kept


class _Writer:
    """Commits chunks, one after the other, on a thread of its own, so that no encoder waits for a disk."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._running: Future[None] | None = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self._wait()

    def write(self, work: Work, outputs: Sequence["Outputs"], loaded: Sequence[Loaded]) -> None:
        """Commit a chunk once its outputs are there, and the chunk before is committed."""
        self._wait()
        self._running = self._thread.submit(_commit, work, outputs, loaded)

    def _wait(self) -> None:
        if self._running is not None:
            self._running.result()


def _commit(work: Work, outputs: Sequence["Outputs"], loaded: Sequence[Loaded]) -> None:
    hashes = [item.hash for item in loaded]
    failures = [item.failure for item in loaded]
    for output in outputs:
        output.flush()
        reasons = dict.fromkeys(output.features, failures)
        commit_chunk(output.target.group, work.chunk, output.features, hashes, reasons)
    work.give_back()


class Outputs:
    """What one encoder gave for some rows so far, the batch it is at, and the batch that waits for it.

    Args:
        target: the encoder.
        features: which of its features.
        num_rows: rows are numbered from 0 to this.
    """

    def __init__(self, target: Target, features: Sequence[str], num_rows: int) -> None:
        self.target = target
        self.features: Mapping[str, list[Array | None]] = {name: [None] * num_rows for name in features}
        self._rows: list[int] = []
        self._batch: list[Array] = []
        self._running: tuple[list[int], Future[dict[str, list[Array]]]] | None = None

    def add(self, row: int, inputs: Array) -> None:
        """Take one item; a full batch is given to the encoder, once it has done the one before."""
        self._rows.append(row)
        self._batch.append(inputs)
        if len(self._batch) == self.target.encoder.batch_size:
            self._start()

    def flush(self) -> None:
        """Wait until all items that were added are encoded."""
        if self._batch:
            self._start()
        self._collect()

    def _start(self) -> None:
        rows, batch = self._rows, self._batch
        self._rows, self._batch = [], []
        started = self.target.executor.submit(self.target.encode, batch, list(self.features))
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
                items[row] = self.target.fit(name, item)

    def copy(self, from_row: int, to_row: int) -> None:
        """Give one row what another has."""
        for items in self.features.values():
            items[to_row] = items[from_row]
