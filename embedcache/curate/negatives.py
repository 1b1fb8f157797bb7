"""Mining hard negatives: for each sample of a cache, the nearest samples that do not belong to it.

After `mine_hard_negatives` of sentence-transformers: ranks, scores and margins say which neighbors count. Samples of
one group, connected by equal items or by near-duplicates, are never negatives of each other.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from embedcache.arrays import Array, Bools, Floats, Ints, blocks, concatenated_ranges, distinct, number_values
from embedcache.curate.settings import NegativesSettings
from embedcache.dataset.inputs import NamedFeatures
from embedcache.dataset.matches import near_duplicate_groups
from embedcache.dataset.pairs import Pairs
from embedcache.dataset.selections import read_selection, write_negatives
from embedcache.dataset.settings import SplitSettings
from embedcache.dataset.splits import read_split
from embedcache.dataset.vectors import Vectors
from embedcache.devices import products_on
from embedcache.errors import DataError, FingerprintError, SettingError, pluralize, quoted
from embedcache.files import AnyPath
from embedcache.neighbors.knn import KBest, knn
from embedcache.neighbors.pairs import components
from embedcache.outputs import check_table_output
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.runs import PAIR, SPLIT, Run
from embedcache.search.card import IndexCard, check_card, open_row_index, read_card
from embedcache.search.faiss_index import RowIndex
from embedcache.settings import merge_settings
from embedcache.store.cache import Cache
from embedcache.train.data import TrainData, open_data

if TYPE_CHECKING:
    from embedcache.options import NegativesOptions

_BLOCK = 1024
_MEMORY_BYTES = 4 * 10**9


@dataclass(frozen=True, kw_only=True)
class NegativesReport:
    """Result of mining.

    Args:
        num_samples: samples that looked for negatives.
        num_with_negatives: samples that have at least one.
        num_negatives: negatives of all samples.
        num_groups: near-duplicate groups of these samples.
        mean_score: mean cosine of the negatives; None without any.
        mean_own_score: with a run, mean cosine of these samples' own pairs.
    """

    num_samples: int
    num_with_negatives: int
    num_negatives: int
    num_groups: int
    mean_score: float | None
    mean_own_score: float | None

    def line(self) -> str:
        """Summarize the report in one line."""
        own = "" if self.mean_own_score is None else f", of their own pairs {self.mean_own_score:.3f}"
        scores = "" if self.mean_score is None else f"; mean cosine {self.mean_score:.3f}{own}"
        return (
            f"{pluralize(self.num_negatives, 'hard negative')} of {self.num_with_negatives:,} of {self.num_samples:,} "
            f"samples in {pluralize(self.num_groups, 'near-duplicate group')}{scores}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return all counts as JSON values."""
        return asdict(self)


def mine_negatives(
    cache: AnyPath,
    out: AnyPath,
    settings: NegativesSettings | None = None,
    *,
    feature: NamedFeatures = None,
    progress: AnyProgress = None,
    **options: Unpack["NegativesOptions"],
) -> NegativesReport:
    """Write the hard negatives of each sample of a cache, for `train` with `negatives`.

    With a run, an item is compared with the items of the other modality in the shared space, without one with those of
    its own modality by the plain feature. All are compared, N² products, unless an index is given. Memory: the vectors
    of the compared items in float32 (with an index, the index), and as in `near_duplicate_groups`.

    Args:
        cache: the cache.
        out: new `.parquet` file.
        settings: what is compared, and which neighbors count.
        feature: without a run, features of the pair to be trained, as in `train`.
        options: settings by their names on the command line, which replace those of `settings`.
        progress: progress in samples.

    Raises:
        SettingError: a modality that the pair has not, or features beside a run.
        FingerprintError: the run or the index is of another encoder's features.
        DataError: no sample has both features, or none has a negative; then nothing is written.
        PathError: the errors of `check_output`.
        UnknownNameError, UnfinishedError: a feature does not exist, or has missing chunks.
    """
    settings = merge_settings(NegativesSettings, settings, options)
    out, progress = Path(out), to_progress(progress)
    check_table_output("negatives", out)
    mining = _Mining(cache, settings, feature, progress)
    negatives_MK, scores_MK = mining.mine()
    is_some_MK = negatives_MK >= 0
    num_negatives = int(is_some_MK.sum())
    num_groups = len(distinct(mining.groups_S[mining.pairs.samples]))
    if not num_negatives and num_groups == 1:
        raise DataError(
            "expected hard negatives, got none: all samples are near-duplicates of each other, or have equal "
            "items; give a higher --cosine of near-duplicates, or other samples"
        )
    if not num_negatives:
        raise DataError(
            "expected hard negatives, got none; give a larger --range-max or smaller --range-min, a smaller "
            "--relative-margin, a higher --max-score, or a higher --cosine of near-duplicates"
        )
    about = {"task": "negatives", **settings.to_json(), "sides": mining.names}
    write_negatives(out, mining.cache, mining.groups_S, negatives_MK, scores_MK, about)
    return NegativesReport(
        num_samples=len(mining.pairs.samples),
        num_with_negatives=int(is_some_MK.any(axis=1).sum()),
        num_negatives=num_negatives,
        num_groups=num_groups,
        mean_score=float(scores_MK[is_some_MK].mean(dtype=np.float64)),
        mean_own_score=float(np.concatenate(own).mean(dtype=np.float64)) if (own := mining.own_scores) else None,
    )


