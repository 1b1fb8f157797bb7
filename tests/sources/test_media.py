"""Decoding of recordings and videos: formats, intervals, limits, damage of each kind, and containers that were cut."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import av
import numpy as np
import pytest

from embedcache.errors import DataError, ItemError
from embedcache.processes import prefetch_map
from embedcache.sources import media
from embedcache.sources.media import StreamInfo, Video, decode_audio, decode_video, iter_audio, probe_media
from tests.media_files import CODECS, encode_audio, encode_video, float_wav, jpeg_video, moving_square, tone, wav


def test_stereo_at_another_rate() -> None:
    decoded = decode_audio(wav(tone(1, rate_hz=48_000), rate_hz=48_000, channels=2))
    assert len(decoded) == pytest.approx(16_000, abs=2)
    inner = slice(200, -200)  # a resampler rings at both ends
    np.testing.assert_allclose(decoded[inner], tone(1)[: len(decoded)][inner], atol=0.02)


@pytest.mark.parametrize("kind", CODECS)
def test_compressed_recording(kind: str) -> None:
    decoded = decode_audio(encode_audio(tone(2), kind))
    assert len(decoded) == pytest.approx(32_000, abs=2_100)  # some codecs pad
    spectrum = np.abs(np.fft.rfft(decoded[4_000:20_000]))
    assert np.argmax(spectrum) == 440  # one second: a bin per hertz


@pytest.mark.parametrize(("start_s", "stop_s"), [(None, 0.5), (0.25, 1.0), (2.5, None), (3.0, 3.5)])
def test_interval_of_a_recording(start_s: float | None, stop_s: float | None) -> None:
    data = wav(tone(4))
    first, last = (None if bound is None else round(bound * 16_000) for bound in (start_s, stop_s))
    np.testing.assert_array_equal(decode_audio(data, start_s, stop_s), decode_audio(data)[first:last])


@pytest.mark.parametrize("kind", ["flac", "ogg", "m4a"])
def test_interval_of_a_compressed_recording(kind: str) -> None:
    data = encode_audio(tone(4), kind)
    part, whole = decode_audio(data, 2.5, 3.0), decode_audio(data)
    assert len(part) == 8_000
    np.testing.assert_allclose(part, whole[40_000:48_000], atol=1e-3)


def test_clips_are_limited_and_nan_is_refused() -> None:
    assert np.abs(decode_audio(float_wav(np.full(1600, 3.0, np.float32)))).max() == 1
    with pytest.raises(ItemError, match="NaN or infinity"):
        decode_audio(float_wav(np.full(1600, np.nan, np.float32)))


@pytest.mark.parametrize("kind", ["wav", "ogg", "mp3"])
def test_interval_beyond_the_end_fails(kind: str) -> None:
    """It may end a little late, as labels are rounded. Only a WAV announces its duration."""
    data = wav(tone(2)) if kind == "wav" else encode_audio(tone(2), kind)
    for bounds in ((5.0, None), (0.0, 5.0), (5.0, 6.0)):
        with pytest.raises(ItemError, match=r"no such interval: expected [05] s to .* within its 2\.\d\d s"):
            decode_audio(data, *bounds)
    assert len(decode_audio(data, 1.0, 2.05)) == pytest.approx(16_000, abs=1_000)


def test_long_recording_has_blocks_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(media, "MAX_AUDIO_S", 1)
    with pytest.raises(ItemError, match="too long: more than 1 s"):
        decode_audio(wav(tone(4)))
    assert len(decode_audio(wav(tone(4)), 1, 2)) == 16_000
    (tmp_path / "a.wav").write_bytes(wav(tone(4)))
    assert sum(len(block) for block in iter_audio(tmp_path / "a.wav")) == 64_000


@pytest.mark.parametrize("kind", ["mp4", "mkv", "webm", "avi", "mov"])
def test_video_frames(kind: str) -> None:
    frames = moving_square(10)
    video = decode_video(encode_video(frames, kind=kind))
    assert (video.frames_THW3.shape, video.frames_THW3.dtype, video.rate_hz) == (frames.shape, np.uint8, 25)
    assert np.abs(video.frames_THW3.astype(int) - frames).mean() < 12  # the codec loses some


def test_interval_of_a_video() -> None:
    data = encode_video(moving_square(100))
    whole = decode_video(data).frames_THW3
    np.testing.assert_array_equal(decode_video(data, 2.0, 3.0).frames_THW3, whole[50:75])
    np.testing.assert_array_equal(decode_video(data, 3.6).frames_THW3, whole[90:])
    assert len(decode_video(encode_video(moving_square(2), rate_hz=1)).frames_THW3) == 2


def test_missing_stream_fails() -> None:
    with pytest.raises(ItemError, match="no sound: the file has no audio stream"):
        decode_audio(encode_video(moving_square(5)))
    with pytest.raises(ItemError, match="no frames: the file has no video stream"):
        decode_video(wav(tone(1)))


def test_videos_in_memory() -> None:
    frames = moving_square(5)
    video = Video(frames_THW3=frames, rate_hz=25)
    assert (len(list(video.frames())), video.duration_s) == (5, 0.2)
    assert video.frames_THW3 is frames


@pytest.mark.parametrize(
    ("shape", "kind", "rate_hz"),
    [((2, 8, 8), "u1", 25), ((2, 8, 8, 3), "f4", 25), ((0, 8, 8, 3), "u1", 25), ((1, 8, 8, 3), "u1", 0)],
)
def test_frames_that_are_no_video(shape: tuple[int, ...], kind: str, rate_hz: float) -> None:
    with pytest.raises(DataError, match="^video: expected"):
        Video(frames_THW3=np.zeros(shape, kind), rate_hz=rate_hz)


@pytest.mark.parametrize(("kind", "duration_s"), [("mp4", 0.44), ("mpegts", None)])
def test_large_video_is_no_array(monkeypatch: pytest.MonkeyPatch, kind: str, duration_s: float | None) -> None:
    monkeypatch.setattr(media, "MAX_VIDEO_PIXELS", 32 * 24 * 10)
    large = decode_video(encode_video(moving_square(11), kind=kind, codec="mpeg4"))
    assert (large.rate_hz, large.duration_s) == (25, duration_s)
    assert len(list(large.frames())) == 11
    with pytest.raises(ItemError, match="too many pixels: more than 7,680 in frames of 32 x 24; index intervals"):
        large.frames_THW3  # noqa: B018


def test_frames_may_be_converted_after_later_ones_were_decoded() -> None:
    video = decode_video(encode_video(moving_square(70), kind="webm"), 0.6, 1.5)
    kept = list(video.frames())[::7]
    np.testing.assert_array_equal(np.stack([frame() for frame in kept]), video.frames_THW3[::7])


def test_frames_of_changing_size_fail() -> None:
    data = jpeg_video([*moving_square(9), *moving_square(3, width=64)])
    with pytest.raises(ItemError, match="the frames change their size"):
        list(decode_video(data).frames())
    assert len(decode_video(data, 0, 0.32).frames_THW3) == 8


def test_decoding_ends_when_it_is_cancelled() -> None:
    begun, closed, read = Event(), Event(), list[int]()
    data = encode_video(moving_square(99))

    def decode() -> None:
        for number, _ in enumerate(decode_video(data).frames()):
            read.append(number)
            begun.set()
            assert closed.wait(10)

    with ThreadPoolExecutor(1) as executor:
        found = prefetch_map(executor, lambda number: decode() if number else None, range(2), window=2)
        next(found)
        assert begun.wait(10)
        found.close()
        closed.set()
    assert read == [0]


def decode_frames(data: bytes) -> np.ndarray:
    return decode_video(data).frames_THW3


BROKEN = {
    "empty": b"",
    "text": b"not a recording at all\n" * 20,
    "zeros": bytes(4096),
    "header": wav(tone(1))[:20],
    "mp4 without its index": encode_video(moving_square(50), samples=tone(2))[:2_000],
    "flac cut": encode_audio(np.random.default_rng(0).uniform(-1, 1, 64_000), "flac")[:20_000],
    "silent": wav(np.zeros(0, np.float32)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_fails_with_a_reason(name: str) -> None:
    for decode in (decode_audio, decode_frames):
        with pytest.raises(ItemError) as caught:
            decode(BROKEN[name])
        assert str(caught.value)
        assert "\n" not in str(caught.value)


def test_playlist_opens_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.wav").write_bytes(wav(tone(1)))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ItemError, match="damaged recording"):
        decode_audio(b"ffconcat version 1.0\nfile secret.wav\n")


@pytest.mark.parametrize("kind", ["wav", "m4a", "mp3", "mp4"])
def test_random_damage_never_crashes(kind: str) -> None:
    """Flip bytes and cut files: either decodes to something finite, or fails with a reason."""
    rng = np.random.default_rng(0)
    is_video = kind == "mp4"
    if is_video:
        intact = encode_video(moving_square(20), samples=tone(1))
    else:
        intact = wav(tone(1)) if kind == "wav" else encode_audio(tone(1), kind)
    num_failed = 0
    for _ in range(60):
        data = bytearray(intact)
        for position in rng.integers(0, len(data), 8):
            data[position] = rng.integers(0, 256)
        data[rng.integers(len(data) // 2, len(data) + 1) :] = b""
        for decode in (decode_audio, decode_frames) if is_video else (decode_audio,):
            try:
                decoded = decode(bytes(data))
            except ItemError:
                num_failed += 1
            else:
                assert np.isfinite(decoded).all()
    assert num_failed or kind in {"wav", "mp3"}


@pytest.mark.parametrize("samples", [None, tone(4)])
def test_truncated_file_fails(samples: np.ndarray | None) -> None:
    """A file that announces its length first and was cut between packets is no shorter recording."""
    frames = np.random.default_rng(0).integers(0, 256, (100, 24, 32, 3), np.uint8)
    video = encode_video(frames, kind="mkv", samples=samples)
    with pytest.raises(ItemError, match=r"^truncated: \d\.\d s could be decoded of 4\.0 s$"):
        list(decode_video(video[: len(video) * 6 // 10]).frames())
    assert len(decode_video(video[: len(video) * 6 // 10], 0.5, 1.5).frames_THW3) == 25
    sound = wav(tone(2))
    with pytest.raises(ItemError, match=r"^truncated: 32,022 bytes of 64,044$"):
        decode_audio(sound[: len(sound) // 2])


def test_frames_of_too_many_pixels_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither if the file announces their size, nor if it announces another one."""
    small, large = moving_square(2), moving_square(1, width=320)
    monkeypatch.setattr(media, "MAX_FRAME_PIXELS", 4_096)
    assert len(decode_frames(jpeg_video(small))) == 2
    with pytest.raises(ItemError, match="^damaged video: "):
        decode_frames(jpeg_video([small[0], *large, small[1]]))
    monkeypatch.setattr(media, "MAX_FRAME_PIXELS", 767)
    with pytest.raises(ItemError, match="^too many pixels: 32 x 24 in one frame, more than 767$"):
        decode_video(jpeg_video(small))


