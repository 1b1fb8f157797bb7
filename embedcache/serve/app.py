"""The web app: the JSON API, and the files of its pages, which are the only files that can be requested."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path as FilePath
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import Field
from starlette.exceptions import HTTPException

from embedcache.arrays import Ints
from embedcache.dataset.thumbnails import PICTURED, PLAYED, UnplayableError
from embedcache.encoders.base import Modality
from embedcache.errors import EmbedcacheError, ItemError, UnknownNameError
from embedcache.modalities import FILE_MODALITIES, MODALITIES, noun, one_noun
from embedcache.serve.batching import Batcher, BusyError, SearchQuery, SearchResult, search_batch
from embedcache.serve.collect import DOWNLOAD_NAME
from embedcache.serve.guard import BUG, FILE_SEARCH_PATH, SELECTION_PATH
from embedcache.serve.media import KEPT, Decoders, ServedItems, receive_item, respond_with_part
from embedcache.serve.schema import (
    MAX_COLLECTED,
    MAX_HITS,
    CardOut,
    ClusterHits,
    ConceptAnswer,
    ConceptHits,
    CoverageOut,
    HitOut,
    ItemOut,
    MapOut,
    OpeningOut,
    SavedOut,
    SearchOptions,
    SearchRequest,
    SearchResponse,
    ServerInfo,
)
from embedcache.serve.service import InfoTable, SearchService, info_tables
from embedcache.sources.files import MEDIA_SUFFIXES

_Row = Annotated[int, Path(ge=0, le=10**12)]
_Range = Annotated[str | None, Header(alias="Range")]
_Rows = Annotated[list[Annotated[int, Field(ge=0, le=10**12)]], Query(min_length=1, max_length=200)]

log = logging.getLogger("embedcache.serve")

_PAGE = FilePath(__file__).parent / "page"
"""The only files that can be requested."""

_ABOUT = """Search one index of frozen embeddings with texts, images or indexed items.

Responses are JSON; an error is {"error": "one line"}."""
_NO_JSON = "the body: expected a JSON object in UTF-8, sent with the header Content-Type: application/json"
_UNREADABLE_BODY = "There was an error parsing the body"
"""FastAPI's words for bytes that are not text, and for JSON that Python cannot represent."""


def make_app(service: SearchService) -> FastAPI:
    """Create the app of an index, which must be served behind a `RequestGuard`."""
    batcher: Batcher[SearchQuery, SearchResult] = Batcher(partial(search_batch, service.index))
    decoders = Decoders()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Requests are answered from files until everything is loaded.
        loading = [asyncio.create_task(asyncio.to_thread(load)) for load in (service.load, service.map.load)]
        batches = asyncio.create_task(batcher.run())
        yield

        # A map that is computed would keep the process alive for minutes.
        service.map.stop()
        await asyncio.gather(*loading)
        batches.cancel()
        with suppress(asyncio.CancelledError):
            await batches

    app = FastAPI(
        title="embedcache",
        description=_ABOUT,
        version=version("embedcache"),
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere
        redoc_url=None,
    )
    _add_errors(app)
    _add_search(app, service, batcher, decoders)
    _add_items(app, service)
    for modality in PICTURED:
        _add_media(app, modality, service, decoders)
    _add_info(app, service)
    _add_map(app, service)
    _add_selection(app, service)

    @app.get("/api", include_in_schema=False)
    async def api_page() -> FileResponse:
        return FileResponse(_PAGE / "api.html")

    app.mount("/", StaticFiles(directory=_PAGE, html=True, follow_symlink=True))
    return app


def _add_search(
    app: FastAPI, service: SearchService, batcher: Batcher[SearchQuery, SearchResult], decoders: Decoders
) -> None:
    async def respond(options: SearchOptions, **query: Any) -> SearchResponse:
        result = await batcher.submit(SearchQuery(k=options.k, keep=service.filter(options), **query))
        fields = {
            "hits": service.hits(result.hits),
            "encode_ms": round(result.encode_ms, 3),
            "search_ms": round(result.search_ms, 3),
        }
        return SearchResponse.model_validate(fields)

    @app.post("/api/search")
    async def search(request: SearchRequest) -> SearchResponse:
        """Search with a text, or for items similar to an indexed one."""
        row = request.row
        # One of the three is the query, and the others are null.
        if [request.text, request.row, request.key].count(None) != 2:
            raise HTTPException(422, "expected either text, row or key")
        if request.text is not None and not request.text.strip():
            raise HTTPException(422, "text: expected some words, got an empty text")
        service.check_match(request)

        # Searching for a key may read files, and must not hold up other requests.
        if request.key is not None:
            row = await asyncio.to_thread(service.row_of, request.key)
        if row is not None and not service.index.query_encoder.has_row(row):
            raise HTTPException(404, f"row {row} is not in the index")
        return await respond(request, text=request.text, row=row, match=request.match)

    for each in FILE_MODALITIES:
        _add_file_search(app, each.name, service, decoders, respond)


