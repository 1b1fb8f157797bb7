"""Deduplication of a cache: compare its items, choose a cosine, and write which samples stay."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import pyarrow as pa
from PIL import Image

from embedcache.arrays import Array, Floats, Ints, blocks
from embedcache.curate.keep import (
    NO_DISTANCE,
    SAME_PICTURE,
    Copies,
    RemovedSamples,
    SimilarPairs,
    check_keep,
    choose_modality,
    choose_removed,
    find_copies,
    order_samples,
)
from embedcache.curate.near_duplicates import MAX_PAIRS, NearDuplicates, find_near_duplicates
from embedcache.curate.settings import DedupSettings
from embedcache.dataset import keytable
from embedcache.dataset.inputs import InputFeature, open_input
from embedcache.dataset.selections import Selection, read_selection, write_selection
from embedcache.dataset.thumbnails import Thumbnails, not_shown
from embedcache.dataset.vectors import Vectors
from embedcache.errors import DataError, EmbedcacheError, SettingError, quoted
from embedcache.files import AnyPath
from embedcache.neighbors.clusters import scratch_matrix
from embedcache.neighbors.pairs import cosine_limit
from embedcache.outputs import check_output, check_table_output
from embedcache.processes import num_cores
from embedcache.progress import AnyProgress, Progress, to_progress, watch
from embedcache.provenance import digest
from embedcache.settings import merge_settings
from embedcache.sources.images import decode_image
from embedcache.store.cache import Cache
from embedcache.store.rows import keys_at

if TYPE_CHECKING:
    from embedcache.options import DedupOptions

LEVELS = (0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995)  # cosines that are analyzed before one is chosen
_NO_PAIRS = SimilarPairs(
    left=np.empty(0, np.int64),
    right=np.empty(0, np.int64),
    cosines=np.empty(0, np.float32),
    distances=np.empty(0, np.int16),
)


@dataclass(frozen=True, kw_only=True)
class DedupLevel:
    """Numbers of items that deduplication at one cosine would remove."""

    cosine: float | None  # limit; None: copies only
    num_near: int | None  # items with another above it, equal bytes counted once; None for copies
    num_gone: int | None  # samples that would be removed; None if there are too many pairs


@dataclass(frozen=True, kw_only=True)
class DedupAnalysis:
    """The items of a cache, compared with each other."""

    cache: Cache
    feature: InputFeature
    samples: Ints  # that are compared, ascending; also those without a usable item
    copies: Copies
    order: Ints  # samples in the order of the keep rule
    near: NearDuplicates | None  # among the contents; None if only equal bytes were searched
    settings: DedupSettings = field(default_factory=DedupSettings)

    def removed(self, cosine: float | None) -> RemovedSamples:
        """Choose the samples to remove at a cosine; None: copies only."""
        return choose_removed(self.copies, self.duplicates(cosine), self.order)

    def duplicates(self, cosine: float | None) -> SimilarPairs:
        """Return the pairs of contents that are the same picture or have at least a cosine; None: the former only."""
        if self.near is None:
            return _NO_PAIRS
        pairs = self.near.pairs
        is_near = pairs.cosines >= cosine_limit(np.inf if cosine is None else cosine)
        return pairs.select(is_near | (pairs.distances <= SAME_PICTURE))

    def levels(self) -> list[DedupLevel]:
        """Return what deduplication by copies and at each cosine of `LEVELS` would remove."""
        assert self.near is not None
        levels = [DedupLevel(cosine=None, num_near=None, num_gone=len(self.removed(None).samples))]
        for cosine in reversed(LEVELS):
            num_near = int((self.near.highest >= cosine_limit(cosine)).sum())
            num_gone = len(self.removed(cosine).samples) if cosine >= self.near.limit else None
            levels.append(DedupLevel(cosine=cosine, num_near=num_near, num_gone=num_gone))
        return levels

    def to_json(self) -> dict[str, Any]:
        """Return what was compared, and how completely, as JSON values."""
        near, run, selection = self.near, self.settings.run, self.settings.selection
        return {
            "cache": str(self.cache.path),
            "modality": self.feature.modality,
            "feature": self.feature.name,
            "fingerprint": digest(self.feature.fingerprint),
            "run": None if run is None else str(run),
            **({} if selection is None else {"within": str(selection)}),
            "num_samples": len(self.samples),
            "num_items": len(self.copies.content_ids),
            "num_contents": len(self.copies.unique_rows),
            "keep": self.settings.keep,
            "seed": self.settings.seed,
            "num_clusters": None if near is None else near.num_clusters,
            "complete": None if near is None else near.complete,
            "recall": None if near is None or near.recall is None else near.recall.to_json(),
            "highest_cosine": self.highest,
            "num_same_picture": self.num_same_picture,
        }

    @property
    def num_same_picture(self) -> int | None:
        """Number of pairs of contents that are the same picture; None if no pixels were compared."""
        is_compared = self.near is not None and self.near.pairs.distances.min(initial=NO_DISTANCE) < NO_DISTANCE
        return len(self.duplicates(None).left) if is_compared else None

    @property
    def highest(self) -> float | None:
        """Largest cosine of two different contents; None if no two were compared."""
        similarities = self.similarities
        return min(1.0, float(similarities.max())) if len(similarities) > 1 else None

    @property
    def similarities(self) -> Floats:
        """Each content's largest cosine to another one, without those that were compared with none: (M,)."""
        return np.empty(0, np.float32) if self.near is None else self.near.highest[self.near.highest > -2]


