"""Words as numbers, in Arrow and back."""

import numpy as np
import pyarrow as pa
import pytest

from embedcache.errors import DataError
from embedcache.networks.words import BLANK, END, NUM_SPECIAL, UNKNOWN, Vocabulary, list_words, split_words

WORDS = Vocabulary(["a", "red", "circle", "isn't"])


def test_texts_become_numbers_and_back() -> None:
    lists = WORDS.encode(pa.chunked_array([["A red, RED circle!", None], ["", "isn't _ blue?"]]))
    assert lists.lengths().tolist() == [4, 0, 0, 3]
    assert lists.numbers_M.tolist() == [3, 4, 4, 5, 6, BLANK, UNKNOWN]
    assert lists.numbers_M.dtype == np.int32
    assert WORDS.decode(np.array([3, 4, 5, END, 3])) == "a red circle"
    assert WORDS.decode(lists.take(np.array([3])).numbers_M) == "isn't _ ?"


def test_texts_are_taken_in_any_order_and_padded() -> None:
    lists = WORDS.encode(["a", "red circle", ""]).take(np.array([1, 2, 0, 1]))
    padded, lengths = lists.padded()
    assert padded.tolist() == [[4, 5], [END, END], [3, END], [4, 5]]
    assert lengths.tolist() == [2, 0, 1, 2]
    assert WORDS.encode(["", None]).padded()[0].shape == (2, 1)


def test_a_sliced_array_is_split_like_a_copy() -> None:
    texts = pa.array(["one", "two words", " ", "three more words"])
    assert split_words(texts[1:]).to_pylist() == [["two", "words"], [], ["three", "more", "words"]]


def test_blocks_of_texts_are_encoded_and_counted_like_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a red circle", None, "", "isn't it", "a", "red a", "circle"]
    expected, listed = WORDS.encode(texts), list_words(texts)
    monkeypatch.setattr("embedcache.networks.words._TEXTS_PER_BLOCK", 2)
    for given in (texts, pa.array(texts), pa.chunked_array([texts[:3], texts[3:]])):
        found = WORDS.encode(given)
        np.testing.assert_array_equal(found.numbers_M, expected.numbers_M)
        np.testing.assert_array_equal(found.offsets_N, expected.offsets_N)
        assert list_words(given) == listed == ["a", "circle", "red", "isn't", "it"]


def test_words_are_listed_by_frequency() -> None:
    assert list_words(["b a", "a _ c"], ["a b", "d"]) == ["a", "b", "c", "d"]
    assert list_words([]) == []


@pytest.mark.parametrize("words", [["a", "a"], ["Red"], ["two words"], [""], ["_"]])
def test_lists_of_other_than_distinct_words_are_refused(words: list[str]) -> None:
    with pytest.raises(DataError, match="expected"):
        Vocabulary(words)


def test_candidates_need_known_words() -> None:
    assert WORDS.require_known(["red circle"], "classes").numbers_M.tolist() == [NUM_SPECIAL + 1, NUM_SPECIAL + 2]
    with pytest.raises(DataError, match=r"classes: .*'blue' in 'a blue circle'"):
        WORDS.require_known(["red", "a blue circle"], "classes")
    with pytest.raises(DataError, match="texts with words"):
        WORDS.require_known(["?"], "answers")


def test_a_text_too_long_for_attention_is_named() -> None:
    vocabulary = Vocabulary(["a", "b"])
    assert vocabulary.encode(["a", "b " * 1024]).lengths().tolist() == [1, 1024]
    with pytest.raises(DataError, match=r"expected at most 1,024 words, got 1,025 in the one that begins 'b a a a"):
        vocabulary.encode(["a", None, "b" + " a" * 1024])