def _add_file_search(
    app: FastAPI,
    modality: Modality,
    service: SearchService,
    decoders: Decoders,
    respond: Callable[..., Awaitable[SearchResponse]],
) -> None:
    suffixes = ", ".join(sorted(MEDIA_SUFFIXES[modality]))
    about = f"Search with {_KINDS[modality]}: the body is the file, {suffixes}."

    @app.post(f"{FILE_SEARCH_PATH}{modality}", openapi_extra=_binary_body(_TYPES[modality]), description=about)
    async def search_with_file(request: Request, options: Annotated[SearchOptions, Query()]) -> SearchResponse:
        if modality in service.rejected_queries:
            reason = service.rejected_queries[modality]
            raise HTTPException(400, f"this index does not accept {noun(modality)}: {reason}")
        # A small file may decode to a huge image.
        decode = MODALITIES[modality].load_decoder()
        if modality == "image":
            background = service.index.query_encoder.background
            decode = partial(decode, max_pixels=service.settings.max_pixels, background=background)
        async with receive_item(request.stream(), decoders, decode) as item:
            return await respond(options, item=(modality, item))


def _add_items(app: FastAPI, service: SearchService) -> None:
    def check_item(row: int) -> None:
        if row >= service.index.cache.num_rows(service.index.card.modality):
            raise HTTPException(404, f"unknown item {row}")

    @app.get("/api/items")
    async def items(rows: _Rows) -> list[HitOut]:
        """Return some items of the cache, as hits are returned."""
        check_item(max(rows))
        return [HitOut.model_validate(item) for item in service.items(np.array(rows, np.int64))]

    @app.get("/api/items/{row}")
    async def item(row: _Row) -> ItemOut:
        """Return all data of an item in the cache."""
        check_item(row)
        return ItemOut.model_validate(service.item(row))


_SHOWN = {"image": "an image", "video": "the middle frame of a video", "audio": "the spectrogram of a recording"}
_PLAYED = {"video": "a video, as the file that it is stored in", "audio": "a recording, as a WAV of 16 kHz mono"}


def _add_media(app: FastAPI, modality: str, service: SearchService, decoders: Decoders) -> None:
    path = f"/api/{noun(modality)}/{{row}}"

    def served(row: int) -> ServedItems:
        items = service.shown.get(modality)
        if items is None or row >= items.num_items:
            raise HTTPException(404, f"unknown {one_noun(modality)} {row}")
        return items

    def webp(data: bytes) -> Response:
        return Response(data, media_type="image/webp", headers=KEPT)

    describe = f"Return {_SHOWN[modality]}, as WebP of at most {{}} pixels per side.".format

    @app.get(f"{path}/thumbnail", response_class=Response, description=describe("224"))
    async def thumbnail(row: _Row) -> Response:
        return webp(await decoders.run(served(row).thumbnail, row))

    @app.get(f"{path}/full", response_class=Response, description=describe("1,280"))
    async def full(row: _Row) -> Response:
        return webp(await decoders.run(served(row).image, row))

    if modality in PLAYED:
        description = f"Return {_PLAYED[modality]}, or with the header Range up to 1 MiB of it."

        @app.get(f"{path}/play", response_class=Response, description=description)
        async def play(row: _Row, part: _Range = None) -> Response:
            return respond_with_part(await decoders.run(served(row).play, row), part)


def _add_info(app: FastAPI, service: SearchService) -> None:
    @app.get("/api/info")
    async def info() -> ServerInfo:
        """Return the content and the capabilities of this server."""
        return ServerInfo.model_validate({**service.info(), "most_hits": MAX_HITS, "most_collected": MAX_COLLECTED})

    @app.get("/api/cards", response_model=list[CardOut])
    async def index_and_run_cards() -> list[InfoTable]:
        """Return tables that describe the index, its run and its cache."""
        return info_tables(service.index)

    @app.get("/api/coverage")
    async def coverage() -> CoverageOut:
        """Return the number of items of each concept."""
        measured = service.coverage
        if measured is None:
            raise HTTPException(404, "no coverage; start the server with --concepts or --coverage")
        return CoverageOut.model_validate({**measured.summary, "concepts": measured.concepts()})

    @app.get("/api/coverage/{number}")
    async def concept(number: _Row) -> ConceptHits:
        """Return the items that are most similar to a concept, and some of all ranks that a person can answer for."""
        return ConceptHits.model_validate(service.concept(number))

    @app.post("/api/coverage/{number}/answer")
    async def answer(number: _Row, answered: ConceptAnswer) -> ConceptHits:
        """Save whether an item shows a concept, and return the concept as all answers settle it."""
        if service.coverage is not None:
            await asyncio.to_thread(service.coverage.answer, number, answered.row, shows=answered.shows)
        return ConceptHits.model_validate(service.concept(number))


