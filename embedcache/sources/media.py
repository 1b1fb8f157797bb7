"""Decode recordings and videos with PyAV (extra `media`), and iterate over what their streams hold.

Every damaged, empty or oversized item is an `ItemError` whose message is the reason stored with its row: the decoder
failed, or gave less than the container announces.
"""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from embedcache.arrays import Array, Floats
from embedcache.errors import DataError, ItemError
from embedcache.processes import check_cancelled
from embedcache.registry import require

AUDIO_RATE_HZ = 16_000
"""Rate of all decoded sound."""

MAX_FRAME_PIXELS = 89_478_485
"""Largest frame of a video, as of an image: 256 MiB as RGB."""

_SAME_S = 1e-6
"""Times that differ by less are equal: less than a sample."""

_PREROLL_S = 1.0
"""Decoded before an interval: codecs with memory need some of it."""

_SEEKABLE = frozenset({"aiff", "avi", "flac", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "wav"})
"""Formats that store exact times and durations; others are decoded from their beginning."""

_NO_OTHER_FILES = {"protocol_whitelist": "none"}
"""Playlists, which are files too, would name others to read."""

_LATE_S = 0.1  # an interval may end this much after its recording: labels are rounded
_CLOCK = re.compile(r"(\d+):(\d\d):(\d\d\.\d+)")
_MICROSECONDS = 1_000_000
_UNKNOWN_SIZE = 2**31 - 2**16
_TRUNCATED = 0.05  # fraction of the announced duration that may be missing; containers round

MAX_AUDIO_S = 3_600
"""An hour is 230 MB of float32 samples."""
LOUDEST = 2.0
"""Samples beyond it are not on the scale of [-1, 1], which sound of lossy formats exceeds by less."""

MAX_VIDEO_PIXELS = 2**28
"""Frames × height × width that are decoded into one array: 768 MiB as RGB."""

Frame: TypeAlias = Callable[[], Array]
"""One frame, converted to (H, W, 3) uint8, RGB and upright, by each call: many frames are only counted."""


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
    sound = bytearray()  # grows in place, where joining parts needs each sample twice
    for samples_n in iter_audio(data, start_s, stop_s):
        sound += samples_n.data
        if len(sound) > 4 * MAX_AUDIO_S * AUDIO_RATE_HZ:
            raise ItemError(f"too long: more than {MAX_AUDIO_S:,} s of sound; index intervals of it")
    return np.frombuffer(sound, np.float32)


def iter_audio(file: bytes | Path, start_s: float | None = None, stop_s: float | None = None) -> Iterator[Floats]:
    """Iterate over the sound of a file of any length in blocks of what `decode_audio` returns. Memory: one packet.

    Raises:
        ItemError: the file cannot be decoded, has no sound, holds NaN, or ends before its announced end or the
            interval's.
    """
    end_s = 0.0
    num_samples = 0
    with _open_container(file, "recording") as container:
        stream = _open_stream(container, "audio", start_s, stop_s)
        for first, samples_n in _samples(container, stream):
            inside_n = samples_n[_position(start_s, 0, first) : _position(stop_s, len(samples_n), first)]
            if not np.isfinite(inside_n).all():
                raise ItemError("NaN or infinity in the sound")
            yield np.clip(inside_n, -1, 1)
            num_samples += len(inside_n)
            end_s = (first + len(samples_n)) / AUDIO_RATE_HZ
            if stop_s is not None and end_s > stop_s + _PREROLL_S:
                break
        _check_end(container, stream, end_s, start_s, stop_s)
    if not num_samples:
        raise ItemError("no sound: the audio stream is empty")


def check_audio(samples: Any, name: str) -> Floats:
    """Return samples that are as `decode_audio` returns them; DataError, with the name, if they are not."""
    if not isinstance(samples, np.ndarray) or samples.ndim != 1 or samples.dtype != np.float32 or not len(samples):
        is_array = isinstance(samples, np.ndarray)
        what = f"{samples.dtype} of shape {samples.shape}" if is_array else type(samples).__name__
        raise DataError(f"{name}: expected a path, or mono float32 samples at {AUDIO_RATE_HZ} Hz, got {what}")
    loudest = max(samples.max(), -samples.min())  # without a copy of what may be an hour; NaN if one sample is
    if not loudest <= LOUDEST:
        what = f"up to {loudest:g}; divide 16-bit ones by 32768" if loudest < np.inf else "NaN or infinity"
        raise DataError(f"{name}: expected samples in [-1, 1], got {what}")
    return samples


