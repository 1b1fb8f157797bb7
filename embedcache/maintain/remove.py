"""Removing samples, as after a takedown or a withdrawn consent, from a cache and from what was made of it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Ints
from embedcache.curate.map import FILE as map_file
from embedcache.errors import DataError, SettingError, UnfinishedError, pluralize
from embedcache.files import AnyPath, is_remote, open_path, remove_partials
from embedcache.locks import locked
from embedcache.maintain.outputs import check_removable, check_run, find_named, remove_from, remove_from_run
from embedcache.maintain.settings import RemoveSettings
from embedcache.modalities import MODALITIES, count_items, list_texts
from embedcache.outputs import removed_table_path
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.projectors.saved import read_run
from embedcache.records import new_record_path, record_stage
from embedcache.search.card import IndexCard, read_card
from embedcache.search.index import build_index
from embedcache.search.settings import IndexSettings
from embedcache.settings import merge_settings
from embedcache.store.cache import Cache
from embedcache.store.layout import INTERRUPTED_REMOVAL, CacheInfo, read_info
from embedcache.store.removal import apply_removal, find_chunks, finish_removal, read_pending, start_removal
from embedcache.store.removed import read_removed
from embedcache.store.rows import find_keys

_REMOVAL = 1
"""Lock of the cache's folder for one removal at a time."""


@dataclass(frozen=True, kw_only=True)
class RemovalPlan:
    """Rows, items and chunks that a removal affects.

    Args:
        rows: rows of the samples that the cache has, ascending.
        num_before: how many of the keys were removed before.
        num_items: modality -> number of items of the samples.
        num_chunks: `modality/encoder` -> number of chunks that are written again.
        outputs: indexes, selections and runs from which the samples are removed.
        is_resumed: whether the same removal was interrupted, and is finished.
    """

    cache: Path
    rows: Ints
    num_before: int
    num_items: dict[str, int]
    num_chunks: dict[str, int]
    outputs: Sequence[Path]
    is_resumed: bool = False

    def lines(self) -> list[str]:
        """Return the plan as lines."""
        items = ", ".join(count_items(count, modality) for modality, count in self.num_items.items())
        known = f"; {pluralize(self.num_before, 'was', 'were')} removed before" if self.num_before else ""
        lines = [f"{self.cache}: {pluralize(len(self.rows), 'sample')} with {items or 'no items'}{known}"]
        lines += ["an interrupted removal of them is finished"] if self.is_resumed else []
        lines += [
            f"{name}: {pluralize(count, 'chunk is', 'chunks are')} written again"
            for name, count in self.num_chunks.items()
        ]
        return [*lines, *(f"{path}: the samples are removed from it too" for path in self.outputs)]


