from functools import partial
from pathlib import Path

import pytest

from embedcache.evaluate.encoder_pairs import METRICS, PairMetrics, PairsReport
from embedcache.evaluate.retrieval import RetrievalReport
from embedcache.metrics.intervals import Estimate
from pipelines.correlation import UNDEFINED, Outcomes, correlation_table, write_correlations
from pipelines.encoder_pairs import mean_recall
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


def trained(recall: float) -> RetrievalReport:
    recalls = {"i2t": {"r@10": exactly(recall)}, "t2i": {"r@10": exactly(recall + 0.1)}}
    return RetrievalReport(
        part="test", language=None, recalls=recalls, rank_metrics={}, curves={}, chance=recalls, by_seed=[recall],
        num_items={"image": [9], "text": [9]}, seeds=[0], overlap=None,
    )  # fmt: skip


OUTCOMES = Outcomes(
    measured=[measured(0.0), measured(0.04)],
    recalls={"plain": {pair: mean_recall([trained(0.1 * rank)] * 2) for rank, pair in enumerate(NAMES)}},
)


def test_metric_in_the_order_of_recalls() -> None:
    columns, rows = correlation_table(OUTCOMES)
    assert columns[:4] == ["metric", "training", "Spearman", "Kendall"]
    found = {row[0]: row[1:] for row in rows}
    assert found["probe R@10"] == ["plain", "1.000 [1.000, 1.000]", "1.000 [1.000, 1.000]", "0.550", "0.550"]
    assert found["linear CKA"][1] == "-1.000 [-1.000, -1.000]"
    assert found["linear CKA"][-2:] == ["0.050", "0.550"]  # it chooses the worst pair
    assert len(rows) == len(METRICS)


@pytest.mark.slow
def test_page_lists_pairs_by_recall(tmp_path: Path) -> None:
    write_correlations(tmp_path / "page.md", OUTCOMES, title="T", notes=["as made here"])
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# T\n\nas made here\n")
    rows = [line for line in page.splitlines() if line.startswith("| a/")]
    assert rows[0] == "| a/z | b/v | 0.550 | 0.500 | 0.000 | 0.100 | 0.420 |"
    assert [row.split(" | ")[0] for row in rows] == [f"| a/{name}" for name in "zzyyxx"]
    assert "probe R@10" in (tmp_path / "page.svg").read_text()


def test_equal_recalls_are_neither_ranked_nor_chosen_from() -> None:
    equal = Outcomes(measured=OUTCOMES.measured, recalls={"plain": dict.fromkeys(NAMES, 0.5)})
    columns, rows = correlation_table(equal)
    assert [row[columns.index("best recall")] for row in rows] == ["0.500"] * len(METRICS)
    assert {cell for row in rows for cell in row[2:-1]} == {UNDEFINED}
