"""Recordings and videos on the search page: what is sent to be shown and played, and to whom."""

import asyncio
import io
import os
import shutil
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient
from starlette.types import Message

from embedcache.dataset.thumbnails import PlayedFile
from embedcache.progress import NullProgress
from embedcache.search.queries import Queries
from embedcache.search.search import search
from embedcache.serve.media import respond_with_part
from embedcache.serve.service import SearchService, ServePaths, open_service
from embedcache.serve.settings import ServeSettings
from embedcache.sources.media import decode_audio
from embedcache.sources.open import remember
from embedcache.store.cache import Cache
from tests.media_files import encode_audio, tone, wav
from tests.serve.conftest import visit
from tests.serve.test_untrusted import tamper


def open_index(path: Path, cache: Path | None = None, **settings: object) -> SearchService:
    return open_service(
        ServePaths(index=path, cache=None if cache is None else str(cache)),
        ServeSettings(**settings),
        device="cpu",
        progress=NullProgress(),  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def served(media: Path) -> SearchService:
    return open_index(media / "audio")


@pytest.fixture(scope="module")
def client(served: SearchService) -> Iterator[TestClient]:
    with visit(served) as client:
        yield client


def samples_of(data: bytes) -> np.ndarray:
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16_000, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / np.float32(32767)


def test_recording_is_sent_as_the_encoder_gets_it(client: TestClient, media: Path) -> None:
    data = (media / "files" / "tone.flac").read_bytes()
    for row, bounds in ((0, (None, None)), (1, (0.5, 0.75))):
        answer = client.get(f"/api/recordings/{row}/play")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "audio/wav")
        assert answer.headers["accept-ranges"] == "bytes"
        np.testing.assert_allclose(samples_of(answer.content), decode_audio(data, *bounds), atol=1 / 32767)
    assert len(samples_of(answer.content)) == 4_000


def test_video_is_sent_as_it_is_stored(client: TestClient, media: Path) -> None:
    answer = client.get("/api/videos/0/play")
    path = media / "files" / "square.webm"
    assert (answer.headers["content-type"], answer.content) == ("video/webm", path.read_bytes())


def test_files_are_queries_as_of_the_command(client: TestClient, media: Path) -> None:
    path = media / "files" / "tone.flac"
    (expected,) = search(media / "audio", Queries(items={"audio": path}), k=2)
    answer = client.post("/api/search/audio?k=2", content=path.read_bytes())
    assert [(hit["row"], hit["score"]) for hit in answer.json()["hits"]] == [(hit.row, hit.score) for hit in expected]
    assert client.get("/api/info").json()["takes"] == ["audio"]
    for modality, data, word in (("audio", b"x", "damaged recording"), ("video", b"x", "does not accept videos")):
        answer = client.post(f"/api/search/{modality}", content=data)
        assert (answer.status_code, word in answer.json()["error"]) == (400, True)


