"""How alike two features are: debiased CKA with a linear kernel and mutual nearest neighbors.

x is (N, D) and y is (N, E); row i of both is the same sample. No N × N matrix is made.
"""

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from embedcache.arrays import Array, Ints, Products, check_finite, dot_products, normalize
from embedcache.errors import DataError
from embedcache.neighbors.knn import knn

Doubles = npt.NDArray[np.float64]

_ROUNDING = 1e-24  # of float64, squared


def nearest_others(rows_ND: Array, k: int, *, products: Products = dot_products) -> Ints:
    """Find the k nearest other rows of each row by cosine: (N, K) int64. Memory and `products`: those of `knn`.

    The mean overlap of the neighbors by two features is mutual kNN, whose chance level is k / (N - 1): "The Platonic
    Representation Hypothesis" (ICML 2024).
    """
    num_rows = len(rows_ND)
    if not 0 < k < num_rows:
        raise DataError(f"k: expected a number from 1 to {num_rows - 1} for {num_rows} rows, got {k}")
    check_finite(rows_ND, "the rows")
    unit_ND = normalize(rows_ND)
    return knn(unit_ND, unit_ND, k, own=np.arange(num_rows), products=products)[0]


def neighbor_overlap(first_NK: Ints, second_NK: Ints) -> Doubles:
    """Return the fraction of common neighbors of each row: two (N, K) of row indices -> (N,) float64."""
    num_rows, k = first_NK.shape
    ids = np.concatenate([first_NK, second_NK], axis=1)
    ids.sort(axis=1)  # neighbors of one feature are distinct, so equal indices come from both
    overlap_N: Doubles = (ids[:, 1:] == ids[:, :-1]).sum(axis=1).reshape(num_rows) / k
    return overlap_N


class CenteredRows:
    """Centered rows with the sums that products need, of all rows and without each block of rows.

    Args:
        rows: (N, D) any float; stored centered, as float64.
        block_N: (N,) int64, block of each row, from 0; None: no blocks.
    """

    def __init__(self, rows: Array, block_N: Ints | None = None) -> None:
        check_finite(rows, "the rows")
        block_N = np.zeros(0, np.int64) if block_N is None else block_N
        order = np.argsort(block_N, kind="stable") if len(block_N) else slice(None)
        sizes = np.bincount(block_N)
        self.num_rows = np.concatenate([[len(rows)], len(rows) - sizes])
        if self.num_rows.min() < 4:
            raise DataError(f"expected at least 4 rows to compare, got {self.num_rows.min()}")
        self.rows_ND: Doubles = np.asarray(rows, np.float64)[order]
        mean_D = self.rows_ND.mean(axis=0)
        self.rows_ND = self.rows_ND - mean_D
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        self.slices = [slice(0, 0), *(slice(*pair) for pair in pairwise(bounds.tolist()))]
        sums_GD = -np.stack([self.rows_ND[left_out].sum(axis=0) for left_out in self.slices])
        self.squares_N: Doubles = np.einsum("nd,nd->n", self.rows_ND, self.rows_ND)
        if self.squares_N.sum() <= _ROUNDING * np.vdot(mean_D, mean_D) * len(rows):
            raise DataError("expected rows that differ, got equal rows")
        self.others_NG: Doubles = self.rows_ND @ sums_GD.T - self.squares_N[:, None]


def kernel_products(x: CenteredRows, y: CenteredRows) -> Doubles:
    """Compute unbiased HSIC of two features, with the same blocks, of all rows and without each block: (1 + G,).

    Of linear kernels, by HSIC_1 of "Feature Selection via Dependence Maximization" (JMLR 2012): about 0 for independent
    features, and perhaps below. Memory: two D × E matrices.
    """
    total_DE = x.rows_ND.T @ y.rows_ND
    return np.array([_product_without(x, y, number, total_DE) for number in range(len(x.slices))])


def cka(xy: Doubles, xx: Doubles, yy: Doubles) -> Doubles:
    """Compute debiased linear CKA from the products of both features and of each with itself: three (M,) -> (M,)."""
    if min(xx.min(), yy.min()) <= 0:
        raise DataError("CKA: expected an unbiased HSIC above 0, got a feature of too few or too similar rows")
    ratio_M: Doubles = xy / np.sqrt(xx * yy)
    return ratio_M


def _product_without(x: CenteredRows, y: CenteredRows, number: int, total_DE: Doubles) -> float:
    left_out, n = x.slices[number], int(x.num_rows[number])
    cross_DE = total_DE - x.rows_ND[left_out].T @ y.rows_ND[left_out]
    is_kept_N = np.ones(len(x.squares_N), bool)
    is_kept_N[left_out] = False
    diagonal = float(x.squares_N[is_kept_N] @ y.squares_N[is_kept_N])
    others_x, others_y = x.others_NG[is_kept_N, number], y.others_NG[is_kept_N, number]
    product = (
        np.vdot(cross_DE, cross_DE)
        - diagonal
        + others_x.sum() * others_y.sum() / ((n - 1) * (n - 2))
        - 2 * (others_x @ others_y) / (n - 2)
    )
    return float(product) / (n * (n - 3))
