"""Open recordings and videos with PyAV (extra `media`), and iterate over what their streams hold.

Every damaged, empty or oversized item is an `ItemError` whose message is the reason stored with its row: the decoder
failed, or gave less than the container announces.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from embedcache.errors import ItemError
from embedcache.processes import check_cancelled
from embedcache.registry import require

AUDIO_RATE_HZ = 16_000
"""Rate of all decoded sound."""

MAX_FRAME_PIXELS = 89_478_485
"""Largest frame of a video, as of an image: 256 MiB as RGB."""

SAME_S = 1e-6
"""Times that differ by less are equal: less than a sample."""

PREROLL_S = 1.0
"""Decoded before an interval: codecs with memory need some of it."""

_SEEKABLE = frozenset({"aiff", "avi", "flac", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "wav"})
"""Formats that store exact times and durations; others are decoded from their beginning."""

_FLAC = "flac"

_NO_OTHER_FILES = {"protocol_whitelist": "none"}
"""Playlists, which are files too, would name others to read."""

_LATE_S = 0.1  # an interval may end this much after its recording: labels are rounded
_CLOCK = re.compile(r"(\d+):(\d\d):(\d\d\.\d+)")
_MICROSECONDS = 1_000_000
_UNKNOWN_SIZE = 2**31 - 2**16
_TRUNCATED = 0.05  # fraction of the announced duration that may be missing; containers round


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
    with open_container(file, "file") as container:
        found = {}
        for kind in ("audio", "video"):
            if getattr(container.streams, kind):
                stream = open_stream(container, kind, None, None)
                rate_hz = AUDIO_RATE_HZ if kind == "audio" else frame_rate(stream)
                found[kind] = StreamInfo(rate_hz=rate_hz, duration_s=stream_duration(container, stream))
        return found


@contextmanager
def open_container(data: bytes | Path, kind: str) -> Iterator[Any]:
    """Open a file, in memory or on disk; what FFmpeg reports inside the block is the reason why the item fails."""
    av = require("av", extra="media")
    with io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as file:
        _check_size(file)
        options = _open_options(av.__version__)
        with item_errors(kind), av.open(file, options=_NO_OTHER_FILES, **options) as container:
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
def item_errors(kind: str) -> Iterator[None]:
    """Raise what FFmpeg reports inside the block as an `ItemError`."""
    av = require("av", extra="media")
    try:
        yield
    except (av.FFmpegError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, ItemError):
            raise
        text = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise ItemError(f"damaged {kind}: {text}") from None


def _open_options(version: str) -> dict[str, str]:
    """Return the options with which a version of PyAV reads titles that are not UTF-8, as it does from 19 on."""
    return {"metadata_errors": "replace"} if int(version.partition(".")[0]) < 19 else {}


def open_stream(container: Any, kind: str, start_s: float | None, stop_s: float | None) -> Any:
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
    if container.format.name == _FLAC:
        stream.codec_context.options = {"err_detect": "crccheck+explode"}  # else frames of noise, or fewer of them
    duration_s = stream_duration(container, stream)
    if duration_s is not None:
        _check_interval(duration_s, start_s, stop_s)
    if kind == "video":
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_FRAME_PIXELS:
            raise ItemError(f"too many pixels: {width} x {height} in one frame, more than {MAX_FRAME_PIXELS:,}")
        stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
    if start_s is not None and start_s > PREROLL_S and container.format.name in _SEEKABLE:
        offset = (stream.start_time or 0) + int((start_s - PREROLL_S) / stream.time_base)
        container.seek(offset, stream=stream, backward=True)
    return stream


def stream_frames(container: Any, stream: Any) -> Iterator[tuple[float, Any]]:
    """Iterate over the frames of a stream with their times in seconds from its start.

    Raises:
        CancelledError: the result is no longer needed, see `check_cancelled`: an hour of video takes minutes.
    """
    start, next_s = stream.start_time or 0, 0.0
    for packet in container.demux(stream):
        check_cancelled()
        for frame in packet.decode():
            time_s = float((frame.pts - start) * frame.time_base) if frame.pts is not None else next_s
            samples = getattr(frame, "samples", None)
            next_s = time_s + (samples / frame.sample_rate if samples else 1 / float(stream.average_rate or 25))
            yield time_s, frame


def frame_rate(stream: Any) -> float:
    """Return the frames per second of a video, on average; ItemError if the file has none."""
    rate_hz = float(stream.average_rate or stream.guessed_rate or 0)
    if rate_hz <= 0:
        raise ItemError("the video has no frame rate")
    return rate_hz


def stream_duration(container: Any, stream: Any) -> float | None:
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


def check_end(container: Any, stream: Any, end_s: float, start_s: float | None, stop_s: float | None) -> None:
    """Check that a stream that was decoded up to a time is complete, and reaches beyond the interval."""
    announced_s = stream_duration(container, stream)
    wanted_s = stop_s if announced_s is None or stop_s is None else min(announced_s, stop_s)
    if announced_s is not None and end_s < (1 - _TRUNCATED) * (announced_s if wanted_s is None else wanted_s) - _LATE_S:
        raise ItemError(f"truncated: {end_s:.1f} s could be decoded of {announced_s:.1f} s")
    _check_interval(end_s, start_s, stop_s)


def _check_interval(end_s: float, start_s: float | None, stop_s: float | None) -> None:
    if (start_s is not None and start_s >= end_s) or (stop_s is not None and stop_s > end_s + _LATE_S):
        bounds = f"{start_s or 0:g} s to {'the end' if stop_s is None else f'{stop_s:g} s'}"
        raise ItemError(f"no such interval: expected {bounds} within its {end_s:.2f} s")
