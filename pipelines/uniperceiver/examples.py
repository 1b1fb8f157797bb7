"""Examples of tasks: an item of a cache, an input text and a target text per row, as Arrow columns and numbers.

A table of examples has the columns `key`, the sample in the cache; `text`, such as a question, or null; and `target`,
which is a class name, a caption or an answer.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Floats, Ints
from embedcache.dataset.inputs import InputFeature, Reader, open_input
from embedcache.errors import DataError
from embedcache.store.cache import Cache
from embedcache.store.layout import Axis
from pipelines.uniperceiver.words import Vocabulary, WordLists


@dataclass(frozen=True, kw_only=True)
class WordTable:
    """Words and the vector of each one, encoded separately.

    Args:
        vocabulary: the words, in the order of the texts of the cache.
        vectors_VD: (V, D) float16 or float32.
        feature: feature of the vectors.
        index_digest: digest of the tables of its cache.
    """

    vocabulary: Vocabulary
    vectors_VD: Floats
    feature: InputFeature
    index_digest: str


def open_word_table(cache: Cache, feature: str) -> WordTable:
    """Open a cache whose texts are single words, such as `texts:words.txt` with the words of `list_words`."""
    input_feature = open_input(cache, "text", feature)
    input_feature.require_complete()
    words = cache.items("text", columns=["text"])["text"].to_pylist()
    return WordTable(
        vocabulary=Vocabulary(words),
        vectors_VD=input_feature.load()(np.arange(len(words))).values,
        feature=input_feature,
        index_digest=cache.info.index_digest,
    )


@dataclass(frozen=True, kw_only=True)
class Media:
    """The items of the examples: one feature of one modality of a cache.

    Args:
        cache: the cache.
        feature: the feature.
        read: reader of its rows in memory.
        axis: axis of its tokens, or None if it is unknown.
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
        """Return the row of the first item of each sample: (N,) int64, or -1 without the feature.

        Raises:
            DataError: a key is not in the cache.
        """
        samples_N = pc.index_in(keys_N, value_set=self.cache.column("key"))
        if samples_N.null_count:
            unknown = keys_N.filter(pc.is_null(samples_N))[0]
            raise DataError(
                f"{self.cache.path}: expected keys of its samples, got {unknown.as_py()!r}; use the cache that the "
                "examples were made for"
            )

        owner_M = self.cache.items(self.modality, columns=["sample"])["sample"].to_numpy()
        row_S = np.full(self.cache.info.num_samples, -1, np.int64)
        row_S[owner_M[::-1]] = np.arange(len(owner_M))[::-1]  # the first item of a sample is written last
        rows_N: Ints = row_S[samples_N.to_numpy()]
        return np.where(self.feature.valid[rows_N], rows_N, -1)

    def keys_of(self, rows_I: Ints) -> list[str]:
        """Return the keys of the samples of items."""
        samples = self.cache.items(self.modality, columns=["sample"])["sample"].take(rows_I)
        keys: list[str] = self.cache.column("key").take(samples).to_pylist()
        return keys


def open_media(cache: Cache, modality: str, feature: str) -> Media:
    """Read a feature into memory, such as the tokens of images."""
    input_feature = open_input(cache, modality, feature)
    input_feature.require_complete()
    return Media(
        cache=cache, feature=input_feature, read=input_feature.load(), axis=cache.feature(modality, feature).axis
    )


@dataclass(frozen=True, kw_only=True)
class TaskExamples:
    """N examples of one task.

    Args:
        vocabulary: the words.
        targets: the F distinct targets, a string array.
        target_N: (N,) int64, number of the target of each example.
        target_words: words of the F targets.
        media: items of the examples, or None if they are only texts.
        rows_N: (N,) int64, rows of the feature of `media`.
        text_words: words of the N input texts, or None if there are none.
    """

    vocabulary: Vocabulary
    targets: pa.Array
    target_N: Ints
    target_words: WordLists
    media: Media | None
    rows_N: Ints | None
    text_words: WordLists | None

    def __len__(self) -> int:
        return len(self.target_N)

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

    def spread(self, limit: int) -> "TaskExamples":
        """Return at most `limit` evenly spaced examples."""
        if len(self) <= limit:
            return self
        return self.take(np.linspace(0, len(self) - 1, limit).astype(np.int64))

    def without_media(self) -> "TaskExamples":
        """Return the examples without their items, as a control that only reads the texts."""
        return replace(self, media=None, rows_N=None)

    def shuffle_media(self, *, seed: int) -> "TaskExamples":
        """Assign another example's item to each example, as a control. Examples that share an item get the same one."""
        assert self.rows_N is not None
        rows_I, item_N = np.unique(self.rows_N, return_inverse=True)
        if len(rows_I) < 2:
            raise DataError(f"expected examples about at least two items, got {len(rows_I)}")

        order_I = np.random.default_rng(seed).permutation(len(rows_I))
        next_I = np.empty_like(order_I)

        # A cycle through all items in a random order, so that no item stays in its place.
        next_I[order_I] = np.roll(order_I, 1)
        return replace(self, rows_N=rows_I[next_I[item_N]])


def open_examples(table: pa.Table, vocabulary: Vocabulary, *, media: Media | None = None) -> TaskExamples:
    """Read a table of examples. Examples whose item lacks the feature are left out.

    Args:
        table: columns `key`, `text` and `target`; a text may contain one `_` at the place of the answer.
        vocabulary: the words.
        media: items of the examples. If None, keys are not read.

    Raises:
        DataError: a key is not in the cache, or no item has the feature.
    """
    rows_N = None
    if media is not None:
        rows_N = media.find_rows(table["key"])
        table = table.filter(pa.array(rows_N >= 0))
        rows_N = rows_N[rows_N >= 0]
    if not len(table):
        raise DataError("examples: expected at least one whose item has the feature, got none")

    # Targets repeat, so their words are stored once per distinct target.
    encoded = table["target"].combine_chunks().dictionary_encode()
    text = table["text"]
    return TaskExamples(
        vocabulary=vocabulary,
        targets=encoded.dictionary,
        target_N=encoded.indices.to_numpy().astype(np.int64),
        target_words=vocabulary.encode(encoded.dictionary),
        media=media,
        rows_N=rows_N,
        text_words=None if text.null_count == len(text) else vocabulary.encode(text),
    )
