"""What was said in a recording: text, words with their times, and subtitles."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from embedcache.networks.ctc import WordTime

_CUE_CHARACTERS, _CUE_S, _PAUSE_S = 42, 6.0, 1.0
"""Of a subtitle: longest line, longest time on the screen, and silence after which a new one begins."""


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """The transcript of a recording.

    Args:
        text: words in capitals, with spaces between them; empty if none were found.
        words: the words with the times at which CTC is certain of their letters, a little shorter than the sound. Words
            of a window with more letters than frames have the times of the window.
        score: log-probability of the text, as its decoder weighs it; the sum over the windows.
        duration_s: length of the recording in seconds.
        streams: streams that were used, such as `audio` and `video`.
    """

    text: str
    words: Sequence[WordTime]
    score: float
    duration_s: float
    streams: Sequence[str]

    def to_srt(self) -> str:
        """Return SubRip subtitles."""
        cues = enumerate(_cues(self.words), start=1)
        return "\n".join(f"{number}\n{_interval(words, ',')}\n{_line(words)}\n" for number, words in cues)

    def to_vtt(self) -> str:
        """Return WebVTT subtitles."""
        cues = [f"{_interval(words, '.')}\n{_line(words)}\n" for words in _cues(self.words)]
        return "\n".join(["WEBVTT\n", *cues])


def join_transcripts(parts: Sequence[Transcript]) -> Transcript:
    """Join the transcripts of consecutive windows, whose words have the times of the whole recording."""
    return Transcript(
        text=" ".join(part.text for part in parts if part.text),
        words=[word for part in parts for word in part.words],
        score=sum(part.score for part in parts),
        duration_s=sum(part.duration_s for part in parts),
        streams=parts[0].streams,
    )


def _cues(words: Sequence[WordTime]) -> Iterator[list[WordTime]]:
    """Iterate over the words of each subtitle."""
    cue: list[WordTime] = []
    for word in words:
        if cue and (
            len(_line([*cue, word])) > _CUE_CHARACTERS
            or word.stop_s - cue[0].start_s > _CUE_S
            or word.start_s - cue[-1].stop_s > _PAUSE_S
        ):
            yield cue
            cue = []
        cue.append(word)
    if cue:
        yield cue


def _line(words: Sequence[WordTime]) -> str:
    return " ".join(word.word for word in words)


def _interval(words: Sequence[WordTime], point: str) -> str:
    return f"{_clock(words[0].start_s, point)} --> {_clock(words[-1].stop_s, point)}"


def _clock(time_s: float, point: str) -> str:
    """Return a time such as `00:01:02,345`."""
    seconds, milliseconds = divmod(round(time_s * 1000), 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{point}{milliseconds:03}"
