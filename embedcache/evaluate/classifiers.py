"""Classifiers on frozen features: nearest neighbors, ridge regression and logistic regression.

All of them scale vectors to length 1. The linear ones then subtract the mean of the training vectors, and divide by
their root mean square length. With many training items, this is as good as scaling each dimension to variance 1. With
few, it is far better, as they say little about the variance of each dimension.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from scipy.sparse import csr_array

from embedcache.arrays import Floats, Ints, Products, blocks, dot_products, normalize
from embedcache.neighbors.knn import knn
from embedcache.registry import Registry, require

_NUM_NEIGHBORS = 20
_TEMPERATURE = 0.07
SHRINKAGE_GRID = tuple(10.0**power for power in range(-7, 2))
_FEW_SHOT_SHRINKAGE = 0.01
C_GRID = tuple(10.0**power for power in range(-2, 6))
FEW_SHOT_C = 10.0
_MAX_ITERATIONS = 1000
_TOLERANCE = 1e-4  # scikit-learn's default, for dimensions of variance 1
_MIN_VARIANCE = 1e-12  # below it, all vectors have one direction
_BLOCK = 8192


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Vectors, (M, D) float32 and not zero, their classes, (M,) int64, and what multiplies them, perhaps on a GPU."""

    vectors: Floats
    labels: Ints
    products: Products = dot_products

    def take(self, rows: Ints) -> "Examples":
        """Return a copy of some rows."""
        return replace(self, vectors=self.vectors[rows], labels=self.labels[rows])


class Classifier(NamedTuple):
    """A trained classifier.

    Args:
        scores: (Q, D) float32 vectors -> (Q, C) scores, higher is more likely; -inf for classes without examples.
        chosen: hyperparameters, and the accuracies by which they were chosen, as JSON values.
    """

    scores: Callable[[Floats], Floats]
    chosen: Mapping[str, Any]


Fit: TypeAlias = Callable[[Examples, Examples | None, int], Classifier]
"""Function of the training examples, the validation examples and the number of classes. It chooses its regularization
on the validation examples and fits both together; without validation examples the regularization is fixed."""

METHODS = Registry(
    "method",
    {
        "knn": "embedcache.evaluate.classifiers:fit_knn",
        "logistic": "embedcache.evaluate.classifiers:fit_logistic",
        "ridge": "embedcache.evaluate.classifiers:fit_ridge",
    },
    group="embedcache.methods",
)


def load_method(name: str) -> Fit:
    """Return the function of a method: knn, logistic, ridge or module:attribute."""
    if name == "logistic":
        require("sklearn.linear_model", package="scikit-learn")
    fit: Fit = METHODS.load(name)
    return fit


def fit_knn(train: Examples, val: Examples | None, num_classes: int) -> Classifier:
    """Classify by a vote of the 20 nearest neighbors by cosine, with weight exp(cosine / 0.07) as in DINO."""
    examples = join_examples(train, val)
    candidates = normalize(examples.vectors)
    k = min(_NUM_NEIGHBORS, len(candidates))

    def scores(vectors_QD: Floats) -> Floats:
        rows_QK, sims_QK = knn(normalize(vectors_QD), candidates, k, products=examples.products)
        return vote(examples.labels[rows_QK], sims_QK, num_classes, temperature=_TEMPERATURE)

    return Classifier(scores, {"neighbors": k, "temperature": _TEMPERATURE})


def vote(labels_QK: Ints, sims_QK: Floats, num_classes: int, *, temperature: float) -> Floats:
    """Compute the score of each class for each query, exp(similarity / temperature) per neighbor: (Q, C) float32.

    The weights follow "Emerging Properties in Self-Supervised Vision Transformers" (DINO, ICCV 2021). They are divided
    by the nearest neighbor's weight, so that no temperature overflows.

    Args:
        labels_QK: class of each neighbor.
        sims_QK: similarity of each neighbor, best first.
        temperature: a lower temperature gives more weight to the nearest neighbors.
    """
    weights_QK = np.exp((sims_QK - sims_QK[:, :1]) / temperature)
    votes_QC = np.zeros((len(labels_QK), num_classes), np.float32)
    np.add.at(votes_QC, (np.arange(len(labels_QK))[:, None], labels_QK), weights_QK)
    return votes_QC


