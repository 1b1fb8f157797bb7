"""Removing samples, as after a takedown or a withdrawn consent, from a cache and its indexes.

Selections, runs and exports are only searched. A user deletes those that name a sample, and makes them again.
"""

import json
import tarfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Ints
from embedcache.curate.map import FILE as map_file
from embedcache.errors import DataError, PathError, SettingError, UnfinishedError, pluralize, summary
from embedcache.files import TEXT_ENCODING, AnyPath, is_remote, locked, open_path, reading, remove_partials
from embedcache.maintain.settings import RemoveSettings
from embedcache.modalities import MODALITIES, list_texts
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.provenance import new_record_path, record_stage
from embedcache.runs import Run
from embedcache.search.faiss_index import IndexCard, read_card
from embedcache.search.index import build_index
from embedcache.search.settings import IndexSettings
from embedcache.search.words import FILE as words_file
from embedcache.settings import merge_settings
from embedcache.sources.open import is_remembered, remember
from embedcache.store.cache import Cache, find_keys
from embedcache.store.layout import INTERRUPTED_REMOVAL, read_info
from embedcache.store.removal import erase, find_chunks, remove_rows
from embedcache.store.tables import open_table, read_removed
from embedcache.vectors.opening import GET_AGAIN

if TYPE_CHECKING:
    from embedcache.options import RemoveOptions

_REMOVAL = 1
"""Lock of the cache's folder for one removal at a time."""
_KEY_COLUMNS = ("key", "kept_key")
"""Columns that name samples. The table of duplicates that `curate dedup` removes also names the samples it keeps."""


@dataclass(frozen=True, kw_only=True)
class RemovalReport:
    """Result of a removal, or of a plan.

    Args:
        cache: the cache.
        rows: rows of the samples that the cache has, ascending.
        num_before: number of the keys that had been removed earlier.
        num_chunks: `modality/encoder` -> number of chunks that are written again.
        named: selection, run or export -> number of entries that name the samples, if there are any.
        is_resumed: whether the same removal was interrupted, and is finished.
        indexes: index that was filled again -> recall@10 and number of vectors, before and after.
    """

    cache: Path
    rows: Ints
    num_before: int
    num_chunks: Mapping[str, int]
    named: Mapping[str, int]
    is_resumed: bool
    indexes: dict[str, dict[str, float]] = field(default_factory=dict)

    __repr__ = summary

    def lines(self) -> list[str]:
        """Return the report as lines."""
        lines = [f"{self.cache}: {pluralize(len(self.rows), 'sample')}"]
        if self.num_before:
            lines.append(f"{pluralize(self.num_before, 'sample was', 'samples were')} removed before")
        if self.is_resumed:
            lines.append("an interrupted removal of them is finished")

        for name, count in self.num_chunks.items():
            lines.append(f"{name}: {pluralize(count, 'chunk is', 'chunks are')} written again")
        for path, index in self.indexes.items():
            lines.append(
                f"{path}: {index['num_vectors']:,} vectors, before {index['num_vectors_before']:,}; recall@10 "
                f"{index['recall_at_10']:.3f}, before {index['recall_at_10_before']:.3f}"
            )
        for path, count in self.named.items():
            lines.append(f"{path} names them in {pluralize(count, 'entry', 'entries')}: delete it, and make it again")
        return lines


def plan_removal(
    cache: AnyPath,
    keys: str | Sequence[str],
    settings: RemoveSettings | None = None,
    **options: Unpack["RemoveOptions"],
) -> RemovalReport:
    """Return a report of what `remove_samples` would do, and change nothing. Arguments and errors are the same.

    Example:
        >>> report = embedcache.plan_removal("cache", ["00003-zebra", "00000"])
        >>> report.rows.tolist(), report.num_chunks["image/open_toy"]
        ([0, 3], 1)
    """
    settings = merge_settings(RemoveSettings, settings, options)
    path = _local(cache)
    keys = list(dict.fromkeys(list_texts(keys, "keys")))
    if not keys:
        raise DataError("expected keys of samples to remove, got none")

    rows_K, is_resumed = _find_rows(path, keys)
    rows = np.sort(rows_K[rows_K >= 0])
    num_chunks: dict[str, int] = {}
    if len(rows) and not is_resumed:
        for group, chunks in find_chunks(Cache(path), rows):
            num_chunks[f"{group.modality}/{group.name}"] = len(chunks)

    # Faults of indexes and outputs are found before anything is removed.
    for index in settings.indexes:
        _open_card(index, path)
    counts = {}
    for output in settings.outputs:
        if count := count_named(output, keys):
            counts[str(output)] = count
    return RemovalReport(
        cache=path,
        rows=rows,
        num_before=len(keys) - len(rows),
        num_chunks=num_chunks,
        named=counts,
        is_resumed=is_resumed,
    )