@dataclass(frozen=True, kw_only=True)
class DedupReport:
    """A written deduplication.

    Args:
        analysis: the compared items.
        cosine: limit; None: copies only.
        removed: removed samples.
        path: selection of those that stay.
        removed_path: table of those that are removed.
    """

    analysis: DedupAnalysis
    cosine: float | None
    removed: RemovedSamples
    path: Path
    removed_path: Path

    def to_json(self) -> dict[str, Any]:
        """Return what was compared, and how many samples are removed, as JSON values."""
        return {
            **self.analysis.to_json(),
            "cosine": self.cosine,
            "num_removed": len(self.removed.samples),
            "num_removed_copies": int(self.removed.is_copy.sum()),
            "num_removed_same_picture": int((self.removed.distances <= SAME_PICTURE).sum()),
            "selection": str(self.path),
            "removed": str(self.removed_path),
        }


def analyze(
    cache: AnyPath,
    settings: DedupSettings | None = None,
    *,
    progress: AnyProgress = None,
    **options: Unpack["DedupOptions"],
) -> DedupAnalysis:
    """Compare the items of a cache; `DedupAnalysis.levels` returns what each cosine would remove.

    Time and memory as in `find_near_duplicates`, and for images as in `compare_pixels`. Images are read again where
    `reopen_source` allows.

    Raises:
        SettingError: a cosine or `copies_only` is set, which need a file to write, or the keep rule is invalid.
        UnknownNameError: there is no such keep rule or feature.
        DataError, UnfinishedError, FingerprintError: see `Vectors`.
    """
    settings = merge_settings(DedupSettings, settings, options)
    progress = to_progress(progress)
    if settings.cosine is not None or settings.copies_only:
        raise SettingError(
            "OUT: expected a .parquet file for the samples that stay with --cosine or --copies, got none; add it after "
            "the cache, or omit the option to get a report"
        )
    return _compare(cache, settings, progress)


