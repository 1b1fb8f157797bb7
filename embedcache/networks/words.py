"""Words as numbers: what a network reads and writes of texts is the number of each word in a list.

Behind each number stands a vector of that word alone. A network that reads numbers cannot see features that were
computed from a whole text, which would tell it the words that it is to predict.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Array, Ints, concatenated_ranges, distinct
from embedcache.errors import DataError

BLANK, END, UNKNOWN = 0, 1, 2
"""Numbers that are no words: a word to be predicted, the end of a text, and a word that the list does not have."""
NUM_SPECIAL = 3
BLANK_WORD = "_"
"""What stands for a blank in a text."""
_SEPARATORS = r"[^\p{L}\p{M}\p{N}_']+"
_TEXTS_PER_BLOCK = 1_000_000
_MAX_WORDS = 1024


class WordLists(NamedTuple):
    """The words of N texts, one text after another.

    Args:
        numbers_M: (M,) int32, numbers of words.
        offsets_N: (N + 1,) int64, where each text begins in `numbers_M`, and the end of the last one.
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
        padded_NL = np.full((self.num_texts, max(1, int(lengths_N.max(initial=0)))), END, np.int64)
        padded_NL[np.arange(padded_NL.shape[1]) < lengths_N[:, None]] = self.numbers_M
        return padded_NL, lengths_N


def single_words(numbers_M: Array) -> WordLists:
    """Return texts of one word each: `END`, then the distinct words in the order of their numbers."""
    numbers_C = distinct(np.concatenate([[END], numbers_M])).astype(np.int32)
    return WordLists(numbers_C, np.arange(len(numbers_C) + 1))


