"""What stands before the app: who may ask, how much and how long, and what no answer may hold."""

import asyncio
import hmac
import logging
import socket
from collections.abc import Mapping
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedcache.serve.settings import ServeSettings, as_address

log = logging.getLogger("embedcache.serve")

MOST_JSON_BYTES = 64 * 1024
PICTURE_PATH = "/api/search/image"
BUG = "something went wrong; the server's log says what"

_CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
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


class Guard:
    """Checks each request before the app sees it, and each answer before it leaves.

    Args:
        app: what answers.
        settings: what is allowed.
        token: what must be shown, as a cookie or as `Authorization: Bearer`; None: nothing.
        port: that is bound, for the cookie's name: cookies know no ports.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, *, token: str | None, port: int) -> None:
        self._app, self._settings, self._token = app, settings, token
        self._cookie = f"embedcache-{port}"
        self._names = {"localhost", socket.gethostname().lower(), settings.host.lower()}
        self._names |= {name.lower() for name in settings.names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; anything but HTTP and the start and end of the server is refused."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            answering = _Answering(send)
            await self._serve(scope, receive, answering)

    async def _serve(self, scope: Scope, receive: Receive, answering: "_Answering") -> None:
        refusal = self._refusal(scope)
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                if refusal is not None:
                    await refusal(scope, receive, answering.send)
                else:
                    limited = _limited(receive, _most_bytes(scope, self._settings))
                    await self._app(scope, limited, answering.send)
        except TimeoutError:
            await answering.instead(scope, receive, _error(503, "this took too long; ask again, or for less"))
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            await answering.instead(scope, receive, _error(500, BUG))

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_ours(host):
            return _error(
                421, f"this server does not go by the name {_name(host)!r}; where it should, start it with --name"
            )
        if _is_from_elsewhere(headers, host):
            return _error(403, "a page of another site may not ask here")
        length = headers.get("content-length", "0")
        most = _most_bytes(scope, self._settings)
        if not length.isdigit() or int(length) > most:
            return _error(413, f"the request has {length} bytes; at most {most:,} are taken")
        return None if self._token is None else self._token_refusal(scope, headers, self._token)

    def _token_refusal(self, scope: Scope, headers: Headers, token: str) -> Response | None:
        """Ask for the token; the link that holds it leads to the page without it, and leaves a cookie."""
        if scope["path"] == "/" and scope["method"] == "GET":
            given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
            if _same(given, token):
                response = RedirectResponse("/", status_code=303)
                response.set_cookie(self._cookie, token, httponly=True, samesite="lax", path="/")
                return response
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        cookie = cookie_parser(headers.get("cookie", "")).get(self._cookie, "")
        if _same(cookie, token) or (scheme.lower() == "bearer" and _same(bearer.strip(), token)):
            return None
        return _error(
            401,
            "a token is needed: open the link that embedcache serve printed, or send Authorization: Bearer TOKEN",
            {"WWW-Authenticate": "Bearer"},
        )

    def _is_ours(self, host: str) -> bool:
        """Say whether a Host header names this server: a name that a stranger's DNS could lead here does not."""
        name = _name(host)
        return name in self._names or as_address(name) is not None


class _Answering:
    """Sends an answer, adds the headers that all have, and knows whether one has begun."""

    def __init__(self, send: Send) -> None:
        self._send, self._has_begun = send, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._has_begun = True
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers[name] = value
            headers.setdefault("Cache-Control", "no-store")
        await self._send(message)

    async def instead(self, scope: Scope, receive: Receive, response: Response) -> None:
        """Answer with an error, unless an answer is on its way already."""
        if not self._has_begun:
            await response(scope, receive, self.send)


def _most_bytes(scope: Scope, settings: ServeSettings) -> int:
    return settings.max_upload_bytes if scope["path"] == PICTURE_PATH else MOST_JSON_BYTES


def _limited(receive: Receive, most: int) -> Receive:
    """Refuse a body as soon as it grows too long, whatever it says of its length."""
    num_bytes = 0

    async def limited() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > most:
            raise HTTPException(413, f"the request has more than {most:,} bytes, and no more are taken")
        return message

    return limited


def _is_from_elsewhere(headers: Headers, host: str) -> bool:
    """Say whether a page of another site sent this; following a link to here is no harm."""
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        return True
    site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode", "")
    return site not in ("none", "same-origin") and mode != "navigate"


def _name(host: str) -> str:
    """Take the port off a Host header."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).strip("[]").lower()


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": message}, status, headers=headers)
