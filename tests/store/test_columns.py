import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from embedcache.provenance import canonical_json
from embedcache.store.columns import HASH, Column, hashes_json, is_missing, number_contents, strings_json, to_array

_OFTEN = [b"a" * 16, b"a" * 8 + b"b" * 8, b"b" * 16, bytes(16)]
HASHES = st.lists(st.none() | st.binary(min_size=16, max_size=16) | st.sampled_from(_OFTEN))


@given(HASHES, st.integers(0, 3))
def test_hashes_are_written_and_numbered_as_python_objects(values: list[bytes | None], skipped: int) -> None:
    array = pa.array([b"x" * 16] * skipped + values, HASH).slice(skipped)
    assert hashes_json(array) == canonical_json([None if value is None else value.hex() for value in values])
    numbers: dict[bytes | None, int] = {}
    expected = [numbers.setdefault(value, len(numbers)) for value in values]
    assert number_contents(array).tolist() == expected
    assert number_contents(pa.chunked_array([array[:2], array[2:]])).tolist() == expected


@given(st.lists(st.none() | st.text()))
def test_reasons_are_written_as_python_objects(values: list[str | None]) -> None:
    try:
        expected = canonical_json(values)
    except UnicodeEncodeError:  # a lone surrogate is no text
        return
    assert strings_json(pa.array(values, pa.string())) == expected


def test_column_is_a_sequence() -> None:
    values = ["a", None, "b", "a"]
    column = Column[str | None](pa.array(values))
    assert column == values
    assert column != values[1:]
    assert (column[1], column[2], column[1:3]) == (None, "b", [None, "b"])
    assert (len(column), column.count("a"), "b" in column, "c" in column) == (4, 2, True, False)
    assert is_missing(column).tolist() == is_missing(values).tolist() == [False, True, False, False]
    assert to_array(column, pa.string()).equals(to_array(values, pa.string()))
    assert np.array(Column(pa.array([1, 2]))).tolist() == [1, 2]


@given(st.lists(st.none() | st.text(alphabet="ab"), max_size=9))
def test_sparse_column_equals_dense(values: list[str | None]) -> None:
    places = np.flatnonzero([value is not None for value in values])
    kept = pa.array([value for value in values if value is not None], pa.string())
    column, dense = (
        Column[str | None].sparse(len(values), places, kept),
        Column[str | None](pa.array(values, pa.string())),
    )
    assert [column[number] for number in range(len(values))] == values
    assert column[1:3] == values[1:3]
    assert list(column) == values
    assert is_missing(column).tolist() == is_missing(values).tolist()
    assert ("a" in column, "c" in column, None in column) == ("a" in values, False, None in dense)
    for one in (column, dense):
        found, texts = one.present()
        assert found.tolist() == places.tolist()
        assert texts.equals(kept)
