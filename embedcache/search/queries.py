"""Queries of an index, and their vectors in its space."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import (
    Array,
    Floats,
    Inputs,
    Ints,
    check_finite,
    concatenated_ranges,
    normalize,
    read_npy,
    to_numbers,
    to_rows,
)
from embedcache.dataset.inputs import to_inputs
from embedcache.dataset.raw_items import ItemLike, item_name, list_items, prepare_item
from embedcache.dataset.vectors import Vectors
from embedcache.encoders.base import Modality, background_of
from embedcache.encoders.open import EncoderSpec, why_no_encoder
from embedcache.encoders.views import FeatureEncoder, open_feature_encoder
from embedcache.errors import DataError, FingerprintError, PathError, SettingError, UnknownNameError
from embedcache.files import AnyPath
from embedcache.modalities import FILE_MODALITIES, MODALITIES, list_texts, noun
from embedcache.progress import Progress
from embedcache.projectors.base import project
from embedcache.provenance import check_same
from embedcache.registry import unknown_name
from embedcache.runs import TOWERS, Run, RunInput
from embedcache.search.concepts import open_concepts
from embedcache.search.faiss_index import IndexCard, RowIndex
from embedcache.sources.images import ImageLike
from embedcache.store.cache import Cache, RowReader, find_keys

_IN_FILES = tuple(modality.name for modality in FILE_MODALITIES)


@dataclass(frozen=True, kw_only=True)
class Queries:
    """Queries of one search. Results come in the order of the arguments below.

    Args:
        texts: one text or several, to encode.
        images: one image or several, to encode: paths, bytes of files, or open PIL images.
        items: modality -> one item or several of any modality, to encode, such as paths of audio. See `ItemLike`.
        keys: keys of samples in the index's cache: the stored vector of the first item of the index's modality.
        rows: rows of items of the index's modality: the stored vector.
        concepts: names in `concept_cache`: the mean vector of the prompts of each.
        concept_cache: cache of prompts, one sample per concept, named by its column `class`, else by its key. Or a
            `.txt` of names, which are encoded once.
        vectors: (Q, P) or (P,) of any float type, an array or a tensor, in the space of the index.

    Raises:
        DataError: a text, image, item, key, row, concept or vector is of another type, or a text is empty.
        UnknownNameError: there is no such modality.
        SettingError: there is no query, or there are concepts without their cache.

    Example:
        >>> queries = Queries(texts="yellow bar right on black", keys="00003", rows=[5])
        >>> queries.names
        ['yellow bar right on black', '00003', 'row 5']
        >>> [hits[0].key for hits in embedcache.search_index("index", queries, k=1)]
        ['00000', '00003', '00005']
    """

    texts: Sequence[str] = ()
    images: ImageLike | Sequence[ImageLike] = ()
    items: Mapping[str, ItemLike | Sequence[ItemLike]] = field(default_factory=dict)
    keys: Sequence[str] = ()
    rows: Sequence[int] = ()
    concepts: Sequence[str] = ()
    concept_cache: Path | str | None = None
    vectors: Any = None

    def __post_init__(self) -> None:
        for name in ("texts", "keys", "concepts"):
            object.__setattr__(self, name, list_texts(getattr(self, name), name))
        for name in self.items:
            if name not in _IN_FILES:
                raise unknown_name("modality of items in files", name, _IN_FILES)
        object.__setattr__(self, "images", list_items(self.images))
        object.__setattr__(self, "items", {name: list_items(items) for name, items in self.items.items()})
        object.__setattr__(self, "rows", tuple(to_rows(self.rows).tolist()))
        if self.vectors is not None:
            object.__setattr__(self, "vectors", to_numbers(self.vectors, "vectors"))
        if self.concepts and self.concept_cache is None:
            raise SettingError(
                f"concept {self.concepts[0]!r}: expected a list of concepts, got none; give --concepts with a .txt of "
                "names, one per line"
            )
        if any(not text.strip() for text in self.texts):
            raise DataError("expected words in each query text, got an empty text")
        if not self.names:
            raise SettingError("query: expected at least one text, image, item, key, row, concept or vector, got none")

    @property
    def named_items(self) -> dict[str, list[tuple[str, ItemLike]]]:
        """The items to encode by modality, images first, each with its name."""
        listed = {"image": [*list_items(self.images), *list_items(self.items.get("image", ()))]}
        listed |= {modality: list_items(items) for modality, items in self.items.items() if modality != "image"}
        return {
            modality: [(item_name(item, modality, number), item) for number, item in enumerate(items)]
            for modality, items in listed.items()
        }

    @property
    def names(self) -> list[str]:
        """A name of each query: its text, path, key or concept, or the number of its item, row or vector."""
        items = [name for named in self.named_items.values() for name, _ in named]
        rows = [f"row {row}" for row in self.rows]
        vectors = [f"vector {row}" for row in range(0 if self.vectors is None else len(np.atleast_2d(self.vectors)))]
        return [*self.texts, *items, *self.keys, *rows, *self.concepts, *vectors]


class QueryEncoder:
    """Encodes queries into an index's vector space. The run and each encoder are opened once, when first needed.

    Raises `FingerprintError` if the run is not the one that the index was built with, or if the adapter maps into
    another space.
    """

    def __init__(
        self,
        index: RowIndex,
        card: IndexCard,
        cache: Cache,
        run_path: Path | None,
        device: str,
        *,
        adapter: AnyPath | None = None,
    ) -> None:
        self._index, self._card, self._cache, self._run_path, self._device = index, card, cache, run_path, device
        self.run: Run | None = None
        self._encoders: dict[Modality, FeatureEncoder] = {}
        if card.run is None and run_path is not None:
            raise FingerprintError(
                f"run: expected none for an index of the plain feature {card.feature}, got {run_path}; leave --run out"
            )
        if run_path is not None:
            self.run = Run.open(run_path, kind=TOWERS)
            weights = self.run.info.weights
            if weights != card.run_weights:
                raise FingerprintError(
                    f"run {run_path}: expected the weights of the index, {card.run_weights}, got {weights}; give the "
                    "run of the index, or build the index again: embedcache curate index CACHE INDEX --run RUN"
                )

        self._adapter = None if adapter is None else _open_adapter(Path(adapter), card)

    @cached_property
    def indexed(self) -> Vectors:
        """The vectors that were indexed."""
        card = self._card
        return Vectors(
            self._cache.path,
            card.modality,
            card.feature,
            self._run_path,
            width=card.width,
            device=self._device,
            on_demand=True,
        )

    def rejection(self, modality: Modality) -> str | None:
        """Return why items of a modality cannot be compared with the index; None if they can."""
        own = self._card.modality
        if self.run is None and modality != own:
            option = "" if own == "image" else f" --modality {own}"
            return (
                f"expected an index built with a run, got one of the plain {own} feature {self._card.feature}; "
                f"build one with: embedcache curate index CACHE INDEX --run RUN{option}"
            )
        run = self._run_of(modality)
        if run is not None and modality not in run.modalities:
            return f"expected one of the modalities of the run, {' and '.join(run.modalities)}"
        spec = EncoderSpec.parse(self._tower_input(modality).spec)
        return why_no_encoder(spec, modality, next_step="search with --query-key or --query-vectors")

    def encoder(self, modality: Modality) -> FeatureEncoder:
        """Return the encoder of a modality, which must be the one that made the feature."""
        if modality not in self._encoders:
            rejection = self.rejection(modality)
            if rejection is not None:
                raise DataError(f"{modality} query: {rejection}")
            source = self._tower_input(modality)
            if (run := self._run_of(modality)) is not None:
                run.load()  # a damaged run is refused first
            self._encoders[modality] = open_feature_encoder(
                source.spec,
                modality=modality,
                feature=source.feature,
                fingerprint=source.fingerprint,
                device=self._device,
            )
        return self._encoders[modality]

    @property
    def background(self) -> str:
        """Color onto which transparent query images are composited, as the indexed ones were."""
        return background_of(self._tower_input("image").fingerprint.get("preprocessing"))

    def has_row(self, row: int) -> bool:
        """Return whether an item is in the index."""
        return bool(self.indexed.has(np.array([row]))[0])

    def encode(self, queries: Queries, *, progress: Progress | None = None) -> Floats:
        """Compute one vector per query: (Q, P) float32, rows of length 1; of a view's feature, through that view.

        Raises `DataError` for queries that cannot be compared with the index, `UnknownNameError` for a key, row or
        concept that does not exist, and `FingerprintError` for an encoder that did not make the feature.
        """
        parts = [np.empty((0, self._card.width), np.float32)]
        if queries.texts:
            parts.append(self.encode_texts(queries.texts))
        for modality, items in queries.named_items.items():
            if items:
                parts.append(self.encode_items(MODALITIES[modality].name, items))
        if queries.keys:
            parts.append(self._read_keys(queries.keys))
        if queries.rows:
            parts.append(self.read_rows(queries.rows))
        if queries.concepts and queries.concept_cache is not None:
            parts.append(self._read_concepts(queries.concepts, queries.concept_cache, progress))
        if queries.vectors is not None:
            parts.append(self._check_vectors(np.atleast_2d(queries.vectors)))
        return np.concatenate(parts)

    def encode_texts(self, texts: Sequence[str]) -> Floats:
        """Compute one vector per text; see `encode`."""
        encoder = self.encoder("text")
        stripped = [text.strip() for text in texts]  # as captions are
        return self._encode_batches("text", len(stripped), lambda rows: encoder.prepare(stripped[rows]))

    def encode_items(self, modality: Modality, named: Sequence[tuple[str, ItemLike]]) -> Floats:
        """Compute one vector per item, in a file or decoded, with its name; see `encode`."""
        encoder = self.encoder(modality)
        return self._encode_batches(
            modality, len(named), lambda rows: [prepare_item(item, name, encoder) for name, item in named[rows]]
        )

    def _encode_batches(self, modality: Modality, count: int, prepare: Callable[[slice], list[Array]]) -> Floats:
        batches = self.encoder(modality).batches(count, prepare)
        parts = [self._project(modality, to_inputs(values)) for values in batches]
        return np.concatenate([np.empty((0, self._card.width), np.float32), *parts])

    def _run_of(self, modality: Modality) -> Run | None:
        """Return the run that projects queries of a modality: the adapter, if it has a tower for it."""
        is_adapted = self._adapter is not None and modality in self._adapter.modalities
        return self._adapter if is_adapted else self.run

    def _tower_input(self, modality: Modality) -> RunInput | IndexCard:
        run = self._run_of(modality)
        return self._card if run is None else run.input(modality)

    def _project(self, modality: Modality, inputs: Inputs) -> Floats:
        run = self._run_of(modality)
        if run is None:
            return normalize(inputs.values[:, : self._card.width])
        return project(run.pair.tower(modality), inputs, width=self._card.width)

    def _read_keys(self, keys: Sequence[str]) -> Floats:
        samples = find_keys(self._cache, keys)
        for key, sample in zip(keys, samples.tolist(), strict=True):
            if sample < 0:
                raise UnknownNameError(
                    f"query_key: expected a key of the cache {self._cache.path}, such as {self._cache.key(0)!r}, got "
                    f"{key!r}"
                )
        owners, rows = concatenated_ranges(*RowReader(self._cache, self._card.modality).find(samples))
        is_indexed = self.indexed.has(rows)
        found, first = np.unique(owners[is_indexed], return_index=True)
        if len(found) < len(keys):
            without = np.setdiff1d(np.arange(len(keys)), found)[0]
            raise DataError(
                f"query_key: expected a sample with {noun(self._card.modality)} of {self._card.feature}, got "
                f"{keys[without]!r}, which has none"
            )
        return self._read_items(rows[is_indexed][first])

    def read_rows(self, rows: Sequence[int]) -> Floats:
        """Read the vectors of indexed items; see `encode`."""
        for row in rows:
            if not self.has_row(row):
                raise UnknownNameError(
                    f"row: expected the row of an indexed {self._card.modality} of {self._card.feature}, got {row}"
                )
        return self._read_items(np.array(rows, np.int64))

    def _read_items(self, rows: Ints) -> Floats:
        """Read indexed vectors: from the index if it holds them in full, so that no run is opened, else the feature."""
        stored = self._index.read(rows)
        return self.indexed.read(rows) if stored is None else stored

    def _read_concepts(self, names: Sequence[str], path: Path | str, progress: Progress | None) -> Floats:
        concepts = open_concepts(path, self.indexed, progress=progress)
        for name in names:
            if name not in concepts.names:
                raise unknown_name("concept", name, concepts.names, where=f"in {path}")
        return concepts.vectors[[concepts.names.index(name) for name in names]]

    def _check_vectors(self, vectors_QP: Array) -> Floats:
        if vectors_QP.ndim != 2 or vectors_QP.shape[1] != self._card.width:
            raise DataError(
                f"query vectors: expected shape (Q, {self._card.width}), got {vectors_QP.shape}; project vectors of a "
                'feature first: embedcache.load(RUN).project(vectors, "image")'
            )
        check_finite(vectors_QP, "the array of query vectors")
        is_zero = ~vectors_QP.any(axis=1)
        if is_zero.any():
            raise DataError(f"query vectors: expected rows with a direction, got zeros in row {is_zero.argmax()}")
        return normalize(vectors_QP)


def _open_adapter(path: Path, card: IndexCard) -> Run:
    """Open an adapter that maps into the space of an index, or raise a `FingerprintError`."""
    adapter = Run.open(path, kind=TOWERS)
    target = adapter.info.settings.get("target", {})
    own = {"feature": card.feature, "fingerprint": card.fingerprint}
    space = own if card.run is None else {"feature": card.feature, "weights": card.run_weights}
    next_step = f"fit one: embedcache adapt CACHE ADAPTER --feature NEW --target {card.run or card.feature}"
    if target.keys() != space.keys():
        kind = "a run of train" if not target else "one onto a run" if "weights" in target else "one onto a feature"
        expected = f"onto the run {card.run}" if card.run else f"onto the plain feature {card.feature}"
        raise FingerprintError(f"adapter {path}: expected one {expected} of the index, got {kind}; {next_step}")
    check_same(f"the target of adapter {path}", target, space, next_step=next_step)
    return adapter


def read_vectors(path: Path) -> Array:
    """Read query vectors in float32 from a `.npy` file; `CorruptError` if they are no numbers."""
    if not path.is_file():
        raise PathError(f"expected a .npy file of query vectors, got {path}, which does not exist; check the path")
    return read_npy(path).astype(np.float32)
