"""Words as numbers, in Arrow and back."""

import numpy as np
import pyarrow as pa
import pytest

from embedcache.errors import DataError
from pipelines.uniperceiver.words import BLANK, END, NUM_SPECIAL, UNKNOWN, Vocabulary, list_words

WORDS = Vocabulary(["a", "red", "circle", "isn't"])


def test_texts_become_numbers_and_back() -> None:
    lists = WORDS.encode(pa.chunked_array([["A red, RED circle!", None], ["", "isn't _ blue?"]]))
    assert lists.lengths().tolist() == [4, 0, 0, 3]
    assert lists.numbers_M.tolist() == [3, 4, 4, 5, 6, BLANK, UNKNOWN]
    assert lists.numbers_M.dtype == np.int32
    assert WORDS.decode(np.array([3, 4, 5, END, 3])) == "a red circle"
    assert WORDS.decode(lists.take(np.array([3])).numbers_M) == "isn't _ ?"


def test_words_are_listed_by_frequency() -> None:
    assert list_words(["b a", "a _ c", "a b", "d"]) == ["a", "b", "c", "d"]
    assert list_words([]) == []


def test_candidates_need_known_words() -> None:
    assert WORDS.require_known(["red circle"], "classes").numbers_M.tolist() == [NUM_SPECIAL + 1, NUM_SPECIAL + 2]
    with pytest.raises(DataError, match=r"classes: .*'a blue circle'"):
        WORDS.require_known(["red", "a blue circle"], "classes")
    with pytest.raises(DataError, match="answers: .*words"):
        WORDS.require_known(["?"], "answers")
