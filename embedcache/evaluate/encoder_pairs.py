"""Compare encoder pairs before any training: every feature of one modality with every one of another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Unpack

import numpy as np

from embedcache.arrays import Floats, Ints, Products, blocks, check_finite, distinct, normalize
from embedcache.dataset.inputs import (
    InputFeature,
    NamedFeatures,
    default_pair,
    features_by_modality,
    open_input,
    to_unit_vectors,
)
from embedcache.dataset.pairs import Items, Pairs, choose_language, pair_items
from embedcache.dataset.selections import read_selection
from embedcache.dataset.settings import SplitSettings, with_split_seed
from embedcache.dataset.splits import make_split
from embedcache.errors import DataError, SettingError, UnfinishedError, pluralize, summary
from embedcache.evaluate.settings import PairsSettings
from embedcache.files import AnyPath
from embedcache.metrics import (
    CenteredRows,
    Doubles,
    Estimate,
    best_ranks,
    bootstrap_mean,
    chance_estimate,
    cka,
    effective_number,
    jackknife,
    kernel_products,
    nearest_others,
    neighbor_overlap,
    tied_chance_recall,
)
from embedcache.modalities import MODALITIES, directions, noun, order_pair, pair_nouns
from embedcache.processes import products_on
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.projectors.base import Moments, solve
from embedcache.settings import merge_settings, replace_fields, replace_flat
from embedcache.store.cache import Cache

if TYPE_CHECKING:
    from embedcache.options import PairsOptions

_MIN_SAMPLES = 20
_NUM_BLOCKS = 50
_RECALL_K = 10
_SHARED_WIDTH = 256  # default of training
_SHRINKAGE = 1.0  # default of training
_BLOCK = 1024


def _open_features(cache: Cache, modality: str, names: Sequence[str]) -> tuple[list[InputFeature], list[str]]:
    """Open the named features, or all complete ones that no run computed, and return a line for each one left out."""
    if names:
        by_name = {}
        for name in names:
            feature = open_input(cache, modality, name)
            by_name[feature.name] = feature
        for feature in by_name.values():
            feature.require_complete()
        return list(by_name.values()), []

    # Without any feature, opening one raises the error that names the command to extract some.
    stored = cache.features(modality)
    if not stored:
        open_input(cache, modality)

    complete = []
    skipped = []
    for stored_feature in stored:
        # A run was trained on these samples, so its features would look better than they are.
        if stored_feature.group.is_from_run:
            name = stored_feature.name
            skipped.append(f"left out: {name} was computed by a run; --feature {modality}={name} compares it")
            continue

        feature = InputFeature([stored_feature])
        try:
            feature.require_complete()
            complete.append(feature)
        except UnfinishedError as error:
            skipped.append(f"left out: {error}")

    if skipped and not complete:
        raise UnfinishedError(
            f"{cache.path}: expected a complete {modality} feature, got none; {skipped[0].partition(': ')[2]}"
        )
    return complete, skipped


def _draw_samples(cache: Cache, features: Sequence[Sequence[InputFeature]], settings: PairsSettings) -> Pairs:
    """Draw samples without replacement among the samples with an item of each modality that has all its features."""
    pairs = pair_items([cache], features[0][:1], features[1][:1], language=settings.language)
    first = _with_all(pairs.first, features[0])
    second = _with_all(pairs.second, features[1])

    # All pairs of features are compared on the same samples, or their metrics could not be ranked.
    samples = np.intersect1d(distinct(first.samples), distinct(second.samples), assume_unique=True)
    if settings.selection is not None:
        samples = np.intersect1d(samples, read_selection(settings.selection, [cache]), assume_unique=True)
    if len(samples) < _MIN_SAMPLES:
        raise DataError(
            f"expected at least {_MIN_SAMPLES} samples of {cache.path} with all of the features, got {len(samples)}: "
            "compare fewer features, or extract more samples"
        )
    if len(samples) > settings.num_samples:
        samples = np.random.default_rng(settings.seed).choice(samples, settings.num_samples, replace=False)
    return Pairs(first=first.select(samples), second=second.select(samples))


def _with_all(items: Items, features: Sequence[InputFeature]) -> Items:
    """Return the items that all features have encoded."""
    is_valid_N = np.logical_and.reduce([feature.valid for feature in features])
    return items.where(is_valid_N[items.rows])


class _Sample(NamedTuple):
    """The compared samples.

    Args:
        pairs: all pairs.
        train: pairs that the probe is fitted on.
        val: pairs that the probe is measured on.
        samples: (S,) int64 rows of the sample table, ascending.
        groups: (S,) near-duplicate group of each sample.
        blocks: (S,) jackknife block of each sample.
        split: how the split was made, or its file.
    """

    pairs: Pairs
    train: Pairs
    val: Pairs
    samples: Ints
    groups: Ints
    blocks: Ints
    split: str

    def positions(self, part: Pairs) -> tuple[Ints, Ints]:
        """Return the positions of the items of both modalities of a part among the items of all samples."""
        return (
            np.searchsorted(self.pairs.first.rows, part.first.rows),
            np.searchsorted(self.pairs.second.rows, part.second.rows),
        )

    def both_ways(self) -> list[tuple[tuple[Ints, Ints], Items, Items]]:
        """Return the positives, queries and candidates of both directions of the validation part."""
        first_M, second_M = self.val.positives()
        first = self.val.first
        second = self.val.second
        return [((first_M, second_M), first, second), ((second_M, first_M), second, first)]


def _split_samples(
    pairs: Pairs, cache: Cache, features: Sequence[InputFeature], settings: SplitSettings, progress: Progress
) -> _Sample:
    """Split samples into parts, without the test part."""
    reads = {feature.modality: feature.read for feature in features}
    split = make_split([cache], pairs, settings, reads, progress=progress)
    train = pairs.select(split.rows("train"))
    val = pairs.select(split.rows("val"))
    samples = distinct(np.concatenate([train.samples, val.samples]))
    if len(samples) < _MIN_SAMPLES or not (len(train.samples) and len(val.samples)):
        raise DataError(
            f"expected at least {_MIN_SAMPLES} samples in the training and validation parts, some in each, got "
            f"{len(train.samples)} and {len(val.samples)} of {len(pairs.samples)} drawn samples of {cache.path}: draw "
            "more with --num-samples, compare fewer features, or use another split"
        )

    # With 10 candidates, any order of them has an R@10 of 1.
    num_candidates = min(len(val.first.rows), len(val.second.rows))
    if num_candidates <= _RECALL_K:
        raise DataError(
            f"expected more than {_RECALL_K} {' and '.join(noun(feature.modality) for feature in features)} in the "
            f"validation part, on which R@{_RECALL_K} of the probe is measured, got {num_candidates} of "
            f"{len(samples):,} drawn samples: draw more with --num-samples, or use a split with a larger validation "
            "part, as by --val-fraction 0.25"
        )

    groups = np.array(split.groups)[samples]
    how = settings.kind if settings.path else split.line()
    return _Sample(pairs.select(samples), train, val, samples, groups, _assign_blocks(groups), how)


def _assign_blocks(groups: Ints) -> Ints:
    """Assign whole groups to blocks of about equal size, the largest group first: (S,) block of each sample."""
    _, group_S, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    block_sizes = np.zeros(min(_NUM_BLOCKS, len(sizes)), np.int64)
    block_G = np.empty(len(sizes), np.int64)
    for group in np.argsort(-sizes, kind="stable"):
        block_G[group] = block_sizes.argmin()
        block_sizes[block_G[group]] += sizes[group]
    block_S: Ints = block_G[group_S]
    return block_S


METRICS: Mapping[str, str] = {
    "probe": "probe R@10",
    "mutual_knn": "mutual kNN",
    "debiased_cka": "debiased CKA",
}
"""Metric -> name in tables and plots."""


@dataclass(frozen=True, kw_only=True)
class PairMetrics:
    """Metrics of one feature of each of two modalities.

    Args:
        features: modality -> `encoder/feature`.
        recalls: direction, such as `i2t` and `t2i` of images and texts -> R@10 of the probe.
        mutual_knn: fraction of nearest neighbors in common.
        debiased_cka: linear CKA from unbiased HSIC.
    """

    features: Mapping[str, str]
    recalls: Mapping[str, Estimate]
    mutual_knn: Estimate
    debiased_cka: Estimate

    @property
    def probe(self) -> float:
        """Mean R@10 of both directions."""
        return sum(recall.value for recall in self.recalls.values()) / 2

    def value(self, metric: str) -> float:
        """Return the value of one of `METRICS`."""
        metric_value = getattr(self, metric)
        return float(metric_value.value if isinstance(metric_value, Estimate) else metric_value)


@dataclass(frozen=True, kw_only=True)
class PairsReport:
    """Metrics of all pairs of features of a cache, the best probe first.

    Args:
        num_compared: drawn samples outside the test part of the split. All metrics compare these.
        num_trained: samples that the probe was fitted on.
        num_held: samples that the probe was measured on.
        num_groups: near-duplicate groups, which are resampled for intervals.
        knn_chance: mutual kNN of unrelated features.
        chance: chance level of the probe by direction.
        skipped: one line per feature that was left out.

    Example:
        >>> features = {"image": ["open_toy/cls"], "text": ["open_toy/mean"]}
        >>> report = embedcache.evaluate_pairs("cache", feature=features, split="key")
        >>> len(report.pairs), report.pairs[0].recalls["t2i"].value > 0
        (1, True)
    """

    pairs: Sequence[PairMetrics]
    num_drawn: int
    num_compared: int
    num_trained: int
    num_held: int
    num_groups: int
    split: str
    language: str | None
    k: int
    seed: int
    knn_chance: float
    chance: Mapping[str, Estimate]
    skipped: Sequence[str] = ()
    selection: str | None = None

    @property
    def rows(self) -> str:
        """How a sample becomes a row. The paper also averages five captions, and does not scale images first."""
        first, second = pair_nouns(tuple(self.pairs[0].features))
        return f"each item scaled to length 1, then the mean over a sample's {first} and over its {second}"

    __repr__ = summary

    def lines(self) -> list[str]:
        """Summarize the measurement, and name the best pair."""
        best = self.pairs[0]
        names = " × ".join(best.features.values())
        outcome = f"{names} has the best probe, R@{_RECALL_K} {best.probe:.3f}, of {len(self.pairs)} pairs"
        return [self.line(), f"before any training: {outcome}"]

    def line(self) -> str:
        """Summarize the measurement in one line."""
        selection = "" if self.selection is None else f" within {self.selection}"
        language = "" if self.language is None else f" in {self.language}"
        return (
            f"{pluralize(self.num_compared, 'sample')} outside the test part of {self.num_drawn:,} drawn{selection} "
            f"(seed {self.seed}), split {self.split}; rows: {self.rows}{language}; CKA centered; kNN by cosine, "
            f"k {self.k}; probe: CCA fitted on {self.num_trained:,} samples, ranked on {self.num_held:,} "
            f"others; 95% intervals over {pluralize(self.num_groups, 'near-duplicate group')}"
        )


def evaluate_pairs(
    cache: AnyPath,
    settings: PairsSettings | None = None,
    *,
    feature: NamedFeatures = None,
    progress: AnyProgress = None,
    **options: Unpack["PairsOptions"],
) -> PairsReport:
    """Compare every feature of one modality with every one of another on the same samples, without training.

    Features are named by `feature` as in `train`. Each feature is compared by itself. All features of a modality are
    compared if none of it is named.

    Samples that have all features are drawn and split. The test part is not used, so that a choice made here may be
    tested there. `PairsReport.rows` describes how a sample becomes a row. Token features are averaged over tokens. The
    probe is the CCA that training starts from, fitted on the training part and ranked on the validation part. A strict
    split compares the first feature of each of the two modalities, and the cache's other modalities.

    Intervals of CKA are a jackknife over 50 blocks of whole near-duplicate groups. Other intervals are a bootstrap over
    the groups. Memory: of the drawn samples, all features of the second modality (texts, if there are any) and one of
    the first in float32, two features in float64, three D × D matrices of the widest, and 64 MB of similarities. It
    never contains an n × n matrix.

    Raises:
        UnknownNameError: no such feature or language, or the cache has no feature of a modality.
        UnfinishedError: a named feature has missing chunks, or every feature has.
        SettingError: features are not of two modalities, k is not below the number of samples, or nothing can be held
            out.
        DataError: too few samples have all features or are in the validation part, or a feature is constant, NaN or
            infinite.

    Example:
        >>> features = {"image": ["open_toy/cls"], "text": ["open_toy/mean"]}
        >>> report = embedcache.evaluate_pairs("cache", feature=features, split="key")
        >>> sorted(report.pairs[0].recalls)
        ['i2t', 't2i']
    """
    settings = merge_settings(PairsSettings, settings, {})
    settings = replace_flat(settings, with_split_seed(options, settings))
    progress = to_progress(progress)
    cache = Cache(cache)
    names = _name_features(cache, feature)
    first, second = names
    first_features, first_skipped = _open_features(cache, first, names[first])
    second_features, second_skipped = _open_features(cache, second, names[second])

    # Features that are left out are named before the work starts.
    skipped = first_skipped + second_skipped
    for line in skipped:
        progress.note(line)
    settings = replace_fields(settings, language=choose_language([cache], names, settings.language, progress))

    pairs = _draw_samples(cache, (first_features, second_features), settings)
    sample = _split_samples(pairs, cache, (first_features[0], second_features[0]), settings.split, progress)
    if settings.k >= len(sample.samples):
        raise SettingError(f"k: expected less than the {len(sample.samples)} compared samples, got {settings.k}")

    metrics = _measure_pairs(sample, first_features, second_features, settings, progress)
    return PairsReport(
        pairs=sorted(metrics, key=lambda pair: -pair.probe),
        num_drawn=len(pairs.samples),
        num_compared=len(sample.samples),
        num_trained=len(sample.train.samples),
        num_held=len(sample.val.samples),
        num_groups=len(distinct(sample.groups)),
        split=sample.split,
        language=settings.language,
        k=settings.k,
        seed=settings.seed,
        knn_chance=settings.k / (len(sample.samples) - 1),
        chance=dict(zip(directions((first, second)), _chances(sample), strict=True)),
        skipped=skipped,
        selection=None if settings.selection is None else str(settings.selection),
    )


def _name_features(cache: Cache, feature: NamedFeatures) -> dict[str, Sequence[str]]:
    """Return the names of the features of two modalities, in the order of `order_pair`. No names mean all features."""
    # A single name is compared with all features of the other modality.
    names = features_by_modality(cache, feature)
    if len(names) < 2 and {*names} <= {*default_pair(cache)}:
        names = {modality: names.get(modality, []) for modality in default_pair(cache)}
    if len(names) != 2 or not {*names} <= {*MODALITIES}:
        raise SettingError(
            f"feature: expected features of two modalities of {', '.join(MODALITIES)}, got {', '.join(names)}; name "
            "some of both, such as audio=NAME and text=NAME"
        )
    return {modality: names[modality] for modality in order_pair(names)}


def _chances(sample: _Sample) -> list[Estimate]:
    """Compute the recall of a random order of the validation items, in both directions."""
    chances = []
    for positives, queries, candidates in sample.both_ways():
        recall = tied_chance_recall(positives, candidates.contents, _RECALL_K)
        chances.append(chance_estimate(recall, effective_number(queries.contents)))
    return chances


def _measure_pairs(
    sample: _Sample,
    first_features: Sequence[InputFeature],
    second_features: Sequence[InputFeature],
    settings: PairsSettings,
    progress: Progress,
) -> list[PairMetrics]:
    """Measure every pair. All second features are prepared first, then one first feature after another."""
    # One side stays in memory, so that each feature is read once.
    products = products_on(settings.device)
    progress.start("encoder pairs", len(first_features) * len(second_features), "pairs")
    prepared = [_prepare(feature, sample.pairs.second, sample, settings.k, products) for feature in second_features]
    metrics = []
    for feature in first_features:
        first = _prepare(feature, sample.pairs.first, sample, settings.k, products)
        for second in prepared:
            metrics.append(_measure(sample, first, second, products))
            progress.advance(1)
    progress.finish()
    return metrics


class _PreparedFeature(NamedTuple):
    """Vectors of the items of one feature, their means by sample, and the neighbors of the means."""

    modality: str
    name: str
    items_ND: Floats
    rows_SD: Floats
    neighbors_SK: Ints
    own: Doubles


def _prepare(feature: InputFeature, items: Items, sample: _Sample, k: int, products: Products) -> _PreparedFeature:
    parts = []
    for block in blocks(len(items.rows), _BLOCK):
        inputs = feature.read(items.rows[block])
        check_finite(inputs.values, f"the {feature.modality} feature {feature.name}", rows=items.rows[block])
        parts.append(to_unit_vectors(inputs))
    unit_ND = np.concatenate(parts)

    # A sample is the mean of its items, so that several captions count as one row.
    row_N = np.searchsorted(sample.samples, items.samples)
    rows_SD = np.zeros((len(sample.samples), unit_ND.shape[1]), np.float32)
    np.add.at(rows_SD, row_N, unit_ND)
    rows_SD /= np.bincount(row_N)[:, None].astype(np.float32)

    try:
        blocked = CenteredRows(rows_SD, sample.blocks)
    except DataError as error:
        raise DataError(f"{feature.modality} feature {feature.name}: {error}") from error
    neighbors_SK = nearest_others(rows_SD, k, products=products)
    products_with_itself = kernel_products(blocked, blocked)
    return _PreparedFeature(feature.modality, feature.name, unit_ND, rows_SD, neighbors_SK, products_with_itself)


def _measure(sample: _Sample, first: _PreparedFeature, second: _PreparedFeature, products: Products) -> PairMetrics:
    x = CenteredRows(first.rows_SD, sample.blocks)
    y = CenteredRows(second.rows_SD, sample.blocks)
    overlap_S = neighbor_overlap(first.neighbors_SK, second.neighbors_SK)
    recalls = _probe(sample, first.items_ND, second.items_ND, products)
    return PairMetrics(
        features={first.modality: first.name, second.modality: second.name},
        recalls=dict(zip(directions((first.modality, second.modality)), recalls, strict=True)),
        mutual_knn=bootstrap_mean(overlap_S, sample.groups),
        debiased_cka=jackknife(cka(kernel_products(x, y), first.own, second.own), np.bincount(sample.blocks)),
    )


def _probe(sample: _Sample, first_QD: Floats, second_CE: Floats, products: Products) -> list[Estimate]:
    """Fit CCA on all pairs of the training part, as training does, and rank the validation items both ways."""
    first_positions, second_positions = sample.positions(sample.train)
    first_items, second_items = sample.train.all_pairs()
    first_M = first_positions[first_items]
    second_M = second_positions[second_items]

    # CCA needs only second moments, which are summed block by block.
    moments = Moments(first_QD.shape[1], second_CE.shape[1])
    for block in blocks(len(first_M), 8 * _BLOCK):
        moments.add(first_QD[first_M[block]], second_CE[second_M[block]])
    first_DP, second_EP = solve("cca", moments, _SHARED_WIDTH, shrinkage=_SHRINKAGE)

    val_first, val_second = sample.positions(sample.val)
    first_NP = normalize((first_QD[val_first] - moments.first_mean) @ first_DP)
    second_NP = normalize((second_CE[val_second] - moments.second_mean) @ second_EP)

    recalls = []
    sides = ((first_NP, second_NP), (second_NP, first_NP))
    for vectors, (positives, queries, _) in zip(sides, sample.both_ways(), strict=True):
        ranks_Q = best_ranks(*vectors, positives, products=products)
        groups_Q = sample.groups[np.searchsorted(sample.samples, queries.samples)]
        recalls.append(bootstrap_mean(ranks_Q <= _RECALL_K, groups_Q))
    return recalls
