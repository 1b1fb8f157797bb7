"""Input features: one stored feature of an encoder, or its vector and tokens read as one sequence."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from embedcache.arrays import Array, Bools, Floats, Inputs, Ints, concatenated_ranges, distinct, normalize
from embedcache.errors import AmbiguousNameError, DataError, SettingError, UnknownNameError
from embedcache.files import one_or_many
from embedcache.modalities import MODALITIES, noun, split_modality
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import check_same
from embedcache.registry import unknown_name
from embedcache.store.cache import Cache
from embedcache.store.commits import Commit
from embedcache.store.feature import Feature
from embedcache.store.tables import Column, is_none

Names: TypeAlias = str | Sequence[str]
"""A feature, or several of one encoder."""
NamedFeatures: TypeAlias = Mapping[str, Names | None] | Names | None
"""Modality -> features; or features as `encoder/feature` or `modality=encoder/feature`."""

PLAIN = "plain"
"""Name of the view that is the named feature itself."""

Reader: TypeAlias = Callable[[Ints], Inputs]
"""Gathers rows of an input feature: (B,) int64 -> the inputs of a projector."""


class InputFeature:
    """One or more features of one encoder over the items of a modality. Several features are concatenated as tokens.

    Args:
        features: features of one encoder and one width. In `dinov2/cls+dinov2/patches` the vector comes first.

    Raises:
        DataError: the features have different encoders or widths.
    """

    def __init__(self, features: Sequence[Feature]) -> None:
        first = features[0]
        for other in features[1:]:
            if other.group.name != first.group.name or other.item_shape[-1] != first.item_shape[-1]:
                raise DataError(
                    f"expected features of one encoder and one width, got {first.name} of width "
                    f"{first.item_shape[-1]} and {other.name} of width {other.item_shape[-1]}; embedcache adapt maps "
                    "one encoder's feature onto another's"
                )

        self._features = list(features)
        self.name = "+".join(feature.name for feature in features)
        self.group = first.group
        self.modality = first.modality
        self.num_items = first.num_items
        self.width = first.item_shape[-1]
        self.spec = first.group.spec
        self.fingerprint: Mapping[str, Any] = first.fingerprint

    @property
    def hashes(self) -> Column[bytes | None]:
        """BLAKE2b-128 of each item's raw bytes or text, in row order, 16 bytes each."""
        return self._features[0].hashes

    def hashes_of(self, rows: Ints) -> pa.ChunkedArray:
        """Return the hashes of some rows."""
        return self.hashes.array.take(pa.array(rows))

    @property
    def has_tokens(self) -> bool:
        """Whether an item has several vectors."""
        return len(self._features) > 1 or len(self._features[0].item_shape) > 1

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Shape of one item: (D,), or (T, D) with T the mean number of tokens if it varies."""
        if not self.has_tokens:
            return (self.width,)
        num_tokens = 0
        for feature in self._features:
            num_tokens += feature.num_tokens
        return (round(num_tokens / max(1, self.num_items)), self.width)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the values that are read."""
        dtype = np.dtype(self._features[0].dtype)
        for feature in self._features[1:]:
            dtype = np.promote_types(dtype, feature.dtype)
        return dtype

    @property
    def num_bytes(self) -> float:
        """Bytes of all items in memory."""
        total = 0.0
        for feature in self._features:
            total += float(feature.num_tokens) * self.width * np.dtype(feature.dtype).itemsize
        return total

    def lengths(self) -> Ints:
        """Return the number of vectors of each item, (N,) int64, without reading them."""
        lengths_N = self._features[0].lengths()
        for feature in self._features[1:]:
            lengths_N += feature.lengths()
        return lengths_N

    @property
    def valid(self) -> Bools:
        """(N,) bool, whether each item has all of the features."""
        # A copy, because the feature goes on using its array.
        valid_N = self._features[0].valid.copy()
        for feature in self._features[1:]:
            valid_N &= feature.valid
        return valid_N

    @property
    def failed_rows(self) -> Ints:
        """Rows of committed chunks that lack a feature, ascending: (M,) int64. Only commits are read."""
        failed_rows = [feature.failed[0] for feature in self._features]
        return distinct(np.concatenate(failed_rows))

    def has(self, rows: Ints) -> Bools:
        """Return whether each item has all of the features, (B,) bool; see `Feature.has`."""
        has_B = self._features[0].has(rows)
        for feature in self._features[1:]:
            has_B &= feature.has(rows)
        return has_B

    def require_complete(self) -> None:
        """Check that every chunk of the features is committed, or raise an `UnfinishedError`."""
        for feature in self._features:
            feature.require_complete()

    def read(self, rows: Ints) -> Inputs:
        """Gather rows from the memory maps in the given order. A row without the feature raises a `DataError`."""
        parts = []
        for feature in self._features:
            if feature.is_ragged:
                parts.append(_padded(feature.gather_tokens(rows)))
            else:
                parts.append(Inputs(feature.gather(rows)))
        return _join(parts)

    def blocks(self) -> Iterator[tuple[Ints, Inputs]]:
        """Iterate over the valid items of committed chunks in row order, with checksums checked: rows and inputs."""
        commits_by_feature = [feature.commits for feature in self._features]
        for number, commits in enumerate(zip(*commits_by_feature, strict=True)):
            if None not in commits:
                rows, inputs = self.chunk(number)
                if len(rows):
                    yield rows, inputs

    def chunk(self, number: int) -> tuple[Ints, Inputs]:
        """Read the valid items of one committed chunk, with checksums checked: rows and inputs."""
        first = self._features[0]
        first_commit = first.commits[number]
        start = number * first.group.info.chunk_size

        # The common case makes no Python object per item.
        if len(self._features) == 1 and not first.is_ragged and first_commit is not None:
            dense_rows, values = _read_dense_chunk(first, first_commit)
            return dense_rows + start, Inputs(values)

        items_by_feature: list[Sequence[Array | None]] = []
        for feature in self._features:
            commit = feature.commits[number]
            if commit is not None:
                items_by_feature.append(feature.items(commit))

        # An item counts only if it has all of the features.
        rows: list[int] = []
        items: list[tuple[Any, ...]] = []
        for row, parts in enumerate(zip(*items_by_feature, strict=True), start=start):
            if all(part is not None for part in parts):
                rows.append(row)
                items.append(parts)

        if not rows:
            return np.empty(0, np.int64), Inputs(np.empty((0, self.width), self.dtype))
        return np.array(rows, np.int64), to_inputs(list(zip(*items, strict=True)))

    def load(self, *, progress: Progress | None = None) -> Reader:
        """Read all items into memory, with checksums checked, and return a reader of their rows."""
        progress = progress or NullProgress()
        progress.start(f"loading {self.name}", self.num_items * len(self._features), noun(self.modality))

        readers: list[Reader] = []
        for feature in self._features:
            load = _load_ragged if feature.is_ragged else _load
            readers.append(load(feature, progress))

        progress.finish()
        return lambda rows: _join([read(rows) for read in readers])


