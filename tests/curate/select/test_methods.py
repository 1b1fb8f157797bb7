"""Each method keeps to the contract, and does what its name says."""

from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.curate.select.baselines import ClipScoreSelector, find_above, find_highest
from embedcache.curate.select.cluster_methods import (
    default_levels,
    divide_budget,
    draw_balanced,
    farthest_first,
    find_near_target,
)
from embedcache.curate.select.concept_methods import (
    Matches,
    MetaclipSelector,
    assign,
    even_quotas,
    lowest_heads,
    match_near,
    match_words,
    rarest_first,
)
from embedcache.curate.select.select import SELECTORS
from embedcache.curate.select.settings import SelectSettings
from embedcache.errors import DataError
from embedcache.testing.selectors import SelectorContract


class TestRandom(SelectorContract):
    name = "random"


class TestTopScore(SelectorContract):
    name = "top-score"


class TestClipScore(SelectorContract):
    name = "clip-score"


class TestClipScoreAbove(SelectorContract):
    name = "clip-score"
    budget = None
    settings: ClassVar[dict[str, Any]] = {"threshold": 0.3}


class TestScore(SelectorContract):
    name = "score"


class TestRareFirst(SelectorContract):
    name = "rare-first"


class TestRareFirstPerConcept(SelectorContract):
    name = "rare-first"
    budget = None
    settings: ClassVar[dict[str, Any]] = {"per_concept": 6}


class TestMetaclip(SelectorContract):
    name = "metaclip"


class TestMetaclipNear(SelectorContract):
    name = "metaclip"
    settings: ClassVar[dict[str, Any]] = {"threshold": 0.2}


class TestMetaclipHead(SelectorContract):
    name = "metaclip"
    budget = None
    settings: ClassVar[dict[str, Any]] = {"head": 5.0}


class TestImageBased(SelectorContract):
    name = "image-based"
    settings: ClassVar[dict[str, Any]] = {"clusters": (12,)}


class TestImageBasedWhole(SelectorContract):
    name = "image-based"
    budget = None
    settings: ClassVar[dict[str, Any]] = {"clusters": (30,)}


class TestHierarchical(SelectorContract):
    name = "hierarchical"
    settings: ClassVar[dict[str, Any]] = {"clusters": (20, 4)}


class TestKCenter(SelectorContract):
    name = "k-center"


def test_every_selector_has_a_contract_test() -> None:
    tested = {kind.name for kind in SelectorContract.__subclasses__()}
    assert tested == set(SELECTORS.paths)


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


def test_rarest_concept_chooses_first() -> None:
    scores = np.array([[0.9, 0.8, 0.7], [0.6, 0.2, 0.1]], np.float32)
    samples = np.array([[0, 1, 2], [0, 2, 1]])
    order = rarest_first(scores, 1)
    assert order.tolist() == [1, 0]
    concepts, ranks = assign(samples, order, np.array([1, 1]))
    assert list(zip(concepts.tolist(), samples[concepts, ranks].tolist(), strict=True)) == [(1, 0), (0, 1)]


@pytest.mark.parametrize(("quota", "order"), [(1, [0, 1, 2]), (2, [2, 0, 1]), (3, [1, 2, 0]), (9, [1, 2, 0])])
def test_rarity_is_the_score_at_the_rank_of_the_quota(quota: int, order: list[int]) -> None:
    scores = np.array([[0.7, 0.6, 0.5], [0.8, 0.65, 0.1], [0.9, 0.3, 0.2]], np.float32)
    assert rarest_first(scores, quota).tolist() == order


def test_even_quotas() -> None:
    assert even_quotas(7, 3).tolist() == [3, 2, 2]
    assert even_quotas(2, 3).tolist() == [1, 1, 0]


def test_rare_first_reason(pools: Any) -> None:
    selector = SELECTORS.load("rare-first")()
    found = selector.select(pools("cache", selector), SelectSettings(per_concept=1))
    assert len(found.rows) == 4
    assert any("concept 'red bar', text cosine 0." in reason and "rank 1" in reason for reason in found.reasons)


# top score and CLIP score


@given(st.lists(st.sampled_from([-0.5, 0.0, -0.0, 0.25, 0.5]), min_size=1, max_size=12), st.integers(1, 14))
def test_highest_prefers_first_of_equals(scores: list[float], size: int) -> None:
    expected = sorted(sorted(range(len(scores)), key=lambda row: (-scores[row], row))[:size])
    assert find_highest(np.array(scores, np.float32), size).tolist() == expected


