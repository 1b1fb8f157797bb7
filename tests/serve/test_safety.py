"""Attacks by visitors and by pages of other sites."""

import logging
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from embedcache.errors import SettingError
from embedcache.serve.server import _lines, bind
from embedcache.serve.service import SearchService
from embedcache.serve.settings import ServeSettings
from tests.images import png_of_size
from tests.serve.conftest import visit

TOKEN = "a-token-of-the-test-0123456789"


# Visitors without access


def test_every_response_has_security_headers(client: TestClient) -> None:
    for path in ("/", "/page.js", "/api/info", "/api/images/0/thumbnail", "/nothing", "/api/items/x"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "media-src 'self';" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    "path",
    ["/../cache.json", "/%2e%2e/%2e%2e/etc/passwd", "/page/page.js", "/..%2fserve.py", "/api/images/-1/thumbnail",
     "/api/images/..%2f0/thumbnail", "/api/images/99999999999999999999/thumbnail", "/docs", "/redoc", "//etc/passwd"],
)  # fmt: skip
def test_path_traversal_finds_nothing(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code in (404, 422)
    assert "root:" not in answer.text


def test_token_is_required(served: SearchService) -> None:
    with visit(served, token=TOKEN) as client:
        for path in ("/", "/page.js", "/api/info", "/openapi.json", "/api/images/0/thumbnail", "/?token=wrong"):
            answer = client.get(path)
            assert answer.status_code == 401, path
            assert "a token is required" in answer.json()["error"]
        assert client.get("/api/info", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
        assert client.get("/api/info", headers={"Authorization": f"Bearer {TOKEN}x"}).status_code == 401
        assert client.get(f"/api/info?token={TOKEN}").status_code == 401
        link = client.get(f"/?token={TOKEN}")
        assert (link.status_code, link.headers["location"]) == (303, "/")
        assert "HttpOnly" in link.headers["set-cookie"]
        assert "samesite=lax" in link.headers["set-cookie"].lower()
        assert client.get("/api/info").status_code == 200  # by the cookie
        client.cookies.clear()
        assert client.get("/api/info", headers={"Cookie": "embedcache-8000=é".encode()}).status_code == 401


def test_is_local() -> None:
    for host, is_local in (
        ("127.0.0.1", True), ("127.3.2.1", True), ("::1", True), ("localhost", True),
        ("0.0.0.0", False), ("::", False), ("192.168.1.5", False), ("search.example.org", False),
    ):  # fmt: skip
        assert ServeSettings(host=host).is_local == is_local, host


def test_link_to_open(served: SearchService) -> None:
    for host, shown in (("::1", "[::1]"), ("127.0.0.1", "127.0.0.1"), ("a.org", "a.org")):
        assert f"open http://{shown}:80/" in _lines(served, ServeSettings(host=host), None, 80)


# Pages of other sites


def test_foreign_host_names_are_rejected(client: TestClient) -> None:
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example:8000", "localhost.evil.example", ""):
        answer = client.get("/api/info", headers={"Host": host})
        assert answer.status_code == 421, host
        assert "--host-name" in answer.json()["error"]
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST"):
        assert client.get("/api/info", headers={"Host": host}).status_code == 200, host


def test_named_host_is_accepted(served: SearchService) -> None:
    named = SearchService(served.index, ServeSettings(names=("search.example.org",)))
    with visit(named) as client:
        assert client.get("/api/info", headers={"Host": "search.example.org"}).status_code == 200


def test_cross_site_requests_are_rejected(client: TestClient) -> None:
    body = {"text": "red"}
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Origin": "http://127.0.0.1:3000"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
    ):
        assert client.post("/api/search", json=body, headers=headers).status_code == 403, headers
    assert client.get("/api/images/0/thumbnail", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert client.post("/api/search", json=body, headers={"Origin": "http://127.0.0.1:8000"}).status_code == 200
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}).status_code == 200
    assert client.options("/api/search", headers={"Origin": "http://evil.example"}).status_code == 403


