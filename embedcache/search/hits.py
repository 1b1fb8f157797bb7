"""What a search finds: hits with their keys and captions, as rows of a table, and with thumbnails in a notebook."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from embedcache.arrays import Floats, Ints, concatenated_ranges
from embedcache.dataset.labels import label_text
from embedcache.dataset.thumbnails import PICTURED, Thumbnails, credit
from embedcache.errors import EmbedcacheError, visible
from embedcache.registry import require
from embedcache.sources.files import file_name_beside_key
from embedcache.store.cache import Cache, RowReader
from embedcache.store.layout import SAMPLES

if TYPE_CHECKING:
    import pandas

_MAX_CAPTIONS = 3
_MAX_QUERIES, _MAX_HITS = 8, 12  # that a notebook shows
_MAX_CHARACTERS = 120


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One search result.

    Args:
        score: cosine similarity to the query, from -1 to 1; for an index of codes, its estimate.
        row: row of the item in the table of its modality.
        key: key of its sample.
        path: file of the item as its source names it, relative to the source if it lies below it; for bytes in a shard
            or a table, that file; None for a text, and where the source names no file.
        captions: for an image, at most three captions of its sample, in the language of the first; for a caption, the
            caption.
        label: label of its sample, in the column `label` or another that was named, if the cache has it.
        languages: languages of the captions that there are, that of `captions` first; None is an unknown one.
    """

    score: float
    row: int
    key: str
    path: str | None = None
    captions: Sequence[str]
    label: str | None = None
    languages: Sequence[str | None] = ()

    @property
    def name(self) -> str:
        """What to call the item where it has no caption: its key, or its file if the key does not name that."""
        return file_name_beside_key(self.path, self.key) or self.key


