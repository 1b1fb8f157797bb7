"""The view that adds noise from a tape: levels, places, and what extraction stores."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from embedcache.encoders.views import open_view
from embedcache.errors import FingerprintError, ItemError, SettingError
from embedcache.extract.extract import extract
from embedcache.extract.repair import verify_cache
from embedcache.extract.settings import ExtractSettings, VerifySettings
from embedcache.sources import open_source
from embedcache.sources.media import decode_audio
from embedcache.store.cache import Cache
from pipelines.avsr.noise import VIEW, add_noise
from tests.media_files import tone, wav
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
