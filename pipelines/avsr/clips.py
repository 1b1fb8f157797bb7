"""Recordings and videos of speech as windows, read once from beginning to end and cut where it is quiet.

Memory: the streams of one window and one second, however long the files are.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from embedcache.arrays import Array, Floats
from embedcache.errors import DataError, ItemError, PathError, SettingError
from embedcache.sources.media import (
    AUDIO_RATE_HZ,
    MAX_VIDEO_PIXELS,
    StreamInfo,
    Video,
    decode_video,
    iter_audio,
    probe_media,
)

MOUTH_FORM = "X0,Y0,X1,Y1 in fractions of the frame's width and height, such as 0.3,0.55,0.7,0.85, or all"
WHOLE_FRAME = 0.0, 0.0, 1.0, 1.0
SLACK_S = 0.25
"""Sound and frames may differ by this much in length: the tracks of a file rarely end together."""

_SHORTEST_S = 1.0  # the last window is not shorter, unless the recording is
_CUT_RANGE = 0.6  # the last part of a window, as a fraction, in which it may end
_QUIET_S = 0.5  # span whose loudness or motion is compared: longer than the closure of a consonant
_LEVEL_HZ = 100  # levels of loudness per second
_NOUNS: Mapping[str, str] = {"audio": "sound", "video": "frames"}


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A recording or video to transcribe.

    Args:
        path: the file.
        streams: stream to use, `audio` or `video` -> rate and length.
        mouth: region of the mouth in the frames: left, top, right and bottom as fractions of width and height.
    """

    path: Path
    streams: Mapping[str, StreamInfo]
    mouth: Sequence[float]


class Window(NamedTuple):
    """A part of a recording.

    Args:
        start_s: its start in seconds.
        stop_s: its end.
        items: stream -> what an encoder prepares: samples, or a `Video` of the mouth.
    """

    start_s: float
    stop_s: float
    items: Mapping[str, Floats | Video]


def parse_mouth(text: str) -> Sequence[float]:
    """Parse the region of the mouth: `all`, or fractions such as `0.3,0.55,0.7,0.85`.

    Raises:
        SettingError: the text is neither.
    """
    if text.strip() == "all":
        return WHOLE_FRAME
    try:
        x0, y0, x1, y1 = (float(part) for part in text.split(","))
    except ValueError:
        raise SettingError(f"mouth: expected {MOUTH_FORM}, got {text!r}") from None
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise SettingError(f"mouth: expected {MOUTH_FORM}, with X0 < X1 and Y0 < Y1 from 0 to 1, got {text!r}")
    return x0, y0, x1, y1


def open_clip(path: Path, run_streams: Sequence[str], requested: Sequence[str], mouth: Sequence[float] | None) -> Clip:
    """Find the streams of a file, and check all that can be checked without decoding.

    Args:
        path: a recording or video.
        run_streams: streams that the run was trained on.
        requested: streams to use. If empty, use all that the run and the file have.
        mouth: region of the mouth.

    Raises:
        PathError: the file does not exist.
        DataError: a stream is missing, or the file cannot be opened.
        SettingError: there is no region of the mouth, or the run does not know a stream.
    """
    if not path.is_file():
        raise PathError(f"expected a recording or a video, got {path}, which is not a file")
    for stream in requested:
        if stream not in run_streams:
            raise SettingError(
                f"streams: expected {' and '.join(run_streams)}, which the run was trained on, got {stream}"
            )

    # Only the header of the file is read here; a damaged file shows itself when its windows are read.
    try:
        infos = probe_media(path)
    except ItemError as error:
        raise DataError(f"{path}: {error}") from error

    # A fusion transcribes a recording without frames by its sound alone, unless frames are asked for.
    has_sound_only = "audio" in run_streams and "video" not in infos
    streams = requested or [stream for stream in run_streams if stream == "audio" or not has_sound_only]

    for stream in streams:
        if stream not in infos:
            raise DataError(f"{path}: expected {_NOUNS[stream]}, got a file without them; --streams names others")

    if "video" in streams and mouth is None:
        raise SettingError(f"mouth: no region given for the frames of {path}: expected {MOUTH_FORM}")

    clip = Clip(
        path=path,
        streams={stream: infos[stream] for stream in run_streams if stream in streams},
        mouth=mouth or WHOLE_FRAME,
    )

    # The headers of files are less exact than their contents, so the limit is twice as wide here.
    _check_lengths(clip, {stream: info.duration_s for stream, info in clip.streams.items()}, slack_s=2 * SLACK_S)
    return clip


