"""Decode recordings, and the sound of videos, through PyAV (extra `media`).

Every damaged, empty or oversized item is an `ItemError` whose message is the reason stored with its row.
"""

from collections.abc import Iterator
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Floats
from embedcache.errors import DataError, ItemError
from embedcache.registry import require
from embedcache.sources.media import (
    AUDIO_RATE_HZ,
    PREROLL_S,
    check_end,
    open_container,
    open_stream,
    stream_duration,
    stream_frames,
)

MAX_AUDIO_S = 3_600
"""An hour is 230 MB of float32 samples."""
LOUDEST = 2.0
"""Samples beyond it are not on the scale of [-1, 1], which sound of lossy formats exceeds by less."""


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
    with open_container(data, "recording") as container:
        stream = open_stream(container, "audio", start_s, stop_s)
        duration_s = stream_duration(container, stream) or 0.0
        if (start_s, stop_s) == (None, None) and duration_s > MAX_AUDIO_S:
            raise ItemError(f"too long: {duration_s:,.0f} s of sound, more than {MAX_AUDIO_S:,}; index intervals of it")
        sound = bytearray()  # grows in place, where joining parts needs each sample twice
        for samples_n in _interval(container, stream, start_s, stop_s):
            sound += np.clip(samples_n, -1, 1).data
            if len(sound) > 4 * MAX_AUDIO_S * AUDIO_RATE_HZ:
                raise ItemError(f"too long: more than {MAX_AUDIO_S:,} s of sound; index intervals of it")
    return np.frombuffer(sound, np.float32)


def iter_audio(path: Path) -> Iterator[Floats]:
    """Iterate over the sound of a file of any length: blocks of 16 kHz mono float32, as `decode_audio` decodes them.

    Memory: one packet. The file is read once, from its beginning to its end.

    Raises:
        ItemError: the file cannot be decoded, has no sound, holds NaN or samples above `LOUDEST`, or ends
            before its announced end.
    """
    with open_container(path, "recording") as container:
        stream = open_stream(container, "audio", None, None)
        for samples_n in _interval(container, stream, None, None):
            if (loudest := max(samples_n.max(initial=0), -samples_n.min(initial=0))) > LOUDEST:
                raise ItemError(f"expected samples in [-1, 1], got up to {loudest:g}; scale the recording")
            yield np.clip(samples_n, -1, 1)


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


def _interval(container: Any, stream: Any, start_s: float | None, stop_s: float | None) -> Iterator[Floats]:
    """Iterate over the mono samples of an interval in blocks; after the last one, check that none is missing."""
    end_s = 0.0
    num_samples = 0
    for first, samples_n in _samples(container, stream):
        inside_n = samples_n[_position(start_s, 0, first) : _position(stop_s, len(samples_n), first)]
        if not np.isfinite(inside_n).all():
            raise ItemError("NaN or infinity in the sound")
        yield inside_n
        num_samples += len(inside_n)
        end_s = (first + len(samples_n)) / AUDIO_RATE_HZ
        if stop_s is not None and end_s > stop_s + PREROLL_S:
            break

    check_end(container, stream, end_s, start_s, stop_s)
    if not num_samples:
        raise ItemError("no sound: the audio stream is empty")


def _samples(container: Any, stream: Any) -> Iterator[tuple[int, Floats]]:
    """Iterate over the mono samples of a stream with the number of the first, counted from the stream's start."""
    resampler = require("av", extra="media").AudioResampler(format="fltp", rate=AUDIO_RATE_HZ)
    number = -1
    for time_s, frame in stream_frames(container, stream):
        if number < 0:
            first = round(time_s * frame.sample_rate)
            num_left_out = _num_unaligned(first, frame.sample_rate)
            if frame.samples <= num_left_out < frame.sample_rate * PREROLL_S / 2:
                continue
            if num_left_out < frame.samples:
                frame, first = _without_first(frame, num_left_out), first + num_left_out
            number = round(first / frame.sample_rate * AUDIO_RATE_HZ)
        for resampled in resampler.resample(frame):
            yield number, resampled.to_ndarray().mean(axis=0)  # FFmpeg's own downmix of stereo is louder by sqrt(2)
            number += resampled.samples
    if number >= 0:
        for resampled in resampler.resample(None):
            yield number, resampled.to_ndarray().mean(axis=0)
            number += resampled.samples


def _num_unaligned(first: int, rate_hz: int) -> int:
    """Return how many samples, from a number on, come before the next that has the time of one at 16 kHz.

    Resampled from there on, an interval has the samples that the whole recording has.
    """
    return -first % (rate_hz // gcd(rate_hz, AUDIO_RATE_HZ))


def _without_first(frame: Any, num_samples: int) -> Any:
    """Return a frame of sound without its first samples."""
    if not num_samples:
        return frame
    samples, num_values = frame.to_ndarray(), num_samples * (1 if frame.format.is_planar else frame.layout.nb_channels)
    shorter = type(frame).from_ndarray(
        np.ascontiguousarray(samples[:, num_values:]), format=frame.format.name, layout=frame.layout.name
    )
    shorter.sample_rate = frame.sample_rate
    return shorter


def _position(time_s: float | None, otherwise: int, first: int) -> int:
    """Return where a time lies in samples that begin with number `first`."""
    return otherwise if time_s is None else max(0, round(time_s * AUDIO_RATE_HZ) - first)
