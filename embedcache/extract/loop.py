"""The loop: chunk by chunk, loading ahead on threads while the encoders run."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from itertools import islice

from embedcache.arrays import Array
from embedcache.cache.cache import Cache
from embedcache.cache.group import commit_chunk
from embedcache.encoders.contract import Encoder
from embedcache.extract.load import Loaded, ahead, load_image, load_texts
from embedcache.extract.target import Target
from embedcache.progress import Progress
from embedcache.sources.contract import ImageItem, Source

_BATCHES_AHEAD = 2


def encode_images(
    cache: Cache,
    source: Source,
    targets: Sequence[Target],
    chunks: Sequence[int],
    executor: Executor,
    progress: Progress,
) -> None:
    """Encode chunks of images: each image is read and decoded once for all encoders that miss it, in row order.

    Memory: `_BATCHES_AHEAD` batches of inputs an encoder, and one chunk of outputs.
    """
    window = _BATCHES_AHEAD * max(target.encoder.batch_size for target in targets)
    stream = ahead(
        executor,
        lambda job: load_image(source, *job),
        ((item, _encoders(targets, chunk)) for chunk in chunks for item in _image_items(cache, chunk)),
        window=window,
    )
    for chunk in chunks:
        rows = cache.info.chunk_rows("image", chunk)
        outputs = _open_outputs(targets, chunk, rows.stop - rows.start)
        loaded = []
        for row, item in enumerate(islice(stream, rows.stop - rows.start)):
            if item.failure is None:
                for output, array in zip(outputs, item.inputs, strict=True):
                    output.add(row, array)
            loaded.append(Loaded(hash=item.hash, failure=item.failure))
            progress.advance(1)
        _commit(outputs, chunk, loaded)


def encode_texts(
    cache: Cache,
    targets: Sequence[Target],
    chunks: Sequence[int],
    executor: Executor,
    progress: Progress,
) -> None:
    """Encode chunks of texts: in each chunk equal texts once, and longest first, so that batches hold little padding.

    Memory: two chunks of token ids, and one chunk of outputs.
    """

    def load(chunk: int) -> list[Loaded]:
        return load_texts(cache.items("text", chunk=chunk)["text"].to_pylist(), _encoders(targets, chunk))

    for chunk, loaded in zip(chunks, ahead(executor, load, chunks, window=2), strict=True):
        outputs = _open_outputs(targets, chunk, len(loaded))
        for number, output in enumerate(outputs):
            _add_texts(output, loaded, number)
        progress.advance(len(loaded))
        _commit(outputs, chunk, loaded)


def _encoders(targets: Sequence[Target], chunk: int) -> list[Encoder]:
    return [target.encoder for target in targets if target.missing(chunk)]


def _open_outputs(targets: Sequence[Target], chunk: int, num_rows: int) -> list["_Outputs"]:
    return [_Outputs(target, chunk, num_rows) for target in targets if target.missing(chunk)]


def _image_items(cache: Cache, chunk: int) -> Iterator[ImageItem]:
    for row in cache.items("image", chunk=chunk).drop_columns("sample").to_pylist():
        yield ImageItem(**row)


def _add_texts(output: "_Outputs", loaded: Sequence[Loaded], number: int) -> None:
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


def _commit(outputs: Sequence["_Outputs"], chunk: int, loaded: Sequence[Loaded]) -> None:
    hashes = [item.hash for item in loaded]
    failures = [item.failure for item in loaded]
    for output in outputs:
        output.flush()
        commit_chunk(output.target.group, chunk, output.features, hashes, failures)


class _Outputs:
    """What one encoder gave for one chunk so far, and the batch that waits for it."""

    def __init__(self, target: Target, chunk: int, num_rows: int) -> None:
        self.target = target
        self.features: Mapping[str, list[Array | None]] = {name: [None] * num_rows for name in target.missing(chunk)}
        self._rows: list[int] = []
        self._batch: list[Array] = []

    def add(self, row: int, inputs: Array) -> None:
        self._rows.append(row)
        self._batch.append(inputs)
        if len(self._batch) == self.target.encoder.batch_size:
            self.flush()

    def flush(self) -> None:
        if not self._batch:
            return
        encoded = self.target.encoder.encode(self._batch, list(self.features))
        for name, items in self.features.items():
            for row, item in zip(self._rows, encoded[name], strict=True):
                items[row] = self.target.fit(name, item)
        self._rows, self._batch = [], []

    def copy(self, from_row: int, to_row: int) -> None:
        for items in self.features.values():
            items[to_row] = items[from_row]
