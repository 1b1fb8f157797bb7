"""Concepts: named directions, from the cached prompts of a list or from labeled examples."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Array, Floats, Ints, blocks, normalize
from embedcache.dataset.inputs import open_input
from embedcache.dataset.labels import CLASS, has_label, has_prompts, read_labels, read_prompts
from embedcache.dataset.vectors import Vectors
from embedcache.encoders.open import EncoderSpec, feature_names, recorded_settings, why_no_encoder
from embedcache.errors import DataError, PathError, UnfinishedError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.files import AnyPath, open_path
from embedcache.modalities import noun
from embedcache.processes import AUTO
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import check_same, digest, digest_file
from embedcache.registry import names_from
from embedcache.sources.files import require_file
from embedcache.sources.open import IMPORT_TOGETHER, open_source
from embedcache.sources.texts import DEFAULT_TEMPLATES
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
    path: AnyPath,
    pool: Vectors,
    *,
    label: str = "label",
    join_names: bool = False,
    progress: Progress | None = None,
) -> Concepts:
    """Read concepts in the space of a pool's vectors, from a cache or a `.txt` with one name per line.

    The names of a file are encoded once, by the text encoder of the pool, see `open_names`.

    In a cache made from `prompts:…`, or of other texts with a column `class`, each sample is a concept, the mean of its
    prompts. In other caches, and where `label` is `class`, each value of the column `label` is a concept, the mean of
    at most 128 random examples (a prototype). Vectors are normalized, averaged and normalized again. If a
    run projects the pool, its text tower projects prompts, and the tower of its first modality that the cache has
    projects examples (such as that of images, or, if there are none, of texts). If the pool is a plain feature, the
    concepts must have the same feature. `join_names` merges concepts with equal names, such as the two cranes of
    ImageNet, instead of raising an error. Memory: the concepts, and a block of items.

    Raises:
        PathError: there is no such cache or file.
        FingerprintError: the concepts' feature is from another encoder than the pool's, or than the run was trained on.
        UnknownNameError: the cache has no such feature, or neither prompts nor a column of that name.
        DataError: prompts for a plain feature of other items than texts, equal names, or a concept without a prompt or
            example.
    """
    cache = open_names(path, *_text_feature(path, pool), progress=progress) if is_names(path) else Cache(path)
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
            raise DataError(f"{path}: expected each concept once, got {name!r} {count} times; list each name once")
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


def is_names(path: AnyPath) -> bool:
    """Return whether a path is a `.txt` of names, not a cache of concepts."""
    location = open_path(path)
    return location.suffix == ".txt" and not location.is_dir()


def open_names(
    path: AnyPath, spec: str, feature: str, fingerprint: Mapping[str, Any], *, progress: Progress | None = None
) -> Cache:
    """Return a cache of the names in a `.txt`, one per line, with a text feature; they are encoded once.

    The cache is a folder beside the file, `FILE-concepts-DIGEST`, with the prompts of `extract prompts:FILE`. The
    digest is of the file's bytes and of the encoder, so that a folder is reused if both are equal, and never replaced.

    Args:
        path: the file.
        spec: the encoder, as its features record it.
        feature: `encoder/feature`, such as the text input of a run.
        fingerprint: everything that determines the encoder's output.
        progress: shows the folder when it is made, and the number of encoded texts.

    Raises:
        PathError: there is no such file.
        SourceError: the file has no name, or a blank line.
        DataError: the feature was imported or derived, so that no names can be encoded like it.
        FingerprintError: the encoder is no longer the same.

    Example:
        >>> text = run.input("text")  # doctest: +SKIP
        >>> open_names("names.txt", text.spec, text.feature, text.fingerprint)  # doctest: +SKIP
    """
    path, progress = open_path(path), progress or NullProgress()
    require_file(path)
    key = digest([digest_file(path), feature, dict(fingerprint)])
    folder = path.with_name(f"{path.stem}-concepts-{key[:8]}")
    if _has_feature(folder, feature):
        return Cache(folder)

    reason = why_no_encoder(EncoderSpec.parse(spec), "text")
    if reason is not None:
        raise DataError(f"{path}: {reason}")
    prompts = " and ".join(repr(template.format(c="NAME")) for template in DEFAULT_TEMPLATES)
    progress.note(f"encoding each name of {path} as {prompts} with {spec}; kept in {folder} for later commands")
    source = open_source(str(path), kind="prompts")
    recorded = recorded_settings(fingerprint, AUTO)
    with names_from(f"the record of the feature {feature}"):
        extract(
            source,
            folder,
            text_encoder=spec,
            feature=feature_names(feature),
            backend=recorded["backend"],
            precision=recorded["precision"],
            device=(recorded["device"],),
            progress=progress,
        )
    return Cache(folder)


def _has_feature(folder: Path, feature: str) -> bool:
    """Return whether there is a cache with all of a text feature."""
    try:
        open_input(Cache(folder), "text", feature).require_complete()
    except (PathError, UnknownNameError, UnfinishedError):
        return False
    return True


def _text_feature(path: AnyPath, pool: Vectors) -> tuple[str, str, Mapping[str, Any]]:
    """Return the spec, name and fingerprint of the text feature by which names are compared with a pool."""
    _check_takes_prompts(path, pool)
    if pool.run is None:
        return pool.feature.spec, pool.feature.name, pool.feature.fingerprint
    text = pool.run.input("text")
    return text.spec, text.feature, text.fingerprint


def _check_takes_prompts(path: AnyPath, pool: Vectors) -> None:
    """Check that prompts can be compared with a pool: the modality of its plain feature, or one of its run's, is text.

    Raises:
        DataError: it is not.
    """
    if pool.run is None and pool.modality != "text":
        items = noun(pool.modality)
        raise DataError(
            f"{path}: expected labeled {items}, to compare with the plain {pool.modality} feature "
            f"{pool.feature.name}, got prompts; project both with --run RUN, or give a cache of labeled {items}"
        )
    if pool.run is not None and "text" not in pool.run.modalities:
        modalities = pool.run.modalities
        raise DataError(
            f"{path}: expected labeled {noun(modalities[0])}, as {pool.run_path} is a run of "
            f"{' and '.join(map(noun, modalities))}, got prompts"
        )


def choose_feature(cache: AnyPath, concepts: AnyPath, modality: str, *, progress: Progress) -> str | None:
    """Return the feature to compare the items of a cache with concepts by, where none is named and no run projects.

    Of several features of the cache it is the only one of vectors that the cache of concepts has too, from the same
    encoder, and a line says so; None otherwise.
    """
    features = Cache(cache).features(modality)
    if len(features) < 2 or is_names(concepts):
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
    if is_prompts:
        _check_takes_prompts(cache.path, pool)
    if pool.run is not None:
        modalities = pool.run.modalities
        with_items = (name for name in modalities if cache.info.num_items.get(name))
        modality = "text" if is_prompts else next(with_items, modalities[-1])
        return Vectors(cache.path, modality, run_path=pool.run_path, width=pool.width, device=pool.device)
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
