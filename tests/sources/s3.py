"""Real servers on this machine: one that speaks S3, one that speaks HTTP with ranges."""

import re
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

import pytest

_NUMBERS = count()
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Start a server that speaks S3 and give its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make an empty bucket, set the environment as a user would, and give the bucket's URL."""
    import s3fs

    for name, value in {**KEYS, "AWS_ENDPOINT_URL": s3_server}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # others may have been made with another environment
    name = f"bucket-{next(_NUMBERS)}"
    s3_client().create_bucket(Bucket=name)
    return f"s3://{name}"


def upload(folder: Path, url: str) -> str:
    """Copy the files of a folder to `s3://bucket/prefix`, and give that URL."""
    name, _, prefix = url.removeprefix("s3://").partition("/")
    client = s3_client()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            key = f"{prefix}/{path.relative_to(folder)}".lstrip("/")
            client.put_object(Bucket=name, Key=key, Body=path.read_bytes())
    return url


def s3_client() -> Any:
    """Get a client of the server in the environment."""
    import boto3

    return boto3.client("s3")


class WebServer:
    """Serves a folder by HTTP, ranges of files included, and counts what it sends.

    Args:
        folder: what is served.
        gives_parts: whether ranges are honoured.
        missing: the answer where there is no file.
    """

    def __init__(self, folder: Path, *, gives_parts: bool = True, missing: int = 404) -> None:
        self.sent: list[int] = []
        handler = partial(_Handler, folder=folder, sent=self.sent, gives_parts=gives_parts, missing=missing)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        """End it; its address answers no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    """Serve the folder `tmp_path / "web"`."""
    folder = tmp_path / "web"
    folder.mkdir()
    server = WebServer(folder)
    yield server
    server.stop()


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments: Any, folder: Path, sent: list[int], gives_parts: bool, missing: int) -> None:
        self._sent = sent
        self._missing = missing
        self._gives_parts = gives_parts
        super().__init__(*arguments, directory=str(folder))

    def log_message(self, *arguments: Any) -> None:
        pass

    def send_error(self, code: int, *arguments: Any) -> None:
        super().send_error(self._missing if code == 404 else code, *arguments)

    def do_GET(self) -> None:
        path = Path(self.directory) / unquote(self.path).lstrip("/")
        if not path.is_file() or not self._gives_parts:
            super().do_GET()
            return
        data = path.read_bytes()
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), int(asked[2] or len(data) - 1)) if asked else (0, len(data) - 1)
        part = data[first : last + 1]
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self._sent.append(len(part))
        self.wfile.write(part)
