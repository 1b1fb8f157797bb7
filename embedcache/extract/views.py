"""Views: items altered before encoding, by `crop:0.5`, `flip`, `noise:5,tape=babble.wav` or your own `my_module:blur`.

A view is a deterministic function from one item, as its decoder returns it, to another of the same modality. Its
features are stored in a folder of their own, `encoder@view`.
"""

import hashlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image, Transpose

from embedcache.arrays import Floats
from embedcache.encoders.base import Modality
from embedcache.errors import ItemError, PathError, SettingError
from embedcache.files import expand_home, read_file
from embedcache.modalities import MODALITIES
from embedcache.provenance import check_same, digest
from embedcache.registry import Registry, names_from
from embedcache.sources.sound import decode_audio

VIEWS = Registry(
    "view",
    {
        "crop": "embedcache.extract.views:open_crop",
        "flip": "embedcache.extract.views:open_flip",
        "noise": "embedcache.extract.views:open_noise",
    },
    group="embedcache.views",
    arguments=1,
)
"""Each is a function of the text after the colon that returns a `View`."""

MAX_SNR_DB = 200.0
"""Largest signal-to-noise ratio, and with a minus the smallest: float32 resolves 140 dB."""


@dataclass(frozen=True, kw_only=True)
class View:
    """One way to alter items.

    Args:
        name: name that opens it in the folder where its files are; no more than the names of these files.
        modality: modality of the items.
        apply: alters one item; called from many threads at once. An `ItemError` is the reason why an item fails.
        fingerprint: everything that decides its output, as JSON values; part of the features' fingerprint.
        label: short name in that of the encoder's folder; empty: the name.
        location: name that opens it from any folder, with the paths of its files; empty: the name does.
    """

    name: str
    modality: Modality
    apply: Callable[[Any], Any]
    fingerprint: Mapping[str, Any]
    label: str = ""
    location: str = ""

    @property
    def suffix(self) -> str:
        """Suffix of the encoder's folder."""
        return "@" + re.sub(r"[^\w.=+-]", "-", self.label or self.name)


def open_view(name: str) -> View:
    """Open a view by `name[:argument]`, or by `module:attribute` of a function.

    A user's function takes images, unless it has an attribute `modality` that names another one.

    Raises:
        UnknownNameError: there is no such view.
        SettingError: the argument is invalid.
        PathError: a file that the view needs does not exist.
    """
    kind, _, argument = name.partition(":")
    if kind in VIEWS:
        view: View = VIEWS.load(kind)(argument)
        return view
    apply = VIEWS.load(name)
    modality = getattr(apply, "modality", "image")
    if modality not in MODALITIES:
        raise SettingError(
            f"view {name}: expected its attribute modality to be one of {', '.join(MODALITIES)}, got {modality!r}"
        )
    return View(
        name=name,
        modality=MODALITIES[modality].name,
        apply=apply,
        fingerprint={"name": name, "code": _source_digest(apply)},
    )


def reopen_view(fingerprint: Mapping[str, Any], location: str = "") -> View:
    """Open the view that a fingerprint records; a file that is no longer there is looked for in the current folder.

    The caller compares the fingerprints.

    Raises:
        PathError: the file is in neither.
    """
    name, found = fingerprint["name"], []
    for place in dict.fromkeys((location or name, name)):
        try:
            with names_from("the cache"):
                return open_view(place)
        except PathError as error:
            found.append(str(error))
    raise PathError(f"{found[0]}; put it back, or run this in the folder where it is")


