"""The classifiers that a probe fits on frozen features: neighbors, ridge regression, and a table with logistic.py's.

All take length away from the vectors first. What is linear then takes off the mean of the training vectors and divides
by one number, their root mean square length: as good as giving each dimension variance 1 where training data are many,
and far better where they are few, since a handful of vectors says little about the variance of each dimension.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from embedcache.arrays import Array, Floats, Ints, blocks, normalize
from embedcache.metrics.neighbors import top_k, vote
from embedcache.registry import Registry

NUM_NEIGHBOURS = 20
TEMPERATURE = 0.07
SHRINKAGE_GRID = tuple(10.0**power for power in range(-7, 2))
FEW_SHOT_SHRINKAGE = 0.01
_NO_SPREAD = 1e-12  # all vectors point one way
_BLOCK = 8192


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Vectors and their classes.

    Args:
        vectors: (M, D) float32, not zero.
        labels: (M,) int64.
    """

    vectors: Floats
    labels: Ints

    def take(self, rows: Ints) -> "Examples":
        """Copy some of them."""
        return Examples(vectors=self.vectors[rows], labels=self.labels[rows])


class Fitted(NamedTuple):
    """A classifier that was fitted.

    Args:
        scores: (Q, D) float32 vectors -> (Q, C) scores, higher is more likely; -inf for classes it never saw.
        chosen: what was chosen and on what grounds, as JSON values.
    """

    scores: Callable[[Floats], Floats]
    chosen: Mapping[str, Any]


Fit: TypeAlias = Callable[[Examples, Examples | None, int], Fitted]
"""Fits on the examples; its strength is chosen on the validation examples, and both together fitted again. Without
validation examples it is a fixed one. The number is that of the classes."""

METHODS = Registry(
    "method",
    {
        "knn": "embedcache.evaluate.classifiers:fit_knn",
        "logistic": "embedcache.evaluate.logistic:fit_logistic",
        "ridge": "embedcache.evaluate.classifiers:fit_ridge",
    },
)


def fit_knn(train: Examples, val: Examples | None, num_classes: int) -> Fitted:
    """Let the 20 nearest by cosine vote, each with exp(cosine / 0.07) as DINO's do; nothing is chosen."""
    both = joined(train, val)
    candidates = normalize(both.vectors)
    k = min(NUM_NEIGHBOURS, len(candidates))

    def scores(vectors_QD: Floats) -> Floats:
        rows_QK, sims_QK = top_k(normalize(vectors_QD), candidates, k)
        return vote(both.labels[rows_QK], sims_QK, num_classes, temperature=TEMPERATURE)

    return Fitted(scores, {"neighbors": k, "temperature": TEMPERATURE})


def fit_ridge(train: Examples, val: Examples | None, num_classes: int) -> Fitted:
    """Fit ridge regression to one-hot classes, in closed form; the shrinkage is a power of ten, chosen on validation.

    The shrinkage is relative to the number of examples, whose squared lengths have mean 1.
    """
    if val is None:
        return Fitted(Ridge(train, num_classes).scores(FEW_SHOT_SHRINKAGE), {"shrinkage": FEW_SHOT_SHRINKAGE})
    ridge = Ridge(train, num_classes)
    accuracies = {
        strength: float(np.mean(ridge.scores(strength)(val.vectors).argmax(axis=1) == val.labels))
        for strength in SHRINKAGE_GRID
    }
    best = max(accuracies, key=lambda strength: (accuracies[strength], strength))
    chosen = {
        "shrinkage": best,
        "val_accuracy": by_strength(accuracies),
        "at_the_edge": is_at_the_edge(accuracies, SHRINKAGE_GRID),
    }
    return Fitted(Ridge(joined(train, val), num_classes).scores(best), chosen)


