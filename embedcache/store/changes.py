"""Differences between a source and the tables of a cache: new samples, and items whose bytes were replaced."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, islice, pairwise, repeat
from operator import itemgetter
from pathlib import Path
from typing import Any

from embedcache.errors import FingerprintError, pluralize, quoted
from embedcache.modalities import FILE_MODALITIES, MODALITIES, noun
from embedcache.progress import Progress
from embedcache.samples import FileItem, Sample, Source
from embedcache.store.cache import Cache
from embedcache.store.layout import SAMPLES, CacheInfo
from embedcache.store.removed import RemovedSamples, read_removed
from embedcache.store.table_writer import BATCH, digest_input
from embedcache.store.tables import to_file_item


@dataclass(kw_only=True)
class SourceChanges:
    """Changes in a source since it was indexed.

    Args:
        digests: SHA-256 of the current samples of each segment.
        relocated: modality -> row -> new location of the item's bytes, or their new length; empty if there are none.
        num_new: number of samples that the cache does not have.
        new_digest: SHA-256 of those samples.
        num_removed: number of samples that were removed from the cache, and that the source still has.
    """

    digests: Sequence[str]
    relocated: dict[str, dict[int, FileItem]]
    num_new: int
    new_digest: str
    num_removed: int


def find_changes(
    cache_path: Path,
    info: CacheInfo,
    samples: Iterator[Sample],
    *,
    on_new: Callable[[list[Sample]], None],
    max_new: int | None = None,
    extend: bool = False,
    progress: Progress,
) -> SourceChanges:
    """Compare a source with a cache, sample by sample. Memory: one batch.

    The samples of each segment must come in its order; new samples may be anywhere between them, as new files in a
    sorted folder do; `on_new` gets them in batches. Beyond the first `max_new` they are ignored, and the source is read
    only until those and the cache's own samples were found. Samples that were removed from the cache are passed over.
    With `extend` new samples are expected, and progress has no total: a source does not say how many samples it has.

    Raises:
        FingerprintError: a sample is missing or out of order, or has other captions or files.
    """
    bounds = pairwise(accumulate((part.num_samples for part in info.parts), initial=0))
    removed = read_removed(cache_path, info)
    segments = [_SegmentReader(cache_path, info, range(start, stop), removed) for start, stop in bounds]
    num_removed = 0
    new, relocated = _DigestBuffer(on_new), defaultdict[str, dict[int, FileItem]](dict)
    progress.start("comparing samples", 0 if extend else info.num_samples, "samples")
    for sample in samples:
        segment = next((segment for segment in segments if segment.is_next(sample)), None)
        if segment is not None:
            for modality, moved in segment.compare(sample).items():
                relocated[modality] |= moved
        elif removed.has(sample.key):
            num_removed += 1
        elif new.count != max_new:
            new.add(sample)
        progress.advance(1)
        if new.count == max_new and all(segment.is_complete for segment in segments):
            break
    progress.finish()
    for segment in segments:
        segment.close()
    new.flush()
    return SourceChanges(
        digests=[segment.buffer.digest.hexdigest() for segment in segments],
        relocated=dict(relocated),
        num_new=new.count,
        new_digest=new.digest.hexdigest(),
        num_removed=num_removed,
    )


def digest_samples(
    source: Source,
    step: str,
    num_samples: int,
    limit: int | None,
    on_batch: Callable[[list[Sample]], None],
    progress: Progress,
) -> str:
    """Read the samples of a source; return the SHA-256 of them. Memory: one batch.

    Args:
        step: what progress calls it.
        num_samples: number of samples that are expected; 0: unknown.
        limit: the most samples to read; None: all.
        on_batch: gets the samples.
    """
    hashed, samples = hashlib.sha256(), islice(source.samples(), limit)
    progress.start(step, num_samples, "samples")
    while batch := list(islice(samples, BATCH)):
        hashed.update(digest_input(batch))
        on_batch(batch)
        progress.advance(len(batch))
    progress.finish()
    skipped: Mapping[str, int] = getattr(source, "skipped", {})
    if skipped:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(skipped.items(), key=lambda pair: -pair[1])[:5])
        more = f", and {len(skipped) - 5} more kinds" if len(skipped) > 5 else ""
        files = pluralize(sum(skipped.values()), "file")
        progress.note(f"skipped {files} of kinds that samples do not have: {kinds}{more}")
    return hashed.hexdigest()


def source_changed(
    cache_path: Path, info: CacheInfo, reason: str, *, next_step: str = "extract into a new folder"
) -> FingerprintError:
    """Create the error for a source that differs from the source of a cache."""
    original = f"{info.source.get('type')} {info.source.get('path', '')}".strip()
    settings = json.dumps(info.source.get("settings") or {})
    return FingerprintError(
        f"cache {cache_path} has other samples than this source has now: {reason}; it was extracted from {original}"
        f"{f' with {settings}; give the same options, or else' if settings != '{}' else ';'} {next_step}"
    )


def check_allowed(
    cache_path: Path, info: CacheInfo, changes: SourceChanges, *, extend: bool, accept_replaced: bool
) -> None:
    """Check that only samples were added, with `extend`, and only failed items replaced, with `accept_replaced`.

    Raises:
        FingerprintError: anything else has changed.
    """
    if changes.num_new and not extend:
        step = (
            f"append them with --extend, leave them out with --limit {info.num_samples}, or extract into a new folder"
        )
        raise source_changed(cache_path, info, f"it has {changes.num_new:,} more", next_step=step)
    for modality, relocated in changes.relocated.items():
        used = next(_used_rows(cache_path, info, modality, sorted(relocated)), None)
        if used is not None:
            path = relocated[used].path
            reason = f"other bytes in {len(relocated):,} of its {noun(modality)}, such as {path} in row {used:,}"
            step = "put the old files back, or extract into a new folder"
            raise source_changed(cache_path, info, reason, next_step=step)
    for modality, relocated in changes.relocated.items():
        if not accept_replaced:
            reason = f"{len(relocated):,} of its failed {noun(modality)} have other bytes now"
            raise source_changed(cache_path, info, reason, next_step="encode them with --retry-failed")


def _used_rows(cache_path: Path, info: CacheInfo, modality: str, rows: Sequence[int]) -> Iterator[int]:
    """Iterate over the items that any feature was computed from. Memory: the commits of one chunk."""
    groups = Cache(cache_path).encoders(modality)
    for chunk, chunk_rows in groupby(rows, key=lambda row: row // info.chunk_size):
        commits = [commit for group in groups if (commit := group.commit(chunk)) is not None]
        failures = [reasons for commit in commits for reasons in commit.failures.values()]
        yield from (row for row in chunk_rows if any(reasons[row % info.chunk_size] is None for reasons in failures))


class _DigestBuffer:
    """Buffer of samples that are hashed and forwarded in batches."""

    def __init__(self, forward: Callable[[list[Sample]], None]) -> None:
        self.digest = hashlib.sha256()
        self.count = 0
        self._forward = forward
        self._samples: list[Sample] = []

    def add(self, sample: Sample) -> None:
        self._samples.append(sample)
        self.count += 1
        if len(self._samples) == BATCH:
            self.flush()

    def flush(self) -> None:
        self.digest.update(digest_input(self._samples))
        if self._samples:
            self._forward(self._samples)
        self._samples = []


@dataclass(frozen=True, kw_only=True)
class IndexedSample:
    """One sample of the tables of a cache.

    Args:
        files: modality -> first row of its items, and the items; of modalities that the cache has.
        texts: each text with its language.
    """

    key: str
    files: Mapping[str, tuple[int, Sequence[FileItem]]]
    texts: Sequence[tuple[str, str | None]]


def read_samples(cache: Cache, modalities: Collection[str], rows: range) -> Iterator[IndexedSample]:
    """Iterate over samples of a cache with items of some modalities in row order. Memory: one batch of each table."""
    keys = (row["key"] for row in _iterate_rows(cache, SAMPLES, ["key"]))
    names = [name for name in modalities if MODALITIES[name].kind == "files"]
    texts = _rows_by_sample(cache, "text") if "text" in modalities else repeat([])
    items = (_rows_by_sample(cache, modality) for modality in names)
    next_rows = dict.fromkeys(names, 0)
    for number, (key, captions, *groups) in enumerate(islice(zip(keys, texts, *items, strict=False), rows.stop)):
        if number >= rows.start:
            yield IndexedSample(
                key=key,
                files={
                    name: (next_rows[name], [to_file_item(row) for row in group])
                    for name, group in zip(names, groups, strict=True)
                },
                texts=[(row["text"], row["language"]) for row in captions],
            )
        for name, group in zip(names, groups, strict=True):
            next_rows[name] += len(group)


def _rows_by_sample(cache: Cache, modality: str) -> Iterator[list[Mapping[str, Any]]]:
    """Iterate over the rows of each sample in an item table, which is sorted by sample; without end."""
    next_sample = 0
    for sample, rows in groupby(_iterate_rows(cache, modality), key=itemgetter("sample")):
        yield from repeat([], sample - next_sample)
        yield list(rows)
        next_sample = sample + 1
    yield from repeat([])


def _iterate_rows(cache: Cache, name: str, columns: Sequence[str] | None = None) -> Iterator[Mapping[str, Any]]:
    for rows in cache.rows_of(name).blocks(BATCH, columns):
        yield from rows.to_pylist()


class _SegmentReader:
    """Reader of one segment of a cache, in step with the samples of the source."""

    def __init__(self, cache_path: Path, info: CacheInfo, rows: range, removed: RemovedSamples) -> None:
        self.buffer = _DigestBuffer(lambda _: None)
        self._cache_path, self._info = cache_path, info
        left_out = set(removed.rows.tolist())
        stored = read_samples(Cache(cache_path), info.num_items, rows)
        self._stored = (sample for row, sample in zip(rows, stored, strict=False) if row not in left_out)
        self._next = next(self._stored, None)

    @property
    def is_complete(self) -> bool:
        """Whether the source had all of its samples."""
        return self._next is None

    def is_next(self, sample: Sample) -> bool:
        return self._next is not None and self._next.key == sample.key

    def compare(self, sample: Sample) -> dict[str, dict[int, FileItem]]:
        """Compare the next sample; return modality -> row -> item for the items with other bytes."""
        assert self._next is not None
        stored, self._next = self._next, next(self._stored, None)
        self.buffer.add(sample)
        if [text.text for text in sample.texts] != [text for text, _ in stored.texts]:
            step = (
                f"{self._removal()}, then append the changed sample under another key with --extend; or extract into a "
                "new folder"
            )
            reason = f"sample {sample.key!r} has other captions"
            raise source_changed(self._cache_path, self._info, reason, next_step=step)
        relocated: dict[str, dict[int, FileItem]] = {}
        for modality in FILE_MODALITIES:
            first_row, old_items = stored.files.get(modality.name, (0, ()))
            new_items = sample.items_in_files(modality.name)
            if [_identity(item) for item in new_items] != [_identity(item) for item in old_items]:
                raise source_changed(self._cache_path, self._info, f"sample {sample.key!r} has other {modality.noun}")
            pairs = zip(new_items, old_items, strict=True)
            if moved := {row: new for row, (new, old) in enumerate(pairs, first_row) if new != old}:
                relocated[modality.name] = moved
        return relocated

    def close(self) -> None:
        self.buffer.flush()
        if self._next is not None:
            reason = f"sample {self._next.key!r} is missing or out of order"
            step = f"if it was deleted, {self._removal()}; or extract into a new folder"
            raise source_changed(self._cache_path, self._info, reason, next_step=step)

    def _removal(self) -> str:
        """Return the step that removes a sample from the cache."""
        command = f"embedcache cache remove {quoted(self._cache_path)} FILE-OF-KEYS --yes"
        return f"remove it with: {command}, which encodes nothing"


def _identity(item: FileItem) -> tuple[str, float | None, float | None]:
    """Return what an item is, wherever its bytes are in its file."""
    return item.path, item.start_s, item.stop_s
