"""Examples of tasks: an item of a cache, an input text and a target text per row, held as Arrow columns and numbers.

A table of examples has the columns `key`, the sample in the cache; `text`, such as a question, null without one; and
`target`: the class name, caption or answer. No path holds a Python object per row, except of distinct targets that are
candidates.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.sparse import csr_array

from embedcache.arrays import Floats, Ints, normalize
from embedcache.axis import Axis
from embedcache.dataset.inputs import InputFeature, Reader, open_input
from embedcache.errors import DataError, EmbedcacheError, PathError, SettingError, one_line, pluralize
from embedcache.io_errors import read_errors
from embedcache.modalities import FILE_MODALITIES
from embedcache.networks.words import BLANK, NUM_SPECIAL, UNKNOWN, Vocabulary, WordLists
from embedcache.store.cache import Cache

_NUM_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class WordTable:
    """Words, and the vector of each one, encoded alone.

    Args:
        vocabulary: the words, in the order of the texts of the cache.
        vectors_VD: (V, D) float16 or float32.
        feature: the feature that the vectors come from.
        index_digest: digest of the tables of its cache.
    """

    vocabulary: Vocabulary
    vectors_VD: Floats
    feature: InputFeature
    index_digest: str

    def average(self, texts: WordLists) -> Floats:
        """Compute the mean of the unit vectors of the words of each text, of length 1: (N, D) float32, 0 without any.

        Memory: the result, and the words in float32.
        """
        is_word_M = texts.numbers_M >= NUM_SPECIAL
        columns = texts.numbers_M[is_word_M] - NUM_SPECIAL
        offsets_N = np.concatenate([[0], np.cumsum(is_word_M)])[texts.offsets_N]
        shape = texts.num_texts, len(self.vocabulary)
        counts_NV = csr_array((np.ones(len(columns), np.float32), columns, offsets_N), shape=shape)
        means_ND: Floats = counts_NV @ normalize(np.asarray(self.vectors_VD, np.float32))
        return normalize(means_ND)


def open_word_table(cache: Cache, feature: str | None = None) -> WordTable:
    """Open a cache of texts, each of which is a word, such as `texts:words.txt` with the words of `list_words`.

    Raises:
        DataError: a text is no single word, or is there twice; or the feature has several vectors per text.
        UnfinishedError: the feature is not complete.
    """
    opened = open_input(cache, "text", feature)
    opened.require_complete()
    if opened.has_tokens:
        raise DataError(f"{opened.name}: expected one vector per word, got tokens; name a pooled feature")
    if not opened.valid.all():
        raise DataError(f"{opened.name}: expected the vector of every word, got some that failed; retry them")
    vocabulary = Vocabulary(cache.items("text", columns=["text"])["text"].to_pylist())
    vectors_VD = opened.load()(np.arange(opened.num_items)).values
    return WordTable(vocabulary=vocabulary, vectors_VD=vectors_VD, feature=opened, index_digest=cache.info.index_digest)


@dataclass(frozen=True, kw_only=True)
class Media:
    """The items that examples are about: one modality of a cache, by one feature.

    Args:
        cache: the cache.
        feature: the feature.
        read: reader of its rows.
        axis: axis of its tokens; None: of no known kind.
    """

    cache: Cache
    feature: InputFeature
    read: Reader
    axis: Axis | None

    @property
    def modality(self) -> str:
        """Name of the modality."""
        return self.feature.modality

    def find_rows(self, keys_N: pa.ChunkedArray) -> Ints:
        """Return the row of the first item of each sample: (N,) int64, -1 where that has no feature.

        Raises:
            DataError: a key is null, or is in no sample of the cache.
        """
        keys_S = self.cache.column("key").cast(pa.large_string())  # all together may exceed 2 GiB
        found = pc.index_in(keys_N.cast(pa.large_string()), value_set=keys_S)
        if found.null_count:
            missing = pc.unique(keys_N.filter(pc.is_null(found)))
            shown = ", ".join(map(repr, missing[:_NUM_SHOWN].to_pylist()))
            raise DataError(
                f"{self.cache.path}: expected keys of its samples, got {shown} and {found.null_count:,} rows in all "
                "without one; use the cache that the examples were made for"
            )
        owner_M = self.cache.items(self.modality, columns=["sample"])["sample"].to_numpy()
        row_S = np.full(self.cache.info.num_samples, -1, np.int64)
        row_S[owner_M[::-1]] = np.arange(len(owner_M))[::-1]  # the first item of a sample is written last
        rows_N: Ints = row_S[found.to_numpy()]
        return np.where(self.feature.valid[rows_N], rows_N, -1)


def open_media(cache: Cache, modality: str, feature: str | None = None, *, in_memory: bool = True) -> Media:
    """Open the feature of a modality, such as the tokens of images.

    Args:
        feature: its name; None: the only one.
        in_memory: read the feature into memory, else rows from memory maps as they are needed.

    Raises:
        UnknownNameError: there is no such feature.
        UnfinishedError: the feature is not complete.
        SettingError: the modality is text: texts are word numbers.
    """
    if modality == "text":
        expected = ", ".join(modality.name for modality in FILE_MODALITIES)
        raise SettingError(f"modality: expected one of {expected}, got text; texts are columns of examples")
    opened = open_input(cache, modality, feature)
    opened.require_complete()
    axis = None if "+" in opened.name else cache.feature(modality, opened.name).axis
    return Media(cache=cache, feature=opened, read=opened.load() if in_memory else opened.read, axis=axis)


@dataclass(frozen=True, kw_only=True)
class TaskExamples:
    """N examples of one task.

    Args:
        vocabulary: the words.
        targets: the F distinct targets, a string array.
        target_N: (N,) int64, number of the target of each example.
        target_words: words of the F targets.
        media: what the examples are about; None: they are texts alone.
        rows_N: (N,) int64, rows of the feature of `media`.
        text_words: words of the N input texts; None: there are none.
        num_left_out: examples of the table whose items have no feature.
    """

    vocabulary: Vocabulary
    targets: pa.Array
    target_N: Ints
    target_words: WordLists
    media: Media | None
    rows_N: Ints | None
    text_words: WordLists | None
    num_left_out: int

    def __len__(self) -> int:
        return len(self.target_N)

    @property
    def unknown_fraction(self) -> float:
        """Fraction of the words of distinct targets and of input texts that the vocabulary does not have."""
        lists = [self.target_words] + ([] if self.text_words is None else [self.text_words])
        numbers_M = np.concatenate([words.numbers_M for words in lists])
        return float(np.mean(numbers_M == UNKNOWN)) if len(numbers_M) else 0.0

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the rows, texts and targets."""
        hasher = hashlib.sha256()
        texts = self.text_words
        arrays = [self.rows_N, self.target_N, *self.target_words, *((None, None) if texts is None else texts)]
        for array in arrays:
            hasher.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
        return hasher.hexdigest()

    def take(self, positions_B: Ints) -> "TaskExamples":
        """Return some examples in the given order."""
        return replace(
            self,
            target_N=self.target_N[positions_B],
            rows_N=None if self.rows_N is None else self.rows_N[positions_B],
            text_words=None if self.text_words is None else self.text_words.take(positions_B),
        )

    def draw(self, fraction: float, *, seed: int) -> "TaskExamples":
        """Draw a fraction of the examples, at least one; a larger fraction of the same seed has those of a smaller."""
        if not 0 < fraction <= 1:
            raise SettingError(f"fraction: expected a number above 0 and up to 1, got {fraction}")
        order_N = np.random.default_rng(seed).permutation(len(self))
        return self.take(np.sort(order_N[: max(1, round(fraction * len(self)))]))

    def spread(self, limit: int) -> "TaskExamples":
        """Return at most `limit` evenly spaced examples."""
        if len(self) <= limit:
            return self
        return self.take(np.linspace(0, len(self) - 1, limit).astype(np.int64))

    def without_media(self) -> "TaskExamples":
        """Return the examples without what they are about: the control of a model that only reads."""
        return replace(self, media=None, rows_N=None)

    def shuffle_media(self, *, seed: int) -> "TaskExamples":
        """Assign another example's item to each example, the same to all that share an item: a control.

        Raises:
            DataError: the examples are about fewer than two items.
        """
        if self.rows_N is None:
            raise DataError("expected examples about items, got texts alone")
        distinct, which_N = np.unique(self.rows_N, return_inverse=True)
        if len(distinct) < 2:
            raise DataError(f"expected examples about at least two items, got {len(distinct)}")
        order = np.random.default_rng(seed).permutation(len(distinct))
        other = np.empty_like(order)
        other[order] = np.roll(order, 1)
        return replace(self, rows_N=distinct[other[which_N]])


