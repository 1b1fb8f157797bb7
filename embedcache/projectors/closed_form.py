"""Closed-form linear projectors: NumPy and SciPy, float64, one pass over the data.

Each form maps the second moments of aligned rows of two features, x (N, D) and y (N, E), to one matrix per feature.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.linalg

from embedcache.arrays import check_finite
from embedcache.errors import DataError, SettingError

Matrix = npt.NDArray[np.float64]


def solve(name: str, moments: "Moments", width: int, *, shrinkage: float) -> tuple[Matrix, Matrix]:
    """Solve `cca`, `csa`, `procrustes` or `ridge`: (D, P) for the first feature and (E, P) for the second, float64.

    Args:
        name: name of the form.
        moments: moments of the training pairs.
        width: P; directions beyond the rank of the solution are zero.
        shrinkage: regularization in units of the mean eigenvalue; use more for fewer pairs.

    Raises:
        SettingError: the shrinkage is not above 0.
        DataError: there are fewer than two pairs.
    """
    if shrinkage <= 0:
        raise SettingError(f"shrinkage: expected a number above 0, got {shrinkage}")
    forms = {"cca": cca, "csa": _csa, "procrustes": _procrustes, "ridge": ridge}
    return forms[name](moments, width, shrinkage=shrinkage)


class Covariances(NamedTuple):
    """Covariances of two features: (D, D) and (E, E) of each, and (D, E) of both."""

    first: Matrix
    second: Matrix
    cross: Matrix


@dataclass
class Moments:
    """Sums over aligned rows of two features, or over the rows of one, from which means and covariances follow.

    The result does not depend on how rows are divided into batches, up to float64 rounding. Memory: three matrices of
    (D + E)² numbers.

    Args:
        first_width: D.
        second_width: E; 0 for one feature alone.
    """

    first_width: int
    second_width: int = 0

    def __post_init__(self) -> None:
        self.num_rows = 0
        self._sum = np.zeros(self.first_width + self.second_width)
        self._products = np.zeros((len(self._sum), len(self._sum)))

    def add(self, first_BD: npt.NDArray[np.floating], second_BE: npt.NDArray[np.floating] | None = None) -> None:
        """Add aligned rows: two arrays of equal length and any float dtype, or one array for one feature alone.

        Raises:
            DataError: a value is NaN or infinite.
        """
        second_BE = first_BD[:, :0] if second_BE is None else second_BE
        rows = np.concatenate([first_BD, second_BE], axis=1, dtype=np.float64)
        check_finite(rows, "the training pairs")
        self.num_rows += len(rows)
        self._sum += rows.sum(axis=0)
        self._products += rows.T @ rows

    @property
    def first_mean(self) -> Matrix:
        """(D,) mean of the rows of the first feature."""
        return self._mean[: self.first_width]

    @property
    def second_mean(self) -> Matrix:
        """(E,) mean of the rows of the second feature."""
        return self._mean[self.first_width :]

    def covariances(self) -> Covariances:
        """Compute the covariances; DataError if there are fewer than two rows."""
        if self.num_rows < 2:
            raise DataError(f"expected at least 2 pairs to fit a projector, got {self.num_rows}; add training samples")
        covariance = self._products / self.num_rows - np.outer(self._mean, self._mean)
        first, second = slice(self.first_width), slice(self.first_width, None)
        return Covariances(covariance[first, first], covariance[second, second], covariance[first, second])

    @property
    def _mean(self) -> Matrix:
        return self._sum / max(self.num_rows, 1)


def cca(moments: Moments, width: int, *, shrinkage: float) -> tuple[Matrix, Matrix]:
    """Solve regularized canonical correlation analysis, with each direction weighted by its correlation.

    With whiteners Wx = (Sxx + s mean(eig Sxx) I)^-1/2 and Wy from Syy, and U diag(r) V' the singular value
    decomposition of Wx Sxy Wy, the projectors are Wx U diag(r) and Wy V diag(r). Hotelling, "Relations between two
    sets of variates" (1936); the weighting is our choice and stronger than that of `csa`.
    """
    return _canonical(moments, width, shrinkage=shrinkage, power=1.0)


def _csa(moments: Moments, width: int, *, shrinkage: float) -> tuple[Matrix, Matrix]:
    """Solve canonical similarity analysis: as `cca`, but inner products weight a direction by its correlation once.

    The projectors are Wx U diag(r)^1/2 and Wy V diag(r)^1/2. CSA, "Canonical Similarity Analysis" (ICLR 2025), which
    normalizes before the weighting; here vectors are normalized after it.
    """
    return _canonical(moments, width, shrinkage=shrinkage, power=0.5)


def ridge(moments: Moments, width: int, *, shrinkage: float) -> tuple[Matrix, Matrix]:
    """Solve ridge regression of the second feature on the first.

    The first projector is (Sxx + s mean(eig Sxx) I)^-1 Sxy. Both sides are then rotated onto the principal axes of the
    second feature, which changes no cosine unless the shared space is narrower than that feature.
    """
    first, second, cross = moments.covariances()
    penalty = shrinkage * np.trace(first) / len(first)
    weights = scipy.linalg.solve(first + penalty * np.eye(len(first)), cross, assume_a="pos")
    _, axes = scipy.linalg.eigh(second)
    axes = axes[:, ::-1][:, :width]
    return _pad(weights @ axes, width), _pad(axes, width)


def _procrustes(moments: Moments, width: int, *, shrinkage: float) -> tuple[Matrix, Matrix]:
    """Solve orthogonal Procrustes: the rotation that minimizes the distance of centered rows to those of their pairs.

    With U diag(s) V' the singular value decomposition of Sxy, x is rotated by U and y by V, so that the strongest
    directions come first; U V' is the usual rotation. Schönemann, "A generalized solution of the orthogonal Procrustes
    problem" (1966). The shrinkage is unused.
    """
    del shrinkage
    left, _, right = scipy.linalg.svd(moments.covariances().cross, full_matrices=False)
    rank = min(width, len(right))
    return _pad(left[:, :rank], width), _pad(right[:rank].T, width)


def _canonical(moments: Moments, width: int, *, shrinkage: float, power: float) -> tuple[Matrix, Matrix]:
    first, second, cross = moments.covariances()
    whiten_x, whiten_y = _whitener(first, shrinkage), _whitener(second, shrinkage)
    left, correlation, right = scipy.linalg.svd(whiten_x @ cross @ whiten_y, full_matrices=False)
    rank = min(width, len(correlation))
    weights = correlation[:rank] ** power
    return (
        _pad(whiten_x @ left[:, :rank] * weights, width),
        _pad(whiten_y @ right[:rank].T * weights, width),
    )


def _whitener(covariance: Matrix, shrinkage: float) -> Matrix:
    values, vectors = scipy.linalg.eigh(covariance)
    values = np.maximum(values, 0)
    scaled = vectors / np.sqrt(values + shrinkage * values.mean() + np.finfo(np.float64).tiny)
    whitener: Matrix = scaled @ vectors.T
    return whitener


def _pad(weights: Matrix, width: int) -> Matrix:
    return np.pad(weights, ((0, 0), (0, width - weights.shape[1])))
