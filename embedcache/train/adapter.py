"""Adapters: the map of a new encoder's vectors into the space of an old one's, fitted on items encoded with both.

With unit vectors x of the new feature and y of the old one, or of a run's projection of it, an adapter computes
(x - mean(x)) W + mean(y), where W is scaled so that mapped vectors vary as much as y. W is orthogonal Procrustes, as in
"Drift-Adapter" (EMNLP 2025) for the queries of an old index and in GPUA (ICML 2026) for an image encoder without texts,
or ridge regression: the best of a few on the validation part. For a feature, that is the one that finds most of the
neighbors that the new feature has. For a run, it is the one by which most items are nearest to their own projection.
"""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np
import torch

from embedcache.arrays import Floats, Ints, blocks, normalize
from embedcache.dataset.inputs import features_by_modality
from embedcache.dataset.pairs import Items, Pairs
from embedcache.dataset.settings import with_split_seed
from embedcache.dataset.splits import PARTS, Split, make_split, write_split
from embedcache.dataset.vectors import Vectors
from embedcache.errors import DataError, SettingError, summary
from embedcache.files import AnyPath, relative_location, writing
from embedcache.metrics import best_ranks, nearest_others, neighbor_overlap, recall_at
from embedcache.modalities import noun
from embedcache.modeling.heads import Tower
from embedcache.neighbors.knn import knn
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.projectors.base import Matrix, Moments, solve, split_names
from embedcache.projectors.pair import AlignedPair
from embedcache.provenance import Manifest, digest, digest_file
from embedcache.runs import ADAPTER, MANIFEST, SPLIT, Run, RunInfo
from embedcache.settings import merge_settings, replace_flat
from embedcache.store.cache import Cache
from embedcache.train.data import describe_input
from embedcache.train.settings import AdapterSettings

if TYPE_CHECKING:
    from embedcache.options import AdapterOptions

_PROJECTOR = "linear:bias=true"
_MIN_SAMPLES = 20
_BLOCK = 8192
_FORMS = (("procrustes", 1.0), ("ridge", 0.01), ("ridge", 0.1))
_K = 10
_MAX_VALIDATION = 2000
_TOLERANCE = 0.01
_SAME_VARIANCE = 1e-12  # of unit vectors that differ by less than float32 resolves


class AdapterReport(Manifest):
    """Result of fitting an adapter.

    Args:
        reused: whether the adapter existed already, with the same settings and features.
        num_samples: part -> samples with both features; those of `train` were fitted on.
        form: form of the map that was best on the validation part.
        score: its score there.
        feature: feature of the new encoder.
        target: feature of the old encoder.
        kept: modality whose tower of the run is used unchanged; None for an adapter of a plain feature.
    """

    reused: bool
    num_samples: Mapping[str, int]
    form: str
    score: float
    feature: str
    target: str
    kept: str | None

    __repr__ = __str__ = summary

    def line(self, adapter_path: Path = Path("ADAPTER")) -> str:
        """Summarize the report in one line."""
        state = "reused" if self.reused else "fitted"
        counts = ", ".join(f"{count:,} {part}" for part, count in self.num_samples.items())
        kept = f", with the {self.kept} tower of the run" if self.kept else ""
        measure = "retrieval" if self.kept else "adapter"
        return (
            f"{adapter_path}: {state}: {self.feature} in the space of {self.target}{kept}; samples: {counts}; "
            f"{self.form}, chosen on validation; measure it: embedcache evaluate {measure} CACHE {adapter_path}"
        )