class _Mining:
    """The samples that look for negatives, their near-duplicate groups, and the vectors that are compared."""

    def __init__(
        self, cache_path: AnyPath, settings: NegativesSettings, feature: NamedFeatures, progress: Progress
    ) -> None:
        self.settings = settings
        self.progress = progress
        self.cache = Cache(cache_path)
        run = None if settings.run is None else Run.open(settings.run, kind=PAIR)
        if run is not None:
            if feature is not None:
                raise SettingError("feature: expected those of the run, got others; omit them, or --run")
            feature = {name: side.feature for name, side in run.info.inputs.items()}
        data = open_data(cache_path, feature, memory_bytes=_MEMORY_BYTES, progress=progress)
        self.names = {name: feature.name for name, feature in data.features.items()}
        modality = settings.modality or next(iter(data.sides))
        if modality not in data.sides:
            raise SettingError(f"modality: expected {' or '.join(data.sides)}, got {modality}")
        other = modality if run is None else next(name for name in data.sides if name != modality)

        self.pairs = self._choose_pairs(data, run)
        items = dict(zip(data.sides, (self.pairs.first, self.pairs.second), strict=True))
        self._queries = items[modality]
        self._candidates = items[other]
        self._query_vectors, self._vectors = (
            Vectors(cache_path, name, self.names[name], settings.run, device=settings.device)
            for name in (modality, other)
        )
        self._index = None if settings.index is None else _open_index(settings.index, self._vectors)
        self.groups_S = np.full(self.cache.info.num_samples, -1, np.int64)
        self.groups_S[self.pairs.samples] = _group_samples(self.pairs, data, settings, progress)
        self.own_scores: list[Floats] = []  # with a run, the cosines of the samples' own pairs

    def _choose_pairs(self, data: TrainData, run: Run | None) -> Pairs:
        """Return the items of the samples of the selection, or of the run's training part, or of all samples."""
        pairs = data.pairs(None, progress=self.progress)
        if self.settings.selection is not None:
            pairs = pairs.select(read_selection(self.settings.selection, [self.cache]))
        elif run is not None and any(map(self.cache.info.has_rows_of, run.info.index_digest.split("+"))):
            split = read_split(run.path / SPLIT, [self.cache])
            pairs = pairs.select(split.rows("train"))
        if len(pairs.samples) < 2:
            raise DataError(
                f"{self.cache.path}: expected at least two samples with both features, got {len(pairs.samples)}"
            )
        return pairs

    def mine(self) -> tuple[Array, Floats]:
        """Find the negatives of all samples of the pairs: (M, K) samples, -1: none, and their cosines, 0: none."""
        samples = self.pairs.samples
        candidates_CP = None
        if self._index is None:
            candidates_CP = self._vectors.read(self._candidates.rows, self.progress)
        first_query = np.searchsorted(self._queries.samples, samples)  # items are in the order of their samples
        best = KBest(len(samples), self.settings.num_negatives)
        self.progress.start("mining hard negatives", len(samples), "samples")
        for number, block in enumerate(blocks(self.cache.info.num_samples, _BLOCK)):
            rng = np.random.default_rng([self.settings.seed, number])
            places = np.arange(*np.searchsorted(samples, [block.start, block.stop]))
            queries_BP = self._query_vectors.read(self._queries.rows[first_query[places]])
            found_BK, scores_BK = self._search(samples[places], queries_BP, candidates_CP)
            found_BK = self._choose(samples[places], queries_BP, found_BK, scores_BK, rng)
            row, column = np.nonzero(found_BK >= 0)
            best.add(places[row], found_BK[row, column], scores_BK[row, column])
            self.progress.advance(len(places))
        self.progress.finish()
        return best.numbers, np.where(best.numbers < 0, np.float32(0), best.scores)

    def _search(self, samples_B: Ints, queries_BP: Floats, candidates_CP: Floats | None) -> tuple[Ints, Floats]:
        """Return the samples of the nearest items of other groups, best first, -1: none, and their cosines: (B, K).

        With an index, -1 is also between others, for items of the own group and those that are not selected.
        """
        rows_C = self._candidates.rows
        samples_C = self._candidates.samples
        groups_B = self.groups_S[samples_B]
        if candidates_CP is not None:
            groups = (groups_B, self.groups_S[samples_C])
            k = min(self.settings.last_rank, len(rows_C))
            products = products_on(self.settings.device)
            places_BK, scores_BK = knn(queries_BP, candidates_CP, k, groups=groups, products=products)
            return np.where(places_BK < 0, -1, samples_C[places_BK]), scores_BK

        assert self._index is not None
        index, card = self._index
        k = min(2 * self.settings.last_rank + 64, len(index))  # more than are needed
        scores_BK, rows_BK = index.search(queries_BP, k, card.search)
        places_BK = np.searchsorted(rows_C, rows_BK).clip(max=len(rows_C) - 1)
        found_BK = samples_C[places_BK]
        is_usable_BK = (rows_C[places_BK] == rows_BK) & (self.groups_S[found_BK] != groups_B[:, None])
        return np.where(is_usable_BK, found_BK, -1), scores_BK

    def _choose(
        self, samples_B: Ints, queries_BP: Floats, found_BK: Ints, scores_BK: Floats, rng: np.random.Generator
    ) -> Ints:
        """Choose negatives by the settings, the nearest or at random; the others become -1. A sample counts once."""
        settings = self.settings
        rank_BK = np.cumsum(found_BK >= 0, axis=1) - 1
        is_kept_BK = (found_BK >= 0) & (rank_BK >= settings.range_min) & (rank_BK < settings.last_rank)
        is_kept_BK &= _is_first(found_BK)
        if settings.max_score is not None:
            is_kept_BK &= scores_BK <= settings.max_score
        if settings.run is not None:
            own_B = self._own_scores(samples_B, queries_BP)
            self.own_scores.append(own_B)
            if settings.relative_margin is not None:
                is_kept_BK &= scores_BK <= (own_B - np.abs(own_B) * settings.relative_margin)[:, None]
        if settings.sampling == "random":
            order_BK = np.argsort(np.where(is_kept_BK, rng.random(found_BK.shape), np.inf), axis=1, kind="stable")
            is_drawn_BK = np.zeros(found_BK.shape, bool)
            np.put_along_axis(is_drawn_BK, order_BK[:, : settings.num_negatives], values=True, axis=1)
            is_kept_BK &= is_drawn_BK
        return np.where(is_kept_BK, found_BK, -1)

    def _own_scores(self, samples_B: Ints, queries_BP: Floats) -> Floats:
        """Compute the largest cosine of each query with the items of its own sample: (B,)."""
        starts = np.searchsorted(self._candidates.samples, samples_B)
        counts = np.searchsorted(self._candidates.samples, samples_B, side="right") - starts
        which, places = concatenated_ranges(starts, counts)
        own_BP = self._vectors.read(self._candidates.rows[places])
        scores_B = np.full(len(samples_B), -np.inf, np.float32)
        np.maximum.at(scores_B, which, np.einsum("bp,bp->b", queries_BP[which], own_BP))
        return scores_B


