"""Numbering: writes every sample and item of a source down, in row order, before a model runs."""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from embedcache.errors import FingerprintError, PathError, SettingError, SourceError
from embedcache.files import (
    LOCK,
    disk_errors,
    flush,
    is_remote,
    locked,
    make_folder,
    partial_path,
    put_file,
    remove_folder,
)
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import check_same, read_json, write_json
from embedcache.sources.base import Sample, Source
from embedcache.sources.files import wrap_io_errors
from embedcache.store.cache import Cache
from embedcache.store.changes import Changes, batches, changed, find_changes
from embedcache.store.layout import (
    DEFAULT_CHUNK_SIZE,
    CacheInfo,
    Earlier,
    Part,
    index_digest_of,
    info_path,
    items_path,
    read_info,
    samples_path,
    write_info,
)
from embedcache.store.tables import ITEM_SCHEMAS, TableWriter, digest_input

_OURS = {LOCK, "cache.json", "mending.json", "samples.parquet", *ITEM_SCHEMAS}


def index(
    source: Source,
    cache_path: Path,
    *,
    chunk_size: int | None = None,
    extends: bool = False,
    mends: bool = False,
    progress: Progress | None = None,
) -> CacheInfo:
    """Number a source into a new cache, or check that a cache still numbers this source.

    Rows never change: samples that are added later get the rows behind. Memory: the keys while tables are written, a
    batch while a cache is checked.

    Args:
        source: where the samples come from.
        cache_path: a folder that is new, empty, or a cache of this source; a cache without features is made anew.
        chunk_size: items in a chunk; None is the cache's own, or 2,048 for a new one.
        extends: take in samples that the cache does not number yet.
        mends: take in other bytes of images that no feature was made from, since all encoders failed on them.
        progress: told the number of samples.

    Raises:
        PathError: the folder holds something else, or a file is in the way.
        FingerprintError: the cache numbers another source, or the source changed since, or the chunk size differs.
        SettingError: a chunk of no item.
        SourceError: no sample, a key that stands twice, or columns of mixed types.
    """
    progress = progress or NullProgress()
    if chunk_size is not None and chunk_size < 1:
        raise SettingError(f"chunk size is {chunk_size}; it must be at least 1")
    with wrap_io_errors(cache_path):
        is_there = info_path(cache_path).is_file()
        if not is_there:
            make_folder(cache_path)
            _refuse_foreign(cache_path)
    if is_there:
        info = read_info(cache_path)
        if _is_begun(cache_path):
            _check_chunk_size(cache_path, info, chunk_size)
        if _is_as_asked(info, chunk_size) and _is_unchanged(source, cache_path, info, progress):
            return info
    with locked(cache_path), disk_errors(cache_path):  # anew from here: another process may have been before us
        if not info_path(cache_path).is_file():
            return _create(source, cache_path, chunk_size or DEFAULT_CHUNK_SIZE, progress)
        info = read_info(cache_path)
        if _is_begun(cache_path):
            _check_chunk_size(cache_path, info, chunk_size)
            return _take_in(source, cache_path, extends=extends, may_mend=mends, progress=progress)
        if _is_as_asked(info, chunk_size) and _is_unchanged(source, cache_path, info, progress):
            return info
        _forget(cache_path)
        return _create(source, cache_path, chunk_size or info.chunk_size, progress)


def _is_begun(cache_path: Path) -> bool:
    return any(cache_path.glob("*/*/chunks/*.parquet"))


def _is_as_asked(info: CacheInfo, chunk_size: int | None) -> bool:
    return chunk_size in (None, info.chunk_size)


def _is_unchanged(source: Source, cache_path: Path, info: CacheInfo, progress: Progress) -> bool:
    """Say whether a cache numbers what a source has now, and nothing is half done there."""
    if _mending_path(cache_path).is_file():
        return False
    if len(info.all_parts) == 1:
        return _digest(source, info, progress) == info.index_digest
    try:
        changes = find_changes(cache_path, info, source.samples(), on_new=_ignore, progress=progress)
    except FingerprintError:
        return False  # it is told once nobody else is at work here
    return not changes.num_new and _has_digests(info, changes)


