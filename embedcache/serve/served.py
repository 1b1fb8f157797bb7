"""All that the server answers from, opened once.

What an index, its run and its cache are, as rows to read.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Ints
from embedcache.encoders.base import Modality
from embedcache.errors import EmbedcacheError, SettingError, UnknownNameError
from embedcache.progress import Progress
from embedcache.provenance import read_json
from embedcache.reports.thumbnails import credit
from embedcache.search.search import Hit, OpenIndex
from embedcache.search.settings import Filter
from embedcache.serve.coverage import ServedCoverage, compute_coverage, read_coverage
from embedcache.serve.pictures import ServedPictures
from embedcache.serve.settings import ServeSettings

FILTERS = ("split", "label", "language")
MODALITIES: tuple[Modality, ...] = ("text", "image")

log = logging.getLogger("embedcache.serve")


class Served:
    """An index with its encoders, pictures, filters and coverage. It only reads.

    Args:
        index: open.
        settings: whether the cache is trusted.
        selections: files that may be chosen from; each is named by its stem.
        coverage: None where none was asked for.

    Raises:
        SettingError: two selections of one name.
        PathError, CorruptError, DataError: a selection cannot be read, or names other keys.
        FingerprintError: an encoder that opens now is not the one that made the index.
    """

    def __init__(
        self,
        index: OpenIndex,
        settings: ServeSettings,
        *,
        selections: Sequence[Path] = (),
        coverage: ServedCoverage | None = None,
    ) -> None:
        self.index, self.settings, self.coverage = index, settings, coverage
        self.name = index.path.resolve().name
        self.version = index.cache.info.index_digest[:16]
        self.takes = [modality for modality in MODALITIES if index.query_encoder.accepts(modality)]
        self.selections = _by_name(selections)
        self.values = {name: values for name in FILTERS if _chooses(values := index.filters.values(name), index)}
        self.credit = credit(index.cache)
        self.pictures, self.pictures_are_missing = _open_pictures(index, settings)
        self._image_samples: Ints = np.empty(0, np.int64)
        if "image" in index.cache.info.num_items:
            self._image_samples = index.cache.items("image")["sample"].to_numpy()
        for modality in self.takes:
            index.query_encoder.encoder(modality)
        for path in self.selections.values():
            index.filters.mask(Filter(selection=path))
        _ = index.query_encoder.indexed.rows  # reads which rows are valid

    def filter(
        self,
        *,
        labels: Sequence[str] = (),
        splits: Sequence[str] = (),
        languages: Sequence[str] = (),
        selection: str | None = None,
    ) -> Filter:
        """Make a filter of what a visitor names.

        Raises:
            UnknownNameError: there is nothing of that name.
        """
        for name, values in (("label", labels), ("split", splits), ("language", languages)):
            known = self.values.get(name, {})
            for value in values:
                if value not in known:
                    raise UnknownNameError(f"there is no {name} {value!r} here; GET /api/info lists those that are")
        if selection is not None and selection not in self.selections:
            raise UnknownNameError(f"there is no selection {selection!r} here; GET /api/info lists those that are")
        path = None if selection is None else self.selections[selection]
        return Filter(label_value=tuple(labels), part=tuple(splits), language=tuple(languages), selection=path)

    def info(self) -> dict[str, Any]:
        """Say what is here as the API does, without `most_hits`."""
        return {
            "name": self.name,
            "version": self.version,
            "modality": self.index.card.modality,
            "num_items": self.index.card.num_vectors,
            "takes": self.takes,
            "has_pictures": self.pictures is not None,
            "pictures_are_missing": self.pictures_are_missing,
            "credit": self.credit,
            "filters": self.values,
            "selections": list(self.selections),
            "has_coverage": self.coverage is not None,
            "max_upload_bytes": self.settings.max_upload_bytes,
        }

    def item(self, row: int) -> dict[str, Any]:
        """Give all that the cache says of an item as the API does."""
        sample = int(self.index.hits.samples[row])
        columns = self.index.cache.samples.slice(sample, 1).to_pylist()[0]
        return {
            "row": row,
            "key": columns.pop("key"),
            "image": self.image_row(row),
            "captions": self.index.hits.captions(row),
            "columns": columns,
        }

    def image_row(self, row: int) -> int | None:
        """Get the row of the picture that shows an item: itself, or of a caption its sample's first; None without."""
        if self.pictures is None:
            return None
        if self.index.card.modality == "image":
            return row
        sample = self.index.hits.samples[row]
        place = int(np.searchsorted(self._image_samples, sample))
        is_there = place < len(self._image_samples) and self._image_samples[place] == sample
        return place if is_there else None

    def hit(self, hit: Hit) -> dict[str, Any]:
        """Give a hit as the API does."""
        return {
            "score": hit.score,
            "row": hit.row,
            "key": hit.key,
            "captions": list(hit.captions),
            "label": hit.label,
            "image": self.image_row(hit.row),
        }

    def concept(self, number: int) -> dict[str, Any]:
        """Give the best items of a concept as the API does.

        Raises:
            UnknownNameError: there is no coverage here, or no such concept.
        """
        if self.coverage is None or not 0 <= number < len(self.coverage.concepts):
            raise UnknownNameError(f"there is no concept {number} here")
        concept, best = self.coverage.concepts[number], self.coverage.best[number]
        num_items = len(self.index.hits.samples)
        kept = [one for one in best if 0 <= one["row"] < num_items]
        scores, rows = np.array([one["cosine"] for one in kept]), np.array([one["row"] for one in kept], np.int64)
        hits = [self.hit(hit) for hit in self.index.hits.read(scores, rows)]
        return {"name": concept["name"], "threshold": concept["threshold"], "hits": hits}


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where what is served lies.

    Args:
        index: the index.
        run: where its run is, if it has moved.
        cache: where its cache is, alike.
        selections: files to choose from.
        coverage: a file of `embedcache curate coverage --output`.
        concepts: a cache of concepts, to measure coverage of now.
    """

    index: Path
    run: Path | None = None
    cache: str | None = None
    selections: Sequence[Path] = ()
    coverage: Path | None = None
    concepts: str | None = None


def open_served(places: Places, settings: ServeSettings, *, device: str, progress: Progress) -> Served:
    """Open all that is served.

    Raises:
        SettingError: coverage from a file and from concepts.
        EmbedcacheError: a leaf of it for whatever is missing or does not fit; see `OpenIndex`, `Served`.
    """
    if places.coverage is not None and places.concepts is not None:
        raise SettingError("coverage from a file and of concepts are both given; give --coverage or --concepts")
    index = OpenIndex(places.index, run_path=places.run, cache_path=places.cache, device=device)
    coverage = None
    if places.coverage is not None:
        coverage = read_coverage(places.coverage, index)
    elif places.concepts is not None:
        coverage = compute_coverage(places.concepts, index, progress)
    return Served(index, settings, selections=places.selections, coverage=coverage)


def _open_pictures(index: OpenIndex, settings: ServeSettings) -> tuple[ServedPictures | None, str | None]:
    """Open the pictures; where they cannot be, search works without, and the page says why."""
    if not index.cache.info.num_items.get("image"):
        return None, None
    try:
        return ServedPictures(index.cache, trusts_cache=settings.trusts_cache), None
    except EmbedcacheError as error:
        log.warning("%s", error)
        return None, "the pictures cannot be read; the server's log says why"


def _chooses(values: Mapping[str, int], index: OpenIndex) -> bool:
    """Say whether a filter would leave anything out."""
    return len(values) > 1 or any(num < len(index.hits.samples) for num in values.values())


def _by_name(paths: Sequence[Path]) -> Mapping[str, Path]:
    found = {path.stem: path for path in paths}
    if len(found) < len(paths):
        raise SettingError("two selections have the same name; give files of different names")
    return found


Card = dict[str, Any]
"""`title`, and `rows`: pairs of a name and a text."""


def cards(index: OpenIndex) -> list[Card]:
    """Give the cards of an index, of the run that projected it, and of its cache. They hold no path."""
    found = [_index_card(index), _cache_card(index)]
    if index.run_path is not None:
        found.insert(1, _run_card(index))
    return found


def _index_card(index: OpenIndex) -> Card:
    card = index.card
    batch = [] if card.batch_latency_ms is None else [["milliseconds a query in a batch", f"{card.batch_latency_ms:g}"]]
    return {
        "title": "Index",
        "rows": [
            ["holds", f"{card.num_vectors:,} {card.modality}s"],
            ["feature", card.feature],
            ["encoder", card.spec],
            ["kind (FAISS)", card.factory],
            ["searched with", " ".join(f"{name} {value}" for name, value in card.search.items()) or "no setting"],
            ["width", f"{card.width:,}"],
            ["recall@10 against exact search", f"{card.recall_at_10:.3f} on {card.num_queries:,} queries"],
            ["milliseconds a query, where it was built", f"{card.latency_ms:g}"],
            *batch,
            ["on disk", "" if card.file_bytes is None else f"{card.file_bytes / 1e6:,.1f} MB"],
        ],
    }


def _run_card(index: OpenIndex) -> Card:
    config = index.query_encoder.config
    assert config is not None
    assert index.run_path is not None
    path = index.run_path / "record.json"
    outcome = read_json(path).get("outcome", {}) if path.is_file() else {}
    return {
        "title": "Run",
        "rows": [
            ["name", index.run_path.resolve().name],
            ["projector", config.projector],
            ["shared width", f"{config.shared_width:,}"],
            ["images", f"{config.image.feature} of {config.image.spec}"],
            ["texts", f"{config.text.feature} of {config.text.spec}"],
            ["weights (SHA-256)", config.weights_digest],
            *_flat("", outcome),
        ],
    }


def _cache_card(index: OpenIndex) -> Card:
    info = index.cache.info
    return {
        "title": "Cache",
        "rows": [
            ["name", index.cache.path.resolve().name],
            ["source", str(info.source.get("type"))],
            ["samples", f"{info.num_samples:,}"],
            *([f"{modality}s", f"{num:,}"] for modality, num in info.num_items.items()),
            ["columns", ", ".join(index.cache.columns)],
            ["rows (SHA-256)", info.index_digest],
        ],
    }


def _flat(prefix: str, values: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, value in values.items():
        title = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += _flat(f"{title}: ", value)
        elif value is not None:
            rows.append([title, _number(value)])
    return rows


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