def _check_lengths(clip: Clip, seconds: Mapping[str, float | None], *, slack_s: float = SLACK_S) -> None:
    """Raise a `DataError` if the streams of a clip differ in length; streams of unknown length are skipped."""
    known_s = {stream: length for stream, length in seconds.items() if length is not None}
    if known_s and max(known_s.values()) - min(known_s.values()) > slack_s:
        lengths = " and ".join(f"{length:.2f} s of {_NOUNS[stream]}" for stream, length in known_s.items())
        raise DataError(f"{clip.path}: expected sound and frames of one length, to {SLACK_S} s, got {lengths}")


def iter_windows(clip: Clip, *, window_s: float, step_s: float) -> Iterator[Window]:
    """Iterate over the windows of a recording.

    Each window ends at the quietest place of its last 60%: where the sound is softest or, without sound, where the
    mouth moves least.

    Args:
        clip: the recording.
        window_s: longest window in seconds.
        step_s: windows end at its multiples, so that no frame of a network is cut.

    Raises:
        DataError: the recording is damaged, or its streams differ in length.
    """
    try:
        yield from _cut_windows(clip, window_s, step_s)
    except ItemError as error:
        raise DataError(f"{clip.path}: {error}") from error


def _cut_windows(clip: Clip, window_s: float, step_s: float) -> Iterator[Window]:
    tracks = [_open_track(clip, stream) for stream in clip.streams]
    leader, *followers = tracks

    start_s = 0.0
    while True:
        # Read one second more than a window, so that the last window is not shorter than a second.
        end_s = leader.read_to(start_s + window_s + _SHORTEST_S)
        is_last = end_s <= start_s + window_s + 1e-6

        stop_s = end_s
        if not is_last:
            latest_s = min(start_s + window_s, end_s - _SHORTEST_S)
            earliest_s = min(start_s + (1 - _CUT_RANGE) * window_s, latest_s)
            stop_s = leader.find_quiet(earliest_s, latest_s, step_s)

        for track in followers:
            reached_s = track.read_to(stop_s + SLACK_S + step_s if is_last else stop_s)
            if (is_last and abs(reached_s - end_s) > SLACK_S) or (not is_last and reached_s < stop_s - step_s):
                # Read to the ends, without keeping anything, for a message that names the true lengths.
                _check_lengths(clip, {other.name: other.read_to(np.inf, is_kept=False) for other in tracks})

        yield Window(start_s, stop_s, {track.name: track.take(None if is_last else stop_s) for track in tracks})
        if is_last:
            return
        start_s = stop_s


def _open_track(clip: Clip, stream: str) -> "_Track":
    if stream == "audio":
        return _Track(stream, AUDIO_RATE_HZ, iter_audio(clip.path))

    frames = (_crop(frame(), clip.mouth)[None].copy() for frame in decode_video(clip.path).frames())
    return _Track(stream, clip.streams[stream].rate_hz, frames)


def _crop(frame_HW3: Array, mouth: Sequence[float]) -> Array:
    """Cut out the region of the mouth, rounded outwards to whole pixels."""
    height, width = frame_HW3.shape[:2]
    x0, y0, x1, y1 = np.array(mouth) * (width, height, width, height)
    return frame_HW3[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))]


