"""Folders below which images of a cache may be read, and the small images themselves."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedcache.dataset.thumbnails import Thumbnails, UnplayableError
from embedcache.extract.extract import extract
from embedcache.sources import open_source
from embedcache.sources.media import decode_audio, decode_video
from embedcache.store.cache import Cache
from tests.media_files import encode_video, moving_square, tone, wav
from tests.media_toy import MEDIA


def test_images_are_read_and_made_small(two_caches: list[Path]) -> None:
    thumbnails = Thumbnails(Cache(two_caches[0]))
    folder = two_caches[0].parent / "a-source"
    assert thumbnails.places == [str(folder)]
    assert thumbnails.read(7) == (folder / "00007.png").read_bytes()
    with Image.open(io.BytesIO(thumbnails.webp(7, 20))) as image:
        assert (image.format, image.size) == ("WEBP", (20, 20))
    with Image.open(folder / "00007.png") as image:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "WEBP", quality=80)
    assert thumbnails.webp(7, 32) == buffer.getvalue()
    url = thumbnails.data_url(7)
    kind, _, text = url.partition(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        assert image.size == (32, 32)  # never enlarged
    assert thumbnails.data_url(7) is url  # made once
    assert thumbnails.data_url(8) != url


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of a video and a recording, and of an interval of each, and its cache."""
    root = tmp_path_factory.mktemp("media")
    (root / "files").mkdir()
    (root / "files" / "a.mp4").write_bytes(encode_video(moving_square(51, width=64)))
    (root / "files" / "a.avi").write_bytes(encode_video(moving_square(25), kind="avi"))
    (root / "files" / "a.wav").write_bytes(wav(tone(2)))
    rows = ["0,a.mp4,a.wav,,", "1,a.mp4,a.wav,0.4,0.6", "2,a.avi,,,", "3,a.mp4,,,0.6"]
    lines = ["key,video,audio,start_s,stop_s", *rows, ""]
    (root / "files" / "table.csv").write_text("\n".join(lines))
    encoders = {"audio": [MEDIA], "video": [MEDIA]}
    extract(open_source(root / "files" / "table.csv"), root / "cache", encoder=encoders)
    return root


def test_middle_frames_of_videos(media: Path) -> None:
    thumbnails = Thumbnails(Cache(media / "cache"), modality="video")
    frames_THW3 = decode_video((media / "files" / "a.mp4").read_bytes()).frames_THW3
    for row, number in ((0, 25), (1, 12)):
        with Image.open(io.BytesIO(thumbnails.webp(row, 224))) as image:
            shown = np.asarray(image.convert("RGB"), np.float32)
        errors = np.abs(frames_THW3 - shown).mean(axis=(1, 2, 3))
        assert errors.argmin() == number
    url = thumbnails.data_url(0)
    assert url.startswith("data:image/webp;base64,")
    assert [thumbnails.interval_fragment(row) for row in (0, 1, 3)] == ["", "#t=0.4,0.6", "#t=0,0.6"]


def test_files_to_play(media: Path) -> None:
    sounds, videos = (Thumbnails(Cache(media / "cache"), modality=name) for name in ("audio", "video"))
    data = (media / "files" / "a.wav").read_bytes()
    played = sounds.play(1, 10_000)
    assert played.media_type == "audio/wav"
    np.testing.assert_allclose(decode_audio(played.data), decode_audio(data, 0.4, 0.6), atol=1e-4)
    assert [sounds.interval_fragment(row) for row in (0, 1)] == ["", ""]  # the file is cut
    assert videos.play(1, 10**6).data == (media / "files" / "a.mp4").read_bytes()
    with pytest.raises(UnplayableError, match="too large to be played here: 0.06 MB, more than 0.01 MB"):
        sounds.play(0, 10_000)
    with pytest.raises(UnplayableError, match="too large"):
        videos.play(0, 1_000)
    with pytest.raises(UnplayableError, match="browsers play MP4 and WebM, and this video is neither"):
        videos.play(2, 10**6)
