"""Transcripts to symbols and back."""

import doctest
from string import ascii_uppercase, digits

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.errors import DataError
from embedcache.networks import transcripts
from embedcache.networks.transcripts import BLANK, END, SYMBOLS, decode_symbols, encode_transcript


def test_docstring_examples() -> None:
    assert doctest.testmod(transcripts).failed == 0


def test_symbols_have_stored_numbers() -> None:
    """Trained heads depend on the order, so it never changes."""
    assert (len(SYMBOLS), BLANK, END) == (40, 0, 39)
    assert encode_transcript(f"{ascii_uppercase}{digits}'").tolist() == list(range(2, 39))
    assert encode_transcript("a a").tolist() == [2, 1, 2]


@given(st.text(ascii_uppercase + ascii_uppercase.lower() + digits + "' \t\n\u2019\u00a0"))
def test_round_trip_normalizes(text: str) -> None:
    numbers = encode_transcript(text)
    assert numbers.dtype == np.int64
    assert numbers.shape == (len(numbers),)
    decoded = decode_symbols(numbers)
    assert decoded == " ".join(text.upper().replace("\u2019", "'").split())
    assert encode_transcript(decoded).tolist() == numbers.tolist()


def test_unknown_characters_are_named() -> None:
    message = "transcript 'Caf\u00e9, 2.5': expected letters .* got ',', '\\.', '\u00c9'; spell them out"
    with pytest.raises(DataError, match=message):
        encode_transcript("Caf\u00e9, 2.5")


def test_decoding_stops_at_end_and_skips_blanks() -> None:
    assert decode_symbols([BLANK, 2, BLANK, 2, 3, END, 4]) == "AAB"
    assert decode_symbols(np.array([], dtype=np.int64)) == ""


@pytest.mark.parametrize("number", [-1, 40])
def test_number_of_no_symbol_raises(number: int) -> None:
    with pytest.raises(DataError, match=f"expected symbols from 0 to 39, got {number}"):
        decode_symbols([2, number])
