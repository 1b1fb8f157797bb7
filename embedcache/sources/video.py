"""Decode videos through PyAV (extra `media`): all frames into memory, or one after the other.

Every damaged, empty or oversized item is an `ItemError` whose message is the reason stored with its row.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np

from embedcache.arrays import Array
from embedcache.errors import DataError, ItemError
from embedcache.sources.media import (
    MAX_VIDEO_PIXELS,
    SAME_S,
    check_end,
    frame_rate,
    has_constant_frame_rate,
    item_errors,
    open_container,
    open_stream,
    stream_duration,
    stream_frames,
)

Frame: TypeAlias = Callable[[], Array]
"""One frame, converted to (H, W, 3) uint8, RGB and upright, by each call: many frames are only counted."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Video:
    """Frames of a video in memory.

    Args:
        frames_THW3: (T, H, W, 3) uint8, RGB and upright.
        rate_hz: frames per second, on average.
    """

    frames_THW3: Array
    rate_hz: float
    is_streamed: ClassVar[bool] = False
    """Whether the frames are decoded whenever they are read, because all of them do not fit into memory."""

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return len(self.frames_THW3) / self.rate_hz

    def frames(self) -> Iterator[Frame]:
        """Iterate over the frames, in order."""
        return (partial(np.asarray, frame_HW3) for frame_HW3 in self.frames_THW3)


class StreamedVideo:
    """A video in a file, with all that a `Video` has; its frames are decoded whenever they are read.

    Memory: the bytes of the file; two frames while they are read by `frames`.

    Args:
        data: the whole file.
        start_s: start of an interval in seconds; None for the beginning.
        stop_s: end of the interval; None for the end.
        rate_hz: frames per second, on average.
        duration_s: length in seconds as the file announces it; None if it announces no exact one.
    """

    is_streamed: ClassVar[bool] = True

    def __init__(
        self, data: bytes, start_s: float | None, stop_s: float | None, *, rate_hz: float, duration_s: float | None
    ) -> None:
        self._data, self._interval = data, (start_s, stop_s)
        self.rate_hz, self.duration_s = rate_hz, duration_s

    @cached_property
    def frames_THW3(self) -> Array:
        """All frames: (T, H, W, 3) uint8; `ItemError` if they have more than `MAX_VIDEO_PIXELS`, or are damaged."""
        with open_container(self._data, "video") as container:
            stream = open_stream(container, "video", *self._interval)
            return _read_all(
                _interval_frames(container, stream, *self._interval, has_constant_rate=self._has_constant_rate)
            )

    @cached_property
    def _has_constant_rate(self) -> bool:
        return has_constant_frame_rate(self._data)

    def frames(self) -> Iterator[Frame]:
        """Iterate over the frames, in order.

        Raises:
            ItemError: while they are read: the file is damaged, has no frames, changes their size, or ends before its
                announced end or that of the interval.
        """
        with open_container(self._data, "video") as container:
            stream = open_stream(container, "video", *self._interval)
            for frame in _interval_frames(
                container, stream, *self._interval, has_constant_rate=self._has_constant_rate
            ):
                yield partial(_convert, frame)


def decode_video(data: bytes, start_s: float | None = None, stop_s: float | None = None) -> Video | StreamedVideo:
    """Decode the frames of a video, upright; of an interval, those whose time is in it.

    Of a video with a variable frame rate, as those of many phones and recorded screens, each step at the average rate
    has the frame that is shown in its middle.

    A video with more than `MAX_VIDEO_PIXELS` in its frames is a `StreamedVideo`, of which only those who ask for all
    frames at once are refused, and whose damage is found when its frames are read. Thread-safe. Memory: the frames, and
    up to an eighth more while they grow; of a streamed video the file.

    Args:
        data: the whole file.
        start_s: start of an interval in seconds; None for the beginning.
        stop_s: end of the interval; None for the end.

    Raises:
        ItemError: the file cannot be decoded, has no frames, has more than `MAX_VIDEO_PIXELS` in one frame, or ends
            before the interval does.
    """
    with open_container(data, "video") as container:
        stream = open_stream(container, "video", start_s, stop_s)
        rate_hz = frame_rate(stream)
        duration_s = announced_length(stream_duration(container, stream), start_s, stop_s)
        streamed = StreamedVideo(data, start_s, stop_s, rate_hz=rate_hz, duration_s=duration_s)
        frame_pixels = stream.codec_context.width * stream.codec_context.height
        if (duration_s or 0) * rate_hz * frame_pixels > MAX_VIDEO_PIXELS:
            return streamed
        try:
            has_constant_rate = has_constant_frame_rate(data)
            frames = _interval_frames(container, stream, start_s, stop_s, has_constant_rate=has_constant_rate)
            frames_THW3 = _read_all(frames)
        except _TooManyPixelsError:
            return streamed
        return Video(frames_THW3=frames_THW3, rate_hz=rate_hz)


def iter_frames(file: bytes | Path) -> Generator[Array, None, None]:
    """Iterate over the upright RGB frames of a video of any length: those that `decode_video` returns.

    Memory: two frames.

    Args:
        file: the whole file, or its path.

    Yields:
        (H, W, 3) uint8 arrays of one shape.

    Raises:
        ItemError: the file cannot be decoded, has no frames, changes their size, or ends before its announced end.
    """
    with open_container(file, "video") as container:
        stream = open_stream(container, "video", None, None)
        has_constant_rate = has_constant_frame_rate(file)
        for frame in _interval_frames(container, stream, None, None, has_constant_rate=has_constant_rate):
            yield _upright(frame)