def dedup(
    cache: AnyPath,
    out: AnyPath,
    settings: DedupSettings | None = None,
    *,
    progress: AnyProgress = None,
    **options: Unpack["DedupOptions"],
) -> DedupReport:
    """Write a selection of the samples that stay, and beside it, in `OUT.removed.parquet`, the removed ones.

    A sample is removed if each of its items has the bytes, the pixels (an image in another size, compression or
    format), or a cosine of at least the limit, of an item of a sample that stays. Samples without a usable item stay.
    Only those of `settings.selection`, if it is given, are compared and stay. The selection is written last.

    Args:
        cache: path or URL of the cache.
        out: a `.parquet` file.
        settings: the limit, `cosine` or `copies_only`, and how items are compared.
        options: settings by their names on the command line, which replace those of `settings`.
        progress: progress in items.

    Raises:
        SettingError: neither a cosine nor `copies_only` is set, or too many pairs reach the cosine.
        PathError: the path does not end in `.parquet`; or the errors of `check_output`.
        DataError, UnfinishedError, FingerprintError, UnknownNameError: see `analyze`.
        DiskFullError: the scratch file does not fit.
    """
    settings = merge_settings(DedupSettings, settings, options)
    progress = to_progress(progress)
    out, cosine = Path(out), settings.cosine
    if cosine is None and not settings.copies_only:
        raise SettingError("expected --cosine or --copies with a file to write, got neither; give one of them")
    removed_path = out.with_name(f"{out.stem}.removed.parquet")
    check_table_output("selection", out)
    check_output(removed_path)
    analysis = _compare(cache, settings, progress)
    report = DedupReport(
        analysis=analysis,
        cosine=cosine,
        removed=analysis.removed(cosine),
        path=out,
        removed_path=removed_path,
    )
    _write_removed(report.removed_path, analysis.cache, report.removed)
    record = {"method": "dedup", **report.to_json()}
    write_selection(out, analysis.cache, _selection(analysis, report.removed), record, progress=progress)
    return report


def _compare(cache_path: AnyPath, settings: DedupSettings, progress: Progress) -> DedupAnalysis:
    cache = Cache(cache_path)
    modality = choose_modality(cache, settings.modality, settings.run)
    check_keep(settings.keep, cache)
    images = open_images(cache) if modality == "image" and settings.pixels else None
    vectors = None
    if not settings.copies_only or images is not None:  # copies of images are looked for among similar ones
        vectors = Vectors(cache_path, modality, settings.feature, settings.run, device=settings.device)
    feature = open_input(cache, modality, settings.feature) if vectors is None else vectors.feature
    samples = np.setdiff1d(np.arange(len(cache)), cache.removed, assume_unique=True)
    if settings.selection is not None:
        samples = read_selection(settings.selection, [cache])
    copies = find_copies(cache, feature, samples)
    if not len(copies.unique_rows):
        raise DataError(
            f"feature {feature.name}: expected encoded items of {len(samples):,} samples, got none; see: embedcache "
            f"inspect {cache.path}"
        )
    near = None
    if vectors is not None:
        levels = LEVELS if settings.cosine is None else [settings.cosine]
        near = find_near_duplicates(vectors, copies.unique_rows, levels, settings, progress)
        if images is not None:
            pairs = compare_pixels(images, copies.unique_rows, near.pairs, settings.scratch, progress)
            near = replace(near, pairs=pairs)
        if settings.cosine is not None and near.limit > settings.cosine:
            raise SettingError(
                f"cosine: expected at most {MAX_PAIRS:,} pairs above it, got more with {settings.cosine}; give a "
                f"higher one: embedcache curate dedup {quoted(cache.path)} helps to choose it"
            )
    order = order_samples(settings.keep, copies, cache)
    return DedupAnalysis(
        cache=cache, feature=feature, samples=samples, copies=copies, order=order, near=near, settings=settings
    )


def _selection(analysis: DedupAnalysis, removed: RemovedSamples) -> Selection:
    """Select the samples that stay, with the number of samples that each stands for; null without an item."""
    rows = np.setdiff1d(analysis.samples, removed.samples, assume_unique=True)
    num_samples = analysis.cache.info.num_samples
    has_no_item_S = np.ones(num_samples, bool)
    has_no_item_S[analysis.copies.samples] = False
    num_copies_S = np.bincount(removed.kept[removed.is_copy], minlength=num_samples)
    near = np.flatnonzero(~removed.is_copy)
    num_near_S = np.bincount(removed.kept[near], minlength=num_samples)
    closest_S = np.full(num_samples, -np.inf, np.float32)
    np.maximum.at(closest_S, removed.kept[near], removed.cosines[near])
    columns = {
        "num_copies": pa.array(num_copies_S[rows], pa.int32(), mask=has_no_item_S[rows]),
        "num_near_duplicates": pa.array(num_near_S[rows], pa.int32(), mask=has_no_item_S[rows]),
        "closest_cosine": pa.array(closest_S[rows], mask=num_near_S[rows] == 0),
    }
    return Selection(rows=rows, columns=columns)


