"""Removing samples from a cache: their rows stay, so that all others keep theirs, and nothing of their content does.

The tables are written again without it, then each chunk that holds an item of them, of all features. What is being
removed is in `removing.parquet` until all is done: the same removal, run again, finishes one that was killed. A chunk
is first written completely beside the cache's own, below `removing/`, then moved; it is never only half there.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from embedcache.arrays import Ints
from embedcache.errors import CorruptError, PathError, UnfinishedError
from embedcache.files import flush, put_file, remove_partials, write_atomic, writing
from embedcache.locks import Leases, locked
from embedcache.modalities import noun
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import digest_file
from embedcache.sources.reopen import is_remembered, remember
from embedcache.store.cache import Cache
from embedcache.store.commits import REMOVED, Commit, remove_commit, removed_hash, write_commit
from embedcache.store.feature import Feature
from embedcache.store.group import EncoderGroup
from embedcache.store.layout import (
    INTERRUPTED_REMOVAL,
    SAMPLES,
    Part,
    commit_path,
    find_unlisted,
    read_info,
    removed_path,
    removing_path,
    write_info,
)
from embedcache.store.removed import (
    RemovedSamples,
    make_removed,
    no_removed,
    read_removed,
    read_removed_file,
    write_removed,
)
from embedcache.store.table_writer import put_tables, rewrite_table, scratch_folder, without_items, without_samples
from embedcache.store.verify import check_tables
from embedcache.store.writer import chunk_files, write_feature_chunk


@dataclass(frozen=True, kw_only=True)
class ErasedChunks:
    """The chunks of one encoder that hold items of some samples: chunk -> those items, counted from its start."""

    group: EncoderGroup
    rows: dict[int, list[int]]


def find_chunks(cache: Cache, samples: Ints) -> list[ErasedChunks]:
    """Return the chunks of all encoders, views and derived features that hold items of some samples."""
    found = []
    for modality in cache.info.num_items:
        of_items = cache.items(modality, columns=["sample"])["sample"].to_numpy()
        rows: dict[int, list[int]] = {}
        for row in np.flatnonzero(np.isin(of_items, samples)).tolist():
            chunk, offset = divmod(row, cache.info.chunk_size)
            rows.setdefault(chunk, []).append(offset)
        found += [ErasedChunks(group=group, rows=rows) for group in cache.encoders(modality)]
    return found


def read_pending(cache_path: Path) -> RemovedSamples | None:
    """Return the samples whose removal was started and not finished; None if there are none."""
    path = removing_path(cache_path)
    return read_removed_file(path) if path.is_file() else None


def start_removal(cache: Cache, samples: Ints, keys: Sequence[str], *, progress: Progress | None = None) -> None:
    """Record that samples are to be removed, once everything that will be written again is known to be intact.

    Progress is in rows of the tables, then in chunks.

    Raises:
        CorruptError: a table, or a chunk that holds an item of them, is damaged; repair it first.
        UnfinishedError: another removal was interrupted or is running.
        PathError: another process writes to the cache, or left an unfinished file on another machine.
    """
    remove_partials(cache.path)
    unfinished = next(cache.path.rglob("*.partial"), None)
    if unfinished is not None:
        raise PathError(
            f"{unfinished}: expected no unfinished files, got that of a process that runs, or was killed on another "
            "machine; wait for it, or delete the file"
        )
    progress = progress or NullProgress()
    damaged = next(check_tables(cache, progress=progress), None)
    if damaged is not None:
        raise CorruptError(f"{cache.path}: {damaged.line()}")
    chunks = find_chunks(cache, samples)
    progress.start("checking chunks", sum(len(erased.rows) for erased in chunks), "chunks")
    for erased in chunks:
        for chunk in erased.rows:
            commit = erased.group.commit(chunk)
            if commit is not None:
                for name in commit.features:
                    Feature(erased.group, name).items(commit)
            progress.advance(1)
    progress.finish()
    with locked(cache.path):
        if removing_path(cache.path).is_file():  # of another process, since this one looked
            raise UnfinishedError(f"{cache.path}: {INTERRUPTED_REMOVAL}")
        before = read_removed(cache.path, cache.info)
        write_removed(removing_path(cache.path), make_removed(samples, keys, before.salt))


def apply_removal(cache_path: Path, *, progress: Progress | None = None) -> None:
    """Write the tables and chunks again without what `removing.parquet` lists, in the order that a kill may cut.

    Memory: the keys, and a chunk of the features.
    """
    progress = progress or NullProgress()
    pending = read_pending(cache_path)
    assert pending is not None
    with locked(cache_path), writing(cache_path):
        remove_partials(cache_path)
        _write_tables(cache_path, pending, progress)
        cache = Cache(cache_path)
        chunks = find_chunks(cache, pending.rows)
        for modality in cache.info.num_items:
            own = [erased for erased in chunks if erased.group.modality == modality]
            num_items = sum(cache.info.count_items(modality, erased.rows) for erased in own)
            progress.start(f"writing chunks of {noun(modality)}", num_items, noun(modality))
            for erased in own:
                _erase(cache_path, erased, progress)
            progress.finish()


def finish_removal(cache_path: Path) -> None:
    """Record that everything is removed."""
    shutil.rmtree(cache_path / "removing", ignore_errors=True)
    removing_path(cache_path).unlink()
    flush(cache_path)


def _write_tables(cache_path: Path, pending: RemovedSamples, progress: Progress) -> None:
    """Write the table of removed samples, the tables without them, then `cache.json`."""
    info = read_info(cache_path)
    path = removed_path(cache_path)
    before = read_removed_file(path) if path.is_file() else no_removed(pending.salt)
    removed = before.merge(pending)
    write_removed(path, removed)
    record = {"num_samples": len(removed.rows), "digest": digest_file(path)}
    if record != info.removed:
        with scratch_folder(cache_path) as folder:
            parts = _parts_without(Cache(cache_path), pending.rows, folder, progress)
            put_tables(folder, cache_path, parts)
        after = info.next_version(parts, record)
        if is_remembered(info.source, info.index_digest):
            remember(info.source, after.index_digest)
        write_info(cache_path, after)

    # Also those that were replaced before a kill: they hold what is removed.
    for file in find_unlisted(cache_path, read_info(cache_path)):
        file.unlink()


def _parts_without(cache: Cache, removed: Ints, folder: Path, progress: Progress) -> list[Part]:
    """Write the files of tables again that have rows of removed samples; return all parts."""
    edits: dict[str, Callable[[pa.Table, int], pa.Table]] = {
        SAMPLES: partial(without_samples, removed=removed),
        **dict.fromkeys(cache.info.num_items, lambda rows, _: without_items(rows, removed)),
    }
    progress.start("writing tables", len(cache), "samples")
    parts: list[Part] = []
    first_rows = dict.fromkeys(edits, 0)
    for part in cache.info.parts:
        first_sample = first_rows[SAMPLES]
        is_inside = (removed >= first_sample) & (removed < first_sample + part.num_samples)
        tables = dict(part.tables)
        for name, file in part.tables.items():
            if is_inside.any():
                table = cache.rows_of(name)
                tables[name] = rewrite_table(folder, name, table, file, first_rows[name], edits[name])
            first_rows[name] += file.num_rows
        parts.append(Part(digest=part.digest, tables=tables))
        progress.advance(part.num_samples)
    progress.finish()
    return parts


def _erase(cache_path: Path, erased: ErasedChunks, progress: Progress) -> None:
    """Write the chunks of one encoder again, without some items."""
    group = erased.group
    staging = cache_path / "removing" / group.modality / group.name
    leases = Leases(group.path / "chunks")
    for chunk, rows in erased.rows.items():
        leases.acquire(chunk, wait=True)
        try:
            with locked(group.path / "chunks", chunk):
                if not commit_path(staging, chunk).is_file():
                    _stage_chunk(group, staging, chunk, rows)
                if commit_path(staging, chunk).is_file():
                    _move_chunk(group, staging, chunk)
        finally:
            leases.release(chunk)
        progress.advance(group.info.count_items(group.modality, [chunk]))


def _stage_chunk(group: EncoderGroup, staging: Path, chunk: int, rows: Sequence[int]) -> None:
    """Write a chunk without some items below another folder, its commit last; nothing if it is without them."""
    commit = group.commit(chunk)
    committed = {} if commit is None else commit.features
    for name in set(group.features) - committed.keys():  # of a process that was killed before it committed
        for path in chunk_files(group, name, chunk):
            path.unlink(missing_ok=True)
    if commit is None or all(reasons[row] == REMOVED for reasons in commit.failures.values() for row in rows):
        return
    shutil.rmtree(staging, ignore_errors=True)
    staged = replace(group, path=staging)
    files = {}
    for name in committed:
        items = Feature(group, name).items(commit)
        items += [None] * (len(commit.hashes) - len(items))
        for row in rows:
            items[row] = None
        write_atomic(staging / name / "zarr.json", (group.path / name / "zarr.json").read_bytes())
        files[name] = write_feature_chunk(staged, name, chunk, items)
    write_commit(staging, _without(group, commit, rows, files))


def _without(group: EncoderGroup, commit: Commit, rows: Sequence[int], files: dict[str, dict[str, str]]) -> Commit:
    """Return the commit of a chunk without some items."""
    hashes, failures = list(commit.hashes), {name: list(reasons) for name, reasons in commit.failures.items()}
    for row in rows:
        hashes[row] = removed_hash(group.modality)
        for reasons in failures.values():
            reasons[row] = REMOVED
    return replace(commit, index_digest=group.info.index_digest, features=files, hashes=hashes, failures=failures)


def _move_chunk(group: EncoderGroup, staging: Path, chunk: int) -> None:
    """Move a staged chunk to its place: the commit goes first and comes last, as with every rewrite."""
    remove_commit(group.path, chunk)
    commit = commit_path(staging, chunk)
    for path in sorted(staging.rglob("*")):
        place = path.relative_to(staging)
        is_of_feature = path.name == "zarr.json" and len(place.parts) == 2
        if path.is_file() and path != commit and not is_of_feature:
            put_file(path, group.path / place)
    put_file(commit, commit_path(group.path, chunk))
    shutil.rmtree(staging)
