"""Decode recordings, videos and point clouds; sound and moving images through PyAV (extra `media`).

Every damaged, empty or oversized item is an `ItemError` whose message is the reason stored with its row.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Array, Floats
from embedcache.errors import DataError, ItemError
from embedcache.registry import require
from embedcache.sources.containers import announced_frames, check_container
from embedcache.sources.points import decode_points

__all__ = [
    "StreamInfo",
    "Video",
    "check_audio",
    "check_video",
    "decode_audio",
    "decode_points",
    "decode_video",
    "iter_audio",
    "iter_frames",
    "probe_media",
]

AUDIO_RATE_HZ = 16_000
MAX_AUDIO_S = 3_600
"""An hour is 230 MB of float32 samples."""
LOUDEST = 2.0
"""Samples beyond it are not on the scale of [-1, 1], which sound of lossy formats exceeds by less."""
MAX_VIDEO_PIXELS = 2**28
"""Frames × height × width: 768 MiB as RGB."""

_SEEKABLE = frozenset({"avi", "flac", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "wav"})
"""Formats that store exact times and durations; others are decoded from their beginning."""
_FLAC = "flac"
_SAME_S = 1e-6  # times that differ by less are equal: less than a sample
_PREROLL_S = 1.0  # decoded before an interval: codecs with memory need some of it
_LATE_S = 0.1  # an interval may end this much after its recording: labels are rounded
_CLOCK = re.compile(r"(\d+):(\d\d):(\d\d\.\d+)")
_MICROSECONDS = 1_000_000
_TRUNCATED = 0.05  # fraction of the announced duration that may be missing; containers round


@dataclass(frozen=True, kw_only=True)
class Video:
    """Decoded frames.

    Args:
        frames_THW3: (T, H, W, 3) uint8, RGB and upright.
        rate_hz: frames per second.
    """

    frames_THW3: Array
    rate_hz: float


def check_audio(samples: Any, name: str) -> Floats:
    """Return samples that are as `decode_audio` returns them; DataError if they are not."""
    if not isinstance(samples, np.ndarray) or samples.ndim != 1 or samples.dtype != np.float32 or not len(samples):
        is_array = isinstance(samples, np.ndarray)
        what = f"{samples.dtype} of shape {samples.shape}" if is_array else type(samples).__name__
        raise DataError(f"expected a path, or mono float32 samples at {AUDIO_RATE_HZ} Hz, got {what}")
    loudest = max(samples.max(), -samples.min())  # without a copy of what may be an hour; NaN if one sample is
    if not loudest <= LOUDEST:
        what = f"up to {loudest:g}; divide 16-bit ones by 32768" if loudest < np.inf else "NaN or infinity"
        raise DataError(f"{name}: expected samples in [-1, 1], got {what}")
    return samples


def check_video(video: Any) -> Video:
    """Return a video that is as `decode_video` returns it; DataError if it is not."""
    if not isinstance(video, Video):
        raise DataError(f"expected a path, or a Video of frames and their rate, got {type(video).__name__}")
    frames = video.frames_THW3
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise DataError(f"expected uint8 RGB frames of shape (T, H, W, 3), got {frames.dtype} of shape {frames.shape}")
    if not 0 < video.rate_hz < np.inf:
        raise DataError(f"expected a positive frame rate, got {video.rate_hz}")
    return video


def decode_audio(data: bytes, start_s: float | None = None, stop_s: float | None = None) -> Floats:
    """Decode a recording, or the sound of a video, to 16 kHz mono.

    Reads WAV, FLAC, MP3, Ogg, Opus, M4A and all else that FFmpeg does. Channels are averaged; values beyond [-1, 1] are
    clipped. Thread-safe. Memory: 64 KB per second, and up to an eighth more while it grows.

    Args:
        data: the whole file.
        start_s: start of an interval in seconds; None for the beginning.
        stop_s: end of the interval; None for the end.

    Returns:
        (n,) float32 in [-1, 1].

    Raises:
        ItemError: the file cannot be decoded, has no sound, is longer than `MAX_AUDIO_S`, holds NaN, or ends before the
            interval does.
    """
    with _open(data, "recording") as (container, num_frames):
        stream = _stream(container, "audio", start_s, stop_s)
        duration_s = _duration_s(container, stream) or 0.0
        if (start_s, stop_s) == (None, None) and duration_s > MAX_AUDIO_S:
            raise ItemError(f"too long: {duration_s:,.0f} s of sound, more than {MAX_AUDIO_S:,}; index intervals of it")
        sound = bytearray()  # grows in place, where joining parts needs each sample twice
        end_s, num_kept, is_finite = 0.0, 0, True
        for first, samples_n in _samples(container, stream, num_frames):
            kept = samples_n[_position(start_s, 0, first) : _position(stop_s, len(samples_n), first)]
            end_s, num_kept = (first + len(samples_n)) / AUDIO_RATE_HZ, num_kept + len(kept)
            sound += np.clip(kept, -1, 1).data
            is_finite &= bool(np.isfinite(kept).all())
            if num_kept > MAX_AUDIO_S * AUDIO_RATE_HZ:
                raise ItemError(f"too long: more than {MAX_AUDIO_S:,} s of sound; index intervals of it")
            if stop_s is not None and end_s > stop_s + _PREROLL_S:
                break
        _check_end(container, stream, end_s, start_s, stop_s)
    samples_n = np.frombuffer(sound, np.float32)
    if not len(samples_n):
        raise ItemError("no sound: the audio stream is empty")
    if not is_finite:
        raise ItemError("NaN or infinity in the sound")
    return samples_n


def decode_video(data: bytes, start_s: float | None = None, stop_s: float | None = None) -> Video:
    """Decode the frames of a video, upright; of an interval, those whose time is in it.

    Thread-safe. Memory: the frames, and up to an eighth more while they grow.

    Args:
        data: the whole file.
        start_s: start of an interval in seconds; None for the beginning.
        stop_s: end of the interval; None for the end.

    Raises:
        ItemError: the file cannot be decoded, has no frames, has more than `MAX_VIDEO_PIXELS` in them, or ends before
            the interval does.
    """
    with _open(data, "video") as (container, _):
        stream = _stream(container, "video", start_s, stop_s)
        rate_hz = _frame_rate(stream)
        frames, shapes = bytearray(), set[tuple[int, ...]]()  # grows in place, as sound does
        num_pixels, time_s = 0, 0.0
        first_s, last_s = start_s or 0.0, np.inf if stop_s is None else stop_s
        for time_s, frame in _frames(container, stream):
            if time_s >= last_s - _SAME_S:
                break
            if time_s < first_s - _SAME_S:
                continue
            num_pixels += frame.width * frame.height
            if num_pixels > MAX_VIDEO_PIXELS:
                raise ItemError(
                    f"too many pixels: more than {MAX_VIDEO_PIXELS:,} in frames of {frame.width} x {frame.height}; "
                    "index intervals of it, or make it smaller"
                )
            upright_HW3 = _upright(frame)
            frames += np.ascontiguousarray(upright_HW3).data
            shapes.add(upright_HW3.shape)
        else:  # every frame was read
            _check_end(container, stream, time_s + 1 / rate_hz, start_s, stop_s)
        if not frames:
            raise ItemError("no frames" if start_s is None and stop_s is None else "no frames in the interval")
        if len(shapes) > 1:
            raise ItemError("the frames change their size")
        return Video(frames_THW3=np.frombuffer(frames, np.uint8).reshape(-1, *shapes.pop()), rate_hz=rate_hz)


@dataclass(frozen=True, kw_only=True)
class StreamInfo:
    """Properties of the first stream of sound or frames in a file.

    Args:
        rate_hz: frames per second of a video; of sound, the rate that `iter_audio` resamples to.
        duration_s: duration in seconds; None where the format has no exact one.
    """

    rate_hz: float
    duration_s: float | None


def probe_media(path: Path) -> dict[str, StreamInfo]:
    """Return the streams of a file, `audio`, `video` or both, without decoding them.

    Raises:
        ItemError: the file cannot be opened.
    """
    with _open(path, "file") as (container, _):
        found = {}
        for kind in ("audio", "video"):
            if getattr(container.streams, kind):
                stream = _stream(container, kind, None, None)
                rate_hz = AUDIO_RATE_HZ if kind == "audio" else _frame_rate(stream)
                found[kind] = StreamInfo(rate_hz=rate_hz, duration_s=_duration_s(container, stream))
        return found


def iter_audio(path: Path) -> Iterator[Floats]:
    """Iterate over the sound of a file of any length: blocks of 16 kHz mono float32, as `decode_audio` decodes them.

    Memory: one packet. The file is read once, from its beginning to its end.

    Raises:
        ItemError: the file cannot be decoded, has no sound, holds NaN or samples above `LOUDEST`, or ends
            before its announced end.
    """
    with _open(path, "recording") as (container, num_frames):
        stream = _stream(container, "audio", None, None)
        num_samples = 0
        for first, samples_n in _samples(container, stream, num_frames):
            if not np.isfinite(samples_n).all():
                raise ItemError("NaN or infinity in the sound")
            if (loudest := max(samples_n.max(initial=0), -samples_n.min(initial=0))) > LOUDEST:
                raise ItemError(f"expected samples in [-1, 1], got up to {loudest:g}; scale the recording")
            num_samples = first + len(samples_n)
            yield np.clip(samples_n, -1, 1)
        if not num_samples:
            raise ItemError("no sound: the audio stream is empty")
        _check_end(container, stream, num_samples / AUDIO_RATE_HZ, None, None)


def iter_frames(path: Path) -> Iterator[Array]:
    """Iterate over the upright RGB frames of a video of any length, at the constant rate that `probe_media` returns.

    Of a video whose frames last differently long, as many phones record, each step has the frame that is shown in its
    middle; at a constant rate these are all frames. Memory: two frames.

    Yields:
        (H, W, 3) uint8 arrays of one shape.

    Raises:
        ItemError: the file cannot be decoded, has no frames, changes its size, or ends before its announced end.
    """
    with _open(path, "video") as (container, _):
        stream = _stream(container, "video", None, None)
        step_s = 1 / _frame_rate(stream)
        shown: Array | None = None
        time_s, middle_s = 0.0, step_s / 2
        for time_s, frame in _frames(container, stream):
            while shown is not None and middle_s < time_s - _SAME_S:
                yield shown
                middle_s += step_s
            before, shown = shown, _upright(frame)
            if before is not None and before.shape != shown.shape:
                raise ItemError("the frames change their size")
        if shown is None:
            raise ItemError("no frames")
        while middle_s < time_s + step_s - _SAME_S:
            yield shown
            middle_s += step_s
        _check_end(container, stream, time_s + step_s, None, None)


@contextmanager
def _open(data: bytes | Path, kind: str) -> Iterator[tuple[Any, int | None]]:
    """Open a file, in memory or on disk, with the number of frames that it announces, if it is an MP3 file.

    Whatever FFmpeg reports inside the block is the reason why the item fails.
    """
    av = require("av", extra="media")
    with io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as file:
        check_container(file)
        num_frames = announced_frames(file)
        file.seek(0)
        try:
            with av.open(file, **_open_options(av.__version__)) as container:
                yield container, num_frames if container.format.name == "mp3" else None
        except (av.FFmpegError, ValueError, OverflowError, MemoryError) as error:
            if isinstance(error, ItemError):
                raise
            text = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
            raise ItemError(f"damaged {kind}: {text}") from None


def _open_options(version: str) -> dict[str, str]:
    """Return the options with which a version of PyAV reads titles that are not UTF-8, as it does from 19 on."""
    return {"metadata_errors": "replace"} if int(version.partition(".")[0]) < 19 else {}


def _samples(container: Any, stream: Any, num_frames: int | None) -> Iterator[tuple[int, Floats]]:
    """Iterate over the mono samples of a stream with the number of the first, counted from the stream's start."""
    resampler = require("av", extra="media").AudioResampler(format="fltp", rate=AUDIO_RATE_HZ)
    number = -1
    for time_s, frame in _frames(container, stream, num_frames):
        number = round(time_s * AUDIO_RATE_HZ) if number < 0 else number
        for resampled in resampler.resample(frame):
            yield number, resampled.to_ndarray().mean(axis=0)  # FFmpeg's own downmix of stereo is louder by sqrt(2)
            number += resampled.samples
    if number >= 0:
        for resampled in resampler.resample(None):
            yield number, resampled.to_ndarray().mean(axis=0)
            number += resampled.samples


