"""Concepts: named directions, from the cached prompts of a list or from labeled examples."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedcache.arrays import Array, Floats, Ints, blocks, normalize
from embedcache.dataset.labels import CLASS, has_label, has_prompts, read_labels, read_prompts
from embedcache.dataset.vectors import Vectors
from embedcache.errors import DataError
from embedcache.files import AnyPath
from embedcache.modalities import noun
from embedcache.progress import Progress
from embedcache.provenance import check_same
from embedcache.sources.open import IMPORT_TOGETHER
from embedcache.store.cache import Cache

MAX_EXAMPLES = 128  # as "From Unimodal to Multimodal" (CVPR 2025) averages for its prototypes
_SEED = 0
_MAX_TEXTS = 8
_BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class Concepts:
    """Named directions in the space of a pool's vectors.

    `source` says where they come from, as JSON values: `cache`, `index_digest`, `feature`, `fingerprint`, `run`,
    `run_weights`, and `of`, which is `prompts` or `examples`; for prompts also `texts`, some of the first concept's,
    and for examples `label`, `most_examples` and `seed`.
    """

    names: list[str]
    vectors: Floats  # (C, P) rows of length 1
    counts: Ints  # (C,) number of prompts or examples that each is the mean of
    source: dict[str, Any]


def open_concepts(
    cache: Cache,
    pool: Vectors,
    *,
    label: str = "label",
    join_names: bool = False,
) -> Concepts:
    """Read concepts in the space of a pool's vectors.

    In a cache made from `prompts:…`, or of other texts with a column `class`, each sample is a concept, the mean of its
    prompts. In other caches, and where `label` is `class`, each value of the column `label` is a concept, the mean of
    at most 128 random examples (a prototype). Vectors are normalized, averaged and normalized again. If a
    run projects the pool, its text tower projects prompts, and the tower of its first modality that the cache has
    projects examples (such as that of images, or, if there are none, of texts). If the pool is a plain feature, the
    concepts must have the same feature. `join_names` merges concepts with equal names, such as the two cranes of
    ImageNet, instead of raising an error. Memory: the concepts, and a block of items.

    Raises:
        FingerprintError: the concepts' feature is from another encoder than the pool's, or than the run was trained on.
        UnknownNameError: the cache has no such feature, or neither prompts nor a column of that name.
        DataError: prompts for a plain feature of other items than texts, equal names, or a concept without a prompt or
            example.
    """
    is_prompts = has_prompts(cache) and label != CLASS
    vectors = _open(cache, pool, is_prompts=is_prompts)
    if is_prompts:
        prompts = read_prompts(cache, vectors.feature)
        names, rows, numbers = prompts.names, prompts.rows, prompts.classes
    else:
        names, rows, numbers = _draw_examples(vectors, label)
    unique = list(dict.fromkeys(names))
    if len(unique) < len(names):
        if not join_names:
            name, count = Counter(names).most_common(1)[0]
            raise DataError(
                f"{cache.path}: expected each concept once, got {name!r} {count} times; extract a list with each name "
                "once"
            )
        numbers = np.array([unique.index(name) for name in names], np.int64)[numbers]
        names = unique
    sums_CP: Array = np.zeros((len(names), vectors.width), np.float64)  # `mean_directions` needs all vectors in memory
    for block in blocks(len(rows), _BLOCK):
        np.add.at(sums_CP, numbers[block], vectors.read(rows[block]))
    vectors_CP = normalize(sums_CP)
    is_zero_C = ~vectors_CP.any(axis=1)
    if is_zero_C.any():
        raise DataError(
            f"{is_zero_C.sum():,} of {len(names):,} concepts of {cache.path} have vectors whose mean is zero, first "
            f"{names[int(is_zero_C.argmax())]!r}; give them other prompts or examples"
        )
    source: dict[str, Any] = {
        "cache": str(cache.path),
        "index_digest": cache.info.index_digest,
        "feature": vectors.feature.name,
        "fingerprint": dict(vectors.feature.fingerprint),
        "run": None if vectors.run_path is None else str(vectors.run_path),
        "run_weights": None if vectors.run is None else vectors.run.info.weights,
        "of": "prompts" if is_prompts else "examples",
    }
    if is_prompts:
        first = cache.items("text", columns=["text"])["text"].take(rows[numbers == 0])
        source |= {"texts": first.slice(0, _MAX_TEXTS).to_pylist()}
    else:
        source |= {"label": label, "most_examples": MAX_EXAMPLES, "seed": _SEED}
    return Concepts(names=names, vectors=vectors_CP, counts=np.bincount(numbers, minlength=len(names)), source=source)


def choose_feature(cache: AnyPath, concepts: AnyPath, modality: str, *, progress: Progress) -> str | None:
    """Return the feature to compare the items of a cache with concepts by, where none is named and no run projects.

    Of several features of the cache it is the only one of vectors that the cache of concepts has too, from the same
    encoder, and a line says so; None otherwise.
    """
    features = Cache(cache).features(modality)
    if len(features) < 2:
        return None
    in_concepts = {feature.name: feature.fingerprint for feature in Cache(concepts).features(modality)}
    vectors = [feature for feature in features if len(feature.item_shape) == 1]
    shared = [feature for feature in vectors if in_concepts.get(feature.name) == feature.fingerprint]
    if len(shared) != 1:
        return None
    progress.note(
        f"{shared[0].name} is used: of the {modality} features of {cache}, {concepts} has no other one to compare with"
    )
    return shared[0].name


def _open(cache: Cache, pool: Vectors, *, is_prompts: bool) -> Vectors:
    """Open the concepts' vectors that are in the pool's space."""
    if pool.run_path is not None:
        modality = _projected_modality(cache, pool, is_prompts=is_prompts)
        return Vectors(cache.path, modality, run_path=pool.run_path, width=pool.width, device=pool.device)
    if is_prompts and pool.modality != "text":
        items = noun(pool.modality)
        raise DataError(
            f"{cache.path}: expected labeled {items}, to compare with the plain {pool.modality} feature "
            f"{pool.feature.name}, got prompts; project both with --run RUN, or give a cache of labeled {items}"
        )
    vectors = Vectors(cache.path, pool.modality, pool.feature.name, width=pool.width)
    check_same(
        f"feature {vectors.feature.name} of {cache.path}",
        vectors.feature.fingerprint,
        pool.feature.fingerprint,
        next_step=IMPORT_TOGETHER
        if pool.feature.group.is_imported
        else f"extract the concepts with the pool's encoder: --{pool.modality}-encoder {pool.feature.spec}",
    )
    return vectors


def _projected_modality(cache: Cache, pool: Vectors, *, is_prompts: bool) -> str:
    """Return the modality of the run by which concepts are projected: that of prompts, or of the examples."""
    assert pool.run is not None
    modalities = pool.run.modalities
    if not is_prompts:
        return next((name for name in modalities if cache.info.num_items.get(name)), modalities[-1])
    if "text" not in modalities:
        raise DataError(
            f"{cache.path}: expected labeled {noun(modalities[0])}, as {pool.run_path} is a run of "
            f"{' and '.join(map(noun, modalities))}, got prompts"
        )
    return "text"


def _draw_examples(vectors: Vectors, label: str) -> tuple[list[str], Ints, Ints]:
    """Draw at most `MAX_EXAMPLES` rows of each label: names, rows in order, and the number of the name of each."""
    cache = vectors.cache
    samples_N = cache.items(vectors.modality, columns=["sample"])["sample"].to_numpy()[vectors.rows]
    is_labeled_N = has_label(cache, samples_N, column=label)
    rows_N, samples_N = vectors.rows[is_labeled_N], samples_N[is_labeled_N]
    if not len(rows_N):
        raise DataError(
            f"column {label!r} of {cache.path}: expected labels, got none for {noun(vectors.modality)} with "
            f"{vectors.feature.name}; name another column with --label"
        )
    labels = read_labels(cache, samples_N, column=label)
    is_labeled_S = has_label(cache, np.arange(cache.info.num_samples), column=label)
    num_labels = len(read_labels(cache, np.flatnonzero(is_labeled_S), column=label).names)
    if len(labels.names) < num_labels:
        raise DataError(
            f"column {label!r} of {cache.path}: expected an encoded example of each of {num_labels:,} labels, got none "
            f"of {num_labels - len(labels.names):,}; retry with extract --retry-failed, or leave these labels out"
        )
    shuffled = np.random.default_rng(_SEED).permutation(len(rows_N))
    order = shuffled[np.argsort(labels.numbers[shuffled], kind="stable")]
    counts_C = np.bincount(labels.numbers)
    ranks = np.arange(len(order)) - np.repeat(np.cumsum(counts_C) - counts_C, counts_C)
    examples = np.sort(order[ranks < MAX_EXAMPLES])
    return labels.names, rows_N[examples], labels.numbers[examples]
