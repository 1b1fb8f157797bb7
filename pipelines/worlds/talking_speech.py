"""Speech with the times of its phones: words of a corpus, spoken by espeak-ng and flite.

Every function returns an `Utterance`: sound at 16 kHz, phones of CMU's dictionary, and the times of words. Nothing is
downloaded or packaged here; each program is a Debian or PyPI package, which an error names if it is missing:

| what | package | license |
| --- | --- | --- |
| `Espeak` | Debian `libespeak-ng1` | GPL-3 |
| `speak_flite` | Debian `flite` | BSD-like |

The speech of espeak-ng is not a function of its text: the same words twice give other samples, even another length. So
it is written once, and never spoken again when it is read.
"""

import ctypes
import io
import shutil
import subprocess
import tempfile
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.signal import resample_poly

from embedcache.arrays import Floats
from embedcache.errors import DataError, MissingExtraError
from embedcache.sources.media import AUDIO_RATE_HZ, decode_audio
from pipelines.worlds.talking_mouth import Phone, cmu_phone, espeak_phones


def _pronunciations(text: str) -> Mapping[str, str]:
    return dict(entry.split(": ") for entry in text.split(", "))


LETTERS = _pronunciations(
    "A: EY, B: B IY, C: S IY, D: D IY, E: IY, F: EH F, G: JH IY, H: EY CH, I: AY, J: JH EY, K: K EY, L: EH L, "
    "M: EH M, N: EH N, O: OW, P: P IY, Q: K Y UW, R: AA R, S: EH S, T: T IY, U: Y UW, V: V IY, "
    "W: D AH B AH L Y UW, X: EH K S, Y: W AY, Z: Z IY"
)
DIGITS = _pronunciations(
    "ZERO: Z IH R OW, ONE: W AH N, TWO: T UW, THREE: TH R IY, FOUR: F AO R, FIVE: F AY V, SIX: S IH K S, "
    "SEVEN: S EH V AH N, EIGHT: EY T, NINE: N AY N"
)
COMMANDS = _pronunciations(
    "BIN: B IH N, LAY: L EY, PLACE: P L EY S, SET: S EH T, BLUE: B L UW, GREEN: G R IY N, RED: R EH D, "
    "WHITE: W AY T, AT: AE T, BY: B AY, IN: IH N, WITH: W IH DH, AGAIN: AH G EH N, NOW: N AW, "
    "PLEASE: P L IY Z, SOON: S UW N"
)
WORDS: Mapping[str, str] = {**{name: LETTERS[name] for name in LETTERS if name != "W"}, **DIGITS, **COMMANDS}
"""The 51 words of the GRID corpus with the phones of CMU's dictionary: letters but W, digits, and commands."""

FLITE_VOICES = ("awb", "kal16", "rms", "slt")
"""Voices of flite at 16 kHz; `kal` is `kal16` at 8 kHz."""
PEAK = 0.5
_SILENCE_S = (0.12, 0.3)
"""Shortest and longest silence before and after an utterance."""
_FRAME_S = 1 / 25
"""Sound is padded to whole frames of video."""


class Word(NamedTuple):
    """A word, its interval in seconds, and its recording, which is empty if it was synthesized."""

    text: str
    start_s: float
    stop_s: float
    recording: str = ""


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """Speech: (n,) float32 at 16 kHz, a multiple of 40 ms long, with phones and words in order."""

    samples: Floats
    phones: tuple[Phone, ...]
    words: tuple[Word, ...]

    @property
    def text(self) -> str:
        """The transcript in capitals."""
        return " ".join(word.text for word in self.words)

    @property
    def num_frames(self) -> int:
        """Frames of video at 25 Hz."""
        return round(len(self.samples) / (AUDIO_RATE_HZ * _FRAME_S))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    )


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
_SYNCHRONOUS = 2
_PHONEME_EVENTS = 1
_UTF8 = 1
_PHONEMES = 0x100
_END = 0
_WORD = 1
_PHONEME = 7
_RATE = 1
_PITCH = 3


