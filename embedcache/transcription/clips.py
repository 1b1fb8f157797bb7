"""Recordings and videos of speech as windows: read once from beginning to end, cut where it is quiet.

Memory: the streams of one window and a second, whatever the length of the files.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from embedcache.arrays import Array, Floats, blocks
from embedcache.errors import DataError, ItemError, PathError, SettingError
from embedcache.sources.media import AUDIO_RATE_HZ, MAX_VIDEO_PIXELS, StreamInfo, probe_media
from embedcache.sources.sound import check_audio, iter_audio
from embedcache.sources.video import StreamedVideo, Video, check_video, iter_frames
from embedcache.transcription.settings import MOUTH_FORM, Mouth, check_mouth

AudioLike: TypeAlias = str | Path | Array
"""Sound: the path of a media file, or (n,) float32 mono samples in [-1, 1] at 16 kHz."""
VideoLike: TypeAlias = str | Path | Video | StreamedVideo
"""Frames: the path of a video, or a decoded `Video`."""
Source: TypeAlias = Path | Array | Video | StreamedVideo
SLACK_S = 0.25
"""Sound and frames may differ by this much in length: the tracks of a file rarely end together."""

_SHORTEST_S = 1.0  # the last window is not shorter, unless the recording is
_CUT_RANGE = 0.6  # the last part of a window, as a fraction, in which it may end
_QUIET_S = 0.5  # span whose loudness or motion is compared: longer than the closure of a consonant
_LEVEL_HZ = 100  # levels of loudness per second
_NOUNS: Mapping[str, str] = {"audio": "sound", "video": "frames"}


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One recording to transcribe.

    Args:
        name: its name in messages.
        sources: stream, `audio` or `video` -> file, samples or frames.
        infos: stream -> rate and length.
        mouth: region of the mouth in the frames.
    """

    name: str
    sources: Mapping[str, Source]
    infos: Mapping[str, StreamInfo]
    mouth: Mouth | None

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams to use, `audio` first."""
        return tuple(self.sources)

    @property
    def duration_s(self) -> float | None:
        """Length in seconds as announced, or None."""
        return next(iter(self.infos.values())).duration_s


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


def open_clip(
    audio: AudioLike | None,
    video: VideoLike | None,
    *,
    streams: Sequence[str],
    wanted: Sequence[str],
    mouth: Mouth | None,
    name: str,
) -> Clip:
    """Find the streams of a recording, and check all that can be checked without decoding.

    Args:
        audio: the sound; the path of a video serves as the frames too, if `video` is not given.
        video: the frames.
        streams: streams of the run.
        wanted: streams to use; empty: all that the run and the recording have.
        mouth: region of the mouth.
        name: name of samples and frames in memory, for messages.

    Raises:
        PathError: a file does not exist.
        DataError: a stream is missing, cannot be opened, or does not fit the run.
        SettingError: there is no region of the mouth, or it lies outside.
    """
    name = next((str(item) for item in (audio, video) if isinstance(item, str | Path)), name)
    try:
        found = _find_streams(audio, video, streams, name)
    except ItemError as error:
        raise DataError(f"{name}: {error}") from error
    used = _choose_streams(name, found, streams, wanted)
    if "video" in used and mouth is None:
        raise SettingError(f"mouth: no face region given for the frames of {name}: expected {MOUTH_FORM}")
    clip = Clip(
        name=name,
        sources={stream: found[stream][0] for stream in used},
        infos=used,
        mouth=None if mouth is None else check_mouth(mouth),
    )
    _check_lengths(clip, {stream: info.duration_s for stream, info in used.items()}, slack_s=2 * SLACK_S)
    return clip


def _find_streams(
    audio: AudioLike | None, video: VideoLike | None, streams: Sequence[str], name: str
) -> dict[str, tuple[Source, StreamInfo | None]]:
    """Return stream -> where it is and what is known of it; None if the file has no such stream."""
    found: dict[str, tuple[Source, StreamInfo | None]] = {}
    if audio is not None:
        source = _check_file(Path(audio)) if isinstance(audio, str | Path) else check_audio(audio, name)
        infos = _inspect(source, "audio")
        serves_all = isinstance(source, Path) and video is None
        found = {stream: (source, infos.get(stream)) for stream in (streams if serves_all else ("audio",))}
        if serves_all and len(streams) > 1 and "video" not in infos:  # a recording of sound alone
            del found["video"]
    if video is not None:
        frames = _check_file(Path(video)) if isinstance(video, str | Path) else check_video(video, name)
        found["video"] = frames, _inspect(frames, "video").get("video")
    return found


def _choose_streams(
    name: str,
    found: Mapping[str, tuple[Source, StreamInfo | None]],
    streams: Sequence[str],
    wanted: Sequence[str],
) -> dict[str, StreamInfo]:
    """Return the streams to use in the order of the run, after checking that the run knows them and they are there."""
    if not found:
        raise DataError("expected sound, frames or both, got neither; pass audio, video or the path of a media file")
    for stream in (*found, *wanted):
        if stream not in streams:
            noun = "streams" if stream in wanted else name
            raise SettingError(f"{noun}: expected {' and '.join(streams)}, which the run was trained on, got {stream}")
    used = {}
    for stream in streams:
        if stream in (wanted or found):
            info = found.get(stream, (None, None))[1]
            if info is None:
                has = f"the file has no {stream} stream" if stream in found else f"only {', '.join(found)}"
                others = [other for other in streams if other != stream]
                hint = f"; name the other stream if the run may do without: streams {others[0]}" if others else ""
                raise DataError(f"{name}: expected {_NOUNS[stream]}, got none: {has}{hint}")
            used[stream] = info
    return used


def _check_file(path: Path) -> Path:
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "is a pipe or a device"
        state = found if path.exists() else "does not exist"
        raise PathError(f"{path} {state}: expected a recording or a video, such as a .wav or .mp4 file")
    return path


def _inspect(item: Source, stream: str) -> dict[str, StreamInfo]:
    if isinstance(item, Path):
        infos = probe_media(item)
        if not infos:  # FFmpeg reads texts of many kinds as subtitles
            raise ItemError("expected a recording or a video, got a file with neither sound nor frames")
        return infos
    if isinstance(item, Video | StreamedVideo):
        return {stream: StreamInfo(rate_hz=item.rate_hz, duration_s=item.duration_s)}
    return {stream: StreamInfo(rate_hz=AUDIO_RATE_HZ, duration_s=len(item) / AUDIO_RATE_HZ)}


def _check_lengths(clip: Clip, seconds: Mapping[str, float | None], *, slack_s: float = SLACK_S) -> None:
    known = {key: length for key, length in seconds.items() if length is not None}
    if known and max(known.values()) - min(known.values()) > slack_s:
        lengths = " and ".join(f"{length:.2f} s of {_NOUNS[key]}" for key, length in known.items())
        raise DataError(
            f"{clip.name}: expected sound and frames of one length, to {SLACK_S} s, got {lengths}; are they of one "
            "recording, and their rates right?"
        )


def iter_windows(clip: Clip, *, window_s: float, step_s: float) -> Iterator[Window]:
    """Iterate over the windows of a recording.

    Each ends where it is quietest in its last 60%: where the sound is softest, or without sound where the mouth
    moves least.

    Args:
        window_s: longest window in seconds.
        step_s: windows end at multiples of it, so that no frame of a network is cut.

    Raises:
        DataError: the recording is damaged, or its streams differ in length.
    """
    try:
        yield from _cut_windows(clip, window_s, step_s)
    except ItemError as error:
        raise DataError(f"{clip.name}: {error}") from error


def _cut_windows(clip: Clip, window_s: float, step_s: float) -> Iterator[Window]:
    tracks = [_open_track(clip, key) for key in clip.streams]
    first, *others = tracks
    start_s = 0.0
    while True:
        end_s = first.read_to(start_s + window_s + _SHORTEST_S)
        is_last = end_s <= start_s + window_s + 1e-6
        stop_s = end_s
        if not is_last:
            latest_s = min(start_s + window_s, end_s - _SHORTEST_S)
            earliest_s = min(start_s + (1 - _CUT_RANGE) * window_s, latest_s)
            stop_s = first.find_quiet(earliest_s, latest_s, step_s)
        for other in others:
            reached_s = other.read_to(stop_s + SLACK_S + step_s if is_last else stop_s)
            if (is_last and abs(reached_s - end_s) > SLACK_S) or (not is_last and reached_s < stop_s - step_s):
                _check_lengths(clip, {track.name: track.read_to(np.inf, is_kept=False) for track in tracks})
        items = {track.name: track.take(None if is_last else stop_s) for track in tracks}
        yield Window(start_s, stop_s, items)
        if is_last:
            return
        start_s = stop_s


def _open_track(clip: Clip, stream: str) -> "_Track":
    source, rate_hz = clip.sources[stream], clip.infos[stream].rate_hz
    if stream == "audio":
        assert not isinstance(source, Video | StreamedVideo)
        pieces = iter_audio(source) if isinstance(source, Path) else _split(source, AUDIO_RATE_HZ)
        return _Track(stream, rate_hz, pieces)
    if isinstance(source, Path):
        return _Track(stream, rate_hz, (_crop(frame[None], clip.mouth).copy() for frame in iter_frames(source)))
    if isinstance(source, StreamedVideo):
        return _Track(stream, rate_hz, (_crop(frame()[None], clip.mouth).copy() for frame in source.frames()))
    assert isinstance(source, Video)
    return _Track(stream, rate_hz, _split(_crop(source.frames_THW3, clip.mouth), round(rate_hz)))


def _split(values: Array, size: int) -> Iterator[Array]:
    return (values[rows] for rows in blocks(len(values), max(1, size)))


def _crop(frames_THW3: Array, mouth: Mouth | None) -> Array:
    """Cut out the region of the mouth, rounded outwards to whole pixels."""
    if not isinstance(mouth, tuple):
        return frames_THW3
    height, width = frames_THW3.shape[1:3]
    x0, y0, x1, y1 = np.array(mouth) * (width, height, width, height)
    return frames_THW3[:, int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))]


class _Track:
    """A stream that is read as far as needed; what was taken is forgotten.

    Args:
        name: `audio` or `video`.
        rate_hz: samples or frames per second.
        pieces: arrays of consecutive samples or frames.
    """

    def __init__(self, name: str, rate_hz: float, pieces: Iterator[Array]) -> None:
        self.name, self.rate_hz, self._pieces = name, rate_hz, pieces
        self._kept: list[Array] = []
        self._first = self._end = 0  # numbers of the first one that is kept, and of the next one to read

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
                "give a smaller region of the mouth or a smaller window_s"
            )

    def take(self, stop_s: float | None) -> "Floats | Video":
        """Remove and return what comes before a time, or all that is kept."""
        stop = self._end if stop_s is None else min(self._end, round(stop_s * self.rate_hz))
        taken, self._kept, self._first = self._between(self._first, stop), list(self._rest(stop)), stop
        return Video(frames_THW3=taken, rate_hz=self.rate_hz) if self.name == "video" else taken

    def _rest(self, first: int) -> Iterator[Array]:
        number = self._first
        for piece in self._kept:
            if number + len(piece) > first:
                yield piece[max(0, first - number) :]
            number += len(piece)

    def _between(self, first: int, stop: int) -> Array:
        parts, number = [], first
        for piece in self._rest(first):
            parts.append(piece[: max(0, stop - number)])
            number += len(piece)
        if number == first:
            raise ItemError(f"no {_NOUNS[self.name]} after {first / self.rate_hz:.2f} s")
        return np.concatenate(parts)

    def find_quiet(self, first_s: float, last_s: float, step_s: float) -> float:
        """Return the multiple of `step_s` between two times around which it is quietest; the latest of equal ones."""
        margin_s = _QUIET_S / 2
        begin = max(self._first, round((first_s - margin_s) * self.rate_hz))
        values = self._between(begin, round((last_s + margin_s) * self.rate_hz))
        levels, rate_hz = _levels(values, self.rate_hz)
        span = max(1, round(_QUIET_S * rate_hz))
        means = np.convolve(levels, np.full(span, 1 / span), mode="same")
        candidates = np.arange(np.ceil(first_s / step_s - 1e-6), np.floor(last_s / step_s + 1e-6) + 1) * step_s
        places = np.round((candidates - begin / self.rate_hz) * rate_hz).astype(int).clip(0, len(means) - 1)
        quietest = len(places) - 1 - int(np.argmin(means[places][::-1]))
        return float(candidates[quietest])


def _levels(values: Array, rate_hz: float) -> tuple[Array, float]:
    """Return the loudness of sound, or the motion in frames, over time, and its number of values per second."""
    if values.ndim == 1:
        hop = AUDIO_RATE_HZ // _LEVEL_HZ
        kept = values[: len(values) // hop * hop].reshape(-1, hop)
        return np.square(kept, dtype=np.float64).mean(axis=1), _LEVEL_HZ
    changes = [np.abs(b.astype(np.int16) - a).mean() for a, b in pairwise(values)]
    return np.array([*changes, *changes[-1:]]), rate_hz
