"""What an index found, with what the cache says of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from embedcache.arrays import Floats, Ints, concatenated_ranges
from embedcache.cache.cache import Cache
from embedcache.cache.spine_tables import ITEM_SCHEMAS

_MOST_CAPTIONS = 3
_NO_TEXTS = ITEM_SCHEMAS["text"].empty_table()


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One item that an index found.

    Args:
        score: cosine to the query; of an index of codes, its estimate.
        row: of the item in its modality's table.
        key: of its sample.
        captions: of an image, its sample's, at most three; of a caption, itself.
        label: of its sample, where the cache has the column.
    """

    score: float
    row: int
    key: str
    captions: Sequence[str]
    label: str | None = None


class Hits:
    """Turns rows into hits. Keys, labels and captions are read once and looked up by row: they are kept in memory.

    Args:
        cache: the cache.
        modality: `image` or `text`, of the rows.
    """

    def __init__(self, cache: Cache, modality: str) -> None:
        self._modality = modality
        self._keys = _whole(cache.samples["key"])
        self._labels = _whole(cache.samples["label"]) if "label" in cache.columns else None
        self.samples: Ints = cache.items(modality)["sample"].to_numpy()
        texts = cache.items("text") if "text" in cache.info.num_items else _NO_TEXTS
        self._texts, self._languages = _whole(texts["text"]), _whole(texts["language"])
        self._text_samples: Ints = texts["sample"].to_numpy()

    def of(self, scores_K: Floats, rows_K: Ints, languages: Sequence[str] = ()) -> list[Hit]:
        """Give the hits of one query; a row of -1 is none.

        Args:
            scores_K: (K,) best first.
            rows_K: (K,) alike.
            languages: show captions in these only; none is all.
        """
        scores, rows = scores_K[rows_K >= 0].tolist(), rows_K[rows_K >= 0]
        samples = self.samples[rows]
        labels = [None] * len(rows) if self._labels is None else _taken(self._labels, samples)
        captions = self._captions(rows, None if languages else _MOST_CAPTIONS)
        return [
            Hit(
                score=score,
                row=row,
                key=key,
                captions=[text for text, language in said if not languages or language in languages][:_MOST_CAPTIONS],
                label=None if label is None else str(label),
            )
            for score, row, key, label, said in zip(
                scores, rows.tolist(), _taken(self._keys, samples), labels, captions, strict=True
            )
        ]

    def captions(self, row: int) -> list[dict[str, str | None]]:
        """Give the captions of the sample of an image, or a caption itself: `text` and `language` of each."""
        (said,) = self._captions(np.array([row]), None)
        return [{"text": text, "language": language} for text, language in said]

    def _captions(self, rows_K: Ints, most: int | None) -> list[list[tuple[str, str | None]]]:
        """Give text and language of the captions of each item, or of the first of them."""
        if self._modality == "text":
            starts, counts = rows_K, np.ones(len(rows_K), np.int64)
        else:
            samples = self.samples[rows_K]
            starts = np.searchsorted(self._text_samples, samples)
            counts = np.searchsorted(self._text_samples, samples + 1) - starts
        counts = counts if most is None else np.minimum(counts, most)
        _, places = concatenated_ranges(starts, counts)
        said = list(zip(_taken(self._texts, places), _taken(self._languages, places), strict=True))
        ends = np.cumsum(counts).tolist()
        return [said[end - count : end] for end, count in zip(ends, counts.tolist(), strict=True)]


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """Join a column's chunks, so that a row is found without looking for its chunk; text may pass 2 GiB."""
    return (column.cast(pa.large_string()) if pa.types.is_string(column.type) else column).combine_chunks()


def _taken(column: pa.Array, places: Ints) -> list[Any]:
    values: list[Any] = column.take(pa.array(places)).to_pylist()
    return values
