"""A view of audio: noise from a tape, added before encoding at a signal-to-noise ratio.

embedcache extract … --view pipelines.avsr.noise:open_noise:5,tape=babble.wav
"""

import hashlib
import re
from functools import lru_cache
from pathlib import Path

import numpy as np

from embedcache.arrays import Floats
from embedcache.encoders.views import View
from embedcache.errors import ItemError, PathError, SettingError
from embedcache.files import expand_home, read_file
from embedcache.sources.media import decode_audio

VIEW = "pipelines.avsr.noise:open_noise"
MAX_SNR_DB = 200.0
"""Largest signal-to-noise ratio, and the smallest with a minus sign; float32 resolves 140 dB."""


def open_noise(argument: str) -> View:
    """Open a view of recordings with noise, such as `5,tape=babble.wav` at a signal-to-noise ratio of 5 dB.

    The tape is any recording, such as babble of many talkers or the speech of one. The fingerprint contains its name
    and the digest of its bytes, but not its folder.

    Raises:
        SettingError: not a number of decibels, or a tape that is not a recording or silent.
        PathError: the tape does not exist.
    """
    level_text, separator, tape_path = argument.partition(",tape=")
    try:
        snr_db = float(level_text)
    except ValueError:
        snr_db = np.nan
    if not (separator and tape_path and abs(snr_db) <= MAX_SNR_DB):
        raise SettingError(
            f"invalid view '{VIEW}:{argument}': expected SNR,tape=FILE with the signal-to-noise ratio in decibels "
            f"from -{MAX_SNR_DB:g} to {MAX_SNR_DB:g}, such as 5,tape=babble.wav"
        )

    # Adding 0 turns -0.0 into 0, so that both have one name.
    level = f"{snr_db + 0.0:g}"

    path = expand_home(tape_path).absolute()
    if not path.is_file():
        raise PathError(f"tape {path}: expected a recording, got a path that is not a file")

    tape_M, sha256 = _read_tape(path, path.stat().st_mtime_ns)

    def mix(samples_N: Floats) -> Floats:
        return add_noise(samples_N, tape_M, float(level))

    name = f"{VIEW}:{level},tape={path.name}"
    stem = re.sub(r"[^\w.-]", "-", path.stem)
    return View(
        name=name,
        modality="audio",
        apply=mix,
        fingerprint={"name": name, "tape": sha256},
        label=f"{stem}{level}dB",
        location=f"{VIEW}:{level},tape={path}",
    )


def add_noise(samples_N: Floats, tape_M: Floats, snr_db: float) -> Floats:
    """Add noise from a tape to a recording x: x + n sqrt(Σx² / (10^(SNR/10) Σn²)), (N,) float32.

    The noise n begins at a place in the tape that follows from the recording's own samples, so that it is the same at
    every level and in every run. A shorter tape is repeated, and its silent stretches are skipped. Sums are over the
    whole recording. Nothing is clipped, so at low ratios values exceed 1.

    Raises:
        ItemError: the recording is silent, so that it has no signal-to-noise ratio.
    """
    energy = _energy(samples_N)
    if not energy:
        raise ItemError("silent: noise cannot be added to it at a signal-to-noise ratio")

    # A hash of the samples, because a random start would differ between levels and runs.
    content = hashlib.blake2b(np.ascontiguousarray(samples_N).data, digest_size=8)
    start = int.from_bytes(content.digest(), "little") % len(tape_M)

    noise_N = _play(tape_M, start, len(samples_N))
    # A silent stretch of the tape cannot be scaled to a level; as the tape is not silent, the loop ends.
    while not noise_N.any():
        start = (start + len(samples_N)) % len(tape_M)
        noise_N = _play(tape_M, start, len(samples_N))

    gain = np.sqrt(energy / _energy(noise_N)) * 10 ** (-snr_db / 20)
    noise_N *= np.float32(gain)
    noise_N += samples_N
    return noise_N


def _energy(samples_N: Floats) -> float:
    """Return the sum of squares in float64, without a float64 copy of the samples."""
    return float(np.einsum("n,n->", samples_N, samples_N, dtype=np.float64))


def _play(tape_M: Floats, start: int, num_samples: int) -> Floats:
    """Return a copy of a tape's samples from a place on. The tape starts over when it ends."""
    num_repeats = -(-(start + num_samples) // len(tape_M))
    played_N: Floats = np.tile(tape_M, num_repeats)[start : start + num_samples] if num_repeats > 1 else tape_M[start:]
    return played_N[:num_samples].copy()


@lru_cache(maxsize=4)
def _read_tape(path: Path, mtime_ns: int) -> tuple[Floats, str]:  # noqa: ARG001 - a changed file is read again
    """Return the samples of a tape, read once for all levels, and the SHA-256 of its file."""
    data = read_file(path)
    try:
        samples_N = decode_audio(data)
    except ItemError as error:
        raise SettingError(f"tape {path}: expected a recording: {error}") from error
    if not samples_N.any():
        raise SettingError(f"tape {path}: expected noise, got silence")
    return samples_N, hashlib.sha256(data).hexdigest()