@dataclass(frozen=True, kw_only=True)
class RemovalReport:
    """Result of a removal.

    Args:
        num_samples: samples that were removed from the cache now.
        num_before: samples that had been removed before.
        indexes: index -> recall@10 and number of vectors, before and after.
        entries: selection or run -> number of entries that were removed from it.
        named: export -> number of entries that still name the samples.
    """

    cache: Path
    num_samples: int
    num_before: int
    indexes: dict[str, dict[str, float]] = field(default_factory=dict)
    entries: dict[str, int] = field(default_factory=dict)
    named: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return the result as lines."""
        known = f"; {pluralize(self.num_before, 'was', 'were')} removed before" if self.num_before else ""
        lines = [f"{self.cache}: removed {pluralize(self.num_samples, 'sample')}{known}"]
        lines += [
            f"{path}: {entry['num_vectors']:,} vectors, before {entry['num_vectors_before']:,}; recall@10 "
            f"{entry['recall_at_10']:.3f}, before {entry['recall_at_10_before']:.3f}"
            for path, entry in self.indexes.items()
        ]
        return [
            *lines,
            *(f"{path}: {pluralize(count, 'entry', 'entries')} removed" for path, count in self.entries.items()),
            *(
                f"{path} still names them in {pluralize(count, 'entry', 'entries')}: delete it, and export it again"
                for path, count in self.named.items()
            ),
        ]


def plan_removal(
    cache: AnyPath, keys: str | Sequence[str], settings: RemoveSettings | None = None, **options: Any
) -> RemovalPlan:
    """Return what `remove_samples` would do, which changes nothing; the arguments and errors are its own."""
    settings = merge_settings(RemoveSettings, settings, options)
    path = _local(cache)
    found = _find(path, list_texts(keys, "keys"))
    num_items: dict[str, int] = {}
    num_chunks: dict[str, int] = {}
    if len(found.rows) and not found.is_resumed:
        cache = Cache(path)
        for erased in find_chunks(cache, found.rows):
            num_chunks[f"{erased.group.modality}/{erased.group.name}"] = len(erased.rows)
        for modality in cache.info.num_items:
            of_items = cache.items(modality, columns=["sample"])["sample"].to_numpy()
            num_items[modality] = int(np.isin(of_items, found.rows).sum())
    for index in settings.indexes:
        _open_card(index, path)
    outputs = [*settings.indexes, *settings.selections, *settings.runs]
    for output in settings.selections:
        check_removable(output)
    for export in settings.exports:
        find_named(export, [])
    for run in settings.runs:
        check_run(run, read_info(path))
    return RemovalPlan(
        cache=path,
        rows=found.rows,
        num_before=found.num_before,
        num_items=num_items,
        num_chunks=num_chunks,
        outputs=outputs,
        is_resumed=found.is_resumed,
    )


def remove_samples(
    cache: AnyPath,
    keys: str | Sequence[str],
    settings: RemoveSettings | None = None,
    *,
    progress: AnyProgress = None,
    **options: Any,
) -> RemovalReport:
    """Remove samples from a cache, and from indexes, selections and runs that name them; exports are only searched.

    The rows of all other samples stay. Of a removed one nothing is left in these files: no key, caption, column, path,
    hash or vector, of encoders, views and derived features alike. Its row remains, without features, for the reason
    `removed`. The same call finishes one that was killed. Memory: the keys, and a chunk of the features.

    Args:
        cache: local cache.
        keys: one or several keys of samples; those that were removed before are passed over.
        settings: where else the samples are.
        progress: progress in what is checked and written again: rows of tables, chunks, items, then files.
        options: settings by name, such as `index=["index"]`, which take precedence.

    Raises:
        DataError: the cache has no sample of a key, and none was removed.
        SettingError: the cache is behind a URL, or an index is of another cache.
        UnfinishedError: another removal was interrupted.
        CorruptError: a table or a chunk of these samples is damaged; nothing is changed.
        PathError: a file is none that samples can be removed from.
    """
    settings, shown = merge_settings(RemoveSettings, settings, options), to_progress(progress)
    path = _local(cache)
    keys = list_texts(keys, "keys")
    read_info(path)  # else the lock would make a folder of this name
    with locked(path, _REMOVAL):
        return _remove(path, keys, settings, shown)


def _remove(path: Path, keys: Sequence[str], settings: RemoveSettings, shown: Progress) -> RemovalReport:
    """Remove samples, while no other process removes any from this cache and what was made of it."""
    plan = plan_removal(path, keys, settings)
    cards = {index: _open_card(index, path) for index in settings.indexes}
    request = {"outputs": [str(output) for output in plan.outputs]}
    with record_stage(new_record_path(path, "remove"), "remove", request) as outcome:
        if len(plan.rows):
            if not plan.is_resumed:
                start_removal(Cache(path), plan.rows, _find(path, keys).keys, progress=shown)
            apply_removal(path, progress=shown)
        indexes = {str(index): _purge(path, index, card, shown) for index, card in cards.items()}
        entries = _remove_from_outputs(settings, set(keys), read_info(path), shown)
        named = {str(export): find_named(export, set(keys)) for export in settings.exports}
        report = RemovalReport(
            cache=path,
            num_samples=len(plan.rows),
            num_before=plan.num_before,
            indexes=indexes,
            entries=entries,
            named={export: count for export, count in named.items() if count},
        )
        if len(plan.rows) or any(entries.values()):
            outcome |= {"num_samples": len(plan.rows), "rows": plan.rows.tolist()}
            outcome |= {"index_digest": read_info(path).index_digest, "num_chunks": plan.num_chunks}
            outcome |= {"indexes": indexes, "entries": entries}
    if len(plan.rows):
        finish_removal(path)
    return report


def _local(cache_path: AnyPath) -> Path:
    path = open_path(cache_path)
    if is_remote(path):
        raise SettingError(
            f"{cache_path}: expected a local cache, got a URL; copy it to a disk, remove the samples there, and "
            "replace the copy behind the URL"
        )
    return path


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Samples to remove.

    Args:
        rows: rows of the samples that the cache has, ascending.
        keys: the key of each of `rows`; none if `is_resumed`, as their hashes are stored already.
        num_before: how many of the keys were removed before.
        is_resumed: whether an interrupted removal of exactly these samples is to be finished.
    """

    rows: Ints
    keys: list[str]
    num_before: int
    is_resumed: bool


