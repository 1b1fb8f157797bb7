"""Which encoders go together, before any training: every image feature of a cache with every text feature."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedcache.arrays import Array, Floats, Inputs, Ints, blocks, check_finite, normalize
from embedcache.dataset.inputs import InputFeature, mean_vectors, open_input
from embedcache.dataset.pairs import Items
from embedcache.dataset.settings import SplitSettings
from embedcache.encoders.image_features import FeatureName
from embedcache.errors import DataError, SettingError, UnfinishedError
from embedcache.evaluate.pair_samples import LEAST_SAMPLES, Drawn, cut, draw
from embedcache.metrics.alignment import Blocked, Products, cka, nearest_others, neighbor_overlap, products, shuffled
from embedcache.metrics.intervals import Estimate, bootstrap_mean, jackknife
from embedcache.metrics.ranking import best_ranks
from embedcache.progress import NullProgress, Progress
from embedcache.projectors.closed_form import Moments, solve
from embedcache.store.cache import Cache

VAL_SHARE = 0.25
"""Of the split that is made here: a probe needs more held-out samples than a choice of epochs does."""

_RECALL_K = 10
_SHARED_WIDTH, _SHRINKAGE = 256, 1.0  # as training starts
_BLOCK = 1024


ROWS = "each item scaled to length 1, then the mean over a sample's images and over its captions"
"""How a sample becomes one row of a side; the paper averages five captions too, and does not scale images first."""

METRICS: Mapping[str, str] = {
    "probe": "probe R@10",
    "mutual_knn": "mutual kNN",
    "debiased_cka": "debiased CKA",
    "linear_cka": "linear CKA",
}
"""Metric -> what it is called in tables and figures."""


@dataclass(frozen=True, kw_only=True)
class PairFigures:
    """What was measured of one image feature and one text feature.

    Args:
        image: `encoder/feature`.
        text: alike.
        i2t: recall at 10 of the probe, image to text.
        t2i: text to image.
        mutual_knn: share of nearest neighbors in common.
        debiased_cka: linear CKA from unbiased HSIC.
        linear_cka: linear CKA as the paper has it.
        shuffled_cka: what linear CKA is expected to be with shuffled pairs.
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
        """Recall at 10, mean of both ways."""
        return (self.i2t.value + self.t2i.value) / 2

    def value(self, metric: str) -> float:
        """Get the value of one of `METRICS`."""
        found = getattr(self, metric)
        return float(found.value if isinstance(found, Estimate) else found)


@dataclass(frozen=True, kw_only=True)
class PairsReport:
    """All pairs of a cache's features, the best probe first, and what decided the figures.

    Args:
        pairs: the figures.
        pooling: feature -> how its encoder made one vector, or several that were averaged.
        num_drawn: samples that were drawn from the cache.
        num_compared: those of them outside the split's test part, which all metrics are of.
        num_trained: those that the probe was fitted on.
        num_held: those that it was measured on.
        num_groups: groups of near-duplicates that intervals are over.
        split: how the parts were cut, in words.
        language: of the captions; None is all.
        k: neighbors of mutual kNN.
        seed: of the drawing and the split.
        knn_chance: mutual kNN of sides that have nothing in common.
        chance: of the probe: `i2t`, `t2i`.
        skipped: a line for each feature that was left out.
    """

    pairs: Sequence[PairFigures]
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
        """Say what was measured, in one line."""
        language = "" if self.language is None else f" in {self.language}"
        return (
            f"{self.num_compared:,} samples outside the test part of {self.num_drawn:,} drawn (seed {self.seed}), "
            f"split {self.split}; rows: {ROWS}{language}; CKA centered; kNN by cosine, k {self.k}; probe: CCA fitted "
            f"on {self.num_trained:,} samples, ranked on {self.num_held:,} others; 95 % intervals over "
            f"{self.num_groups:,} groups of near-duplicates"
        )


