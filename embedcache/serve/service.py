"""The opened index, images, filters and coverage that requests are answered from, and tables that describe them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from embedcache.arrays import Ints
from embedcache.dataset.thumbnails import PICTURED, PLAYED, credit
from embedcache.encoders.base import Modality
from embedcache.errors import EmbedcacheError, MissingExtraError, PathError, SettingError, UnknownNameError
from embedcache.modalities import FILE_MODALITIES, noun
from embedcache.progress import Progress
from embedcache.search.search import Hit, OpenIndex
from embedcache.search.settings import Filter, Match
from embedcache.serve.collect import SelectionWriter
from embedcache.serve.coverage import ServedCoverage, measure_served_coverage, read_coverage
from embedcache.serve.maps import ServedMap
from embedcache.serve.media import ServedItems
from embedcache.serve.schema import SearchOptions, SearchRequest
from embedcache.serve.settings import ServeSettings
from embedcache.store.cache import RowReader
from embedcache.store.layout import SAMPLES

log = logging.getLogger("embedcache.serve")

_NO_FILTER = Filter()
# All queries wait while a visitor's condition is evaluated.
_FILTER_TIMEOUT_S = 5.0


class SearchService:
    """An index with its encoders, images, filters, map and coverage.

    It writes a missing map, answers about coverage, and the file of collected items if there is one.

    Everything that a first request needs is loaded here, except keys and captions. Each request reads them for the rows
    that it shows, until `load` has read all. Visitors may filter by selections, each named by its file's stem.

    Raises:
        SettingError: two selections have the same name.
        PathError, CorruptError, DataError: a selection cannot be read, or names other keys; or the errors of
            `SelectionWriter`.
        FingerprintError: an installed encoder is not the one that made the index.
    """

    def __init__(
        self,
        index: OpenIndex,
        settings: ServeSettings,
        *,
        selections: Sequence[Path] = (),
        coverage: ServedCoverage | None = None,
        concepts: str | None = None,
        collect: Path | None = None,
    ) -> None:
        self.index = index
        self.settings = settings
        self.coverage = coverage
        self.collected = SelectionWriter(index, collect)
        self.map = ServedMap(index, concepts)

        self.rejected_queries = _open_encoders(index)
        self.accepted_queries = [modality for modality in _QUERIES if modality not in self.rejected_queries]
        self.matches: list[Match] = ["vectors"] if "text" in self.accepted_queries else []
        if index.cache.num_rows("text"):
            self.matches += ["words", "both"] if self.matches else ["words"]

        self.selections = {path.stem: path for path in selections}
        if len(self.selections) < len(selections):
            raise SettingError("selections: expected different file names, got the same name twice; rename one of them")
        for path in self.selections.values():
            index.filters.mask(Filter(selection=path))

        self.values = _offered_values(index)
        self.shown, self.missing_images = _open_items(index)
        self.images = self.shown.get("image")
        self._players = _open_players(index, self.shown)
        self._samples = RowReader(index.cache, SAMPLES)
        self._images = RowReader(index.cache, "image", ["sample"])

        # The first request would otherwise wait until it is known which items are in the index.
        index.query_encoder.indexed.rows  # noqa: B018

    def load(self) -> None:
        """Read the keys and captions of all items, so that answers from now on read no file for them."""
        try:
            self.index.hits.load()
            if self._shows_images_of_captions:
                self._images.load()
            for players in self._players.values():
                players.load()
            if "words" in self.matches:
                self.index.load_words()
        except EmbedcacheError as error:
            # The server goes on: only the answers that need these rows are errors.
            log.warning("%s", error)

    def filter(self, options: SearchOptions) -> Filter:
        """Return a filter by the values of a request, or raise an UnknownNameError."""
        requested = {
            "label": tuple(options.labels),
            "split": tuple(options.splits),
            "language": tuple(options.languages),
            "selection": () if options.selection is None else (options.selection,),
        }
        if not any(requested.values()) and options.where is None:
            return _NO_FILTER

        for name, values in requested.items():
            offered = self.selections if name == "selection" else self.values.get(name, {})
            for value in values:
                if not offered:
                    raise UnknownNameError(f"{name} {value!r}: this index has no {name} to filter by; leave it out")
                if value not in offered:
                    raise UnknownNameError(f"unknown {name} {value!r}; GET /api/info lists the known ones")

        # Visitors know a selection by its name only. They never send a path.
        path = None if options.selection is None else self.selections[options.selection]
        return Filter(
            where=options.where,
            label_value=requested["label"],
            part=requested["split"],
            language=requested["language"],
            selection=path,
        )

    @property
    def version(self) -> str:
        """Version of the rows, which changes with the cache."""
        return self.index.cache.info.index_digest[:16]

    def check_match(self, request: SearchRequest) -> None:
        """Raise a SettingError if the index cannot compare the query of a request in the requested way."""
        if request.text is None and request.match != "vectors":
            raise SettingError(f"match: expected a text to match {request.match}, got another query")
        if request.text is not None and request.match not in self.matches:
            reason = self.rejected_queries.get("text", "its cache has no captions")
            raise SettingError(f"this index does not accept texts to match {request.match}: {reason}")

    def info(self) -> dict[str, Any]:
        """Return the fields of `ServerInfo` except its limits of this API."""
        return {
            "name": self.index.path.resolve().name,
            "version": self.version,
            "modality": self.index.card.modality,
            "num_items": self.index.count(Filter()),
            "run": None if self.index.run_path is None else self.index.run_path.resolve().name,
            "feature": self.index.card.feature,
            "takes": self.accepted_queries,
            "rejects": self.rejected_queries,
            "has_images": self.images is not None,
            "has_players": bool(self._players),
            "missing_images": self.missing_images,
            "credit": credit(self.index.cache),
            "filters": self.values,
            "matches": self.matches,
            "columns": self.index.cache.columns,
            "selections": list(self.selections),
            "has_coverage": self.coverage is not None,
            "max_upload_bytes": self.settings.max_upload,
            "collect": None if self.collected.path is None else self.collected.path.name,
        }

    def item(self, row: int) -> dict[str, Any]:
        """Return the fields of `ItemOut` for the item in a row."""
        rows = np.array([row])
        columns = self._samples.take(self.index.hits.samples(rows)).to_pylist()[0]
        return {
            "row": row,
            "key": columns.pop("key"),
            "path": _public_path(self.index.hits.paths(rows)[0]),
            "image": self._image_rows(rows)[0],
            "player": self._player_rows(rows)[0],
            "captions": self.index.hits.captions(row),
            "columns": columns,
        }

    def hits(self, hits: Sequence[Hit]) -> list[dict[str, Any]]:
        """Return the fields of `HitOut` for each hit."""
        rows = np.array([hit.row for hit in hits], np.int64)
        fields = []
        for hit, image, player in zip(hits, self._image_rows(rows), self._player_rows(rows), strict=True):
            path = _public_path(hit.path)
            fields.append({**asdict(hit), "path": path, "name": hit.name, "image": image, "player": player})
        return fields

    def items(self, rows_K: Ints) -> list[dict[str, Any]]:
        """Return the fields of `HitOut` for the items in some rows, which no query found."""
        hits = self.hits(self.index.hits.read(np.zeros(len(rows_K), np.float32), rows_K))
        for hit in hits:
            hit["score"] = None
        return hits

    def opening(self) -> dict[str, Any]:
        """Return the fields of `OpeningOut`."""
        # The state is read first: the map may become ready meanwhile, and must not be announced without its content.
        state = self.map.state
        questions = self.map.questions() if "text" in self.accepted_queries else []
        hits = self.items(self.map.sample())
        return {"state": state, "reason": self.map.reason, "hits": hits, "questions": questions}

    def describe_map(self) -> dict[str, Any]:
        """Return the fields of `MapOut`."""
        # Read first, as in `opening`.
        state = self.map.state
        index_map = self.map.found
        return {
            "state": state,
            "reason": self.map.reason,
            "projection": index_map.projection,
            "num_points": len(index_map.rows),
            "clusters": [asdict(cluster) for cluster in index_map.clusters],
        }

    def cluster(self, number: int) -> dict[str, Any]:
        """Return the fields of `ClusterHits` for a cluster of the map, or raise an UnknownNameError."""
        cluster = self.map.cluster(number)
        return {"name": cluster.name, "hits": self.items(np.array(cluster.nearest, np.int64))}

    def row_of(self, key: str) -> int:
        """Return the row of the first indexed item of a sample, or raise an UnknownNameError.

        Unless all keys were loaded, blocks of keys are read until it is found.
        """
        sample = self.index.hits.find_key(key)
        if sample >= 0:
            (start,), (count,) = self.index.hits.find(np.array([sample]))
            for row in range(start, start + count):
                # An item that failed has a row, but no vector in the index.
                if self.index.query_encoder.has_row(row):
                    return row
        raise UnknownNameError(f"this index has no item of the sample {key!r}")

    def _image_rows(self, rows_K: Ints) -> list[int | None]:
        """Return the row of the image to show for each item. A caption shows the first image of its sample, if any."""
        if self.images is None:
            return [None] * len(rows_K)
        if not self._shows_images_of_captions:
            return list(rows_K.tolist())

        starts, counts = self._images.find(self.index.hits.samples(rows_K))
        return [start if count else None for start, count in zip(starts.tolist(), counts.tolist(), strict=True)]

    def _player_rows(self, rows_K: Ints) -> list[dict[str, Any] | None]:
        """Return the fields of `PlayerOut` for each item, of itself or of the first item of its sample to play."""
        players: list[dict[str, Any] | None] = [None] * len(rows_K)
        for modality, reader in self._players.items():
            starts_K = rows_K
            counts_K = np.ones(len(rows_K), np.int64)
            if modality != self.index.card.modality:
                starts_K, counts_K = reader.find(self.index.hits.samples(rows_K))

            # A video, which comes first, is preferred to a recording of the same sample.
            places = [place for place in np.flatnonzero(counts_K).tolist() if players[place] is None]
            intervals = reader.take(starts_K[places]).drop_columns("sample").to_pylist()
            for place, interval in zip(places, intervals, strict=True):
                players[place] = {"modality": modality, "row": int(starts_K[place]), **interval}
        return players

    @property
    def _shows_images_of_captions(self) -> bool:
        return self.images is not None and self.index.card.modality != "image"

    def concept(self, number: int) -> dict[str, Any]:
        """Return the fields of `ConceptHits` for a concept, or raise an UnknownNameError."""
        if self.coverage is None:
            raise UnknownNameError(f"unknown concept {number}; there is no coverage")
        concept, nearest, strip = self.coverage.concept(number)
        strip_hits = self._read_hits(strip)
        for hit, item in zip(strip_hits, strip, strict=True):
            hit["shows"] = item["shows"]
        return {**concept, "hits": self._read_hits(nearest), "strip": strip_hits}

    def _read_hits(self, items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        # Rounding lets a cosine exceed 1.
        scores = np.clip([item["cosine"] for item in items], -1, 1)
        rows = np.array([item["row"] for item in items], np.int64)
        return self.hits(self.index.hits.read(scores, rows))


def _public_path(path: str | None) -> str | None:
    """Return the path of an item as visitors may see it. Only the name is returned for a file outside of the source.

    Such a path shows folders of this machine, and a URL may contain credentials. In a merged cache, paths follow the
    number of their source.
    """
    if path is None or not (path.startswith("/") or "//" in path or ".." in path.split("/")):
        return path
    return path.partition("?")[0].rpartition("/")[2] or None


@dataclass(frozen=True, kw_only=True)
class ServePaths:
    """Files and folders to serve: an index, its run and cache if they have moved, selections, and coverage.

    Args:
        selections: selections that visitors may filter by.
        coverage: report of `embedcache curate coverage --output`.
        concepts: cache of concepts whose coverage is measured at the start.
        collect: new `.parquet` file, to which visitors with the token may write the items that they collect.
    """

    index: Path
    run: Path | None = None
    cache: str | None = None
    selections: Sequence[Path] = ()
    coverage: Path | None = None
    concepts: str | None = None
    collect: Path | None = None


_QUERIES: tuple[Modality, ...] = ("text", *(modality.name for modality in FILE_MODALITIES))


def open_service(paths: ServePaths, settings: ServeSettings, *, device: str, progress: Progress) -> SearchService:
    """Open everything that is served; see `OpenIndex` and `SearchService` for the errors."""
    if paths.coverage is not None and paths.concepts is not None:
        raise SettingError("coverage: expected --coverage or --concepts, got both; omit one of them")

    index = OpenIndex(
        paths.index,
        run=paths.run,
        cache=paths.cache,
        label=settings.label,
        filter_timeout_s=_FILTER_TIMEOUT_S,
        device=device,
    )
    coverage = None
    if paths.coverage is not None:
        coverage = read_coverage(paths.coverage, index)
    elif paths.concepts is not None:
        coverage = measure_served_coverage(paths.concepts, index, progress)

    return SearchService(
        index,
        settings,
        selections=paths.selections,
        coverage=coverage,
        concepts=paths.concepts,
        collect=paths.collect,
    )


def _open_encoders(index: OpenIndex) -> dict[str, str]:
    """Open the encoders of queries. Return the modalities that are not accepted, each with the reason."""
    rejections: dict[str, str] = {}
    for modality in _QUERIES:
        rejection = index.query_encoder.rejection(modality)
        if rejection is None:
            try:
                index.query_encoder.encoder(modality)
            except (MissingExtraError, PathError) as error:
                # The server works without it. The error may contain a path of this machine.
                log.warning("%s queries: %s", modality, error)
                rejection = "its encoder cannot be opened; the reason is in the server's log"
        if rejection is not None:
            rejections[modality] = rejection
    return rejections


def _offered_values(index: OpenIndex) -> dict[str, dict[str, int]]:
    """Return the values of splits, labels and languages that visitors may filter by, and the number of their items."""
    num_items = index.count(Filter())
    offered = {}
    for name in ("split", "label", "language"):
        # A filter that leaves nothing out is not offered.
        counts = index.values(name)
        if len(counts) > 1 or any(count < num_items for count in counts.values()):
            offered[name] = counts
    return offered


def _open_players(index: OpenIndex, shown: Mapping[str, ServedItems]) -> dict[str, RowReader]:
    """Open the intervals of items to play: of the index's own items, else of other items of their samples."""
    modalities = [index.card.modality] if index.card.modality in PLAYED else PLAYED
    players = {}
    for name in modalities:
        if name in shown:
            players[name] = RowReader(index.cache, name, ["sample", "start_s", "stop_s"])
    return players