class Vocabulary:
    """A list of words and their numbers, which begin at `NUM_SPECIAL`.

    Args:
        words: different words, as `split_words` returns them.

    Raises:
        DataError: a word twice, or one that `split_words` would change.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self._words = pa.array(self.words, pa.large_string())
        if len(set(self.words)) < len(self.words):
            counts = pc.value_counts(self._words).to_pylist()
            twice = next(entry["values"] for entry in counts if entry["counts"] > 1)
            raise DataError(f"words: expected each word once, got {twice!r} twice; list distinct words")
        split = split_words(self._words)
        bad = np.flatnonzero(np.diff(split.offsets.to_numpy()) != 1)
        if not len(bad):
            bad = np.flatnonzero(pc.not_equal(split.flatten(), self._words).to_numpy(zero_copy_only=False))
        if len(bad) or BLANK_WORD in self.words:
            shown = self.words[bad[0]] if len(bad) else BLANK_WORD
            raise DataError(f"words: expected single words in lower case, got {shown!r}; make the list by list_words")

    def __len__(self) -> int:
        """Number of words, without blank, end and unknown."""
        return len(self.words)

    def encode(self, texts: pa.Array | pa.ChunkedArray | Sequence[str | None]) -> WordLists:
        """Return the numbers of the words of texts. A text that is null has none.

        A word that is not listed becomes `UNKNOWN`; `_` alone becomes `BLANK`. Runs in Arrow, without a Python object
        per text. Memory: the numbers, and a million texts as words.

        Raises `DataError` for a text of more than 1,024 words: attention takes memory by the square of their number.
        """
        lists = [self._encode(block) for block in _blocks(texts)]
        lengths_N = np.concatenate([block.lengths() for block in lists])
        return WordLists(
            np.concatenate([block.numbers_M for block in lists]), np.concatenate([[0], np.cumsum(lengths_N)])
        )

    def _encode(self, texts: pa.Array | pa.ChunkedArray) -> WordLists:
        lists = split_words(texts)
        offsets_N = lists.offsets.to_numpy().astype(np.int64)
        longest = int(np.diff(offsets_N).argmax()) if len(texts) else 0
        if len(texts) and (count := int(offsets_N[longest + 1] - offsets_N[longest])) > _MAX_WORDS:
            raise DataError(
                f"texts: expected at most {_MAX_WORDS:,} words, got {count:,} in the one that begins "
                f"{texts[longest].as_py()[:40]!r}; shorten it, or leave it out"
            )
        flat = lists.flatten()
        found = pc.fill_null(pc.index_in(flat, value_set=self._words), UNKNOWN - NUM_SPECIAL)
        numbers_M = found.to_numpy(zero_copy_only=False) + NUM_SPECIAL
        is_blank_M = pc.equal(flat, BLANK_WORD).to_numpy(zero_copy_only=False)
        return WordLists(np.where(is_blank_M, BLANK, numbers_M).astype(np.int32), offsets_N - offsets_N[0])

    def decode(self, numbers_L: Ints) -> str:
        """Return the text of the numbers before the first `END`; a blank is `_`, an unknown word `?`."""
        special = {BLANK: BLANK_WORD, UNKNOWN: "?"}
        words = []
        for number in np.asarray(numbers_L).tolist():
            if number == END:
                break
            words.append(special[number] if number in special else self.words[number - NUM_SPECIAL])
        return " ".join(words)

    def can_spell(self, texts: Sequence[str]) -> bool:
        """Return whether all words of texts are listed."""
        return not bool((self.encode(texts).numbers_M == UNKNOWN).any())

    def require_known(self, texts: Sequence[str], what: str) -> WordLists:
        """Return the numbers of the words of texts that are candidates, each of which needs words that are listed.

        Raises:
            DataError: a text without words, or with words that the list does not have.
        """
        lists = self.encode(texts)
        unknown = np.flatnonzero(lists.numbers_M == UNKNOWN)
        if len(unknown):
            row = int(np.searchsorted(lists.offsets_N, unknown[0], side="right")) - 1
            word = split_words([texts[row]]).flatten()[int(unknown[0] - lists.offsets_N[row])]
            raise DataError(
                f"{what}: expected words of the list, got {word.as_py()!r} in {texts[row]!r}; add it to the texts of "
                "the word table, and extract its features"
            )
        empty = np.flatnonzero(lists.lengths() == 0)
        if len(empty):
            raise DataError(f"{what}: expected texts with words, got {texts[empty[0]]!r}")
        return lists

    def require_distinct(self, texts: Sequence[str], what: str) -> WordLists:
        """Return what `require_known` does; texts of the same words, which would have one vector, are refused.

        Raises:
            DataError: as in `require_known`, or two texts have the same words.
        """
        lists = self.require_known(texts, what)
        _, first_C, which_N = np.unique(lists.padded()[0], axis=0, return_index=True, return_inverse=True)
        first_N = first_C[which_N.ravel()]
        repeated = np.flatnonzero(first_N != np.arange(len(texts)))
        if len(repeated):
            text, first = texts[repeated[0]], texts[first_N[repeated[0]]]
            got = f"{text!r} twice" if text == first else f"{first!r} and {text!r}"
            raise DataError(
                f"{what}: expected texts that differ in their words, got {got}; write them alike, and name one"
            )
        return lists


def split_words(texts: pa.Array | pa.ChunkedArray | Sequence[str | None]) -> pa.ListArray:
    """Split texts into words: runs of letters, digits, `_` and apostrophes, in lower case; null gives none.

    Example:
        >>> split_words(["A red circle, isn't it?", None]).to_pylist()
        [['a', 'red', 'circle', "isn't", 'it'], []]
    """
    texts = pc.fill_null(_to_large(texts), "")
    array = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    spaced = pc.replace_substring_regex(pc.utf8_lower(array), _SEPARATORS, " ")
    lists = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(spaced))
    is_word_M = pc.not_equal(lists.flatten(), "").to_numpy(zero_copy_only=False)
    offsets_N = lists.offsets.to_numpy() - lists.offsets[0].as_py()
    before_M = np.concatenate([[0], np.cumsum(is_word_M)])
    return pa.ListArray.from_arrays(pa.array(before_M[offsets_N], pa.int32()), lists.flatten().filter(is_word_M))


def list_words(*texts: pa.Array | pa.ChunkedArray | Sequence[str | None]) -> list[str]:
    """Return the distinct words of texts, the most frequent first, then in alphabetical order: for a word table."""
    counts: Counter[str] = Counter()
    for block in (block for part in texts for block in _blocks(part)):
        table = pc.value_counts(split_words(block).flatten())
        counts.update(dict(zip(table.field("values").to_pylist(), table.field("counts").to_pylist(), strict=True)))
    del counts[BLANK_WORD]
    return sorted(counts, key=lambda word: (-counts[word], word))


def _blocks(texts: pa.Array | pa.ChunkedArray | Sequence[str | None]) -> list[pa.Array | pa.ChunkedArray]:
    """Divide texts into blocks of a million, at least one."""
    array = _to_large(texts)
    return [array.slice(start, _TEXTS_PER_BLOCK) for start in range(0, max(1, len(array)), _TEXTS_PER_BLOCK)]


def _to_large(texts: pa.Array | pa.ChunkedArray | Sequence[str | None]) -> pa.Array | pa.ChunkedArray:
    """Return texts as Arrow's large strings, of which one array can hold more than 2 GiB."""
    if isinstance(texts, pa.Array | pa.ChunkedArray):
        return texts.cast(pa.large_string())
    return pa.array(texts, pa.large_string())
