"""Closed-form linear projectors: NumPy and SciPy, float64, one pass over the data.

Each form maps the second moments of aligned rows to one matrix per modality.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from embedcache.arrays import check_finite
from embedcache.errors import DataError, SettingError

Matrix = npt.NDArray[np.float64]


def solve(name: str, moments: "Moments", width: int, *, shrinkage: float) -> tuple[Matrix, Matrix]:
    """Solve `cca`, `csa`, `procrustes` or `ridge`: (D, P) for images and (E, P) for texts, float64.

    P is the width; directions beyond the rank of the solution are zero. Shrinkage is regularization in units of the
    mean eigenvalue; use more for fewer pairs.
    """
    if shrinkage <= 0:
        raise SettingError(f"shrinkage: expected a number above 0, got {shrinkage}")
    forms = {"cca": cca, "csa": _csa, "procrustes": _procrustes, "ridge": ridge}
    return forms[name](moments, width, shrinkage=shrinkage)


@dataclass
class Moments:
    """Sums over aligned rows of two features, from which every closed form is solved.

    The result does not depend on how rows are divided into batches, up to float64 rounding. Memory: three D × D
    matrices.
    """

    image_width: int
    text_width: int

    def __post_init__(self) -> None:
        self.num_rows = 0
        self._sum = np.zeros(self.image_width + self.text_width)
        self._products = np.zeros((len(self._sum), len(self._sum)))

    def add(self, images_BD: npt.NDArray[np.floating], texts_BE: npt.NDArray[np.floating]) -> None:
        """Add aligned rows: two finite arrays of equal length and any float dtype."""
        rows = np.concatenate([images_BD, texts_BE], axis=1, dtype=np.float64)
        check_finite(rows, "the training pairs")
        self.num_rows += len(rows)
        self._sum += rows.sum(axis=0)
        self._products += rows.T @ rows

    @property
    def image_mean(self) -> Matrix:
        """(D,) mean of the image rows."""
        return self._mean[: self.image_width]

    @property
    def text_mean(self) -> Matrix:
        """(E,) mean of the text rows."""
        return self._mean[self.image_width :]

    def covariances(self) -> tuple[Matrix, Matrix, Matrix]:
        """Return the image, text and cross covariance: (D, D), (E, E), (D, E)."""
        if self.num_rows < 2:
            raise DataError(f"expected at least 2 pairs to fit a projector, got {self.num_rows}; add training samples")
        covariance = self._products / self.num_rows - np.outer(self._mean, self._mean)
        image, text = slice(self.image_width), slice(self.image_width, None)
        return covariance[image, image], covariance[text, text], covariance[image, text]

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
    """Solve ridge regression of the text feature on the image feature.

    The image projector is (Sxx + s mean(eig Sxx) I)^-1 Sxy. Both sides are then rotated onto the principal axes of the
    text feature, which changes no cosine unless the shared space is narrower than the text feature.
    """
    image, text, cross = moments.covariances()
    penalty = shrinkage * np.trace(image) / len(image)
    weights = scipy.linalg.solve(image + penalty * np.eye(len(image)), cross, assume_a="pos")
    _, axes = scipy.linalg.eigh(text)
    axes = axes[:, ::-1][:, :width]
    return _pad(weights @ axes, width), _pad(axes, width)


def _procrustes(moments: Moments, width: int, *, shrinkage: float) -> tuple[Matrix, Matrix]:
    """Solve orthogonal Procrustes: the rotation that minimizes the distance of centered images to their texts.

    With U diag(s) V' the singular value decomposition of Sxy, images are rotated by U and texts by V, so that the
    strongest directions come first; U V' is the usual rotation. Schönemann, "A generalized solution of the orthogonal
    Procrustes problem" (1966). The shrinkage is unused.
    """
    del shrinkage
    _, _, cross = moments.covariances()
    left, _, right = scipy.linalg.svd(cross, full_matrices=False)
    rank = min(width, len(right))
    return _pad(left[:, :rank], width), _pad(right[:rank].T, width)


def _canonical(moments: Moments, width: int, *, shrinkage: float, power: float) -> tuple[Matrix, Matrix]:
    image, text, cross = moments.covariances()
    white_image, white_text = _whitener(image, shrinkage), _whitener(text, shrinkage)
    left, correlation, right = scipy.linalg.svd(white_image @ cross @ white_text, full_matrices=False)
    rank = min(width, len(correlation))
    weights = correlation[:rank] ** power
    return (
        _pad(white_image @ left[:, :rank] * weights, width),
        _pad(white_text @ right[:rank].T * weights, width),
    )


def _whitener(covariance: Matrix, shrinkage: float) -> Matrix:
    values, vectors = scipy.linalg.eigh(covariance)
    values = np.maximum(values, 0)
    scaled = vectors / np.sqrt(values + shrinkage * values.mean() + np.finfo(np.float64).tiny)
    whitener: Matrix = scaled @ vectors.T
    return whitener


def _pad(weights: Matrix, width: int) -> Matrix:
    return np.pad(weights, ((0, 0), (0, width - weights.shape[1])))