def _write_removed(path: Path, cache: Cache, removed: RemovedSamples) -> None:
    columns = {
        "kept_row": removed.kept,
        "kept_key": keys_at(cache, removed.kept),
        "cosine": removed.cosines,
        "is_copy": removed.is_copy,
        "hash_distance": pa.array(removed.distances, mask=removed.distances == NO_DISTANCE),
    }
    keytable.write(path, [cache], columns, "removed", {"method": "dedup"}, rows=removed.samples)


_HASH_PX = 24
_BLOCK = 512
_log = logging.getLogger(__name__)


def open_images(cache: Cache) -> Thumbnails | None:
    """Open the images of a cache to read them again; None, with a warning, if its source cannot be opened."""
    try:
        return Thumbnails(cache)
    except EmbedcacheError as error:
        _log.warning("pixels are not compared: %s", str(error).removeprefix(not_shown("image")))
        return None


def hash_image(data: bytes) -> Array:
    """Return the perceptual hash of an image file, (1728,) uint8; raise an ItemError if it cannot be decoded."""
    image = decode_image(data).resize((_HASH_PX, _HASH_PX), Image.Resampling.LANCZOS)
    return np.asarray(image).ravel()


def compare_pixels(
    images: Thumbnails, rows_C: Ints, pairs: SimilarPairs, scratch: Path | str | None, progress: Progress
) -> SimilarPairs:
    """Compute the hash distances of pairs of contents; a warning says how many images could not be read, and why.

    Each image is read and decoded once, on all cores. Scratch space: 1,728 bytes per image, in the folder `scratch` or
    the system's. Memory: 9 bytes per content, 20 per pair and the images in work. The result is deterministic.

    Args:
        images: reader of the images.
        rows_C: row of each content.
        pairs: pairs of contents.
        scratch: folder of the scratch file; None: the system's.
        progress: progress in images.

    Raises:
        DiskFullError: the scratch file does not fit.
    """
    is_paired_C = np.zeros(len(rows_C), bool)
    is_paired_C[np.concatenate([pairs.left, pairs.right])] = True
    position_C = np.cumsum(is_paired_C) - 1
    rows = rows_C[is_paired_C]
    is_read = np.zeros(len(rows), bool)
    reason = None
    distances = pairs.distances.copy()

    def read_hash(row: int) -> tuple[Array | int, str | None]:
        try:
            return hash_image(images.read(row)), None
        except EmbedcacheError as error:
            return 0, str(error)

    shape = (len(rows), 3 * _HASH_PX**2)
    with scratch_matrix(scratch, shape, np.uint8) as hashes, ThreadPoolExecutor(num_cores()) as pool:
        for block in watch(blocks(len(rows), _BLOCK), progress, "reading similar images", len(rows), "images"):
            for position, (value, failure) in enumerate(pool.map(read_hash, rows[block].tolist()), block.start):
                hashes[position] = value
                is_read[position] = failure is None
                reason = reason or failure

        for block in blocks(len(distances), _BLOCK):
            left = position_C[pairs.left[block]]
            right = position_C[pairs.right[block]]
            difference = np.maximum(hashes[left], hashes[right]) - np.minimum(hashes[left], hashes[right])
            distances[block] = np.where(is_read[left] & is_read[right], difference.max(axis=1), np.int16(NO_DISTANCE))

    if reason is not None:
        _log.warning("pixels of %s images are not compared: %s", f"{(~is_read).sum():,}", reason)
    return replace(pairs, distances=distances)
