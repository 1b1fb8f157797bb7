"""Indexing a source: every sample and item gets a row in the tables of a cache, before any model runs.

A source that has changed since is compared sample by sample: new samples, and items whose bytes were replaced.
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
        cache_path: a new or empty folder, or a cache of this source; a whole one without features is indexed again.
        chunk_size: items per chunk; None keeps the cache's own, or chooses that of a new cache by its number of items.
        limit: the most samples that the cache may have: the first ones of the source, and then, where it is extended,
            the first of those that it lacks; the source is read no further than needed. None: all.
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
    while True:  # until no other process has written the tables meanwhile
        info = _read_whole(cache_path) if _open_folder(cache_path) else None
        with writing(cache_path):
            if info is None or not _keeps_rows(cache_path, info):
                written = _index_anew(source, cache_path, info, chunk_size, limit, progress)
            else:
                _check_options(cache_path, info, chunk_size, limit)
                written = _update(
                    source,
                    cache_path,
                    info,
                    limit=limit,
                    extend=extend,
                    accept_replaced=accept_replaced,
                    progress=progress,
                )
        if written is not None:
            return written


def open_indexed(cache_path: Path, *, chunk_size: int | None = None) -> CacheInfo:
    """Return what a cache was indexed as, without reading its source.

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
    """Write the sample and item tables of a new cache from those of others, unless it exists. Memory: as `index`.

    Args:
        description: what the new cache records as its source.
        write: writes all samples into files of tables below a folder, and returns their parts.

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
    """Return whether a folder is a cache; create it if it does not exist."""
    with reading(cache_path):
        exists = info_path(cache_path).is_file()
        if not exists:
            make_folder(cache_path)
            names = [path.name for path in cache_path.iterdir()] if cache_path.is_dir() else []  # not in object stores
            other_names = sorted(name for name in names if name not in _CACHE_FILES and not _OWN_NAME.fullmatch(name))
            if other_names:
                raise PathError(
                    f"{cache_path} is not a cache and not empty: it contains {first_few(other_names)}; "
                    "use the path of a new folder"
                )
    return exists


def _read_whole(cache_path: Path) -> CacheInfo:
    """Read `cache.json`; UnfinishedError if a removal of samples was interrupted."""
    info = read_info(cache_path)
    if info.has_interrupted_removal:
        raise UnfinishedError(f"{cache_path}: {INTERRUPTED_REMOVAL}")
    return info


def _keeps_rows(cache_path: Path, info: CacheInfo) -> bool:
    """Return whether a cache is never indexed again: it has features, or samples were removed."""
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

    If so, remove what a killed process has left.
    """
    if len(info.parts) > 1 or info.is_partial:
        return False
    num_more = 1 if limit is None else min(1, limit - info.num_samples)  # tells whether the source has grown
    found = digest_samples(source, "checking samples", info.num_samples, info.num_samples + num_more, _ignore, progress)
    if found != info.index_digest:
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
    """Write the tables of a cache without features; None if another process has written it meanwhile."""
    if info is not None:
        is_same_size = chunk_size in (None, info.chunk_size)
        if is_same_size and _is_unchanged(source, cache_path, info, limit, progress):
            return info
        chunk_size = chunk_size or info.chunk_size

    def write(folder: Path) -> list[Part]:
        writer = TableWriter(folder)
        found = digest_samples(source, "indexing", 0, limit, writer.add, progress)
        return [writer.close(found)] if writer.num_samples else []

    with locked(cache_path):
        current = read_info(cache_path) if info_path(cache_path).is_file() else None
        if current != info or (info is not None and _keeps_rows(cache_path, info)):
            return None
        if info is not None:
            _discard(cache_path)
        info = _create(source.describe(), cache_path, chunk_size, write)
    _question_captions(info, progress)
    return info


def _question_captions(info: CacheInfo, progress: Progress) -> None:
    """Note if samples with items have so many captions that lines of one text may have been taken for captions."""
    num_captions = info.num_items.get("text", 0)
    if num_captions > _MANY_CAPTIONS * info.num_samples and len(info.num_items) > 1:
        progress.note(
            f"WARNING: {num_captions:,} captions for {info.num_samples:,} samples; is each of them a caption? Each "
            'line of a .txt is one: join the lines of longer texts, or write a .json such as {"caption": "a dog"}'
        )


def _discard(cache_path: Path) -> None:
    """Remove the folders of encoders, and the manifest first: without it the tables do not exist."""
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
    write_info(cache_path, info)
    _remove_unlisted(cache_path, info)
    return info


def _remove_unlisted(cache_path: Path, info: CacheInfo) -> None:
    """Remove the files of tables that the manifest does not list: those before, and those that a kill has left."""
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

    None if another process has written changes meanwhile.
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
        if changes.num_new or changes.relocated:
            check_allowed(cache_path, info, changes, extend=extend, accept_replaced=accept_replaced)
            parts = _relocated_parts(cache_path, info, changes, folder)
        elif not info.is_partial and changes.digests != [part.digest for part in parts]:
            raise source_changed(cache_path, info, "columns or languages of its samples differ")
        if changes.num_new:
            before = Table(cache_path, info.files(SAMPLES))
            parts.append(writer.close(changes.new_digest, before))

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
    """Return the parts with the digests of their samples now; items of which other bytes are read get new files."""
    changed = {modality: np.array(sorted(moved)) for modality, moved in changes.relocated.items()}
    edits = {modality: partial(relocate, relocated=moved) for modality, moved in changes.relocated.items()}
    parts: list[Part] = []
    for part, now in zip(rewrite_parts(cache_path, info, folder, changed, edits), changes.digests, strict=True):
        if info.is_partial:  # the source's samples may be more: the digest follows what was replaced
            now = digest([part.digest, now]) if changes.relocated else part.digest
        parts.append(Part(digest=now, tables=part.tables))
    return parts


def _ignore(_: list[Sample]) -> None:
    """Ignore samples: they are read to be compared or counted only."""


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
    new_digest = hashlib.sha256()
    new: list[Sample] = []
    num_new = num_removed = 0
    relocated = defaultdict[str, dict[int, FileItem]](dict)
    progress.start("comparing samples", 0 if extend else info.num_samples, "samples")
    for sample in samples:
        part = next((part for part in parts if part.next is not None and part.next.key == sample.key), None)
        if part is not None:
            for modality, moved in part.compare(sample).items():
                relocated[modality] |= moved
        elif removed.row_of(sample.key) is not None:
            num_removed += 1
        elif num_new != max_new:
            num_new += 1
            new_digest.update(digest_input([sample]))
            new.append(sample)
            if len(new) == BATCH:
                on_new(new)
                new = []
        progress.advance(1)
        if num_new == max_new and all(part.next is None for part in parts):
            break
    progress.finish()
    digests = [part.close() for part in parts]
    if new:
        on_new(new)
    return SourceChanges(
        digests=digests,
        relocated={modality: moved for modality, moved in relocated.items() if moved},
        num_new=num_new,
        new_digest=new_digest.hexdigest(),
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


class _IndexedSample(NamedTuple):
    """One sample of the tables of a cache; `files` are modality -> first row of its items, and the items."""

    key: str
    texts: list[str]
    files: Mapping[str, tuple[int, list[FileItem]]]


class _PartReader:
    """Reader of one part of a cache, in step with the samples of the source. Memory: one batch of each table."""

    def __init__(self, cache_path: Path, info: CacheInfo, number: int, removed: RemovedSamples) -> None:
        self._digest = hashlib.sha256()
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
        self._digest.update(digest_input([sample]))
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
        return self._digest.hexdigest()

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
