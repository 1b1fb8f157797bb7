"""The words of captions, and their BM25 scores for a query.

`words.parquet` in the folder of an index has a row per word: the captions that contain it, and how often. It is written
when words are first searched, and again after the captions of the cache have changed.

The score is that of Robertson and Zaragoza (2009), https://doi.org/10.1561/1500000019, as Lucene computes it. Two
rankings are fused by their ranks: Cormack et al., SIGIR 2009, https://doi.org/10.1145/1571941.1572114.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy

from embedcache.arrays import Array, Floats, Ints, blocks
from embedcache.errors import CorruptError, DataError
from embedcache.files import replacing
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import FORMAT, read_metadata, to_metadata
from embedcache.store.cache import Cache
from embedcache.store.tables import read_table, write_table

FILE = "words.parquet"
_K1, _B = 1.2, 0.75
_RANK_OFFSET = 60  # k of Cormack et al.
_BLOCK = 2**17
_ACCENTS = "[\u0300-\u036f]+"
_SEPARATORS = r"[^\p{L}\p{M}\p{N}]+"


class Words:
    """Words of the T captions of a cache, in memory: about 5 bytes per word of a caption, and 8 per caption.

    Args:
        table: a row per word: `word`, `captions` (ascending rows) and `counts`.
        num_captions: T.
    """

    def __init__(self, table: pa.Table, num_captions: int) -> None:
        self.table = table
        self.num_captions = num_captions

        captions = table["captions"].combine_chunks()
        self._words = table["word"].combine_chunks()
        self._starts: Ints = captions.offsets.to_numpy()
        self._captions: Array = captions.values.to_numpy()
        self._counts: Array = table["counts"].combine_chunks().values.to_numpy()

        lengths_C = np.bincount(self._captions, weights=self._counts, minlength=num_captions)
        relative_C = lengths_C / max(lengths_C.mean() if num_captions else 0.0, 1.0)
        self._norms_C: Floats = (_K1 * (1 - _B + _B * relative_C)).astype(np.float32)

    def scores(self, query: str) -> Floats:
        """Return the BM25 score of each caption for the words of a query, 0 if it has none of them: (C,) float32.

        Each word counts once. Upper and lower case and accents make no difference, and nothing else of a query is
        interpreted.
        """
        scores_C = np.zeros(self.num_captions, np.float32)
        words = pc.list_flatten(_split(pa.array([query], pa.large_string())))
        for word in np.flatnonzero(pc.is_in(self._words, value_set=words)):
            entries = slice(self._starts[word], self._starts[word + 1])
            captions, counts = self._captions[entries], self._counts[entries].astype(np.float32)
            rarity = math.log1p((self.num_captions - len(captions) + 0.5) / (len(captions) + 0.5))
            scores_C[captions] += rarity * (_K1 + 1) * counts / (counts + self._norms_C[captions])
        return scores_C


def open_words(folder: Path, cache: Cache, progress: Progress | None = None) -> Words:
    """Read the words of a cache from the folder of an index; count and store them if they are not there.

    In a folder that cannot be written they are counted each time. Memory: as of `Words`, four times as much while they
    are counted.

    Raises `DataError` if the cache has no captions.
    """
    if not cache.num_rows("text"):
        raise DataError(f"match: expected captions in {cache.path} to search by words, got none; use --match vectors")

    words = _read(folder / FILE, cache)
    if words is None:
        words = count_words(cache, progress)
        try:
            with replacing(folder / FILE) as temporary:
                write_table(temporary, words.table.replace_schema_metadata(to_metadata(_about(cache))))
        except OSError:
            pass  # a folder of others, or read-only
    return words


def count_words(cache: Cache, progress: Progress | None = None) -> Words:
    """Count the words of all captions of a cache."""
    progress = progress or NullProgress()
    num_captions = cache.num_rows("text")
    progress.start("counting words", num_captions, "captions")
    encoded, rows = [], []
    for block in blocks(num_captions, _BLOCK):
        lists = _split(cache.table("text", ["text"], rows=block)["text"].combine_chunks())
        words = pc.list_flatten(lists)
        parents = pc.list_parent_indices(lists)
        is_word = pc.not_equal(words, "")
        encoded.append(words.filter(is_word).dictionary_encode())
        rows.append((block.start + parents.filter(is_word).to_numpy()).astype(np.int32))
        progress.advance(block.stop - block.start)

    column = pa.chunked_array(encoded).unify_dictionaries()
    numbers = np.concatenate([chunk.indices.to_numpy() for chunk in column.chunks])
    captions = np.concatenate(rows)
    dictionary = column.chunk(0).dictionary
    shape = (len(dictionary), num_captions)
    matrix = scipy.sparse.coo_array((np.ones(len(captions), np.int32), (numbers, captions)), shape=shape).tocsr()
    starts = pa.array(matrix.indptr.astype(np.int64))
    counts = np.minimum(matrix.data, np.iinfo(np.uint16).max).astype(np.uint16)
    columns = {
        "word": dictionary,
        "captions": pa.LargeListArray.from_arrays(starts, pa.array(matrix.indices.astype(np.int32))),
        "counts": pa.LargeListArray.from_arrays(starts, pa.array(counts)),
    }
    progress.finish()
    return Words(pa.table(columns), num_captions)


def fuse(rankings: list[tuple[Floats, Ints]], k: int) -> tuple[Floats, Ints]:
    """Fuse rankings by reciprocal ranks: the k rows with the largest sums of 1 / (60 + rank), best first.

    Args:
        rankings: scores (M,), best first, and rows (M,) of each. Rows of equal scores have the same rank.
        k: number of rows.

    Returns:
        (K,) float32 sums, and (K,) rows; equal sums are in the order of their rows.
    """
    rows = np.unique(np.concatenate([ranked for _, ranked in rankings]))
    sums = np.zeros(len(rows))
    for scores, ranked in rankings:
        sums[np.searchsorted(rows, ranked)] += 1 / (_RANK_OFFSET + 1 + np.searchsorted(-scores, -scores))
    order = np.lexsort((rows, -sums))[:k]
    return sums[order].astype(np.float32), rows[order]


def _split(texts: pa.Array) -> pa.Array:
    """Return the words of each text, in lower case and without accents: lists, which may have empty words."""
    plain = pc.utf8_normalize(pc.utf8_lower(texts), form="NFKD")
    plain = pc.replace_substring_regex(plain, pattern=_ACCENTS, replacement="")
    return pc.split_pattern_regex(plain, pattern=_SEPARATORS)


def _about(cache: Cache) -> dict[str, Any]:
    return {"format": FORMAT, "index_digest": cache.info.index_digest, "num_captions": cache.num_rows("text")}


def _read(path: Path, cache: Cache) -> Words | None:
    """Read stored words; None if there are none, they are of other captions, or they are damaged."""
    if not path.is_file():
        return None
    try:
        table = read_table(path)
        about = _about(cache)
        num_captions = cache.num_rows("text")
        header = read_metadata(path, table.schema)
        captions, counts = (table[name].combine_chunks() for name in ("captions", "counts"))
        rows = captions.values.to_numpy()

        # A stranger's file may name captions that do not exist.
        is_valid = (
            {name: header.get(name) for name in about} == about
            and rows.dtype == np.int32
            and counts.values.to_numpy().dtype == np.uint16
            and captions.offsets.equals(counts.offsets)
            and captions.offsets[-1].as_py() == len(rows)
            and (not len(rows) or (rows.min() >= 0 and rows.max() < num_captions))
        )
        return Words(table, num_captions) if is_valid else None
    except (CorruptError, pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
