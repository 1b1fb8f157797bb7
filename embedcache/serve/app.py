"""The app: one page, and the API behind it.

The files of the pages, as they lie in the package: nothing else can be asked for.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL.Image import Image
from starlette.exceptions import HTTPException

from embedcache.errors import EmbedcacheError, ItemError, UnknownNameError
from embedcache.serve.batching import Answer, Batcher, BusyError, Question, answer_all
from embedcache.serve.guard import BUG, PICTURE_PATH
from embedcache.serve.schema import (
    MOST_HITS,
    CardOut,
    ConceptHits,
    Coverage,
    ErrorOut,
    Info,
    Item,
    SearchRequest,
    SearchResponse,
    Wishes,
)
from embedcache.serve.served import Card, Served, cards
from embedcache.sources.images import decode_image

T = TypeVar("T")
Row = Annotated[int, Path(ge=0, le=10**12)]

log = logging.getLogger("embedcache.serve")

_NUM_QUESTIONS = 4
"""Pictures to ask with that are in memory at the same time, from the first byte to the answer; others wait."""

_NUM_READERS = 2
"""Pictures decoded at the same time: each may take a quarter of a gigabyte."""

_ABOUT = """Search one index of frozen embeddings with words, pictures or items.

Answers are JSON; an error is {"error": "one line"}."""
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorOut, "description": said}
    for status, said in {
        400: "it cannot be answered",
        404: "there is nothing of that name",
        413: "too long",
        422: "not as described",
        503: "too many ask, or it took too long",
    }.items()
}


def make_app(served: Served) -> FastAPI:
    """Make the app. Whoever serves it puts a `Guard` before it."""
    batcher: Batcher[Question, Answer] = Batcher(partial(answer_all, served.index))
    readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="pictures")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        answering = asyncio.create_task(batcher.run())
        yield
        answering.cancel()
        with suppress(asyncio.CancelledError):
            await answering
        readers.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="embedcache",
        description=_ABOUT,
        version=version("embedcache"),
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere
        redoc_url=None,
        responses=_ERRORS,
    )
    add_pages(app)
    _add_errors(app)
    _add_search(app, served, batcher, partial(_on, readers))
    _add_items(app, served, partial(_on, readers))
    _add_about(app, served)
    return app


async def _on(threads: ThreadPoolExecutor, call: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, call, *arguments)


def _add_search(app: FastAPI, served: Served, batcher: Batcher[Question, Answer], read: Callable[..., Any]) -> None:
    turns = asyncio.Semaphore(_NUM_QUESTIONS)

    async def ask(wishes: Wishes, **question: Any) -> SearchResponse:
        keep = served.filter(
            labels=wishes.labels, splits=wishes.splits, languages=wishes.languages, selection=wishes.selection
        )
        answer = await batcher.ask(Question(k=wishes.k, keep=keep, **question))
        return SearchResponse.model_validate(
            {
                "hits": [served.hit(hit) for hit in answer.hits],
                "encode_ms": round(answer.encode_ms, 3),
                "search_ms": round(answer.search_ms, 3),
            }
        )

    @app.post("/api/search")
    async def search(asked: SearchRequest) -> SearchResponse:
        """Find what fits words, or what is like an item."""
        if (asked.text is None) == (asked.row is None):
            raise HTTPException(422, "give either text or row")
        if asked.text is not None and not asked.text.strip():
            raise HTTPException(422, "the text is empty; give some words")
        if asked.text is not None and "text" not in served.takes:
            raise HTTPException(400, "this index cannot be compared with words; ask with a picture or a row")
        if asked.row is not None and not served.index.query_encoder.has_row(asked.row):
            raise HTTPException(404, f"row {asked.row} is not in the index")
        return await ask(asked, text=asked.text, row=asked.row)

    @app.post(PICTURE_PATH, openapi_extra=_PICTURE_BODY)
    async def search_with_a_picture(request: Request, wishes: Annotated[Wishes, Query()]) -> SearchResponse:
        """Find what is like a picture: the body is the file, JPEG, PNG, WebP, GIF, BMP or TIFF."""
        if "image" not in served.takes:
            raise HTTPException(400, "this index cannot be compared with pictures; ask with words or a row")
        async with turns:
            most = served.settings.max_pixels
            picture: Image = await read(partial(decode_image, await request.body(), max_pixels=most))
            return await ask(wishes, picture=picture)


def _add_items(app: FastAPI, served: Served, read: Callable[..., Any]) -> None:
    def webp(data: bytes) -> Response:
        return Response(data, media_type="image/webp", headers={"Cache-Control": "private, max-age=86400"})

    def check(row: int) -> None:
        if served.pictures is None or row >= served.pictures.num:
            raise HTTPException(404, f"there is no picture {row}")

    @app.get("/api/items/{row}")
    async def item(row: Row) -> Item:
        """Give all that the cache says of an item."""
        if row >= len(served.index.hits.samples):
            raise HTTPException(404, f"there is no item {row}")
        return Item.model_validate(served.item(row))

    @app.get("/api/images/{row}/thumbnail", response_class=Response)
    async def thumbnail(row: Row) -> Response:
        """Give a picture as WebP, at most 224 pixels a side."""
        check(row)
        return webp(await read(served.pictures.thumbnail, row))  # type: ignore[union-attr]

    @app.get("/api/images/{row}/picture", response_class=Response)
    async def picture(row: Row) -> Response:
        """Give a picture as WebP, at most 1,280 pixels a side."""
        check(row)
        return webp(await read(served.pictures.picture, row))  # type: ignore[union-attr]


def _add_about(app: FastAPI, served: Served) -> None:
    @app.get("/api/info")
    async def info() -> Info:
        """Say what this server holds and takes."""
        return Info.model_validate({**served.info(), "most_hits": MOST_HITS})

    @app.get("/api/cards", response_model=list[CardOut])
    async def index_and_run_cards() -> list[Card]:
        """Say what the index, its run and its cache are."""
        return cards(served.index)

    @app.get("/api/coverage")
    async def coverage() -> Coverage:
        """Count the items of each concept."""
        if served.coverage is None:
            raise HTTPException(404, "there is no coverage here; start the server with --concepts or --coverage")
        return Coverage.model_validate({**served.coverage.about, "concepts": served.coverage.concepts})

    @app.get("/api/coverage/{number}")
    async def concept(number: Row) -> ConceptHits:
        """Give the items that are most similar to a concept."""
        return ConceptHits.model_validate(served.concept(number))


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def not_as_described(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
        return JSONResponse({"error": f"{place or 'the body'}: {first['msg']}"}, 422)

    @app.exception_handler(EmbedcacheError)
    async def cannot(request: Request, error: EmbedcacheError) -> JSONResponse:
        if isinstance(error, UnknownNameError):
            return JSONResponse({"error": error.args[0]}, 404)
        if isinstance(error, ItemError) and request.method == "GET":  # its text may hold a path of this machine
            log.warning("%s: %s", request.url.path, error)
            return JSONResponse({"error": "the picture cannot be read; the server's log says why"}, 404)
        return JSONResponse({"error": str(error)}, 400)

    @app.exception_handler(BusyError)
    async def busy(_: Request, __: BusyError) -> JSONResponse:
        return JSONResponse({"error": "too many are asking; ask again in a moment"}, 503, headers={"Retry-After": "1"})

    @app.exception_handler(Exception)
    async def bug(_: Request, __: Exception) -> JSONResponse:
        return JSONResponse({"error": BUG}, 500)


_PICTURE_BODY = {
    "requestBody": {
        "required": True,
        "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
    }
}

_PAGES = {"/": "index.html", "/api": "api.html"}
_FILES = ("page.css", "page.js", "search.js", "grid.js", "coverage.js", "cards.js", "dom.js", "api.js", "icon.svg")
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def add_pages(app: FastAPI) -> None:
    """Serve the pages and what they load."""
    folder = files("embedcache.serve") / "page"
    for url, name in {**_PAGES, **{f"/{name}": name for name in _FILES}}.items():
        _add_file(app, url, (folder / name).read_bytes(), _TYPES[name.rpartition(".")[2]])


def _add_file(app: FastAPI, url: str, content: bytes, media_type: str) -> None:
    async def give() -> Response:
        return Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})

    app.add_api_route(url, give, methods=["GET", "HEAD"], include_in_schema=False)
