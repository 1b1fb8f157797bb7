"""Whitened principal components of stacked frames, fitted to small H.264 videos."""

from pathlib import Path

import numpy as np
import pytest

from embedcache.axis import Axis
from embedcache.encoders.frames import RATE_HZ, FrameEncoder
from embedcache.encoders.open import open_encoder
from embedcache.sources.media import Video, decode_video
from embedcache.testing.encoders import VideoEncoderContract
from pipelines.avsr.pixels import PIXELS_SIZE, Pixels
from pipelines.avsr.stacks import FAMILY, StackWeights, fit_stacks, gray_pixels, normalize_frames, stack_frames
from tests.media_files import encode_video


def waves(seed: int, num_frames: int = 40) -> np.ndarray:
    """Return frames of overlaid waves that move in random directions: (T, H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x, time = np.meshgrid(np.arange(32), np.arange(48), np.arange(num_frames), indexing="ij")
    parts = [rng.normal(0, 0.2, 2) @ np.stack([y, x]).reshape(2, -1) for _ in range(6)]
    sums = sum(np.sin(part.reshape(x.shape) + rng.uniform(-0.6, 0.6) * time) for part in parts)
    gray = np.clip(128 + 30 * np.asarray(sums), 0, 255).astype(np.uint8).transpose(2, 0, 1)
    return np.repeat(gray[..., None], 3, axis=3)


@pytest.fixture(scope="module")
def videos() -> list[Video]:
    return [decode_video(encode_video(waves(seed), rate_hz=25 + seed % 2 * 5, codec="libx264")) for seed in range(6)]  # type: ignore[misc]


@pytest.fixture(scope="module")
def path(videos: list[Video], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stacks") / "lips.safetensors"
    fit_stacks(videos, path, width=5, stack=3)
    return path


class TestStacks(VideoEncoderContract):
    has_bfloat16 = False

    @pytest.fixture
    def spec(self, path: Path) -> str:
        return f"{FAMILY}:{path}"

    @pytest.fixture
    def other_spec(self, path: Path, tmp_path: Path) -> str:
        weights = StackWeights.load(path)
        weights.components_KDE[0, 0, 0] += 1
        weights.save(tmp_path / "lips.safetensors")
        return f"{FAMILY}:{tmp_path}/lips.safetensors"


def test_states_are_stacks_projected_on_their_whitened_components(path: Path, videos: list[Video]) -> None:
    encoder = open_encoder(f"{FAMILY}:{path}", modality="video")
    weights = StackWeights.load(path)
    assert encoder.axes == {"states": Axis(kind="time", rate_hz=25.0, start_s=0.02)}  # type: ignore[attr-defined]
    prepared = FrameEncoder(Pixels(PIXELS_SIZE, batch_size=1), RATE_HZ).prepare(videos)
    stacks = [stack_frames(normalize_frames(gray_pixels(clip)), 3, slice(None)) for clip in prepared]
    states = encoder.encode(encoder.prepare(videos), ["states"])["states"]
    for clip, found in zip(stacks, states, strict=True):
        expected = (clip - weights.mean_KD.ravel()) @ weights.components_KDE.reshape(-1, 5)
        np.testing.assert_allclose(found, expected, atol=1e-4)
    together = np.concatenate(states).astype(np.float64)
    np.testing.assert_allclose(together.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(np.cov(together.T, bias=True), np.eye(5), atol=1e-3)
    _, singular, axes = np.linalg.svd(np.concatenate(stacks) - weights.mean_KD.ravel(), full_matrices=False)
    expected = axes[:5].T / singular[:5] * np.sqrt(len(together))
    products = np.abs((weights.components_KDE.reshape(-1, 5) * expected).sum(axis=0))
    np.testing.assert_allclose(products, (expected**2).sum(axis=0), rtol=1e-3)
