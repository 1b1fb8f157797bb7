"""Compare encoder pairs before any training: every image feature of a cache with every text feature."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from embedcache.arrays import Floats, Ints, Products, blocks, check_finite, distinct, normalize
from embedcache.dataset.inputs import InputFeature, to_unit_vectors
from embedcache.dataset.pairs import Items
from embedcache.dataset.settings import SplitSettings, with_split_seed
from embedcache.devices import products_on
from embedcache.encoders.image_features import FeatureName
from embedcache.errors import DataError, SettingError, pluralize
from embedcache.evaluate.pair_sample import PairSample, draw_samples, open_features, split_samples
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
from embedcache.metrics.durations import note_duration
from embedcache.metrics.intervals import Estimate, bootstrap_mean, jackknife
from embedcache.metrics.neighbors import top_k
from embedcache.metrics.ranking import best_ranks, note_ranking
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.projectors.closed_form import Moments, solve
from embedcache.settings import merge_settings, replace_flat
from embedcache.store.cache import Cache

_RECALL_K = 10
_SHARED_WIDTH, _SHRINKAGE = 256, 1.0  # the defaults of training
_BLOCK = 1024

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
            f"{pluralize(self.num_compared, 'sample')} outside the test part of {self.num_drawn:,} drawn "
            f"(seed {self.seed}), "
            f"split {self.split}; rows: {ROWS}{language}; CKA centered; kNN by cosine, k {self.k}; probe: CCA fitted "
            f"on {self.num_trained:,} samples, ranked on {self.num_held:,} others; 95% intervals over "
            f"{pluralize(self.num_groups, 'near-duplicate group')}"
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
        DataError: too few samples have all features or are in the validation part, or a feature is constant, NaN or
            infinite.
    """
    settings, progress = merge_settings(PairsSettings, settings, {}), to_progress(progress)
    settings = replace_flat(settings, with_split_seed(options, settings))
    cache = Cache(cache)
    images, skipped_images = open_features(cache, "image", settings.image_feature)
    texts, skipped_texts = open_features(cache, "text", settings.text_feature)
    for line in (skipped := [*skipped_images, *skipped_texts]):
        progress.note(line)
    pairs = draw_samples(cache, images, texts, settings)
    sample = split_samples(pairs, cache, (images[0], texts[0]), settings.split, progress)
    num_candidates = min(len(sample.val.first.rows), len(sample.val.second.rows))
    if num_candidates <= _RECALL_K:  # then any order of them has a recall of 1
        raise DataError(
            f"expected more than {_RECALL_K} images and texts in the validation part, on which R@{_RECALL_K} of the "
            f"probe is measured, got {num_candidates} of {len(sample.samples):,} drawn samples: draw more with "
            "--num-samples, or use a split with a larger validation part, as by --val-fraction 0.25"
        )
    if settings.k >= len(sample.samples):
        raise SettingError(f"k: expected less than the {len(sample.samples)} compared samples, got {settings.k}")
    metrics = _measure_pairs(sample, images, texts, settings, progress)
    return PairsReport(
        pairs=sorted(metrics, key=lambda pair: -pair.probe),
        pooling={feature.name: _pooling(feature) for feature in (*images, *texts)},
        num_drawn=len(pairs.samples),
        num_compared=len(sample.samples),
        num_trained=len(sample.train.samples),
        num_held=len(sample.val.samples),
        num_groups=len(distinct(sample.groups)),
        split=_split_line(settings.split, images[0], texts[0]),
        language=settings.language,
        k=settings.k,
        seed=settings.seed,
        knn_chance=settings.k / (len(sample.samples) - 1),
        chance=sample.chance(_RECALL_K),
        skipped=skipped,
    )


def _split_line(settings: SplitSettings, image: InputFeature, text: InputFeature) -> str:
    if settings.kind != "strict":
        return settings.kind
    limits = f"{settings.image_cosine:g} and {settings.text_cosine:g}"
    return f"{settings.kind} by {image.name} and {text.name} (cosine above {limits})"


def _measure_pairs(
    sample: PairSample,
    images: Sequence[InputFeature],
    texts: Sequence[InputFeature],
    settings: PairsSettings,
    progress: Progress,
) -> list[PairMetrics]:
    """Measure every pair: all texts are prepared first, then one image after another."""
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
    return metrics


def _note_duration(
    sample: PairSample,
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
    note_ranking(progress, num_ranked, min(_SHARED_WIDTH, width), products=products)


class _PreparedFeature(NamedTuple):
    """All that its pairs need of one feature: vectors of items, means of samples, and the neighbors of those."""

    name: str
    items_ID: Floats
    rows_SD: Floats
    neighbors_SK: Ints
    own: KernelProducts


def _prepare(feature: InputFeature, items: Items, sample: PairSample, k: int, products: Products) -> _PreparedFeature:
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
    sample: PairSample, image: _PreparedFeature, text: _PreparedFeature, resamples: int, products: Products
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
    sample: PairSample, images_ID: Floats, texts_TE: Floats, resamples: int, products: Products
) -> tuple[Estimate, Estimate]:
    """Fit CCA on all pairs of the training part, as training does, and rank the validation items both ways."""
    positions = sample.positions(sample.train)
    image_M, text_M = (position[joined] for position, joined in zip(positions, sample.train.all_pairs(), strict=True))
    moments = Moments(images_ID.shape[1], texts_TE.shape[1])
    for block in blocks(len(image_M), 8 * _BLOCK):
        moments.add(images_ID[image_M[block]], texts_TE[text_M[block]])
    image_DP, text_EP = solve("cca", moments, _SHARED_WIDTH, shrinkage=_SHRINKAGE)
    val_image, val_text = sample.positions(sample.val)
    images = normalize((images_ID[val_image] - moments.first_mean) @ image_DP)
    texts = normalize((texts_TE[val_text] - moments.second_mean) @ text_EP)
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