def _add_map(app: FastAPI, service: SearchService) -> None:
    @app.get("/api/opening")
    async def opening() -> OpeningOut:
        """Return what the page opens on: a sample of the index, and example questions."""
        return OpeningOut.model_validate(service.opening())

    @app.get("/api/map")
    async def index_map() -> MapOut:
        """Return the clusters of the map, and whether there is one."""
        return MapOut.model_validate(service.describe_map())

    @app.get("/api/map/points", response_class=Response)
    async def points() -> Response:
        """Return the items on the map: row (uint32), x, y (uint16, of 65,535) and cluster (uint16), little-endian, each
        as one array of all items, one after the other.
        """
        return Response(service.map.points(), media_type="application/octet-stream")

    @app.get("/api/map/{number}")
    async def cluster(number: _Row) -> ClusterHits:
        """Return the items nearest to the center of a cluster."""
        return ClusterHits.model_validate(service.cluster(number))


def _add_selection(app: FastAPI, service: SearchService) -> None:
    async def read_rows(request: Request, version: str | None) -> Ints:
        if version not in (None, service.version):
            raise HTTPException(409, "the index has changed since these items were collected; reload the page")
        data = await request.body()
        if not data or len(data) % 4:
            raise HTTPException(422, f"expected rows of 4 bytes each, got {len(data):,} bytes")
        return np.frombuffer(data, "<u4").astype(np.int64)

    @app.post(SELECTION_PATH, response_class=Response, openapi_extra=_ROWS_BODY)
    async def encode_selection(request: Request, version: str | None = None) -> Response:
        """Return a selection of the samples of some items, as Parquet: the body is their rows (uint32, little-endian).

        With `version`, an index of another version refuses the rows.
        """
        data = await asyncio.to_thread(service.collected.encode, await read_rows(request, version))
        headers = {"Content-Disposition": f'attachment; filename="{DOWNLOAD_NAME}"'}
        return Response(data, media_type="application/vnd.apache.parquet", headers=headers)

    @app.put(SELECTION_PATH, openapi_extra=_ROWS_BODY)
    async def save_selection(request: Request, version: str | None = None) -> SavedOut:
        """Write the same selection to the file of --collect."""
        name, num_samples = await asyncio.to_thread(service.collected.save, await read_rows(request, version))
        return SavedOut(name=name, num_samples=num_samples)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        detail = _NO_JSON if error.detail == _UNREADABLE_BODY else error.detail
        return JSONResponse({"error": detail}, error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid_request(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]

        # The body is not JSON, or not an object.
        if first["type"] == "json_invalid" or tuple(first["loc"]) == ("body",):
            return JSONResponse({"error": _NO_JSON}, 422)
        location = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
        return JSONResponse({"error": f"{location or 'the body'}: {first['msg']}"}, 422)

    @app.exception_handler(EmbedcacheError)
    async def user_error(request: Request, error: EmbedcacheError) -> JSONResponse:
        if isinstance(error, UnknownNameError):
            return JSONResponse({"error": error.args[0]}, 404)
        if isinstance(error, UnplayableError):
            return JSONResponse({"error": str(error)}, 404)
        # The message may contain a path of this machine.
        if isinstance(error, ItemError) and request.method == "GET":
            log.warning("%s: %s", request.url.path, error)
            return JSONResponse({"error": "the item cannot be read; the reason is in the server's log"}, 404)
        return JSONResponse({"error": str(error)}, 400)

    @app.exception_handler(BusyError)
    async def busy(_: Request, __: BusyError) -> JSONResponse:
        return JSONResponse({"error": "too many requests; retry in a moment"}, 503, headers={"Retry-After": "1"})

    @app.exception_handler(Exception)
    async def bug(_: Request, __: Exception) -> JSONResponse:
        return JSONResponse({"error": BUG}, 500)


def _binary_body(media_type: str) -> dict[str, Any]:
    """Return the description of a request whose body is bytes."""
    content = {media_type: {"schema": {"type": "string", "format": "binary"}}}
    return {"requestBody": {"required": True, "content": content}}


_KINDS = {"image": "an image", "audio": "a recording", "video": "a video", "points": "a point cloud"}
_TYPES = {"image": "image/*", "audio": "audio/*", "video": "video/*", "points": "application/zip"}
"""Modality -> type of a file of a query."""
_ROWS_BODY = _binary_body("application/octet-stream")
