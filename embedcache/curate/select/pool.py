"""The samples that are selected from, read as each method needs them, and what methods compute from their blocks."""

from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
import pyarrow as pa

from embedcache.arrays import Bools, Floats, Ints, concatenated_ranges
from embedcache.curate.settings import SelectSettings
from embedcache.dataset.selections import Score, read_scores, read_selection
from embedcache.dataset.vectors import Vectors
from embedcache.errors import DataError, SettingError, UnknownNameError
from embedcache.files import AnyPath
from embedcache.modalities import MODALITIES, name_pair, noun, pair_nouns
from embedcache.progress import NullProgress, Progress, watch
from embedcache.search.concepts import Concepts, choose_feature, open_concepts
from embedcache.store.cache import Cache

_TEXTS_PER_BLOCK = 65_536


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
        settings = self._settings
        feature = settings.feature
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
    def _is_inside_S(self) -> Bools:
        """Whether each sample of the cache is of the selection that limits the pool: (S,)."""
        if self._settings.selection is None:
            return np.ones(len(self.cache), bool)
        is_inside_S = np.zeros(len(self.cache), bool)
        is_inside_S[read_selection(self._settings.selection, [self.cache])] = True
        return is_inside_S

    @cached_property
    def item_samples(self) -> Ints:
        """Sample of each item row, -1 if it is not in the pool: (N,) int64."""
        samples_N = self._samples_of(self.modality)
        return np.where(self._is_inside_S[samples_N], samples_N, -1)

    @cached_property
    def samples(self) -> Ints:
        """Samples of the pool that have such an item, or a score if there are scores, ascending: (S,) int64.

        Without a feature, those that have an item of the modality.
        """
        if self._settings.scores is not None:
            is_there_S = np.isfinite(self.scores.values)
            what = self.scores.name
        else:
            feature = self.feature  # choosing it may be a step of its own
            self.progress.start("finding samples", 0, "samples")  # nearly all of it is reading the commits, all at once
            rows = ~self.cache.removed_items(self.modality) if feature is None else self.vectors.rows
            is_there_S = np.zeros(len(self.cache), bool)
            is_there_S[self._samples_of(self.modality)[rows]] = True
            what = noun(self.modality) if feature is None else f"{noun(self.modality)} of {feature}"
            self.progress.finish()

        samples: Ints = np.flatnonzero(is_there_S & self._is_inside_S)
        if not len(samples):
            where = self._settings.selection or self._settings.scores or self.cache.path
            others = [name for name in MODALITIES if name != self.modality and self.cache.features(name)]
            step = f"; choose others with --modality: {', '.join(others)}" if others else ""
            raise DataError(f"{where}: expected samples with {what}, got none{step}")
        return samples

    @cached_property
    def scores(self) -> Score:
        """A score of each sample of the cache."""
        assert self._settings.scores is not None  # which the method requires
        return read_scores(self._settings.scores, self.cache, self._settings.score)

    @cached_property
    def concepts(self) -> Concepts:
        """Concepts in the space of the vectors."""
        settings = self._settings
        cache = Cache(str(settings.concepts))
        return open_concepts(cache, self.vectors, label=settings.label, join_names=settings.join_names)

    @cached_property
    def target(self) -> Vectors:
        """Vectors of the target."""
        settings = self._settings
        assert settings.target is not None  # which the method requires
        name = self.vectors.feature.name
        return Vectors(settings.target, self.modality, name, settings.run, device=settings.device)

    def blocks(self, title: str) -> Iterator[tuple[Ints, Floats]]:
        """Iterate over all items once, chunk by chunk: the sample of each (B,), and its vector (B, P)."""
        for rows, vectors_BP in self.vectors.blocks(title, self.progress):
            samples = self.item_samples[rows]
            is_inside = samples >= 0
            yield samples[is_inside], vectors_BP[is_inside]

    def first_items(self) -> Ints:
        """Return the row of the first item of each of `samples`: (S,) int64."""
        _, first = np.unique(self.item_samples[self._rows], return_index=True)
        return self._rows[first]

    def sample(self, size: int, *, seed: int) -> Floats:
        """Read a random sample of the items, or all items if there are no more: (M, P)."""
        drawn = np.random.default_rng(seed).permutation(self._rows)[:size]
        return self.vectors.read(np.sort(drawn), self.progress)

    @cached_property
    def _rows(self) -> Ints:
        """Rows of all items, ascending."""
        return self.vectors.rows[self.item_samples[self.vectors.rows] >= 0]

    def texts(self) -> Iterator[tuple[Ints, list[str]]]:
        """Iterate over the captions of the pool: the sample of each (B,), and the texts. Memory: the table of texts."""
        is_inside_S = np.zeros(self.cache.info.num_samples, bool)
        is_inside_S[self.samples] = True
        items = self.cache.items("text", columns=["sample", "text"])
        parts = (items.slice(start, _TEXTS_PER_BLOCK) for start in range(0, len(items), _TEXTS_PER_BLOCK))
        for block in watch(parts, self.progress, "reading captions", len(items), noun("text")):
            is_inside = is_inside_S[block["sample"].to_numpy()]
            kept = block.filter(pa.array(is_inside))
            yield kept["sample"].to_numpy().astype(np.int64), kept["text"].to_pylist()

    @property
    def pair(self) -> tuple[str, str]:
        """Modality of the pool, and the other one of the run, with which `pair_scores` compares it."""
        other = self.vectors.other_modality
        if other is None:
            raise SettingError("run: expected a run of two modalities, got none; give --run RUN")
        return self.modality, other

    def pair_scores(self) -> tuple[Ints, Floats]:
        """Compare each item of the pool with those of the run's other modality of its sample, projected by the run.

        Returns samples with both, ascending, (M,) int64, and the best cosine of each, (M,) float32. Raises `DataError`
        if no sample has both.
        """
        pair, other = self.pair, self.pair[1]
        others = Vectors(self.cache.path, other, run_path=self._settings.run, device=self._settings.device)
        other_samples = self._samples_of(other)[others.rows]
        best = np.full(self.cache.info.num_samples, -np.inf, np.float32)
        for samples, vectors_BP in self.blocks("comparing {} with their {}".format(*pair_nouns(pair))):
            start = np.searchsorted(other_samples, samples)
            counts = np.searchsorted(other_samples, samples, side="right") - start
            left, right = concatenated_ranges(start, counts)
            if len(right):
                cosines = np.einsum("mp,mp->m", vectors_BP[left], others.read(others.rows[right]))
                np.maximum.at(best, samples[left], cosines)
        paired_samples = np.flatnonzero(np.isfinite(best))
        if not len(paired_samples):
            raise DataError(f"{self.cache.path}: expected samples with both {name_pair(pair)}, got none")
        return paired_samples, best[paired_samples]

    def _samples_of(self, modality: str) -> Ints:
        samples_N: Ints = self.cache.items(modality, columns=["sample"])["sample"].to_numpy()
        return samples_N


