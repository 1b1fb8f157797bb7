"""Each method keeps to the contract, and does what its name says."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.arrays import Floats
from embedcache.curate.select.methods import (
    Matches,
    assign,
    best_samples,
    compute_cosines,
    even_quotas,
    find_above,
    find_highest,
    lowest_heads,
    match_near,
    match_words,
    rare_first,
    rarest_first,
    whole_samples,
)
from embedcache.curate.select.select import SELECTORS, Pool
from embedcache.errors import DataError
from embedcache.registry import plugin_name
from embedcache.testing.selectors import SelectorContract

CASES = {
    "random": 40,
    "top-score": 40,
    "clip-score": 40,
    "clip-score:threshold=0.3": None,
    "score": 40,
    "rare-first": 40,
    "rare-first:per_concept=6": None,
    "metaclip": 40,
    "metaclip:threshold=0.2": 40,
    "metaclip:head=5": None,
    "image-based:clusters=12": 40,
    "image-based:clusters=30": None,
    "hierarchical:clusters=20+4": 40,
    "k-center": 40,
}
"""Method -> budget."""


class TestSelectors(SelectorContract):
    """The contract on the session's caches."""

    @pytest.fixture(autouse=True, params=CASES)
    def case(self, request: pytest.FixtureRequest) -> None:
        self.name = request.param
        self.budget = CASES[request.param]

    @pytest.fixture
    def paths(self, around: dict[str, Path]) -> dict[str, Path]:
        return around

    @pytest.fixture
    def select(self, chosen: Any) -> Any:
        return lambda which="cache", **options: chosen(self.name, which, **{"budget": self.budget, **options})


def test_every_selector_has_a_contract_test() -> None:
    assert {plugin_name(name) for name in CASES} == set(SELECTORS.paths)


def concept_cosines(pool: Pool) -> Floats:
    """Cosines of the captions, of which each sample has one, with the concepts: (S, C)."""
    return compute_cosines(pool.vectors.read(np.arange(300)), pool.concepts.vectors)


# rare first


@given(st.data())
def test_assign_respects_quotas(data: st.DataObject) -> None:
    num_concepts, num_samples = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 12))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    samples_CK = np.stack([rng.permutation(num_samples) for _ in range(num_concepts)])
    quota_C = rng.integers(0, 5, num_concepts)
    order_C = rng.permutation(num_concepts)
    concepts, ranks = assign(samples_CK, order_C, quota_C)
    rows = samples_CK[concepts, ranks]
    assert len(set(rows.tolist())) == len(rows)
    assert (np.bincount(concepts, minlength=num_concepts) <= quota_C).all()
    assert len(rows) == min(num_samples, quota_C.sum())  # every sample is a candidate of every concept


@pytest.mark.parametrize(("quota", "order"), [(1, [0, 1, 2]), (2, [2, 0, 1]), (3, [1, 2, 0]), (9, [1, 2, 0])])
def test_rarity_is_the_score_at_the_rank_of_the_quota(quota: int, order: list[int]) -> None:
    scores = np.array([[0.7, 0.6, 0.5], [0.8, 0.65, 0.1], [0.9, 0.3, 0.2]], np.float32)
    assert rarest_first(scores, quota).tolist() == order


def test_even_quotas() -> None:
    assert even_quotas(7, 3).tolist() == [3, 2, 2]
    assert even_quotas(2, 3).tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("method", "budget", "quotas"),
    [
        ("rare-first", 10, [3, 3, 2, 2]),
        ("rare-first", 4, [1] * 4),
        ("rare-first:per_concept=6", None, [6] * 4),
    ],
)
def test_rare_first_equals_a_plain_search(
    pools: Any, chosen: Any, method: str, budget: int | None, quotas: list[int]
) -> None:
    pool = pools(method)
    cosines_SC, names = concept_cosines(pool), pool.concepts.names
    ranked = [np.argsort(-cosines_SC[:, concept], kind="stable").tolist() for concept in range(4)]
    rarest = sorted(range(4), key=lambda concept: cosines_SC[ranked[concept][quotas[0] - 1], concept])
    reasons: dict[int, tuple[str, float, int]] = {}
    for concept, quota in zip(rarest, quotas, strict=True):
        free = [(rank, row) for rank, row in enumerate(ranked[concept], start=1) if row not in reasons]
        for rank, row in free[:quota]:
            reasons[row] = (names[concept], cosines_SC[row, concept], rank)
    found = chosen(method, budget=budget)
    table = pa.table(dict(found.columns))
    assert [tuple(values.values()) for values in table.to_pylist()] == [reasons[row] for row in sorted(reasons)]
    assert found.rows.tolist() == sorted(reasons)


