import numpy as np
import pyarrow as pa

from embedcache.store.tables import Column, is_none, to_array


def test_column_is_a_sequence() -> None:
    values = ["a", None, "b", "a"]
    column = Column[str | None](pa.array(values))
    assert column == values
    assert column != values[1:]
    assert (column[1], column[2], column[1:3]) == (None, "b", [None, "b"])
    assert (len(column), column.count("a"), "b" in column, "c" in column) == (4, 2, True, False)
    nothing = Column[str | None](pa.array([None], pa.string()))
    assert (column.count("c"), nothing.count("a"), "a" in nothing, nothing == "a") == (0, 0, False, False)
    assert column != dict.fromkeys(values)
    for array in (pa.array(values), pa.chunked_array([values[:1], values[1:]])):
        for kind in (pa.string(), pa.large_string()):
            assert to_array(Column(array), kind).equals(pa.array(values, kind))
    assert is_none(column).tolist() == is_none(values).tolist() == [False, True, False, False]
    assert to_array(column, pa.string()).equals(to_array(values, pa.string()))
    assert np.array(Column(pa.array([1, 2]))).tolist() == [1, 2]
