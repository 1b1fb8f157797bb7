"""Intervals against plain loops over the same resamples, and against what is known of a mean."""

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import t

from embedcache import metrics
from embedcache.errors import DataError
from embedcache.metrics import (
    Estimate,
    bootstrap,
    bootstrap_class_mean,
    bootstrap_mean,
    bootstrap_means,
    bootstrap_median,
    bootstrap_runs,
    chance_estimate,
    effective_number,
    interval_of,
    jackknife,
    over_seeds,
    resample_runs,
)

VALUES = np.array([0.5, 3.0, -1.0, 7.0, 2.0, 2.5, 4.0, 9.0])
CLUSTERS = np.array([4, 4, 9, 7, 7, 7, 2, 9])


def draw(num_clusters: int, num_draws: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(num_clusters, size=(num_draws, num_clusters))


def resamples(clusters: np.ndarray, num_draws: int, seed: int) -> list[np.ndarray]:
    """Return the rows of each resample of whole clusters."""
    names = np.unique(clusters)
    rows = [np.flatnonzero(clusters == name) for name in names]
    return [np.concatenate([rows[number] for number in drawn]) for drawn in draw(len(names), num_draws, seed)]


def expect(statistic: Callable[[np.ndarray], float], samples: list[np.ndarray]) -> tuple[float, ...]:
    """Return the statistic of all rows, and its quantiles over resamples."""
    low, high = np.quantile([statistic(rows) for rows in samples], [0.025, 0.975])
    return (statistic(np.arange(len(VALUES))), float(low), float(high))


def found(estimate: Estimate) -> tuple[float, ...]:
    return (estimate.value, estimate.low, estimate.high)


LABELS = np.array([0, 0, 3, 3, 1, 1, 1, 0])


def lower_median(rows: np.ndarray) -> float:
    return float(np.sort(VALUES[rows])[(len(rows) - 1) // 2])


def class_mean(rows: np.ndarray) -> float:
    return float(np.mean([VALUES[rows][LABELS[rows] == label].mean() for label in np.unique(LABELS[rows])]))


def mean(rows: np.ndarray) -> float:
    return float(VALUES[rows].mean())


STATISTICS = [
    (bootstrap_mean, mean, 2000),
    (lambda *given, **options: bootstrap_means(given[0][:, None], *given[1:], **options)[0], mean, 2000),
    (bootstrap_median, lower_median, 1000),
    (lambda values, *given, **options: bootstrap_class_mean(values, LABELS, *given, **options), class_mean, 1000),
    (lambda values, *given, **options: bootstrap(lambda w: w @ values / w.sum(), 8, *given, **options), mean, 1000),
    (lambda values, *given, **options: bootstrap_runs(values[None], *given, **options), mean, 1000),
]


@pytest.mark.parametrize(("estimate", "statistic", "num_draws"), STATISTICS)
def test_intervals_are_quantiles_over_resamples(estimate, statistic, num_draws, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Check the defaults, then clusters, another number of resamples and another seed, in blocks with a remainder."""
    alone = np.arange(len(VALUES))
    assert found(estimate(VALUES)) == pytest.approx(expect(statistic, resamples(alone, num_draws, 0)))
    monkeypatch.setattr(metrics, "_DRAWS_PER_BLOCK", 9)  # two resamples of four clusters
    expected = expect(statistic, resamples(CLUSTERS, 61, 5))
    assert found(estimate(VALUES, CLUSTERS, num_draws=61, seed=5)) == pytest.approx(expected)


@pytest.mark.parametrize("of_runs", [[[3, 3, 8], [5], [8, 3]], [[3], [5], [8]]])
def test_runs_and_clusters_are_resampled_together(of_runs: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check two columns of three runs, of which each has its own items, with a loop; some resamples hold no value."""
    monkeypatch.setattr(metrics, "_DRAWS_PER_BLOCK", 9)
    rng = np.random.default_rng(0)
    clusters = [np.array(of_run) for of_run in of_runs]
    values = [rng.random((len(of_run), 2)) for of_run in clusters]
    expected = [np.concatenate(values).mean(axis=0)]
    for drawn_runs, drawn in zip(draw(3, 1000, 1), draw(3, 1000, 0), strict=True):
        rows = [values[run][clusters[run] == [3, 5, 8][number]] for run in drawn_runs for number in drawn]
        kept = np.concatenate(rows)
        expected.append(kept.mean(axis=0) if len(kept) else np.zeros(2))
    means = resample_runs(values, clusters)
    np.testing.assert_allclose(means, expected)
    assert means.shape == (1001, 2)
    assert (means == 0).all(axis=1).any()
    assert found(interval_of(means[:, 1])) == pytest.approx((means[0, 1], *np.quantile(means[1:, 1], [0.025, 0.975])))
    for nothing in (lambda: resample_runs([], []), lambda: bootstrap_means(np.empty((0, 2)))):
        with pytest.raises(DataError, match="at least one value"):
            nothing()


def test_ends_of_an_interval_with_infinite_values_are_values() -> None:
    values = np.array([7.0, *range(100), *[np.inf] * 4])  # the first is that of all items
    assert found(interval_of(values)) == (7, 2, np.inf)
    assert found(interval_of(values[:-4])) == pytest.approx((7, 2.475, 96.525))


@pytest.mark.parametrize(("num_values", "num_at_once"), [(2**17, 2), (3 * 2**17, 1)])
def test_resamples_of_many_values_are_drawn_in_blocks(num_values: int, num_at_once: int) -> None:
    values = np.arange(num_values, dtype=np.float32)
    tracemalloc.start()
    try:
        bootstrap_mean(values, num_draws=8)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * num_values * (3 + 5 * num_at_once)  # a few numbers per value of a resample


@pytest.mark.parametrize("size", [1, 2])
def test_interval_of_many_clusters_is_that_of_the_normal_distribution(size: int) -> None:
    num_clusters = 200_000  # more than are drawn one by one
    value_G = np.random.default_rng(0).standard_normal(num_clusters)
    estimate = bootstrap_mean(np.repeat(value_G, size), np.repeat(np.arange(num_clusters), size), num_draws=1000)
    width = 2 * 1.96 / np.sqrt(num_clusters)
    assert estimate.high - estimate.low == pytest.approx(width, rel=0.1)


def test_chance_has_the_interval_of_a_binomial_distribution() -> None:
    assert found(chance_estimate(0.5, 100)) == (0.5, 0.4, 0.6)  # 40 to 60 of 100 flips of a coin
    assert found(chance_estimate(0.01, 10)) == (0.01, 0.0, 0.1)


def test_interval_over_seeds_adds_items_in_quadrature() -> None:
    items, runs = {"acc1": Estimate(0.5, 0.46, 0.53)}, {"acc1": [0.5, 0.51, 0.49]}
    reach = t.ppf(0.975, 2) * 0.01 / np.sqrt(3)
    others = over_seeds(items, runs, [np.array([0, 1]), np.array([0, 1]), np.array([0, 2])])
    assert found(others["acc1"]) == pytest.approx((0.5, 0.5 - reach, 0.5 + reach))
    low, high = 0.5 - np.hypot(reach, 0.04), 0.5 + np.hypot(reach, 0.03)
    assert found(over_seeds(items, runs, [np.array([0, 1])] * 3)["acc1"]) == pytest.approx((0.5, low, high))
    fraction = over_seeds(items, {"acc1": [0.1, 0.9]}, [np.array([0]), np.array([1])])
    assert found(fraction["acc1"]) == (0.5, 0, 1)


def test_effective_number_of_queries() -> None:
    assert effective_number(np.array([5, 5, 5, 5])) == 1
    assert effective_number(np.arange(7)) == 7
    assert effective_number(np.array([1, 1, 1, 2, 2, 3])) == 3  # 36 / 14


@pytest.mark.parametrize("sizes", [[3, 5], [1, 4, 2, 9]])
def test_jackknife_of_a_mean_is_known(sizes: list[int]) -> None:
    """Leaving a block out of a mean tells the mean of that block."""
    values, block_N = np.random.default_rng(0).random(sum(sizes)), np.repeat(np.arange(len(sizes)), sizes)
    mean, count = values.mean(), np.array(sizes)
    without = [values[block_N != block].mean() for block in range(len(sizes))]
    means = np.array([values[block_N == block].mean() for block in range(len(sizes))])
    variance = np.mean((means - mean) ** 2 / (sum(sizes) / count - 1))
    reach = t.ppf(0.975, len(sizes) - 1) * np.sqrt(variance)
    expected = (mean, mean - reach, mean + reach)
    assert found(jackknife(np.array([mean, *without]), count)) == pytest.approx(expected)
