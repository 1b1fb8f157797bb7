"""How alike two features of the same rows are. Linear kernels, in the features' own space: no n × n matrix is made.

The letters: x is (N, D) and y is (N, E), row i of both is the same sample.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from embedcache.arrays import Array, Ints, check_finite, normalize
from embedcache.errors import DataError
from embedcache.metrics.neighbors import top_k

Doubles = npt.NDArray[np.float64]

_ROUNDING = 1e-24  # of float64, squared


def linear_cka(x_ND: Array, y_NE: Array) -> float:
    """Linear centered kernel alignment, from 0 to 1.

    ‖X'Y‖² / (‖X'X‖ ‖Y'Y‖) of centered columns, Frobenius norms: "Similarity of Neural Network Representations
    Revisited" (ICML 2019). It grows with D / N even where the sides have nothing in common: `shuffled_cka`
    says how far. Memory: both in float64, and three D × D matrices.

    Raises:
        DataError: fewer than four rows, unequal numbers of them, a row that is no number, or rows that are all equal.
    """
    return float(cka(*(products(*sides).biased for sides in _sides(x_ND, y_NE)))[0])


def debiased_cka(x_ND: Array, y_NE: Array) -> float:
    """Linear CKA from unbiased estimates of each HSIC: about 0 for independent sides at any width, and at most 1.

    HSIC is estimator HSIC_1 of "Feature Selection via Dependence Maximization" (JMLR 2012); it may fall
    below 0. Memory and errors: those of `linear_cka`.
    """
    return float(cka(*(products(*sides).unbiased for sides in _sides(x_ND, y_NE)))[0])


def shuffled_cka(x_ND: Array, y_NE: Array) -> float:
    """Linear CKA that is to be expected once the rows of one side are shuffled.

    With centered Gram matrices K and L, the mean of tr(K P L P') over all permutations P is tr K tr L / (N - 1), so
    this is exact. Errors: those of `linear_cka`.
    """
    (x, y), (_, _), (_, _) = _sides(x_ND, y_NE)
    return shuffled(x, y, products(x, x), products(y, y))


def mutual_knn(x_ND: Array, y_NE: Array, k: int) -> float:
    """Share of each row's k nearest neighbors that both sides agree on, averaged over rows; chance is k / (N - 1).

    Cosine, the row itself left out: "The Platonic Representation Hypothesis" (ICML 2024).

    Raises:
        DataError: k is not below the number of rows, unequal numbers of rows, or a row that is no number.
    """
    _check_paired(x_ND, y_NE)
    return float(neighbor_overlap(nearest_others(x_ND, k), nearest_others(y_NE, k)).mean())


def nearest_others(rows_ND: Array, k: int) -> Ints:
    """Find the k nearest other rows of each row by cosine: (N, K) int64. Memory: that of `top_k`.

    Raises:
        DataError: k is not from 1 to N - 1, or a row is no number.
    """
    num_rows = len(rows_ND)
    if not 0 < k < num_rows:
        raise DataError(f"k is {k}, and each of {num_rows} rows has {num_rows - 1} others; take k from 1 to that")
    check_finite(rows_ND, "the rows")
    unit_ND = normalize(rows_ND)
    return top_k(unit_ND, unit_ND, k, exclude_self=True)[0]


def neighbor_overlap(one_NK: Ints, other_NK: Ints) -> Doubles:
    """Share of neighbors in common, row by row: two (N, K) of row numbers -> (N,) float64."""
    num_rows, k = one_NK.shape
    ids = np.concatenate([one_NK, other_NK], axis=1)
    ids.sort(axis=1)  # no side holds a number twice, so equal neighbors are one of each side
    overlap_N: Doubles = (ids[:, 1:] == ids[:, :-1]).sum(axis=1).reshape(num_rows) / k
    return overlap_N


class Blocked:
    """Rows made ready to be compared with others, whole and without each of some blocks.

    Args:
        rows: (N, D) any float; kept as float64, centered.
        block_N: (N,) int64, the block of each row, from 0; None: there are no blocks.

    Raises:
        DataError: fewer than four rows once any block is left out, a row that is no number, or rows that are all equal.
    """

    def __init__(self, rows: Array, block_N: Ints | None = None) -> None:
        check_finite(rows, "the rows")
        block_N = np.zeros(0, np.int64) if block_N is None else block_N
        order = np.argsort(block_N, kind="stable") if len(block_N) else slice(None)
        sizes = np.bincount(block_N)
        self.num_rows = np.concatenate([[len(rows)], len(rows) - sizes])
        if self.num_rows.min() < 4:
            raise DataError(f"{self.num_rows.min()} rows are too few to compare; at least 4 are needed")
        self.rows_ND: Doubles = np.asarray(rows, np.float64)[order]
        mean_D = self.rows_ND.mean(axis=0)
        self.rows_ND = self.rows_ND - mean_D
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        self.slices = [slice(0, 0), *(slice(*pair) for pair in pairwise(bounds.tolist()))]
        self.sums_GD = -np.stack([self.rows_ND[left_out].sum(axis=0) for left_out in self.slices])
        self.squares_N: Doubles = np.einsum("nd,nd->n", self.rows_ND, self.rows_ND)
        if self.squares_N.sum() <= _ROUNDING * np.vdot(mean_D, mean_D) * len(rows):
            raise DataError("the rows are all equal; there is nothing to compare")
        self.others_NG: Doubles = self.rows_ND @ self.sums_GD.T - self.squares_N[:, None]


@dataclass(frozen=True)
class Products:
    """Inner products of two centered kernels, HSIC up to one factor: of all rows first, then without each block.

    Args:
        biased: (1 + G,) float64.
        unbiased: (1 + G,) float64.
    """

    biased: Doubles
    unbiased: Doubles


def products(x: Blocked, y: Blocked) -> Products:
    """Compare two sides that are cut into the same blocks. Memory: two D × E matrices."""
    total_DE = x.rows_ND.T @ y.rows_ND
    found = [_products_without(x, y, number, total_DE) for number in range(len(x.slices))]
    biased, unbiased = np.array(found).T
    return Products(biased, unbiased)


def cka(xy: Doubles, xx: Doubles, yy: Doubles) -> Doubles:
    """Give CKA from the products of both sides, and of each with itself: three (M,) -> (M,).

    Raises:
        DataError: a product of a side with itself is not above 0.
    """
    if min(xx.min(), yy.min()) <= 0:
        raise DataError("one side's rows are so few, or so alike, that its unbiased HSIC is not above 0: no CKA")
    ratio_M: Doubles = xy / np.sqrt(xx * yy)
    return ratio_M


def shuffled(x: Blocked, y: Blocked, xx: Products, yy: Products) -> float:
    """Give what `shuffled_cka` does, of sides that are ready."""
    traces = x.squares_N.sum() * y.squares_N.sum() / (len(x.squares_N) - 1) ** 3  # on the scale of `Products`
    return float(cka(np.array([traces]), xx.biased[:1], yy.biased[:1])[0])


def _products_without(x: Blocked, y: Blocked, number: int, total_DE: Doubles) -> tuple[float, float]:
    """Give the biased and the unbiased product once a block is left out; both are turned to the same scale."""
    left_out, n = x.slices[number], int(x.num_rows[number])
    cross_DE = total_DE - x.rows_ND[left_out].T @ y.rows_ND[left_out]
    kept = np.ones(len(x.squares_N), bool)
    kept[left_out] = False
    diagonal = float(x.squares_N[kept] @ y.squares_N[kept])
    others_x, others_y = x.others_NG[kept, number], y.others_NG[kept, number]
    unbiased = (
        np.vdot(cross_DE, cross_DE)
        - diagonal
        + others_x.sum() * others_y.sum() / ((n - 1) * (n - 2))
        - 2 * (others_x @ others_y) / (n - 2)
    ) / (n * (n - 3))
    cross_DE -= np.outer(x.sums_GD[number], y.sums_GD[number] / n)
    return float(np.vdot(cross_DE, cross_DE)) / (n - 1) ** 2, float(unbiased)


def _sides(x_ND: Array, y_NE: Array) -> list[tuple[Blocked, Blocked]]:
    """Give the three pairs of sides whose products CKA is made of."""
    _check_paired(x_ND, y_NE)
    x, y = Blocked(x_ND), Blocked(y_NE)
    return [(x, y), (x, x), (y, y)]


def _check_paired(x_ND: Array, y_NE: Array) -> None:
    if len(x_ND) != len(y_NE):
        raise DataError(f"{len(x_ND)} rows on one side and {len(y_NE)} on the other; give both of the same samples")