def _position(time_s: float | None, otherwise: int, first: int) -> int:
    """Return where a time lies in samples that begin with number `first`."""
    return otherwise if time_s is None else max(0, round(time_s * AUDIO_RATE_HZ) - first)


def _frame_rate(stream: Any) -> float:
    rate_hz = float(stream.average_rate or stream.guessed_rate or 0)
    if rate_hz <= 0:
        raise ItemError("the video has no frame rate")
    return rate_hz


def _upright(frame: Any) -> Array:
    frame_HW3 = frame.to_ndarray(format="rgb24", threads=1)  # else it starts threads per frame
    return np.rot90(frame_HW3, round(frame.rotation / 90))


def _stream(container: Any, kind: str, start_s: float | None, stop_s: float | None) -> Any:
    """Return the first stream of a kind, ready to decode from shortly before a time on one thread."""
    streams = getattr(container.streams, kind)
    if not streams:
        what = "sound" if kind == "audio" else "frames"
        raise ItemError(f"no {what}: the file has no {kind} stream")
    stream = streams[0]
    if stream.codec_context is None:
        raise ItemError(f"no decoder for the {kind} stream")
    stream.codec_context.thread_count = 1  # items are decoded on many threads already
    if container.format.name == _FLAC:
        stream.codec_context.options = {"err_detect": "crccheck+explode"}  # else frames of noise, or fewer of them
    duration_s = _duration_s(container, stream)
    if duration_s is not None:
        _check_interval(duration_s, start_s, stop_s)
    if kind == "video" and stream.codec_context.width * stream.codec_context.height > MAX_VIDEO_PIXELS:
        raise ItemError(f"too many pixels: {stream.codec_context.width} x {stream.codec_context.height} in one frame")
    if start_s is not None and start_s > _PREROLL_S and container.format.name in _SEEKABLE:
        offset = (stream.start_time or 0) + int((start_s - _PREROLL_S) / stream.time_base)
        container.seek(offset, stream=stream, backward=True)
    return stream


