"""Image encoders on the frames of videos."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedcache.encoders.frames import sampled_frames
from embedcache.encoders.open import EncoderSpec, open_encoder
from embedcache.encoders.settings import EncoderSettings
from embedcache.errors import ItemError, SettingError, UnknownNameError
from embedcache.sources.video import Video
from embedcache.testing.encoders import TOLERANCE, VideoEncoderContract, example_videos
from tests.encoders.checkpoints import save_timm


class TestFrames(VideoEncoderContract):
    @pytest.fixture
    def spec(self, test_vit: Path) -> str:
        return f"frames:timm:test_vit,weights={test_vit},rate=15"

    @pytest.fixture
    def other_spec(self, tmp_path: Path) -> str:
        return f"frames:timm:test_vit,weights={save_timm('test_vit', tmp_path, seed=1)},rate=15"


class TestPixels(VideoEncoderContract):
    has_weights = False

    @pytest.fixture
    def spec(self) -> str:
        return "frames:pixels,size=12x8"


def test_vectors_are_those_of_the_frames(test_vit: Path) -> None:
    settings = EncoderSettings(features=("layer2.cls", "patches"))
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


def test_every_video_has_the_rate() -> None:
    encoder = open_encoder("frames:pixels,rate=12.5", modality="video")
    frames = np.repeat(np.arange(50, dtype=np.uint8)[:, None, None, None], 3, axis=3) * np.ones((1, 4, 6, 1), np.uint8)
    (at_25,) = encoder.encode(encoder.prepare([Video(frames_THW3=frames, rate_hz=25.0)]), ["pixels"])["pixels"]
    assert at_25.shape == (25, 24 * 16)
    np.testing.assert_allclose(at_25[:, 0] * 255, np.arange(1, 50, 2), atol=1e-3)
    (at_30,) = encoder.encode(encoder.prepare([Video(frames_THW3=frames[:30], rate_hz=30.0)]), ["pixels"])["pixels"]
    assert len(at_30) == 12  # 1 s; half a step is rounded to even
    (short,) = encoder.encode(encoder.prepare([Video(frames_THW3=frames[:1], rate_hz=30.0)]), ["pixels"])["pixels"]
    assert len(short) == 1


def test_sampled_frames_are_the_middles_of_steps() -> None:
    assert sampled_frames(5, 25, 25).tolist() == [0, 1, 2, 3, 4]
    assert sampled_frames(5, 29.97, 29.97).tolist() == [0, 1, 2, 3, 4]
    assert sampled_frames(30, 30, 2).tolist() == [7, 22]
    assert sampled_frames(3, 10, 25).max() == 2


def test_pixels_are_the_gray_center() -> None:
    encoder = open_encoder("frames:pixels,size=4x4", modality="video")
    frame = np.zeros((8, 20, 3), np.uint8)
    frame[:, 5:15] = (255, 0, 0)  # the center square, and one pixel more for the filter
    (found,) = encoder.encode(encoder.prepare([Video(frames_THW3=frame[None], rate_hz=25.0)]), ["pixels"])["pixels"]
    np.testing.assert_allclose(found, np.full((1, 16), 76 / 255), atol=1e-6)  # red in ITU-R 601 gray


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        (
            Video(frames_THW3=np.zeros((2, 8, 8), np.uint8), rate_hz=25.0),
            r"got uint8 of shape \(2, 8, 8\)",
        ),
        (Video(frames_THW3=np.zeros((2, 8, 8, 3), np.float32), rate_hz=25.0), "got float32"),
        (Video(frames_THW3=np.zeros((2, 0, 8, 3), np.uint8), rate_hz=25.0), "no frames"),
        (Video(frames_THW3=np.zeros((2, 8, 8, 3), np.uint8), rate_hz=0.0), r"expected a positive frame rate, got 0\.0"),
    ],
)
def test_bad_videos_fail_with_a_reason(video: Video, reason: str) -> None:
    with pytest.raises(ItemError, match=reason):
        open_encoder("frames:pixels", modality="video").prepare([video])


def test_rate_and_size_are_in_the_fingerprint() -> None:
    specs = ("frames:pixels", "frames:pixels,rate=12", "frames:pixels,size=16x16")
    fingerprints = {str(open_encoder(spec, modality="video").fingerprint) for spec in specs}
    assert len(fingerprints) == 3


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("frames:lite", SettingError, "expected frames:pixels or frames:SPEC"),
        ("frames:nonsense:model", UnknownNameError, "unknown encoder family"),
        ("frames:pixels,rate=0", SettingError, "expected frames per second, such as 25"),
        ("frames:pixels,size=9", SettingError, "expected WIDTHxHEIGHT"),
        ("frames:pixels,weights=x", UnknownNameError, "unknown option"),
    ],
)
def test_wrong_specs_raise(spec: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        open_encoder(spec, modality="video")


def test_specs_of_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = EncoderSpec.parse("frames:hf:./dinov2,revision=main,rate=5")
    assert spec.inner == EncoderSpec("hf", "./dinov2", {"revision": "main"})
    assert spec.folder == "dinov2"
    assert spec.absolute.text == f"frames:hf:{tmp_path}/dinov2,rate=5,revision=main"
    assert EncoderSpec.parse("frames:pixels").folder == "pixels"
    assert EncoderSpec.parse("frames:lite:efficientnet-lite0").absolute.text == "frames:lite:efficientnet-lite0"
