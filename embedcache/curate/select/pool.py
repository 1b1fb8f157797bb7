"""The samples that are selected from, the best samples of each concept, and k-means: what methods share."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from embedcache.arrays import Array, Floats, Ints, concatenated_ranges, normalize
from embedcache.curate.select.settings import SelectSettings
from embedcache.dataset.scores import Score, read_scores
from embedcache.dataset.selections import read_selection
from embedcache.errors import DataError, SettingError, UnknownNameError
from embedcache.files import AnyPath
from embedcache.modalities import noun
from embedcache.progress import NullProgress, Progress
from embedcache.search.concepts import Concepts, choose_feature, open_concepts
from embedcache.search.faiss_index import spherical_kmeans
from embedcache.search.vectors import Vectors
from embedcache.store.cache import Cache


class Pool:
    """Some samples of one cache, with their vectors, captions, concepts and target, each read when a method needs it.

    Args:
        cache_path: path or URL of the cache.
        modality: modality of the compared items.
        settings: feature, run, concepts, target, and the selection that limits the pool.
        progress: progress in items; methods report their own steps to it.

    Raises:
        UnknownNameError: no feature or several features have that name.
        UnfinishedError: chunks of the feature are missing.
        FingerprintError: the run was trained on other features.
        DataError: no sample of the selection has such an item.
    """

    def __init__(
        self,
        cache_path: AnyPath,
        modality: str,
        settings: SelectSettings | None = None,
        *,
        progress: Progress | None = None,
    ) -> None:
        self.cache = Cache(cache_path)
        self.modality = modality
        self._settings = settings or SelectSettings()
        self.progress = progress or NullProgress()

    @cached_property
    def vectors(self) -> Vectors:
        """Vectors of the compared items: of the feature of the settings, or the only one that the concepts have too."""
        settings, feature = self._settings, self._settings.feature
        if feature is None and settings.run is None and settings.concepts is not None:
            feature = choose_feature(self.cache.path, settings.concepts, self.modality, progress=self.progress)
        return Vectors(self.cache.path, self.modality, feature, settings.run, device=settings.device)

    @cached_property
    def feature(self) -> str | None:
        """Name of the feature of the vectors; None if none is named, and there are several or none.

        A random draw needs none.
        """
        try:
            return self.vectors.feature.name
        except UnknownNameError:
            if self._settings.feature is not None or self._settings.run is not None:
                raise
            return None

    @cached_property
    def item_samples(self) -> Ints:
        """Sample of each item row, -1 if it is not in the pool: (N,) int64."""
        samples = self._samples_of(self.modality)
        if self._settings.selection is not None:
            inside = read_selection(self._settings.selection, [self.cache])
            samples = np.where(np.isin(samples, inside), samples, -1)
        return samples

    @cached_property
    def samples(self) -> Ints:
        """Samples of the pool that have such an item, or a score if there are scores, ascending: (S,) int64.

        Without a feature, those that have an item of the modality.
        """
        if self._settings.scores is not None:
            return self._scored_samples()
        rows = ~self.cache.removed_items(self.modality) if self.feature is None else self.vectors.rows
        samples = np.unique(self.item_samples[rows])
        samples = samples[samples >= 0]
        if not len(samples):
            of_feature = "" if self.feature is None else f" of {self.feature}"
            where = self._settings.selection or self.cache.path
            raise DataError(f"{where}: expected samples with {noun(self.modality)}{of_feature}, got none")
        return samples

    def _scored_samples(self) -> Ints:
        samples: Ints = np.flatnonzero(np.isfinite(self.score.values))
        if self._settings.selection is not None:
            samples = np.intersect1d(samples, read_selection(self._settings.selection, [self.cache]))
        if not len(samples):
            raise DataError(f"{self._settings.scores}: expected samples with {self.score.name}, got none in the pool")
        return samples

    @cached_property
    def score(self) -> Score:
        """A score of each sample of the cache."""
        assert self._settings.scores is not None  # which the method requires
        return read_scores(self._settings.scores, self.cache, self._settings.score)

    @cached_property
    def concepts(self) -> Concepts:
        """Concepts in the space of the vectors."""
        if self._settings.concepts is None:
            raise SettingError("concepts: expected a cache of concepts, got none; give --concepts CACHE")
        settings = self._settings
        return open_concepts(
            Cache(str(settings.concepts)), self.vectors, label=settings.label, join_names=settings.join_names
        )

    @cached_property
    def target(self) -> Vectors:
        """Vectors of the target."""
        if self._settings.target is None:
            raise SettingError("target: expected the cache of a target, got none; give --target CACHE")
        return Vectors(
            self._settings.target,
            self.modality,
            self.vectors.feature.name,
            self._settings.run,
            device=self._settings.device,
        )

    def blocks(self, title: str) -> Iterator[tuple[Ints, Floats]]:
        """Iterate over all items once, chunk by chunk: the sample of each (B,), and its vector (B, P)."""
        self.progress.start(title, len(self.vectors.rows), noun(self.modality))
        for rows, vectors_BP in self.vectors.blocks():
            samples = self.item_samples[rows]
            is_inside = samples >= 0
            yield samples[is_inside], vectors_BP[is_inside]
            self.progress.advance(len(rows))
        self.progress.finish()

    def first_items(self) -> Ints:
        """Return the row of the first item of each of `samples`: (S,) int64."""
        rows = self.vectors.rows[self.item_samples[self.vectors.rows] >= 0]
        _, first = np.unique(self.item_samples[rows], return_index=True)
        return rows[first]

    def sample(self, size: int, *, seed: int) -> Floats:
        """Read a random sample of the items, or all items if there are no more: (M, P)."""
        rows = self.vectors.rows[self.item_samples[self.vectors.rows] >= 0]
        return self.vectors.read(np.sort(np.random.default_rng(seed).permutation(rows)[:size]))

    def texts(self) -> Iterator[tuple[int, str]]:
        """Iterate over the captions of the pool: sample and text. Memory: the table of texts."""
        is_inside_S = np.zeros(self.cache.info.num_samples, bool)
        is_inside_S[self.samples] = True
        items = self.cache.items("text", columns=["sample", "text"])
        for start in range(0, len(items), _TEXTS_PER_BLOCK):
            block = items.slice(start, _TEXTS_PER_BLOCK)
            is_inside = is_inside_S[block["sample"].to_numpy()]
            kept = block.filter(pa.array(is_inside))
            yield from zip(kept["sample"].to_pylist(), kept["text"].to_pylist(), strict=True)

    def pair_scores(self) -> tuple[Ints, Floats]:
        """Compare each image of the pool with each caption of its sample, projected by the run.

        Returns samples with both, ascending, (M,) int64, and the best cosine of each, (M,) float32. Raises `DataError`
        if no sample has both.
        """
        texts = Vectors(self.cache.path, "text", run_path=self._settings.run, device=self._settings.device)
        text_samples = self._samples_of("text")[texts.rows]
        best = np.full(self.cache.info.num_samples, -np.inf, np.float32)
        for samples, images_BP in self.blocks("comparing images with their captions"):
            start = np.searchsorted(text_samples, samples)
            counts = np.searchsorted(text_samples, samples, side="right") - start
            image, text = concatenated_ranges(start, counts)
            if len(text):
                cosines = np.einsum("mp,mp->m", images_BP[image], texts.read(texts.rows[text]))
                np.maximum.at(best, samples[image], cosines)
        paired_samples = np.flatnonzero(np.isfinite(best))
        if not len(paired_samples):
            raise DataError(f"{self.cache.path}: expected samples with both an image and a caption, got none")
        return paired_samples, best[paired_samples]

    def _samples_of(self, modality: str) -> Ints:
        samples: Array = self.cache.items(modality, columns=["sample"])["sample"].to_numpy()
        return samples.astype(np.int64)


_MOST_SAMPLES = 2**32
_TEXTS_PER_BLOCK = 65_536


class TopSamples(NamedTuple):
    """The K samples that match each of C concepts best, best first; equal scores by sample."""

    scores_CK: Floats  # cosine of the sample's best item
    samples_CK: Ints


def best_samples(blocks: Iterable[tuple[Ints, Floats]], concepts_CP: Floats, k: int) -> TopSamples:
    """Find the `k` best samples of each concept, or all if there are fewer. A sample counts once, by its best item.

    Exact, for any division of the items into blocks: the sample of each item (B,), ascending over all blocks, and its
    vector (B, P). Memory: the products of a block in float64, and 8 bytes for each of C x 2 K candidates; it does not
    grow with the items.
    """
    best = _BestKeys(len(concepts_CP), k)
    for samples_B, vectors_BP in whole_samples(blocks):
        samples_S, starts_S = np.unique(samples_B, return_index=True)
        best.add(np.maximum.reduceat(compute_cosines(concepts_CP, vectors_BP), starts_S, axis=1), samples_S)
    return from_keys(-np.sort(-best.merged(), axis=1))


class _BestKeys:
    """The k largest keys of each concept, of scores that come in the order of their samples.

    Of a full row only the scores above its lowest are looked at, of which there are fewer and fewer.
    """

    def __init__(self, num_concepts: int, k: int) -> None:
        self._k, self._keys_CK = k, np.empty((num_concepts, 0), np.int64)
        self._lowest_C1 = np.full((num_concepts, 1), -np.inf, np.float32)
        self._concepts: list[Ints] = []  # of the keys that are not merged yet
        self._keys: list[Ints] = []

    def add(self, scores_CS: Floats, samples_S: Ints) -> None:
        """Add the scores of further samples."""
        if self._keys_CK.shape[1] < self._k:
            self._keys_CK = _largest(np.concatenate([self._keys_CK, to_keys(scores_CS, samples_S)], axis=1), self._k)
            self._find_lowest()
            return
        concept_M, sample_M = np.nonzero(scores_CS > self._lowest_C1)  # of equal scores the earlier sample is better
        if not len(concept_M):
            return
        self._concepts.append(concept_M)
        self._keys.append(to_keys(scores_CS[concept_M, sample_M], samples_S[sample_M]))
        if 4 * sum(map(len, self._keys)) >= self._keys_CK.size:
            self.merged()

    def merged(self) -> Ints:
        """Return the k largest keys of each concept, or all if there are fewer, in any order: (C, K) int64."""
        if self._keys:
            concept_M, key_M = np.concatenate(self._concepts), np.concatenate(self._keys)
            order_M = np.argsort(concept_M, kind="stable")
            edges = np.searchsorted(concept_M[order_M], np.arange(len(self._keys_CK) + 1))
            for concept, (start, stop) in enumerate(pairwise(edges.tolist())):
                if stop > start:
                    keys = np.concatenate([self._keys_CK[concept], key_M[order_M[start:stop]]])
                    self._keys_CK[concept] = np.partition(keys, -self._k)[-self._k :]
            self._concepts, self._keys = [], []
            self._find_lowest()
        return self._keys_CK

    def _find_lowest(self) -> None:
        if self._keys_CK.shape[1] == self._k:
            self._lowest_C1 = from_keys(self._keys_CK.min(axis=1, keepdims=True)).scores_CK


def compute_cosines(left_QP: Floats, right_CP: Floats) -> Floats:
    """Compute cosines of rows of length 1: (Q, C) float32, summed in float64.

    Sums in float32 depend on the other rows of a block; in float64, equal vectors get equal cosines.
    """
    return (left_QP.astype(np.float64) @ right_CP.astype(np.float64).T).astype(np.float32)


def whole_samples(blocks: Iterable[tuple[Ints, Floats]]) -> Iterator[tuple[Ints, Floats]]:
    """Divide blocks of items anew, so that all items of a sample are in one block."""
    pending: tuple[Ints, Floats] | None = None
    for samples, vectors in blocks:
        if pending is not None:
            samples = np.concatenate([pending[0], samples])
            vectors = np.concatenate([pending[1], vectors])
        if len(samples):
            last = int(np.searchsorted(samples, samples[-1]))
            if last:
                yield samples[:last], vectors[:last]
            pending = samples[last:], vectors[last:]
    if pending is not None:
        yield pending


def to_keys(scores: Array, samples: Ints) -> Ints:
    """Encode a float32 score and a sample as one int64: larger for a higher score and, of equal scores, a lower sample.

    The bits of a float, read as an integer, keep its order; those of negative floats are inverted.
    """
    assert not len(samples) or samples.max() < _MOST_SAMPLES
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.int32).astype(np.int64)  # + 0: of -0.0 makes 0.0
    ordered = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ordered * _MOST_SAMPLES + (_MOST_SAMPLES - 1 - samples)


def from_keys(keys: Ints) -> TopSamples:
    """Decode scores and samples from keys."""
    ordered, rest = np.divmod(keys, _MOST_SAMPLES)
    bits = np.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return TopSamples(bits.astype(np.int32).view(np.float32), _MOST_SAMPLES - 1 - rest)


def _largest(keys_CN: Ints, k: int) -> Ints:
    """Return the k largest of each row, in any order."""
    if keys_CN.shape[1] <= k:
        return keys_CN
    return np.ascontiguousarray(np.partition(keys_CN, -k, axis=1)[:, -k:])


_ITERATIONS = 20
TRAINING_PER_CLUSTER = 256  # vectors that k-means trains on at most
_ITEMS_PER_CLUSTER = 40
_MAX_CLUSTERS = 10_000


def default_clusters(num_vectors: int) -> int:
    """Return the default number of clusters: one per 40 vectors, 10,000 at most."""
    return max(1, min(_MAX_CLUSTERS, num_vectors // _ITEMS_PER_CLUSTER))


def find_centroids(vectors_NP: Floats, num_clusters: int, *, seed: int, progress: Progress, device: str) -> Floats:
    """Cluster rows of length 1 by cosine similarity: (C, P) float32 rows of length 1.

    Raises `SettingError` if there are fewer vectors than clusters, and `MissingExtraError` without faiss.
    """
    if num_clusters > len(vectors_NP):
        raise SettingError(f"clusters: expected at most the {len(vectors_NP):,} vectors, got {num_clusters:,}")
    return normalize(
        spherical_kmeans(
            vectors_NP,
            num_clusters,
            seed=seed % 2**31,
            iterations=_ITERATIONS,
            max_per_cluster=TRAINING_PER_CLUSTER,
            progress=progress,
            device=device,
        )
    )