def open_examples(table: pa.Table | Path | str, vocabulary: Vocabulary, *, media: Media | None = None) -> TaskExamples:
    """Read a table of examples, from Arrow or from a Parquet file.

    Args:
        table: `key` and `target`, and optionally `text`, which may hold one `_` where the answer belongs.
        media: what the examples are about; None: keys are not read.

    Raises:
        DataError: a column is missing, a target is null, or a key is not in the cache.
        PathError: there is no such file.
    """
    columns = _read_columns(table, ["target", "text"] + (["key"] if media is not None else []))
    keep_N, rows_N = np.arange(len(columns["target"])), None
    if media is not None:
        rows_N = media.find_rows(columns["key"])
        keep_N = np.flatnonzero(rows_N >= 0)
        rows_N = rows_N[keep_N]
    if not len(keep_N):
        raise DataError("examples: expected at least one whose item has the feature, got none")
    encoded = columns["target"].take(pa.array(keep_N)).combine_chunks().dictionary_encode()
    text = columns["text"].take(pa.array(keep_N))
    return TaskExamples(
        vocabulary=vocabulary,
        targets=encoded.dictionary,
        target_N=encoded.indices.to_numpy().astype(np.int64),
        target_words=vocabulary.encode(encoded.dictionary),
        media=media,
        rows_N=rows_N,
        text_words=None if text.null_count == len(text) else vocabulary.encode(text),
        num_left_out=len(columns["target"]) - len(keep_N),
    )


