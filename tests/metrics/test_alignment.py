"""Each figure against its formula with n × n matrices, and against what must not change it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.errors import DataError
from embedcache.metrics import (
    CenteredRows,
    best_ranks,
    cka,
    kernel_products,
    nearest_others,
    neighbor_overlap,
)
from embedcache.neighbors import knn as neighbors


def sides(rows: int, *, seed: int = 0, widths: tuple[int, int] = (7, 6)) -> tuple[np.ndarray, np.ndarray]:
    """Two features that share three directions, off center; no width is 5, see `test_visits_cover_all_neighbors`."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((rows, 3))
    return tuple(  # type: ignore[return-value]
        shared @ rng.standard_normal((3, width)) + rng.standard_normal((rows, width)) + 2 for width in widths
    )


def hsic_by_gram_matrices(x: np.ndarray, y: np.ndarray) -> float:
    n = len(x)
    one, other = (side @ side.T * (1 - np.eye(n)) for side in (x, y))
    ends = one.sum() * other.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ other).sum()
    return float((np.trace(one @ other) + ends) / (n * (n - 3)))


def debiased_by_gram_matrices(x: np.ndarray, y: np.ndarray) -> float:
    squares = hsic_by_gram_matrices(x, x) * hsic_by_gram_matrices(y, y)
    return hsic_by_gram_matrices(x, y) / float(np.sqrt(squares))


def debiased_cka(x: np.ndarray, y: np.ndarray) -> float:
    pairs = ((x, y), (x, x), (y, y))
    return float(cka(*(kernel_products(CenteredRows(a), CenteredRows(b)) for a, b in pairs))[0])


def mutual_knn(x: np.ndarray, y: np.ndarray, k: int) -> float:
    return float(neighbor_overlap(nearest_others(x, k), nearest_others(y, k)).mean())


@given(st.integers(8, 40), st.integers(1, 50), st.integers(1, 50), st.integers(0, 1000))
def test_cka_matches_gram_matrices(rows: int, width: int, other: int, seed: int) -> None:
    x, y = sides(rows, seed=seed, widths=(width, other))
    try:
        found = debiased_cka(x, y)
    except DataError:  # an unbiased estimate of a square may be below 0
        assert min(hsic_by_gram_matrices(x, x), hsic_by_gram_matrices(y, y)) < 1e-9
    else:
        assert found == pytest.approx(debiased_by_gram_matrices(x, y), abs=1e-8)


@pytest.mark.parametrize(("metric", "shift"), [(debiased_cka, 100), (lambda x, y: mutual_knn(x, y, 5), 0)])
def test_metrics_are_symmetric_and_ignore_rotation_and_scale(metric, shift) -> None:  # type: ignore[no-untyped-def]
    x, y = sides(60)
    assert metric(x, x) == pytest.approx(1)
    assert metric(x, y) == pytest.approx(metric(y, x))
    assert metric(x, y) < 0.9
    turn, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((7, 7)))
    assert metric(3 * x @ turn + shift, y) == pytest.approx(metric(x, y), abs=1e-9)


def test_debiased_cka_of_independent_features() -> None:
    rng = np.random.default_rng(0)
    drawn = [(rng.standard_normal((100, 300)), rng.standard_normal((100, 200))) for _ in range(20)]
    assert abs(np.mean([debiased_cka(x, y) for x, y in drawn])) < 0.01


@pytest.mark.slow
@given(st.integers(2, 30), st.data(), st.integers(1, 40))
def test_mutual_knn_matches_loop(rows: int, data: st.DataObject, tile_bytes: int) -> None:
    k = data.draw(st.integers(1, rows - 1))
    x, y = sides(rows, seed=rows)
    expected = []
    for side in (x, y):
        unit = side / np.linalg.norm(side, axis=1, keepdims=True)
        order = np.argsort(-(unit @ unit.T) + 9 * np.eye(rows), axis=1)
        expected.append([set(row[:k].tolist()) for row in order])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbors, "_TILE", tile_bytes)  # any tiling gives the same
        found = nearest_others(x, k), nearest_others(y, k)
    assert [set(row.tolist()) for row in found[0]] == expected[0]
    shares = [len(one & other) / k for one, other in zip(*expected, strict=True)]
    np.testing.assert_allclose(neighbor_overlap(*found), shares)
    assert mutual_knn(x, y, k) == pytest.approx(np.mean(shares))


def test_given_products_are_used() -> None:
    def opposite(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return -(left @ right.T)

    rows = np.random.default_rng(0).standard_normal((30, 8)).astype(np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert nearest_others(rows, 1, products=opposite)[:, 0].tolist() == (unit @ unit.T).argmin(axis=1).tolist()
    own = np.arange(30)
    assert (best_ranks(unit, unit, (own, own)) == 1).all()
    assert (best_ranks(unit, unit, (own, own), products=opposite) == 30).all()


@pytest.mark.slow
@given(st.integers(2, 5), st.integers(0, 100))
def test_cka_without_each_block(num_blocks: int, seed: int) -> None:
    x, y = sides(40, seed=seed)
    block_N = np.random.default_rng(seed).permutation(np.arange(40) % num_blocks)
    one, other = CenteredRows(x, block_N), CenteredRows(y, block_N)
    xy, xx, yy = kernel_products(one, other), kernel_products(one, one), kernel_products(other, other)
    kept = [np.ones(40, bool), *(block_N != block for block in range(num_blocks))]
    expected = [debiased_by_gram_matrices(x[rows], y[rows]) for rows in kept]
    np.testing.assert_allclose(cka(xy, xx, yy), expected, atol=1e-8)


def test_invalid_input_raises() -> None:
    x, y = sides(20)
    with pytest.raises(DataError, match="at least 4 rows to compare, got 3"):
        debiased_cka(x[:3], y[:3])
    for equal in (0.0, 0.1):
        with pytest.raises(DataError, match="got equal rows"):
            debiased_cka(np.full((20, 3), equal), y)
    one, zero = np.ones(1), np.zeros(1)
    for squares in ((one, zero), (zero, one)):
        with pytest.raises(DataError, match="expected an unbiased HSIC above 0"):
            cka(one, *squares)
    with pytest.raises(DataError, match="at least 4 rows to compare, got 3"):
        CenteredRows(x[:8], np.repeat([0, 1], [5, 3]))
    with pytest.raises(DataError, match="NaN or infinity in 1 of 20 rows"):
        mutual_knn(np.where(np.arange(20)[:, None] == 3, np.nan, x), y, 3)
    for k in (0, 20):
        with pytest.raises(DataError, match=f"from 1 to 19 for 20 rows, got {k}"):
            mutual_knn(x, y, k)