def test_rare_first_considers_25_candidates_per_sample(pools: Any) -> None:
    """Check with 27 equal concepts, of which the last two find all of their candidates taken."""
    pool = pools("rare-first")
    equal = np.repeat(pool.concepts.vectors[:1], 27, axis=0)
    concepts = replace(pool.concepts, names=[f"red {number}" for number in range(27)], vectors=equal)
    assert len(rare_first(pool, concepts=concepts, per_concept=1).rows) == 25


# top score and CLIP score


@given(st.lists(st.sampled_from([-0.5, 0.0, -0.0, 0.25, 0.5]), min_size=1, max_size=12), st.integers(1, 14))
def test_highest_prefers_first_of_equals(scores: list[float], size: int) -> None:
    expected = sorted(sorted(range(len(scores)), key=lambda row: (-scores[row], row))[:size])
    assert find_highest(np.array(scores, np.float32), size).tolist() == expected


def test_top_score_equals_a_sort(pools: Any, chosen: Any) -> None:
    found = chosen("top-score", budget=25)
    pool = pools("top-score")
    cosines_SC, names = concept_cosines(pool), pool.concepts.names
    best = sorted(np.argsort(-cosines_SC.max(axis=1), kind="stable")[:25].tolist())
    assert found.rows.tolist() == best
    assert found.columns["concept"].to_pylist() == [names[cosines_SC[row].argmax()] for row in best]
    assert found.columns["cosine"].tolist() == cosines_SC[best].max(axis=1).tolist()


def test_above_names_range_of_scores() -> None:
    scores = np.array([0.1, 0.2, 0.5], np.float32)
    assert find_above(scores, 0.5).tolist() == [2]
    with pytest.raises(DataError, match="0.500"):
        find_above(scores, 0.9)


def test_clip_score_takes_up_to_all_pairs(pools: Any, chosen: Any) -> None:
    samples, scores = pools("clip-score").pair_scores()
    threshold = float(np.median(scores))
    found = chosen(f"clip-score:threshold={threshold!r}")
    assert found.rows.tolist() == samples[scores >= np.float32(threshold)].tolist()
    assert found.columns["cosine"].tolist() == scores[found.rows].tolist()
    assert chosen("clip-score", budget=300).rows.tolist() == list(range(300))
    assert scores.mean() > 0.2  # pairs match better than chance
    with pytest.raises(DataError, match="300"):
        chosen("clip-score", budget=301)


# MetaCLIP


WORDS = st.lists(st.sampled_from(["a", "B", "b", "É", "ΣΑΣ", "İ", "_1", "-", "\0", "\n", "'"]), max_size=6)


@pytest.mark.slow
@given(st.lists(WORDS, max_size=6), st.lists(WORDS, min_size=1, max_size=6), st.integers(1, 6), st.booleans())
def test_matches_are_those_of_all_sequences_of_words(
    texts: list[list[str]], names: list[list[str]], size: int, has_spaces: bool
) -> None:
    """Check names and captions that repeat words, overlap, and have letters whose lower case depends on others."""
    captions, concepts = ([(" " if has_spaces else "").join(words) for words in lists] for lists in (texts, names))
    samples = np.arange(len(captions)) // 2
    cut = [(samples[start : start + size], captions[start : start + size]) for start in range(0, len(captions), size)]
    found = match_words(cut, concepts)
    words, of_concepts = ([re.findall(r"\w+", text.lower()) for text in each] for each in (captions, concepts))
    expected = {
        (int(sample), concept)
        for sample, text in zip(samples, words, strict=True)
        for concept, name in enumerate(of_concepts)
        if name and any(text[first : first + len(name)] == name for first in range(len(text)))
    }
    assert list(zip(*(values.tolist() for values in found), strict=True)) == sorted(expected)


