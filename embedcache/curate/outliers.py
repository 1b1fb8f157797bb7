"""Typicality, likely mislabels and pairs that do not match, from the neighbors that deduplication compares."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np
import pyarrow as pa

from embedcache.arrays import Array, Bools, Floats, Ints, blocks
from embedcache.curate.copies import Copies, choose_modality, compare, find_copies
from embedcache.curate.score import best_per_sample
from embedcache.curate.select.select import Pool
from embedcache.curate.settings import OutlierSettings, SelectSettings
from embedcache.dataset import keytable
from embedcache.dataset.labels import Labels, has_label, read_labels
from embedcache.dataset.vectors import Vectors
from embedcache.errors import DataError, summary
from embedcache.files import AnyPath
from embedcache.modalities import count_items, noun
from embedcache.neighbors.pairs import NeighborCollector, Recall, measure_neighbor_recall
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.provenance import check_table_output, digest
from embedcache.settings import merge_settings
from embedcache.store.cache import Cache

if TYPE_CHECKING:
    from embedcache.options import OutlierOptions

TYPICALITY = "typicality"
MARGIN = "label_margin"
SUGGESTED = "suggested_label"
PAIR_COSINE = "pair_cosine"
_LABEL = "label"
_MISLABELED = -0.5
_ANY_COSINE = 0.0  # neighbors may be this far away, so that the nearest borders are crossed wherever they are
_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 1.0)
_COMPARISONS = 2**22  # of labels with each other, per block


class Neighbors(NamedTuple):
    """The K other items that are most similar to each of N items, best first."""

    items: Array  # (N, K) int32 item numbers; -1 where fewer were compared
    cosines: Floats  # (N, K); -inf where there is none
    num_clusters: int  # 1 if all pairs were compared
    recall: Recall | None  # of the K nearest of drawn items; None if all pairs were compared


@dataclass(frozen=True, kw_only=True)
class OutlierReport:
    """Scores of S samples of a cache that find odd ones, which score lowest.

    A sample is judged by the best of its items, so all of its items are at least as odd.

    Args:
        cache: the cache.
        path: the written table, None if none was written.
        vectors: the compared vectors.
        copies: items, and the contents that were compared. Copies count once.
        neighbors: neighbors of the contents.
        scores: name -> (S,) scores, NaN if a sample has none. `typicality` is the mean cosine of an item to its k
            nearest neighbors. `label_margin`, with labels, is the fraction of the labeled neighbors with the sample's
            class less the fraction with the suggested class. `pair_cosine`, with a run, is the best cosine of a
            sample's items of the run's two modalities, such as images and captions.
        rows_S: (S,) row of the item with this typicality, -1 without one.
        labels: class of each sample, -1 without a label; None if the cache has no labels.
        suggested_S: (S,) other class that most of the nearest neighbors have, -1 without one or without labels.
        settings: what was compared.

    Example:
        >>> report = embedcache.find_outliers("cache", modality="text", k=20)
        >>> sorted(report.scores), report.scores["typicality"].shape
        (['typicality'], (600,))
    """

    cache: Cache
    path: Path | None
    vectors: Vectors
    copies: Copies
    neighbors: Neighbors
    scores: Mapping[str, Floats]
    rows_S: Ints
    labels: Labels | None
    suggested_S: Ints
    settings: OutlierSettings

    @property
    def num_samples(self) -> int:
        """Number of samples, without removed ones."""
        return len(self.cache) - len(self.cache.removed)

    @property
    def is_mislabeled(self) -> Bools:
        """Whether the neighbors of each sample agree on another label, with a margin below -0.5: (S,)."""
        return np.nan_to_num(self.scores[MARGIN], nan=1.0) < _MISLABELED

    def lowest(self, name: str, count: int) -> Ints:
        """Return the samples with the lowest values of a score, lowest first, then by row."""
        values_S = self.scores[name]
        order = np.argsort(values_S, kind="stable")
        return order[: min(count, int(np.isfinite(values_S).sum()))]

    def neighbors_of(self, row: int) -> Ints:
        """Return the rows of the nearest neighbors of an item, best first."""
        content = self.copies.content_ids[np.searchsorted(self.copies.item_rows, row)]
        items = self.neighbors.items[content]
        rows: Ints = self.copies.unique_rows[items[items >= 0]]
        return rows

    __repr__ = summary

    def line(self) -> str:
        """Return what was compared, and how completely, in one line."""
        recall = self.neighbors.recall
        items = f"{count_items(len(self.copies.content_ids), self.vectors.modality)} of {self.vectors.feature.name}"
        num_contents = len(self.copies.unique_rows)
        line = f"{items}, each with its {self.neighbors.items.shape[1]} nearest of {num_contents:,} different ones"
        if recall is None:
            return f"{line}; every pair was compared"

        return f"{line}; {self.neighbors.num_clusters:,} clusters found {recall.value:.1%} of them for sampled items"

    def to_json(self) -> dict[str, Any]:
        """Return what was compared, and quantiles of the scores, as JSON values."""
        run = self.settings.run
        recall = self.neighbors.recall
        k = self.neighbors.items.shape[1]
        return {
            "cache": str(self.cache.path),
            "scores": None if self.path is None else str(self.path),
            "modality": self.vectors.modality,
            "feature": self.vectors.feature.name,
            "fingerprint": digest(self.vectors.feature.fingerprint),
            "run": None if run is None else str(run),
            "run_weights": None if self.vectors.run is None else self.vectors.run.info.weights,
            "k": k,
            "label_neighbors": min(self.settings.label_neighbors, k),
            "num_samples": self.num_samples,
            "num_items": len(self.copies.content_ids),
            "num_contents": len(self.copies.unique_rows),
            "num_clusters": self.neighbors.num_clusters,
            "recall": None if recall is None else recall.to_json(),
            "num_likely_mislabels": None if self.labels is None else int(self.is_mislabeled.sum()),
            "quantiles": {name: _quantiles(values_S) for name, values_S in self.scores.items()},
        }


def _quantiles(values_S: Floats) -> dict[str, float | None]:
    """Return quantiles of a score. They are None if no sample has it, as a single labeled sample has no margin."""
    finite = values_S[np.isfinite(values_S)]
    return {str(fraction): float(np.quantile(finite, fraction)) if len(finite) else None for fraction in _QUANTILES}


def find_outliers(
    cache: AnyPath,
    out: AnyPath | None = None,
    settings: OutlierSettings | None = None,
    *,
    progress: AnyProgress = None,
    **options: Unpack["OutlierOptions"],
) -> OutlierReport:
    """Score how typical the samples of a cache are, whether their labels fit, and whether the items of a pair do.

    Time and scratch space are as in `compare`. Memory: 8 k + 200 bytes per item.

    Args:
        cache: path or URL of the cache.
        out: table of the scores to write, a `.parquet` file that `curate select --method score` reads.
        settings: the compared feature, and the number of neighbors.
        progress: progress in items.
        options: settings by their names on the command line, which replace those of `settings`.

    Raises:
        PathError: the path does not end in `.parquet`; or the errors of `check_output`.
        UnknownNameError: there is no such feature, or no such column of labels.
        DataError: fewer than two items differ, a vector has no direction, or labels are neither strings nor whole
            numbers.
        UnfinishedError, FingerprintError: see `Vectors`.
        DiskFullError: the scratch file does not fit.

    Example:
        >>> report = embedcache.find_outliers("cache", "odd.parquet", modality="text", k=20)
        >>> print(report.line())
        600 texts of open_toy/mean, each with its 20 nearest of 543 different ones; every pair was compared
    """
    settings = merge_settings(OutlierSettings, settings, options)
    progress = to_progress(progress)
    if out is not None:
        out = Path(out)
        check_table_output("scores", out)

    cache = Cache(cache)
    modality = choose_modality(cache, settings.modality, settings.run)
    vectors = Vectors(cache, modality, settings.feature, settings.run, device=settings.device)
    labels = _read_labels(cache, settings.label, progress)
    copies = find_copies(cache, vectors.feature)
    num_contents = len(copies.unique_rows)
    if num_contents < 2:
        raise DataError(f"{cache.path}: expected at least 2 different {noun(modality)} to compare, got {num_contents}")

    # Pairs come before the neighbors: a cache without pairs is refused before the longest part.
    pair_cosines_S = _pair_cosines(vectors, progress)
    neighbors = find_neighbors(vectors, copies.unique_rows, min(settings.k, num_contents - 1), settings, progress)

    # A score is added only if the cache has labels or pairs for it.
    typicality_S, best_S = best_per_sample(len(cache), copies.samples, _typicality(neighbors)[copies.content_ids])
    scores = {TYPICALITY: typicality_S}
    suggested_S = np.full(len(cache), -1)
    if labels is not None:
        suggested_S, scores[MARGIN] = _vote(copies, neighbors.items[:, : settings.label_neighbors], labels.numbers)
    if pair_cosines_S is not None:
        scores[PAIR_COSINE] = pair_cosines_S

    report = OutlierReport(
        cache=cache,
        path=out,
        vectors=vectors,
        copies=copies,
        neighbors=neighbors,
        scores=scores,
        rows_S=np.where(best_S < 0, -1, copies.item_rows[best_S]),
        labels=labels,
        suggested_S=suggested_S,
        settings=settings,
    )
    if out is not None:
        columns: dict[str, Any] = dict(scores)
        if labels is not None:
            names = pa.array(labels.names, pa.string())
            columns[SUGGESTED] = names.take(pa.array(suggested_S, mask=suggested_S < 0))
        keytable.write(out, [cache], columns, "scores", {"method": "outliers", **report.to_json()})
    return report


def find_neighbors(vectors: Vectors, rows_N: Ints, k: int, settings: OutlierSettings, progress: Progress) -> Neighbors:
    """Find the K nearest neighbors of each item among all others, or among items in and near its cluster."""
    collector = NeighborCollector(len(rows_N), k)
    with compare(vectors, rows_N, _ANY_COSINE, settings, collector.add, progress) as arranged:
        recall = measure_neighbor_recall(arranged, collector.best, seed=settings.seed, progress=progress)
    return Neighbors(collector.best.numbers, collector.best.scores, arranged.num_clusters, recall)


def _read_labels(cache: Cache, column: str | None, progress: Progress) -> Labels | None:
    """Return the class number of each sample, (S,), -1 without a label. Return None if no sample has a label.

    If the column is None, the default one is read if it exists and its values are classes.
    """
    name = column or _LABEL
    if column is None and name not in cache.columns:
        return None

    # A user asked for a named column, so its faults are errors; the default one is only a guess.
    try:
        labeled = np.flatnonzero(has_label(cache, np.arange(cache.info.num_samples), column=name))
        labels = read_labels(cache, labeled, column=name) if len(labeled) else None
    except DataError as error:
        if column is not None:
            raise
        progress.note(f"labels are not compared: {error}")
        return None
    if labels is None:
        return None

    numbers_S = np.full(cache.info.num_samples, -1, np.int64)
    numbers_S[labeled] = labels.numbers
    return Labels(names=labels.names, numbers=numbers_S)


def _typicality(neighbors: Neighbors) -> Floats:
    """Return the mean cosine of each content to its neighbors: (C,)."""
    is_neighbor_CK = neighbors.items >= 0
    sums_C = np.where(is_neighbor_CK, neighbors.cosines, 0).sum(axis=1, dtype=np.float64)
    typicality_C: Floats = (sums_C / np.maximum(is_neighbor_CK.sum(axis=1), 1)).astype(np.float32)
    return typicality_C


def _vote(copies: Copies, near_CK: Array, own_S: Ints) -> tuple[Ints, Floats]:
    """Compare the label of each item with its neighbors' labels: suggested classes and margins, (S,) each."""
    # A content has the label of its first labeled copy, which is assigned last.
    label_C = np.full(len(near_CK), -1, np.int64)
    labeled = np.flatnonzero(own_S[copies.samples] >= 0)[::-1]
    label_C[copies.content_ids[labeled]] = own_S[copies.samples[labeled]]

    num_items = len(copies.content_ids)
    k = near_CK.shape[1]
    suggested_N = np.empty(num_items, np.int64)
    margins_N = np.empty(num_items, np.float32)
    for block in blocks(num_items, _COMPARISONS // k**2):  # k is at most 1,000
        near_BK = near_CK[copies.content_ids[block]]
        label_BK = np.where(near_BK < 0, -1, label_C[near_BK])
        suggested_N[block], margins_N[block] = compare_labels(own_S[copies.samples[block]], label_BK)

    # A sample whose items have no margin keeps the suggestion of the first.
    _, best_S = best_per_sample(len(own_S), copies.samples, np.nan_to_num(margins_N, nan=-np.inf))
    has_no_item_S = best_S < 0
    margins_S = np.where(has_no_item_S, np.float32(np.nan), margins_N[best_S])
    return np.where(has_no_item_S, -1, suggested_N[best_S]), margins_S


def compare_labels(own_B: Ints, label_BK: Ints) -> tuple[Ints, Floats]:
    """Compare the label of each item with its neighbors' labels, nearest first. -1 means no label.

    Returns two arrays. The first is the most frequent other label, (B,) int64, -1 without one. Ties go to the nearest
    neighbor's label. The second is the fraction of labeled neighbors with the item's label less the fraction with the
    other label, (B,) float32. It is NaN if the item or all of its neighbors have no label.

    Example:
        >>> compare_labels(np.array([0]), np.array([[1, 0, 1, -1, 1]]))
        (array([1]), array([-0.5], dtype=float32))
    """
    # Each label is counted among the neighbors' labels; the first of the highest counts is the nearest.
    is_labeled_BK = label_BK >= 0
    counts_BK = (label_BK[:, :, None] == label_BK[:, None, :]).sum(axis=2)
    is_own_BK = is_labeled_BK & (label_BK == own_B[:, None])
    other_BK = np.where(is_labeled_BK & ~is_own_BK, counts_BK, 0)
    nearest_B = other_BK.argmax(axis=1)[:, None]
    other_B = np.take_along_axis(other_BK, nearest_B, axis=1)[:, 0]
    suggested_B = np.where(other_B > 0, np.take_along_axis(label_BK, nearest_B, axis=1)[:, 0], -1)

    num_labeled_B = is_labeled_BK.sum(axis=1)
    margins_B = (is_own_BK.sum(axis=1) - other_B) / np.maximum(num_labeled_B, 1)
    has_margin_B = (own_B >= 0) & (num_labeled_B > 0)
    return suggested_B, np.where(has_margin_B, margins_B, np.nan).astype(np.float32)


def _pair_cosines(vectors: Vectors, progress: Progress) -> Floats | None:
    """Compare the items of each pair by the run. Return None without a run, or if the cache lacks a modality of it."""
    cache = vectors.cache
    if vectors.run is None or not all(map(cache.features, vectors.run.modalities)):
        return None
    settings = SelectSettings(run=vectors.run_path, device=vectors.device)
    samples_M, cosines_M = Pool(cache.path, vectors.run.modalities[0], settings, progress=progress).pair_scores()
    cosines_S = np.full(cache.info.num_samples, np.nan, np.float32)
    cosines_S[samples_M] = cosines_M
    return cosines_S
