"""Views of one's own: functions of items, and of an argument, such as the noise of `pipelines.avsr`."""

from pathlib import Path

import numpy as np
import pytest

from embedcache.encoders.views import open_view
from embedcache.errors import SettingError
from embedcache.extract.extract import extract
from embedcache.extract.repair import verify_cache
from embedcache.extract.settings import ExtractSettings, VerifySettings
from embedcache.sources import open_source
from embedcache.sources.media import Video
from embedcache.store.cache import Cache
from embedcache.store.producer import FillReport
from pipelines.avsr.noise import VIEW
from tests.cli.run import succeed
from tests.media_files import cloud, encode_audio, encode_video, moving_square, npz, tone, wav
from tests.media_toy import MEDIA
from tests.sources.files import jpeg, write
from tests.toy import IMAGE

NOISE = (0.2 * np.random.default_rng(0).standard_normal(20_000)).clip(-1, 1).astype(np.float32)
SETTINGS = {"features": ("mean", "frames"), "chunk_size": 2}


@pytest.fixture
def tape(tmp_path: Path) -> Path:
    write(tmp_path / "tapes", {"babble.wav": wav(NOISE)})
    return tmp_path / "tapes" / "babble.wav"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    files: dict[str, bytes | str] = {
        "a.wav": wav(tone(0.5)),
        "b.flac": encode_audio(tone(2, 660), "flac"),
        "c.mp4": encode_video(moving_square(25), samples=tone(1)),
        "silent.wav": wav(np.zeros(8_000, np.float32)),
    }
    return write(tmp_path / "recordings", files)


def run(source: Path, cache: Path, *views: str) -> list[FillReport]:
    settings = ExtractSettings(**SETTINGS, views=views)  # type: ignore[arg-type]
    return extract(open_source(source), cache, encoder={"audio": [MEDIA]}, settings=settings)


@pytest.mark.slow
def test_command_line_takes_several_levels(source: Path, tape: Path, tmp_path: Path) -> None:
    words = ["extract", source, "c", "--encoder", f"audio={MEDIA}", "--encoder", f"video={MEDIA}"]
    words += ["--view", f"{VIEW}:-5,tape=tapes/babble.wav,{VIEW}:10,tape=tapes/babble.wav"]
    output = succeed(*words, "--view", "tests.extract.test_own_views:backwards", cwd=tmp_path)
    assert "open_media@babble-5dB (mean)" in output
    assert "open_media@babble10dB (mean)" in output
    assert [group.name for group in Cache(tmp_path / "c").encoders("video")] == [
        "open_media",
        "open_media@tests.extract.test_own_views-backwards",
    ]
    assert "@babble10dB" in succeed("inspect", "c", cwd=tmp_path)
    succeed("verify", "c", "--reencode", "100%", cwd=tmp_path)  # in another folder than the tape's


def backwards(video: Video) -> Video:
    """A user's view of videos."""
    return Video(frames_THW3=video.frames_THW3[::-1], rate_hz=video.rate_hz)


backwards.modality = "video"  # type: ignore[attr-defined]


def mirrored(points: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A user's view of points."""
    return {**points, "xyz": points["xyz"] * np.float32(-1)}


mirrored.modality = "points"  # type: ignore[attr-defined]


def lost(item: object) -> object:
    return item


lost.modality = "sound"  # type: ignore[attr-defined]


@pytest.mark.slow
def test_views_apply_to_their_modality_only(tmp_path: Path, tape: Path) -> None:
    files: dict[str, bytes | str] = {
        "a.mp4": encode_video(moving_square(25), samples=tone(1)),
        "a.npz": npz(cloud(4)),
        "a.jpg": jpeg(),
    }
    own = ("tests.extract.test_own_views:backwards", "tests.extract.test_own_views:mirrored")
    settings = ExtractSettings(features=("frames", "xyz"), views=(*own, f"{VIEW}:5,tape={tape}", "flip"))
    encoders = {modality: [MEDIA] for modality in ("audio", "video", "points")}
    source = open_source(write(tmp_path / "f", files))
    extract(source, tmp_path / "c", image_encoder=[IMAGE], encoder=encoders, settings=settings)
    cache = Cache(tmp_path / "c")
    suffixes = {"image": "flip", "audio": "babble5dB", "video": "tests.extract.test_own_views-backwards"}
    suffixes["points"] = "tests.extract.test_own_views-mirrored"
    for modality, suffix in suffixes.items():
        assert [group.name.partition("@")[2] for group in cache.encoders(modality)] == ["", suffix]
    plain, view = (cache.feature("video", f"open_media{suffix}/frames") for suffix in ("", f"@{suffixes['video']}"))
    np.testing.assert_array_equal(plain.gather_tokens(np.array([0]))[0], view.gather_tokens(np.array([0]))[0][::-1])
    assert verify_cache(tmp_path / "c", VerifySettings(reencode=1)).is_sound


@pytest.mark.parametrize(("name", "word"), [("lost", "modality"), ("lost:5", "View")])
def test_function_that_is_no_view_raises(name: str, word: str) -> None:
    with pytest.raises(SettingError, match=word):
        open_view(f"tests.extract.test_own_views:{name}")
