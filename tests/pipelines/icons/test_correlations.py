from functools import partial

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr

from embedcache.evaluate.encoder_pairs import METRICS, PairMetrics, PairsReport
from embedcache.metrics.intervals import Estimate
from pipelines.icons.correlations import UNDEFINED, Outcomes, correlation_table, rank_correlation

NAMES = [(f"a/{image}", f"b/{text}") for image in "xyz" for text in "uv"]


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.icons.correlations.rank_correlation", partial(rank_correlation, num_draws=20))


def exactly(value: float) -> Estimate:
    return Estimate(value, value, value)


def measured(shift: float) -> PairsReport:
    """Report in which the probe rises from pair to pair and linear CKA falls."""
    pairs = [
        PairMetrics(
            features={"image": image, "text": text},
            recalls={"i2t": exactly(0.1 * position + shift), "t2i": exactly(0.1 * position - shift)},
            mutual_knn=exactly(0.01 * ((position * 7) % 5)),
            debiased_cka=exactly(0.02 * position),
            linear_cka=exactly(0.9 - 0.1 * position + shift),
            shuffled_cka=0.0,
        )
        for position, (image, text) in enumerate(NAMES)
    ]
    return PairsReport(
        pairs=pairs[::-1], pooling={}, num_drawn=9, num_compared=9, num_trained=6, num_held=3, num_groups=9,
        split="key", language=None, k=2, seed=0, knn_chance=0.2, chance={},
    )  # fmt: skip


OUTCOMES = Outcomes(
    measured=[measured(0.0), measured(0.04)],
    recalls={"plain": {pair: 0.1 * rank + 0.05 for rank, pair in enumerate(NAMES)}},
)


def test_metric_in_the_order_of_recalls() -> None:
    columns, rows = correlation_table(OUTCOMES)
    assert columns[:4] == ["metric", "training", "Spearman", "Kendall"]
    found = {row[0]: row[1:] for row in rows}
    assert found["probe R@10"] == ["plain", "1.000 [1.000, 1.000]", "1.000 [1.000, 1.000]", "0.550", "0.550"]
    assert found["linear CKA"][1] == "-1.000 [-1.000, -1.000]"
    assert found["linear CKA"][-2:] == ["0.050", "0.550"]  # it chooses the worst pair
    assert len(rows) == len(METRICS)


def test_equal_recalls_are_neither_ranked_nor_chosen_from() -> None:
    equal = Outcomes(measured=OUTCOMES.measured, recalls={"plain": dict.fromkeys(NAMES, 0.5)})
    columns, rows = correlation_table(equal)
    assert [row[columns.index("best recall")] for row in rows] == ["0.500"] * len(METRICS)
    assert {cell for row in rows for cell in row[2:-1]} == {UNDEFINED}


def test_rank_correlation_limits() -> None:
    x = np.arange(12.0)
    same, opposite = rank_correlation(x, np.exp(x), num_draws=50), rank_correlation(x, -(x**3), num_draws=50)
    for estimate, expected in zip((*same, *opposite), (1, 1, -1, -1), strict=True):
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx((expected,) * 3)


@pytest.mark.slow
def test_rank_correlation_interval() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(30)
    y = x + rng.standard_normal(30)
    spearman, _ = rank_correlation(x, y, num_draws=300)
    for one, other in ((x, y), (np.round(x), np.round(y))):  # with ties too
        rho, tau = rank_correlation(one, other, num_draws=10)
        assert rho.value == pytest.approx(spearmanr(one, other).statistic)
        assert tau.value == pytest.approx(kendalltau(one, other).statistic)
    assert spearman.low < spearman.value < spearman.high
    redrawn = []
    for _ in range(300):
        drawn = rng.standard_normal(30)
        redrawn.append(spearmanr(drawn, drawn + rng.standard_normal(30)).statistic)
    width = np.quantile(redrawn, 0.975) - np.quantile(redrawn, 0.025)
    assert spearman.high - spearman.low == pytest.approx(width, rel=0.5)


def test_rank_correlation_skips_constant_draws() -> None:
    spearman, _ = rank_correlation(np.array([1.0, 2, 3]), np.array([1.0, 2, 3]), num_draws=200)
    assert spearman.low == pytest.approx(1)
