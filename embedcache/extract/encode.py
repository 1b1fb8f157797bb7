"""Encoders as a producer: items are loaded ahead on threads while the encoders run.

A loaded item is the input of each encoder, or the reason why it failed; inputs are encoded in batches, which are filled
while the batch before is encoded.
"""

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import groupby
from math import log2
from operator import itemgetter
from threading import Lock
from typing import Any

import pyarrow as pa

from embedcache.arrays import Array
from embedcache.encoders.base import Encoder, EncoderSettings, Modality, background_of
from embedcache.encoders.open import EncoderSpec, auto_precision, open_encoder, recorded_settings
from embedcache.encoders.views import View, open_view, reopen_view
from embedcache.errors import FingerprintError, ItemError, SettingError, SourceError, first_few
from embedcache.extract.settings import ExtractJob, ExtractSettings
from embedcache.modalities import MODALITIES, FileItem, Source, encoder_option
from embedcache.processes import AUTO, num_cores, prefetch_map
from embedcache.progress import NullProgress, Progress
from embedcache.registry import names_from, trust_files, unknown_name
from embedcache.settings import format_bytes, replace_fields
from embedcache.sources.open import open_below, reopen_source
from embedcache.store.cache import Cache
from embedcache.store.commits import PENDING, REMOVED, Commit, hash_item
from embedcache.store.feature import EncoderGroup, Feature, create_group, find_group
from embedcache.store.layout import Axis
from embedcache.store.producer import ChunkTask, ComputedChunk, Output, Target, Verb
from embedcache.store.tables import to_file_item
from embedcache.store.writer import ChunkFeatures, cast_item

_MAX_CHUNK_BYTES = 2**30
"""Outputs of one chunk that are kept in memory; those of two chunks are, while one is committed."""

_FEW_CORES = 4
"""With more cores a model leaves some of them idle, and decoding uses those."""

_DERIVED_FEATURES = (
    "a model may also offer grid:K, K × K averages of its patches, kmeans:K, averages of K clusters of them, "
    "and layerN.NAME, computed from the state after block N"
)


def open_encoders(job: ExtractJob, device: str) -> "list[Encoders]":
    """Open the encoders of a job on a device, and create their folders: one producer per modality.

    Raises:
        SourceError: the source lacks a modality.
        UnknownNameError: an encoder, feature or view is unknown.
        FingerprintError: the cache holds features of another encoder of that name.
    """
    cache = Cache(job.cache)
    settings = job.settings
    source = job.opened
    if source is None and any(MODALITIES[modality].kind == "files" for modality in job.encoders):
        with trust_files():  # the process that made the job has opened this source
            source = open_below(job.source, job.places)

    # Checked before any encoder is opened, as opening may download weights.
    for modality in job.encoders:
        _check_has_items(cache, modality)

    opened: dict[Modality, list[tuple[EncoderSpec, Encoder]]] = {}
    for modality, texts in job.encoders.items():
        opened[modality] = []
        for spec in map(EncoderSpec.parse, texts):
            encoder_settings = _encoder_settings(cache, settings, modality, spec, device)
            opened[modality].append((spec, open_encoder(spec, modality=modality, settings=encoder_settings)))

    known = {name for encoders in opened.values() for _, encoder in encoders for name in encoder.features}
    for name in settings.features:
        if name not in known:
            raise unknown_name("feature", name, known, hint=_DERIVED_FEATURES)

    views = [open_view(name) for name in settings.views]
    gate = open_gate(device, settings.num_threads)
    producers = []

    for modality, encoders in opened.items():
        folders = []

        for spec, encoder in encoders:
            executor = ThreadPoolExecutor(1, thread_name_prefix=spec.folder)
            for view in [None, *(view for view in views if view.modality == modality)]:
                target = _create_target(cache, spec, encoder, view, settings)
                folders.append(FolderEncoder(encoder=encoder, target=target, view=view, executor=executor, gate=gate))

        producers.append(
            Encoders(
                cache=cache,
                modality=modality,
                source=source if MODALITIES[modality].kind == "files" else None,
                folders=folders,
                threads=settings.num_threads,
            )
        )
    return producers


def _check_has_items(cache: Cache, modality: Modality) -> None:
    if not cache.info.num_items.get(modality):
        names = cache.columns[1:]
        columns = f"; columns without a role are {first_few(names, 10)}" if names else ""
        raise SourceError(f"{cache.path} has no {modality} items; omit {encoder_option(modality)}{columns}")


