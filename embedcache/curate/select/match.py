"""Which samples belong to which concepts: captions that name them, or items that lie near them."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from embedcache.arrays import Floats, Ints
from embedcache.curate.select.best_samples import cosines

_WORD = re.compile(r"\w+")


class Matches(NamedTuple):
    """M matches, each once, by sample and then concept: two (M,) int64 arrays."""

    samples_M: Ints
    concepts_M: Ints


def match_words(texts: Iterable[tuple[int, str]], names: Sequence[str]) -> Matches:
    """Match captions that hold a concept's name: whole words, in either case, punctuation aside.

    As the substring match of "Demystifying CLIP Data" (ICLR 2024); like it, it knows no plurals, and nothing of
    languages that set no spaces. One look-up for each run of words of a caption.

    Args:
        texts: sample and caption.
        names: of the concepts.
    """
    concept_of = {_words(name): concept for concept, name in enumerate(names)}
    lengths = {len(words) for words in concept_of} - {0}
    found = {
        (sample, concept_of[run]) for sample, text in texts for run in _runs(_words(text), lengths) if run in concept_of
    }
    return _sorted(found)


def match_near(blocks: Iterable[tuple[Ints, Floats]], concepts_CP: Floats, threshold: float) -> Matches:
    """Match items whose cosine with a concept is at least a threshold.

    Memory: the products of a block, and 16 bytes a match.

    Args:
        blocks: the sample of each item (B,), and its vector (B, P).
        concepts_CP: (C, P) float32 unit rows.
        threshold: of the cosine.
    """
    samples, concepts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for samples_B, vectors_BP in blocks:
        item, concept = np.nonzero(cosines(vectors_BP, concepts_CP) >= threshold)
        samples.append(samples_B[item])
        concepts.append(concept)
    pairs_M2 = np.unique(np.stack([np.concatenate(samples), np.concatenate(concepts)], axis=1), axis=0)
    return Matches(pairs_M2[:, 0], pairs_M2[:, 1])


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))


def _runs(words: tuple[str, ...], lengths: set[int]) -> Iterable[tuple[str, ...]]:
    for length in lengths:
        for start in range(len(words) - length + 1):
            yield words[start : start + length]


def _sorted(pairs: set[tuple[int, int]]) -> Matches:
    pairs_M2 = np.array(sorted(pairs), np.int64).reshape(-1, 2)
    return Matches(pairs_M2[:, 0], pairs_M2[:, 1])
