"""Producers of features, and `fill`, which computes the chunks that a cache lacks and reports on them."""

from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Protocol, TypeAlias

import pyarrow as pa

from embedcache.errors import summary
from embedcache.files import Leases
from embedcache.modalities import count_items, noun
from embedcache.progress import Progress
from embedcache.store.commits import PENDING, Commit, describe_failures, find_transactions, finish, has_failed
from embedcache.store.feature import EncoderGroup, Feature
from embedcache.store.layout import Axis
from embedcache.store.tables import to_array
from embedcache.store.writer import ChunkFeatures, add_feature, commit_chunk

Verb: TypeAlias = Literal["encoded", "derived", "imported", "copied"]
"""What a producer did with the items of a chunk."""

Rows: TypeAlias = Literal["missing", "failed"]
"""Rows that are computed: all rows of chunks that lack a feature, or also the failed rows of other chunks."""

_STEPS: Mapping[Verb, str] = {
    "encoded": "encoding",
    "derived": "deriving",
    "imported": "importing",
    "copied": "copying",
}


class Output(NamedTuple):
    """Shape of one item, (D,), (T, D) or (-1, D), dtype on disk, and axis of the tokens if they have one."""

    shape: tuple[int, ...]
    dtype: str
    axis: Axis | None = None

    @classmethod
    def of(cls, feature: Feature) -> "Output":
        """Return the shape, dtype and axis of a stored feature."""
        return cls(feature.item_shape, feature.dtype, feature.axis)


class ChunkProducer(Protocol):
    """Computes the features of one folder, a chunk at a time, as its spec and fingerprint describe them."""

    @property
    def verb(self) -> Verb:
        """Verb of the report."""

    @property
    def outputs(self) -> Mapping[str, Output]:
        """The features, at least one, by name."""

    def compute(self, rows: slice) -> ChunkFeatures:
        """Compute all outputs of the items of one chunk. Chunks come in ascending order, a few times at most."""

    def retries(self, commit: Commit) -> bool:
        """Return whether failed rows of a chunk would have a value now."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """A folder of a cache, and the features that are computed for it."""

    group: EncoderGroup
    outputs: Mapping[str, Output]

    @cached_property
    def leases(self) -> Leases:
        """The leases of the folder's chunks, on which processes work one at a time."""
        return Leases(self.group.path / "chunks")


@dataclass(frozen=True, kw_only=True, eq=False)
class ChunkTask:
    """A chunk that a producer computes. This process has its leases.

    Args:
        chunk: number of the chunk.
        missing: folder -> the features that its chunk lacks.
        commits: folder -> the commit of its chunk.
        failed: rows that are tried again, counted from the start of the chunk. If None, all rows without a value.
    """

    chunk: int
    missing: Mapping[str, Sequence[str]]
    commits: Mapping[str, Commit | None]
    failed: Collection[int] | None = None


class ComputedChunk(NamedTuple):
    """A chunk, and a function that returns its features by folder, called on the thread that commits them."""

    task: ChunkTask
    finish: Callable[[], Mapping[str, ChunkFeatures]]


class Producer(Protocol):
    """Computes the features of several folders of one modality in one pass over the items."""

    @property
    def verb(self) -> Verb:
        """Verb of the report."""

    @property
    def targets(self) -> Sequence[Target]:
        """The folders, at least one."""

    def compute(self, tasks: Iterable[ChunkTask], progress: Progress) -> Generator[ComputedChunk, None, None]:
        """Iterate over computed chunks, in the order of the tasks, and add their items to the progress.

        Tasks may be requested ahead.
        """

    def retries(self, commit: Commit) -> bool:
        """Return whether failed rows of a chunk would have a value now."""


@dataclass(frozen=True, kw_only=True)
class FillReport:
    """The work on the features of one folder of a cache.

    Args:
        verb: `encoded`, `derived`, `imported` or `copied`.
        modality: modality of the items.
        encoder: name of the folder: of an encoder, a view, a derivation or an import.
        features: names of the features.
        computed: number of items that were computed now, or failed.
        reused: number of items that were stored before.
        failures: kind of failure -> number of items, over the whole cache. The kind of removed items is `removed`.

    Example:
        >>> encoder = "embedcache.testing.examples:open_example"
        >>> (report,) = embedcache.extract_features("photos", "cache", image_encoder=encoder)
        >>> report.computed, report.reused, report.failures
        (0, 12, {})
    """

    verb: Verb
    modality: str
    encoder: str
    features: Sequence[str]
    computed: int
    reused: int
    failures: Mapping[str, int]

    __repr__ = summary

    def line(self) -> str:
        """Return a summary in one line."""
        return (
            f"{self.encoder} ({', '.join(self.features)}): {self.verb} {count_items(self.computed, self.modality)}, "
            f"reused {self.reused:,}, {describe_failures(self.failures)}"
        )


