"""Mine hard negatives: for each sample of a cache, the nearest samples that do not belong to it.

As in `mine_hard_negatives` of sentence-transformers, ranks, scores and margins say which neighbors count. Samples of
one group, connected by equal items or by near-duplicates, are never negatives of each other.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np

from embedcache.arrays import Bools, Floats, Ints, blocks, concatenated_ranges, distinct, number_values
from embedcache.curate.settings import NegativesSettings
from embedcache.dataset.inputs import NamedFeatures
from embedcache.dataset.matches import near_duplicate_groups, pair_sides
from embedcache.dataset.pairs import Items, Pairs
from embedcache.dataset.selections import read_selection, write_negatives
from embedcache.dataset.settings import SplitSettings
from embedcache.dataset.splits import read_split
from embedcache.dataset.vectors import Vectors
from embedcache.errors import DataError, FingerprintError, SettingError, pluralize, quoted, summary
from embedcache.files import AnyPath
from embedcache.neighbors.knn import KBest, knn
from embedcache.neighbors.pairs import components
from embedcache.processes import products_on
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.provenance import check_table_output
from embedcache.runs import PAIR, SPLIT, Run
from embedcache.search.faiss_index import IndexCard, RowIndex, check_card, open_row_index, read_card
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
        mean_score: mean cosine of the negatives.
        mean_own_score: mean cosine of these samples' own pairs, None without a run.

    Example:
        >>> features = {"image": "open_toy/cls", "text": "open_toy/mean"}
        >>> limits = {"image": 0.99, "text": 0.999}
        >>> report = embedcache.mine_negatives("train-cache", "hard.parquet", feature=features, cosine=limits)
        >>> report.num_with_negatives <= report.num_samples, report.mean_own_score
        (True, None)
    """

    num_samples: int
    num_with_negatives: int
    num_negatives: int
    num_groups: int
    mean_score: float
    mean_own_score: float | None

    __repr__ = summary

    def line(self) -> str:
        """Summarize the report in one line."""
        pairs = "" if self.mean_own_score is None else f", of their own pairs {self.mean_own_score:.3f}"
        return (
            f"{pluralize(self.num_negatives, 'hard negative')} of {self.num_with_negatives:,} of {self.num_samples:,} "
            f"samples in {pluralize(self.num_groups, 'near-duplicate group')}; mean cosine {self.mean_score:.3f}{pairs}"
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

    With a run, an item is compared with the items of the other modality in the shared space. Without a run, it is
    compared with the items of its own modality by the plain feature. All items are compared, N² products, unless an
    index is given. Memory: the vectors of the compared items in float32, or the index, and as in
    `near_duplicate_groups`.

    Args:
        cache: the cache.
        out: new `.parquet` file.
        settings: what is compared, and which neighbors count.
        feature: features of the pair to be trained, as in `train`, if there is no run.
        options: settings by their names on the command line, which replace those of `settings`.
        progress: progress in samples.

    Raises:
        SettingError: the pair lacks the modality, or features are given in addition to a run.
        FingerprintError: the run or the index is of another encoder's features.
        DataError: no sample has both features, or none has a negative. Nothing is written then.
        PathError: the errors of `check_output`.
        UnknownNameError, UnfinishedError: a feature does not exist, or has missing chunks.

    Example:
        >>> features = {"image": "open_toy/cls", "text": "open_toy/mean"}
        >>> limits = {"image": 0.99, "text": 0.999}
        >>> report = embedcache.mine_negatives("train-cache", "negatives.parquet", feature=features, cosine=limits)
        >>> report.num_samples
        80
    """
    settings = merge_settings(NegativesSettings, settings, options)
    out = Path(out)
    progress = to_progress(progress)
    check_table_output("negatives", out)

    cache = Cache(cache)
    run = None if settings.run is None else Run.open(settings.run, kind=PAIR)
    if run is not None:
        if feature is not None:
            raise SettingError("feature: expected the features of the run, got others; omit them, or --run")
        feature = {name: side.feature for name, side in run.info.inputs.items()}
    data = open_data(cache.path, feature, memory_bytes=_MEMORY_BYTES, progress=progress)
    pairs = _choose_pairs(cache, data, run, settings, progress)
    queries, candidates = _open_sides(cache, data, pairs, settings)
    index = None if settings.index is None else _open_index(settings.index, candidates.vectors)

    # Near-duplicates of a sample would be false negatives, so groups are formed before the search.
    groups_S = np.full(len(cache), -1, np.int64)
    groups_S[pairs.samples] = _group_samples(pairs, data, settings, progress)
    num_groups = len(distinct(groups_S[pairs.samples]))

    best, own_M = _mine(pairs.samples, queries, candidates, groups_S, index, settings, progress)
    is_negative_MK = best.numbers >= 0
    if not is_negative_MK.any():
        raise DataError(
            f"expected hard negatives in {pluralize(num_groups, 'near-duplicate group')}, got none; give a "
            "higher --cosine, a larger --range-max, a smaller --relative-margin or a higher --max-score"
        )

    about = {
        "task": "negatives",
        **settings.to_json(),
        "sides": {name: side.name for name, side in data.features.items()},
    }
    write_negatives(out, cache, groups_S, best.numbers, np.where(is_negative_MK, best.scores, np.float32(0)), about)
    return NegativesReport(
        num_samples=len(pairs.samples),
        num_with_negatives=int(is_negative_MK.any(axis=1).sum()),
        num_negatives=int(is_negative_MK.sum()),
        num_groups=num_groups,
        mean_score=float(best.scores[is_negative_MK].mean(dtype=np.float64)),
        mean_own_score=None if own_M is None else float(own_M.mean(dtype=np.float64)),
    )


class _Side(NamedTuple):
    """Items of the compared samples, and vectors of their modality."""

    items: Items
    vectors: Vectors


def _open_sides(cache: Cache, data: TrainData, pairs: Pairs, settings: NegativesSettings) -> tuple[_Side, _Side]:
    """Open the queries and the candidates. Without a run, they are of one modality and are the same side."""
    modalities = list(data.sides)
    modality = settings.modality or modalities[0]
    if modality not in modalities:
        raise SettingError(f"modality: expected {' or '.join(modalities)}, got {modality}")

    items = dict(zip(modalities, (pairs.first, pairs.second), strict=True))
    sides = []
    for name in [modality] if settings.run is None else sorted(modalities, key=lambda name: name != modality):
        vectors = Vectors(cache, name, data.features[name].name, settings.run, device=settings.device)
        sides.append(_Side(items[name], vectors))
    return sides[0], sides[-1]


def _choose_pairs(
    cache: Cache, data: TrainData, run: Run | None, settings: NegativesSettings, progress: Progress
) -> Pairs:
    """Return the items of the samples of the selection, or of the run's training part, or of all samples."""
    pairs = data.pairs(None, progress=progress)
    if settings.selection is not None:
        pairs = pairs.select(read_selection(settings.selection, [cache]))
    elif run is not None and any(map(cache.info.has_rows_of, run.info.index_digest.split("+"))):
        # Negatives are for training, so by default only training samples look for them.
        pairs = pairs.select(read_split(run.path / SPLIT, [cache]).rows("train"))
    if len(pairs.samples) < 2:
        raise DataError(f"{cache.path}: expected at least two samples with both features, got {len(pairs.samples)}")
    return pairs


def _mine(
    samples_M: Ints,
    queries: _Side,
    candidates: _Side,
    groups_S: Ints,
    index: tuple[RowIndex, IndexCard] | None,
    settings: NegativesSettings,
    progress: Progress,
) -> tuple[KBest, Floats | None]:
    """Find the negatives of samples. With a run, also return the largest cosine of each with its own items: (M,)."""
    candidates_CP = None if index is not None else candidates.vectors.read(candidates.items.rows, progress)
    first_M = np.searchsorted(queries.items.samples, samples_M)  # items are in the order of their samples
    best = KBest(len(samples_M), settings.num_negatives)
    own_M = None if settings.run is None else np.empty(len(samples_M), np.float32)
    products = products_on(settings.device)

    progress.start("mining hard negatives", len(samples_M), "samples")
    for number, block in enumerate(blocks(len(groups_S), _BLOCK)):
        places = np.arange(*np.searchsorted(samples_M, [block.start, block.stop]))
        groups_B = groups_S[samples_M[places]]
        queries_BP = queries.vectors.read(queries.items.rows[first_M[places]])

        # The exact search leaves out a query's group itself; an index does not know groups.
        if candidates_CP is not None:
            groups = (groups_B, groups_S[candidates.items.samples])
            k = min(settings.last_rank, len(candidates_CP))
            items_BK, scores_BK = knn(queries_BP, candidates_CP, k, groups=groups, products=products)
            nearest_BK = np.append(candidates.items.samples, -1)[items_BK]
        else:
            assert index is not None
            nearest_BK, scores_BK = _search_index(*index, queries_BP, candidates.items, settings.last_rank)
            nearest_BK[groups_S[nearest_BK] == groups_B[:, None]] = -1

        own_B = None
        if own_M is not None:
            own_B = _own_cosines(samples_M[places], queries_BP, candidates)
            own_M[places] = own_B

        # A generator per block: the draws do not depend on the number of candidates of earlier blocks.
        rng = np.random.default_rng([settings.seed, number])
        row, column = np.nonzero(_choose(nearest_BK, scores_BK, own_B, settings, rng))
        best.add(places[row], nearest_BK[row, column], scores_BK[row, column])
        progress.advance(len(places))
    progress.finish()
    return best, own_M


def _search_index(
    index: RowIndex, card: IndexCard, queries_BP: Floats, items: Items, last_rank: int
) -> tuple[Ints, Floats]:
    """Return samples of the nearest items of an index, best first, and their cosines.

    The sample is -1 if an item is not a candidate.
    """
    k = min(2 * last_rank + 64, len(index))  # more than the last rank, as some are of the query's group
    scores_BK, rows_BK = index.search(queries_BP, k, card.search)
    places_BK = np.searchsorted(items.rows, rows_BK).clip(max=len(items.rows) - 1)
    return np.where(items.rows[places_BK] == rows_BK, items.samples[places_BK], -1), scores_BK


def _choose(
    nearest_BK: Ints, scores_BK: Floats, own_B: Floats | None, settings: NegativesSettings, rng: np.random.Generator
) -> Bools:
    """Return which of the nearest samples are negatives by the settings: all, or some at random. A sample counts once.

    Args:
        nearest_BK: samples, best first, -1 in place of a missing one.
        scores_BK: their cosines.
        own_B: cosine of each query with its own pair, None without a run.
        settings: which ranks and cosines are negatives.
        rng: generator of random draws.
    """
    rank_BK = np.cumsum(nearest_BK >= 0, axis=1) - 1
    is_kept_BK: Bools = (nearest_BK >= 0) & (rank_BK >= settings.range_min) & (rank_BK < settings.last_rank)
    is_kept_BK &= _is_first(nearest_BK)

    # A neighbor about as close as the own pair may be a match that nobody labeled.
    if settings.max_score is not None:
        is_kept_BK &= scores_BK <= settings.max_score
    if own_B is not None and settings.relative_margin is not None:
        is_kept_BK &= scores_BK <= (own_B - np.abs(own_B) * settings.relative_margin)[:, None]

    if settings.sampling == "random":
        order_BK = np.argsort(np.where(is_kept_BK, rng.random(nearest_BK.shape), np.inf), axis=1, kind="stable")
        is_drawn_BK = np.zeros(nearest_BK.shape, bool)
        np.put_along_axis(is_drawn_BK, order_BK[:, : settings.num_negatives], values=True, axis=1)
        is_kept_BK &= is_drawn_BK
    return is_kept_BK


def _own_cosines(samples_B: Ints, queries_BP: Floats, candidates: _Side) -> Floats:
    """Compute the largest cosine of each query with the items of its own sample: (B,)."""
    starts = np.searchsorted(candidates.items.samples, samples_B)
    counts = np.searchsorted(candidates.items.samples, samples_B, side="right") - starts
    query_M, places_M = concatenated_ranges(starts, counts)
    own_MP = candidates.vectors.read(candidates.items.rows[places_M])
    cosines_B = np.full(len(samples_B), -np.inf, np.float32)
    np.maximum.at(cosines_B, query_M, np.einsum("mp,mp->m", queries_BP[query_M], own_MP))
    return cosines_B


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


def _is_first(samples_BK: Ints) -> Bools:
    """Return whether each entry is the first of its value in its row: (B, K)."""
    order_BK = np.argsort(samples_BK, axis=1, kind="stable")
    sorted_BK = np.take_along_axis(samples_BK, order_BK, axis=1)
    is_first_BK = np.ones(samples_BK.shape, bool)
    np.put_along_axis(is_first_BK, order_BK[:, 1:], sorted_BK[:, 1:] != sorted_BK[:, :-1], axis=1)
    return is_first_BK


def _group_samples(pairs: Pairs, data: TrainData, settings: NegativesSettings, progress: Progress) -> Ints:
    """Return the group of each sample of the pairs, from 0: (S,) int64.

    Samples are in one group if they are near-duplicates, as in a strict split, or have an equal item of a modality.
    """
    split = SplitSettings(cosines=settings.cosines, seed=settings.seed)
    labels = near_duplicate_groups(pairs.samples, split, pair_sides(pairs, data.readers), progress, purpose="negatives")
    return join_equal(labels, pairs)


def join_equal(groups_S: Ints, pairs: Pairs) -> Ints:
    """Join the groups of samples that have an equal item: (S,) int64 groups in the order of `pairs.samples`."""
    groups = []
    contents = []
    size = int(groups_S.max()) + 1

    # Groups and contents are the nodes of one graph, so their numbers must not overlap.
    for side in (pairs.first, pairs.second):
        groups.append(groups_S[np.searchsorted(pairs.samples, side.samples)])
        contents.append(size + side.contents)
        size += int(side.contents.max()) + 1
    return number_values(components(np.concatenate(groups), np.concatenate(contents), size)[groups_S])