def remove_samples(
    cache: AnyPath,
    keys: str | Sequence[str],
    settings: RemoveSettings | None = None,
    *,
    progress: AnyProgress = None,
    **options: Unpack["RemoveOptions"],
) -> RemovalReport:
    """Remove samples from a cache and its indexes, and list the selections, runs and exports that name them.

    The rows of all other samples stay. A removed sample leaves no key, caption, column, path, hash or vector in these
    files, of encoders, views and derived features alike. Its row remains, without features, for the reason `removed`.
    The same call finishes one that was killed. Memory: the keys, and a chunk of the features.

    Args:
        cache: local cache.
        keys: one or several keys of samples; keys that were removed earlier are passed over.
        settings: indexes, and other files that may name the samples.
        progress: progress in rows of tables, chunks and items that are checked and written again, then in files.
        options: settings by name, such as `index=["index"]`, which take precedence.

    Raises:
        DataError: the cache has no sample of a key, and none was removed.
        SettingError: the cache is behind a URL, or an index is of another cache.
        UnfinishedError: another removal was interrupted.
        CorruptError: a table or a chunk of these samples is damaged; nothing is changed.
        PathError: an index or a file to search does not exist, or is not one.

    Example:
        >>> report = embedcache.remove_samples("cache", "00003-zebra")
        >>> report.rows.tolist()
        [3]
        >>> str(embedcache.Cache("cache").feature("image", "open_toy/cls").failures[3])
        'removed'
    """
    settings = merge_settings(RemoveSettings, settings, options)
    shown = to_progress(progress)
    path = _local(cache)
    keys = list_texts(keys, "keys")

    # Without a cache at this path, the lock would make a folder.
    read_info(path)
    with locked(path, _REMOVAL):
        return _remove(path, keys, settings, shown)


def _remove(path: Path, keys: Sequence[str], settings: RemoveSettings, progress: Progress) -> RemovalReport:
    """Remove samples, while no other process removes any from this cache and its indexes."""
    report = plan_removal(path, keys, settings)
    cards = {index: _open_card(index, path) for index in settings.indexes}
    request = {"indexes": list(map(str, settings.indexes))}
    with record_stage(new_record_path(path, "remove"), "remove", request) as outcome:
        if len(report.rows) and not report.is_resumed:
            opened = Cache(path)
            removed_keys = opened.column("key").take(pa.array(report.rows)).to_pylist()
            remove_rows(opened, report.rows, removed_keys, progress=progress)

        # The remaining rows are of a source that this user indexed.
        info = read_info(path)
        if any(is_remembered(info.source, version.index_digest) for version in info.earlier_versions):
            remember(info.source, info.index_digest)

        # The tables no longer have the samples, so indexes that are filled now do not, either.
        erase(path, progress=progress)
        for index, card in cards.items():
            report.indexes[str(index)] = _purge(path, index, card, progress)

        if len(report.rows):
            outcome |= {"num_samples": len(report.rows), "rows": report.rows.tolist()}
            outcome |= {"index_digest": read_info(path).index_digest, "num_chunks": report.num_chunks}
            outcome |= {"indexes": report.indexes}
    return report


def _local(cache_path: AnyPath) -> Path:
    path = open_path(cache_path)
    if is_remote(path):
        raise SettingError(
            f"{cache_path}: expected a local cache, got a URL; copy it to a disk, remove the samples there, and "
            "replace the copy behind the URL"
        )
    return path


