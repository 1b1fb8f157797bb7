"""Prototypes in training: the classes of a classifier as further pairs of the closed form."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from embedcache.dataset.inputs import (
    InputFeature,
    NamedFeatures,
    Reader,
    default_pair,
    features_by_modality,
    open_input,
)
from embedcache.dataset.pairs import Pairs, pair_items
from embedcache.errors import DataError
from embedcache.extract.prototypes import CLASSIFIER
from embedcache.files import one_or_many
from embedcache.modalities import MODALITIES, order_pair
from embedcache.progress import Progress
from embedcache.provenance import check_same, digest
from embedcache.store.cache import Cache
from embedcache.train.data import Paths
from embedcache.train.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class Prototypes:
    """The pairs of a cache of prototypes.

    Args:
        features: modality -> its feature, in the order of the towers.
        pairs: the classes with their names.
        readers: modality -> reader of its feature.
        names: names of the classes, in their order.
        digest: SHA-256 of what they are: the samples and the fingerprints of both features.
    """

    features: Mapping[str, InputFeature]
    pairs: Pairs
    readers: Mapping[str, Reader]
    names: list[str]
    digest: str


def open_prototypes(
    path: Path, features: Mapping[str, InputFeature], settings: TrainSettings, progress: Progress
) -> Prototypes:
    """Open a cache of prototypes for training on features; names are shuffled if the settings ask for a control.

    Args:
        path: cache of `extract prototypes:ENCODER`, or of vectors with names that were imported.
        features: modality -> the feature that is trained on; of a modality that is left out, the prototypes have one.

    Raises:
        PathError: the path is not a cache.
        UnknownNameError: the cache lacks a feature.
        FingerprintError: its rows belong to another encoder or feature, or its names were encoded by another one.
        DataError: widths differ.
    """
    cache = Cache(path)
    opened = {
        modality: _open_side(cache, features[modality], progress)
        if modality in features
        else open_input(cache, modality)
        for modality in order_pair({*features, *default_pair(cache)} if len(features) < 2 else features)
    }
    first, second = opened.values()
    pairs = pair_items([cache], [first], [second])
    if settings.shuffle_pairs or settings.shuffle_prototypes:
        shuffled = np.random.default_rng(settings.seed).permutation(pairs.samples)
        positions = np.searchsorted(pairs.samples, pairs.second.samples)
        pairs = Pairs(first=pairs.first, second=replace(pairs.second, samples=shuffled[positions]))
    return Prototypes(
        features=opened,
        pairs=pairs,
        readers={modality: feature.load(progress=progress) for modality, feature in opened.items()},
        names=cache.items("text", columns=["text"])["text"].to_pylist(),
        digest=digest([cache.info.index_digest, *(dict(feature.fingerprint) for feature in opened.values())]),
    )


def open_unpaired(caches: Paths, feature: NamedFeatures) -> InputFeature | None:
    """Return the feature to train on of a cache that has features of one modality only; None of any other."""
    paths = one_or_many(caches)
    cache = Cache(paths[0]) if len(paths) == 1 else None
    modalities = [name for name in MODALITIES if cache is not None and cache.features(name)]
    if cache is None or len(modalities) != 1:
        return None
    (modality,) = modalities
    names = features_by_modality(cache, feature).get(modality)
    unpaired = open_input(cache, modality, "+".join(names) if names else None)
    unpaired.require_complete()
    return unpaired


def _open_side(cache: Cache, trained: InputFeature, progress: Progress) -> InputFeature:
    """Open one feature of a cache of prototypes, and check that it is in the space of the one that is trained on."""
    modality = trained.modality
    is_named = trained.name in [feature.name for feature in cache.features(modality)]
    feature = open_input(cache, modality, trained.name if is_named else None)
    feature.require_complete()
    expected = dict(feature.fingerprint)
    found = dict(trained.fingerprint)
    classifier = expected["preprocessing"].get(CLASSIFIER)
    if classifier is not None:
        expected = classifier
        found = {**found, "feature": trained.name.rpartition("/")[2]}
        found = {name: found.get(name) for name in expected}
    if classifier is not None or not feature.group.is_imported:
        next_step = f"the second value is that of {trained.name}: make prototypes for it, with the same encoders"
        check_same(f"prototypes {cache.path}", expected, found, next_step=next_step)
    elif feature.fingerprint != trained.fingerprint:
        progress.note(f"{cache.path}: only the width of the imported {feature.name} was compared with {trained.name}")
    if feature.width != trained.width:
        raise DataError(
            f"prototypes {cache.path}: expected {feature.name} of width {trained.width}, as {trained.name} has, got "
            f"{feature.width}; import rows of that feature"
        )
    return feature