def fit_ridge(train: Examples, val: Examples | None, num_classes: int) -> Classifier:
    """Fit ridge regression to one-hot classes in closed form.

    The shrinkage, a power of ten, is chosen on validation. It is relative to the number of examples, whose squared
    lengths have mean 1.
    """
    ridge = Ridge(train, num_classes)
    if val is None:
        return Classifier(ridge.scores(_FEW_SHOT_SHRINKAGE), {"shrinkage": _FEW_SHOT_SHRINKAGE})

    accuracies: dict[float, float] = {}
    for shrinkage in SHRINKAGE_GRID:
        scores = ridge.scores(shrinkage)
        predicted = [scores(val.vectors[block]).argmax(axis=1) for block in blocks(len(val.labels), _BLOCK)]
        accuracies[shrinkage] = float(np.mean(np.concatenate(predicted) == val.labels))

    # Of equally good ones, the larger shrinkage is the more careful one.
    best = max(accuracies, key=lambda shrinkage: (accuracies[shrinkage], shrinkage))
    scores = Ridge(join_examples(train, val), num_classes).scores(best)
    return Classifier(scores, {"shrinkage": best, **_validation(accuracies, SHRINKAGE_GRID)})


class Ridge:
    """Ridge regression to one-hot classes at any shrinkage, from one decomposition of the smaller Gram matrix.

    Memory: a scaled copy of the vectors, three square matrices of min(M, D) rows in float64, and a few matrices of
    min(M, D) numbers per class in float64.
    """

    def __init__(self, train: Examples, num_classes: int) -> None:
        self._scale = Scale.of(train.vectors)
        self._products = train.products
        x_MD = self._scale(train.vectors)
        self._num = len(x_MD)
        self._counts = np.bincount(train.labels, minlength=num_classes)
        self._prior = self._counts / self._num

        # The smaller of both Gram matrices is decomposed once, for all shrinkages.
        is_wide = x_MD.shape[0] < x_MD.shape[1]
        self._x_MD = x_MD if is_wide else None
        matrix = x_MD.T if is_wide else x_MD
        gram = np.zeros((matrix.shape[1], matrix.shape[1]))
        for block in blocks(len(matrix), _BLOCK):
            gram += train.products(matrix[block].T, matrix[block].T)
        values, self._vectors = np.linalg.eigh(gram)
        self._values = np.maximum(values, 0)

        # The product of the rows with one-hot classes minus their mean.
        projected = self._vectors if is_wide else x_MD
        sums_CS = np.zeros((num_classes, projected.shape[1]))
        for block in blocks(self._num, _BLOCK):
            labels_B = train.labels[block]
            places = (labels_B, np.arange(len(labels_B)))
            is_class_CB = csr_array((np.ones(len(labels_B), projected.dtype), places), (num_classes, len(labels_B)))
            sums_CS += is_class_CB @ projected[block]
        target = sums_CS.T - np.outer(sums_CS.sum(axis=0), self._prior)
        self._target = target if is_wide else self._vectors.T @ target

    def scores(self, shrinkage: float) -> Callable[[Floats], Floats]:
        """Solve for one shrinkage above 0, relative to the number of examples."""
        solved = self._vectors @ (self._target / (self._values + shrinkage * self._num)[:, None])
        weights_DC = (solved if self._x_MD is None else self._x_MD.T @ solved).astype(np.float32)
        bias_C = np.where(self._counts, self._prior, -np.inf).astype(np.float32)

        # The function keeps neither the decomposition nor the scaled vectors alive.
        scale = self._scale
        products = self._products
        return lambda vectors_QD: products(scale(vectors_QD), weights_DC.T) + bias_C


