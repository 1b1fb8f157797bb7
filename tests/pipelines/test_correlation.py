from functools import partial

import pytest

from embedcache.evaluate.encoder_pairs import METRICS, PairMetrics, PairsReport
from embedcache.metrics.intervals import Estimate
from pipelines.correlation import UNDEFINED, Outcomes, correlation_table
from pipelines.rank_correlation import rank_correlation

NAMES = [(f"a/{image}", f"b/{text}") for image in "xyz" for text in "uv"]


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.correlation.rank_correlation", partial(rank_correlation, num_draws=20))


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