class _Track:
    """A stream that is read as far as needed. Samples and frames that were taken are dropped.

    Args:
        name: `audio` or `video`.
        rate_hz: samples or frames per second.
        pieces: arrays of consecutive samples or frames.
    """

    def __init__(self, name: str, rate_hz: float, pieces: Iterator[Array]) -> None:
        self.name = name
        self.rate_hz = rate_hz
        self._pieces = pieces
        self._kept: list[Array] = []
        self._first = self._end = 0  # numbers of the first kept one and of the next one to read

    def read_to(self, time_s: float, *, is_kept: bool = True) -> float:
        """Read on to a time or to the end of the stream, and return the time that was reached."""
        while self._end < time_s * self.rate_hz:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._end += len(piece)
            if is_kept:
                self._kept.append(piece)
                self._check_size()
        return self._end / self.rate_hz

    def _check_size(self) -> None:
        height, width = self._kept[-1].shape[1:3] if self.name == "video" else (0, 0)
        if (self._end - self._first) * height * width > MAX_VIDEO_PIXELS:
            raise ItemError(
                f"too many pixels: more than {MAX_VIDEO_PIXELS:,} in the frames of a window, {width} x {height} each; "
                "give a smaller region of the mouth or a smaller --window-s"
            )

    def take(self, stop_s: float | None) -> "Floats | Video":
        """Remove and return everything before a time, or everything that was read."""
        stop = self._end if stop_s is None else min(self._end, round(stop_s * self.rate_hz))
        part = self._between(self._first, stop)

        self._kept = list(self._rest(stop))
        self._first = stop
        return Video(frames_THW3=part, rate_hz=self.rate_hz) if self.name == "video" else part

    def _rest(self, first: int) -> Iterator[Array]:
        number = self._first
        for piece in self._kept:
            if number + len(piece) > first:
                yield piece[max(0, first - number) :]
            number += len(piece)

    def _between(self, first: int, stop: int) -> Array:
        parts = []
        number = first
        for piece in self._rest(first):
            parts.append(piece[: max(0, stop - number)])
            number += len(piece)

        if number == first:
            raise ItemError(f"no {_NOUNS[self.name]} after {first / self.rate_hz:.2f} s")
        return np.concatenate(parts)

    def find_quiet(self, first_s: float, last_s: float, step_s: float) -> float:
        """Return the multiple of `step_s` between two times around which it is quietest. The latest one wins a tie."""
        margin_s = _QUIET_S / 2
        begin = max(self._first, round((first_s - margin_s) * self.rate_hz))

        # A margin on both sides, so that the loudness around the first and last candidate is known.
        values = self._between(begin, round((last_s + margin_s) * self.rate_hz))

        levels, rate_hz = _levels(values, self.rate_hz)
        span = max(1, round(_QUIET_S * rate_hz))
        means = np.convolve(levels, np.full(span, 1 / span), mode="same")

        # Candidates are multiples of the step; the tolerance keeps a multiple that rounding moved past a limit.
        candidates = np.arange(np.ceil(first_s / step_s - 1e-6), np.floor(last_s / step_s + 1e-6) + 1) * step_s
        places = np.round((candidates - begin / self.rate_hz) * rate_hz).astype(int).clip(0, len(means) - 1)

        quietest = len(places) - 1 - int(np.argmin(means[places][::-1]))
        return float(candidates[quietest])


def _levels(values: Array, rate_hz: float) -> tuple[Array, float]:
    """Return the loudness of sound, or the motion in frames, over time, and its number of values per second."""
    if values.ndim == 1:
        hop = AUDIO_RATE_HZ // _LEVEL_HZ
        whole_frames = values[: len(values) // hop * hop].reshape(-1, hop)
        return np.square(whole_frames, dtype=np.float64).mean(axis=1), _LEVEL_HZ

    # The last frame has no next one; its motion repeats the one before.
    changes = [np.abs(b.astype(np.int16) - a).mean() for a, b in pairwise(values)]
    return np.array([*changes, *changes[-1:]]), rate_hz
