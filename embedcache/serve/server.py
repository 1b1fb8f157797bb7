"""The server of the search page: port, token, link to open, and uvicorn."""

import asyncio
import errno
import gc
import secrets
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from embedcache.errors import SettingError
from embedcache.modalities import count_items, noun
from embedcache.progress import Progress
from embedcache.serve.app import make_app
from embedcache.serve.guard import RequestGuard
from embedcache.serve.service import SearchService, ServePaths, open_service
from embedcache.serve.settings import ServeSettings, parse_address

_TOKEN_BYTES = 24
_MAX_CONNECTIONS = 500
_IDLE_S = 15
_SHUTDOWN_S = 3


def serve(
    paths: ServePaths,
    settings: ServeSettings,
    *,
    device: str,
    progress: Progress,
    print_line: Callable[[str], None],
) -> None:
    """Open an index and serve its page until interrupted.

    `print_line` receives lines that describe what is served, and the link to open; `progress` the measurement of
    coverage, if any.

    Raises:
        SettingError: the port is in use, or the host is not an address of this machine.
        EmbedcacheError: see `open_service`.
    """
    with bind(settings) as bound:
        port = bound.getsockname()[1]
        service = open_service(paths, settings, device=device, progress=progress)

        # Other users of this machine can connect as well, so a server that writes a file requires a token.
        is_open = settings.is_local and paths.collect is None
        token = settings.token or (None if is_open else secrets.token_urlsafe(_TOKEN_BYTES))
        for line in _lines(service, settings, token, port):
            print_line(line)

        app = RequestGuard(make_app(service), settings, token=token, port=port)
        freeze_objects()
        uvicorn.Server(config(app)).run(sockets=[bound])


def freeze_objects() -> None:
    """Exclude all objects of this process from garbage collection, since they live as long as the server.

    A full collection would walk the half million objects of torch and the encoders while all queries wait: 270 to
    540 ms, which was the 99th percentile of the response time under load.
    """
    gc.collect()
    gc.freeze()


def bind(settings: ServeSettings) -> socket.socket:
    """Bind the port, before the index is read, so that a port in use fails immediately."""
    # asyncio sets TCP_NODELAY only for a socket whose protocol is given.
    address = parse_address(settings.host)
    family = socket.AF_INET6 if address is not None and address.version == 6 else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

    # An address is bound without brackets. Listening here makes a second server on this port fail now.
    try:
        bound.bind((settings.host if address is None else str(address), settings.port))
        bound.listen(128)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise SettingError(
                f"port: expected a free port of {settings.host}, got {settings.port}, in use; --port 0 chooses one"
            ) from None
        raise SettingError(
            f"cannot bind {settings.host}, port {settings.port}: {error.strerror}; expected an address of this "
            "machine, such as 127.0.0.1, and a port above 1023"
        ) from None
    return bound


def config(app: Any) -> uvicorn.Config:
    """Return the configuration of uvicorn, without an access log, which would contain tokens."""
    return uvicorn.Config(
        app,
        http=WaitingProtocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=_SHUTDOWN_S,
    )


class WaitingProtocol(H11Protocol):
    """HTTP/1.1 that closes a connection on which no request begins for 15 s. uvicorn alone waits forever."""

    _waiting_since_s = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the idle timer."""
        super().connection_made(transport)
        self._wait()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._wait()
        super().on_response_complete()

    def _wait(self) -> None:
        self._waiting_since_s = self.loop.time()
        self.loop.call_later(_IDLE_S, self._close_if_idle)

    def _close_if_idle(self) -> None:
        """Close if no request began meanwhile. A request that is being answered has a separate time limit."""
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self.loop.time() - self._waiting_since_s >= _IDLE_S:
            self.transport.close()


def _lines(service: SearchService, settings: ServeSettings, token: str | None, port: int) -> list[str]:
    """Return lines about the index and its items, and the link to open."""
    card = service.index.card
    lines = [f"{count_items(card.num_vectors, card.modality)} of {card.feature}, {card.factory}"]
    rejection = service.rejected_queries.get("text")
    if rejection is not None:
        lines.append(f"texts are not accepted: {rejection}")
    places = next((served.places for served in service.shown.values()), ())
    if places:
        lines.append(f"{' and '.join(map(noun, service.shown))} are read from {', '.join(places)}")

    # A browser cannot open the address that binds all addresses.
    address = parse_address(settings.host)
    if address is None:
        host = settings.host
    elif address.is_unspecified:
        host = socket.gethostname()
    else:
        host = f"[{address}]" if address.version == 6 else str(address)
    lines.append(f"open http://{host}:{port}/" + (f"?token={token}" if token else ""))

    if token:
        saved = service.collected.path
        actions = "search here" if saved is None else f"search here and write {saved}"
        lines.append(f"anyone with this link can {actions}; traffic is not encrypted")
    return lines