def _forget(cache_path: Path) -> None:
    """Take a cache without a feature, a first try with a mistake in it, away: its `cache.json` first."""
    info_path(cache_path).unlink()
    flush(cache_path)
    for group in cache_path.glob("*/*/zarr.json"):
        remove_folder(group.parent)


def _create(source: Source, cache_path: Path, chunk_size: int, progress: Progress) -> CacheInfo:
    index_digest = hashlib.sha256()
    with _scratch(cache_path) as folder:
        writer = TableWriter(folder, chunk_size)
        progress.start("indexing", 0, "samples")
        for batch in batches(source.samples()):
            index_digest.update(digest_input(batch))
            writer.add(batch)
            progress.advance(len(batch))
        progress.finish()
        if not writer.num_samples:
            raise SourceError(
                f"no sample found in {source.describe().get('path', 'the source')}; "
                "give a source that holds images or captions"
            )
        info = CacheInfo(
            chunk_size=chunk_size,
            source=dict(source.describe()),
            index_digest=index_digest.hexdigest(),
            num_samples=writer.num_samples,
            num_items=writer.close(),
            tables=writer.digests,
        )
        _put_tables(folder, cache_path)
    write_info(cache_path, info)
    return info


def _check_chunk_size(cache_path: Path, info: CacheInfo, chunk_size: int | None) -> None:
    if chunk_size is not None:
        check_same(
            f"cache {cache_path}",
            {"chunk_size": info.chunk_size},
            {"chunk_size": chunk_size},
            next_step="leave --chunk-size out, or extract into a new folder",
        )


def _digest(source: Source, info: CacheInfo, progress: Progress) -> str:
    index_digest = hashlib.sha256()
    progress.start("checking samples", info.num_samples, "samples")
    for batch in batches(source.samples()):
        index_digest.update(digest_input(batch))
        progress.advance(len(batch))
    progress.finish()
    return index_digest.hexdigest()


def _refuse_foreign(cache_path: Path) -> None:
    entries = cache_path.iterdir() if cache_path.is_dir() else ()  # an object store has no empty folders
    names = (entry.name for entry in entries)
    foreign = sorted(name for name in names if name not in _OURS and not name.endswith(".partial"))
    if foreign:
        raise PathError(
            f"{cache_path} is not a cache and not empty: it holds {', '.join(foreign[:3])}; "
            "give the path of a new folder"
        )


def _take_in(source: Source, cache_path: Path, *, extends: bool, may_mend: bool, progress: Progress) -> CacheInfo:
    """Compare a source with a cache that has features, and take in what is allowed to have changed."""
    info = read_info(cache_path)  # anew: another process may have taken the same in before we got the lock
    with _scratch(cache_path) as folder:
        longer = _Longer(cache_path, info, folder / "longer")
        on_new = longer.add if extends else _ignore
        changes = find_changes(cache_path, info, source.samples(), on_new=on_new, progress=progress)
        mends = bool(changes.moved) or _is_half_mended(cache_path, info, changes)
        if not (changes.num_new or mends):
            _check_columns(cache_path, info, changes)
            _mending_path(cache_path).unlink(missing_ok=True)
            return info
        _check_allowed(cache_path, info, changes, extends=extends, mends=may_mend)
        tables, num_items, digests = longer.close()
        if mends:
            write_json(_mending_path(cache_path), list(changes.digests))
            writer = TableWriter(folder / "moved", info.chunk_size)
            writer.copy(tables, info.num_samples + changes.num_new, changes.moved)
            tables, num_items, digests = folder / "moved", writer.close(), writer.digests
        if tables != cache_path:
            _put_tables(tables, cache_path)
    parts = [replace(part, digest=now) for part, now in zip(info.all_parts, changes.digests, strict=True)]
    if changes.num_new:
        parts.append(Part(num_samples=changes.num_new, digest=changes.new_digest))
    info = replace(
        info,
        index_digest=index_digest_of(parts),
        num_samples=info.num_samples + changes.num_new,
        num_items=num_items,
        tables=digests,
        parts=tuple(parts),
        earlier=(*info.earlier, Earlier(index_digest=info.index_digest, num_items=info.num_items)),
    )
    write_info(cache_path, info)
    _mending_path(cache_path).unlink(missing_ok=True)
    return info