def evaluate_pairs(
    cache_path: Path | str,
    *,
    images: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    language: str | None = None,
    num_samples: int = 5000,
    k: int = 10,
    seed: int = 0,
    num_draws: int = 2000,
    split: SplitSettings | None = None,
    progress: Progress | None = None,
) -> PairsReport:
    """Compare every image feature with every text feature of a cache on the same samples; nothing is trained.

    Samples that have all of the features are drawn, and cut into parts; those of the test part are never looked at,
    so that a choice made here may be tested there. `ROWS` in `pairs_report` says how a sample becomes a row; token
    features are the mean of their tokens. The probe is CCA as training starts from it, fitted on the training part
    and ranked on the validation part. A strict split is by the first image and the first text feature.

    Intervals of CKA are a jackknife over 50 blocks of whole groups of near-duplicates, those of the others a bootstrap
    over the groups. Memory: all text features and one image feature of the drawn samples in float32, two features in
    float64, three D × D matrices of the widest, and 64 MB of similarities; never n × n.

    Args:
        cache_path: the cache.
        images: image features, `encoder/feature`, with `+` between several of one encoder; None is all finished ones.
        texts: text features, alike.
        language: captions of this language; None is all.
        num_samples: how many to draw, at most.
        k: neighbors of mutual kNN.
        seed: of the drawing, and of the split that is made where none is given.
        num_draws: resamples of the bootstrap.
        split: how to cut; None is strict with a quarter each for validation and test.
        progress: told about pairs.

    Raises:
        UnknownNameError: no such feature or language, or the cache has no feature of a modality.
        UnfinishedError: a named feature has missing chunks, or all have.
        SettingError: too few samples asked for, a k that is not below them, or nothing can be held out.
        DataError: too few samples have all features, or a feature is constant or no number.
    """
    if num_samples < LEAST_SAMPLES:
        raise SettingError(f"num samples is {num_samples}; at least {LEAST_SAMPLES} are needed")
    progress = progress or NullProgress()
    cache = Cache(cache_path)
    image_sides, skipped_images = _open_sides(cache, "image", images)
    text_sides, skipped_texts = _open_sides(cache, "text", texts)
    for line in (skipped := [*skipped_images, *skipped_texts]):
        progress.note(line)
    pairs = draw(cache, image_sides, text_sides, language, num_samples, seed)
    settings = split or SplitSettings(val_fraction=VAL_SHARE, seed=seed)
    drawn = cut(pairs, cache, (image_sides[0], text_sides[0]), settings)
    drawn.check(k)
    progress.start("encoder pairs", len(image_sides) * len(text_sides), "pairs")
    figures = _compare(drawn, image_sides, text_sides, k, num_draws, lambda: progress.advance(1))
    progress.finish()
    return PairsReport(
        pairs=sorted(figures, key=lambda pair: -pair.probe),
        pooling={side.name: _pooling(side) for side in (*image_sides, *text_sides)},
        num_drawn=len(pairs.samples),
        num_compared=len(drawn.samples),
        num_trained=len(drawn.train.samples),
        num_held=len(drawn.held.samples),
        num_groups=len(np.unique(drawn.groups)),
        split=_split_line(settings, image_sides[0], text_sides[0]),
        language=language,
        k=k,
        seed=seed,
        knn_chance=k / (len(drawn.samples) - 1),
        chance=drawn.chance(_RECALL_K),
        skipped=skipped,
    )


def _open_sides(cache: Cache, modality: str, names: Sequence[str] | None) -> tuple[list[InputFeature], list[str]]:
    """Open the named sides, or all finished ones: the sides, and a line for each that was left out."""
    if names:
        named = {side.name: side for side in (open_input(cache, modality, name) for name in names)}
        for side in named.values():
            side.require_complete()
        return list(named.values()), []
    features = cache.features(modality)
    if not features:
        open_input(cache, modality)  # raises, and says how to get some
    found, skipped = [], []
    for feature in features:
        side = InputFeature([feature])
        try:
            side.require_complete()
            found.append(side)
        except UnfinishedError as error:
            skipped.append(f"left out: {error}")
    if skipped and not found:
        raise UnfinishedError(f"no {modality} feature of {cache.path} is finished; {skipped[0].partition(': ')[2]}")
    return found, skipped


@dataclass(frozen=True, kw_only=True)
class _Side:
    """One side made ready for its pairs.

    Args:
        items: (I, D) float32, the vectors of all items, of length 1.
        rows: (S, D) float32, their mean in each sample.
        neighbors: (S, K) int64, of the rows.
        own: products of the rows with themselves.
    """

    items: Floats
    rows: Array
    neighbors: Ints
    own: Products


def _compare(
    drawn: Drawn,
    images: Sequence[InputFeature],
    texts: Sequence[InputFeature],
    k: int,
    num_draws: int,
    advance: Callable[[], None],
) -> list[PairFigures]:
    prepared = [_prepare(side, drawn.pairs.text, drawn, k) for side in texts]
    figures = []
    for image in images:
        image_side = _prepare(image, drawn.pairs.image, drawn, k)
        for text, text_side in zip(texts, prepared, strict=True):
            names = image.name, text.name
            figures.append(_measure(drawn, names, image_side, text_side, num_draws))
            advance()
    return figures