class Scale(NamedTuple):
    """What makes vectors fit for a linear classifier: length 1, then the mean off, then divided by one number.

    Args:
        mean: (D,) float32, of the training vectors.
        length: their root mean square length after that.
    """

    mean: Floats
    length: np.float32

    @classmethod
    def of(cls, vectors_MD: Floats) -> "Scale":
        """Measure training vectors; sums are taken in float64, a block at a time."""
        total, squares = np.zeros(vectors_MD.shape[1]), 0.0
        for block in blocks(len(vectors_MD), _BLOCK):
            unit_BD = normalize(vectors_MD[block]).astype(np.float64)
            total += unit_BD.sum(axis=0)
            squares += float(np.square(unit_BD).sum())
        mean = total / len(vectors_MD)
        spread = squares / len(vectors_MD) - float(mean @ mean)
        return cls(mean.astype(np.float32), np.float32(np.sqrt(spread) if spread > _NO_SPREAD else 1))

    def __call__(self, vectors_ND: Floats) -> Floats:
        """Give a scaled copy: (N, D) float32."""
        scaled_ND = normalize(vectors_ND)
        scaled_ND -= self.mean
        scaled_ND /= self.length
        return scaled_ND


class Ridge:
    """Ridge regression to one-hot classes at any shrinkage, after one decomposition of the smaller Gram matrix.

    Memory: a scaled copy of the vectors and three square matrices of min(M, D) rows in float64.

    Args:
        train: (M, D) vectors and their classes.
        num_classes: C.
    """

    def __init__(self, train: Examples, num_classes: int) -> None:
        self._scale = Scale.of(train.vectors)
        x_MD = self._scale(train.vectors)
        self._counts = np.bincount(train.labels, minlength=num_classes)
        self._prior = self._counts / len(x_MD)
        y_MC = np.eye(num_classes, dtype=np.float32)[train.labels] - self._prior.astype(np.float32)
        self._num = len(x_MD)
        self._is_wide = x_MD.shape[0] < x_MD.shape[1]
        gram = _gram(x_MD.T) if self._is_wide else _gram(x_MD)
        values, self._vectors = np.linalg.eigh(gram)
        self._values = np.maximum(values, 0)
        self._x_MD = x_MD if self._is_wide else None
        target = y_MC if self._is_wide else x_MD.T @ y_MC
        self._target = self._vectors.T @ target.astype(np.float64)

    def scores(self, shrinkage: float) -> Callable[[Floats], Floats]:
        """Solve for one shrinkage, above 0, relative to the number of examples."""
        solved = self._vectors @ (self._target / (self._values + shrinkage * self._num)[:, None])
        weights_DC = (solved if self._x_MD is None else self._x_MD.T @ solved).astype(np.float32)
        bias_C = np.where(self._counts, self._prior, -np.inf).astype(np.float32)
        scale = self._scale
        return lambda vectors_QD: scale(vectors_QD) @ weights_DC + bias_C


def joined(train: Examples, val: Examples | None) -> Examples:
    """Put training and validation examples into one."""
    if val is None:
        return train
    return Examples(
        vectors=np.concatenate([train.vectors, val.vectors]), labels=np.concatenate([train.labels, val.labels])
    )


def _gram(x_MD: Array) -> Array:
    """Give the products of all columns: (D, D) float64, added up in it from blocks of rows."""
    gram_DD = np.zeros((x_MD.shape[1], x_MD.shape[1]))
    for block in blocks(len(x_MD), _BLOCK):
        gram_DD += x_MD[block].T @ x_MD[block]
    return gram_DD


def is_at_the_edge(accuracies: Mapping[float, float], grid: Sequence[float]) -> bool:
    """Say whether a strength beyond those tried might well be better: the best is the first or last, and alone."""
    best = [strength for strength in grid if accuracies.get(strength) == max(accuracies.values())]
    return best in ([grid[0]], [grid[-1]])


def by_strength(accuracies: Mapping[float, float]) -> dict[str, float]:
    """Give the accuracies as JSON."""
    return {f"{strength:g}": round(accuracy, 5) for strength, accuracy in accuracies.items()}
