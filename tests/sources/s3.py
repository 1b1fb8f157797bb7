"""Local servers for tests of remote sources: S3, and HTTP with range requests."""

import os
import re
from collections.abc import Iterator
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

import pytest

_NUMBERS = count()
_KNOWN: set[str] = set()
"""The server of the clients that s3fs keeps."""
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Start an S3 server and return its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="class")
def bucket(s3_server: str) -> Iterator[str]:
    """Create an empty bucket for a test or a class of them, set the environment as a user would, and return its URL."""
    with pytest.MonkeyPatch.context() as patch:
        yield _new_bucket(s3_server, patch)


def forget_clients() -> None:
    """Forget the clients of s3fs, which keep the environment they were created in, now and before the next bucket."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    _KNOWN.clear()


def _new_bucket(server: str, patch: pytest.MonkeyPatch) -> str:
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": server}.items():
        patch.setenv(name, value)
    if server not in _KNOWN:  # a client reads descriptions of the service for half a second
        forget_clients()
        _KNOWN.add(server)
    name = f"bucket-{next(_NUMBERS)}"
    _s3_client(server).create_bucket(Bucket=name)
    return f"s3://{name}"


def upload(folder: Path, url: str) -> str:
    """Copy the files of a folder to `s3://bucket/prefix`, and return that URL."""
    name, _, prefix = url.removeprefix("s3://").partition("/")
    client = _s3_client(os.environ["AWS_ENDPOINT_URL"])
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            key = f"{prefix}/{path.relative_to(folder)}".lstrip("/")
            client.put_object(Bucket=name, Key=key, Body=path.read_bytes())
    return url


@cache
def _s3_client(server: str) -> Any:
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=server,
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        region_name=KEYS["AWS_DEFAULT_REGION"],
    )


class WebServer:
    """Serves a folder by HTTP with range requests, and records the number of bytes sent.

    Args:
        folder: folder to serve.
        has_ranges: whether range requests are supported.
    """

    def __init__(self, folder: Path, *, has_ranges: bool = True) -> None:
        self.folder = folder
        self.sent: list[int] = []
        handler = partial(_Handler, folder=folder, sent=self.sent, has_ranges=has_ranges)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(scope="class")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    """Serve a folder for a test, or for a class of them."""
    server = WebServer(tmp_path_factory.mktemp("web"))
    yield server
    server.stop()


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 0.04 s for the client to acknowledge its headers

    def __init__(self, *arguments: Any, folder: Path, sent: list[int], has_ranges: bool) -> None:
        self._sent = sent
        self._has_ranges = has_ranges
        super().__init__(*arguments, directory=str(folder))

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.directory) / unquote(self.path).lstrip("/")
        if not path.is_file() or not self._has_ranges:
            super().do_GET()
            return
        data = path.read_bytes()
        byte_range = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(byte_range[1]), int(byte_range[2] or len(data) - 1)) if byte_range else (0, len(data) - 1)
        part = data[first : last + 1]
        self.send_response(206 if byte_range else 200)
        if byte_range:
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self._sent.append(len(part))
        self.wfile.write(part)
