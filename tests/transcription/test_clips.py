"""Windows of recordings: where they are cut, what they hold, and which inputs are refused."""

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.errors import DataError, PathError, SettingError
from embedcache.sources.video import StreamedVideo, Video, decode_video
from embedcache.transcription import clips
from embedcache.transcription.clips import Clip, iter_windows, open_clip
from tests.media_files import encode_audio, encode_video, float_wav, moving_square, tone, wav
from tests.sources.files import write

BOTH = ("audio", "video")


def opened(audio: Any = None, video: Any = None, **options: Any) -> Clip:
    return open_clip(
        audio, video, **{"streams": BOTH, "wanted": (), "mouth": "all", "name": "the recording", **options}
    )


def noise(seconds: float, *quiet: tuple[float, float]) -> np.ndarray:
    """Return noise with quieter intervals in it."""
    samples = np.random.default_rng(0).normal(0, 0.1, round(seconds * 16_000)).astype(np.float32)
    for start_s, stop_s in quiet:
        samples[round(start_s * 16_000) : round(stop_s * 16_000)] *= 0.1
    return samples


def frames(seconds: float, rate_hz: float = 25.0) -> Video:
    return Video(frames_THW3=moving_square(round(seconds * rate_hz)), rate_hz=rate_hz)


def test_windows_end_where_it_is_quiet() -> None:
    samples = noise(20, (3.0, 3.7), (0.6, 1.5), (6.0, 6.7), (9.0, 9.7), (12.0, 12.7))  # not in [0.6, 1.5]: too early
    windows = list(iter_windows(opened(samples), window_s=4.0, step_s=0.04))
    found = [(window.start_s, window.stop_s) for window in windows]
    assert found[0][0] == 0
    assert found[-1][1] == 20
    assert [stop for _, stop in found[:-1]] == [start for start, _ in found[1:]]
    for (_, stop), (low, high) in zip(found, [(3.0, 3.7), (6.0, 6.7), (9.0, 9.7), (12.0, 12.7)], strict=False):
        assert low < stop < high
    assert all(stop - start <= 4.0 for start, stop in found)
    np.testing.assert_array_equal(np.concatenate([window.items["audio"] for window in windows]), samples)


def test_windows_of_lips_end_where_they_rest() -> None:
    video = frames(10.0)
    video.frames_THW3[85:95] = video.frames_THW3[85]  # 3.4 to 3.8 s
    first, *_ = iter_windows(opened(video=video), window_s=4.0, step_s=0.04)
    assert 3.4 < first.stop_s < 3.8


@pytest.mark.parametrize("rate_hz", [25.0, 30_000 / 1001])
def test_windows_hold_all_frames_in_step_with_the_sound(rate_hz: float) -> None:
    video, samples = frames(8.0, rate_hz), noise(8.0)
    video.frames_THW3[:] = np.arange(len(video.frames_THW3))[:, None, None, None]
    windows = list(iter_windows(opened(samples, video), window_s=3.0, step_s=0.04))
    assert len(windows) >= 3
    parts = [window.items["video"] for window in windows]
    np.testing.assert_array_equal(np.concatenate([part.frames_THW3 for part in parts]), video.frames_THW3)
    for window, part in zip(windows, parts, strict=True):
        assert part.rate_hz == rate_hz
        assert part.frames_THW3[0, 0, 0, 0] / rate_hz == pytest.approx(window.start_s, abs=0.5 / rate_hz + 1e-9)
        assert len(window.items["audio"]) / 16_000 == pytest.approx(window.stop_s - window.start_s)


@pytest.mark.parametrize(("seconds", "lengths"), [(4.0, [4.0]), (4.02, [3.02, 1.0]), (0.3, [0.3])])
def test_last_window_is_no_splinter(seconds: float, lengths: list[float]) -> None:
    samples = noise(seconds, (2.7, 3.34))
    windows = list(iter_windows(opened(samples), window_s=4.0, step_s=0.02))
    assert [window.stop_s - window.start_s for window in windows] == pytest.approx(lengths, abs=0.03)