def gather(readers: Iterable[Reader], rows: Ints, numbers: Ints) -> Inputs:
    """Read each row with the reader of its number. Token sequences are padded to the longest one."""
    parts: list[tuple[Ints, Inputs]] = []
    shapes: list[tuple[int, ...]] = []
    dtypes: list[np.dtype[Any]] = []
    for number, read in enumerate(readers):
        positions = np.flatnonzero(numbers == number)
        if len(positions):
            inputs = read(rows[positions])
            parts.append((positions, inputs))
            shapes.append(inputs.values.shape[1:])
            dtypes.append(inputs.values.dtype)

    shape = np.max(shapes, axis=0)
    values: Array = np.zeros((len(rows), *shape), np.result_type(*dtypes))

    # Either all readers return lengths, or none does, because they read the same feature of several caches.
    lengths = None if parts[0][1].lengths is None else np.zeros(len(rows), np.int64)
    for positions, inputs in parts:
        values[positions, : inputs.values.shape[1]] = inputs.values
        if lengths is not None and inputs.lengths is not None:
            lengths[positions] = inputs.lengths
    return Inputs(values, lengths)


def join_readers(readers: Sequence[Reader], nums_items: Sequence[int]) -> Reader:
    """Return a reader of the rows of several features, which are counted across them."""
    if len(readers) == 1:
        return readers[0]

    starts = np.cumsum([0, *nums_items])

    def read(rows: Ints) -> Inputs:
        numbers = np.searchsorted(starts, rows, side="right") - 1
        return gather(readers, rows - starts[numbers], numbers)

    return read


