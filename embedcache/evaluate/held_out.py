"""Which samples of a cache a run is measured on, and which it was trained on.

What of the measured samples was seen in training: equal bytes or text, and near-duplicates by cosine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Bools, Ints, blocks
from embedcache.dataset.inputs import InputFeature, unit_vectors
from embedcache.dataset.pairs import Items, pair_items
from embedcache.dataset.splits import Split, read_split
from embedcache.errors import CorruptError, DataError, PathError
from embedcache.evaluate.runs import Run, trained_side
from embedcache.metrics.neighbors import closest
from embedcache.projectors.saved import split_path
from embedcache.provenance import digest_file, read_json
from embedcache.store.cache import Cache

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Held:
    """The samples that a run is measured on.

    Args:
        part: which part they are, and of which split, for people.
        samples: (M,) rows of the cache's samples, ascending.
        groups: (S,) int64, a number for each sample of the cache; near-duplicates share one.
    """

    part: str
    samples: Ints
    groups: Ints


@dataclass(frozen=True, kw_only=True)
class Looked:
    """Items of one modality, with the feature that tells them apart."""

    side: InputFeature
    items: Items


def held_out(cache: Cache, run: Run, part: str | None = None) -> Held:
    """Find the samples to measure a run on.

    In a cache that the run was trained on, its split says so. In any other it is the column `split` where there is
    one, and all samples otherwise.

    Args:
        cache: the cache.
        run: the run.
        part: `test`, `val`, `train`, or `all`; None is `test`, and in another cache without such a part, all.

    Raises:
        CorruptError: the run's split is not the one it was trained on.
        DataError: there is no such part.
    """
    if was_trained_on(run, cache):
        split = split_of(run, cache)
        rows = np.arange(len(split.keys)) if part == ALL else split.rows(part or "test")
        return Held(part=f"part {part or 'test'} of the run's split", samples=rows, groups=np.array(split.groups))
    parts = np.array(cache.samples["split"].to_pylist() if "split" in cache.columns else [], object)
    groups = np.arange(cache.info.num_samples)
    if part == ALL or (part is None and not (parts == "test").any()):
        return Held(part="all samples", samples=groups, groups=groups)
    rows = np.flatnonzero(parts == (part or "test"))
    if not len(rows):
        known = sorted({str(name) for name in parts if name is not None})
        has = f"its column split holds {', '.join(known)}" if known else "it has no column split"
        raise DataError(f"{cache.path} has no {part} samples for this run: {has}; use --part {ALL}")
    return Held(part=f"split {part or 'test'} of {cache.path.name}", samples=rows, groups=groups)


def was_trained_on(run: Run, cache: Cache) -> bool:
    """Say whether a cache is one of those that a run was trained on."""
    return any(map(cache.info.has_rows_of, run.config.index_digest.split("+")))


def split_of(run: Run, cache: Cache) -> Split:
    """Read the split of a run, of one of its caches.

    Raises:
        CorruptError: it is not the split that the run was trained on.
    """
    path = split_path(run.path)
    if not path.is_file() or digest_file(path) != run.config.split_digest:
        raise CorruptError(
            f"{path} is missing or not the split that the run was trained on; train again into a new folder"
        )
    return read_split(path, [cache])


def training_caches(run: Run, given: Sequence[Path | str] = ()) -> tuple[list[Cache], list[str]]:
    """Open the caches that a run was trained on.

    Args:
        run: the run.
        given: where they lie now; none: where they lay then.

    Returns:
        Those that are there, and the paths of those that are not.

    Raises:
        DataError: the run was not trained on a cache that was given.
    """
    caches, missing = [], []
    for path in map(str, given or read_json(run.path / "record.json")["settings"]["caches"]):
        try:
            cache = Cache(path)
        except PathError:
            missing.append(path)
            continue
        if was_trained_on(run, cache):
            caches.append(cache)
        elif given:
            raise DataError(f"run {run.path} was not trained on {path}; give the caches it was trained on")
        else:
            missing.append(path)
    return caches, missing


def trained_items(run: Run, cache: Cache) -> Mapping[str, Looked]:
    """Get the images and texts of the training part of one of a run's caches; none where it has no such part."""
    rows = np.flatnonzero(np.array(split_of(run, cache).parts) == "train")
    if not len(rows):
        return {}
    image, text = trained_side(cache, run.config, "image"), trained_side(cache, run.config, "text")
    pairs = pair_items([cache], [image], [text], language=run.config.training["language"]).of(rows)
    return {"image": Looked(side=image, items=pairs.image), "text": Looked(side=text, items=pairs.text)}


COSINES = {"image": 0.9, "text": 0.7}
"""Above these the strict split keeps two samples together."""