def _frames(container: Any, stream: Any, num_announced: int | None = None) -> Iterator[tuple[float, Any]]:
    """Iterate over the frames of a stream with their times in seconds from its start.

    Raises:
        ItemError: frames of FLAC are missing, or more than one of the frames that an MP3 file announces: programs
            differ in whether they count the frame that announces them.
    """
    is_exact = container.format.name == _FLAC and stream.type == "audio"
    start = stream.start_time or 0
    next_s, num_packets = None, 0
    for packet in container.demux(stream):
        num_packets += packet.size > 0
        for frame in packet.decode():
            time_s = float((frame.pts - start) * frame.time_base) if frame.pts is not None else (next_s or 0.0)
            if is_exact and next_s is not None and abs(time_s - next_s) > _SAME_S:
                raise ItemError(f"damaged recording: its sound is missing from {next_s:.2f} s to {time_s:.2f} s")
            samples = getattr(frame, "samples", None)
            next_s = time_s + (samples / frame.sample_rate if samples else 1 / float(stream.average_rate or 25))
            yield time_s, frame
    if num_announced is not None and num_packets < num_announced - 1:
        raise ItemError(f"truncated: {num_packets:,} frames of sound of {num_announced:,}")
    announced_s = _duration_s(container, stream) if is_exact else None
    if announced_s is not None and next_s is not None and abs(announced_s - next_s) > _SAME_S:
        raise ItemError(f"truncated or damaged: {next_s:.2f} s could be decoded of {announced_s:.2f} s")


