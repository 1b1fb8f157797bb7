import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from embedcache.arrays import normalize
from embedcache.errors import MissingExtraError, UnknownNameError
from embedcache.evaluate import classifiers
from embedcache.evaluate.classifiers import (
    C_GRID,
    FEW_SHOT_C,
    SHRINKAGE_GRID,
    Examples,
    Fit,
    Ridge,
    Scale,
    fit_knn,
    fit_logistic,
    fit_ridge,
    join_examples,
    load_method,
)
from embedcache.evaluate.probe import evaluate_probe
from embedcache.testing.classifiers import ClassifierContract

CLASSES = 4


class TestKnn(ClassifierContract):
    name = "knn"


class TestLogistic(ClassifierContract):
    name = "logistic"


class TestRidge(ClassifierContract):
    name = "ridge"


def blobs(seed: int, num: int, *, width: int = 6, noise: float = 1.0, num_classes: int = CLASSES) -> Examples:
    """Draw vectors around one center per class; every class has some."""
    centers = np.random.default_rng(99).standard_normal((num_classes, width))
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(num) % num_classes)
    vectors = 3 + centers[labels] + noise * rng.standard_normal((num, width))
    return Examples(vectors=vectors.astype(np.float32), labels=labels)


@pytest.mark.slow
@given(seed=st.integers(0, 2**32 - 1), num=st.integers(CLASSES, 60), noise=st.floats(0.1, 3))
def test_knn_matches_scikit_learn(seed: int, num: int, noise: float) -> None:
    train, test = blobs(seed, num, noise=noise), blobs(seed + 1, 20, noise=noise)
    model = KNeighborsClassifier(
        n_neighbors=min(20, num), metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(train.vectors.astype(np.float64), train.labels)
    probabilities = np.sort(model.predict_proba(test.vectors.astype(np.float64)), axis=1)
    is_clear = probabilities[:, -1] - probabilities[:, -2] > 1e-3
    found = fit_knn(train, None, CLASSES).scores(test.vectors).argmax(axis=1)
    np.testing.assert_array_equal(found[is_clear], model.predict(test.vectors)[is_clear])


@pytest.mark.parametrize("block", [7, 8192])
@pytest.mark.parametrize(("num", "width"), [(50, 6), (30, 90)])
def test_ridge_solves_the_normal_equations(monkeypatch: pytest.MonkeyPatch, block: int, num: int, width: int) -> None:
    monkeypatch.setattr(classifiers, "_BLOCK", block)
    train, val, test = (blobs(seed, size, width=width) for seed, size in enumerate((num, 20, 25)))
    inputs, held = scaled(train, test)
    one_hot = np.eye(CLASSES)[train.labels]
    weights = np.linalg.solve(
        inputs.T @ inputs + 0.1 * num * np.eye(width), inputs.T @ (one_hot - one_hot.mean(axis=0))
    )
    found = Ridge(train, CLASSES).scores(0.1)(test.vectors)
    np.testing.assert_allclose(found, held @ weights + one_hot.mean(axis=0), atol=1e-5)
    expected = Ridge(train, CLASSES).scores(1e-7)(val.vectors).argmax(axis=1)
    accuracy = fit_ridge(train, val, CLASSES).chosen["val_accuracy"]["1e-07"]
    assert accuracy == round(float(np.mean(expected == val.labels)), 5)


@pytest.mark.parametrize("fit", [fit_knn, fit_ridge])
@pytest.mark.parametrize("width", [6, 90])  # of the vectors, or of the examples, is the smaller Gram matrix
def test_products_of_the_examples_are_used(fit: Fit, width: int) -> None:
    def products(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        shapes.append((len(left), len(right)))
        return left @ right.T

    train, val, test = (blobs(seed, num, width=width) for seed, num in ((0, 40), (1, 20), (2, 30)))
    expected = fit(train, val, CLASSES)
    shapes: list[tuple[int, int]] = []
    found = fit(replace(train, products=products), val, CLASSES)
    gram = {(6, 6)} if width == 6 else {(40, 40), (60, 60)}
    assert set(shapes) == (set() if fit is fit_knn else {*gram, (20, CLASSES)})
    np.testing.assert_array_equal(found.scores(test.vectors), expected.scores(test.vectors))
    assert shapes[-1] == (30, 60 if fit is fit_knn else CLASSES)


def scaled(train: Examples, test: Examples) -> tuple[np.ndarray, np.ndarray]:
    unit = normalize(train.vectors).astype(np.float64)
    mean = unit.mean(axis=0)
    length = np.sqrt(np.square(unit - mean).sum(axis=1).mean())
    return (unit - mean) / length, (normalize(test.vectors).astype(np.float64) - mean) / length


@pytest.mark.parametrize("seed", range(3))
def test_scale_centers_and_normalizes(seed: int) -> None:
    train, test = blobs(seed, 50), blobs(seed + 1, 20)
    scale = Scale.of(train.vectors)
    for found, expected in zip((scale(train.vectors), scale(test.vectors)), scaled(train, test), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.square(scale(train.vectors)).sum(axis=1).mean() == pytest.approx(1, abs=1e-4)
    same = np.ones((3, 4), np.float32)
    np.testing.assert_allclose(Scale.of(same)(same), 0, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_classes", [2, CLASSES])
def test_logistic_matches_scikit_learn(seed: int, num_classes: int) -> None:
    train, val, test = (blobs(3 * seed + part, 60, num_classes=num_classes) for part in range(3))
    fitted = fit_logistic(train, val, num_classes)
    both = join_examples(train, val)
    inputs, held = scaled(both, test)
    model = LogisticRegression(C=fitted.chosen["C"], max_iter=1000).fit(inputs, both.labels)
    np.testing.assert_array_equal(fitted.scores(test.vectors).argmax(axis=1), model.predict(held))
    assert fitted.chosen["converged"]


@pytest.mark.slow
def test_logistic_converges_for_wide_vectors() -> None:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(800) % CLASSES)
    spread = np.linspace(1, 0.02, 256)  # what tells classes apart lies in directions of little variance
    vectors = rng.standard_normal((800, 256)) * spread
    vectors[:, -CLASSES:] += 0.05 * np.eye(CLASSES)[labels]
    train = Examples(vectors=vectors.astype(np.float32), labels=labels)
    inputs, _ = scaled(train, train)
    model = LogisticRegression(C=FEW_SHOT_C, max_iter=5000, tol=1e-9).fit(inputs, labels)
    fitted = fit_logistic(train, None, CLASSES)
    assert fitted.chosen["C"] == FEW_SHOT_C
    found, best = fitted.scores(train.vectors), model.decision_function(inputs)
    assert np.abs(found - best).max() < 0.005 * np.abs(best).max()


def test_logistic_chooses_the_smallest_best_strength() -> None:
    train, val = blobs(0, 60), blobs(1, 200)
    fitted = fit_logistic(train, val, CLASSES)
    inputs, held = scaled(train, val)
    own = {c: LogisticRegression(C=c, max_iter=1000).fit(inputs, train.labels).score(held, val.labels) for c in C_GRID}
    tried = {float(c): accuracy for c, accuracy in fitted.chosen["val_accuracy"].items()}
    assert list(tried) == list(C_GRID[: len(tried)])
    assert tried == pytest.approx({c: own[c] for c in tried}, abs=0.011)  # two of 200: both stop near the optimum
    best = list(tried.values()).index(max(tried.values()))
    assert fitted.chosen["C"] == C_GRID[best]
    assert len(tried) == min(best + 3, len(C_GRID))  # it ends when two in a row are no better


def test_ridge_chooses_the_largest_best_shrinkage() -> None:
    train, val, test = blobs(0, 40), blobs(1, 100), blobs(2, 50)
    fitted = fit_ridge(train, val, CLASSES)
    tried = {
        s: np.mean(Ridge(train, CLASSES).scores(s)(val.vectors).argmax(axis=1) == val.labels) for s in SHRINKAGE_GRID
    }
    best = max(s for s in tried if tried[s] == max(tried.values()))
    assert fitted.chosen["shrinkage"] == best
    expected = Ridge(join_examples(train, val), CLASSES).scores(best)(test.vectors)
    np.testing.assert_array_equal(fitted.scores(test.vectors), expected)


def test_logistic_without_scikit_learn_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    assert [load_method(name) for name in ("knn", "ridge")] == [fit_knn, fit_ridge]
    with pytest.raises(MissingExtraError, match="scikit-learn"):
        evaluate_probe("nowhere")  # before anything is read
    with pytest.raises(UnknownNameError, match="logistc"):
        load_method("logistc")
