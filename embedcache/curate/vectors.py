"""Unit vectors of one feature of a cache, plain or projected by a run: what indexes and passes go through."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Array, Floats, Inputs, Ints, blocks, normalize
from embedcache.cache.cache import Cache
from embedcache.cache.side import SideFeature, open_side
from embedcache.errors import DataError
from embedcache.projectors.pair import AlignedPair
from embedcache.projectors.saved import PairConfig, check_feature, load_pair, project

_BLOCK = 256


class Vectors:
    """All valid items of a finished feature as float32 rows of length 1. Can be pickled: it opens again.

    Args:
        cache_path: the cache.
        modality: `image` or `text`.
        feature: `encoder/feature`; None is the run's, or the only one of the modality.
        run_path: project the feature with this run; None takes the plain feature.

    Raises:
        UnknownNameError: no feature is named so, or the name fits several.
        UnfinishedError: the feature has missing chunks.
        FingerprintError: the run was trained on another encoder's features.
        DataError: the plain feature has several vectors an item, or there is no valid item.
    """

    def __init__(
        self,
        cache_path: Path | str,
        modality: str,
        feature: str | None = None,
        run_path: Path | str | None = None,
    ) -> None:
        self._asked = (str(cache_path), modality, feature, None if run_path is None else str(run_path))
        self.cache = Cache(cache_path)
        self.run_path = None if run_path is None else Path(run_path)
        self._pair: AlignedPair | None = None
        self.config: PairConfig | None = None
        if self.run_path is not None:
            self._pair, self.config = load_pair(self.run_path)
        self.side = _open(self.cache, modality, feature, self.config)

    def __reduce__(self) -> tuple[Any, ...]:
        return Vectors, self._asked

    @property
    def modality(self) -> str:
        """`image` or `text`."""
        return self.side.modality

    @property
    def num_chunks(self) -> int:
        """Chunks of the feature."""
        return self.cache.info.num_chunks(self.modality)

    @cached_property
    def rows(self) -> Ints:
        """The items' rows, ascending: (N,)."""
        return np.flatnonzero(self.side.valid)

    @cached_property
    def width(self) -> int:
        """Numbers in a vector."""
        return int(self.read(self.rows[:1]).shape[1])

    def chunk(self, number: int) -> tuple[Ints, Floats]:
        """Read one chunk, checksums compared: rows (B,) and vectors (B, P); both empty where all items failed.

        Raises:
            CorruptError: bytes differ from their checksum.
        """
        rows, inputs = self.side.chunk(number)
        return rows, self._unit(inputs)

    def blocks(self) -> Iterator[tuple[Ints, Floats]]:
        """Go through all chunks in order."""
        for number in range(self.num_chunks):
            yield self.chunk(number)

    def read(self, rows: Ints) -> Floats:
        """Gather rows, in the order asked for: (B, P).

        Raises:
            DataError: a row is out of range or failed.
        """
        return self._unit(self.side.read(rows))

    def sample(self, size: int, *, seed: int = 0) -> Floats:
        """Draw rows at random, or take all where there are no more: (S, P)."""
        return self.read(np.sort(np.random.default_rng(seed).permutation(self.rows)[:size]))

    def _unit(self, inputs: Inputs) -> Floats:
        if self._pair is None:
            return _normalized(inputs.values)
        return project(self._pair.image if self.modality == "image" else self._pair.text, inputs)


def _normalized(values_BD: Array) -> Floats:
    """Do as `normalize`, some rows at a time: whole chunks would take new memory from the system for each step."""
    unit_BD = np.empty(values_BD.shape, np.float32)
    for block in blocks(len(values_BD), _BLOCK):
        unit_BD[block] = normalize(values_BD[block])
    return unit_BD


def _open(cache: Cache, modality: str, name: str | None, config: PairConfig | None) -> SideFeature:
    if name is None and config is not None:
        name = config.side(modality).feature
    side = open_side(cache, modality, name)
    side.require_complete()
    if config is not None:
        check_feature(config, modality, side.name, side.fingerprint)
    elif side.has_tokens:
        raise DataError(
            f"feature {side.name} has several vectors an item; take a vector feature, or a run that takes it"
        )
    if not side.valid.any():
        raise DataError(f"feature {side.name} has no valid item")
    return side
