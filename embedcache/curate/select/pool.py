"""What is selected from: the samples of a cache with what is known of them, read where a method asks for it."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from embedcache.arrays import Array, Floats, Ints, concatenated_ranges
from embedcache.cache.cache import Cache
from embedcache.cache.selection import read_selection
from embedcache.curate.concepts import Concepts, open_concepts
from embedcache.curate.vectors import Vectors
from embedcache.errors import DataError, SettingError
from embedcache.progress import Progress, Silent


class Pool:
    """Some samples of one cache.

    Args:
        cache_path: the cache.
        modality: `image` or `text`: which items are looked at.
        feature: `encoder/feature`; None is the run's, or the only one of the modality.
        run_path: project with this run.
        concepts_path: a cache of prompts, or of labelled examples.
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
        self._progress = progress or Silent()

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
            raise DataError(f"no sample of {self._within} has {self.modality}s with {self.vectors.side.name}")
        return found

    @cached_property
    def concepts(self) -> Concepts:
        """The concepts, in the space of the vectors."""
        if self._concepts_path is None:
            raise SettingError("no concepts were given; add --concepts CACHE")
        return open_concepts(Cache(self._concepts_path), self.vectors, joins_names=self._joins_names)

    @cached_property
    def target(self) -> Vectors:
        """The items of the target."""
        if self._target_path is None:
            raise SettingError("no target was given; add --target CACHE")
        return Vectors(self._target_path, self.modality, self.vectors.side.name, self.run_path)

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
