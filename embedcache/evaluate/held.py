"""Which samples of a cache a run is measured on, and which it was trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedcache.arrays import Ints
from embedcache.artifact import digest_file, read_json
from embedcache.cache.cache import Cache
from embedcache.cache.pairs import Items, pair_items
from embedcache.cache.side import SideFeature
from embedcache.cache.split import Split, read_split
from embedcache.errors import CorruptError, DataError, PathError
from embedcache.evaluate.runs import Run, trained_side
from embedcache.projectors.saved import split_path

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

    side: SideFeature
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
    return any(map(cache.info.has_rows_of, run.config.spine.split("+")))


def split_of(run: Run, cache: Cache) -> Split:
    """Read the split of a run, of one of its caches.

    Raises:
        CorruptError: it is not the split that the run was trained on.
    """
    path = split_path(run.path)
    if not path.is_file() or digest_file(path) != run.config.split:
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
