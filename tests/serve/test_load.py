"""Many and slow requests to a real server."""

import asyncio
import gc
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from embedcache.processes import check_cancelled
from embedcache.progress import NullProgress
from embedcache.serve import server as server_module
from embedcache.serve.media import Decoders
from embedcache.serve.server import serve
from embedcache.serve.service import SearchService, ServePaths
from embedcache.serve.settings import ServeSettings
from tests.serve.conftest import running

_HEAD = "{} HTTP/1.1\r\nHost: localhost\r\n{}\r\n\r\n"


@pytest.fixture(scope="module")
def port(served: SearchService) -> Iterator[int]:
    with running(served) as port:
        yield port


def connect(port: int, data: bytes = b"") -> socket.socket:
    """Open a connection and send some bytes."""
    opened = socket.create_connection(("127.0.0.1", port), timeout=20)
    opened.sendall(data)
    return opened


def ask(port: int, head: str, body: bytes = b"") -> tuple[int, dict[str, str], dict[str, object]]:
    """Send one request; return the status, the headers and the JSON of the response."""
    with connect(port, head.encode() + body) as opened:
        answer = b"".join(iter(lambda: opened.recv(65_536), b""))
    lines, _, content = answer.partition(b"\r\n\r\n")
    status, *headers = lines.decode().split("\r\n")
    return int(status.split()[1]), {k.lower(): v for k, v in (h.split(": ", 1) for h in headers)}, json.loads(content)


def image_request(num_bytes: int, more: str = "") -> str:
    return _HEAD.format("POST /api/search/image", f"Content-Length: {num_bytes}{more}")


@pytest.mark.slow
def test_objects_are_frozen_before_serving(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full garbage collection walked half a million objects while all queries waited."""
    frozen: list[int] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: frozen.append(gc.get_freeze_count()))
    paths = ServePaths(index=root / "index")
    serve(paths, ServeSettings(port=0), device="cpu", progress=NullProgress(), print_line=lambda _: None)
    assert frozen[0] > 100_000
    assert len(gc.get_objects(generation=2)) < frozen[0] / 10  # they stay frozen: later collections are faster


def test_slow_uploads_do_not_hold_others(port: int, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = (root / "photos" / "val" / "dog" / "00003.png").read_bytes()
    slow = [connect(port, image_request(100_000).encode() + b"\x89PNG") for _ in range(8)]
    started = time.monotonic()
    status, _, answer = ask(port, image_request(len(data), "\r\nConnection: close"), data)
    assert (status, len(answer["hits"])) == (200, 60)  # type: ignore[arg-type]
    assert time.monotonic() - started < 15  # the slow ones take 30 s to time out
    for one in slow:
        one.close()
    time.sleep(0.05)
    assert ask(port, _HEAD.format("GET /api/info", "Connection: close"))[0] == 200
    assert "failed" not in caplog.text  # a visitor who leaves is no bug


def test_silent_connections_are_closed(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_IDLE_S", 0.2)
    for data in (b"", b"GET / HT"):
        with connect(port, data) as silent:
            assert silent.recv(1) == b""


def test_decoding_ends_with_its_request() -> None:
    """A video of 2 MB can take minutes, in which no other item was shown."""
    begun, ended = threading.Event(), threading.Event()

    def decode() -> None:
        begun.set()
        try:
            while not ended.wait(0.001):
                check_cancelled()
        finally:
            ended.set()

    async def run() -> None:
        task = asyncio.create_task(Decoders().run(decode))
        assert await asyncio.to_thread(begun.wait, 20)
        task.cancel()
        is_ended = await asyncio.to_thread(ended.wait, 20)
        ended.set()
        assert is_ended

    asyncio.run(run())
