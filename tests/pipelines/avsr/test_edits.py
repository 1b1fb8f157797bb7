"""Errors of words: how many, and which word of the reference each belongs to."""

import doctest

import jiwer
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.errors import DataError
from pipelines.avsr import edits
from pipelines.avsr.edits import count_word_errors

WORDS = st.lists(st.sampled_from(["A", "BE", "C"]), max_size=9)


def test_docstring_examples() -> None:
    assert doctest.testmod(edits).failed == 0


@pytest.mark.parametrize(
    ("hypothesis", "errors"),
    [
        ("A B C", [0, 0, 0]),
        ("A D C", [0, 1, 0]),
        ("A C", [0, 1, 0]),
        ("A X Y B C", [2, 0, 0]),
        ("X A B C Y", [1, 0, 1]),
        ("", [1, 1, 1]),
    ],
)
def test_errors_belong_to_words(hypothesis: str, errors: list[int]) -> None:
    assert count_word_errors(["A", "A B C"], ["A", hypothesis]).tolist() == [0, *errors]


@given(st.lists(st.tuples(WORDS.filter(bool), WORDS), min_size=1, max_size=5))
def test_rates_equal_jiwer(texts: list[tuple[list[str], list[str]]]) -> None:
    references = [" ".join(said) for said, _ in texts]
    hypotheses = [" ".join(heard) for _, heard in texts]
    assert count_word_errors(references, hypotheses).mean() == pytest.approx(jiwer.wer(references, hypotheses))


def test_references_without_words_raise() -> None:
    with pytest.raises(DataError):
        count_word_errors(["A", " "], ["A", "B"])