def _samples(container: Any, stream: Any) -> Iterator[tuple[int, Floats]]:
    """Iterate over the mono samples of a stream with the number of the first, counted from the stream's start.

    At another rate than 16 kHz, those of an interval may lie up to half a sample beside those of the whole.
    """
    resampler = require("av", extra="media").AudioResampler(format="fltp", rate=AUDIO_RATE_HZ)
    number = None
    for time_s, frame in chain(_stream_frames(container, stream), [(0.0, None)]):  # the last one flushes the resampler
        if number is None:
            number = round(time_s * AUDIO_RATE_HZ)
        for resampled in resampler.resample(frame):
            yield number, resampled.to_ndarray().mean(axis=0)  # FFmpeg's own downmix of stereo is louder by sqrt(2)
            number += resampled.samples


def _position(time_s: float | None, otherwise: int, first: int) -> int:
    """Return where a time lies in samples that begin with number `first`."""
    return otherwise if time_s is None else max(0, round(time_s * AUDIO_RATE_HZ) - first)


class Video:
    """Frames at a constant rate, which are in memory or are decoded whenever they are read.

    Memory of decoded frames: the bytes of the file; two frames while they are read by `frames`.

    Args:
        frames_THW3: (T, H, W, 3) uint8, RGB and upright; None if the frames are decoded.
        rate_hz: frames per second, on average.
        duration_s: length in seconds as a file announces it; None if it announces no exact one.
        decode: iterates over the frames, each time from the first one.

    Raises:
        DataError: the frames are not such an array, or their rate is not positive.

    Example:
        >>> Video(frames_THW3=np.zeros((50, 48, 64, 3), np.uint8), rate_hz=25).duration_s
        2.0
    """

    def __init__(
        self,
        *,
        rate_hz: float,
        frames_THW3: Array | None = None,
        duration_s: float | None = None,
        decode: Callable[[], Iterator[Frame]] | None = None,
    ) -> None:
        if not 0 < rate_hz < np.inf:
            raise DataError(f"video: expected a positive frame rate, got {rate_hz}")
        if frames_THW3 is not None:
            is_rgb = frames_THW3.ndim == 4 and frames_THW3.shape[-1] == 3 and frames_THW3.dtype == np.uint8
            if not is_rgb or not frames_THW3.size:
                given = f"{frames_THW3.dtype} of shape {frames_THW3.shape}"
                raise DataError(f"video: expected uint8 RGB frames of shape (T, H, W, 3), got {given}")
            self.frames_THW3 = frames_THW3
            duration_s = len(frames_THW3) / rate_hz
        self.rate_hz = rate_hz
        self.duration_s = duration_s
        self._decode = decode

    @cached_property
    def frames_THW3(self) -> Array:
        """All frames: (T, H, W, 3) uint8; `ItemError` if they have more than `MAX_VIDEO_PIXELS`, or are damaged."""
        decoded = bytearray()  # grows in place, where joining frames needs each of them twice
        shape_HW3 = (0, 0, 3)
        for frame in self.frames():
            frame_HW3 = frame()
            decoded += np.ascontiguousarray(frame_HW3).data
            shape_HW3 = frame_HW3.shape
            if len(decoded) > 3 * MAX_VIDEO_PIXELS:
                height, width, _ = shape_HW3
                size = f"frames of {width} x {height}"
                raise ItemError(f"too many pixels: more than {MAX_VIDEO_PIXELS:,} in {size}; index intervals of it")
        return np.frombuffer(decoded, np.uint8).reshape(-1, *shape_HW3)

    def frames(self) -> Iterator[Frame]:
        """Iterate over the frames, in order.

        Raises:
            ItemError: while they are read: the file is damaged, has no frames, changes their size, or ends before its
                announced end or that of the interval.
        """
        if self._decode is not None:
            return self._decode()
        return (partial(np.asarray, frame_HW3) for frame_HW3 in self.frames_THW3)


