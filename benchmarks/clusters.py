"""An encoder of numbers for benchmarks: text `17` is vector 17 of a fixed set of vectors in clusters.

The option `width` sets the width, 768 by default.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from embedcache.arrays import Array, Floats
from embedcache.encoders.base import Encoder, Fingerprint, ItemShape, Modality
from embedcache.encoders.open import EncoderSpec, check_options
from embedcache.encoders.settings import EncoderSettings

WIDTH = 768
_CLUSTERS = 2000
_DIRECTIONS = 64
"""Dimensions in which vectors of a cluster differ, as real features do not fill their width."""


def open_clusters(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open the encoder as `benchmarks.clusters:open_clusters`."""
    check_options(spec, ("width",))
    return Clusters(int(spec.options.get("width", WIDTH)))


class Clusters:
    """Encoder with one feature, `vector` (D,)."""

    modality: Modality = "text"
    batch_size = 1024

    def __init__(self, width: int = WIDTH) -> None:
        self.features: Mapping[str, ItemShape] = {"vector": (width,)}
        self._width = width
        weights = hashlib.sha256(f"{_CLUSTERS} {_DIRECTIONS} {width}".encode()).hexdigest()
        self.fingerprint = Fingerprint(
            family="benchmarks.clusters:open_clusters",
            model="clusters",
            revision=None,
            weights=weights,
            preprocessing={},
            pooling={"vector": "one"},
        )

    def prepare(self, items: Sequence[str]) -> list[Array]:
        return [np.array([int(item)], np.int64) for item in items]

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        return {"vector": list(self.vectors(np.concatenate(list(prepared))))}

    def vectors(self, numbers_B: Array) -> Floats:
        """Compute the vectors of some numbers, of length about 1.4: (B,) -> (B, D) float32."""
        centers_CP, directions_RP = self._tables
        out = [np.random.default_rng(int(number)) for number in numbers_B]
        clusters = np.array([rng.integers(_CLUSTERS) for rng in out])
        offsets = np.stack([rng.standard_normal(_DIRECTIONS, np.float32) for rng in out])
        made: Floats = centers_CP[clusters] + offsets @ directions_RP
        return made

    @cached_property
    def _tables(self) -> tuple[Floats, Floats]:
        rng = np.random.default_rng(0)
        width = self._width
        centers_CP = rng.standard_normal((_CLUSTERS, width), np.float32) / np.float32(np.sqrt(width))
        directions_RP = rng.standard_normal((_DIRECTIONS, width), np.float32) / np.float32(np.sqrt(_DIRECTIONS * width))
        return centers_CP, directions_RP
