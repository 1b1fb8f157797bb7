"""Encoders and views of talking faces, and the source of their clips."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from embedcache.encoders.frames import RATE_HZ, FrameEncoder
from embedcache.encoders.open import open_encoder
from embedcache.encoders.views import open_view
from embedcache.errors import FingerprintError, ItemError, SettingError, SourceError
from embedcache.extract.extract import extract
from embedcache.extract.repair import verify_cache
from embedcache.extract.settings import ExtractSettings, VerifySettings
from embedcache.sources import Source, open_source
from embedcache.sources.media import Video, decode_audio, decode_video
from embedcache.store.cache import Cache
from embedcache.store.layout import Axis
from embedcache.testing.encoders import VideoEncoderContract
from embedcache.testing.sources import SourceContract
from pipelines.avsr.lrs import KIND
from pipelines.avsr.noise import VIEW, add_noise
from pipelines.avsr.pixels import PIXELS_SIZE, Pixels
from pipelines.avsr.stacks import FAMILY, StackWeights, fit_stacks, gray_pixels, normalize_frames, stack_frames
from tests.media_files import encode_video, moving_square, tone, wav
from tests.media_toy import MEDIA
from tests.sources.files import write

NOISE = (0.2 * np.random.default_rng(0).standard_normal(20_000)).clip(-1, 1).astype(np.float32)


def snr_db(clean: np.ndarray, noisy: np.ndarray) -> float:
    noise = noisy.astype(np.float64) - clean
    return float(10 * np.log10((clean.astype(np.float64) ** 2).sum() / (noise**2).sum()))


@pytest.mark.parametrize("level", [20, 2.5, -10])
@pytest.mark.parametrize("seconds", [0.5, 1.3, 4])
def test_noise_has_the_level_and_is_a_stretch_of_the_tape(level: float, seconds: float) -> None:
    clean = tone(seconds)  # shorter than the tape, longer, and three times as long
    noisy = add_noise(clean, NOISE, level)
    assert snr_db(clean, noisy) == pytest.approx(level, abs=1e-3)
    noise = (noisy.astype(np.float64) - clean)[: len(NOISE)]
    correlation = np.fft.ifft(np.fft.fft(NOISE).conj() * np.fft.fft(noise, len(NOISE))).real
    start = -int(correlation.argmax()) % len(NOISE)
    stretch = NOISE[(start + np.arange(len(noise))) % len(NOISE)]
    np.testing.assert_allclose(noise / np.abs(noise).max(), stretch / np.abs(stretch).max(), atol=1e-4)


def test_silent_stretches_are_left_out_and_silent_items_fail() -> None:
    tape = np.concatenate([np.zeros(100_000, np.float32), NOISE[:10]])
    assert snr_db(tone(0.1), add_noise(tone(0.1), tape, 5)) == pytest.approx(5, abs=1e-3)
    with pytest.raises(ItemError, match="silent"):
        add_noise(np.zeros(800, np.float32), NOISE, 0)


@pytest.mark.slow
def test_extraction_finds_a_moved_tape_and_refuses_a_changed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"f/a.wav": wav(tone(0.5)), "f/s.wav": wav(0 * tone(0.5)), "babble.wav": wav(NOISE)})
    (tmp_path / "moved").mkdir()

    def run(*views: str) -> list[str]:
        settings = ExtractSettings(features=("frames",), views=views)
        reports = extract(open_source(tmp_path / "f"), tmp_path / "c", encoder={"audio": [MEDIA]}, settings=settings)
        return [report.line() for report in reports]

    assert run(f"{VIEW}:-5,tape={tmp_path}/babble.wav")[1].endswith("failed 1: 1 silent")
    noisy = add_noise(decode_audio(wav(tone(0.5))), decode_audio(wav(NOISE)), -5)
    loudness = np.abs(noisy[: len(noisy) // 320 * 320]).reshape(-1, 320).mean(axis=1)
    feature = Cache(tmp_path / "c").feature("audio", "open_media@babble-5dB/frames")
    np.testing.assert_allclose(feature.gather_tokens(np.array([0]))[0][:, 0], loudness, rtol=1e-3)
    shutil.move(tmp_path / "babble.wav", tmp_path / "moved" / "babble.wav")
    monkeypatch.chdir(tmp_path / "moved")
    assert verify_cache(tmp_path / "c", VerifySettings(reencode=1)).is_sound
    (tmp_path / "moved" / "babble.wav").write_bytes(wav(-NOISE))
    with pytest.raises(FingerprintError, match="tape"):
        run(f"{VIEW}:-5,tape=babble.wav")


@pytest.mark.parametrize("argument", ["5", "loud,tape=TAPE", "201,tape=TAPE", "5,tape=TAPE"])
def test_wrong_views_raise(argument: str, tmp_path: Path) -> None:
    write(tmp_path, {"silence.wav": wav(0 * NOISE)})
    with pytest.raises(SettingError, match=r"expected SNR,tape=FILE|got silence"):
        open_view(f"{VIEW}:{argument.replace('TAPE', f'{tmp_path}/silence.wav')}")


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


CLIPS = {"anna/00001": "SO WE SAW 3 OF THEM", "anna/00002": "IT'S HERE", "bert/50001": "GOOD NIGHT"}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three clips of two speakers with sound, a list of two of them, and one that names noise."""
    for number, (key, text) in enumerate(CLIPS.items()):
        path = tmp_path / "main" / f"{key}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_video(moving_square(10 + 5 * number), samples=tone(0.4 + 0.2 * number)))
        path.with_suffix(".txt").write_text(f"Text:  {text.lower()}\nConf:  4\n\nWORD START END ASDSCORE\n")
    (tmp_path / "train.txt").write_text("bert/50001\nanna/00001\n\n")
    (tmp_path / "test.txt").write_text("anna/00002 NF\n")
    return tmp_path


class TestLrs(SourceContract):
    has_images = False

    @pytest.fixture
    def source(self, corpus: Path) -> Source:
        return open_source(f"{corpus}/main::{corpus}/train.txt", kind=KIND)


def test_folders_and_lists_have_clips_with_capital_transcripts(corpus: Path) -> None:
    source = open_source(str(corpus / "main"), kind=KIND)
    samples = list(source.samples())
    assert {sample.key: sample.texts[0].text for sample in samples} == CLIPS
    assert samples[0].columns == {"speaker": "anna", "split": None, "noise": None}
    assert decode_video(source.read(samples[2].files["video"][0])).frames_THW3.shape == (20, 24, 32, 3)
    listed = open_source(f"{corpus}/main::{corpus}/train.txt", kind=KIND).samples()
    assert [sample.key for sample in listed] == ["bert/50001", "anna/00001"]
    (test,) = open_source(f"{corpus}/main::{corpus}/test.txt", kind=KIND).samples()
    assert test.columns == {"speaker": "anna", "split": "test", "noise": "NF"}


def test_a_clip_without_its_transcript_is_named(corpus: Path) -> None:
    (corpus / "main/anna/00002.txt").write_text("HELLO WORLD\n")
    with pytest.raises(SourceError, match=r"anna/00002.txt: expected 'Text:'"):
        list(open_source(str(corpus / "main"), kind=KIND).samples())