@given(st.integers(0, 99), st.integers(1, 6))
def test_match_near_ignores_blocks(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    samples, vectors = np.sort(rng.integers(0, 6, 9)), rng.standard_normal((9, 3)).astype(np.float32)
    concepts = rng.standard_normal((4, 3)).astype(np.float32)
    cut = [(samples[start : start + size], vectors[start : start + size]) for start in range(0, 9, size)]
    found = match_near(cut, concepts, 0.3)
    hits = vectors.astype(np.float64) @ concepts.T.astype(np.float64) >= 0.3
    expected = sorted({(int(samples[i]), c) for i, c in zip(*np.nonzero(hits), strict=True)})
    assert list(zip(*(values.tolist() for values in found), strict=True)) == expected
    halves = np.array([[0.5, 0], [0.25, 0]], np.float32)
    found = match_near([(np.array([7]), np.array([[1, 0]], np.float32))], halves, 0.5)
    assert (found.samples_M.tolist(), found.concepts_M.tolist()) == ([7], [0])  # the threshold is included


def test_metaclip_keeps_rare_concepts() -> None:
    matches = Matches(np.arange(1010), np.repeat([0, 1], [1000, 10]))
    kept = []
    for seed in range(50):
        position, heads = lowest_heads(matches, seed=seed)
        chosen = matches.concepts_M[position[heads < 50]]
        kept.append([(chosen == 0).sum(), (chosen == 1).sum()])
    frequent, rare = np.mean(kept, axis=0)
    assert rare == 10
    assert frequent == pytest.approx(50, abs=5 * np.sqrt(50 / 50))


def test_metaclip_keeps_a_sample_whose_head_is_below(pools: Any, chosen: Any) -> None:
    """Check with the head at which one sample is kept next: it is not kept yet."""
    pool = pools("metaclip")
    matches = match_words(pool.texts(), pool.concepts.names)
    first, heads = lowest_heads(matches, seed=0)
    head = float(np.sort(heads[heads >= 1])[5])
    kept, counts = first[heads < head], Counter(matches.concepts_M.tolist())
    found = chosen(f"metaclip:head={head!r}")
    assert found.rows.tolist() == matches.samples_M[kept].tolist()
    concepts = matches.concepts_M[kept].tolist()
    assert found.columns["concept"].to_pylist() == [pool.concepts.names[concept] for concept in concepts]
    assert found.columns["num_matches"].tolist() == [counts[concept] for concept in concepts]


def test_metaclip_takes_up_to_all_matching_samples(pools: Any, chosen: Any) -> None:
    pool = pools("metaclip")
    matching = np.unique(match_words(pool.texts(), pool.concepts.names).samples_M).tolist()
    assert chosen("metaclip", budget=len(matching)).rows.tolist() == matching
    with pytest.raises(DataError, match=f"{len(matching)} of 300"):
        chosen("metaclip", budget=len(matching) + 1)
    with pytest.raises(DataError, match="none of 300"):
        chosen("metaclip:threshold=1", budget=3)


@given(st.integers(0, 999), st.integers(1, 14), st.integers(1, 8))
def test_best_samples_equal_sorting(seed: int, size: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    samples = np.sort(rng.integers(0, 9, 13))
    vectors = rng.integers(-2, 3, (13, 4)).astype(np.float32)  # small whole numbers: many ties
    concepts = rng.integers(-2, 3, (3, 4)).astype(np.float32)
    blocks = [(samples[start : start + size], vectors[start : start + size]) for start in range(0, 13, size)]
    found = best_samples(blocks, concepts, k)
    for concept in range(3):
        best = {int(s): max(float(v @ concepts[concept]) for v in vectors[samples == s]) for s in samples}
        expected = sorted(best.items(), key=lambda pair: (-pair[1], pair[0]))[:k]
        expected += [(-1, -np.inf)] * (k - len(expected))
        assert list(zip(found.numbers[concept].tolist(), found.scores[concept].tolist(), strict=True)) == expected


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(1, 5), st.integers(1, 8))
def test_whole_samples(samples: list[int], size: int, least: int) -> None:
    ordered = np.array(sorted(samples), np.int64)
    cut = [
        (ordered[start : start + size], np.zeros((len(ordered[start : start + size]), 1), np.float32))
        for start in range(0, len(ordered), size)
    ]
    found = [block.tolist() for block, _ in whole_samples(cut, least)]
    assert all(len(block) >= least for block in found[:-1]) or max(Counter(samples).values()) > 1
    assert [sample for block in found for sample in block] == ordered.tolist()
    assert sum(len(set(block)) for block in found) == len(set(samples))
