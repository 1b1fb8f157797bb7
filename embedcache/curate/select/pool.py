"""What is selected from: the samples of a cache with what is known of them, read where a method asks for it.

The samples that fit each concept best, in one pass over the items.

k-means through FAISS: seeded, on a sample where there are many vectors.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from embedcache.arrays import Array, Floats, Ints, concatenated_ranges, normalize
from embedcache.dataset.selections import read_selection
from embedcache.errors import DataError, SettingError
from embedcache.progress import NullProgress, Progress
from embedcache.search.concepts import Concepts, open_concepts
from embedcache.search.faiss_index import spherical_kmeans
from embedcache.search.vectors import Vectors
from embedcache.store.cache import Cache


class Pool:
    """Some samples of one cache.

    Args:
        cache_path: the cache.
        modality: `image` or `text`: which items are looked at.
        feature: `encoder/feature`; None is the run's, or the only one of the modality.
        run_path: project with this run.
        concepts_path: a cache of prompts, or of labeled examples.
        joins_names: take concepts of one name as one.
        target_path: a cache with the same feature.
        within: a selection: only its samples are in the pool.
        progress: told about items.

    Raises:
        UnknownNameError: no feature is named so, or the name fits several.
        UnfinishedError: the feature has missing chunks.
        FingerprintError: the run was trained on other features.
        DataError: no sample of `within` has such an item.
    """

    def __init__(
        self,
        cache_path: Path | str,
        modality: str,
        *,
        feature: str | None = None,
        run_path: Path | None = None,
        concepts_path: Path | str | None = None,
        joins_names: bool = False,
        target_path: Path | str | None = None,
        within: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.cache = Cache(cache_path)
        self.modality = modality
        self.run_path = run_path
        self._feature, self._joins_names = feature, joins_names
        self._concepts_path, self._target_path, self._within = concepts_path, target_path, within
        self._progress = progress or NullProgress()

    @cached_property
    def vectors(self) -> Vectors:
        """The items that are looked at."""
        return Vectors(self.cache.path, self.modality, self._feature, self.run_path)

    @cached_property
    def item_samples(self) -> Ints:
        """The sample of each item row, -1 where it is not in the pool: (N,) int64."""
        samples = self._samples_of(self.modality)
        if self._within is not None:
            inside = read_selection(self._within, [self.cache])
            samples = np.where(np.isin(samples, inside), samples, -1)
        return samples

    @cached_property
    def samples(self) -> Ints:
        """The samples with such an item, ascending, each once: (S,) int64."""
        found = np.unique(self.item_samples[self.vectors.rows])
        found = found[found >= 0]
        if not len(found):
            raise DataError(f"no sample of {self._within} has {self.modality}s with {self.vectors.feature.name}")
        return found

    @cached_property
    def concepts(self) -> Concepts:
        """The concepts, in the space of the vectors."""
        if self._concepts_path is None:
            raise SettingError("no concepts were given; add --concepts CACHE")
        return open_concepts(Cache(self._concepts_path), self.vectors, join_names=self._joins_names)

    @cached_property
    def target(self) -> Vectors:
        """The items of the target."""
        if self._target_path is None:
            raise SettingError("no target was given; add --target CACHE")
        return Vectors(self._target_path, self.modality, self.vectors.feature.name, self.run_path)

    def blocks(self, what: str) -> Iterator[tuple[Ints, Floats]]:
        """Go through all items once, chunk by chunk: the sample of each (B,), and its vector (B, P)."""
        self._progress.start(what, len(self.vectors.rows), f"{self.modality}s")
        for rows, vectors_BP in self.vectors.blocks():
            samples = self.item_samples[rows]
            is_inside = samples >= 0
            yield samples[is_inside], vectors_BP[is_inside]
            self._progress.advance(len(rows))
        self._progress.finish()

    def first_items(self) -> Ints:
        """Get the row of the first item of each of `samples`: (S,) int64."""
        rows = self.vectors.rows[self.item_samples[self.vectors.rows] >= 0]
        _, first = np.unique(self.item_samples[rows], return_index=True)
        found: Ints = rows[first]
        return found

    def sample(self, size: int, *, seed: int) -> Floats:
        """Draw items of the pool at random, or take all where there are no more: (M, P)."""
        rows = self.vectors.rows[self.item_samples[self.vectors.rows] >= 0]
        return self.vectors.read(np.sort(np.random.default_rng(seed).permutation(rows)[:size]))

    def texts(self) -> Iterator[tuple[int, str]]:
        """Go through the captions of the pool: sample and text. Memory: the table of texts."""
        inside = set(self.samples.tolist())
        items = self.cache.items("text")
        for sample, text in zip(items["sample"].to_pylist(), items["text"].to_pylist(), strict=True):
            if sample in inside:
                yield sample, text

    def pair_scores(self) -> tuple[Ints, Floats]:
        """Compare each image of the pool with each caption of its sample, projected by the run.

        Returns:
            The samples with both, ascending, (M,) int64, and the best cosine of each, (M,) float32.

        Raises:
            DataError: no sample has both.
        """
        texts = Vectors(self.cache.path, "text", run_path=self.run_path)
        text_samples = self._samples_of("text")[texts.rows]
        best = np.full(self.cache.info.num_samples, -np.inf, np.float32)
        for samples, images_BP in self.blocks("comparing images with their captions"):
            start = np.searchsorted(text_samples, samples)
            counts = np.searchsorted(text_samples, samples, side="right") - start
            image, text = concatenated_ranges(start, counts)
            if len(text):
                cosines = np.einsum("mp,mp->m", images_BP[image], texts.read(texts.rows[text]))
                np.maximum.at(best, samples[image], cosines)
        found = np.flatnonzero(np.isfinite(best))
        if not len(found):
            raise DataError(f"no sample of {self.cache.path} has both an image and a caption")
        return found, best[found]

    def _samples_of(self, modality: str) -> Ints:
        samples: Array = self.cache.items(modality)["sample"].to_numpy()
        return samples.astype(np.int64)


_MOST_SAMPLES = 2**32


class TopSamples(NamedTuple):
    """For each of C concepts the K samples that fit it best, best first; equal scores by sample.

    Args:
        scores_CK: float32, the cosine of the sample's best item.
        samples_CK: int64.
    """

    scores_CK: Floats
    samples_CK: Ints


def best_samples(blocks: Iterable[tuple[Ints, Floats]], concepts_CP: Floats, k: int) -> TopSamples:
    """Find the `k` best samples of each concept, or all where there are fewer. A sample counts once, by its best item.

    Exact, and the same however the items are cut into blocks. Memory: the products of a block in float64, and 8 bytes
    for each of C x 2 K candidates; it does not grow with the items.

    Args:
        blocks: the sample of each item (B,), ascending over all blocks, and its vector (B, P).
        concepts_CP: (C, P) float32 unit rows.
        k: at least 1.
    """
    kept = [np.empty((len(concepts_CP), 0), np.int64)]
    for samples_B, vectors_BP in whole_samples(blocks):
        samples_S, starts_S = np.unique(samples_B, return_index=True)
        scores_CS = np.maximum.reduceat(cosines(concepts_CP, vectors_BP), starts_S, axis=1)
        kept.append(_largest(to_keys(scores_CS, samples_S), k))
        if sum(part.shape[1] for part in kept) >= 2 * k:
            kept = [_largest(np.concatenate(kept, axis=1), k)]
    keys_CK = -np.sort(-_largest(np.concatenate(kept, axis=1), k), axis=1)
    return from_keys(keys_CK)


def cosines(left_QP: Floats, right_CP: Floats) -> Floats:
    """Multiply unit rows: (Q, C) float32, through float64.

    So that equal vectors get equal cosines, whatever stands beside them in a block: sums in float32 depend on that.
    """
    products: Floats = (left_QP.astype(np.float64) @ right_CP.astype(np.float64).T).astype(np.float32)
    return products


def whole_samples(blocks: Iterable[tuple[Ints, Floats]]) -> Iterator[tuple[Ints, Floats]]:
    """Cut blocks of items anew, so that all items of a sample stand in one."""
    held: tuple[Ints, Floats] | None = None
    for samples, vectors in blocks:
        if held is not None:
            samples, vectors = np.concatenate([held[0], samples]), np.concatenate([held[1], vectors])
        if len(samples):
            last = int(np.searchsorted(samples, samples[-1]))
            if last:
                yield samples[:last], vectors[:last]
            held = samples[last:], vectors[last:]
    if held is not None:
        yield held


def to_keys(scores: Array, samples: Ints) -> Ints:
    """Make one int64 of a float32 score and a sample: larger for a higher score and, of equals, for a lower sample.

    A float's bits, read as an integer, keep its order; those of negative ones are turned round.
    """
    assert not len(samples) or samples.max() < _MOST_SAMPLES
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.int32).astype(np.int64)  # + 0: of -0.0 makes 0.0
    ordered = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys: Ints = ordered * _MOST_SAMPLES + (_MOST_SAMPLES - 1 - samples)
    return keys


def from_keys(keys: Ints) -> TopSamples:
    """Take the scores and samples out of keys again."""
    ordered, rest = np.divmod(keys, _MOST_SAMPLES)
    bits = np.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return TopSamples(bits.astype(np.int32).view(np.float32), _MOST_SAMPLES - 1 - rest)


def _largest(keys_CN: Ints, k: int) -> Ints:
    """Keep the k largest of each row, in any order."""
    if keys_CN.shape[1] <= k:
        return keys_CN
    return np.ascontiguousarray(np.partition(keys_CN, -k, axis=1)[:, -k:])


_ITERATIONS = 20
_POINTS_A_CENTROID = 256
_LEAST_POINTS = 40
"""Vectors a centroid where the number of centroids is worked out."""
_MOST_CENTROIDS = 10_000


def default_clusters(num_vectors: int) -> int:
    """Work out a number of centroids: one for 40 vectors, 10,000 at most."""
    return max(1, min(_MOST_CENTROIDS, num_vectors // _LEAST_POINTS))


def most_training_vectors(num_clusters: int) -> int:
    """Say how many vectors k-means looks at, at most: 256 a centroid."""
    return num_clusters * _POINTS_A_CENTROID


def find_centroids(vectors_NP: Floats, num_clusters: int, *, seed: int) -> Floats:
    """Cluster vectors by cosine: (C, P) float32 unit rows.

    Args:
        vectors_NP: (N, P) float32 unit rows.
        num_clusters: C.
        seed: of the first centroids.

    Raises:
        SettingError: there are fewer vectors than clusters.
        MissingExtraError: FAISS is not installed.
    """
    if num_clusters > len(vectors_NP):
        raise SettingError(f"{num_clusters:,} clusters of {len(vectors_NP):,} vectors; give fewer --clusters")
    return normalize(
        spherical_kmeans(
            vectors_NP, num_clusters, seed=seed % 2**31, iterations=_ITERATIONS, max_per_cluster=_POINTS_A_CENTROID
        )
    )
