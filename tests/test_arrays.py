import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.arrays import (
    blocks,
    check_finite,
    distinct,
    fit_integers,
    from_sort_keys,
    normalize,
    to_numbers,
    to_sort_keys,
)
from embedcache.errors import DataError


@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1.0, 1e15])
def test_normalize_rows_of_any_length(scale: float) -> None:
    directions_ND = np.random.default_rng(0).uniform(-1, 1, (3, 8)).astype(np.float32)
    unit_ND = normalize(np.concatenate([directions_ND * np.float32(scale), np.zeros((1, 8), np.float32)]))
    np.testing.assert_allclose(unit_ND[:3], normalize(directions_ND), atol=2e-7)
    np.testing.assert_allclose(np.linalg.norm(unit_ND, axis=1), [1, 1, 1, 0], atol=1e-6)
    assert normalize(np.array([3.0, 4.0])).tolist() == pytest.approx([0.6, 0.8])
    assert np.isnan(normalize(np.array([[np.nan, 1]]))).all()


def test_check_finite_names_row() -> None:
    values = np.ones((4, 2))
    check_finite(values, "x")
    values[2, 1] = np.nan
    with pytest.raises(DataError, match="lite/cls holds NaN or infinity in 1 of 4 rows, first row 2"):
        check_finite(values, "lite/cls")


@given(st.integers(0, 50), st.integers(1, 20))
def test_blocks_cover_all_rows(num_rows: int, size: int) -> None:
    rows = [row for block in blocks(num_rows, size) for row in range(block.start, block.stop)]
    assert rows == list(range(num_rows))


@given(st.lists(st.integers(-3, 3), max_size=9), st.sampled_from([np.int64, np.uint8, np.float32, np.bool_]))
def test_distinct_values_are_those_of_numpy(values: list[int], dtype: type) -> None:
    array = np.array(values).astype(dtype)
    found = distinct(array)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.unique(array))


SCORES = st.floats(-1, 1, width=32) | st.floats(width=32, allow_nan=False)  # cosines, and scores of any table


@given(st.lists(st.tuples(SCORES, st.integers(0, 2**32 - 1)), min_size=1, max_size=20))
def test_keys_sort_by_score_then_number(pairs: list[tuple[float, int]]) -> None:
    scores, numbers = np.array([score for score, _ in pairs], np.float32), np.array([number for _, number in pairs])
    keys = to_sort_keys(scores, numbers)
    by_key = sorted(range(len(pairs)), key=lambda row: -keys[row])
    assert [pairs[row] for row in by_key] == sorted(pairs, key=lambda pair: (-pair[0], pair[1]))
    found_scores, found_numbers = from_sort_keys(keys)
    assert np.array_equal(found_scores, scores)
    assert np.array_equal(found_numbers, numbers)


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64"])
@pytest.mark.parametrize("given", ["float16", "float32", "float64", "int8", "uint16", "int32", "int64", "uint64"])
def test_integers_that_fit_are_those_of_python(dtype: str, given: str) -> None:
    """At the limits, which lower precisions round to numbers beyond them."""
    limits, edges = np.iinfo(dtype), [0, 2**15, 2**31, 2**63]
    numbers = [sign * edge + step for edge in edges for sign in (1, -1) for step in (-1, 0, 1)]
    with np.errstate(over="ignore"):
        values = np.array([number for number in numbers if given[0] == "f" or _holds(given, number)], given)
    if given[0] == "f":
        values = np.append(values, np.array([0.5, np.nan, np.inf, -np.inf], given))
    expected = [float(value).is_integer() and limits.min <= int(value) <= limits.max for value in values]
    assert fit_integers(values, dtype).tolist() == expected


def _holds(dtype: str, number: int) -> bool:
    return bool(np.iinfo(dtype).min <= number <= np.iinfo(dtype).max)


@pytest.mark.parametrize("wrong", [None, "1", 2**70])
def test_values_that_are_no_numbers_raise(wrong: object) -> None:
    with pytest.raises(DataError, match="vectors: expected floating-point numbers or integers of 64 bits, got "):
        to_numbers([[0.5, 2], [wrong, 3]], "vectors")