def read_examples(path: Path | str) -> pa.Table:
    """Read a Parquet file of examples.

    Raises:
        PathError: there is no such file.
        DataError: it is not Parquet.
    """
    if not Path(path).is_file():
        raise PathError(f"expected a Parquet file of examples, got {path}, which does not exist; check the path")
    try:
        with read_errors(Path(path)):
            return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, EmbedcacheError):
            raise
        raise DataError(f"{path}: expected a Parquet file of examples, got an error: {one_line(error)}") from error


def _read_columns(table: pa.Table | Path | str, names: Sequence[str]) -> Mapping[str, pa.ChunkedArray]:
    table = table if isinstance(table, pa.Table) else read_examples(table)
    found = {name: read_texts(table, name) for name in names}
    if found["target"].null_count:
        rows = pluralize(found["target"].null_count, "row")
        raise DataError(f"examples: expected a target in every row, got {rows} without")
    return found


def read_texts(table: pa.Table, name: str) -> pa.ChunkedArray:
    """Return a column of a table of examples as texts; nulls for `text` if the table has none.

    Raises:
        DataError: there is no such column, or its values are no texts.
    """
    if name not in table.column_names:
        if name == "text":
            return pa.chunked_array([pa.nulls(len(table), pa.string())])
        raise DataError(f"examples: expected the columns key, text and target, got {', '.join(table.column_names)}")
    try:
        return table[name].cast(pa.large_string())
    except pa.ArrowException as error:
        raise DataError(f"examples: column {name}: expected texts, got {table[name].type}") from error


def read_captions(cache: Cache) -> pa.Table:
    """Return a cache's captions as a table of examples, with the columns `key` and `target`, without empty ones."""
    items = cache.items("text", columns=["sample", "text"])
    table = pa.table({"key": cache.column("key").take(items["sample"]), "target": items["text"]})
    return table.filter(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(items["text"])), 0))


def with_blanks(texts: WordLists) -> WordLists:
    """Append a blank to every text that has none.

    Raises:
        DataError: a text has several blanks.
    """
    lengths_N = texts.lengths()
    of_text_M = np.repeat(np.arange(texts.num_texts), lengths_N)
    blanks_N = np.bincount(of_text_M[texts.numbers_M == BLANK], minlength=texts.num_texts)
    if (blanks_N > 1).any():
        row = int(blanks_N.argmax())
        raise DataError(f"text: expected at most one blank, got {blanks_N[row]} in example {row}")
    ends_N = texts.offsets_N[1:][blanks_N == 0]
    offsets_N = np.concatenate([[0], np.cumsum(lengths_N + (blanks_N == 0))])
    return WordLists(np.insert(texts.numbers_M, ends_N, BLANK), offsets_N)