def test_frames_of_varying_length_are_put_at_a_constant_rate(tmp_path: Path) -> None:
    """Frames at 0, 40, 80, 200 and 240 ms, as a phone in the dark records them: 5 frames in 280 ms."""
    data = encode_video(moving_square(5), times_ms=[0, 40, 80, 200, 240], kind="mkv")
    (tmp_path / "a").write_bytes(data)
    with av.open(io.BytesIO(data)) as container:
        distinct = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    found = [frame() for frame in decode_video(tmp_path / "a").frames()]
    rate_hz = probe_media(tmp_path / "a")["video"].rate_hz
    times_ms = (np.arange(len(found)) + 0.5) * 1000 / rate_hz
    shown = np.searchsorted([0, 40, 80, 200, 240], times_ms, side="right") - 1
    assert len(found) == pytest.approx(0.28 * rate_hz, abs=1)
    np.testing.assert_array_equal(np.stack(found), distinct[shown])


def test_streams_are_found_without_decoding(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(encode_video(moving_square(50), samples=tone(2.0)))
    (tmp_path / "a.mp3").write_bytes(encode_audio(tone(2.0), "mp3"))
    found = probe_media(tmp_path / "a.mp4")
    assert found["video"] == StreamInfo(rate_hz=25, duration_s=2.0)
    assert found["audio"].duration_s == pytest.approx(2.0, abs=0.1)
    assert probe_media(tmp_path / "a.mp3") == {"audio": StreamInfo(rate_hz=16_000, duration_s=None)}


@pytest.mark.parametrize("size", [0, 2**31 - 4096, 2**32 - 1])
def test_wav_of_unknown_size_is_read_to_its_end(size: int) -> None:
    """Programs that write WAV into a pipe announce one of these sizes: FFmpeg, sox and arecord."""
    whole, field = wav(tone(2.0)), size.to_bytes(4, "little")
    piped = whole[:4] + field + whole[8:40] + field + whole[44:]
    np.testing.assert_array_equal(decode_audio(piped), decode_audio(whole))