def test_files_are_read_as_arrays_are(tmp_path: Path) -> None:
    samples = noise(9.0, (3.5, 3.7))
    write(tmp_path, {"a.mp4": encode_video(moving_square(225), samples=samples), "a.wav": wav(samples)})
    rounded = np.round(samples * 32767) / np.float32(32768)
    of_array = list(iter_windows(opened(rounded), window_s=4.0, step_s=0.04))
    of_wav = list(iter_windows(opened(str(tmp_path / "a.wav")), window_s=4.0, step_s=0.04))
    assert len(of_wav) == len(of_array) == 3
    for one, other in zip(of_wav, of_array, strict=True):
        assert one[:2] == other[:2]
        np.testing.assert_allclose(one.items["audio"], other.items["audio"], atol=1e-4)
    of_video = list(iter_windows(opened(tmp_path / "a.mp4"), window_s=4.0, step_s=0.04))
    assert [sorted(window.items) for window in of_video] == [["audio", "video"]] * 3
    assert sum(len(window.items["video"].frames_THW3) for window in of_video) == 225


@pytest.mark.parametrize("duration_s", [9.0, None])
def test_frames_may_be_decoded_meanwhile(duration_s: float | None) -> None:
    data, options = encode_video(moving_square(225)), {"mouth": (0.25, 0.25, 0.75, 0.75)}
    streamed = StreamedVideo(data, None, None, rate_hz=25, duration_s=duration_s)
    for one, other in zip(
        iter_windows(opened(video=streamed, **options), window_s=4.0, step_s=0.04),
        iter_windows(opened(video=decode_video(data), **options), window_s=4.0, step_s=0.04),
        strict=True,
    ):
        assert one[:2] == other[:2]
        np.testing.assert_array_equal(one.items["video"].frames_THW3, other.items["video"].frames_THW3)
    assert "frames_THW3" not in vars(streamed)  # never all of them at once


def test_mouth_is_cut_out(tmp_path: Path) -> None:
    pixels = moving_square(10, width=40, height=20)
    pixels[:, 10:15, 20:30] = (200, 100, 50)
    mouth = (0.5, 0.5, 0.75, 0.75)
    clip = opened(video=Video(frames_THW3=pixels, rate_hz=25.0), mouth=mouth)
    (window,) = iter_windows(clip, window_s=4.0, step_s=0.04)
    cut = window.items["video"].frames_THW3
    np.testing.assert_array_equal(cut, np.broadcast_to(np.uint8([200, 100, 50]), (10, 5, 10, 3)))
    write(tmp_path, {"a.mp4": encode_video(pixels)})
    (window,) = iter_windows(opened(video=tmp_path / "a.mp4", mouth=mouth), window_s=4.0, step_s=0.04)
    assert np.abs(window.items["video"].frames_THW3.astype(int) - cut).mean() < 20


@pytest.mark.parametrize("is_long", [False, True])
@pytest.mark.parametrize(("sound_s", "frames_s"), [(3.0, 2.0), (2.0, 3.0), (9.0, 5.0), (5.0, 9.0)])
def test_streams_of_other_lengths_are_refused(sound_s: float, frames_s: float, is_long: bool, tmp_path: Path) -> None:
    """Check arrays, whose lengths are known, and files of formats that announce none."""
    samples, window_s = noise(sound_s), 2.0 if is_long else 20.0
    expected = rf"one length, to 0.25 s, got {sound_s:.2f} s of sound and {frames_s:.2f} s of frames"
    with pytest.raises(DataError, match=f"the recording: .*{expected}"):
        opened(samples, frames(frames_s))
    write(tmp_path, {"a.wav": wav(samples), "b.webm": encode_video(moving_square(round(frames_s * 25)), kind="webm")})
    both = (opened(tmp_path / "a.wav"), opened(video=tmp_path / "b.webm"))
    infos = {stream: replace(clip.infos[stream], duration_s=None) for clip in both for stream in clip.streams}
    sources = {stream: clip.sources[stream] for clip in both for stream in clip.streams}
    with pytest.raises(DataError, match=expected):
        list(
            iter_windows(Clip(name="blind", sources=sources, infos=infos, mouth="all"), window_s=window_s, step_s=0.04)
        )