# Requests that are too large, too slow or broken


def test_long_bodies_are_rejected(client: TestClient) -> None:
    url = "/api/search/image"
    assert client.post(url, content=b"x" * 200_001).status_code == 413
    assert client.post("/api/search", content=b"x" * 65_537).status_code == 413

    assert client.post("/api/search", content=b"[" * 60_000).status_code in (400, 422)

    def chunks() -> Iterator[bytes]:
        for _ in range(300):
            yield b"x" * 1000

    answer = client.post(url, content=chunks())  # no Content-Length
    assert answer.status_code == 413
    assert "too many bytes; expected at most 200,000" in answer.json()["error"]


def test_bad_images_are_rejected(client: TestClient) -> None:
    for data, message in (
        (png_of_size(50_000, 50_000), "too many pixels"),
        (png_of_size(7_000, 6_000), "too many pixels: 7000 x 6000, more than 40,000,000"),
        (png_of_size(40_000, 1), "too narrow"),
        (b"", "empty file"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"GIF89a" + b"\0" * 20, "image"),
    ):
        answer = client.post("/api/search/image", content=data)
        assert answer.status_code == 400, message
        assert message in answer.json()["error"]


def test_bug_is_logged_and_hidden(
    served: SearchService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def bug() -> None:
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr(served, "info", bug)
    with visit(served) as client, caplog.at_level(logging.ERROR):
        answer = client.get("/api/info")
    assert answer.status_code == 500
    assert answer.json() == {"error": "something went wrong; the server's log says what"}
    assert "a secret of the server" in caplog.text
    assert "Traceback" in caplog.text


def test_failed_search_does_not_stop_the_next(
    served: SearchService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = served.index.query_encoder.encode_texts

    def failing(texts: list[str]) -> Any:
        if "fail" in texts:
            raise RuntimeError("a secret of the search")
        return real(texts)

    monkeypatch.setattr(served.index.query_encoder, "encode_texts", failing)
    with visit(served) as client, caplog.at_level(logging.ERROR):
        answer = client.post("/api/search", json={"text": "fail"})
        assert answer.status_code == 500
        assert "secret" not in answer.text
        assert client.post("/api/search", json={"text": "red"}).status_code == 200
    assert "a secret of the search" in caplog.text


def test_slow_requests_time_out(served: SearchService, monkeypatch: pytest.MonkeyPatch) -> None:
    real, go_on = served.index.query_encoder.encode_texts, threading.Event()
    monkeypatch.setattr(served.index.query_encoder, "encode_texts", lambda texts: (go_on.wait(10), real(texts))[1])
    hasty = SearchService(served.index, ServeSettings(timeout=0.3))
    with visit(hasty) as client:
        answer = client.post("/api/search", json={"text": "red"})
        assert answer.status_code == 503
        assert "took too long" in answer.json()["error"]
        go_on.set()
        answers = (client.post("/api/search", json={"text": "red"}).status_code for _ in range(100))
        assert 200 in answers  # on a busy machine, the next one can take too long as well


# Mistakes at the start


@pytest.mark.parametrize("token", ["short", "with a space in the middle"])
def test_weak_token_raises(token: str) -> None:
    with pytest.raises(SettingError, match="token"):
        ServeSettings(token=token)


def test_port_in_use_raises() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SettingError, match=f"expected a free port of 127.0.0.1, got {port}"):
            bind(ServeSettings(port=port))
    with pytest.raises(SettingError, match="cannot bind 203.0.113.1.*expected an address of this machine"):
        bind(ServeSettings(host="203.0.113.1", port=0))


def test_ipv6_address_with_or_without_brackets() -> None:
    try:
        with socket.socket(socket.AF_INET6) as free:
            free.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    for host in ("::1", "[::1]"):
        with bind(ServeSettings(host=host, port=0)) as bound:
            assert bound.getsockname()[0] == "::1"
