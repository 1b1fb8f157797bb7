"""Transcripts of speech as sequences of 40 symbols: characters, the blank of CTC, and the end of a transcript.

The order is as in PyTorch's CTC, blank first. The end comes last; an attention decoder also starts from it.
"""

from collections.abc import Iterable
from string import ascii_uppercase, digits

import numpy as np

from embedcache.arrays import Ints
from embedcache.errors import DataError

SYMBOLS: tuple[str, ...] = ("<blank>", " ", *ascii_uppercase, *digits, "'", "<end>")
"""Number of a symbol -> its character, or its name in angle brackets."""
BLANK = 0
END = len(SYMBOLS) - 1

_NUMBERS = {character: number for number, character in enumerate(SYMBOLS) if number not in (BLANK, END)}
_APOSTROPHES = str.maketrans({"\u2019": "'"})


def encode_transcript(text: str) -> Ints:
    """Return the symbols of a transcript: (L,) int64, without an end symbol.

    Letters become upper-case. Whitespace is removed at both ends and becomes one space elsewhere. A typographic
    apostrophe becomes a plain one.

    Raises:
        DataError: a character has no symbol.

    Example:
        >>> encode_transcript(" Bin  at 2").tolist()
        [3, 10, 15, 1, 2, 21, 1, 30]
    """
    characters = " ".join(text.translate(_APOSTROPHES).upper().split())
    unknown = sorted(set(characters) - set(_NUMBERS))
    if unknown:
        raise DataError(
            f"transcript {text!r}: expected letters from A to Z, digits, apostrophes and spaces, got "
            f"{', '.join(map(repr, unknown))}; spell them out or remove them"
        )
    return np.array([_NUMBERS[character] for character in characters], dtype=np.int64)


def decode_symbols(numbers: Iterable[int]) -> str:
    """Return the text of symbols up to the first end symbol, without blanks.

    Repeated symbols stay, because they are letters of a transcript and not frames.

    Raises:
        DataError: a number is not a symbol.

    Example:
        >>> decode_symbols([3, 10, 15, 1, 2, 21, 1, 30, 39])
        'BIN AT 2'
    """
    characters = []
    for number in numbers:
        if not 0 <= number <= END:
            raise DataError(f"expected symbols from 0 to {END}, got {number}")
        if number == END:
            break
        if number != BLANK:
            characters.append(SYMBOLS[number])
    return "".join(characters)
