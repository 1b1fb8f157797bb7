"""What an index found, with what the cache says of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Array, Floats, Ints
from embedcache.cache.cache import Cache

_MOST_CAPTIONS = 3
_NO_TEXTS = pa.table({"text": pa.array([], pa.string()), "language": pa.array([], pa.string())})


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
        self._keys = cache.samples["key"]
        self._labels = cache.samples["label"] if "label" in cache.columns else None
        self.samples: Ints = cache.items(modality)["sample"].to_numpy()
        self._texts: pa.Table | None = cache.items("text") if "text" in cache.info.num_items else None
        self._text_samples: Array = np.empty(0, np.int64) if self._texts is None else self._texts["sample"].to_numpy()

    def of(self, scores_K: Floats, rows_K: Ints, languages: Sequence[str] = ()) -> list[Hit]:
        """Give the hits of one query; a row of -1 is none.

        Args:
            scores_K: (K,) best first.
            rows_K: (K,) alike.
            languages: show captions in these only; none is all.
        """
        pairs = zip(scores_K.tolist(), rows_K.tolist(), strict=True)
        return [self._hit(score, row, languages) for score, row in pairs if row >= 0]

    def captions(self, row: int) -> list[dict[str, str | None]]:
        """Give the captions of the sample of an image, or a caption itself: `text` and `language` of each."""
        captions: list[dict[str, str | None]] = self._captions(row).select(["text", "language"]).to_pylist()
        return captions

    def _captions(self, row: int) -> pa.Table:
        if self._texts is None:
            return _NO_TEXTS
        if self._modality == "text":
            return self._texts.slice(row, 1)
        sample = int(self.samples[row])
        start, stop = np.searchsorted(self._text_samples, [sample, sample + 1])
        return self._texts.slice(start, stop - start)

    def _hit(self, score: float, row: int, languages: Sequence[str]) -> Hit:
        sample, captions = int(self.samples[row]), self._captions(row)
        if languages:
            captions = captions.filter(pc.is_in(captions["language"], value_set=pa.array(languages, pa.string())))
        label = None if self._labels is None else self._labels[sample].as_py()
        return Hit(
            score=score,
            row=row,
            key=self._keys[sample].as_py(),
            captions=captions["text"].slice(0, _MOST_CAPTIONS).to_pylist(),
            label=None if label is None else str(label),
        )
