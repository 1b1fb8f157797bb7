"""What people ask an index with, as vectors of its space."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL.Image import Image

from embedcache.arrays import Array, Floats, Inputs, blocks, check_finite, normalize
from embedcache.dataset.inputs import inputs_of
from embedcache.encoders.base import Encoder, Modality
from embedcache.encoders.open import feature_names, reopen_encoder
from embedcache.errors import CorruptError, DataError, FingerprintError, PathError, SettingError, UnknownNameError
from embedcache.projectors.pair import AlignedPair
from embedcache.projectors.saved import PairConfig, TowerInput, load_pair, project
from embedcache.registry import unknown_name
from embedcache.search.concepts import open_concepts
from embedcache.search.index import IndexCard
from embedcache.search.vectors import Vectors
from embedcache.sources.images import decode_image
from embedcache.store.cache import Cache


@dataclass(frozen=True, kw_only=True)
class Queries:
    """What to ask for; the answers come in this order.

    Args:
        texts: each is encoded.
        images: files, or RGB pictures as `decode_image` gives them; each is encoded.
        keys: of samples of the index's cache: the vector of its first item of the index's modality.
        rows: of items of the index's modality: its vector.
        concepts: names in `concept_cache`: the mean of the vectors of its prompts.
        concept_cache: a cache of prompts: a sample a concept, named by its column `class`, else by its key.
        vectors: (Q, P) of any float type, in the space of the index.
    """

    texts: Sequence[str] = ()
    images: Sequence[Path | Image] = ()
    keys: Sequence[str] = ()
    rows: Sequence[int] = ()
    concepts: Sequence[str] = ()
    concept_cache: Path | str | None = None
    vectors: Array | None = None

    def __post_init__(self) -> None:
        if self.concepts and self.concept_cache is None:
            raise SettingError("a concept is named, but no cache of prompts that has it; give it with --concepts CACHE")
        if any(not text.strip() for text in self.texts):
            raise DataError("a query is empty; give some words")
        if not self.names:
            raise SettingError("no query; give at least one text, image, key, row, concept or vector")

    @property
    def names(self) -> list[str]:
        """Name each query: its text, path, key or concept, or the number of its picture, row or vector."""
        images = [str(one) if isinstance(one, Path) else f"picture {number}" for number, one in enumerate(self.images)]
        rows = [f"row {row}" for row in self.rows]
        vectors = [f"vector {row}" for row in range(0 if self.vectors is None else len(self.vectors))]
        return [*self.texts, *images, *self.keys, *rows, *self.concepts, *vectors]


class QueryEncoder:
    """Turns queries into vectors of an index's space. Each encoder is opened once, when it is first needed.

    Args:
        card: of the index.
        cache: that it was made from.
        run_path: the run that projected it; None for a plain feature.
        device: where encoders run.

    Raises:
        FingerprintError: the run is not the one that the index was made from.
    """

    def __init__(self, card: IndexCard, cache: Cache, run_path: Path | None, device: str) -> None:
        self._card, self._cache, self._run_path, self._device = card, cache, run_path, device
        self._run: tuple[AlignedPair, PairConfig] | None = None
        self._encoders: dict[Modality, Encoder] = {}
        if card.run is None and run_path is not None:
            raise FingerprintError(
                f"the index was made from the plain feature {card.feature}, not from run {run_path}; leave --run out"
            )
        if run_path is not None:
            self._run = load_pair(run_path)
            _check_run(card, self._run[1], run_path)

    @cached_property
    def indexed(self) -> Vectors:
        """The very vectors that were indexed."""
        return Vectors(self._cache.path, self._card.modality, self._card.feature, self._run_path)

    @property
    def config(self) -> PairConfig | None:
        """What the run says of itself; None without one."""
        return None if self._run is None else self._run[1]

    def takes(self, modality: Modality) -> bool:
        """Say whether items of a modality can be compared with the index."""
        return self._run is not None or self._card.modality == modality

    def encoder(self, modality: Modality) -> Encoder:
        """Get the encoder of a modality.

        Raises:
            DataError: the index cannot be compared with such items.
            FingerprintError: the encoder that opens now is not the one that made the feature.
        """
        if modality not in self._encoders:
            self._require(modality)
            side = self._side(modality)
            self._encoders[modality] = reopen_encoder(
                side.spec,
                modality=modality,
                feature=side.feature,
                fingerprint=side.fingerprint,
                device=self._device,
            )
        return self._encoders[modality]

    def has_row(self, row: int) -> bool:
        """Say whether an item is among those that were indexed."""
        rows = self.indexed.rows
        place = int(np.searchsorted(rows, row))
        return place < len(rows) and bool(rows[place] == row)

    def vectors(self, queries: Queries) -> Floats:
        """Get a vector a query: (Q, P) float32, rows of length 1.

        Raises:
            DataError: the index cannot be compared with such queries.
            UnknownNameError: a key, a row or a concept that is not there.
            FingerprintError: an encoder that opens now is not the one that made the feature.
        """
        parts = [np.empty((0, self._card.width), np.float32)]
        if queries.texts:
            parts.append(self._encoded("text", queries.texts))
        if queries.images:
            parts.append(self._encoded("image", [_decoded(image) for image in queries.images]))
        if queries.keys:
            parts.append(self._of_keys(queries.keys))
        if queries.rows:
            parts.append(self._of_rows(queries.rows))
        if queries.concepts and queries.concept_cache is not None:
            parts.append(self._of_concepts(queries.concepts, queries.concept_cache))
        if queries.vectors is not None:
            parts.append(self._given(queries.vectors))
        return np.concatenate(parts)

    def _encoded(self, modality: Modality, items: Sequence[Any]) -> Floats:
        encoder = self.encoder(modality)
        names, out = feature_names(self._side(modality).feature), []
        for part in blocks(len(items), encoder.batch_size):
            encoded = encoder.encode(encoder.prepare(list(items[part])), names)
            out.append(self._unit(modality, inputs_of([encoded[name] for name in names])))
        return np.concatenate(out)

    def _side(self, modality: Modality) -> TowerInput | IndexCard:
        return self._card if self._run is None else self._run[1].tower_input(modality)

    def _unit(self, modality: Modality, inputs: Inputs) -> Floats:
        if self._run is None:
            return normalize(inputs.values)
        pair, _ = self._run
        return project(pair.image if modality == "image" else pair.text, inputs)

    def _require(self, modality: Modality) -> None:
        if not self.takes(modality):
            raise DataError(
                f"the index holds the plain {self._card.modality} feature {self._card.feature}, which no {modality} "
                "can be compared with; build one with: embedcache curate index CACHE INDEX --run RUN"
            )

    def _of_keys(self, keys: Sequence[str]) -> Floats:
        samples = pc.index_in(pa.array(keys), value_set=self._cache.samples["key"].combine_chunks()).to_pylist()
        for key, sample in zip(keys, samples, strict=True):
            if sample is None:
                first = self._cache.samples["key"][0].as_py()
                raise UnknownNameError(f"no sample of {self._cache.path} has the key {key!r}; the first has {first!r}")
        rows = self.indexed.rows
        of_sample = self._cache.items(self._card.modality)["sample"].to_numpy()[rows]
        found = np.searchsorted(of_sample, samples)
        for key, sample, place in zip(keys, samples, found, strict=True):
            if place == len(rows) or of_sample[place] != sample:
                raise DataError(f"sample {key!r} has no {self._card.modality} with the feature {self._card.feature}")
        return self.indexed.read(rows[found])

    def _of_rows(self, rows: Sequence[int]) -> Floats:
        for row in rows:
            if not self.has_row(row):
                raise UnknownNameError(f"no {self._card.modality} with the feature {self._card.feature} has row {row}")
        return self.indexed.read(np.array(rows, np.int64))

    def _of_concepts(self, names: Sequence[str], path: Path | str) -> Floats:
        concepts = open_concepts(Cache(path), self.indexed)
        for name in names:
            if name not in concepts.names:
                raise unknown_name(f"concept in {path}", name, concepts.names)
        return concepts.vectors[[concepts.names.index(name) for name in names]]

    def _given(self, vectors_QP: Array) -> Floats:
        if vectors_QP.ndim != 2 or vectors_QP.shape[1] != self._card.width:
            raise DataError(
                f"the vectors to ask with have the shape {vectors_QP.shape}; the index has width {self._card.width}, "
                f"so they must be (Q, {self._card.width})"
            )
        check_finite(vectors_QP, "the array of vectors to ask with")
        return normalize(vectors_QP)


def read_vectors(path: Path) -> Array:
    """Read the array of a `.npy` file.

    Raises:
        PathError: it does not exist.
        CorruptError: it is no `.npy` file of numbers.
    """
    if not path.is_file():
        raise PathError(f"{path} does not exist; give a .npy file of vectors, a row a query")
    try:
        found = np.load(path, allow_pickle=False)
        values: Array = np.asarray(found, np.float32)
    except (ValueError, EOFError, OSError, TypeError) as error:
        raise CorruptError(f"{path} is no .npy file of numbers: {error}") from error
    return values


def _check_run(card: IndexCard, config: PairConfig, run_path: Path) -> None:
    if config.weights_digest != card.run_weights:
        raise FingerprintError(
            f"the index was made from another run than {run_path}: "
            f"weights {card.run_weights} there, {config.weights_digest} here; "
            "build the index again with: embedcache curate index CACHE INDEX --run RUN"
        )


def _decoded(image: Path | Image) -> Image:
    if not isinstance(image, Path):
        return image
    if not image.is_file():
        raise PathError(f"image {image} does not exist")
    return decode_image(image.read_bytes())
