"""Concepts: names with a vector each, from the cached prompts of a list or from labeled examples."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from embedcache.arrays import Array, Floats, Ints, blocks, normalize
from embedcache.dataset.labels import has_label, read_labels
from embedcache.dataset.prompts import has_prompts, read_prompts
from embedcache.errors import DataError, SettingError
from embedcache.provenance import check_same
from embedcache.search.vectors import Vectors
from embedcache.store.cache import Cache

MOST_EXAMPLES = 128
"""Examples a concept, as "From Unimodal to Multimodal" (CVPR 2025) averages for its prototypes."""

_BLOCK = 4096
_MOST_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Concepts:
    """What is looked for in a pool.

    Args:
        names: of the concepts, each once.
        vectors: (C, P) float32 rows of length 1, in the space of the pool's vectors.
        counts: (C,) prompts or examples that each is the mean of.
        about: where they come from, as JSON values: `cache`, `spine`, `feature`, `fingerprint`, `run`, `run_weights`,
            and `of`, which is `prompts` or `examples`; of examples also `label`, `most_examples` and `seed`.
    """

    names: list[str]
    vectors: Floats
    counts: Ints
    about: dict[str, Any]


def open_concepts(
    cache: Cache,
    pool: Vectors,
    *,
    label: str = "label",
    most_examples: int = MOST_EXAMPLES,
    seed: int = 0,
    joins_names: bool = False,
) -> Concepts:
    """Read concepts into the space of a pool's vectors.

    A cache that `extract prompts:…` made holds a concept a sample, whose prompts are averaged. In any other cache each
    label is a concept, the mean of its examples: prototypes. Either way vectors are scaled to length 1, averaged, and
    scaled again. A pool projected by a run takes prompts through the run's text tower, examples through the image
    tower where there are images; a plain pool takes the very same feature. Memory: the concepts, and a block of items.

    Args:
        cache: of prompts, or of labeled examples.
        pool: what they will be compared with.
        label: the column of labels, for examples.
        most_examples: of a label, drawn at random where there are more.
        seed: of the drawing.
        joins_names: take concepts of one name, as ImageNet has two, as one; they are refused otherwise.

    Raises:
        FingerprintError: another encoder made the concepts' feature than the pool's, or than the run was trained on.
        UnknownNameError: the cache has no such feature, or neither prompts nor a column of that name.
        UnfinishedError: the feature has missing chunks.
        SettingError: `most_examples` is below 1.
        DataError: prompts for plain image features, a concept that stands twice, or one without any prompt or example.
    """
    if most_examples < 1:
        raise SettingError(f"most_examples is {most_examples}; a concept needs at least 1 example")
    side = _open(cache, pool)
    if has_prompts(cache):
        prompts = read_prompts(cache, side.side)
        names, rows, numbers = prompts.names, prompts.rows, prompts.classes
    else:
        names, rows, numbers = _examples(side, label, most_examples, np.random.default_rng(seed))
    if joins_names:
        names, numbers = _joined(names, numbers)
    _refuse_twice(names, cache)
    vectors_CP = _means(side, rows, numbers, len(names))
    _refuse_zero(vectors_CP, names, cache)
    about: dict[str, Any] = {
        "cache": str(cache.path),
        "spine": cache.info.index_digest,
        "feature": side.side.name,
        "fingerprint": dict(side.side.fingerprint),
        "run": None if side.run_path is None else str(side.run_path),
        "run_weights": None if side.config is None else side.config.weights_digest,
        "of": "prompts" if has_prompts(cache) else "examples",
    }
    if not has_prompts(cache):
        about |= {"label": label, "most_examples": most_examples, "seed": seed}
    return Concepts(names=names, vectors=vectors_CP, counts=np.bincount(numbers, minlength=len(names)), about=about)


def _open(cache: Cache, pool: Vectors) -> Vectors:
    """Open the concepts' vectors that lie in the pool's space."""
    is_prompts = has_prompts(cache)
    if pool.run_path is not None:
        modality = "image" if cache.info.num_items.get("image") and not is_prompts else "text"
        return Vectors(cache.path, modality, run_path=pool.run_path)
    if is_prompts and pool.modality == "image":
        raise DataError(
            f"the pool's plain image feature {pool.side.name} cannot be compared with prompts; project both with "
            "--run RUN, or give a cache of labeled example images"
        )
    found = Vectors(cache.path, pool.modality, pool.side.name)
    check_same(
        f"feature {found.side.name} of {cache.path}",
        found.side.fingerprint,
        pool.side.fingerprint,
        next_step=f"extract the concepts with the pool's encoder: --{pool.modality}-encoder {pool.side.spec}",
    )
    return found


def _examples(side: Vectors, label: str, most: int, rng: np.random.Generator) -> tuple[list[str], Ints, Ints]:
    """Draw the examples: names of the labels, rows of items in order, and the label's number of each."""
    cache = side.cache
    samples_N = cache.items(side.modality)["sample"].to_numpy()[side.rows]
    is_labeled_N = has_label(cache, samples_N, column=label)
    rows_N, samples_N = side.rows[is_labeled_N], samples_N[is_labeled_N]
    if not len(rows_N):
        raise DataError(f"no {side.modality} of {cache.path} with {side.side.name} has a label in column {label!r}")
    labels = read_labels(cache, samples_N, column=label)
    _refuse_without(cache, label, len(labels.names))
    shuffled = rng.permutation(len(rows_N))
    order = shuffled[np.argsort(labels.numbers[shuffled], kind="stable")]
    counts_C = np.bincount(labels.numbers)
    places = np.arange(len(order)) - np.repeat(np.cumsum(counts_C) - counts_C, counts_C)
    kept = np.sort(order[places < most])
    return labels.names, rows_N[kept], labels.numbers[kept]


