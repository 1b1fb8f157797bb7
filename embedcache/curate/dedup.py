"""Duplicates of a cache: look at how close its items lie, then write down which samples stay."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedcache.arrays import Array, Floats, Ints
from embedcache.curate.keep import (
    FAR,
    FIRST,
    Copies,
    RemovedSamples,
    check_keep,
    choose_removed,
    find_copies,
    order_samples,
)
from embedcache.curate.links import SimilarPairs, cosine_limit
from embedcache.curate.near_duplicates import MOST_LINKS, NearDuplicates, assign, find_near_duplicates
from embedcache.dataset.inputs import InputFeature, open_input
from embedcache.dataset.selections import Selection, write_selection
from embedcache.errors import DataError, SettingError
from embedcache.files import replacing
from embedcache.progress import Progress
from embedcache.provenance import digest
from embedcache.search.vectors import Engine, Vectors
from embedcache.store.cache import Cache

LEVELS = (0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995)
"""Cosines that are looked at before one is chosen."""


@dataclass(frozen=True, kw_only=True)
class DedupSettings:
    """How duplicates are looked for, and which of them stay.

    Args:
        modality: `image` or `text`; None is `image` where the cache has image features.
        feature: `encoder/feature`; None is the run's, or the only one of the modality.
        run_path: project the feature with this run.
        keep: `first`, `far` or `best:COLUMN`, as of `keeping.order_samples`.
        all_pairs: compare all pairs of items; None is up to 50,000.
        scratch: folder for a file of 2 or 4 bytes a number; None is the system's for temporary files.
        seed: of the clusters and of what is drawn.
        engine: of the pass that assigns items to clusters.
        address: of a Ray cluster.
    """

    modality: str | None = None
    feature: str | None = None
    run_path: Path | str | None = None
    keep: str = FIRST
    all_pairs: bool | None = None
    scratch: Path | None = None
    seed: int = 0
    engine: Engine = "local"
    address: str | None = None


@dataclass(frozen=True, kw_only=True)
class DedupLevel:
    """What one cosine would do.

    Args:
        cosine: the limit; None is copies alone.
        num_near: items with another above it, copies counted once; None for copies.
        num_gone: samples that would go; None where there are too many pairs to say.
    """

    cosine: float | None
    num_near: int | None
    num_gone: int | None


@dataclass(frozen=True, kw_only=True)
class DedupAnalysis:
    """The items of a cache, compared with each other.

    Args:
        cache: the cache.
        side: the feature; its name and modality.
        contents: the items, copies known.
        order: samples in the order of the keep rule.
        near: near-duplicates among the contents; None where only copies are looked for.
        settings: how it was done.
    """

    cache: Cache
    side: InputFeature
    contents: Copies
    order: Ints
    near: NearDuplicates | None
    settings: DedupSettings = field(default_factory=DedupSettings)

    def removed(self, cosine: float | None) -> RemovedSamples:
        """Choose the samples that go at a cosine; None is copies alone."""
        links = _NO_LINKS if self.near is None or cosine is None else self.near.links.between(cosine)
        return choose_removed(self.contents, links, self.order)

    def levels(self) -> list[DedupLevel]:
        """Say what copies alone and each of the cosines would do."""
        copies = DedupLevel(cosine=None, num_near=None, num_gone=len(self.removed(None).samples))
        return [copies, *map(self._level, reversed(LEVELS))]

    def about(self) -> dict[str, Any]:
        """Say in JSON values what was compared, and how well."""
        near, run_path = self.near, self.settings.run_path
        return {
            "cache": str(self.cache.path),
            "modality": self.side.modality,
            "feature": self.side.name,
            "fingerprint": digest(self.side.fingerprint),
            "run": None if run_path is None else str(run_path),
            "num_samples": self.cache.info.num_samples,
            "num_items": len(self.contents.contents),
            "num_contents": len(self.contents.rows),
            "keep": self.settings.keep,
            "seed": self.settings.seed,
            "num_clusters": None if near is None else near.num_clusters,
            "complete": None if near is None else near.complete,
            "recall": None if near is None or near.recall is None else near.recall.to_json(),
            "highest_cosine": self.highest,
        }

    @property
    def highest(self) -> float | None:
        """The largest cosine of two different contents; None where there are not two, or none was looked for."""
        if self.near is None or len(self.near.best) < 2:
            return None
        return min(1.0, float(self.near.best.max()))

    def _level(self, cosine: float) -> DedupLevel:
        assert self.near is not None
        num_near = int((self.near.best >= cosine_limit(cosine)).sum())
        gone = len(self.removed(cosine).samples) if cosine >= self.near.limit else None
        return DedupLevel(cosine=cosine, num_near=num_near, num_gone=gone)


@dataclass(frozen=True, kw_only=True)
class DedupReport:
    """What was written.

    Args:
        compared: the items.
        cosine: the limit; None is copies alone.
        removed: the samples that go.
        path: the selection of those that stay.
        removed_path: the table of those that go.
    """

    analysis: DedupAnalysis
    cosine: float | None
    removed: RemovedSamples
    path: Path
    removed_path: Path

    def to_json(self) -> dict[str, Any]:
        """Give what was compared, and how many samples go, as JSON values."""
        return {
            **self.analysis.about(),
            "cosine": self.cosine,
            "num_removed": len(self.removed.samples),
            "num_removed_copies": int(self.removed.is_copy.sum()),
            "selection": str(self.path),
            "removed": str(self.removed_path),
        }


def analyze(
    cache_path: Path | str, settings: DedupSettings | None = None, *, progress: Progress | None = None
) -> DedupAnalysis:
    """Compare the items of a cache, to choose a cosine by; `DedupAnalysis.levels` says what each would do.

    Time and memory as of `semantic.find_near`.

    Raises:
        SettingError, UnknownNameError: a keep rule that cannot be followed, or no such feature.
        DataError, UnfinishedError, FingerprintError: as of `Vectors`.
    """
    return _compare(cache_path, settings or DedupSettings(), LEVELS, progress)


def dedup(
    cache_path: Path | str,
    out: Path | str,
    *,
    cosine: float | None,
    settings: DedupSettings | None = None,
    progress: Progress | None = None,
) -> DedupReport:
    """Write a selection of the samples that stay, and beside it, in `OUT.removed.parquet`, those that go.

    A sample goes where each of its items has the bytes, or a cosine of at least the limit, of an item of a sample that
    stays. Samples without a usable item stay. The selection is written last: without it nothing was done.

    Args:
        cache_path: the cache.
        out: a `.parquet` file.
        cosine: limit, above 0, at most 1; None is equal bytes or texts alone.
        settings: what is compared, and how.
        progress: told about items.

    Raises:
        SettingError: the cosine is out of its range, nothing lies above it, or too many pairs do.
        DataError, UnfinishedError, FingerprintError, UnknownNameError: as of `analyze`.
        DiskFullError: the scratch file does not fit.
    """
    out = Path(out)
    check_cosine(cosine)
    if out.suffix != ".parquet":
        raise SettingError(f"{out} is to be a selection: give it a name that ends with .parquet")
    levels = [] if cosine is None else [cosine]
    analysis = _compare(cache_path, settings or DedupSettings(), levels, progress)
    _check_found(analysis, cosine)
    removed = analysis.removed(cosine)
    done = DedupReport(
        analysis=analysis,
        cosine=cosine,
        removed=removed,
        path=out,
        removed_path=out.with_suffix(".removed.parquet"),
    )
    _write_removed(done.removed_path, analysis.cache, removed)
    write_selection(out, analysis.cache, _selection(analysis, removed), {"method": "dedup", **done.to_json()})
    return done


def check_cosine(cosine: float | None, name: str = "--cosine") -> None:
    """Refuse a limit that is none.

    Raises:
        SettingError: it is not above 0 and at most 1.
    """
    if cosine is not None and not 0 < cosine <= 1:
        raise SettingError(f"{name} is {cosine}; it must be above 0 and at most 1, such as 0.95")


def check_asked(out: Path | None, cosine: float | None, *, only_copies: bool) -> None:
    """Refuse a limit without a file to write, and a file without a limit.

    Raises:
        SettingError: says which is missing.
    """
    if cosine is not None and only_copies:
        raise SettingError("--cosine and --copies: give one; copies go with both")
    if (out is None) != (cosine is None and not only_copies):
        missing = (
            "name a file OUT.parquet for it" if out is None else "give --cosine or --copies, or leave it out to look"
        )
        raise SettingError(f"a limit and a file for what stays go together: {missing}")


def one_modality(image: str | None, text: str | None) -> str | None:
    """Say which modality was named by its feature; None where neither was.

    Raises:
        SettingError: both were.
    """
    if image is not None and text is not None:
        raise SettingError("--image-feature and --text-feature: samples are compared by one of them; leave one out")
    return "image" if image is not None else "text" if text is not None else None


_NO_LINKS = SimilarPairs(left=np.empty(0, np.int64), right=np.empty(0, np.int64), cosines=np.empty(0, np.float32))


def _compare(
    cache_path: Path | str, settings: DedupSettings, levels: Sequence[float], progress: Progress | None
) -> DedupAnalysis:
    cache = Cache(cache_path)
    modality = settings.modality or ("image" if cache.features("image") or not cache.features("text") else "text")
    check_keep(settings.keep, cache)
    needs_vectors = bool(levels) or settings.keep == FAR
    vectors = Vectors(cache_path, modality, settings.feature, settings.run_path) if needs_vectors else None
    side = open_input(cache, modality, settings.feature) if vectors is None else vectors.feature
    contents = find_copies(cache, side)
    if not len(contents.rows):
        raise DataError(f"feature {side.name} has no valid item")
    near = _find(vectors, contents, settings, levels, progress) if vectors is not None and levels else None
    centroid_cosines = None
    if settings.keep == FAR and vectors is not None:
        centroid_cosines = _centroid_cosines(vectors, contents, near, settings, progress)
    order = order_samples(settings.keep, contents, cache, centroid_cosines)
    return DedupAnalysis(cache=cache, side=side, contents=contents, order=order, near=near, settings=settings)


def _find(
    vectors: Vectors, contents: Copies, settings: DedupSettings, levels: Sequence[float], progress: Progress | None
) -> NearDuplicates:
    return find_near_duplicates(
        vectors,
        contents.rows,
        levels,
        all_pairs=settings.all_pairs,
        scratch=settings.scratch or Path(tempfile.gettempdir()),
        seed=settings.seed,
        engine=settings.engine,
        address=settings.address,
        progress=progress,
    )


def _centroid_cosines(
    vectors: Vectors, contents: Copies, near: NearDuplicates | None, settings: DedupSettings, progress: Progress | None
) -> Floats:
    if near is not None and near.centroid_cosines is not None:
        return near.centroid_cosines
    engine, address = settings.engine, settings.address
    assigned = assign(
        vectors, contents.rows, 1.0, seed=settings.seed, engine=engine, address=address, progress=progress
    )
    return assigned.cosines


def _check_found(analysis: DedupAnalysis, cosine: float | None) -> None:
    near = analysis.near
    if near is None or cosine is None:
        return
    if near.limit > cosine:
        raise SettingError(
            f"more than {MOST_LINKS:,} pairs lie above --cosine {cosine}; give a higher one, which "
            f"embedcache curate dedup {analysis.cache.path} helps to choose"
        )
    if not len(near.links.left) and not analysis.contents.num_copies:
        highest = "there is only one" if analysis.highest is None else f"the highest cosine is {analysis.highest:.5f}"
        raise SettingError(
            f"no two {analysis.side.modality}s of {analysis.cache.path} reach --cosine {cosine}: {highest}; nothing "
            "goes, and nothing is written"
        )


def _selection(analysis: DedupAnalysis, removed: RemovedSamples) -> Selection:
    num_samples = analysis.cache.info.num_samples
    rows = np.setdiff1d(np.arange(num_samples), removed.samples)
    has_items = np.zeros(num_samples, bool)
    has_items[analysis.contents.samples] = True
    reasons = _reasons(removed)
    none = f"no {analysis.side.modality} to compare"
    return Selection(
        rows=rows,
        reasons=[reasons.get(row, "no duplicate" if has_items[row] else none) for row in rows.tolist()],
    )


def _reasons(removed: RemovedSamples) -> Mapping[int, str]:
    """Say of each sample that something goes for, what."""
    order = np.argsort(removed.kept, kind="stable")
    kept, starts = np.unique(removed.kept[order], return_index=True)
    groups = np.split(order, starts[1:]) if len(kept) else []
    return {int(sample): _reason(removed, group) for sample, group in zip(kept, groups, strict=True)}


def _reason(removed: RemovedSamples, group: Array) -> str:
    num_copies = int(removed.is_copy[group].sum())
    near = group[~removed.is_copy[group]]
    parts = [f"{num_copies} {'copy' if num_copies == 1 else 'copies'}"] if num_copies else []
    parts += [f"{len(near)} near-duplicate{'' if len(near) == 1 else 's'}"] if len(near) else []
    goes = "goes" if len(group) == 1 else "go"
    closest = f", closest cosine {removed.cosines[near].max():.3f}" if len(near) else ""
    return f"kept; {' and '.join(parts)} {goes}{closest}"


def _write_removed(path: Path, cache: Cache, removed: RemovedSamples) -> None:
    keys = cache.samples["key"]
    table = pa.table(
        {
            "row": removed.samples,
            "key": keys.take(pa.array(removed.samples)),
            "kept_row": removed.kept,
            "kept_key": keys.take(pa.array(removed.kept)),
            "cosine": removed.cosines,
            "is_copy": removed.is_copy,
        }
    )
    with replacing(path) as temporary:
        pq.write_table(table, temporary)
