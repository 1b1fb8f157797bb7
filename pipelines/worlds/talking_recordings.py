"""Recorded letters and digits: without the silence around them, aligned by pocketsphinx, and joined to utterances.

| what | package | license |
| --- | --- | --- |
| `RECORDINGS["allison"]`, spoken by Allison Smith | Debian `asterisk-core-sounds-en-g722` | CC BY-SA 3.0 |
| `RECORDINGS["klettres-us"]` and `-gb` | Debian `klettres-data` | GPL-2+ |
| `align` | PyPI `pocketsphinx` | BSD |
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from embedcache.arrays import Floats
from embedcache.errors import DataError
from embedcache.registry import require
from embedcache.sources.media import AUDIO_RATE_HZ, decode_audio
from pipelines.worlds.talking_mouth import Phone
from pipelines.worlds.talking_speech import (
    DIGITS,
    LETTERS,
    PEAK,
    Utterance,
    Word,
    finish_utterance,
    missing_program,
)


class Recording(NamedTuple):
    """A recorded letter or digit without the silence around it. Phone times count from its first sample."""

    name: str
    word: str
    samples: Floats
    phones: tuple[Phone, ...]


class Speaker(NamedTuple):
    """The recordings of one person.

    Args:
        folders: `letters`, `LETTERS` if file names are in capitals, or `digits` -> path with `{}` for the letter or
            number.
        package: Debian package that installs them.
        pronunciations: word -> its phones, if they differ from `LETTERS` and `DIGITS`.
    """

    folders: Mapping[str, str]
    package: str
    pronunciations: Mapping[str, str] = {}


RECORDINGS: Mapping[str, Speaker] = {
    "allison": Speaker(
        {
            "letters": "/usr/share/asterisk/sounds/en_US_f_Allison/letters/{}.g722",
            "digits": "/usr/share/asterisk/sounds/en_US_f_Allison/digits/{}.g722",
        },
        "asterisk-core-sounds-en-g722",
    ),
    "klettres-us": Speaker({"LETTERS": "/usr/share/klettres/en/alpha/{}.ogg"}, "klettres-data"),
    "klettres-gb": Speaker({"letters": "/usr/share/klettres/en_GB/alpha/{}.ogg"}, "klettres-data", {"Z": "Z EH D"}),
}
_FADE_S = 0.005
_MARGIN_S = 0.03
_QUIET_S = 0.25
_QUIET = 0.03  # fraction of the loudest 10 ms below which a recording has not started


@cache
def load_recordings(speaker: str) -> tuple[Recording, ...]:
    """Load the letters and digits that a person recorded, aligned once, without the silence around them."""
    place = RECORDINGS[speaker]
    recordings = []
    for word, path in find_recordings(speaker):
        phones = place.pronunciations.get(word) or LETTERS.get(word) or DIGITS[word]
        samples = read_recording(path)
        recordings.append(Recording(f"{speaker}/{word}", word, samples, tuple(align(samples, phones.split()))))
    return tuple(recordings)


def find_recordings(speaker: str) -> list[tuple[str, Path]]:
    """Return the letters and digits that a person recorded, each with its file.

    Raises:
        MissingExtraError: a file is missing. The message names the package.
    """
    words = []
    place = RECORDINGS[speaker]
    for kind, pattern in place.folders.items():
        symbols = [*LETTERS] if kind.lower() == "letters" else [*DIGITS]
        for number, word in enumerate(symbols):
            names = {"digits": str(number), "LETTERS": word, "letters": word.lower()}
            path = Path(pattern.format(names[kind]))
            if not path.is_file():
                raise missing_program(f"the recording {path}", f"apt-get install {place.package}")
            words.append((word, path))

    return words


def read_recording(path: Path) -> Floats:
    """Return the samples of a recorded word without the silence around it, to a peak of `PEAK`."""
    return _trim(_decode(path))


def _decode(path: Path) -> Floats:
    """Decode a recording. G.722 has no header, so a container is opened for it."""
    if path.suffix != ".g722":
        return decode_audio(path.read_bytes())
    av = require("av", extra="media")
    with av.open(path) as container:
        parts = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
    return np.concatenate(parts).astype(np.float32) / np.float32(2**15)


def _trim(samples: Floats) -> Floats:
    """Cut the silence before and after speech, with a margin and a short fade, and scale to a peak of `PEAK`."""
    step = AUDIO_RATE_HZ // 100
    power = np.sqrt(np.mean(np.reshape(samples[: len(samples) // step * step], (-1, step)) ** 2, axis=1))

    # The noise of some recordings is louder than a fixed fraction of their peak.
    noise = min(2.5 * float(np.percentile(power, 10)), 0.15 * float(power.max()))
    loud = np.flatnonzero(power > max(_QUIET * float(power.max()), noise))

    margin = round(_MARGIN_S * AUDIO_RATE_HZ)
    cut = samples[max(0, loud[0] * step - margin) : (loud[-1] + 1) * step + margin].copy()

    ramp = np.linspace(0, 1, round(_FADE_S * AUDIO_RATE_HZ), dtype=np.float32)
    cut[: len(ramp)] *= ramp
    cut[-len(ramp) :] *= ramp[::-1]
    return cut * np.float32(PEAK / np.abs(cut).max())


def align(samples: Floats, phones: Sequence[str]) -> list[Phone]:
    """Return the time of each phone of one recorded word, in steps of 10 ms.

    Inner boundaries come from pocketsphinx. The word reaches from margin to margin of `_trim`, because the aligner
    takes the end of a long vowel for silence.
    """
    decoder = _aligner()
    quiet = np.zeros(round(_QUIET_S * AUDIO_RATE_HZ), np.float32)  # models expect silence around an utterance
    data = (np.concatenate([quiet, samples, quiet]) * 32767).astype("<i2").tobytes()

    word = "_".join(phones)
    if decoder.lookup_word(word) is None:
        decoder.add_word(word, " ".join(phones))
    decoder.set_align_text(word)
    _decode_utterance(decoder, data)
    try:
        decoder.set_alignment()  # the second pass finds phones
    except RuntimeError:
        raise DataError(f"pocketsphinx cannot align {' '.join(phones)} to {len(samples)} samples") from None
    _decode_utterance(decoder, data)

    segments = [phone for part in decoder.get_alignment() for phone in part if phone.name != "SIL"]
    if [phone.name for phone in segments] != list(phones):
        names = " ".join(phone.name for phone in segments)
        raise DataError(f"expected the phones {' '.join(phones)} from pocketsphinx, got {names}")

    end_s = len(samples) / AUDIO_RATE_HZ - _MARGIN_S
    starts_s = [_MARGIN_S, *(max(_MARGIN_S, phone.start / 100 - _QUIET_S) for phone in segments[1:]), end_s]
    return [
        Phone(phone.name, min(start_s, end_s), min(stop_s, end_s))
        for phone, (start_s, stop_s) in zip(segments, pairwise(starts_s), strict=True)
    ]


def _decode_utterance(decoder: Any, data: bytes) -> None:
    decoder.start_utt()
    decoder.process_raw(data, full_utt=True)
    decoder.end_utt()


@cache
def _aligner() -> Any:
    return require("pocketsphinx", package="pocketsphinx").Decoder(lm=None, loglevel="FATAL")


def join_recordings(recordings: Iterable[Recording], *, rng: np.random.Generator) -> Utterance:
    """Join recordings with gaps of 50 to 200 ms; each word names its recording."""
    parts: list[tuple[Floats, list[Phone], list[Word]]] = []
    for recording in recordings:
        duration_s = len(recording.samples) / AUDIO_RATE_HZ
        word = Word(recording.word, 0.0, duration_s, recording.name)
        parts.append((recording.samples, list(recording.phones), [word]))
    return finish_utterance(parts, rng)
