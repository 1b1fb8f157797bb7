"""Decode videos through PyAV (extra `media`), frame by frame.

Every damaged, empty or oversized item is an `ItemError` whose message is the reason stored with its row.
"""

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from embedcache.arrays import Array
from embedcache.errors import DataError, ItemError
from embedcache.sources.media import (
    SAME_S,
    check_end,
    frame_rate,
    item_errors,
    open_container,
    open_stream,
    stream_duration,
    stream_frames,
)

MAX_VIDEO_PIXELS = 2**28
"""Frames × height × width that are decoded into one array: 768 MiB as RGB."""

Frame: TypeAlias = Callable[[], Array]
"""One frame, converted to (H, W, 3) uint8, RGB and upright, by each call: many frames are only counted."""


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
            _check_frames(frames_THW3)
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
                raise ItemError(
                    f"too many pixels: more than {MAX_VIDEO_PIXELS:,} in frames of {width} x {height}; index "
                    "intervals of it, or make it smaller"
                )
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


def _check_frames(frames: Array) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise DataError(
            f"video: expected uint8 RGB frames of shape (T, H, W, 3), got {frames.dtype} of shape {frames.shape}"
        )


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
    with open_container(file, "video") as container:
        stream = open_stream(container, "video", start_s, stop_s)
        rate_hz = frame_rate(stream)
        ends_s = [end_s for end_s in (stream_duration(container, stream), stop_s) if end_s is not None]
    return Video(
        rate_hz=rate_hz,
        duration_s=min(ends_s) - (start_s or 0.0) if ends_s else None,
        decode=partial(_decode, file, start_s, stop_s),
    )


def frame_at(data: bytes, time_s: float) -> Array:
    """Return the frame of a video that is shown at a time: (H, W, 3) uint8, RGB and upright.

    Formats that store exact times are not decoded from their beginning. Memory: two frames.

    Raises:
        ItemError: the file cannot be decoded, or no frame is shown at the time.
    """
    half_step_s = 0.5 / decode_video(data).rate_hz
    for frame in _decode(data, max(0.0, time_s - half_step_s), None):
        return frame()
    raise ItemError("no frames")


def _decode(file: bytes | Path, start_s: float | None, stop_s: float | None) -> Iterator[Frame]:
    """Iterate over the frames of a video or of an interval; all of one size."""
    shape = None
    with open_container(file, "video") as container:
        stream = open_stream(container, "video", start_s, stop_s)
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
    step_s = 1 / frame_rate(stream)
    middle_s = (start_s or 0.0) + step_s / 2
    end_s = np.inf if stop_s is None else stop_s
    shown = None
    shown_s = 0.0
    for time_s, frame in stream_frames(container, stream):
        while shown is not None and middle_s < min(time_s, end_s) - SAME_S:
            yield shown
            middle_s += step_s
        if time_s >= end_s - SAME_S:
            return
        if shown is None and time_s > middle_s:  # nothing is shown before the first frame
            middle_s = time_s + step_s / 2
        shown = frame
        shown_s = time_s

    # The last frame is shown for one step.
    check_end(container, stream, shown_s + step_s, start_s, stop_s)
    while shown is not None and middle_s < min(shown_s + step_s, end_s) - SAME_S:
        yield shown
        middle_s += step_s


def _convert(frame: Any) -> Array:
    """Convert a decoded frame to RGB; rotated, as a phone records it, it is turned upright."""
    with item_errors("video"):
        frame_HW3 = frame.to_ndarray(format="rgb24", threads=1)  # else it starts threads per frame
    return np.rot90(frame_HW3, round(frame.rotation / 90))
