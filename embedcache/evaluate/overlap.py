"""Overlap of evaluated items with the training part: equal bytes or text, and near-duplicates by cosine."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Bools, Ints, blocks
from embedcache.dataset.inputs import InputFeature, unit_vectors
from embedcache.dataset.pairs import Items, pair_items
from embedcache.errors import DataError, PathError
from embedcache.evaluate.runs import Run, read_run_split, run_input, was_trained_on
from embedcache.metrics.neighbors import closest
from embedcache.provenance import fields_of, read_json
from embedcache.store.cache import Cache

COSINES = {"image": 0.9, "text": 0.7}
"""Items above these cosines are near-duplicates, as in the strict split."""

_MAX_PRODUCTS = 2e10
_MIN_CHECKED = 200
_BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class ItemSet:
    """Items of one modality with a feature that compares them."""

    feature: InputFeature
    items: Items


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """How many of the evaluated samples were seen in training.

    Args:
        num_samples: number of evaluated samples.
        exact: samples with an image or a text that is in the training part, byte for byte.
        num_checked: samples that were compared by cosine, drawn at random if there are many.
        near: of these, samples with an image or a text above `COSINES` to one of the training part, or equal to one.
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
            parts.append(f"not compared with missing training caches: {paths}; name their new place with --trained-on")
        return "; ".join(parts)

    @property
    def warning(self) -> str | None:
        """Warning that the figures are too high, or None."""
        if self.exact:
            return f"WARNING: {self.exact:,} samples share an image or a caption with the training part" + (
                f", {self.near:,} of {self.num_checked:,} have a near-duplicate there" if self.near else ""
            )
        if self.near:
            return f"WARNING: {self.near:,} of {self.num_checked:,} samples have a near-duplicate in the training part"
        return None

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return {**asdict(self), "not_compared": list(self.not_compared)}


def largest_overlap(overlaps: Sequence[Overlap]) -> Overlap | None:
    """Return the largest overlap of several runs, or None."""
    return max(overlaps, key=lambda found: (found.exact, found.near), default=None)


def find_overlap(run: Run, evaluated: Mapping[str, ItemSet], *, trained_on: Sequence[Path | str] = ()) -> Overlap:
    """Compare evaluated items with those of the training part of a run.

    Of many samples, some are drawn at random (seed 0), so that it takes seconds. Memory: the compared vectors, and
    tiles of their cosines.

    Args:
        run: the run.
        evaluated: `image`, `text` or both -> evaluated items.
        trained_on: where the training caches are now; empty: where they were during training.
    """
    caches, missing = open_training_caches(run, trained_on)
    trained = [items for cache in caches for items in [training_items(run, cache)] if items]
    samples = np.unique(np.concatenate([items.items.samples for items in evaluated.values()]))
    rng = np.random.default_rng(0)
    checked = _draw(samples, _num_affordable(evaluated, trained), rng) if trained else samples[:0]
    exact, near = set[int](), set[int]()
    for modality, found in evaluated.items():
        others = [items[modality] for items in trained]
        exact |= set(found.items.samples[_is_equal(found, others)].tolist())
        part = found.items.select(checked)
        is_near = _is_near(ItemSet(feature=found.feature, items=part), others, COSINES[modality])
        near |= set(part.samples[is_near].tolist())
    return Overlap(
        num_samples=len(samples),
        exact=len(exact),
        num_checked=len(checked),
        near=len(near | (exact & set(checked.tolist()))),
        not_compared=missing,
        cosines={modality: COSINES[modality] for modality in evaluated},
    )


def open_training_caches(run: Run, paths: Sequence[Path | str] = ()) -> tuple[list[Cache], list[str]]:
    """Open the caches that a run was trained on.

    Args:
        run: the run.
        paths: where they are now; empty: where they were during training.

    Returns:
        The caches that exist, and the paths of those that do not.

    Raises:
        DataError: the run was not trained on one of `paths`.
        CorruptError: `record.json` does not name the caches.
    """
    record_path = run.path / "record.json"
    record: dict[str, Any] = {} if paths else read_json(record_path)
    caches, missing = [], []
    for path in map(str, paths or fields_of(record_path, lambda: list(record["settings"]["caches"]))):
        try:
            cache = Cache(path)
        except PathError:
            missing.append(path)
            continue
        if was_trained_on(run, cache):
            caches.append(cache)
        elif paths:
            raise DataError(f"run {run.path} was not trained on {path}; give the caches it was trained on")
        else:
            missing.append(path)
    return caches, missing


def training_items(run: Run, cache: Cache) -> Mapping[str, ItemSet]:
    """Return the images and texts of the training part in one of a run's caches; empty if the part is."""
    rows = np.flatnonzero(np.array(read_run_split(run, cache).parts) == "train")
    if not len(rows):
        return {}
    image, text = run_input(cache, run.config, "image"), run_input(cache, run.config, "text")
    pairs = pair_items([cache], [image], [text], language=run.config.training["language"]).select(rows)
    return {"image": ItemSet(feature=image, items=pairs.image), "text": ItemSet(feature=text, items=pairs.text)}


def _num_affordable(evaluated: Mapping[str, ItemSet], trained: Sequence[Mapping[str, ItemSet]]) -> int:
    """Return how many samples can be compared within seconds."""
    products_per_sample = sum(
        found.feature.width * sum(len(items[modality].items.rows) for items in trained)
        for modality, found in evaluated.items()
    )
    return max(_MIN_CHECKED, int(_MAX_PRODUCTS / max(1, products_per_sample)))


def _draw(rows: Ints, count: int, rng: np.random.Generator) -> Ints:
    return rows if len(rows) <= count else np.sort(rng.choice(rows, count, replace=False))


def _is_equal(found: ItemSet, others: Sequence[ItemSet]) -> Bools:
    seen = {value for other in others for value in other.feature.hashes_of(other.items.rows)}
    return np.array([value in seen for value in found.feature.hashes_of(found.items.rows)], bool)


def _is_near(found: ItemSet, others: Sequence[ItemSet], cosine: float) -> Bools:
    candidates = (
        unit_vectors(other.feature.read(other.items.rows[block]))
        for other in others
        for block in blocks(len(other.items.rows), _BLOCK)
    )
    is_near: Bools = closest(unit_vectors(found.feature.read(found.items.rows)), candidates).sims > cosine
    return is_near