def _refuse_without(cache: Cache, label: str, num_found: int) -> None:
    """Refuse labels none of whose examples were encoded."""
    values = cache.samples[label]
    num_there = len([value for value in pc.unique(values).to_pylist() if value not in (None, "")])
    if num_found < num_there:
        raise DataError(
            f"{num_there - num_found:,} of {num_there:,} labels in column {label!r} of {cache.path} have no example "
            "that was encoded; mend them with extract --retry-failed, or leave these labels out"
        )


def _joined(names: list[str], numbers: Ints) -> tuple[list[str], Ints]:
    """Give concepts of one name the number of the first."""
    once = list(dict.fromkeys(names))
    return once, np.array([once.index(name) for name in names], np.int64)[numbers]


def _refuse_twice(names: list[str], cache: Cache) -> None:
    counts = Counter(names)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        shown = ", ".join(f"{name!r} (numbers {_places(names, name)})" for name in twice[:_MOST_NAMED])
        raise DataError(
            f"{len(twice):,} of {len(counts):,} concepts of {cache.path} stand twice, counted from 0: {shown}; nobody "
            "could tell their counts apart; write each name once into a .txt, a name a line, and extract that"
        )


def _places(names: list[str], name: str) -> str:
    return " and ".join(str(number) for number, other in enumerate(names) if other == name)


def _refuse_zero(vectors_CP: Floats, names: list[str], cache: Cache) -> None:
    is_zero_C = ~vectors_CP.any(axis=1)
    if is_zero_C.any():
        raise DataError(
            f"{is_zero_C.sum():,} of {len(names):,} concepts of {cache.path} have vectors whose mean is zero, first "
            f"{names[int(is_zero_C.argmax())]!r}; give them other prompts or examples"
        )


def _means(side: Vectors, rows_M: Ints, numbers_M: Ints, num: int) -> Floats:
    """Average by concept, as `mean_directions` does, without all vectors in memory."""
    sums_CP: Array = np.zeros((num, side.width), np.float64)
    for block in blocks(len(rows_M), _BLOCK):
        np.add.at(sums_CP, numbers_M[block], side.read(rows_M[block]))
    return normalize(sums_CP)