def fit_logistic(train: Examples, val: Examples | None, num_classes: int) -> Classifier:
    """Fit multinomial logistic regression by L-BFGS.

    C, a power of ten, is chosen on validation. Each C starts from the solution of the smaller one. The largest are the
    slowest, so the search ends when two in a row are not better.
    """
    chosen: dict[str, Any] = {"C": FEW_SHOT_C}
    if val is not None:
        accuracies = _validate_strengths(train, val)
        best = max(accuracies, key=lambda strength: (accuracies[strength], -strength))
        chosen = {"C": best, **_validation(accuracies, C_GRID)}

    examples = join_examples(train, val)
    scale = Scale.of(examples.vectors)
    model = _logistic_model(examples)
    chosen["iterations"] = _fit_model(model, chosen["C"], scale(examples.vectors), examples.labels)
    if val is not None:
        chosen["converged"] = chosen["iterations"] < _MAX_ITERATIONS

    def scores(vectors_QD: Floats) -> Floats:
        decision = model.decision_function(scale(vectors_QD)).astype(np.float32)
        if decision.ndim == 1:  # for two classes scikit-learn returns only the score of the second
            decision = np.stack([-decision, decision], axis=1)

        # A class without training items is never predicted.
        scores_QC = np.full((len(vectors_QD), num_classes), -np.inf, np.float32)
        scores_QC[:, model.classes_] = decision
        return scores_QC

    return Classifier(scores, chosen)


def _validate_strengths(train: Examples, val: Examples) -> dict[float, float]:
    model = _logistic_model(train)
    scale = Scale.of(train.vectors)
    train_MD = scale(train.vectors)
    val_MD = scale(val.vectors)

    accuracies: dict[float, float] = {}
    for strength in C_GRID:
        _fit_model(model, strength, train_MD, train.labels)
        accuracies[strength] = float(np.mean(model.predict(val_MD) == val.labels))
        values = list(accuracies.values())
        if values.index(max(values)) < len(values) - 2:
            break
    return accuracies


def _logistic_model(train: Examples) -> Any:
    """Create the model. Dimensions of scaled vectors have variance 1 / D, so gradients and tolerance are smaller."""
    linear = require("sklearn.linear_model", package="scikit-learn")
    tolerance = _TOLERANCE / float(np.sqrt(train.vectors.shape[1]))
    return linear.LogisticRegression(max_iter=_MAX_ITERATIONS, tol=tolerance, warm_start=True)


def _fit_model(model: Any, strength: float, vectors_MD: Floats, labels_M: Ints) -> int:
    """Fit the model and return the number of iterations. The report says if they were too few."""
    model.set_params(C=strength)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lbfgs failed to converge")
        model.fit(vectors_MD, labels_M)
    return int(model.n_iter_.max())


class Scale(NamedTuple):
    """Scaling for linear classifiers: to length 1, minus the (D,) mean, divided by the root mean square length."""

    mean: Floats
    length: np.float32

    @classmethod
    def of(cls, vectors_MD: Floats) -> "Scale":
        """Fit to training vectors. Sums are in float64, block by block."""
        total = np.zeros(vectors_MD.shape[1])
        for block in blocks(len(vectors_MD), _BLOCK):
            total += normalize(vectors_MD[block]).sum(axis=0, dtype=np.float64)
        mean = total / len(vectors_MD)
        variance = 1 - float(mean @ mean)
        return cls(mean.astype(np.float32), np.float32(np.sqrt(variance) if variance > _MIN_VARIANCE else 1))

    def __call__(self, vectors_ND: Floats) -> Floats:
        """Return a scaled copy: (N, D) float32."""
        scaled_ND = normalize(vectors_ND)
        scaled_ND -= self.mean
        scaled_ND /= self.length
        return scaled_ND


def join_examples(train: Examples, val: Examples | None) -> Examples:
    """Concatenate training and validation examples."""
    if val is None:
        return train
    return replace(
        train, vectors=np.concatenate([train.vectors, val.vectors]), labels=np.concatenate([train.labels, val.labels])
    )


def _validation(accuracies: Mapping[float, float], grid: Sequence[float]) -> dict[str, Any]:
    """Return the accuracy of each strength, and whether the best is at the edge of the grid.

    A strength beyond the grid may then be better.
    """
    best = [strength for strength in grid if accuracies.get(strength) == max(accuracies.values())]
    return {
        "val_accuracy": {f"{strength:g}": round(accuracy, 5) for strength, accuracy in accuracies.items()},
        "at_the_edge": best in ([grid[0]], [grid[-1]]),
    }
