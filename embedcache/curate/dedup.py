"""Deduplication of a cache: compare its items, choose a cosine, and write which samples stay."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import pyarrow as pa

from embedcache.arrays import Array, Bools, Floats, Ints, distinct
from embedcache.curate.copies import Copies, choose_modality, compare, find_copies
from embedcache.curate.pixels import NO_DISTANCE, SAME_PICTURE, hash_distances, open_images
from embedcache.curate.settings import DedupSettings
from embedcache.dataset import keytable
from embedcache.dataset.inputs import InputFeature, open_input
from embedcache.dataset.selections import Selection, read_selection, write_selection
from embedcache.dataset.vectors import Vectors
from embedcache.errors import DataError, SettingError, pluralize, summary
from embedcache.files import AnyPath
from embedcache.modalities import count_items
from embedcache.neighbors.pairs import PairCollector, Recall, cosine_limit, measure_recall, pair_keys
from embedcache.progress import AnyProgress, NullProgress, Progress, to_progress
from embedcache.provenance import check_output, check_table_output, digest
from embedcache.registry import unknown_name
from embedcache.settings import merge_settings
from embedcache.store.cache import Cache, keys_at

if TYPE_CHECKING:
    from embedcache.options import DedupOptions

LEVELS = (0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995)  # cosines to choose from
MAX_PAIRS = 20_000_000
CANDIDATE_COSINES = (0.7, 0.8)  # images of closer pairs are read again; the second applies if there are too many
_IS_NUMBER = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
_COPY = 2.0  # sorts above every cosine

PAIR = np.dtype([("left", "i8"), ("right", "i8"), ("cosine", "f4"), ("distance", "i2")])
"""A unique pair of contents, the smaller number first, with its cosine and its hash distance or `NO_DISTANCE`."""

REMOVED = np.dtype([("sample", "i8"), ("kept", "i8"), ("cosine", "f4"), ("distance", "i2"), ("is_copy", "?")])
"""A removed sample and the kept sample that it duplicates, in row order.

