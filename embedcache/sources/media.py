"""Open recordings and videos with PyAV (extra `media`), and iterate over what their streams hold.

Every damaged, empty or oversized item is an `ItemError` whose message is the reason stored with its row. Containers are
checked for what FFmpeg passes over, without decoding: sizes in headers, checksums of pages, counts of frames. A size
that the program did not know when it began to write, as of sound that it sends through a pipe, announces nothing.
"""

import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from embedcache.errors import ItemError
from embedcache.processes import check_cancelled
from embedcache.registry import require

AUDIO_RATE_HZ = 16_000
"""Rate of all decoded sound."""

MAX_VIDEO_PIXELS = 2**28
"""Frames × height × width: 768 MiB as RGB."""

SAME_S = 1e-6
"""Times that differ by less are equal: less than a sample."""

PREROLL_S = 1.0
"""Decoded before an interval: codecs with memory need some of it."""

_SEEKABLE = frozenset({"avi", "flac", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "wav"})
"""Formats that store exact times and durations; others are decoded from their beginning."""

_FLAC = "flac"

_NO_OTHER_FILES = {"protocol_whitelist": "none"}
"""Playlists, which are files too, would name others to read."""

_LATE_S = 0.1  # an interval may end this much after its recording: labels are rounded
_CLOCK = re.compile(r"(\d+):(\d\d):(\d\d\.\d+)")
_MICROSECONDS = 1_000_000
_TRUNCATED = 0.05  # fraction of the announced duration that may be missing; containers round

_UNKNOWN = ((0, 0), (2**31 - 2**16, 2**31 + 2**16), (2**32 - 2**16, 2**32 - 1))
"""Ranges of sizes that mean "unknown": written by FFmpeg and others into pipes; in the middle by sox and arecord."""

_ROUNDED = 0.05  # fraction of a RIFF file that may be missing: some programs count more than they write
_HEAD = 12  # bytes before the first chunk: kind, size, form
_PAGE = 27  # bytes of an Ogg page before its table of segments
_FIRST_PAGE, _LAST_PAGE = 2, 4  # flags of the pages of a stream
_REVERSED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))  # byte -> its bits in reverse
_ID3 = 10  # bytes of the header, or the footer, of an ID3v2 tag
_XING_PLACES = (13, 21, 36)  # in a frame, after its header and the side information of one or two channels
_VBRI_PLACE = 36


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
    with open_container(file, "file") as (container, _):
        found = {}
        for kind in ("audio", "video"):
            if getattr(container.streams, kind):
                stream = open_stream(container, kind, None, None)
                rate_hz = AUDIO_RATE_HZ if kind == "audio" else frame_rate(stream)
                found[kind] = StreamInfo(rate_hz=rate_hz, duration_s=stream_duration(container, stream))
        return found


@contextmanager
def open_container(data: bytes | Path, kind: str) -> Iterator[tuple[Any, int | None]]:
    """Open a file, in memory or on disk, with the number of frames that it announces, if it is an MP3 file.

    Whatever FFmpeg reports inside the block is the reason why the item fails.
    """
    av = require("av", extra="media")
    with io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as file:
        check_container(file)
        num_frames = announced_frames(file)
        file.seek(0)
        options = _open_options(av.__version__)
        with item_errors(kind), av.open(file, options=_NO_OTHER_FILES, **options) as container:
            yield container, num_frames if container.format.name == "mp3" else None


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