_MOST_PRODUCTS = 2e10
_FEWEST_CHECKED = 200
_BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """How much of what is measured was seen in training.

    Args:
        num_samples: measured.
        exact: of these, with an image or a text that is in training too, byte for byte.
        num_checked: samples that were compared by cosine, drawn at random where there are many.
        near: of these, with an image or a text above the cosines of `COSINES` to one of training, equal ones counted.
        not_compared: caches of the training that could not be opened.
        cosines: the limits.
    """

    num_samples: int
    exact: int
    num_checked: int
    near: int
    not_compared: Sequence[str] = ()
    cosines: Mapping[str, float] = field(default_factory=dict)

    def line(self) -> str:
        """Say it in one line."""
        parts = []
        if self.num_checked:
            limits = ", ".join(f"{name} > {cosine}" for name, cosine in self.cosines.items())
            parts.append(
                f"seen in training: {self.exact:,} of {self.num_samples:,} exactly, {self.near:,} of "
                f"{self.num_checked:,} nearly (cosine {limits})"
            )
        if self.not_compared:
            gone = ", ".join(self.not_compared)
            parts.append(f"not compared with training data that is not there: {gone}; name it with --trained-on")
        return "; ".join(parts)

    @property
    def warning(self) -> str | None:
        """What makes the figures doubtful, where something does."""
        if self.exact:
            return f"WARNING: {self.exact:,} samples share an image or a caption with the training part" + (
                f", {self.near:,} of {self.num_checked:,} have a near-duplicate there" if self.near else ""
            )
        if self.near:
            return f"WARNING: {self.near:,} of {self.num_checked:,} samples have a near-duplicate in the training part"
        return None

    def to_json(self) -> dict[str, Any]:
        """Give all fields as JSON."""
        return {**asdict(self), "not_compared": list(self.not_compared)}


def worst(overlaps: Sequence[Overlap]) -> Overlap | None:
    """Find the largest overlap of some runs."""
    return max(overlaps, key=lambda found: (found.exact, found.near), default=None)


def find_overlap(run: Run, held: Mapping[str, Looked], *, trained_on: Sequence[Path | str] = ()) -> Overlap:
    """Compare measured items with those that a run was trained on.

    Memory: the compared vectors, and tiles of their cosines. Where there are many, samples are drawn at random (seed
    0), so that it takes seconds.

    Args:
        run: the run.
        held: `image`, `text` or both -> the measured items.
        trained_on: where the training caches lie now; none: where they lay then.
    """
    caches, missing = training_caches(run, trained_on)
    trained = [items for cache in caches for items in [trained_items(run, cache)] if items]
    measured = np.unique(np.concatenate([looked.items.samples for looked in held.values()]))
    rng = np.random.default_rng(0)
    checked = _draw(measured, _affordable(held, trained), rng) if trained else measured[:0]
    exact, near = set[int](), set[int]()
    for modality, looked in held.items():
        others = [items[modality] for items in trained]
        exact |= set(looked.items.samples[_is_equal(looked, others)].tolist())
        part = looked.items.of(checked)
        near |= set(part.samples[_is_near(Looked(side=looked.side, items=part), others, COSINES[modality])].tolist())
    return Overlap(
        num_samples=len(measured),
        exact=len(exact),
        num_checked=len(checked),
        near=len(near | (exact & set(checked.tolist()))),
        not_compared=missing,
        cosines={modality: COSINES[modality] for modality in held},
    )


def _affordable(held: Mapping[str, Looked], trained: Sequence[Mapping[str, Looked]]) -> int:
    """Count the samples whose comparison takes seconds."""
    products_a_sample = sum(
        looked.side.width * sum(len(items[modality].items.rows) for items in trained)
        for modality, looked in held.items()
    )
    return max(_FEWEST_CHECKED, int(_MOST_PRODUCTS / max(1, products_a_sample)))


def _draw(rows: Ints, count: int, rng: np.random.Generator) -> Ints:
    return rows if len(rows) <= count else np.sort(rng.choice(rows, count, replace=False))


def _is_equal(looked: Looked, others: Sequence[Looked]) -> Bools:
    seen = {value for other in others for value in other.side.hashes_of(other.items.rows)}
    return np.array([value in seen for value in looked.side.hashes_of(looked.items.rows)], bool)


def _is_near(looked: Looked, others: Sequence[Looked], cosine: float) -> Bools:
    """Say of each item whether one of the others is above a cosine."""
    candidates = (
        unit_vectors(other.side.read(other.items.rows[block]))
        for other in others
        for block in blocks(len(other.items.rows), _BLOCK)
    )
    is_near: Bools = closest(unit_vectors(looked.side.read(looked.items.rows)), candidates).sims > cosine
    return is_near