def fit_adapter(
    cache: AnyPath,
    adapter: AnyPath,
    *,
    feature: str,
    target: AnyPath,
    settings: AdapterSettings | None = None,
    progress: AnyProgress = None,
    **options: Unpack["AdapterOptions"],
) -> AdapterReport:
    """Fit the map of a new encoder's feature into the space of an old one's, on items that both have encoded.

    The adapter is a run. With a feature as the target, `search_index(…, adapter=…)` maps queries of the new encoder
    into an index of that feature. With a run as the target, the adapter is an aligned pair: the map in place of the
    run's tower, and the run's other tower, unchanged. No caption is read. A finished adapter with the same settings is
    reused. Takes one pass over both features. Memory: a block of rows and three matrices of the squared widths.

    Args:
        cache: cache with features of both encoders.
        adapter: folder of the adapter.
        feature: feature of the new encoder, as `encoder/feature` or `modality=encoder/feature`.
        target: feature of the old encoder, of the same modality, or folder of a run that was trained on it.
        settings: settings of the fit.
        progress: progress in items.
        options: settings by their names on the command line, which replace those of `settings`.

    Raises:
        UnknownNameError: a feature is unknown.
        UnfinishedError: a feature has missing chunks.
        SettingError: the features are equal or of two modalities, or near-duplicates leave nothing to hold out.
        FingerprintError: the run was trained on another encoder's feature, or the folder has another adapter.
        PathError: the folder contains other files.
        DataError: too few samples have both features, or a feature has several vectors per item.

    Example:
        >>> report = embedcache.fit_adapter("two-encoders", "adapter", feature="new/cls", target="old/cls", split="key")
        >>> report.num_samples
        {'train': 39, 'val': 6, 'test': 15}
        >>> _ = embedcache.build_index("two-encoders", "index", feature="old/cls")
        >>> hits = embedcache.search_index("index", embedcache.Queries(images="00003.png"), adapter="adapter", k=1)
        >>> hits[0][0].key
        '00003'
    """
    settings = merge_settings(AdapterSettings, settings, {})
    settings = replace_flat(settings, with_split_seed(options, settings))
    cache, path, progress = Cache(cache), Path(adapter), to_progress(progress)
    sides = _open_sides(cache, feature, target)
    info = _describe(cache, path, sides, settings)
    finished = Run.reuse(path, info)
    if finished is not None:
        return AdapterReport.model_validate({**finished.info.report, "reused": True})

    items = _shared_items(cache, sides)
    reader = {sides.new.modality: sides.new.feature.read}
    split = make_split([cache], Pairs(first=items, second=items), settings.split, reader, progress=progress)
    train_rows = items.rows[split.mask("train")[items.samples]]
    _check_size(cache, sides, train_rows, "training samples")
    fitted = _choose_map(sides, train_rows, items.rows[split.mask("val")[items.samples]], settings, progress)
    pair = info.build()
    assert isinstance(pair, AlignedPair)
    if sides.old.run is not None:
        weights = sides.old.run.pair.state_dict()
        kept = {name: value for name, value in weights.items() if name.partition(".")[0] != sides.new.modality}
        pair.load_state_dict(kept, strict=False)
    _set_map(pair, sides.new.modality, fitted)

    run = Run.create(path, info)
    with writing(path):
        write_split(path / SPLIT, [cache], split)
        report = _report(sides, split, fitted)
        run.finish(pair, report.to_json())
    return report


class _Sides(NamedTuple):
    """The vectors that an adapter maps, and those of the same items in the space that it maps into."""

    new: Vectors
    old: Vectors


def _open_sides(cache: Cache, feature: str, target: AnyPath) -> _Sides:
    ((modality, (name,)),) = features_by_modality(cache, feature).items()
    new = Vectors(cache.path, modality, name)
    if (Path(target) / MANIFEST).is_file():
        old = Vectors(cache.path, modality, run_path=target)
    else:
        ((old_modality, (old_name,)),) = features_by_modality(cache, str(target)).items()
        if old_modality != modality:
            raise SettingError(
                f"target: expected a feature of {noun(modality)}, as {name} is, got {target} of {noun(old_modality)}; "
                "an adapter maps two encoders of the same items, and train aligns two modalities"
            )
        old = Vectors(cache.path, modality, old_name)
    if old.feature.name == new.feature.name:
        raise SettingError(f"target: expected a feature of another encoder than {name}, got the same")
    return _Sides(new, old)


def _describe(cache: Cache, path: Path, sides: _Sides, settings: AdapterSettings) -> RunInfo:
    """Return the record of an adapter: the run's with another tower, or that of one tower."""
    new, old = sides
    mapped = describe_input(new.feature)
    inputs = {new.modality: mapped}
    projector = _PROJECTOR
    space: dict[str, Any] = {"feature": old.feature.name, "fingerprint": old.feature.fingerprint}
    if old.run is not None:
        inputs = {**old.run.info.inputs, new.modality: mapped}
        names = dict(zip(old.run.modalities, split_names(old.run.projector), strict=False))
        projector = "+".join({**names, new.modality: _PROJECTOR}.values())
        space = {"feature": old.feature.name, "weights": old.run.info.weights}

    digests = {} if settings.split.path is None else {"split": digest_file(settings.split.path)}
    for vectors in sides:
        if len(vectors.feature.failed_rows):
            digests[f"failed {vectors.feature.name}"] = digest(vectors.feature.failed_rows.tolist())
    return RunInfo(
        kind=ADAPTER if old.run is None else old.run.info.kind,
        arguments={
            "projector": projector,
            "widths": {modality: entry.width for modality, entry in inputs.items()},
            "shared_width": old.width,
        },
        inputs=inputs,
        settings={**settings.to_json(), "target": space},
        index_digest=cache.info.index_digest,
        digests=digests,
        caches=[relative_location(cache.path, path)],
    )