def decode_video(file: bytes | Path, start_s: float | None = None, stop_s: float | None = None) -> Video:
    """Open a video, whose frames are decoded when they are read; damage is found then.

    Each step at the average rate has the frame that is shown in its middle, so that the frames of videos with a
    variable frame rate, as those of many phones and recorded screens, have one rate. Thread-safe.

    Args:
        file: the whole file, or its path.
        start_s: start of an interval in seconds; None for the beginning.
        stop_s: end of the interval; None for the end.

    Raises:
        ItemError: the file cannot be opened, has no frames, has more than `MAX_FRAME_PIXELS` in one frame, or announces
            an end before that of the interval.
    """
    with _open_container(file, "video") as container:
        stream = _open_stream(container, "video", start_s, stop_s)
        rate_hz = _frame_rate(stream)
        ends_s = [end_s for end_s in (_stream_duration(container, stream), stop_s) if end_s is not None]
    return Video(
        rate_hz=rate_hz,
        duration_s=min(ends_s) - (start_s or 0.0) if ends_s else None,
        decode=partial(_decode, file, start_s, stop_s),
    )


def _decode(file: bytes | Path, start_s: float | None, stop_s: float | None) -> Iterator[Frame]:
    """Iterate over the frames of a video or of an interval; all of one size."""
    shape = None
    with _open_container(file, "video") as container:
        stream = _open_stream(container, "video", start_s, stop_s)
        for frame in _shown_frames(container, stream, start_s, stop_s):
            if shape not in (None, (frame.width, frame.height)):
                raise ItemError("the frames change their size")
            shape = frame.width, frame.height
            yield partial(_convert, frame)
    if shape is None:
        raise ItemError("no frames" if start_s is None and stop_s is None else "no frames in the interval")


def _shown_frames(container: Any, stream: Any, start_s: float | None, stop_s: float | None) -> Iterator[Any]:
    """Iterate over the frames that are shown in the middle of each step of an interval.

    If all frames are read, check that none is missing at the end.
    """
    step_s = 1 / _frame_rate(stream)
    middle_s = (start_s or 0.0) + step_s / 2
    end_s = np.inf if stop_s is None else stop_s
    shown = None
    shown_s = 0.0
    for time_s, frame in _stream_frames(container, stream):
        while shown is not None and middle_s < min(time_s, end_s) - _SAME_S:
            yield shown
            middle_s += step_s
        if time_s >= end_s - _SAME_S:
            return
        if shown is None and time_s > middle_s:  # nothing is shown before the first frame
            middle_s = time_s + step_s / 2
        shown = frame
        shown_s = time_s

    # The last frame is shown for one step.
    _check_end(container, stream, shown_s + step_s, start_s, stop_s)
    while shown is not None and middle_s < min(shown_s + step_s, end_s) - _SAME_S:
        yield shown
        middle_s += step_s


def _convert(frame: Any) -> Array:
    """Convert a decoded frame to RGB; rotated, as a phone records it, it is turned upright."""
    with _item_errors("video"):
        frame_HW3 = frame.to_ndarray(format="rgb24", threads=1)  # else it starts threads per frame
    return np.rot90(frame_HW3, round(frame.rotation / 90))


@dataclass(frozen=True, kw_only=True)
class StreamInfo:
    """Properties of the first stream of sound or frames in a file.

    Args:
        rate_hz: frames per second of a video; of sound, the rate that `iter_audio` resamples to.
        duration_s: duration in seconds; None where the format has no exact one.
    """

    rate_hz: float
    duration_s: float | None


def probe_media(file: bytes | Path) -> dict[str, StreamInfo]:
    """Return the streams of a file, `audio`, `video` or both, without decoding them.

    Raises:
        ItemError: the file cannot be opened.
    """
    with _open_container(file, "file") as container:
        found = {}
        for kind in ("audio", "video"):
            if getattr(container.streams, kind):
                stream = _open_stream(container, kind, None, None)
                rate_hz = AUDIO_RATE_HZ if kind == "audio" else _frame_rate(stream)
                found[kind] = StreamInfo(rate_hz=rate_hz, duration_s=_stream_duration(container, stream))
        return found


@contextmanager
def _open_container(data: bytes | Path, kind: str) -> Iterator[Any]:
    """Open a file, in memory or on disk; what FFmpeg reports inside the block is the reason why the item fails."""
    av = require("av", extra="media")
    with io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as file:
        _check_size(file)
        # From 19 on, PyAV reads titles that are not UTF-8 without the option, which it no longer has.
        options = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
        with _item_errors(kind), av.open(file, options=_NO_OTHER_FILES, **options) as container:
            yield container


