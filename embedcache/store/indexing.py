"""Indexing a source: every sample and item gets a row in the tables of a cache, before any model runs.

A later call compares the source with the tables sample by sample, to find new samples and items whose bytes were
replaced.
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice, repeat
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from embedcache.errors import (
    FingerprintError,
    PathError,
    SettingError,
    SourceError,
    UnfinishedError,
    first_few,
    pluralize,
    quoted,
)
from embedcache.files import (
    LOCK,
    find_files,
    flush,
    is_remote,
    locked,
    make_folder,
    reading,
    remove_file,
    remove_folder,
    writing,
)
from embedcache.modalities import FILE_MODALITIES, FileItem, Sample, Source, noun
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import check_same, digest
from embedcache.store.cache import Cache
from embedcache.store.layout import (
    INTERRUPTED_REMOVAL,
    SAMPLES,
    CacheInfo,
    Part,
    TableFile,
    choose_chunk_size,
    combined_digest,
    count_rows,
    find_unlisted,
    info_path,
    read_info,
    write_info,
)
from embedcache.store.tables import (
    BATCH,
    ITEM_SCHEMAS,
    RemovedSamples,
    Table,
    TableWriter,
    digest_input,
    put_tables,
    read_removed,
    relocate,
    rewrite_parts,
    scratch_folder,
    to_file_item,
)

_OWN_NAME = re.compile(rf"({SAMPLES}|removed)-.*\.parquet|.*\.partial")
_MANY_CAPTIONS = 20  # per sample; the datasets of the field have up to ten
_CACHE_FILES = {"cache.json", "records", LOCK, *ITEM_SCHEMAS}


def index(
    source: Source,
    cache_path: Path,
    *,
    chunk_size: int | None = None,
    limit: int | None = None,
    extend: bool = False,
    accept_replaced: bool = False,
    progress: Progress | None = None,
) -> CacheInfo:
    """Write the sample and item tables of a source, or check that a cache still matches its source.

    Rows never change: samples that are added later get the next rows. Memory: some 120 bytes per sample while tables
    are written, one batch while a cache is checked.

    Args:
        cache_path: a new or empty folder, or a cache of this source. A cache without features is indexed again.
        chunk_size: items per chunk. If None, a cache keeps its chunk size, and a new cache gets one that depends on its
            number of items.
        limit: largest number of samples of the cache (no limit if None). A new cache gets the first samples of the
            source, and an extended cache the first new ones. The source is read no further than needed.
        extend: append samples of the source that the cache lacks.
        accept_replaced: accept other bytes of items on which all encoders failed.

    Raises:
        PathError: the folder contains other files, or the path is a file.
        FingerprintError: the cache belongs to another source, the source changed, or the chunk size differs.
        CorruptError: a table differs from its checksums.
        SettingError: the chunk size is below 1, or the limit below the samples of a cache that keeps its rows.
        UnfinishedError: a removal of samples was interrupted.
        SourceError: there are no samples, a key is not unique, or a column has incompatible types.
    """
    progress = progress or NullProgress()
    if chunk_size is not None and chunk_size < 1:
        raise SettingError(f"chunk_size: expected an integer of at least 1, got {chunk_size}")

    # Repeated until no other process has written the tables meanwhile.
    while True:
        info = _read_whole(cache_path) if _open_folder(cache_path) else None
        with writing(cache_path):
            if info is None or not _keeps_rows(cache_path, info):
                new_info = _index_anew(source, cache_path, info, chunk_size, limit, progress)
            else:
                _check_options(cache_path, info, chunk_size, limit)
                new_info = _update(
                    source,
                    cache_path,
                    info,
                    limit=limit,
                    extend=extend,
                    accept_replaced=accept_replaced,
                    progress=progress,
                )
        if new_info is not None:
            return new_info


def open_indexed(cache_path: Path, *, chunk_size: int | None = None) -> CacheInfo:
    """Return the content of `cache.json` of an indexed cache, without reading its source.

    Raises:
        PathError: the folder is not a cache.
        FingerprintError: the chunk size differs.
        UnfinishedError: a removal of samples was interrupted.
    """
    info = _read_whole(cache_path)
    if _keeps_rows(cache_path, info):
        _check_chunk_size(cache_path, info, chunk_size)
    return info


def index_tables(
    description: Mapping[str, Any],
    write: Callable[[Path, Progress], Sequence[Part]],
    cache_path: Path,
    *,
    chunk_size: int,
    progress: Progress,
) -> CacheInfo:
    """Write the sample and item tables of a new cache from other tables, unless it exists. Memory: as `index`.

    Args:
        description: source that the new cache records.
        write: writes all samples into table files below a folder, and returns their parts.

    Raises:
        PathError, SourceError: as `index`.
    """
    if _open_folder(cache_path):
        return read_info(cache_path)

    with locked(cache_path), writing(cache_path):
        if info_path(cache_path).is_file():  # another process was first
            return read_info(cache_path)
        return _create(description, cache_path, chunk_size, lambda folder: write(folder, progress))


def _open_folder(cache_path: Path) -> bool:
    """Return whether a folder is a cache. Create it if it does not exist."""
    with reading(cache_path):
        if info_path(cache_path).is_file():
            return True

        make_folder(cache_path)
        other_names = []
        if cache_path.is_dir():  # object stores have no folders
            for path in cache_path.iterdir():
                if path.name not in _CACHE_FILES and not _OWN_NAME.fullmatch(path.name):
                    other_names.append(path.name)

        if other_names:
            raise PathError(
                f"{cache_path} is not a cache and not empty: it contains {first_few(sorted(other_names))}; "
                "use the path of a new folder"
            )
    return False


def _read_whole(cache_path: Path) -> CacheInfo:
    """Read `cache.json`. Raises UnfinishedError if a removal of samples was interrupted."""
    info = read_info(cache_path)
    if info.has_interrupted_removal:
        raise UnfinishedError(f"{cache_path}: {INTERRUPTED_REMOVAL}")
    return info


def _keeps_rows(cache_path: Path, info: CacheInfo) -> bool:
    """Return whether a cache is never indexed again, because it has features or samples were removed."""
    return info.is_partial or any(find_files(cache_path, "*/*/chunks/*.json"))


def _check_options(cache_path: Path, info: CacheInfo, chunk_size: int | None, limit: int | None) -> None:
    """Check that the options are possible for a cache that keeps its rows."""
    _check_chunk_size(cache_path, info, chunk_size)
    if limit is not None and limit < info.num_samples:
        raise SettingError(
            f"limit: expected at least the {info.num_samples:,} samples that cache {cache_path} has, got {limit:,}; "
            "omit it, or extract into a new folder"
        )


def _check_chunk_size(cache_path: Path, info: CacheInfo, chunk_size: int | None) -> None:
    """Check that a cache that keeps its rows keeps its chunk size."""
    if chunk_size is not None:
        check_same(
            f"cache {cache_path}",
            {"chunk_size": info.chunk_size},
            {"chunk_size": chunk_size},
            next_step="omit --chunk-size, or extract into a new folder",
        )


def _is_unchanged(source: Source, cache_path: Path, info: CacheInfo, limit: int | None, progress: Progress) -> bool:
    """Return whether a cache of one part has the digest of its source, which is faster than comparing each sample.

    If so, remove the files that a killed process has left.
    """
    # Only the digest of a single part without removed samples is the digest of its source.
    if len(info.parts) > 1 or info.is_partial:
        return False

    # One more sample tells whether the source has grown.
    num_more = 1 if limit is None else min(1, limit - info.num_samples)
    max_samples = info.num_samples + num_more
    source_digest = digest_samples(source, "checking samples", info.num_samples, max_samples, _ignore, progress)
    if source_digest != info.index_digest:
        return False

    if not is_remote(cache_path) and find_unlisted(cache_path, info):
        with locked(cache_path):
            _remove_unlisted(cache_path, read_info(cache_path))
    return True


def _index_anew(
    source: Source,
    cache_path: Path,
    info: CacheInfo | None,
    chunk_size: int | None,
    limit: int | None,
    progress: Progress,
) -> CacheInfo | None:
    """Write the tables of a cache without features. Returns None if another process has written them meanwhile."""
    if info is not None:
        is_same_size = chunk_size in (None, info.chunk_size)
        if is_same_size and _is_unchanged(source, cache_path, info, limit, progress):
            return info
        chunk_size = chunk_size or info.chunk_size

    def write(folder: Path) -> list[Part]:
        writer = TableWriter(folder)
        samples_digest = digest_samples(source, "indexing", 0, limit, writer.add, progress)
        return [writer.close(samples_digest)] if writer.num_samples else []

    with locked(cache_path):
        # Another process may have indexed or extracted the source before the lock was free.
        current = read_info(cache_path) if info_path(cache_path).is_file() else None
        if current != info or (info is not None and _keeps_rows(cache_path, info)):
            return None

        if info is not None:
            _discard(cache_path)
        info = _create(source.describe(), cache_path, chunk_size, write)

    _question_captions(info, progress)
    return info


def _question_captions(info: CacheInfo, progress: Progress) -> None:
    """Note that the lines of longer texts may have been read as captions, if samples with items have very many."""
    num_captions = info.num_items.get("text", 0)
    if num_captions > _MANY_CAPTIONS * info.num_samples and len(info.num_items) > 1:
        progress.note(
            f"WARNING: {num_captions:,} captions for {info.num_samples:,} samples; is each of them a caption? Each "
            'line of a .txt is one: join the lines of longer texts, or write a .json such as {"caption": "a dog"}'
        )


def _discard(cache_path: Path) -> None:
    """Remove the manifest, without which the tables do not exist, and then the folders of encoders."""
    remove_file(info_path(cache_path))
    flush(cache_path)
    for group in find_files(cache_path, "*/*/zarr.json"):
        remove_folder(group.parent)


def _create(
    description: Mapping[str, Any],
    cache_path: Path,
    chunk_size: int | None,
    write: Callable[[Path], Sequence[Part]],
) -> CacheInfo:
    with scratch_folder(cache_path) as folder:
        parts = write(folder)
        if not parts:
            raise SourceError(
                f"{description.get('path', 'the source')}: expected samples, got none; "
                "use a source that contains images, captions or other items"
            )

        info = CacheInfo(
            chunk_size=chunk_size or choose_chunk_size(parts),
            source=dict(description),
            index_digest=combined_digest(parts),
            parts=tuple(parts),
        )
        put_tables(folder, cache_path, parts)

    # The manifest comes after the tables that it lists, and before the removal of the files that it replaces.
    write_info(cache_path, info)
    _remove_unlisted(cache_path, info)
    return info


def _remove_unlisted(cache_path: Path, info: CacheInfo) -> None:
    """Remove the table files that the manifest does not list, which were replaced or left by a killed process."""
    for file in find_unlisted(cache_path, info):
        remove_file(file)


def _update(
    source: Source,
    cache_path: Path,
    info: CacheInfo,
    *,
    limit: int | None,
    extend: bool,
    accept_replaced: bool,
    progress: Progress,
) -> CacheInfo | None:
    """Compare a source with a cache that keeps its rows, and write the changes that are allowed.

    Returns None if another process has written changes meanwhile.
    """
    if not extend and _is_unchanged(source, cache_path, info, limit, progress):
        return info

    max_new = None if limit is None else limit - info.num_samples
    with scratch_folder(cache_path) as folder:
        writer = TableWriter(folder, len(info.parts), info.num_samples)
        on_new = writer.add if extend else _ignore
        changes = find_changes(
            cache_path, info, source.samples(), on_new=on_new, max_new=max_new, extend=extend, progress=progress
        )
        if changes.num_removed:
            progress.note(f"left out {changes.num_removed:,} samples of the source that were removed from this cache")

        parts = list(info.parts)
        old_digests = [part.digest for part in parts]
        if changes.num_new or changes.relocated:
            check_allowed(cache_path, info, changes, extend=extend, accept_replaced=accept_replaced)
            parts = _relocated_parts(cache_path, info, changes, folder)
        elif not info.is_partial and changes.digests != old_digests:
            raise source_changed(cache_path, info, "columns or languages of its samples differ")
        if changes.num_new:
            earlier_samples = Table(cache_path, info.files(SAMPLES))
            parts.append(writer.close(changes.new_digest, earlier_samples))

        # The source was compared without the lock, so another process may have written changes meanwhile.
        with locked(cache_path):
            if read_info(cache_path) != info:
                return None

            if parts != list(info.parts):
                put_tables(folder, cache_path, parts)
                info = info.next_version(parts)
                write_info(cache_path, info)
            _remove_unlisted(cache_path, info)
    return info


def _relocated_parts(cache_path: Path, info: CacheInfo, changes: "SourceChanges", folder: Path) -> list[Part]:
    """Return the parts with the current digests of their samples. Tables with relocated items get new files."""
    changed = {}
    edits = {}
    for modality, items in changes.relocated.items():
        changed[modality] = np.array(sorted(items))
        edits[modality] = partial(relocate, relocated=items)

    parts: list[Part] = []
    new_parts = rewrite_parts(cache_path, info, folder, changed, edits)
    for part, samples_digest in zip(new_parts, changes.digests, strict=True):
        # The source of a partial cache may have more samples, so the new digest depends on the old one.
        if info.is_partial:
            samples_digest = digest([part.digest, samples_digest]) if changes.relocated else part.digest
        parts.append(Part(digest=samples_digest, tables=part.tables))
    return parts


def _ignore(_: list[Sample]) -> None:
    """Ignore samples, which are read only to be compared or counted."""


@dataclass(kw_only=True)
class SourceChanges:
    """Changes in a source since it was indexed.

    Args:
        digests: SHA-256 of the current samples of each part.
        relocated: modality -> row -> item, for items whose bytes have a new location or length. Other modalities are
            absent.
        num_new: number of samples that the cache does not have.
        new_digest: SHA-256 of the new samples.
        num_removed: number of samples of the source that were removed from the cache.
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

    The samples of each part must come in its order. New samples may be anywhere between them, like new files in a
    sorted folder, and `on_new` gets them in batches. Beyond the first `max_new` they are ignored, and the source is
    read only until these and all samples of the cache have come. Samples that were removed from the cache are skipped.
    With `extend`, new samples are expected, and progress has no total, because a source does not know its number of
    samples.

    Raises:
        FingerprintError: a sample is missing or out of order, or has other captions or files.
    """
    removed = read_removed(cache_path, info)
    parts = [_PartReader(cache_path, info, number, removed) for number in range(len(info.parts))]
    new_digest = hashlib.sha256()
    new_samples: list[Sample] = []
    num_new = 0
    num_removed = 0
    relocated = defaultdict[str, dict[int, FileItem]](dict)

    progress.start("comparing samples", 0 if extend else info.num_samples, "samples")
    for sample in samples:
        part = _find_part(parts, sample.key)
        if part is not None:
            for modality, items in part.compare(sample).items():
                relocated[modality] |= items
        elif removed.row_of(sample.key) is not None:
            num_removed += 1
        elif num_new != max_new:
            num_new += 1
            new_digest.update(digest_input([sample]))
            new_samples.append(sample)
            if len(new_samples) == BATCH:
                on_new(new_samples)
                new_samples = []
        progress.advance(1)

        # A source may be long: nothing after the last expected sample is read.
        if num_new == max_new and all(part.next is None for part in parts):
            break
    progress.finish()

    # The digests come first: they raise an error if the source lacks a sample.
    digests = [part.close() for part in parts]
    if new_samples:
        on_new(new_samples)
    return SourceChanges(
        digests=digests,
        relocated={modality: items for modality, items in relocated.items() if items},
        num_new=num_new,
        new_digest=new_digest.hexdigest(),
        num_removed=num_removed,
    )


def _find_part(parts: Sequence["_PartReader"], key: str) -> "_PartReader | None":
    """Return the part whose next sample has a key."""
    for part in parts:
        if part.next is not None and part.next.key == key:
            return part
    return None


def digest_samples(
    source: Source,
    step: str,
    num_samples: int,
    limit: int | None,
    on_batch: Callable[[list[Sample]], None],
    progress: Progress,
) -> str:
    """Read the samples of a source and return their SHA-256. Memory: one batch.

    Args:
        step: name of this step in the progress.
        num_samples: expected number of samples, or 0 if it is unknown.
        limit: largest number of samples to read (all if None).
        on_batch: function that is called with each batch of samples.
    """
    samples_digest = hashlib.sha256()
    samples = islice(source.samples(), limit)
    progress.start(step, num_samples, "samples")
    while batch := list(islice(samples, BATCH)):
        samples_digest.update(digest_input(batch))
        on_batch(batch)
        progress.advance(len(batch))
    progress.finish()

    skipped: Mapping[str, int] = getattr(source, "skipped", {})
    if skipped:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in Counter(skipped).most_common(5))
        more = f", and {len(skipped) - 5} more kinds" if len(skipped) > 5 else ""
        files = pluralize(sum(skipped.values()), "file")
        progress.note(f"skipped {files} of kinds that samples do not have: {kinds}{more}")
    return samples_digest.hexdigest()


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
        row = next(_used_rows(cache_path, info, modality, sorted(relocated)), None)
        if row is not None:
            path = relocated[row].path
            reason = f"other bytes in {len(relocated):,} of its {noun(modality)}, such as {path} in row {row:,}"
            step = "put the old files back, or extract into a new folder"
            raise source_changed(cache_path, info, reason, next_step=step)

    # No feature was computed from the other items: all encoders failed on them.
    for modality, relocated in changes.relocated.items():
        if not accept_replaced:
            reason = f"{len(relocated):,} of its failed {noun(modality)} have other bytes now"
            raise source_changed(cache_path, info, reason, next_step="encode them with --retry-failed")


def _used_rows(cache_path: Path, info: CacheInfo, modality: str, rows: Sequence[int]) -> Iterator[int]:
    """Iterate over the rows from which any feature was computed. Memory: the commits of one chunk."""
    groups = Cache(cache_path).encoders(modality)
    for chunk, chunk_rows in groupby(rows, key=lambda row: row // info.chunk_size):
        failures: list[Sequence[str | None]] = []
        for group in groups:
            commit = group.commit(chunk)
            if commit is not None:
                failures += commit.failures.values()

        for row in chunk_rows:
            if any(reasons[row % info.chunk_size] is None for reasons in failures):
                yield row


class _IndexedSample(NamedTuple):
    """One sample of the tables of a cache.

    Args:
        key: its key.
        texts: its captions.
        files: modality -> row of its first item, and its items.
    """

    key: str
    texts: list[str]
    files: Mapping[str, tuple[int, list[FileItem]]]


class _PartReader:
    """Reader of one part of a cache, in step with the samples of the source. Memory: one batch of each table."""

    def __init__(self, cache_path: Path, info: CacheInfo, number: int, removed: RemovedSamples) -> None:
        self._digest = hashlib.sha256()
        self._cache_path = cache_path
        self._info = info
        self._number = number
        self._samples = self._read(set(removed.rows.tolist()))
        self.next: _IndexedSample | None = next(self._samples, None)

    def _read(self, removed_rows: Collection[int]) -> Iterator[_IndexedSample]:
        """Iterate over the samples that were not removed."""
        part = self._info.parts[self._number]
        earlier_parts = self._info.parts[: self._number]
        first_sample = sum(earlier_part.num_samples for earlier_part in earlier_parts)
        first_rows = Counter(count_rows(earlier_parts))

        items = {}
        for name, file in part.tables.items():
            if name != SAMPLES:
                items[name] = _group_by_sample(self._iterate_rows(file, name), first_sample)

        # All tables are read in step, one sample at a time.
        keys = self._iterate_rows(part.tables[SAMPLES], SAMPLES)
        for sample, key in enumerate(keys, first_sample):
            texts: list[str] = []
            files = {}
            for name, groups in items.items():
                rows = next(groups)
                if name == "text":
                    texts = list(map(itemgetter("text"), rows))
                else:
                    files[name] = (first_rows[name], list(map(to_file_item, rows)))
                    first_rows[name] += len(rows)
            if sample not in removed_rows:
                yield _IndexedSample(key["key"], texts, files)

    def _iterate_rows(self, file: TableFile, name: str) -> Iterator[Mapping[str, Any]]:
        table = Table(self._cache_path, [file], ITEM_SCHEMAS.get(name))
        for rows in table.blocks(BATCH, ["key"] if name == SAMPLES else None):
            yield from rows.to_pylist()

    def compare(self, sample: Sample) -> dict[str, dict[int, FileItem]]:
        """Compare the next sample, and return modality -> row -> item for the items with other bytes."""
        assert self.next is not None
        indexed_sample = self.next
        self.next = next(self._samples, None)
        self._digest.update(digest_input([sample]))

        captions = [item.text for item in sample.texts]
        if captions != indexed_sample.texts:
            step = (
                f"{self._removal()}, then append the changed sample under another key with --extend; or extract into a "
                "new folder"
            )
            reason = f"sample {sample.key!r} has other captions"
            raise source_changed(self._cache_path, self._info, reason, next_step=step)

        relocated: dict[str, dict[int, FileItem]] = {}
        for modality in FILE_MODALITIES:
            first_row, old_items = indexed_sample.files.get(modality.name, (0, []))
            new_items = sample.items_in_files(modality.name)
            if list(map(_identity, new_items)) != list(map(_identity, old_items)):
                raise source_changed(self._cache_path, self._info, f"sample {sample.key!r} has other {modality.noun}")

            # The items are the same, but the place of their bytes may differ.
            relocated[modality.name] = {}
            for row, (new_item, old_item) in enumerate(zip(new_items, old_items, strict=True), first_row):
                if new_item != old_item:
                    relocated[modality.name][row] = new_item
        return relocated

    def close(self) -> str:
        """Return the SHA-256 of the current samples of the source. Raises FingerprintError if it lacks any."""
        if self.next is not None:
            reason = f"sample {self.next.key!r} is missing or out of order"
            step = f"if it was deleted, {self._removal()}; or extract into a new folder"
            raise source_changed(self._cache_path, self._info, reason, next_step=step)
        return self._digest.hexdigest()

    def _removal(self) -> str:
        """Return the step that removes a sample from the cache."""
        command = f"embedcache cache remove {quoted(self._cache_path)} FILE-OF-KEYS --yes"
        return f"remove it with: {command}, which encodes nothing"


def _group_by_sample(rows: Iterator[Mapping[str, Any]], first_sample: int) -> Iterator[list[Mapping[str, Any]]]:
    """Iterate over the rows of each sample of an item table, which is sorted by sample. The iterator has no end."""
    next_sample = first_sample
    for sample, group in groupby(rows, key=itemgetter("sample")):
        yield from repeat([], sample - next_sample)
        yield list(group)
        next_sample = sample + 1
    yield from repeat([])


def _identity(item: FileItem) -> tuple[str, float | None, float | None]:
    """Return the path and the interval of an item, without the place of its bytes in the file."""
    return item.path, item.start_s, item.stop_s