def _duration_s(container: Any, stream: Any) -> float | None:
    """Return the announced duration of a stream, of formats in which it is exact; else None."""
    if container.format.name not in _SEEKABLE:
        return None
    if stream.duration:
        return float(stream.duration * stream.time_base)
    tag = _CLOCK.fullmatch(stream.metadata.get("DURATION", ""))  # of a stream in Matroska, if it was recorded
    if tag:
        return 3600 * int(tag[1]) + 60 * int(tag[2]) + float(tag[3])
    is_alone = len(container.streams) == 1  # the container announces that of its longest stream
    return container.duration / _MICROSECONDS if container.duration and is_alone else None


def _check_end(container: Any, stream: Any, end_s: float, start_s: float | None, stop_s: float | None) -> None:
    """Check that a stream that was decoded up to a time is complete, and reaches beyond the interval."""
    announced_s = _duration_s(container, stream)
    wanted_s = stop_s if announced_s is None or stop_s is None else min(announced_s, stop_s)
    if announced_s is not None and end_s < (1 - _TRUNCATED) * (announced_s if wanted_s is None else wanted_s) - _LATE_S:
        raise ItemError(f"truncated: {end_s:.1f} s could be decoded of {announced_s:.1f} s")
    _check_interval(end_s, start_s, stop_s)


def _check_interval(end_s: float, start_s: float | None, stop_s: float | None) -> None:
    if (start_s is not None and start_s >= end_s) or (stop_s is not None and stop_s > end_s + _LATE_S):
        bounds = f"{start_s or 0:g} s to {'the end' if stop_s is None else f'{stop_s:g} s'}"
        raise ItemError(f"no such interval: expected {bounds} within its {end_s:.2f} s")