def _find_rows(cache_path: Path, keys: Sequence[str]) -> tuple[Ints, bool]:
    """Return the row of each key, and whether an interrupted removal of these samples is to be finished.

    The row of a sample that was removed earlier is -1. After an interrupted removal, the table of removed samples has
    the rows.
    """
    cache = Cache(cache_path)
    removed = read_removed(cache_path, cache.info)
    if cache.info.has_interrupted_removal:
        removed_rows = list(map(removed.row_of, keys))
        if None in removed_rows:
            raise UnfinishedError(f"{cache_path}: {INTERRUPTED_REMOVAL}")
        return np.array(removed_rows, np.int64), True

    rows = find_keys(cache, keys)
    unknown = []
    for key, row in zip(keys, rows.tolist(), strict=True):
        if row < 0 and removed.row_of(key) is None:
            unknown.append(key)
    if unknown:
        raise DataError(
            f"expected keys of {cache_path}, got {len(unknown):,} of {len(keys):,} that it does not have, first "
            f"{unknown[0]!r}; nothing is removed"
        )
    return rows, False


def _open_card(index_path: Path, cache_path: Path) -> IndexCard:
    card = read_card(index_path)
    if not read_info(cache_path).has_rows_of(card.index_digest):
        raise SettingError(f"index: expected an index of {cache_path}, got {index_path}, which is of other samples")

    # The index is filled again with its run, so a missing run is refused before anything is removed.
    if card.run is not None:
        Run.open(index_path / card.run)
    return card


def _purge(cache_path: Path, index_path: Path, card: IndexCard, progress: Progress) -> dict[str, float]:
    """Fill an index again without the removed samples. Return recall and size, before and after.

    Its map and words are deleted, because clusters and words come from captions.
    """
    remove_partials(index_path)
    for name in (map_file, words_file):
        (index_path / name).unlink(missing_ok=True)

    # The recall of the index as it was must still be reached, also if it was below the bound.
    settings = IndexSettings(
        modality=MODALITIES[card.modality].name,
        feature=card.feature,
        run=None if card.run is None else index_path / card.run,
        width=card.width,
        min_recall=min(card.min_recall, card.recall_at_10),
    )
    new_card = build_index(cache_path, index_path, settings, progress=progress)
    return {
        "num_vectors_before": card.num_vectors,
        "num_vectors": new_card.num_vectors,
        "recall_at_10_before": card.recall_at_10,
        "recall_at_10": new_card.recall_at_10,
    }


def count_named(path: Path, keys: Collection[str]) -> int:
    """Count how often a file or folder names samples: in Parquet, lists of keys or WebDataset shards.

    Raises:
        PathError: there are no such files.
        CorruptError: a file is damaged.
    """
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    readable = [file for file in files if file.suffix in _READERS and file.is_file()]
    if not readable:
        kinds = ", ".join(_READERS)
        raise PathError(f"{path}: expected a selection, run or export with files of {kinds}, got none; check the path")

    sought_keys = pa.array(sorted(keys), pa.string())
    count = 0
    for file in readable:
        with reading(file, GET_AGAIN):
            for names in _READERS[file.suffix](file):
                # The sum of an empty batch is null.
                count += pc.sum(pc.is_in(names, value_set=sought_keys)).as_py() or 0
    return count


def _read_table(path: Path) -> Iterable[pa.Array]:
    with open_table(path) as file:
        columns = [name for name in _KEY_COLUMNS if name in file.schema_arrow.names]
        for batch in file.iter_batches(columns=columns, use_threads=False):
            for column in batch.columns:
                yield column.cast(pa.string())


def _read_list(path: Path) -> Iterable[pa.Array]:
    yield pa.array(path.read_text(TEXT_ENCODING).splitlines(), pa.string())


def _read_shard(path: Path) -> Iterable[pa.Array]:
    """Read the keys of a shard, each in the `.json` of its sample."""
    keys = []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            # Folders and links have no content.
            file = tar.extractfile(member) if member.name.endswith(".json") else None
            record = json.load(file) if file is not None else None
            if isinstance(record, dict):
                keys.append(str(record.get("key")))
    yield pa.array(keys, pa.string())


_READERS: Mapping[str, Callable[[Path], Iterable[pa.Array]]] = {
    ".parquet": _read_table,
    ".txt": _read_list,
    ".tar": _read_shard,
}
"""Suffix -> function that reads the keys in a file."""
