"""Overlap of evaluated items with the training part: equal bytes or text, and near-duplicates by cosine."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, zip_longest

import numpy as np

from embedcache.arrays import distinct
from embedcache.dataset.matches import ItemSet, find_equal, find_near
from embedcache.dataset.pairs import pair_items
from embedcache.dataset.settings import NEAR_DUPLICATE_COSINES
from embedcache.errors import DataError, PathError
from embedcache.evaluate.runs import read_run_selection, read_run_split, run_input, was_trained_on
from embedcache.evaluate.settings import RetrievalSettings, ZeroShotSettings
from embedcache.files import is_url
from embedcache.progress import NullProgress, Progress
from embedcache.runs import Run
from embedcache.store.cache import Cache

COSINES = {"image": 0.9, "text": 0.7}
"""Items above these cosines are near-duplicates, as in the strict split; for other modalities the run names one."""

_MAX_PRODUCTS = 2e10
_MIN_CHECKED = 200


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Numbers of evaluated samples that were seen in training.

    Args:
        exact: samples with an item that is in the training part, byte for byte.
        num_checked: samples that were compared by cosine, drawn at random if there are many.
        near: of these, samples with an item above `COSINES` to one of the training part, or equal to one.
        not_compared: training caches that could not be opened.
        cosines: thresholds by modality.
    """

    num_samples: int
    exact: int
    num_checked: int
    near: int
    not_compared: Sequence[str] = ()
    cosines: Mapping[str, float] = field(default_factory=dict)

    def line(self) -> str:
        """Summarize the overlap in one line."""
        parts = []
        if self.num_checked:
            limits = ", ".join(f"{name} > {cosine}" for name, cosine in self.cosines.items())
            parts.append(
                f"seen in training: {self.exact:,} of {self.num_samples:,} exactly, {self.near:,} of "
                f"{self.num_checked:,} nearly (cosine {limits})"
            )
        if self.not_compared:
            paths = ", ".join(self.not_compared)
            parts.append(f"not compared with missing training caches: {paths}; name their new path with --trained-on")
        return "; ".join(parts)

    @property
    def warning(self) -> str | None:
        """Warning that the results are too high, or None."""
        return f"WARNING: {self.line()}" if self.exact or self.near else None


def largest_overlap(overlaps: Iterable[Overlap | None]) -> Overlap | None:
    """Return the largest overlap of several runs, or None."""
    return max(filter(None, overlaps), key=lambda overlap: (overlap.exact, overlap.near), default=None)


def find_overlap(
    run: Run,
    cache: Cache,
    evaluated: Mapping[str, ItemSet],
    settings: RetrievalSettings | ZeroShotSettings,
    *,
    progress: Progress | None = None,
) -> Overlap | None:
    """Compare evaluated items of a cache, by modality, with those a run was trained on, if the settings enable it.

    Of many samples, some are drawn at random (seed 0), so that it takes seconds. Memory: the compared vectors, and
    tiles of their cosines. Progress is in items of the training part.
    """
    if not settings.check_overlap or (settings.part == "train" and was_trained_on(run, cache)):
        return None
    caches, missing = _open_training_caches(run, cache, settings.trained_on)
    trained = [items for cache in caches for items in [training_items(run, cache)] if items]
    samples = distinct(np.concatenate([items.items.samples for items in evaluated.values()]))
    count = min(len(samples), _num_affordable(evaluated, trained) if trained else 0)
    checked = np.sort(np.random.default_rng(0).choice(samples, count, replace=False))
    trained_cosines = run.info.settings.get("split", {}).get("cosines", NEAR_DUPLICATE_COSINES)
    cosines = {modality: COSINES.get(modality, trained_cosines[modality]) for modality in evaluated}
    exact, near = set[int](), set[int]()
    for modality, item_set in evaluated.items():
        others = [items[modality] for items in trained]
        part = item_set._replace(items=item_set.items.select(checked))
        for other in others:
            copies, _ = find_equal(item_set, other)
            exact |= set(item_set.items.samples[copies >= 0].tolist())
            found = find_near(part, other, cosines[modality], all_pairs=True, progress=progress or NullProgress())
            near |= set(part.items.samples[found.sims > cosines[modality]].tolist())
    return Overlap(
        num_samples=len(samples),
        exact=len(exact),
        num_checked=len(checked),
        near=len(near | (exact & set(checked.tolist()))),
        not_compared=missing,
        cosines=cosines,
    )


def _open_training_caches(run: Run, cache: Cache, paths: Sequence[str]) -> tuple[list[Cache], list[str]]:
    """Open the caches that a run was trained on, known by their index digests; return the paths of missing ones too.

    Each is looked for in the evaluated cache, then at `paths`, then where it was when the run was trained.
    """
    named = [Cache(path) for path in paths]
    for other in named:
        if not was_trained_on(run, other):
            raise DataError(
                f"{other.path}: expected a cache that run {run.path} was trained on, got another; name the caches it "
                "was trained on"
            )
    index_digests = run.info.index_digest.split("+")
    caches, missing = [], []
    recorded = run.info.caches[: len(index_digests)]
    for index_digest, path in zip_longest(index_digests, recorded, fillvalue="an unnamed cache"):
        candidates = chain([cache], named, _open_recorded(path if is_url(path) else str(run.path / path)))
        match = next((other for other in candidates if other.info.has_rows_of(index_digest)), None)
        if match is None:
            missing.append(path)
        else:
            caches.append(match)
    return caches, missing


def _open_recorded(path: str) -> Iterator[Cache]:
    """Open a cache where it was when a run was trained on it, if it is still there."""
    with suppress(PathError):
        yield Cache(path)


def training_items(run: Run, cache: Cache) -> Mapping[str, ItemSet]:
    """Return the items of one of a run's caches that it was trained on, by modality; empty if there are none.

    Their contents are not numbered.
    """
    rows = np.flatnonzero(read_run_split(run, cache).mask("train"))
    if (selected := read_run_selection(run, cache)) is not None:
        rows = np.intersect1d(rows, selected, assume_unique=True)
    if not len(rows):
        return {}
    first, second = (run_input(cache, run, modality) for modality in run.info.inputs)
    language = run.info.settings.get("language")
    pairs = pair_items([cache], [first], [second], language=language, is_numbered=False).select(rows)
    return {first.modality: ItemSet(first, pairs.first), second.modality: ItemSet(second, pairs.second)}


def _num_affordable(evaluated: Mapping[str, ItemSet], trained: Sequence[Mapping[str, ItemSet]]) -> int:
    """Return how many samples can be compared within seconds."""
    products_per_sample = sum(
        item_set.feature.width * sum(len(items[modality].items.rows) for items in trained)
        for modality, item_set in evaluated.items()
    )
    return max(_MIN_CHECKED, int(_MAX_PRODUCTS / max(1, products_per_sample)))
