"""A whole encoder plug-in of both modalities, small enough to read: an image's 4 x 4 colors, a text's letters.

Named `tests.toy:open_toy` on the command line. Option `delay_ms` makes each batch slow, for tests that kill, and
`wait_for` lets each batch of images from the third on wait until a file exists.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL.Image import Image, Resampling

from embedcache.arrays import Array
from embedcache.encoders.base import Encoder, EncoderSettings, Fingerprint, ItemShape, Modality
from embedcache.encoders.open import EncoderSpec, check_options

IMAGE = "tests.toy:open_toy"
TEXT = "tests.toy:open_toy"
_GRID = 4
_LETTERS = 32


def open_toy(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open the toy encoder; option `scale` multiplies what it gives, so that another scale is another encoder."""
    check_options(spec, ("scale", "delay_ms", "wait_for"))
    scale = float(spec.options.get("scale", 1))
    delay_s = float(spec.options.get("delay_ms", 0)) / 1000
    if modality == "image":
        return ToyImages(scale, delay_s, Path(spec.options.get("wait_for", "/")))
    return ToyTexts(scale, delay_s)


def open_other(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """The same under another name: a second encoder in one cache."""
    return open_toy(spec, modality=modality, settings=settings)


def _fingerprint(modality: str, scale: float) -> Fingerprint:
    return Fingerprint(
        family="tests.toy:open_toy",
        model=modality,
        revision=None,
        weights=hashlib.sha256(str(scale).encode()).hexdigest(),
        preprocessing={"grid": _GRID},
        pooling={"cls": "all colours", "patches": "one colour a cell", "mean": "mean of tokens", "tokens": "letters"},
    )


class ToyImages:
    """`cls` (48,), `patches` (16, 3)."""

    modality: Modality = "image"
    features: Mapping[str, ItemShape] = {"cls": (3 * _GRID**2,), "patches": (_GRID**2, 3)}
    batch_size = 8

    def __init__(self, scale: float, delay_s: float, wait_for: Path) -> None:
        self.fingerprint = _fingerprint("image", scale)
        self._scale, self._delay_s, self._wait_for, self._num_batches = scale, delay_s, wait_for, 0

    def prepare(self, items: Sequence[Image]) -> list[Array]:
        return [
            np.asarray(image.resize((_GRID, _GRID), Resampling.BOX), np.float32).transpose(2, 0, 1) for image in items
        ]

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        self._num_batches += 1
        while self._num_batches > 2 and not self._wait_for.exists():
            time.sleep(0.01)
        time.sleep(self._delay_s)
        cells = [self._scale * array.reshape(3, -1).T / 255 for array in prepared]
        outputs = {"cls": [cell.ravel() for cell in cells], "patches": cells}
        return {name: outputs[name] for name in names}


class ToyTexts:
    """`mean` (32,), `tokens` (-1, 32): one row a word."""

    modality: Modality = "text"
    features: Mapping[str, ItemShape] = {"mean": (_LETTERS,), "tokens": (-1, _LETTERS)}
    batch_size = 8

    def __init__(self, scale: float, delay_s: float) -> None:
        self.fingerprint = _fingerprint("text", scale)
        self._scale, self._delay_s = scale, delay_s

    def prepare(self, items: Sequence[str]) -> list[Array]:
        return [np.array([_word(word) for word in text.split()], np.int64) for text in items]

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        time.sleep(self._delay_s)
        tokens = [self._scale * np.stack([_vector(word) for word in words]) for words in prepared]
        outputs = {"mean": [token.mean(axis=0) for token in tokens], "tokens": tokens}
        return {name: outputs[name] for name in names}


def _word(word: str) -> int:
    return int.from_bytes(hashlib.sha256(word.lower().encode()).digest()[:4], "big")


def _vector(word: int) -> Array:
    return np.random.default_rng(word).standard_normal(_LETTERS).astype(np.float32)
