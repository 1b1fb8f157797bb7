"""Words as numbers: the network reads and writes texts as the numbers of their words in a list.

Each number has the vector of that word only. A network that reads numbers cannot see features that were computed from a
whole text, which would tell it the words that it has to predict.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Array, Ints, concatenated_ranges, distinct
from embedcache.errors import DataError

BLANK = 0
END = 1
UNKNOWN = 2
"""Numbers that are not words: a word to be predicted, the end of a text, and a word that is not in the list."""
NUM_SPECIAL = 3
BLANK_WORD = "_"
"""The blank in a text."""
Texts: TypeAlias = pa.Array | pa.ChunkedArray | Sequence[str | None]
_SEPARATORS = r"[^\p{L}\p{M}\p{N}_']+"


class WordLists(NamedTuple):
    """The words of N texts, one text after another.

    Args:
        numbers_M: (M,) int32, numbers of words.
        offsets_N: (N + 1,) int64, start of each text in `numbers_M`, and the end of the last one.
    """

    numbers_M: Array
    offsets_N: Ints

    @property
    def num_texts(self) -> int:
        """Number of texts."""
        return len(self.offsets_N) - 1

    def lengths(self) -> Ints:
        """Return the number of words of each text: (N,) int64."""
        return np.diff(self.offsets_N)

    def take(self, rows_B: Ints) -> "WordLists":
        """Return some texts in the given order."""
        counts_B = self.lengths()[rows_B]
        _, positions = concatenated_ranges(self.offsets_N[rows_B], counts_B)
        return WordLists(self.numbers_M[positions], np.concatenate([[0], np.cumsum(counts_B)]))

    def padded(self) -> tuple[Ints, Ints]:
        """Return the words as a batch: (N, L) int64, padded with `END`, and (N,) lengths; L is at least 1."""
        lengths_N = self.lengths()
        longest = max(1, int(lengths_N.max(initial=0)))

        padded_NL = np.full((self.num_texts, longest), END, np.int64)
        padded_NL[np.arange(longest) < lengths_N[:, None]] = self.numbers_M
        return padded_NL, lengths_N


def single_words(numbers_M: Array) -> WordLists:
    """Return texts of one word each: `END`, then the distinct words in the order of their numbers."""
    numbers_C = distinct(np.concatenate([[END], numbers_M])).astype(np.int32)
    return WordLists(numbers_C, np.arange(len(numbers_C) + 1))


def with_blanks(texts: WordLists) -> WordLists:
    """Append a blank to every text without one.

    Raises:
        DataError: a text has several blanks.
    """
    lengths_N = texts.lengths()
    text_M = np.repeat(np.arange(texts.num_texts), lengths_N)
    blanks_N = np.bincount(text_M[texts.numbers_M == BLANK], minlength=texts.num_texts)
    if (blanks_N > 1).any():
        row = int(blanks_N.argmax())
        raise DataError(f"text: expected at most one blank, got {blanks_N[row]} in example {row}")

    ends_N = texts.offsets_N[1:][blanks_N == 0]
    offsets_N = np.concatenate([[0], np.cumsum(lengths_N + (blanks_N == 0))])
    return WordLists(np.insert(texts.numbers_M, ends_N, BLANK), offsets_N)


class Vocabulary:
    """A list of words and their numbers, which start at `NUM_SPECIAL`.

    Args:
        words: distinct words, as from `list_words`.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self._words = pa.array(self.words, pa.string())

    def __len__(self) -> int:
        """Number of words, without blank, end and unknown."""
        return len(self.words)

    def encode(self, texts: Texts) -> WordLists:
        """Return the numbers of the words of texts. A null text has no words.

        A word that is not in the list becomes `UNKNOWN`, and a separate `_` becomes `BLANK`.
        """
        lists = split_words(texts)

        # All words of all texts are looked up together.
        flat = lists.flatten()
        places = pc.fill_null(pc.index_in(flat, value_set=self._words), UNKNOWN - NUM_SPECIAL)

        is_blank_M = pc.equal(flat, BLANK_WORD).to_numpy(zero_copy_only=False)
        numbers_M = np.where(is_blank_M, BLANK, places.to_numpy(zero_copy_only=False) + NUM_SPECIAL)
        return WordLists(numbers_M.astype(np.int32), lists.offsets.to_numpy().astype(np.int64))

    def decode(self, numbers_L: Ints) -> str:
        """Return the text of the numbers before the first `END`; a blank is `_`, an unknown word `?`."""
        special = {BLANK: BLANK_WORD, UNKNOWN: "?"}
        words = []
        for number in np.asarray(numbers_L).tolist():
            if number == END:
                break
            words.append(special[number] if number in special else self.words[number - NUM_SPECIAL])
        return " ".join(words)

    def require_known(self, texts: Sequence[str], what: str) -> WordLists:
        """Return the numbers of the words of candidates, all of which must be in the list.

        Raises:
            DataError: a text has no words, or words that are not in the list.
        """
        lists = self.encode(texts)
        for row, text in enumerate(texts):
            numbers = lists.take(np.array([row])).numbers_M
            if not len(numbers) or UNKNOWN in numbers:
                raise DataError(f"{what}: expected words of the word table, got {text!r}; use other words")
        return lists


def split_words(texts: Texts) -> pa.ListArray:
    """Split texts into words: runs of letters, digits, `_` and apostrophes, in lower case. Null gives no words.

    Example:
        >>> split_words(["A red circle, isn't it?", None]).to_pylist()
        [['a', 'red', 'circle', "isn't", 'it'], []]
    """
    array = texts if isinstance(texts, pa.Array | pa.ChunkedArray) else pa.array(texts, pa.string())
    array = pc.fill_null(array.cast(pa.string()), "")
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array

    spaced = pc.replace_substring_regex(pc.utf8_lower(array), _SEPARATORS, " ")
    lists = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(spaced))

    # An empty text is split into one empty word, which is left out.
    is_word_M = pc.not_equal(lists.flatten(), "").to_numpy(zero_copy_only=False)
    offsets_N = lists.offsets.to_numpy() - lists.offsets[0].as_py()
    num_words_M = np.concatenate([[0], np.cumsum(is_word_M)])
    return pa.ListArray.from_arrays(pa.array(num_words_M[offsets_N], pa.int32()), lists.flatten().filter(is_word_M))


def list_words(texts: Texts) -> list[str]:
    """Return the distinct words of texts for a word table: the most frequent first, then in alphabetical order."""
    counts: Counter[str] = Counter(split_words(texts).flatten().to_pylist())
    del counts[BLANK_WORD]
    return sorted(counts, key=lambda word: (-counts[word], word))