def _prepare(side: InputFeature, items: Items, drawn: Drawn, k: int) -> _Side:
    parts = [normalize(mean_vectors(_read(side, items.rows[block]))) for block in blocks(len(items.rows), _BLOCK)]
    unit_ID = np.concatenate(parts)
    row_I = np.searchsorted(drawn.samples, items.samples)
    rows_SD = np.zeros((len(drawn.samples), unit_ID.shape[1]), np.float32)
    np.add.at(rows_SD, row_I, unit_ID)
    rows_SD /= np.bincount(row_I)[:, None].astype(np.float32)
    try:
        blocked = Blocked(rows_SD, drawn.blocks)
    except DataError as error:
        raise DataError(f"{side.modality} feature {side.name}: {error}") from error
    return _Side(items=unit_ID, rows=rows_SD, neighbors=nearest_others(rows_SD, k), own=products(blocked, blocked))


def _read(side: InputFeature, rows: Ints) -> Inputs:
    inputs = side.read(rows)
    check_finite(inputs.values, f"the {side.modality} feature {side.name}", rows=rows)
    return inputs


def _measure(drawn: Drawn, names: tuple[str, str], image: _Side, text: _Side, num_draws: int) -> PairFigures:
    x, y = Blocked(image.rows, drawn.blocks), Blocked(text.rows, drawn.blocks)
    both, sizes = products(x, y), np.bincount(drawn.blocks)
    overlap_S = neighbor_overlap(image.neighbors, text.neighbors)
    i2t, t2i = _probe(drawn, image.items, text.items, num_draws)
    return PairFigures(
        image=names[0],
        text=names[1],
        i2t=i2t,
        t2i=t2i,
        mutual_knn=bootstrap_mean(overlap_S, drawn.groups, num_draws=num_draws),
        debiased_cka=jackknife(cka(both.unbiased, image.own.unbiased, text.own.unbiased), sizes),
        linear_cka=jackknife(cka(both.biased, image.own.biased, text.own.biased), sizes),
        shuffled_cka=shuffled(x, y, image.own, text.own),
    )


def _probe(drawn: Drawn, images_ID: Floats, texts_TE: Floats, num_draws: int) -> tuple[Estimate, Estimate]:
    """Fit CCA on all pairs of the training part, as training does, and rank the held-out items both ways."""
    places = drawn.places(drawn.train)
    image_M, text_M = (place[joined] for place, joined in zip(places, drawn.train.joined(), strict=True))
    moments = Moments(images_ID.shape[1], texts_TE.shape[1])
    for block in blocks(len(image_M), 8 * _BLOCK):
        moments.add(images_ID[image_M[block]], texts_TE[text_M[block]])
    image_DP, text_EP = solve("cca", moments, _SHARED_WIDTH, shrinkage=_SHRINKAGE)
    held_image, held_text = drawn.places(drawn.held)
    images = normalize((images_ID[held_image] - moments.image_mean) @ image_DP)
    texts = normalize((texts_TE[held_text] - moments.text_mean) @ text_EP)
    image_P, text_P = drawn.held.positives()
    i2t = best_ranks(images, texts, (image_P, text_P))
    t2i = best_ranks(texts, images, (text_P, image_P))
    of_images, of_texts = (drawn.groups_of(items.samples) for items in (drawn.held.image, drawn.held.text))
    return (
        bootstrap_mean(i2t <= _RECALL_K, of_images, num_draws=num_draws),
        bootstrap_mean(t2i <= _RECALL_K, of_texts, num_draws=num_draws),
    )


def _pooling(side: InputFeature) -> str:
    """Say how a side's encoder made its vectors, in the words of the fingerprint."""
    said = side.fingerprint.get("pooling", {})
    words = " and ".join(_made(part.partition("/")[2], said) for part in side.name.split("+"))
    return words + (", mean of the tokens" if side.has_tokens else "")


def _made(name: str, said: Mapping[str, str]) -> str:
    parsed = FeatureName.parse(name)
    if name in said or parsed is None:
        return said.get(name, name)
    cells = "" if parsed.grid is None and parsed.clusters is None else f"{name.rpartition('.')[2]} of "
    layer = "" if parsed.layer is None else f"after block {parsed.layer}: "
    return f"{layer}{cells}{said.get(parsed.native, parsed.native)}"


def _split_line(settings: SplitSettings, image: InputFeature, text: InputFeature) -> str:
    if settings.kind != "strict":
        return settings.kind
    limits = f"{settings.image_cosine:g} and {settings.text_cosine:g}"
    return f"strict by {image.name} and {text.name} (cosine above {limits})"