def _check_size(file: BinaryIO) -> None:
    """Check that a file is not empty, and that one of WAV or AVI is as long as it announces: FFmpeg passes over that.

    Programs that write into a pipe announce nothing, or some size from nearly 2 GiB on.
    """
    size = file.seek(0, io.SEEK_END)
    if not size:
        raise ItemError("empty file")
    file.seek(0)
    head = file.read(8)
    announced = int.from_bytes(head[4:], "little") if head.startswith(b"RIFF") else 0
    if announced < _UNKNOWN_SIZE and size < (1 - _TRUNCATED) * announced:
        raise ItemError(f"truncated: {size:,} bytes of {announced + 8:,}")
    file.seek(0)


@contextmanager
def _item_errors(kind: str) -> Iterator[None]:
    """Raise what FFmpeg reports inside the block as an `ItemError`."""
    av = require("av", extra="media")
    try:
        yield
    except (av.FFmpegError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, ItemError):
            raise
        text = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise ItemError(f"damaged {kind}: {text}") from None


def _open_stream(container: Any, kind: str, start_s: float | None, stop_s: float | None) -> Any:
    """Return the first stream of a kind, ready to decode from shortly before a time on one thread.

    Frames of more than `MAX_FRAME_PIXELS` are not decoded, whatever size the file announces: it fails.
    """
    streams = getattr(container.streams, kind)
    if not streams:
        what = "sound" if kind == "audio" else "frames"
        raise ItemError(f"no {what}: the file has no {kind} stream")
    stream = streams[0]
    if stream.codec_context is None:
        raise ItemError(f"no decoder for the {kind} stream")
    stream.codec_context.thread_count = 1  # items are decoded on many threads already
    if container.format.name == "flac":
        stream.codec_context.options = {"err_detect": "crccheck+explode"}  # else frames of noise, or fewer of them
    duration_s = _stream_duration(container, stream)
    if duration_s is not None:
        _check_interval(duration_s, start_s, stop_s)
    if kind == "video":
        width = stream.codec_context.width
        height = stream.codec_context.height
        if width * height > MAX_FRAME_PIXELS:
            raise ItemError(f"too many pixels: {width} x {height} in one frame, more than {MAX_FRAME_PIXELS:,}")
        stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
    if start_s is not None and start_s > _PREROLL_S and container.format.name in _SEEKABLE:
        offset = (stream.start_time or 0) + int((start_s - _PREROLL_S) / stream.time_base)
        container.seek(offset, stream=stream, backward=True)
    return stream


def _stream_frames(container: Any, stream: Any) -> Iterator[tuple[float, Any]]:
    """Iterate over the frames of a stream with their times in seconds from its start.

    Raises:
        CancelledError: the result is no longer needed, see `check_cancelled`: an hour of video takes minutes.
    """
    start = stream.start_time or 0
    next_s = 0.0
    for packet in container.demux(stream):
        check_cancelled()
        for frame in packet.decode():
            time_s = float((frame.pts - start) * frame.time_base) if frame.pts is not None else next_s
            samples = getattr(frame, "samples", None)
            next_s = time_s + (samples / frame.sample_rate if samples else 1 / float(stream.average_rate or 25))
            yield time_s, frame


def _frame_rate(stream: Any) -> float:
    """Return the frames per second of a video, on average; ItemError if the file has none."""
    rate_hz = float(stream.average_rate or stream.guessed_rate or 0)
    if rate_hz <= 0:
        raise ItemError("the video has no frame rate")
    return rate_hz


def _stream_duration(container: Any, stream: Any) -> float | None:
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
    announced_s = _stream_duration(container, stream)
    wanted_s = stop_s if announced_s is None or stop_s is None else min(announced_s, stop_s)
    if announced_s is not None and end_s < (1 - _TRUNCATED) * (announced_s if wanted_s is None else wanted_s) - _LATE_S:
        raise ItemError(f"truncated: {end_s:.1f} s could be decoded of {announced_s:.1f} s")
    _check_interval(end_s, start_s, stop_s)


def _check_interval(end_s: float, start_s: float | None, stop_s: float | None) -> None:
    if (start_s is not None and start_s >= end_s) or (stop_s is not None and stop_s > end_s + _LATE_S):
        bounds = f"{start_s or 0:g} s to {'the end' if stop_s is None else f'{stop_s:g} s'}"
        raise ItemError(f"no such interval: expected {bounds} within its {end_s:.2f} s")
