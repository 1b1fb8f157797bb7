"""How many items show a concept, from synthetic similarities whose truth is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from embedcache.arrays import Array, Floats
from embedcache.curate.coverage import (
    CERTAIN,
    COUNTED,
    POSSIBLE,
    Estimate,
    Settled,
    estimate_counts,
    measure_scale,
    settle,
    strip_ranks,
    strip_weights,
)


def background(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.normal(0.1, 0.05, shape).astype(np.float32)


def estimate(sims_CS: Floats) -> Estimate:
    """Estimate each concept as if it were the best one of each item that is above its threshold."""
    scale = measure_scale(sims_CS)
    above, certain, possible = (
        (sims_CS > scale.cosines(score)[:, None]).sum(axis=1) for score in (COUNTED, CERTAIN, POSSIBLE)
    )
    return estimate_counts(above, above, certain, possible, sims_CS.shape[1])


@pytest.mark.parametrize("num_items", [2_000, 20_000, 65_536])
@pytest.mark.parametrize("prevalence", [0.001, 0.01, 0.1, 0.3])
def test_a_cluster_far_from_the_background_is_counted(num_items: int, prevalence: float) -> None:
    rng = np.random.default_rng(0)
    sims = background(rng, 3, num_items)
    count = round(prevalence * num_items)
    sims[:, :count] = rng.normal(0.1 + 20 * 0.05, 0.025, (3, count))

    found = estimate(sims)

    assert measure_scale(sims).separates.all()
    np.testing.assert_allclose(found.counts, count, rtol=0.03)
    assert ((found.lows <= count) & (count <= found.highs)).all()
    assert (found.lows > 0.6 * count).all()
    assert (found.highs < 1.4 * count).all()


@pytest.mark.parametrize("num_items", [300, 3_000, 30_000])
def test_nothing_is_told_of_mere_background(num_items: int) -> None:
    sims = background(np.random.default_rng(0), 200, num_items)
    assert measure_scale(sims).separates.mean() < 0.1


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=60))
def test_no_threshold_is_above_the_best_item(numbers: list[int]) -> None:
    sims = np.array([numbers], np.float32) / 40
    scale = measure_scale(sims)
    for score in (POSSIBLE, COUNTED, CERTAIN):
        assert scale.cosines(score)[0] <= sims.max()


def test_relative_scores_are_those_of_cosines() -> None:
    scale = measure_scale(background(np.random.default_rng(0), 2, 500))
    for score in (-0.5, 0.0, 1.5):
        assert scale.scores(1, scale.cosines(score)[1:]) == pytest.approx([score], abs=1e-5)


@pytest.mark.parametrize("best", [0.7, 0.9])
def test_items_that_are_mostly_equal_tell_nothing(best: float) -> None:
    assert not measure_scale(np.array([[0.7] * 8 + [best]], np.float32)).separates.any()


@given(st.integers(1, 10**6), st.data())
def test_estimates_are_within_their_interval_and_the_pool(num_items: int, data: st.DataObject) -> None:
    possible = data.draw(st.integers(0, num_items))
    above = data.draw(st.integers(0, num_items))
    assigned = data.draw(st.integers(0, above))
    certain = data.draw(st.integers(0, assigned))

    found = estimate_counts(*(np.array([part]) for part in (above, assigned, certain, possible)), num_items)

    assert 0 <= found.lows[0] <= found.counts[0] <= found.highs[0] <= num_items
    assert min(1, assigned) <= found.counts[0] <= max(1, above)


@given(st.integers(1, 5_000), st.integers(1, 10**9))
def test_strips_stand_for_all_items(num_sampled: int, num_items: int) -> None:
    ranks, weights = strip_ranks(num_sampled), strip_weights(num_sampled, num_items)
    assert (ranks[0], ranks[-1]) == (0, num_sampled - 1)
    assert (np.diff(ranks) > 0).all()
    assert len(ranks) == len(weights) <= 24
    assert (weights > 0).all()
    assert weights.sum() == pytest.approx(num_items)


class Pool:
    """A pool of 40,000 items, of which 4,096 were sampled: a background and a tail that falls off evenly."""

    def __init__(self, rng: np.random.Generator) -> None:
        scores = np.concatenate([rng.normal(0, 0.25, 3_900), rng.uniform(0.2, 1.1, 196)])
        self.scores = -np.sort(-scores)
        self.strip = self.scores[strip_ranks(len(scores))]
        self.weights = strip_weights(len(scores), 40_000)
        possible, counted, certain = ((scores > score).sum() * 40_000 / 4_096 for score in (POSSIBLE, COUNTED, CERTAIN))
        self.prior = float(counted), certain / 1.3, possible * 1.3

    def settle(self, positions: Array | range, answers: list[bool]) -> Settled:
        return settle(self.prior, self.strip, self.weights, self.strip[np.asarray(positions)], answers)


def test_answers_move_the_count_towards_them() -> None:
    pool = Pool(np.random.default_rng(0))
    some = pool.settle(range(10), [True] * 5 + [False] * 5)
    none, every = pool.settle(range(24), [False] * 24), pool.settle(range(24), [True] * 24)
    assert none.count < some.count < every.count
    assert none.count < pool.prior[0] < every.count
    assert none.cut > some.cut > every.cut
    for found in (none, some, every):
        assert found.low <= found.count <= found.high


def test_more_consistent_answers_narrow_the_interval() -> None:
    pool = Pool(np.random.default_rng(0))
    widths = [np.log(pool.prior[2] / pool.prior[1])]
    for step in (6, 2, 1):
        positions = np.arange(0, 24, step)
        found = pool.settle(positions, (positions < 12).tolist())
        widths.append(np.log(found.high / found.low))
    assert (np.diff(widths) < 0).all()


def test_no_count_is_below_the_confirmed_items() -> None:
    """Check a prior of nothing and a pool of ten, all of which were confirmed."""
    scores = np.linspace(1, -1, 10)
    found = settle((1, 0, 1), scores, np.ones(10), scores, [True] * 10)
    assert found.low == found.count == found.high == 10


def test_answers_settle_the_true_count() -> None:
    """Simulate truths that are logistic in the score, and answers for the whole strip."""
    is_inside = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        pool, cut, width = Pool(rng), rng.uniform(0.3, 0.9), rng.choice([0.05, 0.1, 0.2])
        shows = rng.random(4_096) < expit((pool.scores - cut) / width)
        found = pool.settle(range(24), shows[strip_ranks(4_096)].tolist())
        is_inside.append(found.low <= shows.sum() * 40_000 / 4_096 <= found.high)
    assert np.mean(is_inside) >= 0.8