def reopen_recorded_view(feature: str, fingerprint: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return the view that a feature's fingerprint records, as a function of an item; without one, the identity.

    Raises:
        FingerprintError: the view is no longer the same.
        PathError: a file of it no longer exists.
    """
    expected = fingerprint.get("view")
    if expected is None:
        return lambda item: item
    view = reopen_view(expected)
    next_step = "restore the function, or extract again"
    check_same(f"the view of feature {feature}", expected, view.fingerprint, next_step=next_step)
    return view.apply


def open_crop(argument: str) -> View:
    """Open a center crop: `crop:0.5` keeps half of the width and half of the height."""
    try:
        fraction = float(argument)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise SettingError(f"invalid view 'crop:{argument}': expected crop:S with 0 < S <= 1, such as crop:0.5")

    def crop(image: Image) -> Image:
        width, height = (max(1, round(side * fraction)) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))

    name = f"crop:{argument}"
    return View(name=name, modality="image", apply=crop, fingerprint={"name": name})


def open_flip(argument: str) -> View:
    """Open a horizontal flip."""
    if argument:
        raise SettingError(f"invalid view 'flip:{argument}': expected flip without an argument, got {argument!r}")

    def flip(image: Image) -> Image:
        return image.transpose(Transpose.FLIP_LEFT_RIGHT)

    return View(name="flip", modality="image", apply=flip, fingerprint={"name": "flip"})


def open_noise(argument: str) -> View:
    """Open a view of recordings with noise: `noise:5,tape=babble.wav` adds it at a signal-to-noise ratio of 5 dB.

    The tape is any recording, such as babble of many talkers or the speech of one. Its name and the digest of its bytes
    are in the fingerprint, the folder where it lies is not.

    Raises:
        SettingError: no number of decibels, or a tape that is no recording or silent.
        PathError: the tape does not exist.
    """
    given, separator, tape_path = argument.partition(",tape=")
    try:
        snr_db = float(given)
    except ValueError:
        snr_db = np.nan
    if not (separator and tape_path and abs(snr_db) <= MAX_SNR_DB):
        raise SettingError(
            f"invalid view 'noise:{argument}': expected noise:SNR,tape=FILE with the signal-to-noise ratio in decibels "
            f"from -{MAX_SNR_DB:g} to {MAX_SNR_DB:g}, such as noise:5,tape=babble.wav"
        )
    level = f"{snr_db + 0.0:g}"  # of -0.0 makes 0
    path = expand_home(tape_path).absolute()
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "does not exist"
        raise PathError(f"tape {path} of the view noise:{level}: expected a recording, got a path that {state}")
    stat = path.stat()
    tape = _read_tape(path, stat.st_mtime_ns, stat.st_size)

    def mix(samples_N: Floats) -> Floats:
        return add_noise(samples_N, tape.samples_N, float(level))

    name, stem = f"noise:{level},tape={path.name}", re.sub(r"[^\w.-]", "-", path.stem)
    return View(
        name=name,
        modality="audio",
        apply=mix,
        fingerprint={"name": name, "tape": tape.sha256},
        label=f"{stem}{level}dB",
        location=f"noise:{level},tape={path}",
    )


def add_noise(samples_N: Floats, tape_M: Floats, snr_db: float) -> Floats:
    """Add noise from a tape to a recording x: x + n sqrt(Σx² / (10^(SNR/10) Σn²)), (N,) float32.

    Where the noise n begins in the tape follows from the recording's own samples, so that it is the same at every level
    and on every run. A shorter tape is repeated, without its silent stretches. Sums are over the whole recording.
    Nothing is clipped: at low ratios values exceed 1.

    Raises:
        ItemError: the recording is silent, so that it has no signal-to-noise ratio.
    """
    energy = _energy(samples_N)
    if not energy:
        raise ItemError("silent: noise cannot be added to it at a signal-to-noise ratio")
    content = hashlib.blake2b(np.ascontiguousarray(samples_N).data, digest_size=8)
    start = int.from_bytes(content.digest(), "little") % len(tape_M)
    noise_N = _play(tape_M, start, len(samples_N))
    while not noise_N.any():  # ends: the tape is not silent
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
    """Return a copy of a tape's samples from some place on, from its beginning again when it ends."""
    played_N: Floats = np.empty(num_samples, tape_M.dtype)
    num_played = 0
    while num_played < num_samples:
        piece = tape_M[start : start + num_samples - num_played]
        played_N[num_played : num_played + len(piece)] = piece
        start, num_played = 0, num_played + len(piece)
    return played_N


@dataclass(frozen=True, kw_only=True)
class _Tape:
    samples_N: Floats
    sha256: str


@lru_cache(maxsize=4)
def _read_tape(path: Path, mtime_ns: int, size: int) -> _Tape:  # noqa: ARG001 - a changed file is read again
    """Read a tape, once for all levels."""
    data = read_file(path)
    try:
        samples_N = decode_audio(data)
    except ItemError as error:
        raise SettingError(f"tape {path}: expected a recording: {error}") from error
    if not samples_N.any():
        raise SettingError(f"tape {path}: expected noise, got silence")
    return _Tape(samples_N=samples_N, sha256=hashlib.sha256(data).hexdigest())


def _source_digest(function: Callable[[Any], Any]) -> str | None:
    """Return a digest of a function's source code, so that a changed function is another view."""
    try:
        return digest(inspect.getsource(function))
    except (OSError, TypeError):
        return None
