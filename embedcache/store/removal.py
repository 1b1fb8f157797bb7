"""Removing samples from a cache: their rows stay, so that all others keep theirs, but their content is erased.

The tables are written again without the content. One new `cache.json` replaces them, and says that chunks still contain
it. Then each chunk with an item of removed samples is written again, for all features, each in one transaction. After
the last chunk, `cache.json` says that the content is erased. After a kill, the next removal finishes the work.
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
from embedcache.store.commits import REMOVED, Commit, find_transactions, finish
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
    """Return the chunks of all encoders, views and derived features that contain items of some samples.

    Each encoder has chunk -> the items, counted from the start of the chunk.
    """
    chunks: list[tuple[EncoderGroup, dict[int, list[int]]]] = []
    for modality in cache.info.num_items:
        item_samples = cache.items(modality, columns=["sample"])["sample"].to_numpy()
        rows: dict[int, list[int]] = {}
        for row in np.flatnonzero(np.isin(item_samples, samples)).tolist():
            chunk, offset = divmod(row, cache.info.chunk_size)
            rows.setdefault(chunk, []).append(offset)

        # Chunks have the same rows in all encoders of a modality.
        for group in cache.encoders(modality):
            chunks.append((group, rows))
    return chunks


def remove_rows(cache: Cache, samples: Ints, keys: Sequence[str], *, progress: Progress | None = None) -> None:
    """Remove samples from the tables, after a check that all files that will be written again are intact.

    Afterwards `erase` removes their items from the chunks. Progress is in rows of the tables, then in chunks.

    Args:
        samples: rows of samples that were not removed before.
        keys: the key of each.

    Raises:
        CorruptError: a table, or a chunk that contains one of their items, is damaged; repair it first.
        PathError: another process writes to the cache, or left an unfinished file on another machine.
    """
    remove_partials(cache.path)
    unfinished = next(cache.path.rglob("*.partial"), None)
    if unfinished is not None:
        raise PathError(
            f"{unfinished}: expected no unfinished files, got that of a process that runs, or was killed on another "
            "machine; wait for it, or delete the file"
        )

    # Damage must be found now: a chunk that cannot be read could not be written again without the items.
    progress = progress or NullProgress()
    damage = next(check_tables(cache, progress=progress), None)
    if damage is not None:
        raise CorruptError(f"{cache.path}: {damage.line()}")
    _check_chunks(find_chunks(cache, samples), progress)

    with locked(cache.path), writing(cache.path), scratch_folder(cache.path) as folder:
        cache = Cache(cache.path)
        earlier = read_removed(cache.path, cache.info)
        removed = earlier.merge(make_removed(samples, keys, earlier.salt))
        parts = _parts_without(cache, samples, folder)
        put_tables(folder, cache.path, parts)

        # The samples are removed as soon as cache.json, the last file, is replaced.
        record = {"num_samples": len(removed.rows), "is_erased": False}
        path = removed_path(cache.path, record)
        write_removed(path, removed)
        write_info(cache.path, cache.info.next_version(parts, {**record, "digest": digest_file(path)}))


def _check_chunks(chunks: Sequence[tuple[EncoderGroup, Mapping[int, Sequence[int]]]], progress: Progress) -> None:
    """Compare all features of some chunks with their checksums."""
    num_chunks = 0
    for _, rows in chunks:
        num_chunks += len(rows)

    progress.start("checking chunks", num_chunks, "chunks")
    for group, rows in chunks:
        for commit in filter(None, map(group.commit, rows)):
            for name in commit.features:
                Feature(group, name).items(commit)  # compares the rows with their checksums
        progress.advance(len(rows))
    progress.finish()


def erase(cache_path: Path, *, progress: Progress | None = None) -> None:
    """Remove the items of removed samples from all chunks, and the files of tables before the removal.

    Nothing happens if an earlier removal has erased them. Memory: a chunk of the features.
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
            modality_chunks = [(group, rows) for group, rows in chunks if group.modality == modality]
            num_items = sum(cache.info.count_items(modality, rows) for _, rows in modality_chunks)
            progress.start(f"writing chunks of {noun(modality)}", num_items, noun(modality))
            for group, rows in modality_chunks:
                _erase(group, rows, progress)
            progress.finish()

        # Written last: after a kill, the next removal erases the remaining chunks.
        write_info(cache_path, replace_fields(cache.info, removed={**cache.info.removed, "is_erased": True}))


def _parts_without(cache: Cache, removed: Ints, folder: Path) -> list[Part]:
    """Write the files of tables again that have rows of removed samples, and return all parts."""
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

        # A process that was killed before it committed may have left files with the content.
        for name in set(group.features) - set(() if commit is None else commit.features):
            for path in chunk_files(group, name, chunk):
                remove_file(path, missing_ok=True)

        if commit is not None and not _is_erased(commit, rows):
            rewrite_chunk(group, chunk)
        progress.advance(group.info.count_items(group.modality, [chunk]))


def _is_erased(commit: Commit, rows: Sequence[int]) -> bool:
    """Return whether some rows of a chunk are removed from all features."""
    for reasons in commit.failures.values():
        for row in rows:
            if reasons[row] != REMOVED:
                return False
    return True