def _open_items(index: OpenIndex) -> tuple[dict[str, ServedItems], str | None]:
    """Open the items to show, by modality, or return why they are missing; search works without them."""
    modalities = [name for name in PICTURED if index.cache.info.num_items.get(name)]
    try:
        return {name: ServedItems(index.cache, name) for name in modalities}, None
    except EmbedcacheError as error:
        log.warning("%s", error)
        nouns = " and ".join(map(noun, modalities))
        return {}, f"the {nouns} cannot be read; the reason is in the server's log"


InfoTable: TypeAlias = dict[str, Any]
"""`title`, and `rows`: pairs of a name and a text."""

# Fields of the card that contain paths, or say nothing to a visitor.
_NOT_SHOWN = ("cache", "run", "fingerprint", "files")


def info_tables(index: OpenIndex) -> list[InfoTable]:
    """Return tables that describe an index, the run that projected it, and its cache. They contain no paths."""
    card = index.card.to_json()
    for name in _NOT_SHOWN:
        card.pop(name, None)
    tables: dict[str, dict[str, Any]] = {"Index": card}

    run = index.query_encoder.run
    if run is not None:
        inputs = {f"{modality} feature": f"{side.feature} of {side.spec}" for modality, side in run.info.inputs.items()}
        tables["Run"] = {
            "name": run.path.resolve().name,
            "projector": run.projector,
            "shared width": run.shared_width,
            **inputs,
            "weights": run.info.weights,
            **run.info.report,
        }

    info = index.cache.info
    tables["Cache"] = {
        "name": index.cache.path.resolve().name,
        "source": info.source.get("type"),
        "samples": info.num_samples,
        **{noun(modality): num for modality, num in info.num_items.items()},
        "columns": ", ".join(index.cache.columns),
        "index_digest": info.index_digest,
    }
    return [{"title": title, "rows": _flat("", values)} for title, values in tables.items()]


def _flat(prefix: str, values: Mapping[str, Any]) -> list[list[str]]:
    """Return nested values as pairs of a name and a text. The name of an inner value follows the outer name."""
    rows = []
    for name, value in values.items():
        title = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += _flat(f"{title}: ", value)
        elif isinstance(value, float):
            rows.append([title, f"{value:.4g}"])
        elif isinstance(value, int):
            rows.append([title, f"{value:,}"])
        elif value is not None:
            rows.append([title, str(value)])
    return rows