The cosine compares the two. If a sample has several items, it is their smallest cosine. The distance is `NO_DISTANCE`
for equal bytes, and if no pixels were compared. `is_copy` says whether each of its items has the bytes, text or pixels
of an item that stays.
"""


@dataclass(frozen=True, kw_only=True)
class DedupLevel:
    """Numbers of items that deduplication at one cosine would remove."""

    cosine: float | None  # limit, None for copies only
    num_near: int | None  # items with another above the limit, equal bytes counted once; None for copies only
    num_gone: int | None  # samples that would be removed; None if there are too many pairs


@dataclass(frozen=True, kw_only=True)
class NearDuplicates:
    """Near-duplicates among N items."""

    pairs: Array  # (A,) of dtype `PAIR`, with cosines of at least `limit`
    limit: float  # above the requested cosine if there were too many pairs, infinite if there still are too many
    highest: Floats  # (N,) each item's largest cosine to another item; -2 if it was compared with none
    num_clusters: int  # 1 if all pairs were compared
    complete: float  # fraction of items whose near borders were all crossed; 1 means that no pair is missing
    recall: Recall | None  # None if all pairs were compared


@dataclass(frozen=True, kw_only=True)
class DedupAnalysis:
    """The items of a cache, compared with each other."""

    cache: Cache
    feature: InputFeature
    samples: Ints  # compared samples, ascending, including samples without a usable item
    copies: Copies
    order: Ints  # samples in the order of the keep rule
    near: NearDuplicates | None  # among the contents; None if only equal bytes were searched
    settings: DedupSettings = field(default_factory=DedupSettings)

    def removed(self, cosine: float | None) -> Array:
        """Choose the samples to remove at a cosine, or copies only if it is None: (M,) of dtype `REMOVED`."""
        return choose_removed(self.copies, self.duplicates(cosine), self.order)

    def duplicates(self, cosine: float | None) -> Array:
        """Return the pairs of contents that are the same picture or reach a cosine. If None, only the same picture."""
        if self.near is None:
            return np.empty(0, PAIR)

        pairs = self.near.pairs
        is_near = pairs["cosine"] >= cosine_limit(np.inf if cosine is None else cosine)
        duplicates: Array = pairs[is_near | (pairs["distance"] <= SAME_PICTURE)]
        return duplicates

    def levels(self) -> list[DedupLevel]:
        """Return what deduplication by copies and at each cosine of `LEVELS` would remove."""
        assert self.near is not None
        levels = [DedupLevel(cosine=None, num_near=None, num_gone=len(self.removed(None)))]
        for cosine in reversed(LEVELS):
            num_near = int((self.near.highest >= cosine_limit(cosine)).sum())
            num_gone = len(self.removed(cosine)) if cosine >= self.near.limit else None
            levels.append(DedupLevel(cosine=cosine, num_near=num_near, num_gone=num_gone))
        return levels

    __repr__ = summary

    def line(self) -> str:
        """Return what was compared, and how completely, in one line."""
        near = self.near
        copies = self.copies
        line = f"{count_items(len(copies.content_ids), self.feature.modality)} of {self.feature.name}; "
        line += pluralize(copies.num_copies, "is a byte-identical copy", "are byte-identical copies")
        if near is None:
            return line

        if self.num_same_picture is not None:
            line += f"; {pluralize(self.num_same_picture, 'pair')} of others show the same picture"
        if near.recall is None:
            return f"{line}; every pair was compared"

        recall = near.recall
        pairs = f"found {recall.num_found:,} of the {recall.num_pairs:,} pairs of {recall.num_items:,} sampled items"
        return f"{line}; {pluralize(near.num_clusters, 'cluster')} {pairs}"

    def to_json(self) -> dict[str, Any]:
        """Return what was compared, and how completely, as JSON values."""
        near = self.near
        run = self.settings.run
        selection = self.settings.selection
        return {
            "cache": str(self.cache.path),
            "modality": self.feature.modality,
            "feature": self.feature.name,
            "fingerprint": digest(self.feature.fingerprint),
            "run": None if run is None else str(run),
            **({} if selection is None else {"within": str(selection)}),
            "num_samples": len(self.samples),
            "num_items": len(self.copies.content_ids),
            "num_contents": len(self.copies.unique_rows),
            "keep": self.settings.keep,
            "seed": self.settings.seed,
            "num_clusters": None if near is None else near.num_clusters,
            "complete": None if near is None else near.complete,
            "recall": None if near is None or near.recall is None else near.recall.to_json(),
            "highest_cosine": self.highest,
            "num_same_picture": self.num_same_picture,
        }

    @property
    def num_same_picture(self) -> int | None:
        """Number of pairs of contents that are the same picture, None if no pixels were compared."""
        is_compared = self.near is not None and self.near.pairs["distance"].min(initial=NO_DISTANCE) < NO_DISTANCE
        return len(self.duplicates(None)) if is_compared else None

    @property
    def highest(self) -> float | None:
        """Largest cosine of two different contents, None if no two were compared."""
        similarities = self.similarities
        return min(1.0, float(similarities.max())) if len(similarities) > 1 else None

    @property
    def similarities(self) -> Floats:
        """Largest cosine of each content that was compared with another one: (M,)."""
        return np.empty(0, np.float32) if self.near is None else self.near.highest[self.near.highest > -2]


@dataclass(frozen=True, kw_only=True)
class DedupReport:
    """A written deduplication.

    Args:
        analysis: the compared items.
        cosine: limit, None for copies only.
        removed: removed samples, (M,) of dtype `REMOVED`.
        path: selection of the samples that stay.
        removed_path: table of the removed samples.

    Example:
        >>> report = embedcache.remove_duplicates("cache", "kept.parquet", copies=True, modality="text")
        >>> report.path.name, len(report.removed), report.cosine
        ('kept.parquet', 57, None)
    """

    analysis: DedupAnalysis
    cosine: float | None
    removed: Array
    path: Path
    removed_path: Path

    __repr__ = summary

    def lines(self) -> list[str]:
        """Return what was compared, and how many samples are kept and removed."""
        num_removed = len(self.removed)
        num_samples = len(self.analysis.samples)
        if num_removed:
            copies = pluralize(int(self.removed["is_copy"].sum()), "is a copy", "are copies")
            result = (
                f"kept {num_samples - num_removed:,} of {num_samples:,} samples; removed {num_removed:,}, of which "
                f"{copies}; {self.removed_path} names what each one duplicates"
            )
        else:
            result = f"kept all {num_samples:,} samples; none is a copy"
            result += "" if self.cosine is None else f" or has a cosine of {self.cosine:g} or more to another"
        return [self.analysis.line(), f"{self.path}: {result}"]

    def to_json(self) -> dict[str, Any]:
        """Return what was compared, and how many samples are removed, as JSON values."""
        return {
            **self.analysis.to_json(),
            "cosine": self.cosine,
            "num_removed": len(self.removed),
            "num_removed_copies": int(self.removed["is_copy"].sum()),
            "num_removed_same_picture": int((self.removed["distance"] <= SAME_PICTURE).sum()),
            "selection": str(self.path),
            "removed": str(self.removed_path),
        }


def analyze(
    cache: AnyPath,
    settings: DedupSettings | None = None,
    *,
    progress: AnyProgress = None,
    **options: Unpack["DedupOptions"],
) -> DedupAnalysis:
    """Compare the items of a cache to choose a cosine for `dedup`.

    `DedupAnalysis.levels` says how many samples each cosine would remove. Time and memory are as in `compare`, and for
    images as in `hash_distances`. Images are read again if `reopen_source` can open their source.

    Raises:
        SettingError: a cosine or `copies_only` is set, which needs a file to write, or the keep rule is invalid.
        UnknownNameError: there is no such keep rule or feature.
        DataError, UnfinishedError, FingerprintError: see `Vectors`.

    Example:
        >>> analysis = embedcache.analyze_duplicates("cache", modality="text")
        >>> print(analysis.line())
        600 texts of open_toy/mean; 57 are byte-identical copies; every pair was compared
        >>> analysis.levels()[0].num_gone  # samples that are removed as copies only
        57
    """
    settings = merge_settings(DedupSettings, settings, options)
    if settings.cosine is not None or settings.copies_only:
        raise SettingError("OUT: expected a .parquet file with --cosine or --copies, got none; add it after the cache")
    return _compare(cache, settings, to_progress(progress))


def dedup(
    cache: AnyPath,
    out: AnyPath,
    settings: DedupSettings | None = None,
    *,
    progress: AnyProgress = None,
    **options: Unpack["DedupOptions"],
) -> DedupReport:
    """Write a selection of the samples that stay, and next to it the removed samples, in `OUT.removed.parquet`.

    A sample is removed if each of its items duplicates an item of a sample that stays: by its bytes, by its pixels (an
    image in another size, compression or format), or by a cosine of at least the limit. Samples without a usable item
    stay. If `settings.selection` is given, only its samples are compared and can stay. The selection is written last.

    Args:
        cache: path or URL of the cache.
        out: a `.parquet` file.
        settings: the limit, `cosine` or `copies_only`, and how items are compared.
        options: settings by their names on the command line, which replace those of `settings`.
        progress: progress in items.

    Raises:
        SettingError: neither a cosine nor `copies_only` is set, or too many pairs reach the cosine.
        PathError: the path does not end in `.parquet`; or the errors of `check_output`.
        DataError, UnfinishedError, FingerprintError, UnknownNameError: see `analyze`.
        DiskFullError: the scratch file does not fit.

    Example:
        >>> report = embedcache.remove_duplicates("cache", "unique.parquet", copies=True, modality="text")
        >>> len(report.removed), report.removed_path.name
        (57, 'unique.removed.parquet')
    """
    settings = merge_settings(DedupSettings, settings, options)
    progress = to_progress(progress)
    out = Path(out)
    if settings.cosine is None and not settings.copies_only:
        raise SettingError("expected --cosine or --copies with a file to write, got neither; give one of them")

    removed_path = out.with_name(f"{out.stem}.removed.parquet")
    check_table_output("selection", out)
    check_output(removed_path)

    analysis = _compare(cache, settings, progress)
    removed = analysis.removed(settings.cosine)
    report = DedupReport(
        analysis=analysis, cosine=settings.cosine, removed=removed, path=out, removed_path=removed_path
    )

    # The selection is written last: whoever finds it can rely on the table of removed samples.
    columns = {
        "kept_row": removed["kept"],
        "kept_key": keys_at(analysis.cache, removed["kept"]),
        "cosine": removed["cosine"],
        "is_copy": removed["is_copy"],
        "hash_distance": pa.array(removed["distance"], mask=removed["distance"] == NO_DISTANCE),
    }
    about = {"method": "dedup"}
    keytable.write(removed_path, [analysis.cache], columns, "removed", about, rows=removed["sample"])
    write_selection(
        out, analysis.cache, _selection(analysis, removed), {**about, **report.to_json()}, progress=progress
    )
    return report


def _compare(cache_path: AnyPath, settings: DedupSettings, progress: Progress) -> DedupAnalysis:
    cache = Cache(cache_path)
    modality = choose_modality(cache, settings.modality, settings.run)
    images = open_images(cache) if modality == "image" and settings.pixels else None

    # Resized copies of images are searched among similar ones, so `copies_only` needs vectors for them too.
    vectors = None
    if not settings.copies_only or images is not None:
        vectors = Vectors(cache_path, modality, settings.feature, settings.run, device=settings.device)
    feature = open_input(cache, modality, settings.feature) if vectors is None else vectors.feature

    samples = np.setdiff1d(np.arange(len(cache)), cache.removed, assume_unique=True)
    if settings.selection is not None:
        samples = read_selection(settings.selection, [cache])
    copies = find_copies(cache, feature, samples)
    order = order_samples(settings.keep, copies, cache)
    if not len(copies.unique_rows):
        raise DataError(f"feature {feature.name}: expected encoded items in {cache.path}, got none")

    near = None
    if vectors is not None:
        levels = LEVELS if settings.cosine is None else [settings.cosine]
        near = find_near_duplicates(vectors, copies.unique_rows, levels, settings, progress)
        if images is not None:
            near.pairs["distance"] = hash_distances(
                images, copies.unique_rows, near.pairs["left"], near.pairs["right"], settings.scratch, progress
            )
        if settings.cosine is not None and near.limit > settings.cosine:
            raise SettingError(
                f"cosine: expected at most {MAX_PAIRS:,} pairs, got more above {settings.cosine}; raise it"
            )
    return DedupAnalysis(
        cache=cache, feature=feature, samples=samples, copies=copies, order=order, near=near, settings=settings
    )


def find_near_duplicates(
    vectors: Vectors, rows_N: Ints, levels: Sequence[float], settings: DedupSettings, progress: Progress | None = None
) -> NearDuplicates:
    """Find the pairs of items whose cosine is at least `levels[0]`, or the next level if there are too many pairs.

    With `settings.pixels`, pairs of images from the first of `CANDIDATE_COSINES` on are also returned, if they were
    compared for `levels[0]`. The recall is measured from `levels[0]` on. Time, memory and errors are as in `compare`.
    The pairs need memory as well: at most 20 million in 0.5 GB.
    """
    progress = progress or NullProgress()
    candidates = CANDIDATE_COSINES if settings.pixels and vectors.modality == "image" else ()
    collector = PairCollector(len(rows_N), sorted({*candidates, *levels}), MAX_PAIRS)
    with compare(vectors, rows_N, levels[0], settings, collector.add, progress) as arranged:
        first, second, cosines = collector.pairs()
        keys = pair_keys(first, second, len(rows_N))

        def is_found(one: Ints, other: Ints) -> Bools:
            sampled_keys = pair_keys(one, other, len(rows_N))
            is_pair: Bools = np.append(keys, -1)[np.searchsorted(keys, sampled_keys)] == sampled_keys
            return is_pair

        limit = max(collector.limit, levels[0])
        recall = measure_recall(arranged, limit, is_found, seed=settings.seed, progress=progress)

    pairs = np.empty(len(first), PAIR)
    pairs["left"] = first
    pairs["right"] = second
    pairs["cosine"] = cosines
    pairs["distance"] = NO_DISTANCE
    return NearDuplicates(
        pairs=pairs,
        limit=collector.limit,
        highest=collector.highest,
        num_clusters=arranged.num_clusters,
        complete=arranged.clusters.complete,
        recall=recall,
    )


def choose_removed(copies: Copies, pairs: Array, order: Ints) -> Array:
    """Visit samples in an order, and remove a sample if each of its items equals or is paired with an item that stays.

    If it has several partners, the one with the same bytes is named, else the one with the same pixels, else the most
    similar one. So each removed sample has a partner that stays, which connected components do not ensure: in a chain
    a - b - c, a and c may be far apart, and here both stay. SemDeDup compares with earlier samples whether they stay or
    not.

    Args:
        copies: the items by content.
        pairs: (A,) of dtype `PAIR`, of contents that are near.
        order: all samples with items, those to keep first.
    """
    # Most samples have no duplicate; only the others are visited one by one.
    graph = _Graph(pairs, len(copies.unique_rows))
    starts = np.concatenate([[0], np.cumsum(np.bincount(copies.samples))])
    num_like_C = np.bincount(copies.content_ids) - 1 + np.diff(graph.starts)  # copies and near-duplicates
    may_be_duplicate = np.bincount(copies.samples, weights=num_like_C[copies.content_ids]).astype(bool)

    holder_C = np.full(len(copies.unique_rows), -1, np.int64)
    removed = []
    for sample in order[may_be_duplicate[order]].tolist():
        contents = copies.content_ids[starts[sample] : starts[sample + 1]]
        partners = [graph.partner(content, holder_C) for content in contents.tolist()]
        if all(partner >= 0 for partner, _, _ in partners):
            partner, cosine, distance = min(partners, key=lambda candidate: candidate[1])
            is_copy = cosine == _COPY or distance <= SAME_PICTURE
            removed.append((sample, partner, min(cosine, 1), distance, is_copy))
        else:
            holder_C[contents[holder_C[contents] < 0]] = sample
    return np.array(sorted(removed), REMOVED)


class _Graph:
    """Near-duplicates of each content: the same picture first, then the most similar."""

    def __init__(self, pairs: Array, num_contents: int) -> None:
        ends = np.concatenate([pairs["left"], pairs["right"]])
        cosines = np.tile(pairs["cosine"], 2)
        distances = np.tile(pairs["distance"], 2)
        order = np.lexsort((-cosines, distances > SAME_PICTURE, ends))
        self._others = np.concatenate([pairs["right"], pairs["left"]])[order]
        self._cosines = cosines[order]
        self._distances = distances[order]
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(ends, minlength=num_contents))])

    def partner(self, content: int, holder_C: Ints) -> tuple[int, float, int]:
        """Return the kept sample with the most similar content, -1 if there is none, its cosine and hash distance."""
        if holder_C[content] >= 0:
            return int(holder_C[content]), _COPY, NO_DISTANCE

        here = slice(self.starts[content], self.starts[content + 1])
        holders = holder_C[self._others[here]]
        is_held = holders >= 0
        if not is_held.any():
            return -1, 0.0, NO_DISTANCE
        best = int(is_held.argmax())
        return int(holders[best]), float(self._cosines[here][best]), int(self._distances[here][best])


def order_samples(keep: str, copies: Copies, cache: Cache) -> Ints:
    """Sort the samples that have items by a keep rule.

    `first` keeps the row order. `best:COLUMN` puts the largest number of a column first, and samples without a number
    last.

    Raises:
        UnknownNameError: there is no such rule or column.
        SettingError: the column does not contain numbers.
    """
    samples = distinct(copies.samples)
    rule, _, name = keep.partition(":")
    if keep == "first":
        return samples
    if rule != "best":
        raise unknown_name("keep rule", keep, ("first", "best:COLUMN"))

    if name not in cache.columns:
        raise unknown_name("column", name, cache.columns, where=f"of {cache.path}")
    column = cache.column(name)
    if not any(is_number(column.type) for is_number in _IS_NUMBER):
        raise SettingError(f"keep: expected numbers in column {name!r} of {cache.path}, got {column.type}")
    values: Floats = column.cast(pa.float64(), safe=False).to_numpy()  # null is NaN
    return samples[np.argsort(-np.nan_to_num(values[samples], nan=-np.inf), kind="stable")]


def _selection(analysis: DedupAnalysis, removed: Array) -> Selection:
    """Select the samples that stay, with the number of samples that each stands for, null if it has no item."""
    rows = np.setdiff1d(analysis.samples, removed["sample"], assume_unique=True)
    num_samples = analysis.cache.info.num_samples
    has_no_item_S = np.ones(num_samples, bool)
    has_no_item_S[analysis.copies.samples] = False

    # A kept sample stands for its copies and for its near-duplicates, which are counted separately.
    near = removed[~removed["is_copy"]]
    num_removed_S = np.bincount(removed["kept"], minlength=num_samples)
    num_near_S = np.bincount(near["kept"], minlength=num_samples)
    closest_S = np.full(num_samples, -np.inf, np.float32)
    np.maximum.at(closest_S, near["kept"], near["cosine"])

    columns = {
        "num_copies": pa.array((num_removed_S - num_near_S)[rows], pa.int32(), mask=has_no_item_S[rows]),
        "num_near_duplicates": pa.array(num_near_S[rows], pa.int32(), mask=has_no_item_S[rows]),
        "closest_cosine": pa.array(closest_S[rows], mask=num_near_S[rows] == 0),
    }
    return Selection(rows=rows, columns=columns)
