"""The view `noise:SNR,tape=FILE` of recordings, and views of videos and points."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from embedcache.axis import Axis
from embedcache.errors import FingerprintError, ItemError, PathError, SettingError
from embedcache.extract.extract import EncoderReport, extract
from embedcache.extract.repair import verify_cache
from embedcache.extract.settings import ExtractSettings, VerifySettings
from embedcache.extract.views import add_noise, open_noise, open_view
from embedcache.sources import open_source
from embedcache.sources.sound import decode_audio
from embedcache.sources.video import Video
from embedcache.store.cache import Cache
from embedcache.store.verify import verify
from embedcache.train.data import open_data, parse_views
from tests.cli.run import succeed
from tests.extract.cases import tree
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


def run(source: Path, cache: Path, *views: str) -> list[EncoderReport]:
    settings = ExtractSettings(**SETTINGS, views=views)  # type: ignore[arg-type]
    return extract(open_source(source), cache, encoder={"audio": [MEDIA]}, settings=settings)


def snr_db(clean: np.ndarray, noisy: np.ndarray) -> float:
    noise = noisy.astype(np.float64) - clean
    return float(10 * np.log10((clean.astype(np.float64) ** 2).sum() / (noise**2).sum()))


@pytest.mark.parametrize("level", [20, 2.5, 0, -10])
@pytest.mark.parametrize("seconds", [0.5, 1.3, 4])
def test_noise_has_the_level(level: float, seconds: float) -> None:
    clean = tone(seconds)  # shorter than the tape, longer, and three times as long
    noisy = add_noise(clean, NOISE, level)
    assert noisy.dtype == np.float32
    assert snr_db(clean, noisy) == pytest.approx(level, abs=1e-3)


def test_noise_is_a_stretch_of_the_tape_and_goes_on_at_its_beginning() -> None:
    clean = tone(4)
    noise = add_noise(clean, NOISE, 0).astype(np.float64) - clean
    noise /= np.abs(noise).max() / np.abs(NOISE).max()
    (start,) = np.flatnonzero(np.abs(np.stack([NOISE, np.roll(NOISE, -1)], axis=1) - noise[:2]).max(axis=1) < 1e-4)
    np.testing.assert_allclose(noise, NOISE[(start + np.arange(len(clean))) % len(NOISE)], atol=1e-5)


def test_noise_differs_between_items_and_not_between_levels() -> None:
    loud, quiet = (add_noise(tone(0.5), NOISE, level) - tone(0.5) for level in (-20, 0))
    np.testing.assert_allclose(loud, quiet * 10, atol=1e-4)
    other = add_noise(tone(0.5, 441), NOISE, 0) - tone(0.5, 441)
    assert abs(np.corrcoef(quiet, other)[0, 1]) < 0.1


def test_noise_is_not_clipped() -> None:
    noisy = add_noise(tone(0.5), NOISE, -20)
    assert np.abs(noisy).max() > 2
    assert np.isfinite(noisy).all()


def test_silent_stretch_of_the_tape_is_left_out() -> None:
    tape = np.concatenate([np.zeros(100_000, np.float32), NOISE[:10]])
    assert snr_db(tone(0.1), add_noise(tone(0.1), tape, 5)) == pytest.approx(5, abs=1e-3)


def test_silent_item_fails_with_a_reason() -> None:
    with pytest.raises(ItemError, match="silent: noise cannot be added"):
        add_noise(np.zeros(800, np.float32), NOISE, 0)


@pytest.mark.slow
def test_extraction_with_noise(source: Path, tape: Path, tmp_path: Path) -> None:
    reports = run(source, tmp_path / "c", f"noise:-5,tape={tape}", f"noise:0,tape={tape}")
    assert [report.line() for report in reports] == [
        "open_media (mean, frames): encoded 4 recordings, reused 0, failed 0",
        "open_media@babble-5dB (mean, frames): encoded 4 recordings, reused 0, failed 1: 1 silent",
        "open_media@babble0dB (mean, frames): encoded 4 recordings, reused 0, failed 1: 1 silent",
    ]
    cache = Cache(tmp_path / "c")
    feature = cache.feature("audio", "open_media@babble-5dB/frames")
    assert feature.axis == Axis(kind="time", rate_hz=50.0, start_s=0.0)
    noisy = add_noise(decode_audio((source / "a.wav").read_bytes()), decode_audio(tape.read_bytes()), -5)
    loudness = np.abs(noisy[: len(noisy) // 320 * 320]).reshape(-1, 320).mean(axis=1)
    np.testing.assert_allclose(feature.gather_tokens(np.array([0]))[0][:, 0], loudness, rtol=1e-3)
    assert not verify(cache)


@pytest.mark.slow
def test_interrupted_extraction_with_noise_resumes_to_the_same_bytes(
    source: Path, tape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tape.parent)
    run(source, tmp_path / "c", "noise:5,tape=babble.wav")
    before = tree(tmp_path / "c")
    for commit in (tmp_path / "c").glob("audio/*/chunks/00001.parquet"):
        commit.unlink()
    assert [report.encoded for report in run(source, tmp_path / "c", f"noise:5.0,tape={tape}")] == [2, 2]
    assert tree(tmp_path / "c") == before


@pytest.mark.slow
def test_moved_tape_is_accepted_and_a_changed_one_is_not(
    source: Path, tape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path / "c", f"noise:5,tape={tape}")
    before = tree(tmp_path / "c")
    moved = tmp_path / "moved" / "babble.wav"
    moved.parent.mkdir()
    shutil.move(tape, moved)
    assert [report.reused for report in run(source, tmp_path / "c", f"noise:5,tape={moved}")] == [4, 4]
    (damaged,) = (tmp_path / "c").glob("audio/open_media@babble5dB/mean/c/0/0")
    damaged.write_bytes(b"\1" + damaged.read_bytes()[1:])
    with pytest.raises(PathError, match=r"tapes/babble.wav of .* does not exist; put it back, or run this in the fold"):
        verify_cache(tmp_path / "c", VerifySettings(repair=True))
    monkeypatch.chdir(moved.parent)
    assert verify_cache(tmp_path / "c", VerifySettings(repair=True, reencode=1)).is_sound
    assert tree(tmp_path / "c") == before
    moved.write_bytes(wav(-NOISE))
    with pytest.raises(FingerprintError, match=r"view\.tape: stored '\w{64}', requested '\w{64}'"):
        run(source, tmp_path / "c", f"noise:5,tape={moved}")


@pytest.mark.slow
def test_command_line_takes_several_levels(source: Path, tape: Path, tmp_path: Path) -> None:
    words = ["extract", source, "c", "--encoder", f"audio={MEDIA}", "--encoder", f"video={MEDIA}"]
    words += ["--view", "noise:-5,tape=tapes/babble.wav,noise:10,tape=tapes/babble.wav"]
    output = succeed(*words, "--view", "tests.extract.test_noise:backwards", cwd=tmp_path)
    assert "open_media@babble-5dB (mean)" in output
    assert "open_media@babble10dB (mean)" in output
    assert [group.name for group in Cache(tmp_path / "c").encoders("video")] == [
        "open_media",
        "open_media@tests.extract.test_noise-backwards",
    ]
    assert "@babble10dB" in succeed("inspect", "c", cwd=tmp_path)
    succeed("verify", "c", "--reencode", "100%", cwd=tmp_path)  # in another folder than the tape's


@pytest.mark.parametrize("argument", ["", "5", "loud,tape=TAPE", "nan,tape=TAPE", "201,tape=TAPE", "5,file=TAPE"])
def test_wrong_noise_raises(argument: str, tape: Path) -> None:
    with pytest.raises(SettingError, match=r"expected noise:SNR,tape=FILE .* such as noise:5,tape=babble\.wav"):
        open_view(f"noise:{argument.replace('TAPE', str(tape))}")


@pytest.mark.parametrize(
    ("data", "message"), [(b"no sound", "a recording: damaged recording"), (wav(0 * NOISE), "noise, got silence")]
)
def test_wrong_tape_raises(data: bytes, message: str, tmp_path: Path) -> None:
    write(tmp_path, {"tape.wav": data})
    with pytest.raises(SettingError, match=rf"tape\.wav: expected {message}"):
        open_view(f"noise:5,tape={tmp_path}/tape.wav")


def test_missing_tape_raises_before_indexing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(PathError, match=r"x\.wav of the view noise:5: expected a recording, got .* does not exist"):
        run(source, tmp_path / "c", f"noise:5,tape={tmp_path}/x.wav")
    assert not (tmp_path / "c").exists()


def test_tape_name_becomes_a_folder_name(tmp_path: Path) -> None:
    write(tmp_path, {"two talkers+me.v2.wav": wav(NOISE)})
    assert open_noise(f"-0,tape={tmp_path}/two talkers+me.v2.wav").suffix == "@two-talkers-me.v20dB"


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
    own = ("tests.extract.test_noise:backwards", "tests.extract.test_noise:mirrored")
    settings = ExtractSettings(features=("frames", "xyz"), views=(*own, f"noise:5,tape={tape}", "flip"))
    encoders = {modality: [MEDIA] for modality in ("audio", "video", "points")}
    source = open_source(write(tmp_path / "f", files))
    extract(source, tmp_path / "c", image_encoder=[IMAGE], encoder=encoders, settings=settings)
    cache = Cache(tmp_path / "c")
    suffixes = {"image": "flip", "audio": "babble5dB", "video": "tests.extract.test_noise-backwards"}
    suffixes["points"] = "tests.extract.test_noise-mirrored"
    for modality, suffix in suffixes.items():
        assert [group.name.partition("@")[2] for group in cache.encoders(modality)] == ["", suffix]
    plain, view = (cache.feature("video", f"open_media{suffix}/frames") for suffix in ("", f"@{suffixes['video']}"))
    np.testing.assert_array_equal(plain.gather_tokens(np.array([0]))[0], view.gather_tokens(np.array([0]))[0][::-1])
    assert verify_cache(tmp_path / "c", VerifySettings(reencode=1)).is_sound


@pytest.mark.slow
def test_training_draws_views_of_recordings(tmp_path: Path, tape: Path) -> None:
    videos: dict[str, bytes | str] = {
        f"{number}.mp4": encode_video(moving_square(25), samples=tone(1, 400 + 100 * number)) for number in range(3)
    }
    settings = ExtractSettings(features=("frames",), views=(f"noise:-5,tape={tape}",))
    encoders = {"audio": [MEDIA], "video": [MEDIA]}
    extract(open_source(write(tmp_path / "f", videos)), tmp_path / "c", encoder=encoders, settings=settings)
    features = {"audio": "open_media/frames", "video": "open_media/frames"}
    data = open_data(tmp_path / "c", features, memory_bytes=1e6)
    rows, (views,) = np.arange(3), parse_views(["audio=plain,babble-5dB:2"]).values()
    read = data.draw_views("audio", views, 0).read(rows, np.array([0, 1, 1])).values
    stored = [Cache(tmp_path / "c").feature("audio", f"open_media{view}/frames") for view in ("", "@babble-5dB")]
    np.testing.assert_array_equal(read[0], stored[0].gather_tokens(rows)[0])
    np.testing.assert_array_equal(read[1:], np.stack(stored[1].gather_tokens(rows)[1:]))


def test_view_without_an_encoder_raises(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="view flip applies to images, but no image encoder is named"):
        run(source, tmp_path / "c", "flip")
    with pytest.raises(SettingError, match=r"attribute modality to be one of .*audio.*, got 'sound'"):
        run(source, tmp_path / "c", "tests.extract.test_noise:lost")