def _shared_items(cache: Cache, sides: _Sides) -> Items:
    """Return the items that have both features, or raise a `DataError` if they are too few."""
    rows = np.intersect1d(sides.new.rows, sides.old.rows, assume_unique=True)
    _check_size(cache, sides, rows, noun(sides.new.modality))
    samples = cache.items(sides.new.modality, columns=["sample"])["sample"].to_numpy()[rows]
    return Items(rows=rows, samples=samples, contents=np.full(len(rows), -1))


def _check_size(cache: Cache, sides: _Sides, rows: Ints, what: str) -> None:
    if len(rows) < _MIN_SAMPLES:
        raise DataError(
            f"{cache.path}: expected at least {_MIN_SAMPLES} {what} with both {sides.new.feature.name} and "
            f"{sides.old.feature.name}, got {len(rows)}; encode more items with both encoders"
        )


def _choose_map(
    sides: _Sides, train_rows: Ints, val_rows: Ints, settings: AdapterSettings, progress: Progress
) -> "_Map":
    """Fit the map in each form on the training rows, and return the one that is best on validation rows."""
    new, old = sides
    shuffled = np.random.default_rng(settings.seed).permutation(train_rows)
    targets = shuffled if settings.shuffle_pairs else train_rows
    moments = Moments(new.width, old.width)
    progress.start("fitting", len(train_rows), new.unit)
    for block in blocks(len(train_rows), _BLOCK):
        moments.add(new.read(train_rows[block]), old.read(targets[block]))
        progress.advance(len(train_rows[block]))
    progress.finish()

    covariances = moments.covariances()
    for vectors, covariance in ((new, covariances.first), (old, covariances.second)):
        if np.trace(covariance) <= _SAME_VARIANCE:
            raise DataError(f"{vectors.feature.name}: expected vectors of different directions, got one in all rows")

    val_rows = val_rows[:: -(-len(val_rows) // _MAX_VALIDATION)]
    new_ND, old_NE = new.read(val_rows), old.read(val_rows)
    maps = []
    for form, shrinkage in _FORMS:
        left_DE, right_EE = solve(form, moments, old.width, shrinkage=shrinkage)
        weights_DE = left_DE @ right_EE.T
        variance = max(np.trace(weights_DE.T @ covariances.first @ weights_DE), np.finfo(np.float64).tiny)
        weights_DE *= np.sqrt(np.trace(covariances.second) / variance)
        mapped_NE = normalize((new_ND - moments.first_mean) @ weights_DE + moments.second_mean).astype(np.float32)
        score = _score_neighbors(mapped_NE, new_ND, old_NE) if old.run is None else _score_own(mapped_NE, old_NE)
        maps.append(_Map(f"{form}, shrinkage {shrinkage}", score, weights_DE, moments.first_mean, moments.second_mean))

    # Of forms that are about equal, the first is the most constrained.
    best_score = max(fitted.score for fitted in maps)
    return next(fitted for fitted in maps if fitted.score >= best_score - _TOLERANCE)


class _Map(NamedTuple):
    """A map x -> (x - mean) @ weights + bias, its form, and its score on validation rows."""

    form: str
    score: float
    weights: Matrix  # (D, E)
    mean: Matrix  # (D,)
    bias: Matrix  # (E,)


def _score_neighbors(mapped_NE: Floats, new_ND: Floats, old_NE: Floats) -> float:
    """Return the fraction of each item's neighbors by the new feature that its mapped vector finds among old ones."""
    own = np.arange(len(new_ND))
    k = min(_K, len(own) - 1)
    expected = nearest_others(new_ND, k)
    return float(neighbor_overlap(knn(mapped_NE, old_NE, k, own=own)[0], expected).mean())


def _score_own(mapped_NE: Floats, old_NE: Floats) -> float:
    """Return the mean of R@1, R@5 and R@10 of each item's own old vector."""
    own = np.arange(len(old_NE))
    ranks = best_ranks(mapped_NE, old_NE, (own, own))
    return fmean(recall_at(ranks, k) for k in (1, 5, 10))


def _set_map(pair: AlignedPair, modality: str, fitted: _Map) -> None:
    """Set the tower of the new feature to a map."""
    tower = pair.tower(modality)
    assert isinstance(tower, Tower)
    tower.projector.set_linear_map(torch.from_numpy(fitted.weights))
    with torch.no_grad():
        tower.mean.copy_(torch.from_numpy(fitted.mean))
        tower.projector.linear.bias.copy_(torch.from_numpy(fitted.bias))


def _report(sides: _Sides, split: Split, fitted: _Map) -> AdapterReport:
    return AdapterReport(
        reused=False,
        num_samples={part: split.parts.count(part) for part in PARTS},
        form=fitted.form,
        score=fitted.score,
        feature=sides.new.feature.name,
        target=sides.old.feature.name,
        kept=sides.old.other_modality,
    )
