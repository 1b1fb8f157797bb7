"""Methods on concepts: the best samples of each concept, rare concepts first, and MetaCLIP's balancing."""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise, repeat
from typing import Annotated, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from embedcache.arrays import Array, Bools, Floats, Ints, concatenated_ranges, distinct, from_sort_keys, to_sort_keys
from embedcache.curate.select.baselines import Cosine, Count, check_one
from embedcache.curate.select.pool import Pool, compute_cosines, whole_samples
from embedcache.dataset.selections import Selection
from embedcache.errors import DataError
from embedcache.progress import Progress
from embedcache.search.concepts import Concepts

_CANDIDATES_PER_SAMPLE = 25
_END = "\0"  # of a caption among joined ones
_WORD, _WORD_OR_END = re.compile(r"\w+"), re.compile(rf"\w+|{_END}")


def rare_first(
    pool: Pool, *, concepts: Concepts, budget: int | None = None, per_concept: Count | None = None
) -> Selection:
    """Curate as "Harnessing Frozen Unimodal Encoders for Flexible Multimodal Alignment" (CVPR 2025).

    About n samples per concept, each sample once. As in the paper, a concept's candidates are the 25 n samples that
    match it best, and concepts choose one after another, the rarest first. Unlike in its code, a concept's rarity is
    its score at rank n and not that of the last candidate, whose rank depends on memory; and cosines are float32, not
    in steps of .0027. Memory: 16 bytes for each of C x 25 n candidates.
    """
    check_one(budget=budget, per_concept=per_concept)
    num_concepts = len(concepts.names)
    # One more for the rarest, if there is a remainder.
    quotas_C = np.full(num_concepts, per_concept) if budget is None else even_quotas(budget, num_concepts)
    most = int(quotas_C.max())
    k = min(len(pool.samples), _CANDIDATES_PER_SAMPLE * most)
    best = best_samples(pool.blocks("comparing with concepts"), concepts.vectors, k)

    order_C = rarest_first(best.scores_CK, most)
    concept_M, rank_M = assign(best.samples_CK, order_C, quotas_C[np.argsort(order_C)])
    rows_M = best.samples_CK[concept_M, rank_M]
    by_row = np.argsort(rows_M)
    columns = {
        "concept": pa.array(concepts.names, pa.string()).take(pa.array(concept_M[by_row])),
        "cosine": best.scores_CK[concept_M, rank_M][by_row],
        "rank": rank_M[by_row] + 1,
    }
    return Selection(rows=rows_M[by_row], columns=columns)


def even_quotas(budget: int, num_concepts: int) -> Ints:
    """Divide a budget equally, one more for the first concepts if there is a remainder: (C,) int64."""
    return budget // num_concepts + (np.arange(num_concepts) < budget % num_concepts).astype(np.int64)


class TopSamples(NamedTuple):
    """The K samples that match each of C concepts best, best first; equal scores by sample."""

    scores_CK: Floats  # cosine of the sample's best item
    samples_CK: Ints


def best_samples(blocks: Iterable[tuple[Ints, Floats]], concepts_CP: Floats, k: int) -> TopSamples:
    """Find the `k` best samples of each concept, or all if there are fewer. A sample counts once, by its best item.

    Exact, for any division of the items into blocks: the sample of each item (B,), ascending over all blocks, and its
    vector (B, P). Memory: the products of a block in float64, and 8 bytes for each of C x 2 K candidates; it does not
    grow with the items.
    """
    best = _BestKeys(len(concepts_CP), k)
    for samples_B, vectors_BP in whole_samples(blocks):
        samples_S, starts_S = np.unique(samples_B, return_index=True)
        best.add(np.maximum.reduceat(compute_cosines(concepts_CP, vectors_BP), starts_S, axis=1), samples_S)
    return TopSamples(*from_sort_keys(-np.sort(-best.merged(), axis=1)))


class _BestKeys:
    """The k largest sort keys of each concept, of scores that come in the order of their samples.

    Of a full row only the scores above its lowest are looked at, of which there are fewer and fewer.
    """

    def __init__(self, num_concepts: int, k: int) -> None:
        self._k, self._keys_CK = k, np.empty((num_concepts, 0), np.int64)
        self._lowest_C1 = np.full((num_concepts, 1), -np.inf, np.float32)
        self._concepts: list[Ints] = []  # of the keys that are not merged yet
        self._keys: list[Ints] = []

    def add(self, scores_CS: Floats, samples_S: Ints) -> None:
        """Add the scores of further samples."""
        if self._keys_CK.shape[1] < self._k:
            keys_CN = np.concatenate([self._keys_CK, to_sort_keys(scores_CS, samples_S)], axis=1)
            self._keys_CK = _largest(keys_CN, self._k)
            self._find_lowest()
            return
        concept_M, sample_M = np.nonzero(scores_CS > self._lowest_C1)  # of equal scores the earlier sample is better
        if not len(concept_M):
            return
        self._concepts.append(concept_M)
        self._keys.append(to_sort_keys(scores_CS[concept_M, sample_M], samples_S[sample_M]))
        if 4 * sum(map(len, self._keys)) >= self._keys_CK.size:
            self.merged()

    def merged(self) -> Ints:
        """Return the k largest keys of each concept, or all if there are fewer, in any order: (C, K) int64."""
        if self._keys:
            concept_M, key_M = np.concatenate(self._concepts), np.concatenate(self._keys)
            order_M = np.argsort(concept_M, kind="stable")
            edges = np.searchsorted(concept_M[order_M], np.arange(len(self._keys_CK) + 1))
            for concept, (start, stop) in enumerate(pairwise(edges.tolist())):
                if stop > start:
                    keys = np.concatenate([self._keys_CK[concept], key_M[order_M[start:stop]]])
                    self._keys_CK[concept] = np.partition(keys, -self._k)[-self._k :]
            self._concepts, self._keys = [], []
            self._find_lowest()
        return self._keys_CK

    def _find_lowest(self) -> None:
        if self._keys_CK.shape[1] == self._k:
            self._lowest_C1, _ = from_sort_keys(self._keys_CK.min(axis=1, keepdims=True))