def test_above_names_range_of_scores() -> None:
    with pytest.raises(
        DataError,
        match=r"threshold: expected one that some of 3 cosines reach, got 0.9; they range from 0.100 to 0.500",
    ):
        find_above(np.array([0.1, 0.2, 0.5], np.float32), 0.9)


def test_clip_score_exceeds_shuffled_pairs(pools: Any) -> None:
    pool = pools("cache", ClipScoreSelector())
    samples, scores = pool.pair_scores()
    assert len(samples) == 300
    images = pool.vectors.read(pool.vectors.rows)
    texts = pool.vectors._pair.tower("text")
    assert images.shape[0] == 300
    assert texts is not None
    assert scores.mean() > 0.2


# MetaCLIP


def test_match_words() -> None:
    texts = [(4, "A Hot-dog, please!"), (5, "hotdog"), (6, "dogs"), (4, "dog")]
    found = match_words(texts, ["hot dog", "dog", "!!!"])
    assert list(zip(*(values.tolist() for values in found), strict=True)) == [(4, 0), (4, 1)]


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


def test_metaclip_heads_are_nested(pools: Any) -> None:
    few, more = (
        set(
            MetaclipSelector()
            .select(pools("cache", MetaclipSelector()), SelectSettings(head=head, seed=1))
            .rows.tolist()
        )
        for head in (3.0, 9.0)
    )
    assert few < more


def test_metaclip_too_large_budget_raises(pools: Any) -> None:
    with pytest.raises(DataError, match=r"expected at most the \d+ of 300 samples that match .*, got 299"):
        MetaclipSelector().select(pools("cache", MetaclipSelector()), SelectSettings(budget=299))
    with pytest.raises(DataError, match="match one of 4 concepts, such as .*, got none of 300"):
        MetaclipSelector().select(pools("cache", MetaclipSelector()), SelectSettings(budget=3, threshold=1.0))


# clusters


def test_near_target() -> None:
    samples, clusters = np.array([0, 1, 1, 2, 3]), np.array([5, 1, 2, 3, 2])
    kept, cluster = find_near_target(samples, clusters, np.array([2, 2, 3]))
    assert (kept.tolist(), cluster.tolist()) == ([1, 2, 3], [2, 3, 2])


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.data())
def test_divide_budget(sizes: list[int], data: st.DataObject) -> None:
    budget = data.draw(st.integers(0, sum(sizes)))
    found = divide_budget(np.array(sizes), budget)
    assert found.sum() == budget
    assert (found <= sizes).all()
    open_ones = [share for share, size in zip(found.tolist(), sizes, strict=True) if share < size]
    assert not open_ones or max(found.tolist()) - min(open_ones) <= 1


@given(st.integers(0, 99), st.integers(0, 40))
def test_balanced_divides_equally(seed: int, budget: int) -> None:
    rng = np.random.default_rng(seed)
    leaf = np.repeat(np.arange(4), [5, 20, 5, 10])
    labels = np.stack([leaf, np.array([0, 0, 1, 1])[leaf]], axis=1)
    shuffled = rng.permutation(40)
    kept = draw_balanced(labels[shuffled], budget, seed=seed)
    assert len(set(kept.tolist())) == len(kept) == budget
    tops = np.bincount(labels[shuffled][kept, 1], minlength=2)
    assert abs(tops[0] - tops[1]) <= max(1, budget - 30)  # the second has 15 samples


def test_default_levels() -> None:
    assert default_levels(40_000) == (1000, 100, 10)
    assert default_levels(30) == (1,)


@given(st.integers(0, 99))
def test_farthest_first(seed: int) -> None:
    vectors = np.random.default_rng(seed).standard_normal((9, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    chosen, cosines = farthest_first(vectors, 9)
    assert sorted(chosen.tolist()) == list(range(9))
    assert (np.diff(cosines[1:]) >= -1e-6).all()
    for number in range(1, 9):
        nearest = (vectors @ vectors[chosen[:number]].T).max(axis=1)
        nearest[chosen[:number]] = np.inf
        assert nearest[chosen[number]] == pytest.approx(nearest.min(), abs=1e-6)


def test_farthest_first_takes_copies_last() -> None:
    chosen, cosines = farthest_first(np.tile(np.array([[1, 0]], np.float32), (5, 1)), 5)
    assert sorted(chosen.tolist()) == list(range(5))
    assert cosines[1:].tolist() == [1, 1, 1, 1]
