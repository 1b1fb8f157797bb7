"""Differences between a source and the tables of a cache: new samples, and items whose bytes were replaced."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice, repeat
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from embedcache.errors import FingerprintError, pluralize, quoted
from embedcache.modalities import FILE_MODALITIES, noun
from embedcache.progress import Progress
from embedcache.samples import FileItem, Sample, Source
from embedcache.store.cache import Cache
from embedcache.store.layout import SAMPLES, CacheInfo, TableFile, count_rows
from embedcache.store.removed import RemovedSamples, read_removed
from embedcache.store.table_writer import BATCH, digest_input
from embedcache.store.tables import ITEM_SCHEMAS, Table, to_file_item


@dataclass(kw_only=True)
class SourceChanges:
    """Changes in a source since it was indexed.

    Args:
        digests: SHA-256 of the current samples of each part.
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

    The samples of each part must come in its order; new samples may be anywhere between them, as new files in a
    sorted folder do; `on_new` gets them in batches. Beyond the first `max_new` they are ignored, and the source is read
    only until those and the cache's own samples were found. Samples that were removed from the cache are passed over.
    With `extend` new samples are expected, and progress has no total: a source does not say how many samples it has.

    Raises:
        FingerprintError: a sample is missing or out of order, or has other captions or files.
    """
    removed = read_removed(cache_path, info)
    parts = [_PartReader(cache_path, info, number, removed) for number in range(len(info.parts))]
    num_removed = 0
    new = _DigestBuffer(on_new)
    relocated = defaultdict[str, dict[int, FileItem]](dict)
    progress.start("comparing samples", 0 if extend else info.num_samples, "samples")
    for sample in samples:
        part = next((part for part in parts if part.next is not None and part.next.key == sample.key), None)
        if part is not None:
            for modality, moved in part.compare(sample).items():
                relocated[modality] |= moved
        elif removed.row_of(sample.key) is not None:
            num_removed += 1
        elif new.count != max_new:
            new.add(sample)
        progress.advance(1)
        if new.count == max_new and all(part.next is None for part in parts):
            break
    progress.finish()
    digests = [part.close() for part in parts]
    new.flush()
    return SourceChanges(
        digests=digests,
        relocated={modality: moved for modality, moved in relocated.items() if moved},
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
    """Buffer of samples that are hashed, and forwarded if somebody wants them, in batches."""

    def __init__(self, forward: Callable[[list[Sample]], None] | None = None) -> None:
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
        if self._samples and self._forward is not None:
            self._forward(self._samples)
        self._samples = []


class _IndexedSample(NamedTuple):
    """One sample of the tables of a cache; `files` are modality -> first row of its items, and the items."""

    key: str
    texts: list[str]
    files: Mapping[str, tuple[int, list[FileItem]]]


class _PartReader:
    """Reader of one part of a cache, in step with the samples of the source. Memory: one batch of each table."""

    def __init__(self, cache_path: Path, info: CacheInfo, number: int, removed: RemovedSamples) -> None:
        self.hashed = _DigestBuffer()
        self._cache_path, self._info, self._number = cache_path, info, number
        self._stored = self._read(set(removed.rows.tolist()))
        self.next: _IndexedSample | None = next(self._stored, None)

    def _read(self, left_out: Collection[int]) -> Iterator[_IndexedSample]:
        """Iterate over the samples that were not removed."""
        part, before = self._info.parts[self._number], self._info.parts[: self._number]
        first_sample = sum(each.num_samples for each in before)
        first_rows = Counter(count_rows(before))
        tables = {name: self._iterate_rows(file, name) for name, file in part.tables.items()}
        keys = tables.pop(SAMPLES)
        items = {name: _group_by_sample(rows, first_sample) for name, rows in tables.items()}

        for sample, row in enumerate(keys, first_sample):
            own = {name: next(groups) for name, groups in items.items()}
            texts = [each["text"] for each in own.pop("text", [])]
            files = {name: (first_rows[name], [to_file_item(each) for each in rows]) for name, rows in own.items()}
            if sample not in left_out:
                yield _IndexedSample(row["key"], texts, files)
            first_rows.update({name: len(rows) for name, rows in own.items()})

    def _iterate_rows(self, file: TableFile, name: str) -> Iterator[Mapping[str, Any]]:
        table = Table(self._cache_path, [file], ITEM_SCHEMAS.get(name))
        for rows in table.blocks(BATCH, ["key"] if name == SAMPLES else None):
            yield from rows.to_pylist()

    def compare(self, sample: Sample) -> dict[str, dict[int, FileItem]]:
        """Compare the next sample; return modality -> row -> item for the items with other bytes."""
        assert self.next is not None
        stored, self.next = self.next, next(self._stored, None)
        self.hashed.add(sample)
        if [text.text for text in sample.texts] != stored.texts:
            step = (
                f"{self._removal()}, then append the changed sample under another key with --extend; or extract into a "
                "new folder"
            )
            reason = f"sample {sample.key!r} has other captions"
            raise source_changed(self._cache_path, self._info, reason, next_step=step)
        relocated: dict[str, dict[int, FileItem]] = {}
        for modality in FILE_MODALITIES:
            first_row, old_items = stored.files.get(modality.name, (0, []))
            new_items = sample.items_in_files(modality.name)
            if [_identity(item) for item in new_items] != [_identity(item) for item in old_items]:
                raise source_changed(self._cache_path, self._info, f"sample {sample.key!r} has other {modality.noun}")
            pairs = zip(new_items, old_items, strict=True)
            relocated[modality.name] = {row: new for row, (new, old) in enumerate(pairs, first_row) if new != old}
        return relocated

    def close(self) -> str:
        """Return the SHA-256 of the samples as the source has them now; FingerprintError if it lacks any."""
        if self.next is not None:
            reason = f"sample {self.next.key!r} is missing or out of order"
            step = f"if it was deleted, {self._removal()}; or extract into a new folder"
            raise source_changed(self._cache_path, self._info, reason, next_step=step)
        self.hashed.flush()
        return self.hashed.digest.hexdigest()

    def _removal(self) -> str:
        """Return the step that removes a sample from the cache."""
        command = f"embedcache cache remove {quoted(self._cache_path)} FILE-OF-KEYS --yes"
        return f"remove it with: {command}, which encodes nothing"


def _group_by_sample(rows: Iterator[Mapping[str, Any]], first_sample: int) -> Iterator[list[Mapping[str, Any]]]:
    """Iterate over the rows of each sample of an item table, which is sorted by sample; without end."""
    next_sample = first_sample
    for sample, group in groupby(rows, key=itemgetter("sample")):
        yield from repeat([], sample - next_sample)
        yield list(group)
        next_sample = sample + 1
    yield from repeat([])


def _identity(item: FileItem) -> tuple[str, float | None, float | None]:
    """Return what an item is, wherever its bytes are in its file."""
    return item.path, item.start_s, item.stop_s
