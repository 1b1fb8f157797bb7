"""Access control in front of the app: who may send requests, their size and time, and headers of responses."""

import asyncio
import hmac
import logging
import socket
from collections.abc import Mapping
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, cookie_parser
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedcache.serve.schema import MAX_COLLECTED
from embedcache.serve.settings import ServeSettings, parse_address

log = logging.getLogger("embedcache.serve")

_MAX_JSON_BYTES = 64 * 1024
FILE_SEARCH_PATH = "/api/search/"
"""Followed by the modality of the file."""
SELECTION_PATH = "/api/selection"
BUG = "something went wrong; the server's log says what"
_TIMEOUT = "this took too long; retry, or request fewer results"

_CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _CONTENT_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Headers of every response, also to requests that never reach the app."""


class RequestGuard:
    """Checks each request before the app sees it, and adds headers to each response.

    The token, if any, is sent as a cookie or as `Authorization: Bearer`. The port is part of the cookie's name, because
    cookies are shared by all ports.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, *, token: str | None, port: int) -> None:
        self._app = app
        self._settings = settings
        self._token = token
        self._cookie = f"embedcache-{port}"
        self._names = {"localhost", socket.gethostname().lower(), settings.host.lower()}
        self._names.update(map(str.lower, settings.names))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Anything but HTTP and lifespan events is dropped."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def send_guarded(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        error: Response
        try:
            async with asyncio.timeout(self._settings.timeout):
                rejection = self._rejection(scope)
                if rejection is not None:
                    await rejection(scope, receive, send_guarded)
                else:
                    await self._app(scope, _limited(receive, _max_bytes(scope, self._settings)), send_guarded)
            return
        except ClientDisconnect:
            log.debug("%s %s was abandoned", scope["method"], scope["path"])
            return
        except TimeoutError:
            error = _error(503, _TIMEOUT)
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            error = _error(500, BUG)
        # A response that has begun cannot be replaced by another one.
        if not has_begun:
            await error(scope, receive, send_guarded)

    def _rejection(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_own_name(host):
            return _error(
                421, f"host name {_host_name(host)!r} is not accepted; to accept it, start the server with --host-name"
            )
        if _is_cross_site(headers, host):
            return _error(403, "requests from pages of other sites are not accepted")
        return None if self._token is None else self._token_rejection(scope, headers, self._token)

    def _token_rejection(self, scope: Scope, headers: Headers, token: str) -> Response | None:
        """Return an error without the token. The link with the token sets a cookie and redirects to the page."""
        if scope["path"] == "/" and scope["method"] == "GET":
            link_token = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
            if _is_same(link_token, token):
                # The redirect takes the token out of the address bar, and so out of bookmarks and screenshots.
                response = RedirectResponse("/", status_code=303)
                response.set_cookie(self._cookie, token, httponly=True, samesite="lax", path="/")
                return response

        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        cookie = cookie_parser(headers.get("cookie", "")).get(self._cookie, "")
        if _is_same(cookie, token) or (scheme.lower() == "bearer" and _is_same(bearer.strip(), token)):
            return None
        return _error(
            401,
            "a token is required: open the link that embedcache serve printed, or send Authorization: Bearer TOKEN",
            {"WWW-Authenticate": "Bearer"},
        )

    def _is_own_name(self, host: str) -> bool:
        """Return whether a Host header names this server. Other names are rejected against DNS rebinding."""
        name = _host_name(host)
        return name in self._names or parse_address(name) is not None


def _max_bytes(scope: Scope, settings: ServeSettings) -> int:
    if scope["path"].startswith(FILE_SEARCH_PATH):
        return settings.max_upload
    return 4 * MAX_COLLECTED if scope["path"] == SELECTION_PATH else _MAX_JSON_BYTES


def _limited(receive: Receive, limit: int) -> Receive:
    """Return a receiver that raises once a body is too long, whatever its Content-Length says."""
    num_bytes = 0

    async def limited() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > limit:
            raise HTTPException(413, f"the request has too many bytes; expected at most {limit:,}")
        return message

    return limited


def _is_cross_site(headers: Headers, host: str) -> bool:
    """Return whether a page of another site sent a request. Following a link to this server is allowed."""
    origin = headers.get("origin")
    try:
        if origin is not None and urlsplit(origin).netloc != host:
            return True
    except ValueError:  # an origin such as http://[
        return True

    site = headers.get("sec-fetch-site", "none")
    mode = headers.get("sec-fetch-mode", "")
    return site not in ("none", "same-origin") and mode != "navigate"


def _host_name(host: str) -> str:
    """Return a Host header without its port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).strip("[]").lower()


def _is_same(candidate: str, token: str) -> bool:
    # The time of the comparison must not tell how many characters are right.
    return hmac.compare_digest(candidate.encode(), token.encode())


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": message}, status, headers=headers)
