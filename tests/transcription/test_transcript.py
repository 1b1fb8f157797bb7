"""Joined transcripts and subtitles."""

from embedcache.networks.ctc import WordTime
from embedcache.transcription.transcript import Transcript, join_transcripts

WORDS = [
    *(WordTime(word, 1 + 0.5 * number, 1.4 + 0.5 * number) for number, word in enumerate(["BIN", "BLUE", "AT"])),
    WordTime("AGAIN", 3661.2345, 3661.9),
]


def transcript(*words: WordTime, score: float = -1.0) -> Transcript:
    text = " ".join(word.word for word in words)
    return Transcript(text=text, words=words, score=score, duration_s=2.0, streams=("audio",))


def test_windows_are_joined() -> None:
    joined = join_transcripts([transcript(*WORDS[:2]), transcript(), transcript(WORDS[3], score=-2.5)])
    assert joined == Transcript(
        text="BIN BLUE AGAIN", words=[*WORDS[:2], WORDS[3]], score=-4.5, duration_s=6.0, streams=("audio",)
    )


def test_subtitles() -> None:
    assert transcript(*WORDS).to_srt() == (
        "1\n00:00:01,000 --> 00:00:02,400\nBIN BLUE AT\n\n2\n01:01:01,234 --> 01:01:01,900\nAGAIN\n"
    )
    assert transcript(*WORDS).to_vtt() == (
        "WEBVTT\n\n00:00:01.000 --> 00:00:02.400\nBIN BLUE AT\n\n01:01:01.234 --> 01:01:01.900\nAGAIN\n"
    )
    assert transcript().to_srt() == ""


def test_subtitles_are_short() -> None:
    words = [WordTime("WORD" * 2, 0.3 * number, 0.3 * number + 0.2) for number in range(20)]
    lines = transcript(*words).to_srt().splitlines()[2::4]
    assert all(len(line) <= 42 for line in lines)
    assert " ".join(lines) == transcript(*words).text
    slow = [WordTime("A", 0.9 * number, 0.9 * number + 0.5) for number in range(20)]
    assert [len(line.split()) for line in transcript(*slow).to_srt().splitlines()[2::4]] == [7, 7, 6]  # of 5.9 s
