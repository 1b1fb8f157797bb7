"""Concepts: names, each with one unit vector, from a cache of prompts."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedcache.arrays import Array, Floats, Ints, normalize
from embedcache.artifact import check_same
from embedcache.curate.vectors import Vectors
from embedcache.errors import DataError

_CLASS = "class"


@dataclass(frozen=True, kw_only=True)
class Concepts:
    """What a pool is searched for.

    Args:
        names: of the C concepts.
        vectors_CP: (C, P) float32, rows of length 1.
    """

    names: list[str]
    vectors_CP: Floats


def open_concepts(path: Path | str, vectors: Vectors) -> Concepts:
    """Read the concepts of a cache that `extract prompts:…` made, in the space of some vectors.

    A concept's vector is the mean of its prompts', each scaled to length 1, scaled again. Classes of one name, as
    ImageNet has two, are one concept.

    Args:
        path: the cache of prompts.
        vectors: those that concepts are compared with. Projected ones take the same run; plain captions the same
            feature.

    Raises:
        DataError: the cache is no set of prompts, a concept has no prompt, or plain images
            are to be compared with texts.
        FingerprintError: another encoder made the prompts' feature.
    """
    prompts = _open(path, vectors)
    samples = prompts.cache.samples
    if _CLASS not in samples.column_names:
        raise DataError(
            f"{path} is no set of prompts: it has no column {_CLASS!r}; make one: embedcache extract prompts:FILE"
        )
    classes = samples[_CLASS].to_pylist()
    names = list(dict.fromkeys(classes))
    concept_of = {name: concept for concept, name in enumerate(names)}
    vectors_CP = _means(prompts, np.array([concept_of[name] for name in classes]), names)
    return Concepts(names=names, vectors_CP=vectors_CP)


def _open(path: Path | str, vectors: Vectors) -> Vectors:
    if vectors.run_path is not None:
        return Vectors(path, "text", run_path=vectors.run_path)
    if vectors.modality != "text":
        raise DataError(
            f"concepts are texts, and {vectors.side.name} holds images: give --projected RUN, which puts both into one "
            "space, or --modality text"
        )
    prompts = Vectors(path, "text", vectors.side.name)
    next_step = "extract the prompts with the encoder of the captions"
    check_same(f"{path} {prompts.side.name}", prompts.side.fingerprint, vectors.side.fingerprint, next_step=next_step)
    return prompts


def _means(prompts: Vectors, concept_S: Ints, names: list[str]) -> Floats:
    sample_of: Array = prompts.cache.items("text")["sample"].to_numpy()
    sums_CP = np.zeros((len(names), prompts.width), np.float64)
    for rows, vectors_BP in prompts.blocks():
        np.add.at(sums_CP, concept_S[sample_of[rows]], vectors_BP)
    counts_C = np.bincount(concept_S[sample_of[prompts.rows]], minlength=len(names))
    empty = np.flatnonzero(counts_C == 0)
    if len(empty):
        raise DataError(
            f"{len(empty)} of {len(names)} concepts of {prompts.cache.path} have no prompt that was encoded, first "
            f"{names[empty[0]]!r}; give each a prompt"
        )
    return normalize(sums_CP)
