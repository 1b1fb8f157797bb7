"""Noise tapes for speech: babble of many voices, and pieces of single voices, as WAV files at 16 kHz."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from embedcache.arrays import Floats
from embedcache.files import write_atomic
from embedcache.progress import NullProgress, Progress
from embedcache.sources.media import AUDIO_RATE_HZ, decode_audio
from pipelines.worlds.talking_speech import WORDS, encode_wav, espeak

TAPES = ("babble", "talker", "babble-test", "talker-test")
TAPE_VOICES = ("Denis", "steph", "Gene", "linda", "Lee", "belinda", "ian", "aunty", "paul", "Alicia", "rob", "zac")
"""Voices of espeak-ng of the tapes for tests."""
_NUM_STREAMS = 12


def write_tapes(
    folder: Path, training: Sequence[Path], *, length_s: int, seed: int, progress: Progress | None = None
) -> None:
    """Write all noise tapes if any is missing, each `length_s` seconds long, as `NAME.wav`.

    `babble` and `talker` are made of training utterances. `babble-test` and `talker-test` are made of voices that are
    not in any set.
    """
    progress = progress or NullProgress()
    if all((folder / f"{name}.wav").is_file() for name in TAPES):
        return

    progress.start("write tapes", len(TAPES), "tapes")
    num_samples = length_s * AUDIO_RATE_HZ
    num_spoken = max(24, 2 * length_s)

    for suffix in ("", "-test"):
        # The tapes of tests have other voices than the tapes of training.
        rng = np.random.default_rng([seed, len(suffix), 77])
        if suffix:
            speech = [_tape_speech(number, rng) for number in range(num_spoken)]
        else:
            sample = rng.permutation(len(training))[:num_spoken]
            speech = [decode_audio(training[number].read_bytes()) for number in sample]

        speech = [_without_silence(samples) for samples in speech]
        for name, mix in (("babble", mix_babble), ("talker", join_talkers)):
            write_atomic(folder / f"{name}{suffix}.wav", encode_wav(mix(speech, num_samples, rng)))
            progress.advance(1)

    progress.finish()


def _tape_speech(number: int, rng: np.random.Generator) -> Floats:
    words = [str(word) for word in rng.permutation(list(WORDS))[:8]]
    voice = TAPE_VOICES[number % len(TAPE_VOICES)]
    rate = int(rng.integers(125, 176))
    return espeak().speak(words, voice=voice, rate=rate, pitch=int(rng.integers(25, 76)), rng=rng).samples


def mix_babble(speech: Sequence[Floats], num_samples: int, rng: np.random.Generator) -> Floats:
    """Return the sum of twelve streams of speech of equal power: (n,) float32 with a peak of 0.9."""
    total = np.zeros(num_samples, np.float32)
    for _ in range(_NUM_STREAMS):
        order = rng.permutation(len(speech))
        stream = np.concatenate([speech[number] for number in order])

        # Rolled, so that the streams do not start their first words together.
        stream = np.resize(np.roll(stream, int(rng.integers(len(stream)))), num_samples)
        total += stream / np.sqrt(np.mean(stream**2))

    scaled: Floats = total * np.float32(0.9 / np.abs(total).max())
    return scaled


def join_talkers(speech: Sequence[Floats], num_samples: int, rng: np.random.Generator) -> Floats:
    """Return pieces of one second, each with one voice and equal power: (n,) float32 with a peak of 0.9."""
    pieces = []
    for number in range(-(-num_samples // AUDIO_RATE_HZ)):
        # Twice a second, so that a short recording also fills a piece.
        samples = np.resize(speech[number % len(speech)], 2 * AUDIO_RATE_HZ)
        first = int(rng.integers(AUDIO_RATE_HZ))
        piece = samples[first : first + AUDIO_RATE_HZ]
        pieces.append(piece / np.sqrt(np.mean(piece**2)))

    tape = np.concatenate(pieces)[:num_samples]
    scaled: Floats = (tape * np.float32(0.9 / np.abs(tape).max())).astype(np.float32)
    return scaled


def _without_silence(samples: Floats) -> Floats:
    loud = np.flatnonzero(np.abs(samples) > 0.01)
    return samples[loud[0] : loud[-1] + 1]