def test_streams_may_end_a_little_apart() -> None:
    for seconds in (2.8, 3.2):
        (window,) = iter_windows(opened(noise(3.0), frames(seconds)), window_s=20.0, step_s=0.04)
        assert len(window.items["video"].frames_THW3) == round(seconds * 25)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write(
        folder,
        {
            "both.mp4": encode_video(moving_square(25), samples=tone(1.0)),
            "silent.mp4": encode_video(moving_square(25)),
            "sound.wav": wav(tone(1.0)),
            "text.mp4": b"no video at all" * 40,
            "cut.wav": wav(tone(4.0))[:60_000],
            "loud.wav": float_wav(np.full(16_000, 5e5, np.float32)),
            "settings.toml": b"[train]\nepochs = 3\n" * 20,
        },
    )
    return folder


@pytest.mark.parametrize(
    ("audio", "video", "options", "expected"),
    [
        ("both.mp4", None, {}, BOTH),
        ("both.mp4", None, {"wanted": ("audio",), "mouth": None}, ("audio",)),
        ("both.mp4", None, {"wanted": ("video",)}, ("video",)),
        ("both.mp4", None, {"streams": ("audio",), "mouth": None}, ("audio",)),
        ("both.mp4", None, {"streams": ("video",)}, ("video",)),
        ("silent.mp4", None, {"streams": ("video",)}, ("video",)),
        ("silent.mp4", None, {"wanted": ("video",)}, ("video",)),
        ("sound.wav", None, {}, ("audio",)),  # a recording of sound alone has nothing else
        ("sound.wav", "silent.mp4", {}, BOTH),
        (None, "both.mp4", {}, ("video",)),
    ],
)
def test_streams_of_files(audio: str | None, video: str | None, options: Any, expected: Any, media: Path) -> None:
    paths = [None if name is None else media / name for name in (audio, video)]
    assert opened(*paths, **options).streams == expected


@pytest.mark.parametrize(
    ("audio", "video", "options", "message"),
    [
        (None, None, {}, "expected sound, frames or both, got neither"),
        ("silent.mp4", None, {}, r"silent.mp4: expected sound, got none: .* no audio stream; .*streams video"),
        ("sound.wav", None, {"wanted": BOTH}, "expected frames, got none"),
        ("sound.wav", None, {"streams": ("video",)}, "expected frames, got none: the file has no video stream$"),
        (None, "sound.wav", {}, "expected frames, got none: the file has no video stream"),
        ("text.mp4", None, {}, "text.mp4: damaged file: Invalid data"),
        ("cut.wav", None, {}, "cut.wav: truncated: 60,000 bytes of 128,044"),
        ("none.wav", None, {}, r"none.wav does not exist: expected a recording or a video"),
        (".", None, {}, "is a folder: expected a recording"),
        ("/dev/zero", None, {}, "/dev/zero is a pipe or a device: expected a recording or a video"),
        (
            "settings.toml",
            None,
            {},
            "settings.toml: expected a recording or a video, got a file with neither sound nor",
        ),
    ],
)
def test_wrong_files_raise(audio: str | None, video: str | None, options: Any, message: str, media: Path) -> None:
    paths = [None if name is None else media / name for name in (audio, video)]
    with pytest.raises((DataError, PathError), match=message):
        opened(*paths, **options)