class Hits(list[Hit]):
    """The hits of one query, best first: a list, shown with thumbnails in a notebook.

    Args:
        hits: the hits.
        query: name of the query: its text, path, key or concept, or the number of its image, row or vector.
        cache: cache of the items.
        modality: modality of the items.
    """

    def __init__(self, hits: Iterable[Hit], *, query: str, cache: Cache, modality: str) -> None:
        super().__init__(hits)
        self.query, self.cache, self.modality = query, cache, modality

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a data frame with a row per hit; the columns are those of `Hit`. Requires pandas."""
        return SearchResults([self]).to_pandas().drop(columns="query")

    def to_html(self) -> str:
        """Return the hits as HTML, as `SearchResults.to_html` does."""
        return SearchResults([self]).to_html()

    def _repr_html_(self) -> str:
        return self.to_html()


class SearchResults(list[Hits]):
    """The hits of each query, in the order of the queries: a list, shown with thumbnails in a notebook."""

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a data frame with a row per hit: `query`, and the columns of `Hit`.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        rows = [{"query": hits.query, **asdict(hit)} for hits in self for hit in hits]
        columns = ["query", *(item.name for item in fields(Hit))]
        return require("pandas", package="pandas").DataFrame(rows, columns=columns)

    def to_html(self) -> str:
        """Return the first 12 hits of the first 8 queries as HTML, with images as thumbnails in the page.

        Recordings are shown as spectrograms, videos as their middle frame. They are read as `reopen_source` allows it.
        """
        parts = [part for hits in self[:_MAX_QUERIES] for part in _show(hits)]
        if len(self) > _MAX_QUERIES:
            parts.append(f"<p>… and {len(self) - _MAX_QUERIES:,} more queries</p>")
        credited = dict.fromkeys(credit(hits.cache) for hits in self)
        parts += [f"<p><small>{_text(words)}</small></p>" for words in credited if words]
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        return self.to_html()


def _show(hits: Hits) -> list[str]:
    """Return the elements that show the hits of one query."""
    thumbnails: Thumbnails | None = None
    reason = ""
    cards = []
    for hit in hits[:_MAX_HITS]:
        image = ""
        try:
            if hits.modality in PICTURED:
                thumbnails = thumbnails or Thumbnails(hits.cache, hits.modality)
                url = thumbnails.data_url(hit.row)
                image = f'<img src="{url}" alt="{_text(hit.key)}" style="max-width: 100%"><br>'
        except EmbedcacheError as error:
            reason = str(error)
        file = file_name_beside_key(hit.path, hit.key)
        details = _text(" · ".join(filter(None, [hit.key, file, hit.label, *hit.captions])))
        words = _text(hit.captions[0] if hit.captions else hit.name)
        cards.append(
            f'<div title="{details}" style="width: 112px; margin: 4px; text-align: center; overflow-wrap: anywhere">'
            f"{image}<small><b>{hit.score:.3f}</b> {words}</small></div>"
        )
    parts = [f"<b>{_text(hits.query)}</b>", f'<div style="display: flex; flex-wrap: wrap">{"".join(cards)}</div>']
    if len(hits) > _MAX_HITS:
        parts.append(f"<p>… and {len(hits) - _MAX_HITS:,} more</p>")
    return [*parts, f"<p><small>{escape(visible(reason))}</small></p>"] if reason else parts


def _text(words: str) -> str:
    """Return text of a cache or a query as HTML: escaped, without control characters, cut if it is long."""
    cut = f"{words[:_MAX_CHARACTERS]}…" if len(words) > _MAX_CHARACTERS else words
    return escape(visible(cut))


class HitReader:
    """Looks up the keys, labels and captions of items, reading only the rows that it returns; see `RowReader`."""

    def __init__(self, cache: Cache, modality: str, *, label: str = "label") -> None:
        self._modality, self._label = modality, label
        columns = {"key", label} & set(cache.columns)
        self._samples = RowReader(cache, SAMPLES, sorted(columns))
        self._texts = RowReader(cache, "text")
        self._items = self._texts if modality == "text" else RowReader(cache, modality, ["sample", "path"])

    def load(self) -> None:
        """Read all rows, for a process that looks up many: later lookups take microseconds per row."""
        for reader in (self._samples, self._items, self._texts):
            reader.load()

    def samples(self, rows_K: Ints) -> Ints:
        """Return the sample of each item: (K,) int64."""
        samples_K: Ints = self._items.take(rows_K)["sample"].to_numpy()
        return samples_K

    def find_key(self, key: str) -> int:
        """Return the sample of a key, -1 if there is none."""
        return self._samples.find_key(key)

    def find(self, samples: Ints) -> tuple[Ints, Ints]:
        """Return the first item of each sample, and how many it has; see `RowReader.find`."""
        return self._items.find(samples)

    def read(self, scores_K: Floats, rows_K: Ints, languages: Sequence[str] = ()) -> list[Hit]:
        """Return the hits of one query, with captions in some languages (empty: all); rows of -1 are skipped."""
        scores, rows = np.clip(scores_K[rows_K >= 0], -1, 1).tolist(), rows_K[rows_K >= 0]  # rounding exceeds 1
        found = self._samples.take(self.samples(rows))
        labels = found[self._label].to_pylist() if self._label in found.column_names else [None] * len(rows)
        keys, paths, captions_of = found["key"].to_pylist(), self.paths(rows), self._captions(rows)
        hits = []
        for score, row, key, path, label, texts in zip(
            scores, rows.tolist(), keys, paths, labels, captions_of, strict=True
        ):
            if languages:
                texts = [(text, language) for text, language in texts if language in languages]
            present = list(dict.fromkeys([language for _, language in texts]))
            if len(present) > 1:
                texts = [(text, language) for text, language in texts if language == present[0]]
            captions = [text for text, _ in texts[:_MAX_CAPTIONS]]
            hit = Hit(
                score=score,
                row=row,
                key=key,
                path=path,
                captions=captions,
                label=label_text(label),
                languages=present,
            )
            hits.append(hit)
        return hits

    def paths(self, rows_K: Ints) -> list[str | None]:
        """Return the file of each item as its source names it; None where there is none."""
        if self._modality == "text":
            return [None] * len(rows_K)
        return [path or None for path in self._items.take(rows_K)["path"].to_pylist()]

    def captions(self, row: int) -> list[dict[str, str | None]]:
        """Return `text` and `language` of the captions of an image's sample, or of a caption itself."""
        (texts,) = self._captions(np.array([row]))
        return [{"text": text, "language": language} for text, language in texts]

    def _captions(self, rows_K: Ints) -> list[list[tuple[str, str | None]]]:
        """Return text and language of the captions of each item."""
        if not len(self._texts):
            return [[]] * len(rows_K)
        if self._modality == "text":
            starts, counts = rows_K, np.ones(len(rows_K), np.int64)
        else:
            starts, counts = self._texts.find(self.samples(rows_K))
        _, positions = concatenated_ranges(starts, counts)
        found = self._texts.take(positions)
        texts = list(zip(found["text"].to_pylist(), found["language"].to_pylist(), strict=True))
        ends = np.cumsum(counts).tolist()
        return [texts[end - count : end] for end, count in zip(ends, counts.tolist(), strict=True)]
