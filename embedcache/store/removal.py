"""Removing samples from a cache: their rows stay, so that all others keep theirs, and nothing of their content does.

The tables are written again without it, and replaced by one new `cache.json`, which says that chunks still hold it.
Then each chunk that holds an item of removed samples is written again, of all features, each in one transaction. When
no chunk is left, `cache.json` says so. After a kill, the next removal finishes what is left.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from embedcache.arrays import Ints
from embedcache.errors import CorruptError, PathError
from embedcache.files import locked, remove_file, remove_partials, writing
from embedcache.modalities import noun
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import digest_file
from embedcache.settings import replace_fields
from embedcache.store.cache import Cache
from embedcache.store.commits import REMOVED, find_transactions, finish
from embedcache.store.feature import EncoderGroup, Feature
from embedcache.store.layout import SAMPLES, Part, find_unlisted, removed_path, write_info
from embedcache.store.tables import (
    make_removed,
    put_tables,
    read_removed,
    rewrite_parts,
    scratch_folder,
    without_items,
    without_samples,
    write_removed,
)
from embedcache.store.verify import check_tables
from embedcache.store.writer import chunk_files, rewrite_chunk


def find_chunks(cache: Cache, samples: Ints) -> list[tuple[EncoderGroup, dict[int, list[int]]]]:
    """Return the chunks of all encoders, views and derived features that hold items of some samples.

    Each encoder has chunk -> those items, counted from the start of the chunk.
    """
    found: list[tuple[EncoderGroup, dict[int, list[int]]]] = []
    for modality in cache.info.num_items:
        of_items = cache.items(modality, columns=["sample"])["sample"].to_numpy()
        rows: dict[int, list[int]] = {}
        for row in np.flatnonzero(np.isin(of_items, samples)).tolist():
            chunk, offset = divmod(row, cache.info.chunk_size)
            rows.setdefault(chunk, []).append(offset)
        found += [(group, rows) for group in cache.encoders(modality)]
    return found


def remove_rows(cache: Cache, samples: Ints, keys: Sequence[str], *, progress: Progress | None = None) -> None:
    """Remove samples from the tables, once everything that will be written again is known to be intact.

    Afterwards `erase` removes their items from the chunks. Progress is in rows of the tables, then in chunks.

    Args:
        samples: rows of samples that were not removed before.
        keys: the key of each.

    Raises:
        CorruptError: a table, or a chunk that holds an item of them, is damaged; repair it first.
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
    progress.start("checking chunks", sum(len(rows) for _, rows in chunks), "chunks")
    for group, rows in chunks:
        for commit in filter(None, map(group.commit, rows)):
            for name in commit.features:
                Feature(group, name).items(commit)  # compares them with their checksums
        progress.advance(len(rows))
    progress.finish()

    with locked(cache.path), writing(cache.path), scratch_folder(cache.path) as folder:
        cache = Cache(cache.path)
        before = read_removed(cache.path, cache.info)
        removed = before.merge(make_removed(samples, keys, before.salt))
        parts = _parts_without(cache, samples, folder)
        put_tables(folder, cache.path, parts)
        record = {"num_samples": len(removed.rows), "is_erased": False}
        path = removed_path(cache.path, record)
        write_removed(path, removed)
        write_info(cache.path, cache.info.next_version(parts, {**record, "digest": digest_file(path)}))


def erase(cache_path: Path, *, progress: Progress | None = None) -> None:
    """Remove the items of removed samples from all chunks, and the files of tables before the removal.

    Nothing happens if a removal did it already. Memory: a chunk of the features.
    """
    progress = progress or NullProgress()
    with locked(cache_path), writing(cache_path):
        remove_partials(cache_path)
        cache = Cache(cache_path)
        for file in find_unlisted(cache_path, cache.info):
            remove_file(file)
        if not cache.info.has_interrupted_removal:
            return
        chunks = find_chunks(cache, cache.removed)
        for modality in cache.info.num_items:
            own = [(group, rows) for group, rows in chunks if group.modality == modality]
            num_items = sum(cache.info.count_items(modality, rows) for _, rows in own)
            progress.start(f"writing chunks of {noun(modality)}", num_items, noun(modality))
            for group, rows in own:
                _erase(group, rows, progress)
            progress.finish()
        write_info(cache_path, replace_fields(cache.info, removed={**cache.info.removed, "is_erased": True}))


def _parts_without(cache: Cache, removed: Ints, folder: Path) -> list[Part]:
    """Write the files of tables again that have rows of removed samples; return all parts."""
    changed = {SAMPLES: removed}
    edits: dict[str, Callable[[pa.Table, int], pa.Table]] = {SAMPLES: partial(without_samples, removed=removed)}
    for modality in cache.info.num_items:
        samples = cache.items(modality, columns=["sample"])["sample"].to_numpy()
        changed[modality] = np.flatnonzero(np.isin(samples, removed))
        edits[modality] = lambda rows, _: without_items(rows, removed)
    return list(rewrite_parts(cache.path, cache.info, folder, changed, edits))


def _erase(group: EncoderGroup, rows_by_chunk: Mapping[int, Sequence[int]], progress: Progress) -> None:
    """Write the chunks of one encoder again, without the items of removed samples."""
    for number in find_transactions(group.path):
        finish(group.path, number)
    for chunk, rows in rows_by_chunk.items():
        commit = group.commit(chunk)
        for name in set(group.features) - set(() if commit is None else commit.features):
            for path in chunk_files(group, name, chunk):  # of a process that was killed before it committed
                remove_file(path, missing_ok=True)
        if commit is not None and any(reasons[row] != REMOVED for reasons in commit.failures.values() for row in rows):
            rewrite_chunk(group, chunk)
        progress.advance(group.info.count_items(group.modality, [chunk]))