@pytest.mark.parametrize(
    ("audio", "options", "message"),
    [
        (True, {"streams": ("audio",), "wanted": ("video",)}, "streams: expected audio, .*got video"),
        (False, {"streams": ("audio",)}, "both.mp4: expected audio, which the run was trained on, got video"),
        (True, {"mouth": None}, r"mouth: no face region given for the frames of .*both.mp4: expected X0,Y0"),
        (True, {"mouth": (0.5, 0.2, 0.4, 0.9)}, "mouth: expected X0,.*got 0.5,0.2,0.4,0.9"),
        (True, {"mouth": (10, 10, 90, 50)}, "mouth: expected .* in fractions .*got 10,10,90,50"),
        (True, {"mouth": "lips"}, "mouth: expected .*got 'lips'"),
    ],
)
def test_wrong_settings_raise(audio: bool, options: Any, message: str, media: Path) -> None:
    with pytest.raises(SettingError, match=message):
        opened(**{"audio" if audio else "video": media / "both.mp4"}, **options)


@pytest.mark.parametrize(
    ("audio", "video", "message"),
    [
        (
            np.zeros(100),
            None,
            "the recording: expected a path, or mono float32 samples at 16000 Hz, got float64 of shape",
        ),
        (np.zeros((100, 2), np.float32), None, r"float32 of shape \(100, 2\)"),
        (np.full(100, 20_000, np.float32), None, r"samples in \[-1, 1\], got up to 20000; divide"),
        (np.full(100, np.nan, np.float32), None, r"the recording: expected samples in \[-1, 1\], got NaN or infinity"),
        (np.full(100, -np.inf, np.float32), None, r"the recording: expected samples in \[-1, 1\], got NaN or infinity"),
        (
            None,
            np.zeros((9, 4, 4, 3), np.uint8),
            "the recording: expected a path, or a Video of frames and their rate, got ndarray",
        ),
        (b"RIFF", None, "mono float32 samples at 16000 Hz, got bytes"),
        (None, Video(frames_THW3=np.zeros((9, 4, 4, 3)), rate_hz=25.0), "uint8 RGB frames of shape .*got float64"),
        (None, Video(frames_THW3=np.zeros((9, 4, 4, 3), np.uint8), rate_hz=0.0), "positive frame rate, got 0"),
    ],
)
def test_wrong_arrays_raise(audio: Any, video: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(audio, video)


def test_damage_inside_a_file_names_it(tmp_path: Path) -> None:
    data = encode_audio(noise(8.0), "flac")
    write(tmp_path, {"a.flac": data[: len(data) // 2]})
    with pytest.raises(DataError, match=r"a\.flac: (truncated|damaged)"):
        list(iter_windows(opened(tmp_path / "a.flac"), window_s=2.0, step_s=0.04))


def test_loud_files_are_refused_as_arrays_are(media: Path) -> None:
    for clip in (lambda: opened(media / "loud.wav"), lambda: opened(np.full(16_000, 5e5, np.float32))):
        with pytest.raises(DataError, match=r": expected samples in \[-1, 1\], got up to 500000; "):
            list(iter_windows(clip(), window_s=2.0, step_s=0.04))


def test_large_frames_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "MAX_VIDEO_PIXELS", 32 * 24 * 30)
    clip = opened(video=frames(4.0))
    with pytest.raises(DataError, match="the recording: too many pixels: .* 32 x 24 each; give a smaller region"):
        list(iter_windows(clip, window_s=2.0, step_s=0.04))
    assert list(iter_windows(opened(video=frames(4.0), mouth=(0, 0, 0.5, 0.5)), window_s=2.0, step_s=0.04))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    write(tmp_path, {"a.wav": wav(noise(200.0))})
    clip = opened(tmp_path / "a.wav")
    tracemalloc.start()
    num_windows = sum(1 for _ in iter_windows(clip, window_s=20.0, step_s=0.04))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_windows >= 10
    assert peak < 8e6  # 200 s are 13 MB