def open_stream(
    container: Any,
    kind: str,
    start_s: float | None,
    stop_s: float | None,
    *,
    max_pixels: int = MAX_VIDEO_PIXELS,
) -> Any:
    """Return the first stream of a kind, ready to decode from shortly before a time on one thread.

    Frames of more than `max_pixels` are not decoded, whatever size the file announces: it fails.
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
        if width * height > max_pixels:
            raise ItemError(f"too many pixels: {width} x {height} in one frame, more than {max_pixels:,}")
        stream.codec_context.options = {"max_pixels": str(max_pixels)}
    if start_s is not None and start_s > PREROLL_S and container.format.name in _SEEKABLE:
        offset = (stream.start_time or 0) + int((start_s - PREROLL_S) / stream.time_base)
        container.seek(offset, stream=stream, backward=True)
    return stream


def stream_frames(container: Any, stream: Any, num_announced: int | None = None) -> Iterator[tuple[float, Any]]:
    """Iterate over the frames of a stream with their times in seconds from its start.

    Raises:
        CancelledError: the result is no longer needed, see `check_cancelled`: an hour of video takes minutes.
        ItemError: frames of FLAC are missing, or more than one of the frames that an MP3 file announces: programs
            differ in whether they count the frame that announces them.
    """
    is_exact = container.format.name == _FLAC and stream.type == "audio"
    start = stream.start_time or 0
    next_s, num_packets = None, 0
    for packet in container.demux(stream):
        check_cancelled()
        num_packets += packet.size > 0
        for frame in packet.decode():
            time_s = float((frame.pts - start) * frame.time_base) if frame.pts is not None else (next_s or 0.0)
            if is_exact and next_s is not None and abs(time_s - next_s) > SAME_S:
                raise ItemError(f"damaged recording: its sound is missing from {next_s:.2f} s to {time_s:.2f} s")
            samples = getattr(frame, "samples", None)
            next_s = time_s + (samples / frame.sample_rate if samples else 1 / float(stream.average_rate or 25))
            yield time_s, frame
    if num_announced is not None and num_packets < num_announced - 1:
        raise ItemError(f"truncated: {num_packets:,} frames of sound of {num_announced:,}")
    announced_s = stream_duration(container, stream) if is_exact else None
    if announced_s is not None and next_s is not None and abs(announced_s - next_s) > SAME_S:
        raise ItemError(f"truncated or damaged: {next_s:.2f} s could be decoded of {announced_s:.2f} s")


def frame_rate(stream: Any) -> float:
    """Return the frames per second of a video, on average; ItemError if the file has none."""
    rate_hz = float(stream.average_rate or stream.guessed_rate or 0)
    if rate_hz <= 0:
        raise ItemError("the video has no frame rate")
    return rate_hz


def has_constant_frame_rate(file: bytes | Path) -> bool:
    """Return whether a video has a constant frame rate, or nearly so, by the times in its file; nothing is decoded.

    It is its average rate: a file may announce another one.
    """
    try:
        with open_container(file, "video") as (container, _):
            stream = container.streams.video[0]
            announced = 1 / (frame_rate(stream) * stream.time_base)
            times = [packet.pts for packet in container.demux(stream) if packet.size]
    except ItemError:  # its reason is that of decoding
        return True
    if len(times) < 3 or None in times:
        return True
    steps = np.diff(np.sort(np.array(times, np.int64)))
    step = np.median(steps)
    is_announced = abs(steps.sum() - len(steps) * announced) <= announced
    return bool(is_announced and (np.abs(steps - step) <= step / 2).all())


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


def check_container(file: BinaryIO) -> None:
    """Check that a WAV, AVI, AIFF or Ogg file is whole, and the pages of Ogg intact; all other files pass.

    Reads the headers of WAV, AVI and AIFF, and all of an Ogg file.

    Args:
        file: the file; it is left at another position.

    Raises:
        ItemError: the file is empty, ends before its announced end, or has a damaged page.
    """
    size = file.seek(0, io.SEEK_END)
    if not size:
        raise ItemError("empty file")
    file.seek(0)
    head = file.read(_HEAD)
    if head[:4] in (b"RIFF", b"RF64"):
        announced = int.from_bytes(head[4:8], "little")
        if not _is_unknown(announced) and size < (1 - _ROUNDED) * (announced + 8):
            raise _truncated(size, announced + 8)
        if head[8:] == b"WAVE":
            _check_sound_chunk(file, size, b"data", "little")
    elif head[:4] == b"FORM" and head[8:] in (b"AIFF", b"AIFC"):
        _check_sound_chunk(file, size, b"SSND", "big")
    elif head[:4] == b"OggS":
        _check_pages(file, size)


def _is_unknown(size: int) -> bool:
    return any(low <= size <= high for low, high in _UNKNOWN)


def _truncated(size: int, announced: int) -> ItemError:
    return ItemError(f"truncated: {size:,} bytes of {announced:,}")


def _check_sound_chunk(file: BinaryIO, size: int, name: bytes, order: Literal["little", "big"]) -> None:
    """Check that a file reaches to the end of the chunk of its samples, after which there may be others."""
    start, size_64 = _HEAD, 0
    while len(chunk := _read_at(file, start, 8)) == 8:
        num_bytes = int.from_bytes(chunk[4:], order)
        if chunk[:4] == b"ds64":  # of RF64, for WAV files above 4 GiB: size of the file, size of the samples
            size_64 = int.from_bytes(_read_at(file, start + 16, 8), "little")
        elif chunk[:4] == name:
            num_bytes = size_64 if num_bytes == 2**32 - 1 else num_bytes
            if not _is_unknown(num_bytes) and size < start + 8 + num_bytes:
                raise _truncated(size, start + 8 + num_bytes)
            return
        start += 8 + num_bytes + num_bytes % 2


def _read_at(file: BinaryIO, start: int, num_bytes: int) -> bytes:
    file.seek(start)
    return file.read(num_bytes)


def _check_pages(file: BinaryIO, size: int) -> None:
    """Compare each page of an Ogg file with its checksum; bytes behind the last page, such as tags, pass.

    The last page need not be marked as such: many programs leave that out, and a recorded live stream has no end.
    """
    open_streams: set[bytes] = set()
    start = 0
    for head, body in _pages(file):
        if head[:4] != b"OggS":
            break
        page = head[:22] + bytes(4) + head[26:] + body
        if len(head) < _PAGE or len(body) < _body_size(head):
            raise ItemError(f"truncated: the last page of Ogg, from byte {start:,} on, is cut")
        if head[22:26] != _ogg_checksum(page):
            raise ItemError(f"damaged: the page of Ogg at byte {start:,} has a wrong checksum")
        stream, flags = head[14:18], head[5]
        open_streams |= {stream} if flags & _FIRST_PAGE else set()
        open_streams -= {stream} if flags & _LAST_PAGE else set()
        start += len(page)
    if start < size and open_streams:
        raise ItemError(f"damaged: expected a page of Ogg at byte {start:,}, got other bytes")


def _pages(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Iterate over the header and the content of each page, as long as the file looks like one."""
    file.seek(0)
    while head := file.read(_PAGE):
        head += file.read(head[-1]) if len(head) == _PAGE else b""
        yield head, file.read(_body_size(head))


def _body_size(head: bytes) -> int:
    return sum(head[_PAGE:])


def _ogg_checksum(page: bytes) -> bytes:
    """Return the checksum of a page whose own is zero: CRC-32 as zlib computes it, but of bits in reverse, from 0."""
    reverse = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return reverse.to_bytes(4, "big").translate(_REVERSED)


def announced_frames(file: BinaryIO) -> int | None:
    """Return the number of frames that the first frame of an MP3 file announces (Xing, Info, VBRI); None without it."""
    start = 0
    while (head := _read_at(file, start, _ID3))[:3] == b"ID3" and len(head) == _ID3:
        start += _ID3 + sum((value & 127) << shift for value, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        start += _ID3 if head[5] & 16 else 0
    frame = _read_at(file, start, 64)
    if frame[:1] != b"\xff":
        return None
    if frame[_VBRI_PLACE:].startswith(b"VBRI"):
        return int.from_bytes(frame[_VBRI_PLACE + 14 : _VBRI_PLACE + 18], "big") or None
    for place in _XING_PLACES:
        if frame[place : place + 4] in (b"Xing", b"Info") and frame[place + 7] & 1:
            return int.from_bytes(frame[place + 8 : place + 12], "big") or None
    return None
