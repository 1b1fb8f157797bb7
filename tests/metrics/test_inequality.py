import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.metrics.inequality import gini, top_fraction

COUNTS = st.lists(st.integers(0, 1000), min_size=1, max_size=30).filter(any)


@given(COUNTS)
def test_gini_matches_definition(counts: list[int]) -> None:
    values = np.array(counts, float)
    differences = np.abs(values[:, None] - values[None, :]).mean()
    assert gini(values) == pytest.approx(differences / (2 * values.mean()))


@given(COUNTS, st.integers(1, 5))
def test_gini_ignores_order_and_scale(counts: list[int], factor: int) -> None:
    assert gini(np.array(counts)) == pytest.approx(gini(factor * np.array(counts[::-1])))


@given(COUNTS, st.floats(0, 1))
def test_top_fraction_is_at_least_its_fraction(counts: list[int], share: float) -> None:
    num = max(1, round(share * len(counts)))
    assert top_fraction(np.array(counts), share) == pytest.approx(sum(sorted(counts)[::-1][:num]) / sum(counts))
    assert top_fraction(np.array(counts), share) >= num / len(counts) - 1e-9


def test_inequality_of_zeros_is_nan() -> None:
    assert np.isnan(gini(np.zeros(3)))
    assert np.isnan(top_fraction(np.zeros(3), 0.1))