def _largest(keys_CN: Ints, k: int) -> Ints:
    """Return the k largest of each row, in any order."""
    if keys_CN.shape[1] <= k:
        return keys_CN
    return np.ascontiguousarray(np.partition(keys_CN, -k, axis=1)[:, -k:])


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
        note_names(names, pool.progress)
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


def note_names(names: Sequence[str], progress: Progress) -> None:
    """Note names that match no caption, or the same captions as another."""
    words = [_words(name) for name in names]
    without = [name for name, of_name in zip(names, words, strict=True) if not of_name]
    if without:
        progress.note(
            f"{len(without):,} of {len(names):,} concepts have no words and match none, such as {without[0]!r}"
        )
    names_of: dict[tuple[str, ...], list[str]] = {}
    for name, of_name in zip(names, words, strict=True):
        names_of.setdefault(of_name, []).append(name)
    same = [found for of_name, found in names_of.items() if of_name and len(found) > 1]
    if same:
        count = f"{sum(map(len, same)):,} of {len(names):,}"
        progress.note(
            f"{count} concepts have the words of another and match the same captions, such as {same[0][0]!r} and "
            f"{same[0][1]!r}"
        )


class Matches(NamedTuple):
    """M unique matches, sorted by sample and then concept: two (M,) int64 arrays."""

    samples_M: Ints
    concepts_M: Ints


def match_words(captions: Iterable[tuple[Ints, Sequence[str]]], names: Sequence[str]) -> Matches:
    """Match captions that contain a concept's name: whole words, ignoring case and punctuation.

    As the substring match of "Demystifying CLIP Data" (ICLR 2024), it matches neither plurals nor languages without
    spaces. Names of the same words match the same captions, one without words none. Memory: the words of a block of
    captions, the names, and some 50 bytes per match.

    Args:
        captions: the sample of each caption (B,), and the captions, per block.
        names: names of the concepts.
    """
    trie, codes = _NameTrie(names), [np.empty(0, np.int64)]
    for samples_B, texts in captions:
        caption_M, concept_M = trie.find(texts)
        codes.append(distinct(samples_B[caption_M] * len(names) + concept_M))
    return Matches(*np.divmod(distinct(np.concatenate(codes)), max(1, len(names))))


class _NameTrie:
    """A trie of names, one word per edge; node 0 is the root. All texts of a block are looked up at once.

    An edge is the key `node * number of words + number of the word`; keys are sorted, and `_children` has the node that
    each leads to. The names that end in node i are `_concepts[_starts[i] : _starts[i + 1]]`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._words = {_END: -1}
        child_of: dict[tuple[int, int], int] = {}
        nodes = []  # where each name ends
        for name in names:
            node = 0
            for word in _words(name):
                number = self._words.setdefault(word, len(self._words))
                node = child_of.setdefault((node, number), len(child_of) + 1)
            nodes.append(node)
        keys = np.array([node * len(self._words) + number for node, number in child_of], np.int64)
        order = np.argsort(keys)
        self._keys = np.append(keys[order], np.iinfo(np.int64).max)
        self._children = np.append(1 + order, 0)
        self._concepts = np.argsort(nodes, kind="stable")
        self._starts = np.searchsorted(np.array(nodes)[self._concepts], np.arange(len(child_of) + 2))

    def find(self, texts: Sequence[str]) -> tuple[Ints, Ints]:
        """Find all names in texts: the text and the concept of each, (M,) each."""
        joined = _END.join(text.replace(_END, " ") for text in texts)
        words = _WORD_OR_END.findall(joined.lower())
        number_T = np.fromiter(map(self._words.get, words, repeat(0)), np.int64, len(words))
        text_T, number_T = np.cumsum(number_T < 0), np.append(np.maximum(number_T, 0), 0)
        found = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        first_X, node_X, length = np.flatnonzero(number_T), np.zeros(np.count_nonzero(number_T), np.int64), 0
        while len(first_X):
            key_X = node_X * len(self._words) + number_T[first_X + length]
            place_X = np.searchsorted(self._keys, key_X)
            is_edge_X = self._keys[place_X] == key_X
            first_X, node_X, length = first_X[is_edge_X], self._children[place_X[is_edge_X]], length + 1
            which, concept = concatenated_ranges(self._starts[node_X], self._starts[node_X + 1] - self._starts[node_X])
            found.append((text_T[first_X[which]], self._concepts[concept]))
        return np.concatenate([text for text, _ in found]), np.concatenate([concept for _, concept in found])


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))


def match_near(blocks: Iterable[tuple[Ints, Floats]], concepts_CP: Floats, threshold: float) -> Matches:
    """Match items whose cosine with a concept is at least a threshold; samples (B,) and vectors (B, P) per block.

    Memory: the products of a block, and 16 bytes per match.
    """
    samples, concepts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for samples_B, vectors_BP in blocks:
        item, concept = np.nonzero(compute_cosines(vectors_BP, concepts_CP) >= threshold)
        samples.append(samples_B[item])
        concepts.append(concept)
    pairs_M2 = np.unique(np.stack([np.concatenate(samples), np.concatenate(concepts)], axis=1), axis=0)
    return Matches(pairs_M2[:, 0], pairs_M2[:, 1])


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
