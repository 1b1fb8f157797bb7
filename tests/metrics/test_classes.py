import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from embedcache import metrics as classes
from embedcache.metrics import (
    bootstrap_class_mean,
    class_means,
    count_confusion,
    gini,
    rank_labels,
    top_classes,
    top_fraction,
)

COUNTS = st.lists(st.integers(0, 1000), min_size=1, max_size=30).filter(any)


def test_docstring_examples() -> None:
    assert doctest.testmod(classes).failed == 0


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Scores without ties, and labels; every class has an item."""
    num_classes, num_items = draw(st.integers(3, 8)), draw(st.integers(8, 40))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    labels = np.concatenate([np.arange(num_classes), rng.integers(num_classes, size=num_items - num_classes)])
    return rng.permuted(np.tile(np.arange(num_classes), (num_items, 1)), axis=1).astype(np.float32), labels


@pytest.mark.slow
@given(problems())
def test_classification_matches_sklearn(problem: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = problem
    ranks, predicted, num_classes = rank_labels(scores, labels), scores.argmax(axis=1), scores.shape[1]
    for k in (1, 2):
        expected = top_k_accuracy_score(labels, scores, k=k, labels=np.arange(num_classes))
        assert np.mean(ranks <= k) == pytest.approx(expected)
    assert np.array_equal(count_confusion(labels, predicted, num_classes), confusion_matrix(labels, predicted))
    balanced = balanced_accuracy_score(labels, predicted)
    assert class_means(ranks == 1, labels, num_classes).mean() == pytest.approx(balanced)
    assert bootstrap_class_mean(ranks == 1, labels, num_draws=2).value == pytest.approx(balanced)


def test_nan_and_ties_rank_last() -> None:
    labels = np.zeros(3, np.int64)
    scores = np.array([[1, 1, 0], [np.nan, 0, 0], [1, np.nan, 0]], np.float32)
    assert rank_labels(scores, labels).tolist() == [2, 3, 2]


@given(st.integers(0, 999), st.integers(2, 7))
def test_the_first_class_is_the_true_one_where_it_ranks_first(seed: int, num_classes: int) -> None:
    """Check scores of which many are equal, or differ by a step of float32."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(3, size=(20, num_classes)).astype(np.float32) / 4
    scores = np.where(rng.random(scores.shape) < 0.3, np.nextafter(scores, np.float32(1)), scores)
    labels, k = rng.integers(num_classes, size=20), min(5, num_classes)
    top, ranks = top_classes(scores, labels, k), rank_labels(scores, labels)
    assert ((top == labels[:, None]) == (ranks[:, None] == np.arange(1, k + 1))).all()
    assert (np.diff(np.take_along_axis(scores, top, axis=1), axis=1) <= 1e-6).all()


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
