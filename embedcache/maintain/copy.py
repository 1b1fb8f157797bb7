"""New caches from the samples of others: a subset of one, or several caches of the same encoders as one.

Tables are copied first; chunks are then read and committed one by one, so that the same call finishes one that was
killed. Nothing is encoded.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Array, Ints, blocks, concatenated_ranges
from embedcache.dataset.selections import read_selection
from embedcache.errors import DataError, SourceError, UnfinishedError, pluralize, summary
from embedcache.files import AnyPath, one_or_many, open_path, remove_partials, write_atomic
from embedcache.modalities import MODALITIES
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.provenance import check_same, digest, new_record_path, record_stage
from embedcache.registry import unknown_name
from embedcache.settings import replace_fields
from embedcache.sources.open import is_remembered, merged_description, merged_path, remember
from embedcache.store.cache import Cache, RowReader
from embedcache.store.commits import Commit
from embedcache.store.feature import EncoderGroup, Feature, create_group, read_feature
from embedcache.store.indexing import index_tables
from embedcache.store.layout import SAMPLES, SUBSET, Part, checked_fit_path, fit_path
from embedcache.store.producer import Output, Verb, fill
from embedcache.store.tables import BLOCK, ITEM_SCHEMAS, SampleTables, Table, TableWriter
from embedcache.store.writer import ChunkFeatures


@dataclass(frozen=True, kw_only=True)
class CopyReport:
    """Result of a copy.

    Args:
        features: `modality/encoder/feature` that the new cache has.
        left_out: features that were not copied, because not all caches have them.
        copied: items in the chunks that were written now, over all features.
        reused: items in the chunks that existed before.
    """

    cache: Path
    num_samples: int
    features: Sequence[str]
    left_out: Sequence[str]
    copied: int
    reused: int

    __repr__ = summary

    def lines(self) -> list[str]:
        """Return the result as lines."""
        missing = [f"left out, because not all of the caches have it: {name}" for name in self.left_out]
        features = ", ".join(self.features) or "no features"
        return [
            f"{self.cache}: {pluralize(self.num_samples, 'sample')}, {features}; copied "
            f"{pluralize(self.copied, 'item')}, reused {self.reused:,}",
            *missing,
        ]


class _Origin(NamedTuple):
    """A cache, the rows of the samples to copy, ascending, and what to put before their keys and paths."""

    cache: Cache
    samples: Ints
    key_prefix: str = ""
    path_prefix: str = ""


def cut_cache(
    cache: AnyPath,
    selection: Path | str,
    out: AnyPath,
    *,
    features: str | Sequence[str] = (),
    progress: AnyProgress = None,
) -> CopyReport:
    """Write the samples of a selection, with their features, into a cache of its own.

    Other encoders are extracted with the new cache as its own source. Memory: some 120 bytes per sample, and a chunk of
    each feature.

    Args:
        cache: path or URL of the cache.
        selection: Parquet file with a column `key`, or text file with one key per line.
        out: new folder, or one in which the same call was interrupted.
        features: features to copy, as `encoder/feature` or `encoder`; none: all.
        progress: shows the number of items.

    Raises:
        DataError: a key of the selection is not in the cache, or it is empty.
        UnfinishedError: a feature has missing chunks.
        FingerprintError: the folder holds another cache.
    """
    cache = Cache(open_path(cache))
    samples = np.setdiff1d(read_selection(selection, [cache]), cache.removed, assume_unique=True)
    if not len(samples):
        raise DataError(f"selection {selection}: expected samples of {cache.path}, got only removed ones")
    rows_digest = hashlib.sha256(np.ascontiguousarray(samples, "<i8").data).hexdigest()
    subset = {"of": cache.info.index_digest, "rows": rows_digest}
    description = {**cache.info.source, SUBSET: subset}
    return _copy([_Origin(cache, samples)], description, open_path(out), features, "cut", to_progress(progress))


def merge_caches(
    caches: Sequence[AnyPath],
    out: AnyPath,
    *,
    prefix_keys: bool = False,
    features: str | Sequence[str] = (),
    progress: AnyProgress = None,
) -> CopyReport:
    """Write the samples of several caches, with the features that all of them have, into one.

    Memory: some 120 bytes per sample, and a chunk of each feature.

    Args:
        caches: caches of the same encoders, in the order of the new rows.
        out: new folder, or one in which the same call was interrupted.
        prefix_keys: begin each key with the name of the folder of its cache and a slash.
        features: features to copy, as `encoder/feature` or `encoder`; none: all that every cache has.
        progress: shows the number of items.

    Raises:
        DataError: two caches have a sample of the same key, one of them is named twice, or all samples were removed.
        FingerprintError: features of one name have different fingerprints; names each field that differs.
        UnfinishedError: a feature has missing chunks.
    """
    opened = [Cache(open_path(path)) for path in one_or_many(caches)]
    if len(opened) < 2:
        raise DataError(f"expected at least two caches to merge, got {len(opened)}")
    prefixes = [f"{cache.path.name}/" if prefix_keys else "" for cache in opened]

    origins = []
    for number, (cache, prefix) in enumerate(zip(opened, prefixes, strict=True)):
        samples = np.setdiff1d(np.arange(len(cache)), cache.removed, assume_unique=True)
        if len(samples):
            origins.append(_Origin(cache, samples, prefix, merged_path(number, "")))
    if not origins:
        names = " and ".join(str(cache.path) for cache in opened)
        raise DataError(f"expected samples to merge, got only removed ones in {names}")

    subset: dict[str, Any] = {"of": [cache.info.index_digest for cache in opened]}
    if prefix_keys:
        subset["prefixes"] = prefixes
    sources = [{name: value for name, value in cache.info.source.items() if name != SUBSET} for cache in opened]
    description = {**merged_description(sources), SUBSET: subset}
    return _copy(origins, description, open_path(out), features, "merge", to_progress(progress))


def _copy(
    origins: Sequence[_Origin],
    description: Mapping[str, Any],
    out_path: Path,
    features: str | Sequence[str],
    stage: str,
    progress: Progress,
) -> CopyReport:
    caches = [origin.cache for origin in origins]
    features = [features] if isinstance(features, str) else features
    named, left_out = _choose(caches, features)
    write = partial(_write_tables, origins)
    index_tables(description, write, out_path, chunk_size=caches[0].info.chunk_size, progress=progress)
    out = Cache(out_path)
    check_same(f"cache {out_path}", out.info.source, description, next_step="give the path of a new folder")
    if all(is_remembered(cache.info.source, cache.info.index_digest) for cache in caches):
        remember(out.info.source, out.info.index_digest)
    remove_partials(out.path)

    request = {"caches": [str(cache.path) for cache in caches], "features": list(features)}
    with record_stage(new_record_path(out.path, stage), stage, request) as outcome:
        named = [(groups, names) for groups, names in named if groups[0].modality in out.info.num_items]
        reports = []
        for groups, names in named:
            first = groups[0]
            group = create_group(
                out.path,
                first.modality,
                first.name,
                out.info,
                spec=first.spec,
                fingerprint=first.fingerprint,
                view=first.view,
            )  # refuses features of one name that were fitted to something else
            if "fit" in first.fingerprint:
                write_atomic(fit_path(group.path), checked_fit_path(first.path, first.fingerprint).read_bytes())
            reports.append(fill(group, _CopiedFeatures(origins, groups, names), progress=progress))
        report = CopyReport(
            cache=out.path,
            num_samples=out.info.num_samples,
            features=[f"{groups[0].modality}/{groups[0].name}/{name}" for groups, names in named for name in names],
            left_out=left_out,
            copied=sum(each.computed for each in reports),
            reused=sum(each.reused for each in reports),
        )
        if report.copied or not named:
            outcome |= {"num_samples": report.num_samples, "features": report.features, "left_out": left_out}
    return report


def _choose(
    caches: Sequence[Cache], features: Sequence[str]
) -> tuple[list[tuple[list[EncoderGroup], list[str]]], list[str]]:
    """Return the folders of each encoder that all caches have, with its features, and the names of those left out.

    Raises:
        UnknownNameError: no cache has a feature that is named.
        FingerprintError: an encoder, or a feature, differs between caches.
    """
    by_name: dict[tuple[str, str], list[EncoderGroup]] = {}
    for cache in caches:
        for modality in cache.info.num_items:
            for group in cache.encoders(modality):
                by_name.setdefault((modality, group.name), []).append(group)
    known = {f"{name}/{each}" for (_, name), groups in by_name.items() for group in groups for each in group.features}
    for feature in features:
        if feature not in known and feature not in {name for _, name in by_name}:
            raise unknown_name("feature", feature, known, where=f"of {caches[0].path}")
    chosen, left_out = [], []
    for (modality, name), groups in sorted(by_name.items()):
        names = {feature for group in groups for feature in group.features}
        names = {each for each in names if not features or name in features or f"{name}/{each}" in features}
        num_with_items = sum(modality in cache.info.num_items for cache in caches)
        common = names.intersection(*(group.features for group in groups)) if len(groups) == num_with_items else set()
        left_out += [f"{modality}/{name}/{feature}" for feature in sorted(names - common)]
        if common:
            _check_same(groups, sorted(common))
            chosen.append((groups, sorted(common)))
    return chosen, left_out


def _check_same(groups: Sequence[EncoderGroup], names: Sequence[str]) -> None:
    next_step = "merge caches of the same encoders, or name others with --feature"
    first = groups[0]
    for group in groups:
        what = f"{group.name} of {group.path.parents[1]}"
        check_same(what, group.fingerprint, first.fingerprint, next_step=next_step)
        for name in names:
            Feature(group, name).require_complete()
            stored, expected = (read_feature(each, name).to_json() for each in (group, first))
            check_same(f"feature {name} of {what}", stored, expected, next_step=next_step)


class _CopiedFeatures:
    """Features of one encoder of other caches: their producer. Memory: one chunk of a cache."""

    verb: Verb = "copied"

    def __init__(self, origins: Sequence[_Origin], groups: Sequence[EncoderGroup], names: Sequence[str]) -> None:
        self.outputs = {name: Output.of(Feature(groups[0], name)) for name in names}
        self._groups = groups
        modality = groups[0].modality
        rows = []
        for origin in origins:
            if modality in origin.cache.info.num_items:
                samples_N = origin.cache.items(modality, columns=["sample"])["sample"].to_numpy()
                rows.append(np.flatnonzero(np.isin(samples_N, origin.samples)))
        self._numbers = np.repeat(np.arange(len(rows)), [len(each) for each in rows])  # the folder of each item
        self._rows = np.concatenate(rows)  # its row there
        self._read = lru_cache(maxsize=1)(self._read_chunk)

    def compute(self, rows: slice) -> ChunkFeatures:
        """Return the features of items as they are in the other caches, checksums compared."""
        items: dict[str, list[Array | None]] = {name: [] for name in self.outputs}
        failures: dict[str, list[str | None]] = {name: [] for name in self.outputs}
        hashes: list[bytes | None] = []
        for number, row in zip(self._numbers[rows].tolist(), self._rows[rows].tolist(), strict=True):
            group = self._groups[number]
            chunk, offset = divmod(row, group.info.chunk_size)
            stored = self._read(number, chunk)
            hashes.append(stored.hashes[offset])
            for name in self.outputs:
                items[name].append(stored.items[name][offset])
                failures[name].append(stored.failures[name][offset])
        return ChunkFeatures(items, hashes, failures)

    def retries(self, _: Commit) -> bool:
        """Return False: what failed in the other caches has failed."""
        return False

    def _read_chunk(self, number: int, chunk: int) -> ChunkFeatures:
        group = self._groups[number]
        commit = group.commit(chunk)
        if commit is None:  # the features were complete
            raise UnfinishedError(
                f"chunk {chunk} of {group.path} is being written again by another process; wait for it, and run the "
                "same command again"
            )
        return ChunkFeatures(
            {name: Feature(group, name).items(commit) for name in self.outputs},
            list(commit.hashes),
            {name: list(commit.failures[name]) for name in self.outputs},
        )


def _write_tables(origins: Sequence[_Origin], folder: Path, progress: Progress) -> list[Part]:
    """Write the samples of each cache into files of a part. Memory: some blocks of 65,536 samples."""
    progress.start("indexing", sum(len(origin.samples) for origin in origins), "samples")
    parts: list[Part] = []
    for number, origin in enumerate(origins):
        before = Table(folder, [part.tables[SAMPLES] for part in parts])
        names = (SAMPLES, *origin.cache.info.num_items)
        readers = {name: RowReader(origin.cache, name, kept_rows=0) for name in names}
        writer = TableWriter(folder, number, len(before))
        for rows in blocks(len(origin.samples), BLOCK):
            writer.add_tables(_read_tables(origin, origin.samples[rows], readers))
            progress.advance(rows.stop - rows.start)

        try:
            part = writer.close("", before)
        except SourceError as error:
            raise DataError(f"{error}; with --prefix-keys each begins with the name of its cache") from error
        content = digest({name: file.checksum for name, file in part.tables.items()})
        parts.append(replace_fields(part, digest=content))
    progress.finish()
    return parts


def _read_tables(origin: _Origin, samples: Ints, readers: Mapping[str, RowReader]) -> SampleTables:
    """Read some samples with their items."""
    items = {}
    for modality in origin.cache.info.num_items:
        which, item_rows = concatenated_ranges(*readers[modality].find(samples))
        table = readers[modality].take(item_rows).set_column(0, "sample", pa.array(which))
        if MODALITIES[modality].kind != "texts":
            table = _with_prefix(origin.path_prefix, table, "path")
        items[modality] = table.select(ITEM_SCHEMAS[modality].names).cast(ITEM_SCHEMAS[modality])
    return SampleTables(_with_prefix(origin.key_prefix, readers[SAMPLES].take(samples), "key"), items)


def _with_prefix(prefix: str, table: pa.Table, name: str) -> pa.Table:
    """Return a table with a prefix before the strings of a column."""
    if not prefix:
        return table
    longer = pc.utf8_replace_slice(table[name], 0, 0, prefix)
    return table.set_column(table.schema.get_field_index(name), name, longer)
