"""Logistic regression on frozen features, by scikit-learn; importing this needs the extra `evaluate`."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from embedcache.arrays import Floats, Ints
from embedcache.evaluate.classifiers import Examples, Fitted, Scale, by_strength, is_at_the_edge, joined
from embedcache.registry import require

C_GRID = tuple(10.0**power for power in range(-2, 6))
FEW_SHOT_C = 10.0
_MOST_ITERATIONS = 1000
_TOLERANCE = 1e-4  # scikit-learn's, for dimensions of variance 1
_LINEAR = require("sklearn.linear_model", extra="evaluate")


def fit_logistic(train: Examples, val: Examples | None, num_classes: int) -> Fitted:
    """Fit multinomial logistic regression by L-BFGS; C is a power of ten, chosen on validation.

    The small ones come first, each starts from the last, and the search ends once two in a row are no better or one is
    worse by more than a standard error: the large ones take longest.
    """
    if val is None:
        model, scale = _logistic(FEW_SHOT_C, train), Scale.of(train.vectors)
        iterations = _fit(model, scale(train.vectors), train.labels)
        return Fitted(_scores_of(model, scale, num_classes), {"C": FEW_SHOT_C, "iterations": iterations})
    accuracies = _try_strengths(train, val)
    best = max(accuracies, key=lambda strength: (accuracies[strength], -strength))
    both = joined(train, val)
    model, scale = _logistic(best, both), Scale.of(both.vectors)
    iterations = _fit(model, scale(both.vectors), both.labels)
    chosen = {
        "C": best,
        "val_accuracy": by_strength(accuracies),
        "iterations": iterations,
        "converged": iterations < _MOST_ITERATIONS,
        "at_the_edge": is_at_the_edge(accuracies, C_GRID),
    }
    return Fitted(_scores_of(model, scale, num_classes), chosen)


def _logistic(strength: float, train: Examples) -> Any:
    """Make the model. Dimensions of scaled vectors have variance 1 / D, so gradients are smaller by its root."""
    tolerance = _TOLERANCE / float(np.sqrt(train.vectors.shape[1]))
    return _LINEAR.LogisticRegression(C=strength, max_iter=_MOST_ITERATIONS, tol=tolerance, warm_start=True)


def _fit(model: Any, vectors_MD: Floats, labels_M: Ints) -> int:
    """Fit, and give the number of steps; that they were too few is in the report."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lbfgs failed to converge")
        model.fit(vectors_MD, labels_M)
    return int(model.n_iter_.max())


def _try_strengths(train: Examples, val: Examples) -> dict[float, float]:
    model, scale = _logistic(C_GRID[0], train), Scale.of(train.vectors)
    train_MD, val_MD = scale(train.vectors), scale(val.vectors)
    accuracies: dict[float, float] = {}
    for strength in C_GRID:
        model.set_params(C=strength)
        _fit(model, train_MD, train.labels)
        accuracies[strength] = float(np.mean(model.predict(val_MD) == val.labels))
        if _is_past_the_best(list(accuracies.values()), len(val.labels)):
            break
    return accuracies


def _is_past_the_best(accuracies: Sequence[float], num_val: int) -> bool:
    best = max(accuracies)
    standard_error = np.sqrt(best * (1 - best) / num_val)
    return accuracies.index(best) < len(accuracies) - 2 or accuracies[-1] < best - standard_error


def _scores_of(model: Any, scale: Scale, num_classes: int) -> Callable[[Floats], Floats]:
    def scores(vectors_QD: Floats) -> Floats:
        decision = model.decision_function(scale(vectors_QD)).astype(np.float32)
        if decision.ndim == 1:  # of two classes scikit-learn scores the second alone
            decision = np.stack([-decision, decision], axis=1)
        scores_QC = np.full((len(vectors_QD), num_classes), -np.inf, np.float32)
        scores_QC[:, model.classes_] = decision
        return scores_QC

    return scores