def fill(group: EncoderGroup, producer: ChunkProducer, *, progress: Progress) -> FillReport:
    """Compute and commit the chunks of one folder that lack an output of a producer, or that it retries.

    The rules and errors are those of `fill_all`.
    """
    (report,) = fill_all([OneByOne(group, producer)], progress=progress)
    return report


class OneByOne:
    """A producer of one folder that computes one chunk after the other."""

    def __init__(self, group: EncoderGroup, producer: ChunkProducer) -> None:
        self.verb = producer.verb
        self.targets = [Target(group=group, outputs=producer.outputs)]
        self.retries = producer.retries
        self._group = group
        self._producer = producer

    def compute(self, tasks: Iterable[ChunkTask], progress: Progress) -> Generator[ComputedChunk, None, None]:
        """Compute each chunk when it is requested."""
        for task in tasks:
            rows = self._group.info.chunk_rows(self._group.modality, task.chunk)
            features = {self._group.name: self._producer.compute(rows)}
            progress.advance(rows.stop - rows.start)
            yield ComputedChunk(task, features.copy)


def fill_all(
    producers: Sequence[Producer],
    *,
    rows: Rows = "missing",
    shard: tuple[int, int] = (0, 1),
    progress: Progress,
) -> list[FillReport]:
    """Compute and commit the chunks that lack an output of a producer, or that it retries.

    Committed chunks stay, so that the same call finishes the work of a killed one. Several processes share the chunks:
    each computes chunks on which no other process works, and takes over the chunks of a process that was killed. A
    chunk is committed on a thread while the next one is computed.

    Args:
        producers: producers for one cache.
        rows: with `failed`, also compute the failed rows of chunks that have all features.
        shard: `(i, n)`: only the chunks whose number modulo n is i.
        progress: shows the number of items.

    Returns:
        One report per folder.

    Raises:
        FingerprintError: a feature exists with another shape, dtype or axis, or items had other bytes.
    """
    # All folders are checked before the first chunk is computed.
    unfinished = []
    for producer in producers:
        for target in producer.targets:
            # A killed writer may have left complete files that are not in their places yet.
            for transaction in find_transactions(target.group.path):
                finish(target.group.path, transaction)
            add_features(target)
        unfinished.append(find_unfinished(producer, rows=rows, shard=shard))

    reports = []
    for producer, chunks in zip(producers, unfinished, strict=True):
        filling = _Filling(producer, rows, progress)
        if chunks:
            filling.run(chunks)

        for target in producer.targets:
            count = filling.num_computed[target.group.name]
            reports.append(count_filled(target.group, producer.verb, list(target.outputs), count))
    return reports


def add_features(target: Target) -> None:
    """Write the metadata of the features that a folder lacks. See `add_feature`."""
    for name, output in target.outputs.items():
        add_feature(target.group, name, output.shape, output.dtype, axis=output.axis)


def find_unfinished(
    producer: Producer, *, rows: Rows = "missing", shard: tuple[int, int] = (0, 1)
) -> dict[int, Mapping[str, Sequence[str]]]:
    """Return the chunks to compute: chunk -> folder -> features. See `fill_all`."""
    first_group = producer.targets[0].group
    num_chunks = first_group.info.num_chunks(first_group.modality)
    first_chunk, step = shard

    unfinished: dict[int, Mapping[str, Sequence[str]]] = {}
    for chunk in range(first_chunk, num_chunks, step):
        features = {}
        for target in producer.targets:
            state = _find_state(producer, target, chunk, rows)
            if state.missing:
                features[target.group.name] = state.missing
        if features:
            unfinished[chunk] = features
    return unfinished


class _State(NamedTuple):
    """The commit of a chunk of a folder, the features to compute, and the rows of a retry, or None for a first try."""

    commit: Commit | None
    missing: Sequence[str]
    failed: set[int] | None = None


def _find_state(producer: Producer, target: Target, chunk: int, rows: Rows) -> _State:
    names = list(target.outputs)
    commit = target.group.commit(chunk)
    missing_names = [name for name in names if not target.group.has(commit, name)]
    if commit is None or (missing_names if rows == "failed" else not producer.retries(commit)):
        return _State(commit, missing_names)

    failed = set()
    for name in names:
        for row, reason in enumerate(commit.failures.get(name, ())):
            if has_failed(reason):
                failed.add(row)
    return _State(commit, names if failed or rows == "missing" else [], failed)