class Espeak:
    """espeak-ng's library, loaded once per process. Like the library, it is not thread-safe."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libespeak-ng.so.1")
        except OSError:
            raise missing_program("espeak-ng's library", "apt-get install libespeak-ng1") from None
        self._rate_hz: int = self._library.espeak_Initialize(_SYNCHRONOUS, 0, None, _PHONEME_EVENTS)
        if self._rate_hz <= 0:
            raise missing_program("espeak-ng's data", "apt-get install espeak-ng-data")
        self._parts: list[bytes] = []
        self._events: list[tuple[int, float, str]] = []
        self._callback = _CALLBACK(self._receive)  # an attribute, as the library has only its address
        self._library.espeak_SetSynthCallback(self._callback)

    def speak(
        self,
        words: Sequence[str],
        *,
        voice: str,
        rate: int = 150,
        pitch: int = 50,
        has_pauses: bool = False,
        rng: np.random.Generator,
    ) -> Utterance:
        """Speak words of `WORDS` with a variant of the American voice, such as `m3`.

        Args:
            words: words to say.
            voice: name of a variant; an unknown one is an error, for which espeak-ng would use its plain voice.
            rate: words per minute; about 80 to 300.
            pitch: 0 to 99.
            has_pauses: whether to pause between words.
            rng: generator of the silence before and after.
        """
        if voice not in espeak_variants():
            raise DataError(f"expected a variant of espeak-ng's voice, got {voice!r}; see: espeak-ng --voices=variant")
        self._library.espeak_SetVoiceByName(f"en-us+{voice}".encode())
        self._library.espeak_SetParameter(_RATE, rate, 0)
        self._library.espeak_SetParameter(_PITCH, pitch, 0)

        self._parts = []
        self._events = []
        names = [_espeak_text(word) for word in words]
        text = (", " if has_pauses else " ").join(names)
        data = text.encode()
        self._library.espeak_Synth(data, len(data) + 1, 0, 1, 0, _UTF8 | _PHONEMES, None, None)

        samples = np.frombuffer(b"".join(self._parts), "<i2").astype(np.float32) / 2**15
        duration_s = len(samples) / self._rate_hz

        # The library merges or splits some words, and then their times would be wrong.
        starts_s = [time_s for kind, time_s, _ in self._events if kind == _WORD]
        if len(starts_s) != len(words):
            raise DataError(f"expected {len(words)} words from espeak-ng for {text!r}, got {len(starts_s)}")

        events = [(time_s, name) for kind, time_s, name in self._events if kind == _PHONEME]
        stops_s = [*(time_s for time_s, _ in events[1:]), duration_s]
        phones = []
        for (start_s, name), stop_s in zip(events, stops_s, strict=True):
            phones += _split(espeak_phones(name), start_s, stop_s)

        spans = [
            Word(word, *_extent(phones, start_s, stop_s))
            for word, start_s, stop_s in zip(words, starts_s, [*starts_s[1:], duration_s], strict=True)
        ]

        samples = resample_poly(samples, AUDIO_RATE_HZ // 50, self._rate_hz // 50).astype(np.float32)
        return finish_utterance([(samples, phones, spans)], rng)

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self._parts.append(ctypes.string_at(samples, 2 * count))
        number = 0
        while events[number].type != _END:
            event = events[number]
            self._events.append((event.type, event.sample / self._rate_hz, event.name.decode(errors="replace")))
            number += 1
        return 0


def _espeak_text(word: str) -> str:
    """Return the text that makes espeak-ng say a word; a plain A would be the article."""
    if word == "A":
        return "[['eI]]"
    return word if word in LETTERS else word.lower()


def _split(names: Sequence[str], start_s: float, stop_s: float) -> list[Phone]:
    """Return phones that share an interval equally."""
    bounds = np.linspace(start_s, stop_s, len(names) + 1)
    return [Phone(name, float(a), float(b)) for name, (a, b) in zip(names, pairwise(bounds), strict=True)]


def _extent(phones: Sequence[Phone], start_s: float, stop_s: float) -> tuple[float, float]:
    """Return start and end of the phones that start in an interval, without silence."""
    inside = [phone for phone in phones if phone.name != "SIL" and start_s - 1e-6 <= phone.start_s < stop_s - 1e-6]
    return (inside[0].start_s, inside[-1].stop_s) if inside else (start_s, stop_s)


@cache
def espeak() -> Espeak:
    """Return the library of this process."""
    return Espeak()


@cache
def espeak_variants() -> frozenset[str]:
    """Return the names of espeak-ng's voice variants."""
    folders = [Path(root, "espeak-ng-data/voices/!v") for root in _data_roots()]
    return frozenset(path.name for folder in folders if folder.is_dir() for path in folder.iterdir())


