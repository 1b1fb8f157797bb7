"""Serving: the port, the token, the link to open, and uvicorn."""

import asyncio
import errno
import secrets
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from embedcache.errors import SettingError
from embedcache.progress import Progress
from embedcache.serve.app import make_app
from embedcache.serve.guard import Guard
from embedcache.serve.served import Places, Served, open_served
from embedcache.serve.settings import ServeSettings, as_address

_TOKEN_BYTES = 24
_MOST_CONNECTIONS = 500
_SILENCE_S = 15
_GRACE_S = 3


def serve(
    places: Places, settings: ServeSettings, *, device: str, progress: Progress, say: Callable[[str], None]
) -> None:
    """Open an index and serve its page until interrupted.

    Args:
        places: what is served.
        settings: where, and to whom.
        device: where encoders run.
        progress: told about coverage that is measured first.
        say: told what is served, and the link to open.

    Raises:
        SettingError: the port is taken, or the host is no address of this machine.
        EmbedcacheError: see `open_served`.
    """
    with bind(settings) as bound:
        port = bound.getsockname()[1]
        served = open_served(places, settings, device=device, progress=progress)
        token = settings.token or (None if settings.is_local else secrets.token_urlsafe(_TOKEN_BYTES))
        for line in _lines(served, settings, token, port):
            say(line)
        app = Guard(make_app(served), settings, token=token, port=port)
        uvicorn.Server(config(app)).run(sockets=[bound])


def bind(settings: ServeSettings) -> socket.socket:
    """Take the port before anything is read, so that nobody waits for nothing.

    Raises:
        SettingError: it is taken, or the host is no address of this machine.
    """
    address = as_address(settings.host)
    family = socket.AF_INET6 if address is not None and address.version == 6 else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio delays small answers of others
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((settings.host, settings.port))
        bound.listen(128)  # here, so that a second server on this port fails now
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise SettingError(
                f"port {settings.port} of {settings.host} is taken; give another with --port, or 0 for any"
            ) from None
        raise SettingError(
            f"cannot bind {settings.host}, port {settings.port}: {error.strerror}; --host must be an address of this "
            "machine, such as 127.0.0.1, and ports below 1024 are the administrator's"
        ) from None
    return bound


def config(app: Any) -> uvicorn.Config:
    """Configure uvicorn: no log of addresses, which would hold tokens; one protocol, bounded in all it takes."""
    return uvicorn.Config(
        app,
        http=Impatient,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=_GRACE_S,
    )


class Impatient(H11Protocol):
    """HTTP/1.1 that closes a connection which sends no whole request: uvicorn alone would wait for ever."""

    _seen: object = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait."""
        super().connection_made(transport)
        self.loop.call_later(_SILENCE_S, self._look)

    def _look(self) -> None:
        """Close where no request has begun since the last look; one that is being answered has its own time limit."""
        if self.transport.is_closing():
            return
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self.cycle is self._seen:
            self.transport.close()
            return
        self._seen = self.cycle
        self.loop.call_later(_SILENCE_S, self._look)


def _lines(served: Served, settings: ServeSettings, token: str | None, port: int) -> list[str]:
    card = served.index.card
    lines = [f"{card.num_vectors:,} {card.modality}s of {card.feature}, {card.factory}"]
    if served.pictures is not None and served.pictures.folders:
        lines.append(f"pictures are read below {', '.join(map(str, served.pictures.folders))}")
    host = _shown(settings.host)
    lines.append(f"open http://{host}:{port}/" + (f"?token={token}" if token else ""))
    if token:
        lines.append("whoever has this link can search here; nothing is encrypted, so others on the way can read it")
    return lines


def _shown(host: str) -> str:
    """Give what to write in a link: of all addresses, the machine's name."""
    address = as_address(host)
    if address is None:
        return host
    if address.is_unspecified:
        return socket.gethostname()
    return f"[{address}]" if address.version == 6 else str(address)