def features_by_modality(cache: Cache, feature: NamedFeatures) -> dict[str, list[str]]:
    """Return the named features of each modality.

    Args:
        cache: a cache that has the features.
        feature: a mapping from modality to features, or features as `modality=encoder/feature`. The modality can be
            left out if only one modality has a feature of that name.

    Raises:
        SettingError: features of several modalities have the name.
        UnknownNameError: no feature has it, or there is no such modality.
    """
    names_by_modality: dict[str, list[str]] = {}
    if isinstance(feature, Mapping):
        for modality, names in feature.items():
            names_by_modality[modality] = list(map(str, one_or_many(names or ())))
        return names_by_modality

    # A name without a modality belongs to the only modality that has it.
    for word in map(str, one_or_many(feature or ())):
        prefix, name = split_modality(word)
        names_by_modality.setdefault(prefix or _modality_of(cache, name), []).append(name)
    return names_by_modality


def _modality_of(cache: Cache, name: str) -> str:
    """Return the only modality that has a feature, or features joined by `+`."""
    modalities: list[str] = []
    all_names: list[str] = []
    for modality in MODALITIES:
        features = cache.features(modality)
        all_names += [feature.name for feature in features]
        if features and _has(cache, modality, name):
            modalities.append(modality)

    if not modalities:
        raise unknown_name("feature", name, all_names, where=f"of {cache.path}")

    if len(modalities) > 1:
        raise SettingError(
            f"feature: expected MODALITY=NAME, as {' and '.join(map(noun, modalities))} have the feature, got {name}"
        )
    return modalities[0]


def _has(cache: Cache, modality: str, name: str) -> bool:
    """Return whether a modality has a feature of a name, even if the name is ambiguous or its features do not fit."""
    try:
        open_input(cache, modality, name)
    except (AmbiguousNameError, DataError):
        return True
    except UnknownNameError:
        return False
    return True


def choose_pair(cache: Cache, feature: NamedFeatures) -> dict[str, str | None]:
    """Return the two modalities of a pair, each with its features joined by `+`, or None for its only feature.

    If features of one modality or none are named, `default_pair` completes the pair.
    """
    name_by_modality: dict[str, str | None] = {}
    for modality, names in features_by_modality(cache, feature).items():
        name_by_modality[modality] = "+".join(names) or None

    pair = default_pair(cache)
    if len(name_by_modality) < 2 and {*name_by_modality} <= {*pair}:
        name_by_modality = {**dict.fromkeys(pair), **name_by_modality}

    if len(name_by_modality) != 2:
        raise SettingError(
            "feature: expected features of two modalities, such as image=NAME and text=NAME, got "
            f"{', '.join(name_by_modality)}; embedcache adapt maps one encoder's feature onto another's"
        )
    return name_by_modality


def default_pair(cache: Cache) -> Sequence[str]:
    """Return the two modalities that are paired by default: images and texts.

    If a cache has features of exactly two modalities, it pairs these instead.
    """
    modalities = list(filter(cache.features, MODALITIES))
    return modalities if len(modalities) == 2 else ("image", "text")


def open_input(cache: Cache, modality: str, name: str | None = None) -> InputFeature:
    """Open an input feature by a name as in `Cache.feature`, or by several such names joined by `+`.

    Raises:
        UnknownNameError: no feature or several features have that name. The message lists them.
        DataError: the features have different encoders or widths.
    """
    names = [None] if name is None else name.split("+")
    features = map(partial(cache.feature, modality), names)
    return InputFeature(list(features))


def view_feature(name: str, view: str) -> str:
    """Return the name of a view of an input feature. A view of a view replaces the first view.

    Example:
        >>> view_feature("a/cls+a/patches", "flip"), view_feature("a@flip/cls", "crop-0.5")
        ('a@flip/cls+a@flip/patches', 'a@crop-0.5/cls')
    """
    if view == PLAIN:
        return name

    parts = []
    for part in name.split("+"):
        encoder, slash, feature = part.partition("/")
        parts.append(f"{encoder.partition('@')[0]}@{view}{slash}{feature}")
    return "+".join(parts)