def _find(cache_path: Path, keys: Sequence[str]) -> _Found:
    """Find the samples of keys.

    A removal that was interrupted may have replaced the keys already, so they are looked for there first.
    """
    unique = list(dict.fromkeys(keys))
    if not unique:
        raise DataError("expected keys of samples to remove, got none")
    pending = read_pending(cache_path)
    if pending is not None:
        rows = [pending.row_of(key) for key in unique]
        found = np.array([row for row in rows if row is not None], np.int64)
        if not np.array_equal(np.sort(found), pending.rows):
            raise UnfinishedError(f"{cache_path}: {INTERRUPTED_REMOVAL}")
        return _Found(rows=pending.rows, keys=[], num_before=len(unique) - len(found), is_resumed=True)
    cache = Cache(cache_path)
    removed = read_removed(cache_path, cache.info)
    found = find_keys(cache, unique)
    unknown = [key for key, row in zip(unique, found.tolist(), strict=True) if row < 0 and not removed.has(key)]
    if unknown:
        raise DataError(
            f"expected keys of {cache_path}, got {len(unknown):,} of {len(unique):,} that it does not have, first "
            f"{unknown[0]!r}; nothing is removed"
        )
    num_before = int((found < 0).sum())
    order = np.argsort(found)[num_before:]
    ordered = [unique[place] for place in order.tolist()]
    return _Found(rows=found[order], keys=ordered, num_before=num_before, is_resumed=False)


def _open_card(index_path: Path, cache_path: Path) -> IndexCard:
    card = read_card(index_path)
    if not read_info(cache_path).has_rows_of(card.index_digest):
        raise SettingError(f"index: expected an index of {cache_path}, got {index_path}, which is of other samples")
    if card.run is not None:
        read_run(index_path / card.run)  # it is needed to fill the index again
    return card


def _purge(cache_path: Path, index_path: Path, card: IndexCard, progress: Progress) -> dict[str, float]:
    """Fill an index again without the removed samples, and delete its map; return recall and size, before and after."""
    remove_partials(index_path)
    (index_path / map_file).unlink(missing_ok=True)  # clusters are named by captions
    settings = IndexSettings(
        modality=MODALITIES[card.modality].name,
        feature=card.feature,
        run=None if card.run is None else index_path / card.run,
        width=card.width,
        min_recall=min(card.min_recall, card.recall_at_10),
    )
    after = build_index(cache_path, index_path, settings, progress=progress)
    return {
        "num_vectors_before": card.num_vectors,
        "num_vectors": after.num_vectors,
        "recall_at_10_before": card.recall_at_10,
        "recall_at_10": after.recall_at_10,
    }


def _remove_from_outputs(
    settings: RemoveSettings, keys: Collection[str], info: CacheInfo, progress: Progress
) -> dict[str, int]:
    """Remove samples from selections and runs; return how many entries of each were removed."""
    outputs, entries = [*_with_removed(settings), *settings.runs], {}
    if outputs:
        progress.start("removing entries", len(outputs), "files")
    for path in outputs:
        entries[str(path)] = remove_from_run(path, keys, info) if path in settings.runs else remove_from(path, keys)
        progress.advance(1)
    progress.finish()
    return entries


def _with_removed(settings: RemoveSettings) -> list[Path]:
    """Return selections, with the table of removed samples that dedup writes beside one."""
    beside = map(removed_table_path, settings.selections)
    return [*settings.selections, *(path for path in beside if path.is_file())]