def frame_at(data: bytes, time_s: float, *, max_pixels: int = MAX_VIDEO_PIXELS) -> Array:
    """Return the frame of a video that is shown at a time: (H, W, 3) uint8, RGB and upright.

    Formats that store exact times are not decoded from their beginning. Memory: two frames.

    Args:
        data: the whole file.
        time_s: seconds from the start of the video.
        max_pixels: largest size of a frame.

    Raises:
        ItemError: the file cannot be decoded, has no frames, has larger frames than `max_pixels`, or ends before the
            time.
    """
    with open_container(data, "video") as container:
        stream = open_stream(container, "video", time_s, None, max_pixels=max_pixels)
        shown = None
        for start_s, frame in _checked_frames(container, stream, time_s, None):
            if shown is not None and start_s > time_s + SAME_S:
                break
            shown = frame
        if shown is None:
            raise ItemError("no frames")
        return _upright(shown)


def check_video(video: Any, name: str) -> Video | StreamedVideo:
    """Return a video that is as `decode_video` returns it; DataError, with the name, if it is not."""
    if isinstance(video, StreamedVideo):  # of `decode_video` itself
        return video
    if not isinstance(video, Video):
        raise DataError(f"{name}: expected a path, or a Video of frames and their rate, got {type(video).__name__}")
    frames = video.frames_THW3
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        what = f"{frames.dtype} of shape {frames.shape}"
        raise DataError(f"{name}: expected uint8 RGB frames of shape (T, H, W, 3), got {what}")
    if not 0 < video.rate_hz < np.inf:
        raise DataError(f"{name}: expected a positive frame rate, got {video.rate_hz}")
    return video


def announced_length(announced_s: float | None, start_s: float | None, stop_s: float | None) -> float | None:
    """Return the length in seconds of an interval of a video, which may announce its own; None if it is not known."""
    ends_s = [end_s for end_s in (announced_s, stop_s) if end_s is not None]
    return min(ends_s) - (start_s or 0.0) if ends_s else None


class _TooManyPixelsError(ItemError):
    """All frames of a video do not fit into memory."""


def _read_all(frames: Iterator[Any]) -> Array:
    """Return upright RGB frames as one array: (T, H, W, 3) uint8."""
    decoded, num_pixels, shape_HW3 = bytearray(), 0, (0, 0, 3)  # grows in place, as sound does
    for frame in frames:
        num_pixels += frame.width * frame.height
        if num_pixels > MAX_VIDEO_PIXELS:
            raise _TooManyPixelsError(
                f"too many pixels: more than {MAX_VIDEO_PIXELS:,} in frames of {frame.width} x {frame.height}; "
                "index intervals of it, or make it smaller"
            )
        upright_HW3 = _upright(frame)
        decoded += np.ascontiguousarray(upright_HW3).data
        shape_HW3 = upright_HW3.shape
    return np.frombuffer(decoded, np.uint8).reshape(-1, *shape_HW3)


def _interval_frames(
    container: Any, stream: Any, start_s: float | None, stop_s: float | None, *, has_constant_rate: bool
) -> Iterator[Any]:
    """Iterate over the frames of an interval; after the last one, check that none is missing.

    At a constant frame rate these are the frames whose time is in the interval, else those of `_shown_frames`.
    """
    shapes = set[tuple[int, int]]()
    timed = _checked_frames(container, stream, start_s, stop_s)
    bounds = start_s or 0.0, np.inf if stop_s is None else stop_s
    shown = (
        _frames_inside(timed, *bounds) if has_constant_rate else _shown_frames(timed, *bounds, 1 / frame_rate(stream))
    )
    for frame in shown:
        is_turned = round(frame.rotation / 90) % 2
        shapes.add((frame.width, frame.height) if is_turned else (frame.height, frame.width))
        yield frame
    if not shapes:
        raise ItemError("no frames" if start_s is None and stop_s is None else "no frames in the interval")
    if len(shapes) > 1:
        raise ItemError("the frames change their size")


def _checked_frames(
    container: Any, stream: Any, start_s: float | None, stop_s: float | None
) -> Iterator[tuple[float, Any]]:
    """Iterate over the frames of a stream with their times; if all are read, check that none is missing at the end."""
    time_s = 0.0
    for time_s, frame in stream_frames(container, stream):
        yield time_s, frame
    check_end(container, stream, time_s + 1 / frame_rate(stream), start_s, stop_s)


def _frames_inside(timed: Iterator[tuple[float, Any]], start_s: float, stop_s: float) -> Iterator[Any]:
    """Iterate over the frames whose time is in an interval."""
    for time_s, frame in timed:
        if time_s >= stop_s - SAME_S:
            return
        if time_s >= start_s - SAME_S:
            yield frame


def _shown_frames(timed: Iterator[tuple[float, Any]], start_s: float, stop_s: float, step_s: float) -> Iterator[Any]:
    """Iterate over the frames that are shown in the middle of each step of an interval; the last one for one step."""
    shown, shown_s, middle_s = None, 0.0, start_s + step_s / 2
    for time_s, frame in timed:
        while shown is not None and middle_s < min(time_s, stop_s) - SAME_S:
            yield shown
            middle_s += step_s
        if time_s >= stop_s - SAME_S:
            return
        if shown is None and time_s > middle_s:  # nothing is shown before the first frame
            middle_s = time_s + step_s / 2
        shown, shown_s = frame, time_s
    while shown is not None and middle_s < min(shown_s + step_s, stop_s) - SAME_S:
        yield shown
        middle_s += step_s


def _convert(frame: Any) -> Array:
    """Return a frame as `_upright` does, where no container is open in the block."""
    with item_errors("video"):
        return _upright(frame)


def _upright(frame: Any) -> Array:
    frame_HW3 = frame.to_ndarray(format="rgb24", threads=1)  # else it starts threads per frame
    return np.rot90(frame_HW3, round(frame.rotation / 90))