def _data_roots() -> list[str]:
    return ["/usr/share", "/usr/lib", "/usr/local/share", *map(str, Path("/usr/lib").glob("*-linux-gnu"))]


def speak_flite(
    words: Sequence[str], *, voice: str, stretch: float = 1.0, has_pauses: bool = False, rng: np.random.Generator
) -> Utterance:
    """Speak words of `WORDS` with flite, a second synthesizer.

    Args:
        words: words to say.
        voice: name of `FLITE_VOICES`.
        stretch: factor of all durations.
        has_pauses: whether to pause between words.
        rng: generator of the silence before and after.
    """
    if shutil.which("flite") is None:
        raise missing_program("flite", "apt-get install flite")

    # A comma makes a pause.
    text = (", " if has_pauses else " ").join("ay" if word == "A" else word.lower() for word in words)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "speech.wav")
        options = ["-voice", voice, "--setf", f"duration_stretch={stretch:g}", "-psdur"]
        command = ["flite", *options, "-t", text, "-o", str(path)]
        process = subprocess.run(command, capture_output=True, text=True, check=True)
        samples = decode_audio(path.read_bytes())

    phones = []
    start_s = 0.0
    for entry in process.stdout.split():
        name, _, stop = entry.rpartition(":")
        phones.append(Phone(cmu_phone(name), start_s, float(stop)))
        start_s = float(stop)

    return finish_utterance([(samples, phones, _find_words(words, phones))], rng)


def _find_words(words: Sequence[str], phones: Sequence[Phone]) -> list[Word]:
    """Return the words with their times, by the number of phones of each."""
    sounds = [phone for phone in phones if phone.name != "SIL"]

    # flite prints no word boundaries, but the dictionary says how many phones each word has.
    counts = [len(WORDS[word].split()) for word in words]
    if sum(counts) != len(sounds):
        names = " ".join(phone.name for phone in sounds)
        raise DataError(f"expected {sum(counts)} phones for {' '.join(words)!r}, got {len(sounds)}: {names}")

    bounds = np.cumsum([0, *counts])
    return [
        Word(word, sounds[first].start_s, sounds[last - 1].stop_s)
        for word, first, last in zip(words, bounds[:-1], bounds[1:], strict=True)
    ]


def finish_utterance(parts: Sequence[tuple[Floats, list[Phone], list[Word]]], rng: np.random.Generator) -> Utterance:
    """Join parts into one utterance, with silence around them, gaps between them, a peak of `PEAK` and whole frames."""
    low = round(_SILENCE_S[0] * AUDIO_RATE_HZ)
    high = round(_SILENCE_S[1] * AUDIO_RATE_HZ)

    pieces: list[Floats] = []
    phones: list[Phone] = []
    words: list[Word] = []
    place = 0

    for number, (samples, part_phones, part_words) in enumerate(parts):
        gap = int(rng.integers(low, high)) if number == 0 else int(rng.integers(800, 3200))
        start_s = (place + gap) / AUDIO_RATE_HZ
        pieces += [np.zeros(gap, np.float32), samples]

        silence_s = phones[-1].stop_s if phones else 0.0
        moved_phones = [Phone(name, a + start_s, b + start_s) for name, a, b in part_phones]
        phones += [Phone("SIL", silence_s, moved_phones[0].start_s), *moved_phones]
        words += [Word(text, a + start_s, b + start_s, name) for text, a, b, name in part_words]
        place += gap + len(samples)

    # The last gap also fills the last frame of the video.
    gap = int(rng.integers(low, high))
    place += gap
    frame = round(AUDIO_RATE_HZ * _FRAME_S)
    gap += -place % frame
    samples = np.concatenate([*pieces, np.zeros(gap, np.float32)])
    phones.append(Phone("SIL", phones[-1].stop_s, len(samples) / AUDIO_RATE_HZ))
    samples *= np.float32(PEAK / max(float(np.abs(samples).max()), 1e-6))
    return Utterance(samples=samples, phones=tuple(phones), words=tuple(words))


def encode_wav(samples: Floats) -> bytes:
    """Return a 16-bit WAV file at 16 kHz."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(AUDIO_RATE_HZ)
        out.writeframes(np.round(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def missing_program(what: str, command: str) -> MissingExtraError:
    """Return the error of a program or file that a command installs."""
    return MissingExtraError(f"{what} is not installed; run: {command}")