def _mending_path(cache_path: Path) -> Path:
    return cache_path / "mending.json"


def _is_half_mended(cache_path: Path, info: CacheInfo, changes: Changes) -> bool:
    """Say whether a process was killed between the tables with other bytes in them and `cache.json`."""
    path = _mending_path(cache_path)
    return not _has_digests(info, changes) and path.is_file() and read_json(path) == list(changes.digests)


def _has_digests(info: CacheInfo, changes: Changes) -> bool:
    return list(changes.digests) == [part.digest for part in info.all_parts]


class _Longer:
    """The tables of a cache with more samples behind; written once there is one."""

    def __init__(self, cache_path: Path, info: CacheInfo, folder: Path) -> None:
        self._cache_path, self._info, self._folder = cache_path, info, folder
        self._writer: TableWriter | None = None

    def add(self, batch: list[Sample]) -> None:
        if self._writer is None:
            self._writer = TableWriter(self._folder, self._info.chunk_size)
            self._writer.copy(self._cache_path, self._info.num_samples, {})
        self._writer.add(batch)

    def close(self) -> tuple[Path, Mapping[str, int], Mapping[str, str]]:
        """Give the folder of the tables, the cache itself where nothing was added; their items; and their digests."""
        if self._writer is None:
            return self._cache_path, self._info.num_items, self._info.tables
        return self._folder, self._writer.close(), self._writer.digests


def _ignore(_: list[Sample]) -> None:
    """Leave new samples alone: they are counted, and refused."""


def _check_columns(cache_path: Path, info: CacheInfo, changes: Changes) -> None:
    if not _has_digests(info, changes):
        raise changed(cache_path, info, "columns or languages of its samples differ")


def _check_allowed(cache_path: Path, info: CacheInfo, changes: Changes, *, extends: bool, mends: bool) -> None:
    if changes.num_new and not extends:
        step = "number them behind the others with --extend, or extract into a new folder"
        raise changed(cache_path, info, f"it has {changes.num_new:,} more", next_step=step)
    used = next(_used_rows(cache_path, info, sorted(changes.moved)), None)
    if used is not None:
        path = changes.moved[used].path
        reason = f"other bytes in {len(changes.moved):,} of its images, such as {path} in row {used:,}"
        raise changed(cache_path, info, reason, next_step="put the old files back, or extract into a new folder")
    if changes.moved and not mends:
        reason = f"{len(changes.moved):,} of its failed images have other bytes now"
        raise changed(cache_path, info, reason, next_step="take them in with --retry-failed")


def _used_rows(cache_path: Path, info: CacheInfo, rows: Sequence[int]) -> Iterator[int]:
    """Keep the images that any feature was made from. Memory: the commits of one chunk."""
    groups = Cache(cache_path).encoders("image")
    for chunk, some in groupby(rows, key=lambda row: row // info.chunk_size):
        commits = [commit for group in groups if (commit := group.commit(chunk)) is not None]
        failures = [reasons for commit in commits for reasons in commit.failures.values()]
        yield from (row for row in some if any(reasons[row % info.chunk_size] is None for reasons in failures))


@contextmanager
def _scratch(cache_path: Path) -> Iterator[Path]:
    """Give a folder on this machine for tables in the making: beside the cache's where it can be."""
    if is_remote(cache_path):
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
        return
    folder = partial_path(cache_path / "indexing")
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_tables(folder: Path, cache_path: Path) -> None:
    put_file(samples_path(folder), samples_path(cache_path))
    for modality in ITEM_SCHEMAS:
        put_file(items_path(folder, modality), items_path(cache_path, modality))
