"""Many, slow and large requests to a real server, and its memory."""

import asyncio
import gc
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from embedcache.processes import check_cancelled
from embedcache.progress import NullProgress
from embedcache.serve import media
from embedcache.serve import server as server_module
from embedcache.serve.app import make_app
from embedcache.serve.batching import BusyError
from embedcache.serve.guard import RequestGuard
from embedcache.serve.media import ImageThreads, Uploads, return_memory
from embedcache.serve.server import bind, config, serve
from embedcache.serve.service import SearchService, ServePaths
from embedcache.serve.settings import ServeSettings

_HEAD = "{} HTTP/1.1\r\nHost: localhost\r\n{}\r\n\r\n"


@contextmanager
def running(served: SearchService) -> Iterator[int]:
    """Run a server in a thread; yield its port."""
    with bind(ServeSettings(port=0)) as bound:
        port = bound.getsockname()[1]
        server = uvicorn.Server(config(RequestGuard(make_app(served), served.settings, token=None, port=port)))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            yield port
        finally:
            server.should_exit = True
            thread.join()


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
    serve([paths], ServeSettings(port=0), device="cpu", progress=NullProgress(), print_line=lambda _: None)
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


def test_silent_connections_give_way(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_MAX_CONNECTIONS", 4)
    info = _HEAD.format("GET /api/info", "Connection: close")
    silent = [connect(port), connect(port, b"GET / HT"), connect(port, image_request(9).encode()), connect(port)]
    time.sleep(0.05)  # the server has accepted them
    status, _, answer = ask(port, info)
    assert (status, answer["num_items"]) == (200, 80)
    assert silent[0].recv(1) == b""  # the oldest was closed for it
    for one in silent:
        one.close()


def test_busy_server_refuses_with_the_usual_error(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_MAX_CONNECTIONS", 0)
    status, headers, answer = ask(port, _HEAD.format("GET /api/info", "Accept: */*"))
    assert (status, answer) == (503, {"error": "all connections are in use; retry in a moment"})
    assert {"x-frame-options", "content-security-policy", "retry-after"} <= set(headers)


def test_invalid_http_gets_the_usual_error(port: int) -> None:
    expected = ask(port, _HEAD.format("GET /api/none", "Connection: close"))[1]
    for junk in (
        "\x16\x03\x01 hello\r\n\r\n",
        "GET /api/info HTTP/1.1\r\n\r\n",
        _HEAD.format("GET /", "Bad Header: x"),
    ):
        status, headers, answer = ask(port, junk)
        assert status == 400
        assert "expected a request of HTTP/1.1" in str(answer["error"])
        assert set(headers) == set(expected) - {"date"}, junk


def test_oldest_incomplete_upload_is_dropped() -> None:
    """Eight files of 100 bytes fit; nobody's complete file is given up for others that never end."""

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 50
            await asyncio.sleep(0)

    async def receive(uploads: Uploads, parts: AsyncIterator[bytes]) -> tuple[int, int]:
        async with uploads.receive(parts) as image:
            return image.size

    async def whole() -> AsyncIterator[bytes]:
        out = BytesIO()
        Image.new("RGB", (8, 8), "red").save(out, "PNG")
        yield out.getvalue()

    async def run() -> None:
        threads = ImageThreads()
        uploads = Uploads(threads, max_bytes=100, max_pixels=10_000)
        slow = [asyncio.create_task(receive(uploads, endless())) for _ in range(20)]
        await asyncio.sleep(0)
        assert await receive(uploads, whole()) == (8, 8)
        done, _ = await asyncio.wait(slow[:10], timeout=20)
        assert len(done) == 10
        assert all(isinstance(task.exception(), BusyError) for task in done)
        assert sum(file.num_bytes for file in uploads._files) <= 800
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        threads.shut_down()

    asyncio.run(run())


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
        threads = ImageThreads()
        task = asyncio.create_task(threads.run(decode))
        assert await asyncio.to_thread(begun.wait, 20)
        task.cancel()
        is_ended = await asyncio.to_thread(ended.wait, 20)
        ended.set()
        assert is_ended
        threads.shut_down()

    asyncio.run(run())


def test_memory_of_images_is_returned(client: TestClient, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The C library kept hundreds of megabytes of decoded images for the next one."""
    returned = threading.Event()
    monkeypatch.setattr(media, "return_memory", returned.set)
    path = root / "photos" / "val" / "dog" / "00003.png"
    assert client.post("/api/search/image?k=1", content=path.read_bytes()).status_code == 200
    assert returned.wait(20)
    returned.clear()
    assert client.get("/api/images/5/full").status_code == 200
    assert returned.wait(20)


@pytest.mark.slow
def test_return_memory() -> None:
    blocks = [bytearray(100_000) for _ in range(1000)]  # smaller than what the C library maps and unmaps by itself
    for block in blocks:
        block[:] = b"x" * len(block)
    held = _resident_mb()
    del blocks[1:-1], block
    return_memory()
    assert _resident_mb() < held - 80


def _resident_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1000
