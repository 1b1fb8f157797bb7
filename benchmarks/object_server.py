"""An S3 server process on loopback behind a proxy that counts requests, adds latency and injects errors.

The server is moto's. The proxy runs on a thread of this process, so that its counts can be read at any time.
"""

import asyncio
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

BUCKET = "bench"
_ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
_BUSY = "<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_NOT_FORWARDED = frozenset({"connection", "content-length", "date", "keep-alive", "server", "transfer-encoding"})
_TOO_MUCH = 2**30


@dataclass(kw_only=True)
class Conditions:
    """What the proxy does to requests.

    Args:
        median_ms: kind of request -> median of its added latency, which is log-normal; none if absent.
        spread: standard deviation of the logarithm of the latency; 0.5 makes the 99th percentile 3.2 times the median.
        busy: fraction of requests that are refused with `503 SlowDown`.
        lost: fraction of requests that the server carries out, but whose answer is lost with the connection.
    """

    median_ms: dict[str, float] = field(default_factory=dict)
    spread: float = 0.5
    busy: float = 0.0
    lost: float = 0.0


class Proxy:
    """HTTP proxy in front of an S3 server.

    Attributes:
        counts: kind of request (GET, HEAD, PUT, DELETE, LIST) and kind of object -> number of requests that arrived.
        sent, received: bytes of answers and of requests.
        injected: number of errors of each kind.
        puts: kind of object and key -> number of times that it was written.
        commits: key of each commit -> time at which it was written first.
    """

    def __init__(self, server: str) -> None:
        self.conditions = Conditions()
        self._server, self._random = server, random.Random(0)
        self.clear()

    def clear(self) -> None:
        """Set all counts to zero."""
        self.counts, self.puts = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
        self.injected = Counter[str]()
        self.sent = self.received = 0
        self.commits: dict[str, float] = {}

    def requests(self) -> dict[str, int]:
        """Return kind of request -> number."""
        kinds: Counter[str] = Counter()
        for (kind, _), count in self.counts.items():
            kinds[kind] += count
        return dict(sorted(kinds.items()))

    async def serve(self, port: int) -> None:
        """Serve until cancelled."""
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as self._session:
            app = web.Application(client_max_size=_TOO_MUCH)
            app.router.add_route("*", "/{path:.*}", self._answer)
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", port).start()
            await asyncio.Event().wait()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        kind, key = _kind(request), request.path
        body = await request.read()
        self.counts[kind, _what(key)] += 1
        self.received += len(body)
        median_ms = self.conditions.median_ms.get(kind)
        if median_ms:
            await asyncio.sleep(median_ms / 1000 * self._random.lognormvariate(0, self.conditions.spread))
        draw = self._random.random()
        if draw < self.conditions.busy:
            self.injected["busy"] += 1
            return web.Response(status=503, text=_BUSY, content_type="application/xml")
        url = URL(f"{self._server}{request.raw_path}", encoded=True)
        headers = {name: value for name, value in request.headers.items() if name.lower() != "content-length"}
        async with self._session.request(request.method, url, headers=headers, data=body or None) as answer:
            data = await answer.read()
        if kind == "PUT" and answer.status == 200:
            self.puts[_what(key), key] += 1
            if _what(key) == "commit":
                self.commits.setdefault(key, time.monotonic())
        if draw > 1 - self.conditions.lost:
            self.injected["lost"] += 1
            assert request.transport is not None
            request.transport.close()
        self.sent += len(data)
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in _NOT_FORWARDED}
        if request.method == "HEAD" and "Content-Length" in answer.headers:
            kept["Content-Length"] = answer.headers["Content-Length"]
        return web.Response(status=answer.status, headers=kept, body=data)


def _kind(request: web.Request) -> str:
    if request.method == "GET" and ("list-type" in request.query or "prefix" in request.query):
        return "LIST"
    return "DELETE" if request.method == "POST" and "delete" in request.query else request.method


def _what(key: str) -> str:
    """Return the kind of object, by its name in a cache."""
    name = key.rpartition("/")[2]
    if name.endswith(".parquet"):
        return "commit" if "/chunks/" in key else "table"
    return name if name.endswith(".json") else "lease" if name.endswith(".lease") else "array"


@contextmanager
def object_store() -> Iterator[Proxy]:
    """Run an S3 server and a proxy, with an empty bucket, and set the environment so that s3fs finds the proxy."""
    port, proxy_port = _free_port(), _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait_for(port)
            proxy = Proxy(f"http://127.0.0.1:{port}")
            thread = threading.Thread(target=asyncio.run, args=(proxy.serve(proxy_port),), daemon=True)
            thread.start()
            _wait_for(proxy_port)
            os.environ.update({**_ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy_port}"})
            client().create_bucket(Bucket=BUCKET)
            yield proxy
        finally:
            server.terminate()


def client() -> Any:
    """Return a client of the object store, as botocore's."""
    import boto3

    return boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])


@contextmanager
def one_client() -> Iterator[Callable[..., Any]]:
    """Yield a function that calls another in a process of its own and returns the result."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        yield lambda call, *arguments: executor.submit(call, *arguments).result()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_for(port: int) -> None:
    for _ in range(600):
        with socket.socket() as connection:
            if connection.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"expected a server on port {port} within a minute, got none")
