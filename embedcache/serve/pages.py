"""The files of the pages, as they lie in the package: nothing else can be asked for."""

from importlib.resources import files

from fastapi import FastAPI, Response

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