def _encoder_settings(
    cache: Cache, job_settings: ExtractSettings, modality: Modality, spec: EncoderSpec, device: str
) -> EncoderSettings:
    """Return how an encoder runs: what is `auto` is as recorded with its features, or else as the job says."""
    settings = replace_fields(job_settings.encoder, device=device, features=job_settings.features)
    stored = find_group(cache.path, modality, spec.folder, cache.info)

    if stored is None:
        recorded = {"backend": AUTO, "device": device, "precision": auto_precision(spec, device)}
    else:
        recorded = recorded_settings(stored.fingerprint, device)

    if settings.backend == AUTO:
        settings = replace_fields(settings, backend=recorded["backend"], device=recorded["device"])
    return replace_fields(settings, precision=recorded["precision"]) if settings.precision == AUTO else settings


def _create_target(
    cache: Cache, spec: EncoderSpec, encoder: Encoder, view: View | None, settings: ExtractSettings
) -> Target:
    """Create an encoder's folder in a cache, or open it; a folder of another encoder raises a `FingerprintError`.

    Its features are the requested ones that the encoder has, or else its first feature, or those it names as defaults.
    """
    group = create_group(
        cache.path,
        encoder.modality,
        spec.folder + ("" if view is None else view.suffix),
        cache.info,
        spec=spec.absolute.text,
        fingerprint=view_fingerprint(encoder, view),
        view="" if view is None else view.location,
    )
    names = [name for name in dict.fromkeys(settings.features) if name in encoder.features]
    outputs = {}

    for name in names or getattr(encoder, "defaults", None) or [next(iter(encoder.features))]:
        dtype: str = getattr(encoder, "dtypes", {}).get(name, settings.dtype)
        axis: Axis | None = getattr(encoder, "axes", {}).get(name)
        if axis is not None and view is not None:  # a crop or a flip: the grid no longer covers the stored box
            axis = replace_fields(axis, box=None)

        outputs[name] = Output(encoder.features[name], dtype, axis)

    return Target(group=group, outputs=outputs)


