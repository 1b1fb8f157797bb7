"""Image encoders on the frames of videos."""

import re
import tracemalloc
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from embedcache.encoders.base import EncoderSettings
from embedcache.encoders.frames import FrameEncoder
from embedcache.encoders.open import EncoderSpec, open_encoder
from embedcache.errors import ItemError, SettingError, UnknownNameError
from embedcache.sources.media import MAX_VIDEO_PIXELS, Video, decode_video
from embedcache.testing.encoders import TOLERANCE, VideoEncoderContract, example_videos
from pipelines.avsr.pixels import FAMILY as PIXELS
from pipelines.avsr.pixels import Pixels
from tests.encoders.checkpoints import save_timm
from tests.media_files import encode_video, large_video, moving_square


class TestFrames(VideoEncoderContract):
    @pytest.fixture
    def spec(self, test_vit: Path) -> str:
        return f"frames:timm:test_vit,weights={test_vit},rate=15"

    @pytest.fixture
    def other_spec(self, tmp_path: Path) -> str:
        return f"frames:timm:test_vit,weights={save_timm('test_vit', tmp_path, seed=1)},rate=15"


@pytest.mark.slow
def test_vectors_are_those_of_the_frames(test_vit: Path) -> None:
    settings = EncoderSettings(features=("layer2.cls", "patches"), backend="torch")
    encoder = open_encoder(f"frames:timm:test_vit,weights={test_vit},rate=30", modality="video", settings=settings)
    image = open_encoder(f"timm:test_vit,weights={test_vit}", modality="image", settings=settings)
    assert list(encoder.features) == ["mean", "cls", "patch_mean", "layer2.cls"]  # tokens are left out
    video = example_videos()[1]  # at 30 Hz
    found = encoder.encode(encoder.prepare([video]), list(encoder.features))
    images = [Image.fromarray(frame) for frame in video.frames_THW3]
    expected = image.encode(image.prepare(images), ["cls", "layer2.cls"])
    for name, frames in expected.items():
        np.testing.assert_allclose(found[name][0], np.stack(frames), atol=TOLERANCE)
    np.testing.assert_allclose(found["mean"][0], np.mean(expected["cls"], axis=0), atol=TOLERANCE)
    assert encoder.axes["cls"].to_json() == {"kind": "time", "rate_hz": 30.0, "start_s": 0.5 / 30}  # type: ignore[attr-defined]


def sampled_frames(num_frames: int, rate_hz: float, wanted_hz: float) -> np.ndarray:
    """Return the numbers of the frames of a video that stand for steps at another rate: at least one."""
    num_steps = max(1, round(num_frames * wanted_hz / rate_hz))
    numbers = np.floor((np.arange(num_steps) + 0.5) * rate_hz / wanted_hz).astype(np.int64)
    return np.minimum(numbers, num_frames - 1)


def pixels_of(video: Video, rate_hz: float) -> np.ndarray:
    (prepared,) = FrameEncoder(Pixels((8, 6), batch_size=4), rate_hz).prepare([video])
    return prepared


@cache
def encoded(num_frames: int, rate_hz: int) -> bytes:
    """Return a video whose first frames are close together, if no rate is given."""
    frames = np.random.default_rng(num_frames).integers(0, 256, (num_frames, 12, 16, 3), np.uint8)
    times_ms = None if rate_hz else [*range(0, 20 * (num_frames // 2), 20), *range(10 * num_frames, 99_999, 75)]
    return encode_video(frames, rate_hz=rate_hz or 25, kind="mkv", times_ms=times_ms)


@pytest.mark.slow
@given(
    num_frames=st.sampled_from([1, 2, 7, 30]),
    rate_hz=st.sampled_from([0, 10, 25, 30]),
    wanted_hz=st.one_of(st.sampled_from([0.01, 1, 10, 25, 29.97, 50]), st.floats(0.1, 70)),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_prepared_frames_are_those_of_the_video(
    num_frames: int, rate_hz: int, wanted_hz: float, bounds: tuple[float, float]
) -> None:
    data, start_s = encoded(num_frames, rate_hz), min(bounds)
    stop_s = None if start_s == 0 else max(bounds)
    try:
        video = decode_video(data, start_s or None, stop_s)
        numbers = sampled_frames(len(video.frames_THW3), video.rate_hz, wanted_hz)
    except ItemError as error:  # of an interval without frames, or beyond the end
        with pytest.raises(ItemError, match=re.escape(str(error))):
            pixels_of(decode_video(data, start_s or None, stop_s), wanted_hz)
        return
    images = [Image.fromarray(video.frames_THW3[number]) for number in numbers]
    expected = np.stack(Pixels((8, 6), batch_size=4).prepare(images))
    np.testing.assert_array_equal(pixels_of(video, wanted_hz), expected)


@pytest.mark.slow
def test_video_above_the_limit_of_pixels() -> None:
    video, num_pixels = decode_video(large_video(140)), 1920 * 1080
    assert num_pixels > MAX_VIDEO_PIXELS / 140
    tracemalloc.start()
    found = pixels_of(video, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    luma = 30 + 40 * (sampled_frames(140, 25, 2) % 5)  # of 16 to 235
    np.testing.assert_allclose(found[:, 0, 0], (luma - 16) * 255 / 219, atol=2)
    assert peak < 4 * 3 * num_pixels


def test_video_that_has_too_many_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedcache.encoders.frames._MAX_PREPARED_BYTES", 8 * 6 * 10)
    frames = moving_square(75)
    for kind, codec, num_frames in (("mp4", None, 75), ("mpegts", "mpeg4", 11)):
        video = decode_video(encode_video(frames, kind=kind, codec=codec))
        with pytest.raises(ItemError, match=f"^too many frames: {num_frames} at rate=25.* choose a lower rate"):
            pixels_of(video, 25)
        assert len(pixels_of(video, 3)) == 9


def test_rate_and_size_are_in_the_fingerprint() -> None:
    specs = (f"frames:{PIXELS}:8x6", f"frames:{PIXELS}:8x6,rate=12", f"frames:{PIXELS}:16x16")
    fingerprints = {str(open_encoder(spec, modality="video").fingerprint) for spec in specs}
    assert len(fingerprints) == 3


@pytest.mark.parametrize(
    ("spec", "error", "word"),
    [
        ("frames:lite", SettingError, "SPEC"),
        ("frames:nonsense:model", UnknownNameError, "family"),
        (f"frames:{PIXELS}:8x6,rate=0", SettingError, "per second"),
        (f"frames:{PIXELS}:9", SettingError, "WIDTHxHEIGHT"),
        (f"frames:{PIXELS}:8x6,weights=x", UnknownNameError, "option"),
    ],
)
def test_wrong_specs_raise(spec: str, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        open_encoder(spec, modality="video")


def test_specs_of_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = EncoderSpec.parse("frames:hf:./dinov2,revision=main,rate=5")
    assert spec.inner == EncoderSpec("hf", "./dinov2", {"revision": "main"})
    assert spec.folder == "dinov2"
    assert spec.absolute.text == f"frames:hf:{tmp_path}/dinov2,rate=5,revision=main"
    assert EncoderSpec.parse(f"frames:{PIXELS}:8x6").folder == "8x6"
    assert EncoderSpec.parse("frames:lite:efficientnet-lite0").absolute.text == "frames:lite:efficientnet-lite0"