@pytest.mark.slow
def test_parts_of_a_file(client: TestClient, media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = (media / "files" / "square.webm").read_bytes()
    monkeypatch.setattr("embedcache.serve.media._MAX_PART_BYTES", 1000)
    parts, size = b"", len(data)
    while len(parts) < size:
        answer = client.get("/api/videos/0/play", headers={"Range": f"bytes={len(parts)}-"})
        last = min(len(parts) + 1000, size) - 1
        assert (answer.status_code, answer.headers["content-range"]) == (206, f"bytes {len(parts)}-{last}/{size}")
        parts += answer.content
    assert parts == data
    for part, status, expected in (
        ("bytes=2-5", 206, data[2:6]),
        (f"bytes={size - 1}-{size + 9}", 206, data[-1:]),
        (f"bytes={size}-", 416, b""),
        ("bytes=5-2", 416, b""),
        ("bytes=-5", 200, data),
        ("bytes=0-1,3-4", 200, data),
        ("lines=0-1", 200, data),
        (f"bytes={'9' * 5000}-", 200, data),
    ):
        answer = client.get("/api/videos/0/play", headers={"Range": part})
        assert (answer.status_code, answer.content) == (status, expected), part


def test_whole_file_is_sent_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that reads slowly, or not at all, held all of it in the memory of the server."""
    monkeypatch.setattr("embedcache.serve.media._MAX_PART_BYTES", 1000)
    response = respond_with_part(PlayedFile(data=bytes(range(256)) * 10, media_type="video/mp4"), None)
    parts = list[bytes]()

    async def send(message: Message) -> None:
        parts.append(message.get("body", b""))

    asyncio.run(response({"type": "http", "asgi": {"spec_version": "2.4"}}, None, send))  # type: ignore[arg-type]
    assert (max(map(len, parts)), b"".join(parts)) == (1000, bytes(range(256)) * 10)
    assert (response.status_code, response.headers["content-length"]) == (200, "2560")


@pytest.mark.slow
def test_hits_name_what_to_play(media: Path, client: TestClient) -> None:
    whole = {"modality": "audio", "row": 0, "start_s": None, "stop_s": None}
    part = {"modality": "audio", "row": 1, "start_s": 0.5, "stop_s": 0.75}
    film = {"modality": "video", "row": 0, "start_s": 0.2, "stop_s": 0.6}
    assert [hit["player"] for hit in client.get("/api/items?rows=0&rows=1").json()] == [whole, part]
    assert client.get("/api/items/1").json()["player"] == part
    assert client.get("/api/info").json()["has_players"]
    with visit(open_index(media / "text")) as texts:
        hits = texts.get("/api/items?" + "&".join(f"rows={row}" for row in range(5))).json()
    assert [hit["player"] for hit in hits] == [
        whole,
        part,
        film,
        {**film, "row": 1, "start_s": None, "stop_s": None},
        None,
    ]


@pytest.mark.slow
def test_images_of_recordings_and_videos(client: TestClient) -> None:
    for path, size in (
        ("recordings/0/thumbnail", (224, 112)),
        ("recordings/1/full", (1280, 640)),
        ("videos/0/thumbnail", (32, 24)),  # never enlarged
        ("videos/1/full", (32, 24)),
    ):
        answer = client.get(f"/api/{path}")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp")
        assert Image.open(io.BytesIO(answer.content)).size == size


@pytest.mark.slow
def test_what_cannot_be_played_says_why(client: TestClient, media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client.get("/api/videos/1/play")
    assert (answer.status_code, answer.json()["error"]) == (
        404, "browsers play MP4 and WebM, and this video is neither; convert it to one of them",
    )  # fmt: skip
    for path in ("/api/videos/2/play", "/api/recordings/2/play", "/api/images/0/play", "/api/texts/0/thumbnail"):
        assert client.get(path).status_code == 404
    monkeypatch.setattr("embedcache.serve.media._MAX_FILE_BYTES", 1_000)
    with visit(open_index(media / "audio")) as limited:
        for path in ("recordings/0", "videos/0"):
            answer = limited.get(f"/api/{path}/play")
            assert answer.status_code == 404
            assert answer.json()["error"].startswith("too large to be played here: ")


def test_file_that_is_no_video_is_not_sent(media: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A cache may name any file of its folder: what begins like a video is sent only if FFmpeg finds frames in it."""
    root = copy_hostile(media, tmp_path)
    secret = b"\0\0\0\x18ftypmp42" + b"secret" * 100
    (root / "files" / "square.webm").write_bytes(secret)
    (root / "files" / "square.avi").write_bytes(encode_audio(tone(1), "m4a"))
    with visit(open_index(root / "audio", root / "cache")) as client:
        for row in (0, 1):
            answer = client.get(f"/api/videos/{row}/play")
            assert answer.status_code == 404
            assert answer.json()["error"] == "the item cannot be read; the reason is in the server's log"
    assert "no frames" in caplog.text


def copy_hostile(media: Path, tmp_path: Path) -> Path:
    """Copy all of it, to be changed, with a secret recording outside of the folder of the source."""
    root = shutil.copytree(media, tmp_path / "copy")
    tamper(root / "cache", modality="audio", source={"path": str(root / "files" / "table.csv")})
    info = Cache(root / "cache").info
    remember(info.source, info.index_digest)
    (root / "secret.wav").write_bytes(wav(tone(1)))
    return root


@pytest.mark.parametrize("kind", ["climbing", "absolute", "link", "pipe", "device"])
def test_recordings_outside_source_are_not_served(
    media: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = copy_hostile(media, tmp_path)
    if kind == "link":
        (root / "files" / "x.wav").symlink_to(root / "secret.wav")
    elif kind == "pipe":
        os.mkfifo(root / "files" / "pipe.wav")
    written = {
        "climbing": "../secret.wav", "absolute": str(root / "secret.wav"), "link": "x.wav", "pipe": "pipe.wav",
        "device": "/dev/zero",
    }[kind]  # fmt: skip
    tamper(root / "cache", modality="audio", paths=[written])
    with visit(open_index(root / "audio", root / "cache")) as client:
        for path in ("thumbnail", "full", "play"):
            answer = client.get(f"/api/recordings/0/{path}")
            assert (answer.status_code, str(root) in answer.text) == (404, False)
        assert client.get("/api/recordings/1/play").status_code == 200
    assert "outside the source and --image-folder: " in caplog.text or "not a regular file: " in caplog.text


def test_recordings_that_have_moved(media: Path, caplog: pytest.LogCaptureFixture) -> None:
    (media / "files").rename(media / "moved")
    try:
        gone = open_index(media / "audio")
    finally:
        (media / "moved").rename(media / "files")
    missing = "the videos and recordings cannot be read; the reason is in the server's log"
    assert gone.info()["missing_images"] == missing
    assert [hit["player"] for hit in gone.items(np.array([0]))] == [None]
    assert "videos are not shown: " in caplog.text