def reopen_encoders(
    cache: Cache,
    group: EncoderGroup,
    features: Sequence[str],
    *,
    device: str,
    allows_changes: bool = False,
) -> "Encoders":
    """Open the encoder and the view of an existing folder, with the precision and backend recorded there."""
    is_text = MODALITIES[group.modality].kind == "texts"
    source = None if is_text else reopen_source(cache.info.source, cache.info.index_digest)
    fingerprint: Mapping[str, Any] = group.fingerprint
    settings = EncoderSettings(**recorded_settings(fingerprint, device), features=tuple(features))

    with names_from(group.path):
        encoder = open_encoder(group.spec, modality=MODALITIES[group.modality].name, settings=settings)
    view = reopen_view(fingerprint["view"], group.view) if "view" in fingerprint else None

    target = Target(group=group, outputs={name: Output.of(Feature(group, name)) for name in features})
    folder = FolderEncoder(
        encoder=encoder, target=target, view=view, executor=ThreadPoolExecutor(1), gate=nullcontext()
    )
    return Encoders(
        cache=cache,
        modality=group.modality,
        source=source,
        folders=[folder],
        threads=num_cores(),
        allows_changes=allows_changes,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class FolderEncoder:
    """An open encoder, or one view of it, and the folder that it fills.

    Args:
        view: alters items before they are encoded; None encodes them unchanged.
        executor: the one thread on which the encoder runs, shared by its views.
        gate: held while the encoder runs; decoding waits for it. See `open_gate`.
    """

    encoder: Encoder
    target: Target
    view: View | None
    executor: Executor
    gate: AbstractContextManager[Any]

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.target.group.name

    @cached_property
    def background(self) -> str:
        """Color onto which transparent images are composited before they are encoded."""
        return background_of(self.encoder.fingerprint.preprocessing)

    def encode(self, batch: Sequence[Array], features: Sequence[str]) -> dict[str, list[Array]]:
        """Run the encoder on prepared items."""
        with self.gate:
            return self.encoder.encode(batch, features)

    def cast(self, feature: str, item: Array) -> Array:
        """Check the encoder's output for one item and convert it to the dtype on disk."""
        dtype = self.target.outputs[feature].dtype
        return cast_item(item, self.encoder.features[feature], dtype, f"{self.name}/{feature}")

    def prepare(self, items: Sequence[Any]) -> list[Array]:
        """Convert raw items, or their view, to model inputs."""
        return self.encoder.prepare([item if self.view is None else self.view.apply(item) for item in items])


def open_gate(device: str, num_threads: int) -> AbstractContextManager[Any]:
    """Return a lock if decoding has to wait while a model runs, because both would need all cores; else no lock.

    On 2 cores, an EfficientNet and decoding at the same time took 6% longer than in sequence: they evict each other's
    data from the CPU caches. Reading files never waits.
    """
    import torch  # takes seconds, and has been imported where an encoder is open

    uses_all_cores = torch.get_num_threads() >= min(num_cores(), num_threads)
    return Lock() if device == "cpu" and num_cores() <= _FEW_CORES and uses_all_cores else nullcontext()


def view_fingerprint(encoder: Encoder, view: View | None) -> Mapping[str, Any]:
    """Return everything that decides an encoder's output for a view."""
    fingerprint = encoder.fingerprint.to_json()
    return fingerprint if view is None else {**fingerprint, "view": dict(view.fingerprint)}


@dataclass(frozen=True, kw_only=True)
class _Item:
    """One item as one array per encoder.

    Args:
        hash: hash of its content; None if it was not read.
        failures: for each encoder why it failed, or None.
        inputs: for each encoder the model's input; None for a failed item.
    """

    hash: bytes | None
    failures: Sequence[str | None]
    inputs: list[Array | None] = field(default_factory=list)


class BatchBuffer:
    """Buffer that collects prepared items into batches, runs the encoder on them and keeps the outputs of some rows.

    While the encoder runs one batch, the next one is filled.
    """

    def __init__(self, encoder: FolderEncoder, features: Sequence[str], num_rows: int) -> None:
        self.encoder = encoder
        self.features: Mapping[str, list[Array | None]] = {name: [None] * num_rows for name in features}
        self._num_rows = num_rows
        self._num_encoded = 0
        self._num_bytes = 0
        self._rows: list[int] = []
        self._batch: list[Array] = []
        self._running: tuple[list[int], Future[dict[str, list[Array]]]] | None = None

    def add(self, row: int, inputs: Array) -> None:
        """Add one item; a full batch starts once the encoder has finished the one before."""
        self._rows.append(row)
        self._batch.append(inputs)
        if len(self._batch) == self.encoder.encoder.batch_size:
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
        rows = self._rows
        batch = self._batch
        self._rows = []
        self._batch = []
        started = self.encoder.executor.submit(self.encoder.encode, batch, list(self.features))
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
                stored = self.encoder.cast(name, item)
                items[row] = stored
                self._num_bytes += stored.nbytes

        self._num_encoded += len(rows)
        self._check_memory()

    def _check_memory(self) -> None:
        """Check that the outputs of the whole chunk fit in memory, as far as the batches up to now tell."""
        group = self.encoder.target.group
        is_text = MODALITIES[group.modality].kind == "texts"  # the longest come first: no estimate
        num_items = self._num_encoded if is_text else self._num_rows
        item_bytes = self._num_bytes / self._num_encoded
        if num_items * item_bytes <= _MAX_CHUNK_BYTES or group.has_commits:
            return

        chunk_size = 2 ** int(log2(max(_MAX_CHUNK_BYTES / item_bytes, 1)))
        size = min(chunk_size, self._num_rows)
        got = f"{self._num_rows:,} items of {format_bytes(round(item_bytes))} of {group.name}"
        step = f"extract into a new folder with --chunk-size {size}"
        raise SettingError(f"chunk_size: expected at most {format_bytes(_MAX_CHUNK_BYTES)}, got {got}; {step}")


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The open encoders of one modality of a cache, and their views: a producer that reads each item once for all.

    Args:
        source: source of items in files; None for texts, which are in the tables of the cache.
        folders: the encoders.
        threads: number of threads that read and decode items.
        allows_changes: whether a file may have another length than when it was indexed.
    """

    cache: Cache
    modality: str
    source: Source | None
    folders: Sequence[FolderEncoder]
    threads: int
    allows_changes: bool = False
    verb: Verb = "encoded"

    @property
    def targets(self) -> Sequence[Target]:
        """The folders that the encoders fill."""
        return [folder.target for folder in self.folders]

    def retries(self, _: Commit) -> bool:
        """Return False: failed items are tried again on request only."""
        return False

    def compute(self, tasks: Iterable[ChunkTask], progress: Progress) -> Generator[ComputedChunk, None, None]:
        """Encode chunks; tasks are requested ahead.

        Memory: the outputs of two chunks, and inputs: the modality's `num_ahead` items, or the token ids of two chunks.
        """
        with ThreadPoolExecutor(self.threads) as executor:
            if MODALITIES[self.modality].kind == "texts":
                yield from self._encode_texts(tasks, executor, progress)
            else:
                yield from self._encode_files(tasks, executor, progress)

    def encode_rows(self, chunk: int, rows: Collection[int]) -> Mapping[str, ChunkFeatures]:
        """Encode some rows of a chunk, counted from its start, for all folders and features; nothing is committed."""
        missing = {folder.name: list(folder.target.outputs) for folder in self.folders}
        task = ChunkTask(chunk=chunk, missing=missing, commits={}, failed=rows)
        (computed,) = self.compute([task], NullProgress())
        return computed.finish()

    def _encode_files(
        self, tasks: Iterable[ChunkTask], executor: Executor, progress: Progress
    ) -> Generator[ComputedChunk, None, None]:
        """Encode chunks of items in files, each item read and decoded once for all encoders, in row order."""
        modality = MODALITIES[self.modality]
        decode = modality.load_decoder()

        def load(task_item: tuple[ChunkTask, FileItem | str]) -> tuple[ChunkTask, _Item]:
            task, item = task_item
            if isinstance(item, str):
                return task, _not_encoded(len(task.missing), item, hash=None)
            return task, self._load_file(item, decode, self._folders_of(task))

        with closing(prefetch_map(executor, load, self._list_files(tasks), window=modality.num_ahead)) as stream:
            for task, group in groupby(stream, key=itemgetter(0)):
                buffers = self._open_buffers(task)
                loaded = []

                for row, (_, item) in enumerate(group):
                    for buffer, inputs in zip(buffers, item.inputs, strict=True):
                        if inputs is not None:
                            buffer.add(row, inputs)
                    loaded.append(replace(item, inputs=[]))
                    item.inputs.clear()  # the last item stays referenced while the chunk is committed
                    progress.advance(1)

                yield ComputedChunk(task, partial(_finish, buffers, loaded))

    def _list_files(self, tasks: Iterable[ChunkTask]) -> Iterator[tuple[ChunkTask, FileItem | str]]:
        """Iterate over the items of chunks in row order: where each is, or the reason why it is not encoded."""
        removed = set(self.cache.removed.tolist())
        for task in tasks:
            tried = self._tried_rows(task)
            for number, row in enumerate(self.cache.items(self.modality, chunk=task.chunk).to_pylist()):
                if number not in tried:
                    yield task, PENDING  # not tried: what is stored stays
                elif row["sample"] in removed:
                    yield task, REMOVED
                else:
                    yield task, to_file_item(row)

    def _encode_texts(
        self, tasks: Iterable[ChunkTask], executor: Executor, progress: Progress
    ) -> Generator[ComputedChunk, None, None]:
        """Encode chunks of texts, each distinct text once per chunk and the longest first: batches are padded less."""
        removed = set(self.cache.removed.tolist())

        def load(task: ChunkTask) -> tuple[ChunkTask, list[_Item]]:
            table = self.cache.items(self.modality, chunk=task.chunk)
            loaded = _load_texts(table, self._folders_of(task))
            tried = self._tried_rows(task)
            for row, sample in enumerate(table["sample"].to_pylist()):
                if row not in tried:
                    loaded[row] = _not_encoded(len(task.missing), PENDING, hash=loaded[row].hash)
                elif sample in removed:
                    loaded[row] = _not_encoded(len(task.missing), REMOVED, hash=loaded[row].hash)
            return task, loaded

        with closing(prefetch_map(executor, load, tasks, window=2)) as stream:
            for task, loaded in stream:
                buffers = self._open_buffers(task)
                for number, buffer in enumerate(buffers):
                    _add_distinct(buffer, loaded, number)
                progress.advance(len(loaded))
                yield ComputedChunk(task, partial(_finish, buffers, loaded))

    def _folders_of(self, task: ChunkTask) -> list[FolderEncoder]:
        return [folder for folder in self.folders if folder.name in task.missing]

    def _open_buffers(self, task: ChunkTask) -> list[BatchBuffer]:
        num_rows = self._num_rows(task)
        return [BatchBuffer(folder, task.missing[folder.name], num_rows) for folder in self._folders_of(task)]

    def _num_rows(self, task: ChunkTask) -> int:
        return self.cache.info.count_items(self.modality, [task.chunk])

    def _tried_rows(self, task: ChunkTask) -> Collection[int]:
        """Return the rows of a chunk to encode: those of a retry, or all that are not stored.

        A chunk that is not full when it is committed gets more rows with samples that are appended; see
        `embedcache.store.commits`.
        """
        if task.failed is not None:
            return task.failed
        num_stored = []
        for folder in self._folders_of(task):
            commit = task.commits[folder.name]
            for name in task.missing[folder.name]:
                if commit is None or name not in commit.features or not folder.target.group.has_files(commit, name):
                    num_stored.append(0)
                else:
                    num_stored.append(commit.count_tried(name))
        return range(min(num_stored), self._num_rows(task))

    def _load_file(self, item: FileItem, decode: Callable[..., Any], folders: Sequence[FolderEncoder]) -> _Item:
        """Read and decode one item, and prepare it for every encoder; an image once per background color.

        What raises an `ItemError` is returned as an item with a reason.
        """
        assert self.source is not None
        content_hash = None
        interval = (item.start_s, item.stop_s)
        try:
            data = self.source.read(item)
            self._check_length(item, len(data))
            content_hash = hash_item(data, interval=interval)
            with folders[0].gate:
                pass
            colors = [folder.background for folder in folders]
            raws = {color: _decode(decode, data, interval, color) for color in dict.fromkeys(colors)}
            del data  # an hour of sound is 115 MB
        except ItemError as error:
            return _not_encoded(len(folders), str(error), hash=content_hash)

        inputs: list[Array | None] = []
        failures: list[str | None] = []
        for folder, color in zip(folders, colors, strict=True):
            try:
                inputs.append(folder.prepare([raws[color]])[0])
                failures.append(None)
            except ItemError as error:
                inputs.append(None)
                failures.append(str(error))
        return _Item(hash=content_hash, failures=failures, inputs=inputs)

    def _check_length(self, item: FileItem, num_bytes: int) -> None:
        """Check that a file is as long as when it was indexed, or raise a `FingerprintError` that names it."""
        if item.length and num_bytes != item.length and not self.allows_changes:
            expected = f"{self.modality} {item.path}: expected {item.length:,} bytes, as when the source was indexed"
            step = "put the old file back; if all encoders had failed on it, give its source with --retry-failed"
            raise FingerprintError(f"{expected}, got {num_bytes:,}; {step}")


def _finish(buffers: Sequence[BatchBuffer], loaded: Sequence[_Item]) -> dict[str, ChunkFeatures]:
    """Encode what is left in the buffers, and return the features of their chunk by folder."""
    finished = {}
    for number, buffer in enumerate(buffers):
        buffer.flush()
        failures = [item.failures[number] for item in loaded]
        hashes = [item.hash for item in loaded]
        finished[buffer.encoder.name] = ChunkFeatures(buffer.features, hashes, dict.fromkeys(buffer.features, failures))
    return finished


def _decode(decode: Callable[..., Any], data: bytes, interval: tuple[float | None, float | None], color: str) -> Any:
    """Decode an item; an image onto a color."""
    if color != "white":
        return decode(data, background=color)
    return decode(data) if interval == (None, None) else decode(data, *interval)


def _load_texts(table: pa.Table, folders: Sequence[FolderEncoder]) -> list[_Item]:
    """Tokenize texts for every encoder; equal texts share their inputs."""
    texts = table["text"].to_pylist()
    distinct = [text for text in dict.fromkeys(texts) if text.strip()]
    prepared = [folder.prepare(distinct) for folder in folders]
    inputs: dict[str, list[Array | None]] = {
        text: list(arrays) for text, *arrays in zip(distinct, *prepared, strict=True)
    }
    return [
        _Item(
            hash=hash_item(text.encode()),
            failures=[None if text in inputs else "empty caption"] * len(folders),
            inputs=inputs.get(text, [None] * len(folders)),
        )
        for text in texts
    ]


def _not_encoded(num_folders: int, reason: str, *, hash: bytes | None) -> _Item:
    """Return an item without inputs and with one reason for all encoders: it failed, was removed, or is stored."""
    return _Item(hash=hash, failures=[reason] * num_folders, inputs=[None] * num_folders)


def _add_distinct(buffer: BatchBuffer, loaded: Sequence[_Item], number: int) -> None:
    """Encode loaded items, each distinct item once and the longest first."""
    first_row: dict[bytes | None, int] = {}
    lengths: dict[int, int] = {}
    for row, item in enumerate(loaded):
        inputs = item.inputs[number]
        if inputs is not None and item.hash not in first_row:
            first_row[item.hash] = row
            lengths[row] = len(inputs)
    for row in sorted(lengths, key=lambda row: (-lengths[row], row)):
        inputs = loaded[row].inputs[number]
        assert inputs is not None
        buffer.add(row, inputs)
    buffer.flush()
    for row, item in enumerate(loaded):
        if item.inputs[number] is not None:
            buffer.copy(first_row[item.hash], row)