class _Filling:
    """The chunks of one producer in this process: their leases, and how many items were computed.

    Attributes:
        num_computed: folder -> number of items.
    """

    def __init__(self, producer: Producer, rows: Rows, progress: Progress) -> None:
        self.num_computed = Counter[str]()
        self._producer = producer
        self._targets = {target.group.name: target for target in producer.targets}
        self._rows: Rows = rows
        self._progress = progress
        self._leased = set[tuple[str, int]]()

    def run(self, chunks: Mapping[int, Iterable[str]]) -> None:
        """Compute and commit chunks, each with the folders that lack it."""
        group = self._producer.targets[0].group
        items = noun(group.modality)
        verb = self._producer.verb
        step = f"{_STEPS[verb]} {items if verb == 'encoded' else group.name}"

        self._progress.start(step, group.info.count_items(group.modality, chunks), items)
        try:
            while chunks:
                busy: dict[int, list[str]] = {}
                self._run_free(self._lease_free(chunks, busy))

                # Wait only here, without any lease: two processes could wait for each other.
                for chunk, folders in list(busy.items())[:1]:
                    leases = self._targets[folders[0]].leases
                    leases.acquire(chunk, wait=True)
                    leases.release(chunk)
                chunks = busy
        finally:
            # After an error, other processes can work on the chunks.
            for folder, chunk in list(self._leased):
                self._release(folder, chunk)
        self._progress.finish()

    def _run_free(self, tasks: Iterable[ChunkTask]) -> None:
        """Compute chunks, and commit each on a thread while the next one is computed."""
        with (
            closing(self._producer.compute(tasks, self._progress)) as stream,
            ThreadPoolExecutor(1, thread_name_prefix="commit") as thread,
        ):
            commit: Future[None] | None = None
            for computed in stream:
                # At most one chunk waits, which bounds the memory.
                if commit is not None:
                    commit.result()
                commit = thread.submit(self._commit, computed)

            if commit is not None:
                commit.result()

    def _lease_free(self, chunks: Mapping[int, Iterable[str]], busy: dict[int, list[str]]) -> Iterator[ChunkTask]:
        """Iterate over the chunks that no other process computes, each leased when it is requested."""
        for chunk, folders in chunks.items():
            states: dict[str, _State] = {}
            for folder in folders:
                if not self._targets[folder].leases.acquire(chunk):
                    busy.setdefault(chunk, []).append(folder)
                    continue
                self._leased.add((folder, chunk))

                # Another process may have committed it just before.
                state = _find_state(self._producer, self._targets[folder], chunk, self._rows)
                if state.missing:
                    states[folder] = state
                else:
                    self._release(folder, chunk)

            if states:
                yield _make_task(chunk, states)

    def _commit(self, computed: ComputedChunk) -> None:
        task = computed.task
        is_retry = task.failed is not None
        for folder, features in computed.finish().items():
            if not is_retry or _has_news(task.commits[folder], features):
                commit_chunk(self._targets[folder].group, task.chunk, *features, overwrite_failed=is_retry)

            # All features of a folder have the same pending rows.
            reasons = list(next(iter(features.failures.values())))
            self.num_computed[folder] += len(reasons) - reasons.count(PENDING)
            self._release(folder, task.chunk)

    def _release(self, folder: str, chunk: int) -> None:
        self._targets[folder].leases.release(chunk)
        self._leased.discard((folder, chunk))


def _make_task(chunk: int, states: Mapping[str, _State]) -> ChunkTask:
    """Return the task of a chunk from its states in the folders that lack it."""
    missing = {}
    commits = {}
    failed: set[int] | None = None
    for folder, state in states.items():
        missing[folder] = state.missing
        commits[folder] = state.commit
        if state.failed is not None:
            failed = (failed or set()) | state.failed
    return ChunkTask(chunk=chunk, missing=missing, commits=commits, failed=failed)


def _has_news(commit: Commit | None, features: ChunkFeatures) -> bool:
    """Return whether a retry has a new value or a new reason of a failed item. If not, nothing is written."""
    if commit is None:
        return True

    name, reasons = next(iter(features.failures.items()))
    for new_reason, old_reason in zip(reasons, commit.failures[name], strict=True):
        if old_reason is not None and new_reason not in (PENDING, old_reason):
            return True
    return False


def count_filled(group: EncoderGroup, verb: Verb, features: Sequence[str], num_computed: int) -> FillReport:
    """Count the items of all chunks that have the first of some features. Memory: one commit."""
    num_items = 0
    failures: Counter[str] = Counter()

    # One commit at a time, because all commits of 20 million items do not fit in memory.
    for chunk in range(group.info.num_chunks(group.modality)):
        commit = group.commit(chunk)
        if commit is not None and group.has(commit, features[0]):
            num_items += len(commit.hashes)
            reasons = to_array(commit.failures[features[0]], pa.string()).drop_null().to_pylist()
            # The kind of a failure is before the colon.
            failures.update(reason.partition(":")[0] for reason in reasons)

    return FillReport(
        verb=verb,
        modality=group.modality,
        encoder=group.name,
        features=list(features),
        computed=num_computed,
        reused=num_items - num_computed,
        failures=dict(failures.most_common()),
    )