def check_same_view(
    what: str, expected: Mapping[str, Any], fingerprint: Mapping[str, Any], view: str, *, next_step: str
) -> None:
    """Check that a feature is a view of a feature with an expected fingerprint, or that feature itself if it is plain.

    Raises:
        FingerprintError: they differ in more than their view. The message names each field with both values.
    """
    # Each view has its own entry, so only the others can be equal.
    if view != PLAIN:
        expected = dict(expected)
        fingerprint = dict(fingerprint)
        expected.pop("view", None)
        fingerprint.pop("view", None)
    check_same(what, expected, fingerprint, next_step=next_step)


def to_inputs(features: Sequence[Sequence[Array]]) -> Inputs:
    """Stack items into inputs, given one (D,) or (T, D) array per item of each feature."""
    parts = []
    for items in features:
        has_one_shape = len(set(map(np.shape, items))) == 1
        parts.append(Inputs(np.stack(items)) if has_one_shape else _padded(items))
    return _join(parts)


def to_mean_vectors(inputs: Inputs) -> Array:
    """Return one vector per item, the mean of its tokens: (B, D) float32."""
    values = np.asarray(inputs.values, np.float32)
    if values.ndim == 2:
        return values
    lengths = values.shape[1] if inputs.lengths is None else inputs.lengths[:, None]
    mean_BD: Array = values.sum(axis=1) / lengths
    return mean_BD


def to_unit_vectors(inputs: Inputs) -> Floats:
    """Return one unit vector per item, the mean of its tokens: (B, D) float32."""
    return normalize(to_mean_vectors(inputs))


def _read_dense_chunk(feature: Feature, commit: Commit) -> tuple[Ints, Array]:
    """Read the valid items of a chunk of items of one shape, without a Python object per item."""
    parts = [values for _, values in feature.read_chunk(commit)]
    values = parts[0] if len(parts) == 1 else np.concatenate(parts)

    # Samples that were appended after the commit have no values in it.
    valid_rows = np.flatnonzero(is_none(commit.failures[feature.feature])[: len(values)])
    return valid_rows, values if len(valid_rows) == len(values) else values[valid_rows]


def _load(feature: Feature, progress: Progress) -> Reader:
    loaded = feature.load(progress=progress)
    return lambda rows: Inputs(loaded[rows])


def _load_ragged(feature: Feature, progress: Progress) -> Reader:
    items: list[Array] = []
    lengths: list[int] = []
    for _, chunk in feature.chunks():
        for tokens in chunk:
            lengths.append(0 if tokens is None else len(tokens))
            if tokens is not None:
                items.append(tokens)
        progress.advance(len(chunk))

    # One array of all tokens, with the place of each item's first token, is smaller than an array per item.
    values = np.concatenate(items)
    lengths_N = np.array(lengths, np.int64)
    starts_N = np.cumsum(lengths_N) - lengths_N
    return lambda rows: _pad(values, starts_N[rows], lengths_N[rows])


def _padded(items: Sequence[Array]) -> Inputs:
    lengths_B = np.array(list(map(len, items)), np.int64)
    return _pad(np.concatenate(items), np.cumsum(lengths_B) - lengths_B, lengths_B)


def _pad(values_ND: Array, starts: Ints, lengths: Ints) -> Inputs:
    """Stack ranges of rows, padded with zeros."""
    padded = np.zeros((len(lengths), int(lengths.max(initial=1)), values_ND.shape[1]), values_ND.dtype)
    item, row = concatenated_ranges(starts, lengths)
    padded[item, row - starts[item]] = values_ND[row]
    return Inputs(padded, lengths)


def _join(parts: Sequence[Inputs]) -> Inputs:
    if len(parts) == 1:
        return parts[0]

    # Padding may only be at the end of a sequence.
    for part in parts[:-1]:
        if part.lengths is not None:
            raise DataError("a feature with a varying number of tokens must come last: name the vector first")

    tokens: list[Array] = []
    for part in parts:
        tokens.append(part.values if part.values.ndim == 3 else part.values[:, None])
    values = np.concatenate(tokens, axis=1)

    lengths = parts[-1].lengths
    if lengths is not None:
        # The tokens of the earlier parts are in front of the last part's, and all of them count.
        lengths = lengths + values.shape[1] - tokens[-1].shape[1]
    return Inputs(values, lengths)
