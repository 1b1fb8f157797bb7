"""Decode recordings, and the sound of videos, through PyAV (extra `media`).

Every damaged, empty or oversized item is an `ItemError` whose message is the reason stored with its row.
"""

from collections.abc import Iterator
from itertools import chain
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
    with open_container(file, "recording") as container:
        stream = open_stream(container, "audio", start_s, stop_s)
        for first, samples_n in _samples(container, stream):
            inside_n = samples_n[_position(start_s, 0, first) : _position(stop_s, len(samples_n), first)]
            if not np.isfinite(inside_n).all():
                raise ItemError("NaN or infinity in the sound")
            yield np.clip(inside_n, -1, 1)
            num_samples += len(inside_n)
            end_s = (first + len(samples_n)) / AUDIO_RATE_HZ
            if stop_s is not None and end_s > stop_s + PREROLL_S:
                break
        check_end(container, stream, end_s, start_s, stop_s)
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
    for time_s, frame in chain(stream_frames(container, stream), [(0.0, None)]):  # the last one flushes the resampler
        if number is None:
            number = round(time_s * AUDIO_RATE_HZ)
        for resampled in resampler.resample(frame):
            yield number, resampled.to_ndarray().mean(axis=0)  # FFmpeg's own downmix of stereo is louder by sqrt(2)
            number += resampled.samples


def _position(time_s: float | None, otherwise: int, first: int) -> int:
    """Return where a time lies in samples that begin with number `first`."""
    return otherwise if time_s is None else max(0, round(time_s * AUDIO_RATE_HZ) - first)