def compute_cosines(left_QP: Floats, right_CP: Floats) -> Floats:
    """Compute cosines of rows of length 1: (Q, C) float32, summed in float64.

    Sums in float32 depend on the other rows of a block; in float64, equal vectors get equal cosines.
    """
    return (left_QP.astype(np.float64) @ right_CP.astype(np.float64).T).astype(np.float32)


def whole_samples(blocks: Iterable[tuple[Ints, Floats]], size: int = 1) -> Iterator[tuple[Ints, Floats]]:
    """Divide blocks of items anew: all items of a sample are in one block, which has at least `size`, but for the last.

    Memory: `size` items, or a block.
    """
    pending: list[tuple[Ints, Floats]] = []
    for samples, vectors in blocks:
        pending.append((samples, vectors))
        if sum(len(part) for part, _ in pending) <= size or not len(samples):
            continue
        samples_B, vectors_BP = map(np.concatenate, zip(*pending, strict=True))
        last = int(np.searchsorted(samples_B, samples_B[-1]))
        if last:
            yield samples_B[:last], vectors_BP[:last]
        pending = [(samples_B[last:], vectors_BP[last:])]
    if pending:
        samples_B, vectors_BP = map(np.concatenate, zip(*pending, strict=True))
        yield samples_B, vectors_BP
