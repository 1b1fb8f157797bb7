"""Compare encoder pairs before any training: every image feature of a cache with every text feature."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from embedcache.arrays import Floats, Ints, Products, blocks, check_finite, normalize
from embedcache.dataset.inputs import InputFeature, open_input, to_unit_vectors
from embedcache.dataset.pairs import Items, Pairs, pair_items
from embedcache.dataset.settings import SplitSettings, with_split_seed
from embedcache.dataset.splits import make_split
from embedcache.devices import products_on
from embedcache.encoders.image_features import FeatureName
from embedcache.errors import DataError, SettingError, UnfinishedError
from embedcache.evaluate.settings import PairsSettings
from embedcache.files import AnyPath
from embedcache.metrics.alignment import (
    CenteredRows,
    KernelProducts,
    cka,
    kernel_products,
    nearest_others,
    neighbor_overlap,
    shuffled_from_products,
)
from embedcache.metrics.intervals import Estimate, bootstrap_mean, chance_estimate, effective_number, jackknife
from embedcache.metrics.neighbors import note_duration, top_k
from embedcache.metrics.ranking import best_ranks, tied_chance_recall
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.projectors.closed_form import Moments, solve
from embedcache.settings import replace_flat
from embedcache.store.cache import Cache

_RECALL_K = 10
_SHARED_WIDTH, _SHRINKAGE = 256, 1.0  # the defaults of training
_BLOCK = 1024
_MIN_SAMPLES = 20
_NUM_BLOCKS = 50

ROWS = "each item scaled to length 1, then the mean over a sample's images and over its captions"
"""How a sample becomes one row per modality; the paper averages five captions too, and does not scale images first."""

METRICS: Mapping[str, str] = {
    "probe": "probe R@10",
    "mutual_knn": "mutual kNN",
    "debiased_cka": "debiased CKA",
    "linear_cka": "linear CKA",
}
"""Metric -> name in tables and plots."""


@dataclass(frozen=True, kw_only=True)
class PairMetrics:
    """Metrics of one image feature and one text feature.

    Args:
        image: `encoder/feature`.
        text: `encoder/feature`.
        i2t: R@10 of the probe, image to text; `t2i` is the other direction.
        mutual_knn: fraction of nearest neighbors in common.
        debiased_cka: linear CKA from unbiased HSIC.
        shuffled_cka: expectation of linear CKA for shuffled pairs.
    """

    image: str
    text: str
    i2t: Estimate
    t2i: Estimate
    mutual_knn: Estimate
    debiased_cka: Estimate
    linear_cka: Estimate
    shuffled_cka: float

    @property
    def probe(self) -> float:
        """Mean R@10 of both directions."""
        return (self.i2t.value + self.t2i.value) / 2

    def value(self, metric: str) -> float:
        """Return the value of one of `METRICS`."""
        metric_value = getattr(self, metric)
        return float(metric_value.value if isinstance(metric_value, Estimate) else metric_value)


@dataclass(frozen=True, kw_only=True)
class PairsReport:
    """Metrics of all pairs of features of a cache, the best probe first.

    Args:
        pooling: feature -> how its encoder pooled one vector, or several that were averaged.
        num_compared: of the drawn samples, those outside the test part of the split, which all metrics are of.
        num_trained: samples that the probe was fitted on.
        num_held: samples that the probe was measured on.
        num_groups: near-duplicate groups, which intervals are over.
        knn_chance: mutual kNN of unrelated features.
        chance: chance level of the probe: `i2t`, `t2i`.
        skipped: one line per feature that was left out.
    """

    pairs: Sequence[PairMetrics]
    pooling: Mapping[str, str]
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

    def line(self) -> str:
        """Summarize what was measured in one line."""
        language = "" if self.language is None else f" in {self.language}"
        return (
            f"{self.num_compared:,} samples outside the test part of {self.num_drawn:,} drawn (seed {self.seed}), "
            f"split {self.split}; rows: {ROWS}{language}; CKA centered; kNN by cosine, k {self.k}; probe: CCA fitted "
            f"on {self.num_trained:,} samples, ranked on {self.num_held:,} others; 95% intervals over "
            f"{self.num_groups:,} near-duplicate groups"
        )


def evaluate_pairs(
    cache: AnyPath, settings: PairsSettings | None = None, *, progress: AnyProgress = None, **options: Any
) -> PairsReport:
    """Compare every image feature with every text feature of a cache on the same samples, without training.

    Samples that have all features are drawn and split. Those of the test part are not used, so that a choice made here
    may be tested there. `ROWS` describes how a sample becomes a row; token features are averaged over tokens. The
    probe is the CCA that training starts from, fitted on the training part and ranked on the validation part. A strict
    split is by the first image and the first text feature.

    Intervals of CKA are a jackknife over 50 blocks of whole near-duplicate groups, those of the others a bootstrap over
    the groups. Memory: all text features and one image feature of the drawn samples in float32, two features in
    float64, three D × D matrices of the widest, and 64 MB of similarities; never n × n.

    Raises:
        UnknownNameError: no such feature or language, or the cache has no feature of a modality.
        UnfinishedError: a named feature has missing chunks, or all have.
        SettingError: k is not below the number of samples, or nothing can be held out.
        DataError: too few samples have all features, or a feature is constant, NaN or infinite.
    """
    settings, progress = replace_flat(settings or PairsSettings(), with_split_seed(options)), to_progress(progress)
    cache = Cache(cache)
    images, skipped_images = _open_features(cache, "image", settings.image_feature)
    texts, skipped_texts = _open_features(cache, "text", settings.text_feature)
    for line in (skipped := [*skipped_images, *skipped_texts]):
        progress.note(line)
    pairs = _draw_samples(cache, images, texts, settings)
    sample = _split_samples(pairs, cache, (images[0], texts[0]), settings.split, progress)
    if settings.k >= len(sample.samples):
        raise SettingError(f"k: expected less than the {len(sample.samples)} compared samples, got {settings.k}")
    products = products_on(settings.device)
    _note_duration(sample, images, texts, settings.k, progress, products)
    progress.start("encoder pairs", len(images) * len(texts), "pairs")
    prepared_texts = [_prepare(feature, sample.pairs.second, sample, settings.k, products) for feature in texts]
    metrics = []
    for feature in images:
        image = _prepare(feature, sample.pairs.first, sample, settings.k, products)
        for text in prepared_texts:
            metrics.append(_measure(sample, image, text, settings.resamples, products))
            progress.advance(1)
    progress.finish()
    split = settings.split.kind
    if split == "strict":
        limits = f"{settings.split.image_cosine:g} and {settings.split.text_cosine:g}"
        split += f" by {images[0].name} and {texts[0].name} (cosine above {limits})"
    return PairsReport(
        pairs=sorted(metrics, key=lambda pair: -pair.probe),
        pooling={feature.name: _pooling(feature) for feature in (*images, *texts)},
        num_drawn=len(pairs.samples),
        num_compared=len(sample.samples),
        num_trained=len(sample.train.samples),
        num_held=len(sample.val.samples),
        num_groups=len(np.unique(sample.groups)),
        split=split,
        language=settings.language,
        k=settings.k,
        seed=settings.seed,
        knn_chance=settings.k / (len(sample.samples) - 1),
        chance=sample.chance(_RECALL_K),
        skipped=skipped,
    )


def _open_features(cache: Cache, modality: str, names: Sequence[str]) -> tuple[list[InputFeature], list[str]]:
    """Open the named features, or all complete ones that no run computed, and return a line for each one left out."""
    if names:
        named = {feature.name: feature for feature in (open_input(cache, modality, name) for name in names)}
        for feature in named.values():
            feature.require_complete()
        return list(named.values()), []
    stored = cache.features(modality)
    if not stored:
        open_input(cache, modality)  # raises, with the command that extracts some
    complete, skipped = [], []
    for stored_feature in stored:
        if stored_feature.group.is_from_run:  # which was trained on these samples
            name = stored_feature.name
            skipped.append(f"left out: {name} was computed by a run; name it with --{modality}-feature to compare it")
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


def _draw_samples(
    cache: Cache, images: Sequence[InputFeature], texts: Sequence[InputFeature], settings: PairsSettings
) -> Pairs:
    """Draw samples without replacement from those that have an image and a text with all of the features."""
    pairs = pair_items([cache], images[:1], texts[:1], language=settings.language)
    image, text = (
        items.where(np.logical_and.reduce([feature.valid for feature in features])[items.rows])
        for items, features in ((pairs.first, images), (pairs.second, texts))
    )
    samples = np.intersect1d(image.samples, text.samples)
    if len(samples) < _MIN_SAMPLES:
        raise DataError(
            f"expected at least {_MIN_SAMPLES} samples of {cache.path} with all of the features, got {len(samples)}: "
            "compare fewer features, or extract more samples"
        )
    if len(samples) > settings.num_samples:
        samples = np.random.default_rng(settings.seed).choice(samples, settings.num_samples, replace=False)
    return Pairs(first=image.select(samples), second=text.select(samples))


@dataclass(frozen=True, kw_only=True)
class _PairSample:
    """The compared samples: all pairs, those that the probe is fitted on, and those that it is measured on.

    `groups` and `blocks` are (S,): the near-duplicate group and the jackknife block of each of `samples`.
    """

    pairs: Pairs
    train: Pairs
    val: Pairs
    groups: Ints
    blocks: Ints

    @property
    def samples(self) -> Ints:
        """(S,) int64 rows of the sample table, ascending."""
        return self.pairs.samples

    def groups_of(self, samples: Ints) -> Ints:
        """Return the groups of some of the samples."""
        groups: Ints = self.groups[np.searchsorted(self.samples, samples)]
        return groups

    def positions(self, part: Pairs) -> tuple[Ints, Ints]:
        """Return the positions of the images and texts of a part among those of all samples."""
        return (
            np.searchsorted(self.pairs.first.rows, part.first.rows),
            np.searchsorted(self.pairs.second.rows, part.second.rows),
        )

    def chance(self, k: int) -> dict[str, Estimate]:
        """Compute the recall at k of a random order of the validation items: `i2t` and `t2i`."""
        image_M, text_M = self.val.positives()
        images, texts = self.val.first, self.val.second
        directions = {"i2t": ((image_M, text_M), images, texts), "t2i": ((text_M, image_M), texts, images)}
        return {
            name: chance_estimate(
                tied_chance_recall(positives, candidates.contents, k), effective_number(queries.contents)
            )
            for name, (positives, queries, candidates) in directions.items()
        }


def _split_samples(
    pairs: Pairs, cache: Cache, features: Sequence[InputFeature], settings: SplitSettings, progress: Progress
) -> _PairSample:
    """Split samples into parts, without the test part; the two features decide near-duplicates of a strict split."""
    split = make_split(
        [cache], pairs, settings, {feature.modality: feature.read for feature in features}, progress=progress
    )
    train, val = pairs.select(split.rows("train")), pairs.select(split.rows("val"))
    both = np.union1d(train.samples, val.samples)
    if len(both) < _MIN_SAMPLES or not (len(train.samples) and len(val.samples)):
        raise DataError(
            f"expected at least {_MIN_SAMPLES} samples in the training and validation parts, some in each, got "
            f"{len(train.samples)} and {len(val.samples)} of {len(pairs.samples)} samples of {cache.path} with all "
            "features: compare fewer features, or use another split"
        )
    groups = np.array(split.groups)[both]
    return _PairSample(pairs=pairs.select(both), train=train, val=val, groups=groups, blocks=_assign_blocks(groups))


def _assign_blocks(groups: Ints) -> Ints:
    """Assign whole groups to blocks of about equal size, the largest group first: (S,) block of each sample."""
    _, group_S, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    filled = np.zeros(min(_NUM_BLOCKS, len(sizes)), np.int64)
    block_G = np.empty(len(sizes), np.int64)
    for group in np.argsort(-sizes, kind="stable"):
        block_G[group] = filled.argmin()
        filled[block_G[group]] += sizes[group]
    block_S: Ints = block_G[group_S]
    return block_S


def _note_duration(
    sample: _PairSample,
    images: Sequence[InputFeature],
    texts: Sequence[InputFeature],
    k: int,
    progress: Progress,
    products: Products,
) -> None:
    """Report how long the neighbors of all features and the probes of all pairs will take."""
    features = [*images, *texts]
    width = sum(feature.width for feature in features) // len(features)
    note_duration(
        progress,
        "nearest neighbors",
        len(features) * len(sample.samples) ** 2,
        width,
        compare=lambda rows_ND, others_ND: top_k(rows_ND, others_ND, min(k, len(others_ND)), products=products),
    )
    num_ranked = 2 * len(images) * len(texts) * len(sample.val.first.rows) * len(sample.val.second.rows)
    note_duration(progress, "ranking", num_ranked, min(_SHARED_WIDTH, width))


class _PreparedFeature(NamedTuple):
    """All that its pairs need of one feature: vectors of items, means of samples, and the neighbors of those."""

    name: str
    items_ID: Floats
    rows_SD: Floats
    neighbors_SK: Ints
    own: KernelProducts


def _prepare(feature: InputFeature, items: Items, sample: _PairSample, k: int, products: Products) -> _PreparedFeature:
    parts = []
    for block in blocks(len(items.rows), _BLOCK):
        inputs = feature.read(items.rows[block])
        check_finite(inputs.values, f"the {feature.modality} feature {feature.name}", rows=items.rows[block])
        parts.append(to_unit_vectors(inputs))
    unit_ID = np.concatenate(parts)
    row_I = np.searchsorted(sample.samples, items.samples)
    rows_SD = np.zeros((len(sample.samples), unit_ID.shape[1]), np.float32)
    np.add.at(rows_SD, row_I, unit_ID)
    rows_SD /= np.bincount(row_I)[:, None].astype(np.float32)
    try:
        blocked = CenteredRows(rows_SD, sample.blocks)
    except DataError as error:
        raise DataError(f"{feature.modality} feature {feature.name}: {error}") from error
    own = kernel_products(blocked, blocked)
    return _PreparedFeature(feature.name, unit_ID, rows_SD, nearest_others(rows_SD, k, products=products), own)


def _measure(
    sample: _PairSample, image: _PreparedFeature, text: _PreparedFeature, resamples: int, products: Products
) -> PairMetrics:
    x, y = CenteredRows(image.rows_SD, sample.blocks), CenteredRows(text.rows_SD, sample.blocks)
    both, sizes = kernel_products(x, y), np.bincount(sample.blocks)
    overlap_S = neighbor_overlap(image.neighbors_SK, text.neighbors_SK)
    i2t, t2i = _probe(sample, image.items_ID, text.items_ID, resamples, products)
    return PairMetrics(
        image=image.name,
        text=text.name,
        i2t=i2t,
        t2i=t2i,
        mutual_knn=bootstrap_mean(overlap_S, sample.groups, num_draws=resamples),
        debiased_cka=jackknife(cka(both.unbiased, image.own.unbiased, text.own.unbiased), sizes),
        linear_cka=jackknife(cka(both.biased, image.own.biased, text.own.biased), sizes),
        shuffled_cka=shuffled_from_products(x, y, image.own, text.own),
    )


def _probe(
    sample: _PairSample, images_ID: Floats, texts_TE: Floats, resamples: int, products: Products
) -> tuple[Estimate, Estimate]:
    """Fit CCA on all pairs of the training part, as training does, and rank the validation items both ways."""
    positions = sample.positions(sample.train)
    image_M, text_M = (position[joined] for position, joined in zip(positions, sample.train.all_pairs(), strict=True))
    moments = Moments(images_ID.shape[1], texts_TE.shape[1])
    for block in blocks(len(image_M), 8 * _BLOCK):
        moments.add(images_ID[image_M[block]], texts_TE[text_M[block]])
    image_DP, text_EP = solve("cca", moments, _SHARED_WIDTH, shrinkage=_SHRINKAGE)
    val_image, val_text = sample.positions(sample.val)
    images = normalize((images_ID[val_image] - moments.image_mean) @ image_DP)
    texts = normalize((texts_TE[val_text] - moments.text_mean) @ text_EP)
    image_M, text_M = sample.val.positives()

    def recall(ranks: Ints, items: Items) -> Estimate:
        return bootstrap_mean(ranks <= _RECALL_K, sample.groups_of(items.samples), num_draws=resamples)

    i2t = recall(best_ranks(images, texts, (image_M, text_M), products=products), sample.val.first)
    return i2t, recall(best_ranks(texts, images, (text_M, image_M), products=products), sample.val.second)


def _pooling(feature: InputFeature) -> str:
    """Describe how the encoder pooled its vectors, in the words of the fingerprint."""
    pooling = feature.fingerprint.get("pooling", {})
    words = " and ".join(_pooled(part.partition("/")[2], pooling) for part in feature.name.split("+"))
    return words + (", mean of the tokens" if feature.has_tokens else "")


def _pooled(name: str, pooling: Mapping[str, str]) -> str:
    parsed = FeatureName.parse(name)
    if name in pooling or parsed is None:
        return pooling.get(name, name)
    cells = "" if parsed.grid is None and parsed.clusters is None else f"{name.rpartition('.')[2]} of "
    layer = "" if parsed.layer is None else f"after block {parsed.layer}: "
    return f"{layer}{cells}{pooling.get(parsed.native, parsed.native)}"
