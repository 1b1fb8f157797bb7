"""New caches from the samples of others: a subset of one, or several caches of the same encoders as one.

The samples are a source of the new cache, which is indexed like any other; chunks are then read and committed one by
one, so that the same call finishes one that was killed. Nothing is encoded.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Array, Ints, blocks, concatenated_ranges
from embedcache.dataset.selections import read_selection
from embedcache.errors import DataError, UnfinishedError, first_few, pluralize
from embedcache.files import AnyPath, one_or_many, open_path, remove_partials, write_atomic
from embedcache.modalities import MODALITIES
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.provenance import check_same, digest
from embedcache.records import new_record_path, record_stage
from embedcache.registry import unknown_name
from embedcache.settings import replace_fields
from embedcache.sources.open import is_remembered, merged_description, merged_path, remember
from embedcache.store.cache import Cache
from embedcache.store.columns import to_array
from embedcache.store.commits import Commit
from embedcache.store.feature import Feature
from embedcache.store.group import EncoderGroup, create_group, read_feature
from embedcache.store.indexing import index_tables
from embedcache.store.layout import SAMPLES, SUBSET, WITHOUT_REMOVED, Part, checked_fit_path, fit_path
from embedcache.store.producer import FillReport, Output, Verb, fill
from embedcache.store.rows import RowReader, iterate_keys, key_column, match_keys
from embedcache.store.table_writer import SampleTables, TableWriter, hash_texts
from embedcache.store.tables import BLOCK, ITEM_SCHEMAS, Table
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

    def lines(self) -> list[str]:
        """Return the result as lines."""
        missing = [f"left out, because not all of the caches have it: {name}" for name in self.left_out]
        features = ", ".join(self.features) or "no features"
        return [
            f"{self.cache}: {pluralize(self.num_samples, 'sample')}, {features}; copied "
            f"{pluralize(self.copied, 'item')}, reused {self.reused:,}",
            *missing,
        ]


def cut_cache(
    cache: AnyPath,
    selection: Path | str,
    out: AnyPath,
    *,
    features: str | Sequence[str] = (),
    progress: AnyProgress = None,
) -> CopyReport:
    """Write the samples of a selection, with their features, into a cache of its own.

    The new cache has the same source, so that it can be extended with other encoders; samples of the source that were
    not selected are left out until `--extend` adds them, which a cache with removed samples must not do. Memory: some
    90 bytes per sample, and a chunk of each feature.

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
    subset = {"of": cache.info.index_digest, "rows": _digest_rows(samples)}
    description = {**cache.info.source, SUBSET: subset}
    segments = divide_segments(cache, samples, number=None)
    return _copy(segments, description, open_path(out), features, "cut", to_progress(progress))


