"""The web app: the JSON API, and the files of its pages, which are the only files that can be requested."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from embedcache.errors import EmbedcacheError, ItemError, UnknownNameError
from embedcache.serve.batching import Batcher, BusyError, SearchQuery, SearchResult, search_batch
from embedcache.serve.guard import BUG, IMAGE_SEARCH_PATH
from embedcache.serve.images import ServedImages
from embedcache.serve.schema import (
    MAX_HITS,
    CardOut,
    ConceptHits,
    CoverageOut,
    ErrorOut,
    ItemOut,
    SearchOptions,
    SearchRequest,
    SearchResponse,
    ServerInfo,
)
from embedcache.serve.service import InfoTable, SearchService, info_tables
from embedcache.serve.uploads import ImageThreads, Uploads

_Row = Annotated[int, Path(ge=0, le=10**12)]

log = logging.getLogger("embedcache.serve")

_ABOUT = """Search one index of frozen embeddings with texts, images or indexed items.

Responses are JSON; an error is {"error": "one line"}."""
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorOut, "description": description}
    for status, description in {
        400: "the request cannot be answered",
        404: "unknown name or row",
        413: "the request is too large",
        422: "the request has another form than described",
        503: "too many requests, or a timeout",
    }.items()
}


def make_app(service: SearchService) -> FastAPI:
    """Create the app, which must be served behind a `RequestGuard`."""
    batcher: Batcher[SearchQuery, SearchResult] = Batcher(partial(search_batch, service.index))
    threads = ImageThreads()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(asyncio.to_thread(service.load))
        task = asyncio.create_task(batcher.run())
        yield
        await loading
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        threads.shut_down()

    app = FastAPI(
        title="embedcache",
        description=_ABOUT,
        version=version("embedcache"),
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere
        redoc_url=None,
        responses=_ERRORS,
    )
    _add_pages(app)
    _add_errors(app)
    _add_search(app, service, batcher, threads)
    _add_items(app, service, threads)
    _add_info(app, service)
    return app


def _add_search(
    app: FastAPI, service: SearchService, batcher: Batcher[SearchQuery, SearchResult], threads: ImageThreads
) -> None:
    settings = service.settings
    uploads = Uploads(threads, max_bytes=settings.max_upload, max_pixels=settings.max_pixels)

    async def respond(options: SearchOptions, **query: Any) -> SearchResponse:
        result = await batcher.submit(SearchQuery(k=options.k, keep=service.filter(options), **query))
        encode_ms, search_ms = round(result.encode_ms, 3), round(result.search_ms, 3)
        hits = service.hits(result.hits)
        return SearchResponse.model_validate({"hits": hits, "encode_ms": encode_ms, "search_ms": search_ms})

    @app.post("/api/search")
    async def search(request: SearchRequest) -> SearchResponse:
        """Search with a text, or for items similar to an indexed one."""
        if (request.text is None) == (request.row is None):
            raise HTTPException(422, "expected either text or row")
        if request.text is not None and not request.text.strip():
            raise HTTPException(422, "text: expected some words, got an empty text")
        if request.text is not None and "text" not in service.accepted_queries:
            raise HTTPException(400, "this index does not accept texts; search with an image or a row")
        if request.row is not None and not service.index.query_encoder.has_row(request.row):
            raise HTTPException(404, f"row {request.row} is not in the index")
        return await respond(request, text=request.text, row=request.row)

    @app.post(IMAGE_SEARCH_PATH, openapi_extra=_IMAGE_BODY)
    async def search_with_image(request: Request, options: Annotated[SearchOptions, Query()]) -> SearchResponse:
        """Search with an image: the body is the file, JPEG, PNG, WebP, GIF, BMP or TIFF."""
        if "image" not in service.accepted_queries:
            raise HTTPException(400, "this index does not accept images; search with a text or a row")
        async with uploads.receive(request.stream()) as image:
            return await respond(options, image=image)


def _add_items(app: FastAPI, service: SearchService, threads: ImageThreads) -> None:
    def webp(data: bytes) -> Response:
        return Response(data, media_type="image/webp", headers={"Cache-Control": "private, max-age=86400"})

    def images_with(row: int) -> ServedImages:
        if service.images is None or row >= service.images.num_images:
            raise HTTPException(404, f"unknown image {row}")
        return service.images

    @app.get("/api/items/{row}")
    async def item(row: _Row) -> ItemOut:
        """Return all data of an item in the cache."""
        if row >= service.index.cache.num_rows(service.index.card.modality):
            raise HTTPException(404, f"unknown item {row}")
        return ItemOut.model_validate(service.item(row))

    @app.get("/api/images/{row}/thumbnail", response_class=Response)
    async def thumbnail(row: _Row) -> Response:
        """Return an image as WebP of at most 224 pixels per side."""
        return webp(await threads.run(images_with(row).thumbnail, row))

    @app.get("/api/images/{row}/full", response_class=Response)
    async def image(row: _Row) -> Response:
        """Return an image as WebP of at most 1,280 pixels per side."""
        return webp(await threads.run(images_with(row).image, row))


def _add_info(app: FastAPI, service: SearchService) -> None:
    @app.get("/api/info")
    async def info() -> ServerInfo:
        """Return what this server holds and accepts."""
        return ServerInfo.model_validate({**service.info(), "most_hits": MAX_HITS})

    @app.get("/api/cards", response_model=list[CardOut])
    async def index_and_run_cards() -> list[InfoTable]:
        """Return tables that describe the index, its run and its cache."""
        return info_tables(service.index)

    @app.get("/api/coverage")
    async def coverage() -> CoverageOut:
        """Return the number of items of each concept."""
        if service.coverage is None:
            raise HTTPException(404, "no coverage; start the server with --concepts or --coverage")
        return CoverageOut.model_validate({**service.coverage.summary, "concepts": service.coverage.concepts})

    @app.get("/api/coverage/{number}")
    async def concept(number: _Row) -> ConceptHits:
        """Return the items that are most similar to a concept."""
        return ConceptHits.model_validate(service.concept(number))


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid_request(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
        return JSONResponse({"error": f"{location or 'the body'}: {first['msg']}"}, 422)

    @app.exception_handler(EmbedcacheError)
    async def user_error(request: Request, error: EmbedcacheError) -> JSONResponse:
        if isinstance(error, UnknownNameError):
            return JSONResponse({"error": error.args[0]}, 404)
        if isinstance(error, ItemError) and request.method == "GET":  # its message may contain a path of this machine
            log.warning("%s: %s", request.url.path, error)
            return JSONResponse({"error": "the image cannot be read; the reason is in the server's log"}, 404)
        return JSONResponse({"error": str(error)}, 400)

    @app.exception_handler(BusyError)
    async def busy(_: Request, __: BusyError) -> JSONResponse:
        return JSONResponse({"error": "too many requests; retry in a moment"}, 503, headers={"Retry-After": "1"})

    @app.exception_handler(Exception)
    async def bug(_: Request, __: Exception) -> JSONResponse:
        return JSONResponse({"error": BUG}, 500)


_IMAGE_BODY = {
    "requestBody": {"required": True, "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}}
}

_PAGES = {"/": "index.html", "/api": "api.html"}
_FILES = ("page.css", "page.js", "search.js", "grid.js", "coverage.js", "cards.js", "dom.js", "api.js", "icon.svg")
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def _add_pages(app: FastAPI) -> None:
    folder = files("embedcache.serve") / "page"
    for url, name in {**_PAGES, **{f"/{name}": name for name in _FILES}}.items():
        _add_file(app, url, (folder / name).read_bytes(), _TYPES[name.rpartition(".")[2]])


def _add_file(app: FastAPI, url: str, content: bytes, media_type: str) -> None:
    async def send() -> Response:
        return Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})

    app.add_api_route(url, send, methods=["GET", "HEAD"], include_in_schema=False)