def _open_index(path: Path | str, pool: Vectors) -> tuple[RowIndex, IndexCard]:
    """Open an index of the vectors of a pool.

    Raises `FingerprintError` if it was built from other samples, another feature or run, or fewer items.
    """
    path = Path(path)
    card = read_card(path)
    make = f"build one: embedcache curate index {quoted(pool.cache.path)} NEW-INDEX --modality {pool.modality}"
    if not pool.cache.info.has_rows_of(card.index_digest):
        raise FingerprintError(f"index {path}: expected the samples of {pool.cache.path}, got others; {make}")
    requested = {
        "modality": pool.modality,
        "feature": pool.feature.name,
        "fingerprint": pool.feature.fingerprint,
        "run_weights": None if pool.run is None else pool.run.info.weights,
        "num_vectors": len(pool.rows),
        "width": pool.width,
    }
    check_card(path, card, requested, next_step=make)
    return open_row_index(path, card, device=pool.device), card


def _is_first(found_BK: Ints) -> Bools:
    """Return whether each entry is the first of its value in its row: (B, K)."""
    order_BK = np.argsort(found_BK, axis=1, kind="stable")
    sorted_BK = np.take_along_axis(found_BK, order_BK, axis=1)
    is_first_BK = np.ones(found_BK.shape, bool)
    np.put_along_axis(is_first_BK, order_BK[:, 1:], sorted_BK[:, 1:] != sorted_BK[:, :-1], axis=1)
    return is_first_BK


def _group_samples(pairs: Pairs, data: TrainData, settings: NegativesSettings, progress: Progress) -> Ints:
    """Return the group of each sample of the pairs: (S,) int64, from 0, below the number of samples.

    Samples are of one group if they are near-duplicates, as in a strict split, or have an equal item of a modality.
    """
    split = SplitSettings(cosines=settings.cosines, seed=settings.seed)
    labels = near_duplicate_groups(pairs, split, data.readers, progress, purpose="negatives")
    return join_equal(labels, pairs)


def join_equal(groups_S: Ints, pairs: Pairs) -> Ints:
    """Join the groups of samples that have an equal item: (S,) int64 groups in the order of `pairs.samples`."""
    groups, contents = [], []
    size = int(groups_S.max()) + 1
    for side in (pairs.first, pairs.second):
        groups.append(groups_S[np.searchsorted(pairs.samples, side.samples)])
        contents.append(size + side.contents)
        size += int(side.contents.max()) + 1
    return number_values(components(np.concatenate(groups), np.concatenate(contents), size)[groups_S])