def merge_caches(
    caches: Sequence[AnyPath],
    out: AnyPath,
    *,
    prefix_keys: bool = False,
    features: str | Sequence[str] = (),
    progress: AnyProgress = None,
) -> CopyReport:
    """Write the samples of several caches, with the features that all of them have, into one.

    Memory: some 90 bytes per sample, and a chunk of each feature.

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
    if prefix_keys and len(set(prefixes)) < len(prefixes):
        raise DataError(
            f"--prefix-keys: expected caches of different names, got {', '.join(prefixes)}; rename a folder"
        )
    if not prefix_keys:
        _check_keys(opened)
    own = [{name: value for name, value in cache.info.source.items() if name != SUBSET} for cache in opened]
    is_one_source = not prefix_keys and all(source == own[0] for source in own)
    segments = []
    for number, (cache, prefix) in enumerate(zip(opened, prefixes, strict=True)):
        source_number = None if is_one_source else number
        segments += divide_segments(cache, _kept_samples(cache), number=source_number, prefix=prefix)
    if not segments:
        names = " and ".join(str(cache.path) for cache in opened)
        raise DataError(f"expected samples to merge, got only removed ones in {names}")
    subset: dict[str, Any] = {"of": [cache.info.index_digest for cache in opened]}
    if prefix_keys:
        subset["prefixes"] = prefixes
    description = {**(own[0] if is_one_source else merged_description(own)), SUBSET: subset}
    return _copy(segments, description, open_path(out), features, "merge", to_progress(progress))


def _check_keys(caches: Sequence[Cache]) -> None:
    """Check that no key is in two caches. Memory: 40 bytes per sample."""
    seen = np.empty(0, np.int64)  # hashes of keys
    for number, cache in enumerate(caches):
        hashes = np.concatenate([hash_texts(keys) for keys in iterate_keys(cache)])
        kept = _kept_samples(cache)
        rows = kept[np.isin(hashes[kept], seen)]
        seen = np.concatenate([seen, hashes[kept]])
        if not len(rows):
            continue
        keys = to_array(key_column([cache]).select(rows), pa.string())
        shared = keys.take(pa.array(np.unique(match_keys(caches[:number], keys)[1])))
        if len(shared):
            shown = first_few(shared.to_pylist(), 3, show=repr)
            raise DataError(
                f"expected keys that no two caches have, got {len(shared):,} of {cache.path} that another has too, "
                f"such as {shown}; begin them with the names of the caches: --prefix-keys"
            )


def _kept_samples(cache: Cache) -> Ints:
    """Return the samples that were not removed, ascending."""
    return np.setdiff1d(np.arange(len(cache)), cache.removed, assume_unique=True)


def _digest_rows(rows: Ints) -> str:
    """Return the SHA-256 of rows as int64, little-endian."""
    return hashlib.sha256(np.ascontiguousarray(rows, "<i8").data).hexdigest()


def _copy(
    segments: "Sequence[SegmentSamples]",
    description: Mapping[str, Any],
    out_path: Path,
    features: str | Sequence[str],
    stage: str,
    progress: Progress,
) -> CopyReport:
    caches = list({id(segment.cache): segment.cache for segment in segments}.values())
    features = [features] if isinstance(features, str) else features
    named, left_out = _choose(caches, features)
    if any(cache.info.removed or cache.info.is_without_removed for cache in caches):
        description = {**description, SUBSET: {**description[SUBSET], WITHOUT_REMOVED: True}}
    source = CopySource(segments, description)
    index_tables(source, out_path, chunk_size=caches[0].info.chunk_size, progress=progress)
    out = Cache(out_path)
    next_step = "give the path of a new folder"
    check_same(f"cache {out_path}", out.info.source, description, next_step=next_step)
    num_samples = sum(len(segment.samples) for segment in segments)
    if out.info.num_samples != num_samples:
        raise DataError(
            f"cache {out_path}: expected the {num_samples:,} samples that it was made of, got "
            f"{out.info.num_samples:,}, as it was extended since; {next_step}"
        )
    if all(is_remembered(cache.info.source, cache.info.index_digest) for cache in caches):
        remember(out.info.source, out.info.index_digest)
    remove_partials(out.path)
    request = {"caches": [str(cache.path) for cache in caches], "features": list(features)}
    with record_stage(new_record_path(out.path, stage), stage, request) as outcome:
        named = [(groups, names) for groups, names in named if groups[0].modality in out.info.num_items]
        reports = [_copy_group(out, segments, groups, names, progress) for groups, names in named]
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
    first = groups[0]
    for group in groups:
        what, step = f"{group.name} of {group.path.parents[1]}", "merge caches of the same encoders, or name others"
        check_same(what, group.fingerprint, first.fingerprint, next_step=f"{step} with --feature")
        for name in names:
            Feature(group, name).require_complete()
            stored = read_feature(group, name).to_json()
            expected = read_feature(first, name).to_json()
            check_same(f"feature {name} of {what}", stored, expected, next_step=f"{step} with --feature")


def _copy_group(
    out: Cache,
    segments: "Sequence[SegmentSamples]",
    groups: Sequence[EncoderGroup],
    names: Sequence[str],
    progress: Progress,
) -> FillReport:
    """Copy features of one encoder."""
    first = groups[0]
    group = create_group(
        out.path, first.modality, first.name, out.info, spec=first.spec, fingerprint=first.fingerprint, view=first.view
    )  # refuses features of one name that were fitted to something else
    if "fit" in first.fingerprint:
        write_atomic(fit_path(group.path), checked_fit_path(first.path, first.fingerprint).read_bytes())
    return fill(group, CopiedFeatures(segments, groups, names), progress=progress)


class CopiedFeatures:
    """Features of one encoder of other caches: their producer. Memory: one chunk of a cache."""

    verb: Verb = "copied"

    def __init__(
        self, segments: "Sequence[SegmentSamples]", groups: Sequence[EncoderGroup], names: Sequence[str]
    ) -> None:
        self.outputs = {name: Output.of(Feature(groups[0], name)) for name in names}
        self._groups = groups
        modality = groups[0].modality
        number_by_cache = {group.path.parents[1]: number for number, group in enumerate(groups)}
        segments = [segment for segment in segments if modality in segment.cache.info.num_items]
        rows = [segment.item_rows(modality) for segment in segments]
        numbers = [number_by_cache[segment.cache.path] for segment in segments]
        self._numbers = np.repeat(numbers, list(map(len, rows)))  # the cache of each item
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


@dataclass(frozen=True, kw_only=True)
class SegmentSamples:
    """Samples of a cache that were indexed together there.

    Args:
        cache: the cache.
        samples: (S,) int64 rows of the sample table, ascending.
        number: number of the cache's source among those of a merged one; None if the new cache has the same source.
        prefix: text to put before the keys.
    """

    cache: Cache
    samples: Ints
    number: int | None
    prefix: str = ""

    def read(self, rows: slice, readers: Mapping[str, RowReader]) -> SampleTables:
        """Return some of the samples with their items, read by readers of the tables of the cache."""
        samples = self.samples[rows]
        found, items = readers[SAMPLES].take(samples), {}
        if self.prefix:
            found = _with_prefix(self.prefix, found, "key")
        for modality in self.cache.info.num_items:
            which, item_rows = concatenated_ranges(*readers[modality].find(samples))
            own = readers[modality].take(item_rows).set_column(0, "sample", pa.array(which))
            if self.number is not None and MODALITIES[modality].kind != "texts":
                own = _with_prefix(merged_path(self.number, ""), own, "path")
            items[modality] = own.select(ITEM_SCHEMAS[modality].names).cast(ITEM_SCHEMAS[modality])
        return SampleTables(found, items)

    def item_rows(self, modality: str) -> Ints:
        """Return the rows of the items of the samples, ascending."""
        of_items = self.cache.items(modality, columns=["sample"])["sample"].to_numpy()
        return np.flatnonzero(np.isin(of_items, self.samples))


def _with_prefix(prefix: str, table: pa.Table, name: str) -> pa.Table:
    """Return a table with a text before those of a column."""
    longer = pc.binary_join_element_wise(prefix, table[name].cast(pa.string()), "")
    return table.set_column(table.schema.get_field_index(name), name, longer)


def divide_segments(cache: Cache, samples: Ints, *, number: int | None, prefix: str = "") -> list[SegmentSamples]:
    """Divide samples of a cache by the segments in which they were indexed: the source has each in its order."""
    bounds = np.cumsum([0, *(part.num_samples for part in cache.info.parts)])
    places = np.searchsorted(samples, bounds)
    return [
        SegmentSamples(cache=cache, samples=samples[start:stop], number=number, prefix=prefix)
        for start, stop in pairwise(places.tolist())
        if stop > start
    ]


class CopySource:
    """The samples of a new cache: those of some segments, one after another; see `index_tables`."""

    def __init__(self, segments: "Sequence[SegmentSamples]", description: Mapping[str, Any]) -> None:
        self._segments, self._description = segments, description

    def describe(self) -> Mapping[str, Any]:
        """Return what the new cache records as its source."""
        return self._description

    def write(self, folder: Path, progress: Progress) -> list[Part]:
        """Write each segment into files of a part. Memory: some blocks of 65,536 samples."""
        readers_of = lru_cache(maxsize=1)(_open_readers)
        progress.start("indexing", sum(len(segment.samples) for segment in self._segments), "samples")
        parts: list[Part] = []
        before = Table(folder, [])
        for number, segment in enumerate(self._segments):
            writer = TableWriter(folder, number, len(before))
            for rows in blocks(len(segment.samples), BLOCK):
                writer.add_tables(segment.read(rows, readers_of(segment.cache)))
                progress.advance(rows.stop - rows.start)
            part = writer.close("", before)
            content = digest({name: file.checksum for name, file in part.tables.items()})
            parts.append(replace_fields(part, digest=content))
            before = Table(folder, [each.tables[SAMPLES] for each in parts])
        progress.finish()
        return parts


def _open_readers(cache: Cache) -> dict[str, RowReader]:
    return {name: RowReader(cache, name, kept_rows=0) for name in (SAMPLES, *cache.info.num_items)}
