"""Producers of features, and `fill`, which computes the chunks that a cache lacks of one and says what it did."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias

import pyarrow as pa

from embedcache.arrays import Array
from embedcache.axis import Axis
from embedcache.locks import Leases
from embedcache.modalities import count_items, noun
from embedcache.progress import Progress
from embedcache.store.columns import to_array
from embedcache.store.commits import PENDING, Commit, describe_failures
from embedcache.store.feature import Feature
from embedcache.store.group import EncoderGroup
from embedcache.store.transaction import find_transactions, finish
from embedcache.store.writer import add_feature, commit_chunk

Verb: TypeAlias = Literal["encoded", "derived", "imported", "copied"]
"""What a producer did with the items of a chunk."""

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
        """Return what describes a stored feature."""
        return cls(feature.item_shape, feature.dtype, feature.axis)


class ChunkFeatures(NamedTuple):
    """Features of the items of one chunk, in row order.

    Args:
        items: feature -> one array per item in the dtype on disk, None for a failed item.
        hashes: hash of each item's raw bytes or text; None if they could not be read.
        failures: feature -> why each failed item has no value, `PENDING` for one that was not tried, None for others.
    """

    items: Mapping[str, Sequence[Array | None]]
    hashes: Sequence[bytes | None]
    failures: Mapping[str, Sequence[str | None]]


class Producer(Protocol):
    """Computes the features of any chunk. The spec and the fingerprint are those of the folder that it fills."""

    @property
    def verb(self) -> Verb:
        """What the report says of the items."""
        ...

    @property
    def outputs(self) -> Mapping[str, Output]:
        """The features, at least one, by name."""
        ...

    def compute(self, rows: slice) -> ChunkFeatures:
        """Compute all outputs of the items of one chunk. Chunks come in ascending order, twice at most."""
        ...

    def retries(self, commit: Commit) -> bool:
        """Return whether failed rows of a chunk would have a value now."""
        ...


@dataclass(frozen=True, kw_only=True)
class FillReport:
    """What was computed of the features of one folder of a cache.

    Args:
        verb: what was done: `encoded`, `derived`, `imported` or `copied`.
        modality: modality of the items.
        encoder: name of the folder: of an encoder, a view, a derivation or an import.
        features: names of the features.
        computed: number of items that were computed now, or failed.
        reused: number of items that were stored before.
        failures: kind of failure -> number of items, over the whole cache; that of removed items is `removed`.
        note: what else the line says; empty if nothing.
    """

    verb: Verb
    modality: str
    encoder: str
    features: Sequence[str]
    computed: int
    reused: int
    failures: Mapping[str, int]
    note: str = ""

    def line(self) -> str:
        """Return a summary in one line."""
        return (
            f"{self.encoder} ({', '.join(self.features)}): {self.verb} {count_items(self.computed, self.modality)}, "
            f"reused {self.reused:,}, {describe_failures(self.failures)}{'; ' * bool(self.note)}{self.note}"
        )


def fill(
    group: EncoderGroup, producer: Producer, *, rows: Literal["missing", "failed"] = "missing", progress: Progress
) -> FillReport:
    """Compute and commit the chunks of a folder that lack an output of a producer, or that it retries.

    With `rows="failed"`, only those that it retries.

    Committed chunks stay, so that the same call finishes one that was killed. Several processes share the chunks: each
    first computes those that no other one works on, then waits for the others, whose process may have been killed.

    Raises:
        FingerprintError: a feature exists with another shape, dtype or axis, or the items were others.
    """
    for number in find_transactions(group.path):
        finish(group.path, number)
    for name, output in producer.outputs.items():
        add_feature(group, name, output.shape, output.dtype, axis=output.axis)
    chunks = range(group.info.num_chunks(group.modality))
    states = {"failed"} if rows == "failed" else {"failed", "missing"}
    unfinished = [chunk for chunk in chunks if _find_state(group, producer, chunk) in states]
    num_computed: dict[int, int] = {}  # chunk that was computed here -> number of items

    if unfinished:
        leases = Leases(group.path / "chunks")
        leases.take_part()  # from now on no other process deletes the folder
        num_items = group.info.count_items(group.modality, unfinished)
        progress.start(f"{_STEPS[producer.verb]} {group.name}", num_items, noun(group.modality))
        for is_last_pass in (False, True):
            for chunk in unfinished:
                if chunk in num_computed or not leases.acquire(chunk, wait=is_last_pass):
                    continue
                try:
                    state = _find_state(group, producer, chunk)  # another process may have computed it meanwhile
                    if state in states:
                        num_computed[chunk] = _fill_chunk(group, producer, chunk, is_retry=state == "failed")
                        progress.advance(group.info.count_items(group.modality, [chunk]))
                finally:
                    leases.release(chunk)
        progress.finish()

    return count_filled(group, producer.verb, list(producer.outputs), sum(num_computed.values()))


def _find_state(group: EncoderGroup, producer: Producer, chunk: int) -> Literal["missing", "failed", "complete"]:
    """Return whether a chunk lacks an output, has failed rows that the producer retries, or neither."""
    commit = group.commit(chunk)
    if commit is not None and producer.retries(commit):
        return "failed"
    return "complete" if all(group.has(commit, name) for name in producer.outputs) else "missing"


def _fill_chunk(group: EncoderGroup, producer: Producer, chunk: int, *, is_retry: bool) -> int:
    """Compute and commit a chunk; return the number of items that were computed."""
    stored = group.commit(chunk) if is_retry else None
    computed = producer.compute(group.info.chunk_rows(group.modality, chunk))
    name, reasons = next(iter(computed.failures.items()))
    # A retry writes only a new value, or a new reason, of an item that failed.
    if stored is None or any(
        old is not None and new not in (PENDING, old) for new, old in zip(reasons, stored.failures[name], strict=True)
    ):
        commit_chunk(group, chunk, *computed, overwrite_failed=is_retry)
    return sum(reason != PENDING for reason in reasons)


def count_filled(group: EncoderGroup, verb: Verb, features: Sequence[str], num_computed: int) -> FillReport:
    """Count the items of all chunks that have the first of some features.

    It reads one commit at a time: those of 20 million items do not fit in memory.
    """
    num_items = 0
    failures: Counter[str] = Counter()
    for chunk in range(group.info.num_chunks(group.modality)):
        commit = group.commit(chunk)
        if commit is not None and group.has(commit, features[0]):
            num_items += len(commit.hashes)
            reasons = to_array(commit.failures[features[0]], pa.string()).drop_null().to_pylist()
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
