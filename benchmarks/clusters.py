"""An encoder of numbers: text `17` is the seventeenth of many 768-wide vectors in clusters, everywhere the same."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from embedcache.arrays import Array, Floats
from embedcache.encoders.contract import Encoder, EncoderSettings, Fingerprint, Modality
from embedcache.encoders.open import EncoderSpec
from embedcache.encoders.shapes import ItemShape

WIDTH = 768
_CLUSTERS = 2000
_DIRECTIONS = 64
"""Within a cluster vectors differ in so many directions: real features do not fill their width."""


def open_clusters(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open it as `benchmarks.clusters:open_clusters`."""
    return Clusters()


class Clusters:
    """`vector` (768,)."""

    modality: Modality = "text"
    features: Mapping[str, ItemShape] = {"vector": (WIDTH,)}
    batch_size = 1024

    def __init__(self) -> None:
        weights = hashlib.sha256(f"{_CLUSTERS} {_DIRECTIONS}".encode()).hexdigest()
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
        """Give the vectors of some numbers, of about length 1.4: (B,) -> (B, 768) float32."""
        centres_CP, directions_RP = self._tables
        out = [np.random.default_rng(int(number)) for number in numbers_B]
        clusters = np.array([rng.integers(_CLUSTERS) for rng in out])
        offsets = np.stack([rng.standard_normal(_DIRECTIONS, np.float32) for rng in out])
        made: Floats = centres_CP[clusters] + offsets @ directions_RP
        return made

    @cached_property
    def _tables(self) -> tuple[Floats, Floats]:
        rng = np.random.default_rng(0)
        centres_CP = rng.standard_normal((_CLUSTERS, WIDTH), np.float32) / np.float32(np.sqrt(WIDTH))
        directions_RP = rng.standard_normal((_DIRECTIONS, WIDTH), np.float32) / np.float32(np.sqrt(_DIRECTIONS * WIDTH))
        return centres_CP, directions_RP
