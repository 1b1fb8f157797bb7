"""Indexing a source: every sample and item gets a row in the tables of a cache, before any model runs."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from embedcache.errors import PathError, SettingError, SourceError, UnfinishedError, first_few
from embedcache.files import find_files, flush, is_remote, make_folder, reading, remove_file, remove_folder, writing
from embedcache.locks import LOCK, locked
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import check_same, digest
from embedcache.samples import Sample, Source
from embedcache.store.changes import SourceChanges, check_allowed, digest_samples, find_changes, source_changed
from embedcache.store.layout import (
    INTERRUPTED_REMOVAL,
    SAMPLES,
    CacheInfo,
    Part,
    choose_chunk_size,
    combined_digest,
    find_unlisted,
    info_path,
    read_info,
    write_info,
)
from embedcache.store.table_writer import (
    TableWriter,
    put_tables,
    relocate,
    rewrite_table,
    scratch_folder,
)
from embedcache.store.tables import ITEM_SCHEMAS, Table

_OWN_NAME = re.compile(rf"({SAMPLES}|removed)-.*\.parquet|.*\.partial")
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
        return _create(source.describe(), cache_path, chunk_size, write)


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


def _relocated_parts(cache_path: Path, info: CacheInfo, changes: SourceChanges, folder: Path) -> list[Part]:
    """Return the parts with the digests of their samples now; items of which other bytes are read get new files."""
    parts: list[Part] = []
    first_rows = dict.fromkeys(info.num_items, 0)
    for part, now in zip(info.parts, changes.digests, strict=True):
        tables = dict(part.tables)
        for modality in first_rows.keys() & tables.keys():
            file, first_row = tables[modality], first_rows[modality]
            first_rows[modality] += file.num_rows
            moved = {
                row: item
                for row, item in changes.relocated.get(modality, {}).items()
                if first_row <= row < first_row + file.num_rows
            }
            if moved:
                table = Table(cache_path, info.files(modality), ITEM_SCHEMAS[modality])
                edit = partial(relocate, relocated=moved)
                tables[modality] = rewrite_table(folder, modality, table, file, first_row, edit)
        if info.is_partial:  # the source's samples may be more: the digest follows what was replaced
            now = digest([part.digest, now]) if changes.relocated else part.digest
        parts.append(Part(digest=now, tables=tables))
    return parts


def _ignore(_: list[Sample]) -> None:
    """Ignore samples: they are read to be compared or counted only."""
