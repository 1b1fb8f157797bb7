"""Hashes of items as Arrow arrays."""

import pyarrow as pa
from hypothesis import example, given
from hypothesis import strategies as st

from embedcache.store.hashes import HASH, number_contents

_OFTEN = [b"a" * 16, b"a" * 8 + b"b" * 8, b"b" * 16, bytes(16)]
HASHES = st.lists(st.none() | st.binary(min_size=16, max_size=16) | st.sampled_from(_OFTEN))


@given(HASHES, st.integers(0, 3))
@example([_OFTEN[1], _OFTEN[0], None, _OFTEN[1], _OFTEN[2], _OFTEN[1], _OFTEN[3], _OFTEN[2], None, _OFTEN[0]], 2)
@example([_OFTEN[0], _OFTEN[1], _OFTEN[0]], 0)
@example([_OFTEN[1], _OFTEN[2], _OFTEN[1]], 0)
def test_contents_are_numbered_as_python_objects(values: list[bytes | None], skipped: int) -> None:
    array = pa.array([b"x" * 16] * skipped + values, HASH).slice(skipped)
    numbers: dict[bytes | None, int] = {}
    expected = [numbers.setdefault(value, len(numbers)) for value in values]
    assert number_contents(array).tolist() == expected
    assert number_contents(pa.chunked_array([array[:2], array[2:]])).tolist() == expected
