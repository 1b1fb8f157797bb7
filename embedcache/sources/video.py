"""Decode videos through PyAV (extra `media`).

Every damaged, empty or oversized item is an `ItemError` whose message is the reason stored with its row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Array
from embedcache.errors import DataError, ItemError
from embedcache.sources.media import (
    MAX_VIDEO_PIXELS,
    SAME_S,
    check_end,
    frame_rate,
    open_container,
    open_stream,
    stream_frames,
)


@dataclass(frozen=True, kw_only=True)
class Video:
    """Decoded frames.

    Args:
        frames_THW3: (T, H, W, 3) uint8, RGB and upright.
        rate_hz: frames per second.
    """

    frames_THW3: Array
    rate_hz: float


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
    with open_container(data, "video") as (container, _):
        stream = open_stream(container, "video", start_s, stop_s)
        rate_hz = frame_rate(stream)
        frames, shapes = bytearray(), set[tuple[int, ...]]()  # grows in place, as sound does
        num_pixels, time_s = 0, 0.0
        first_s, last_s = start_s or 0.0, np.inf if stop_s is None else stop_s
        for time_s, frame in stream_frames(container, stream):
            if time_s >= last_s - SAME_S:
                break
            if time_s < first_s - SAME_S:
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
            check_end(container, stream, time_s + 1 / rate_hz, start_s, stop_s)
        if not frames:
            raise ItemError("no frames" if start_s is None and stop_s is None else "no frames in the interval")
        if len(shapes) > 1:
            raise ItemError("the frames change their size")
        return Video(frames_THW3=np.frombuffer(frames, np.uint8).reshape(-1, *shapes.pop()), rate_hz=rate_hz)


def iter_frames(path: Path) -> Iterator[Array]:
    """Iterate over the upright RGB frames of a video of any length, at the constant rate that `probe_media` returns.

    Of a video whose frames last differently long, as many phones record, each step has the frame that is shown in its
    middle; at a constant rate these are all frames. Memory: two frames.

    Yields:
        (H, W, 3) uint8 arrays of one shape.

    Raises:
        ItemError: the file cannot be decoded, has no frames, changes its size, or ends before its announced end.
    """
    with open_container(path, "video") as (container, _):
        stream = open_stream(container, "video", None, None)
        step_s = 1 / frame_rate(stream)
        shown: Array | None = None
        time_s, middle_s = 0.0, step_s / 2
        for time_s, frame in stream_frames(container, stream):
            while shown is not None and middle_s < time_s - SAME_S:
                yield shown
                middle_s += step_s
            before, shown = shown, _upright(frame)
            if before is not None and before.shape != shown.shape:
                raise ItemError("the frames change their size")
        if shown is None:
            raise ItemError("no frames")
        while middle_s < time_s + step_s - SAME_S:
            yield shown
            middle_s += step_s
        check_end(container, stream, time_s + step_s, None, None)


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


def _upright(frame: Any) -> Array:
    frame_HW3 = frame.to_ndarray(format="rgb24", threads=1)  # else it starts threads per frame
    return np.rot90(frame_HW3, round(frame.rotation / 90))
