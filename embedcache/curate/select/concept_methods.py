"""Methods on concepts: the best samples of each concept, rare concepts first, and MetaCLIP's balancing."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from embedcache.arrays import Array, Bools, Floats, Ints, distinct
from embedcache.curate.select.baselines import Cosine, Count, check_one
from embedcache.curate.select.pool import Pool, compute_cosines, whole_samples
from embedcache.dataset.selections import Selection
from embedcache.errors import DataError
from embedcache.neighbors.knn import KBest
from embedcache.search.concepts import Concepts

_CANDIDATES_PER_SAMPLE = 25
_WORD = re.compile(r"\w+")


def rare_first(
    pool: Pool, *, concepts: Concepts, budget: int | None = None, per_concept: Count | None = None
) -> Selection:
    """Curate as "Harnessing Frozen Unimodal Encoders for Flexible Multimodal Alignment" (CVPR 2025).

    About n samples per concept, each sample once. As in the paper, a concept's candidates are the 25 n samples that
    match it best, and concepts choose one after another, the rarest first. Unlike in its code, a concept's rarity is
    its score at rank n and not that of the last candidate, whose rank depends on memory; and cosines are float32, not
    in steps of .0027. Memory: 40 bytes for each of C x 25 n candidates.
    """
    check_one(budget=budget, per_concept=per_concept)
    num_concepts = len(concepts.names)
    # One more for the rarest, if there is a remainder.
    quotas_C = np.full(num_concepts, per_concept) if budget is None else even_quotas(budget, num_concepts)
    most = int(quotas_C.max())
    k = min(len(pool.samples), _CANDIDATES_PER_SAMPLE * most)
    best = best_samples(pool.blocks("comparing with concepts"), concepts.vectors, k)

    order_C = rarest_first(best.scores, most)
    concept_M, rank_M = assign(best.numbers, order_C, quotas_C[np.argsort(order_C)])
    rows_M = best.numbers[concept_M, rank_M].astype(np.int64)
    by_row = np.argsort(rows_M)
    columns = {
        "concept": pa.array(concepts.names, pa.string()).take(pa.array(concept_M[by_row])),
        "cosine": best.scores[concept_M, rank_M][by_row],
        "rank": rank_M[by_row] + 1,
    }
    return Selection(rows=rows_M[by_row], columns=columns)


def even_quotas(budget: int, num_concepts: int) -> Ints:
    """Divide a budget equally, one more for the first concepts if there is a remainder: (C,) int64."""
    return budget // num_concepts + (np.arange(num_concepts) < budget % num_concepts).astype(np.int64)


def best_samples(blocks: Iterable[tuple[Ints, Floats]], concepts_CP: Floats, k: int) -> KBest:
    """Find the `k` best samples of each concept, by cosine. A sample counts once, by its best item.

    Exact, for any division of the items into blocks: the sample of each item (B,), ascending over all blocks, and its
    vector (B, P). Memory: the products of `k` items or a block in float64, and 40 bytes for each of C x K candidates;
    it does not grow with the items.
    """
    best = KBest(len(concepts_CP), k)
    for samples_B, vectors_BP in whole_samples(blocks, k):
        samples_S, starts_S = np.unique(samples_B, return_index=True)
        scores_CS = np.maximum.reduceat(compute_cosines(concepts_CP, vectors_BP), starts_S, axis=1)
        best.add_block(np.arange(len(concepts_CP)), samples_S, scores_CS)
    return best


def rarest_first(scores_CK: Floats, quota: int) -> Ints:
    """Sort concepts by their score at rank `quota`, or at their last rank, lowest first: (C,) int64."""
    return np.argsort(scores_CK[:, min(quota, scores_CK.shape[1]) - 1], kind="stable")


def assign(samples_CK: Ints, order_C: Ints, quota_C: Ints) -> tuple[Ints, Ints]:
    """Assign to each concept, in order, at most `quota_C` of its best candidates that no other has.

    Returns two (M,) arrays: the concept that chose, and the rank of its candidate, from 0.
    """
    is_taken: Bools = np.zeros(int(samples_CK.max()) + 1, bool)
    chosen = []
    for concept in order_C.tolist():
        ranks = np.flatnonzero(~is_taken[samples_CK[concept]])[: quota_C[concept]]
        is_taken[samples_CK[concept, ranks]] = True
        chosen.append((np.full(len(ranks), concept), ranks))
    return np.concatenate([concept for concept, _ in chosen]), np.concatenate([ranks for _, ranks in chosen])


def metaclip(
    pool: Pool,
    *,
    concepts: Concepts,
    budget: int | None = None,
    head: Annotated[float, Field(ge=1)] | None = None,
    threshold: Cosine | None = None,
    seed: int = 0,
) -> Selection:
    """Balance as "Demystifying CLIP Data" (ICLR 2024), Algorithm 1.

    Samples match concepts by the words of their captions or, with `threshold`, by cosine. Each match of a concept with
    n matches is kept with probability min(1, t / n), and a sample if any of its matches is. t is `head`, or the value
    that keeps `budget` samples. A sample that matches no concept is never kept. Memory: some 50 bytes per match.
    """
    check_one(budget=budget, head=head)
    names = concepts.names
    if threshold is None:
        matches = match_words(pool.texts(), names)
        step = "match by cosine with the parameter threshold"
    else:
        matches = match_near(pool.blocks("comparing with concepts"), concepts.vectors, threshold)
        step = "lower the threshold"
    if not len(matches.samples_M):
        raise DataError(
            f"expected samples that match one of {len(names):,} concepts, such as {names[0]!r}, got none of "
            f"{len(pool.samples):,}; {step}, or give other concepts"
        )

    first_matches_S, heads_S = lowest_heads(matches, seed=seed)
    if budget is None:
        kept = first_matches_S[heads_S < head]
    elif budget > len(first_matches_S):
        raise DataError(
            f"budget: expected at most the {len(first_matches_S):,} of {len(pool.samples):,} samples that match one of "
            f"{len(names):,} concepts, got {budget:,}; lower it, or {step}"
        )
    else:
        kept = first_matches_S[np.argsort(heads_S, kind="stable")[:budget]]
    kept = np.sort(kept)  # matches are sorted by sample
    concepts_M = matches.concepts_M[kept]
    columns = {
        "concept": pa.array(names, pa.string()).take(pa.array(concepts_M)),
        "num_matches": np.bincount(matches.concepts_M)[concepts_M],
    }
    return Selection(rows=matches.samples_M[kept], columns=columns)


class Matches(NamedTuple):
    """M unique matches, sorted by sample and then concept: two (M,) int64 arrays."""

    samples_M: Ints
    concepts_M: Ints


def match_words(captions: Iterable[tuple[Ints, Sequence[str]]], names: Sequence[str]) -> Matches:
    """Match captions that contain a concept's name: whole words, ignoring case and punctuation.

    As the substring match of "Demystifying CLIP Data" (ICLR 2024), it matches neither plurals nor languages without
    spaces. Names of the same words match the same captions, one without words none. Memory: the captions of a block,
    the names, and 16 bytes per match.

    Args:
        captions: the sample of each caption (B,), and the captions, per block.
        names: names of the concepts.
    """
    # From the first words of a name to the concepts that end there, of which most have none.
    concepts_of: dict[tuple[str, ...], list[int]] = {}
    for concept, name in enumerate(names):
        words = _words(name)
        for length in range(1, len(words)):
            concepts_of.setdefault(words[:length], [])
        if words:
            concepts_of.setdefault(words, []).append(concept)

    codes = [np.empty(0, np.int64)]
    for samples_B, texts in captions:
        found = [_find_names(_words(text), concepts_of) for text in texts]
        concepts_M = np.array([concept for concepts in found for concept in concepts], np.int64)
        codes.append(distinct(np.repeat(samples_B, list(map(len, found))) * len(names) + concepts_M))
    return Matches(*np.divmod(distinct(np.concatenate(codes)), max(1, len(names))))


def _find_names(words: tuple[str, ...], concepts_of: Mapping[tuple[str, ...], Sequence[int]]) -> list[int]:
    """Return the concepts whose words occur in the given ones, some perhaps twice."""
    found: list[int] = []
    for start in range(len(words)):
        for stop in range(start + 1, len(words) + 1):
            concepts = concepts_of.get(words[start:stop])
            if concepts is None:
                break
            found += concepts
    return found


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))


def match_near(blocks: Iterable[tuple[Ints, Floats]], concepts_CP: Floats, threshold: float) -> Matches:
    """Match items whose cosine with a concept is at least a threshold; samples (B,) and vectors (B, P) per block.

    Memory: the products of a block, and 16 bytes per match.
    """
    matches = [np.empty((0, 2), np.int64)]
    for samples_B, vectors_BP in blocks:
        item, concept = np.nonzero(compute_cosines(vectors_BP, concepts_CP) >= threshold)
        matches.append(np.stack([samples_B[item], concept], axis=1))
    return Matches(*np.unique(np.concatenate(matches), axis=0).T)


def lowest_heads(matches: Matches, *, seed: int) -> tuple[Ints, Array]:
    """Find the t from which on each sample is kept, and the match that keeps it then.

    A match of a concept with n matches is kept if its draw u, uniform in [0, 1), is below t / n, that is if t > u n. So
    one draw gives nested selections for all t, and any budget is met exactly. Returns the position in the matches of
    the first kept match of each matching sample, (S,), and its t, (S,) float64; by sample.
    """
    counts_C = np.bincount(matches.concepts_M)
    heads_M = np.random.default_rng(seed).random(len(matches.samples_M)) * counts_C[matches.concepts_M]
    order_M = np.lexsort((heads_M, matches.samples_M))
    _, starts_S = np.unique(matches.samples_M[order_M], return_index=True)
    first_matches_S: Ints = order_M[starts_S]
    return first_matches_S, heads_M[first_matches_S]
