"""Drift of a cache: encode a random sample of the items again and compare with what is stored."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from embedcache.arrays import Array, Floats, Ints, normalize
from embedcache.derive.derive import reopen_derivation
from embedcache.devices import AUTO
from embedcache.errors import EmbedcacheError, ItemError, pluralize
from embedcache.extract.encode import reopen_item_source
from embedcache.extract.engines import reopen_encoders
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import name_differences
from embedcache.samples import Source
from embedcache.store.cache import Cache
from embedcache.store.feature import Feature
from embedcache.store.group import EncoderGroup

AGREEMENT_COSINE = 0.999
"""Cosine below which an item has drifted: float16 on disk costs 1e-6, another summation order about as much."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Difference between stored features and those of the same items encoded again.

    Args:
        rows: (n,) int64, the items that could be read.
        cosines: (n,) float32, cosine between the stored and the new feature; of token features over all tokens.
        differences: fields of the encoder's fingerprint that have changed.
        note: why nothing was compared; else empty.
    """

    feature: str
    rows: Ints
    cosines: Floats
    num_unreadable: int
    num_changed: int
    differences: Sequence[str]
    note: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether an item or its features changed."""
        return bool(self.num_unreadable or self.num_changed or (self.cosines < AGREEMENT_COSINE).any())

    def line(self) -> str:
        """Return a summary in one line."""
        if self.note:
            return f"{self.feature}: not compared: {self.note}"
        parts = [f"{self.feature}: {pluralize(len(self.cosines), 'item')} encoded again"]
        if len(self.cosines):
            parts.append(f"cosine to the stored feature: mean {self.cosines.mean():.6f}, min {self.cosines.min():.6f}")
            parts += [f"in row {self.rows[self.cosines.argmin()]:,}"] * bool(self.cosines.min() < AGREEMENT_COSINE)
        parts += [f"{pluralize(self.num_unreadable, 'item')} can no longer be read"] * bool(self.num_unreadable)
        parts += [f"the bytes of {pluralize(self.num_changed, 'item')} have changed"] * bool(self.num_changed)
        parts += [f"the encoder has changed: {'; '.join(self.differences)}"] * bool(self.differences)
        return ("DRIFT " if self.is_bad else "") + ", ".join(parts)


def measure_drift(
    cache: Cache,
    fraction: float,
    *,
    device: str = AUTO,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Drift]:
    """Encode a random sample of the items of every feature again and compare with what is stored.

    This detects changes in libraries, preprocessing, weights and source. At least one item per modality is encoded.
    Derived features are computed again from the stored ones. Those whose rule or run cannot be opened, and imported
    vectors, whose encoder is unknown, have a note.
    """
    progress = progress or NullProgress()
    groups = [group for modality in cache.info.num_items for group in cache.encoders(modality)]
    progress.start("encoding a sample again", len(groups), "encoders")
    open_source = lru_cache(maxsize=None)(partial(reopen_item_source, cache))
    drifts: list[Drift] = []
    for group in groups:
        rows = _sample_rows(group, fraction, np.random.default_rng(seed))
        if len(rows) and group.is_derived:
            drifts += list(_measure_derived(cache, group, rows, device))
        elif len(rows) and group.is_imported:
            note = "its vectors were imported, and their encoder is unknown"
            drifts += [_compare(feature, rows, [], note=note) for feature in _valid_features(group)]
        elif len(rows):
            drifts += list(_measure_encoded(cache, open_source(group.modality), group, rows, device))
        progress.advance(1)
    progress.finish()
    return drifts


def _valid_features(group: EncoderGroup) -> list[Feature]:
    return [feature for feature in (Feature(group, name) for name in group.features) if feature.valid.any()]


def _sample_rows(group: EncoderGroup, fraction: float, rng: np.random.Generator) -> Ints:
    """Draw a fraction of the rows that have all features of an encoder, at least one, ascending."""
    features = _valid_features(group)
    valid_rows = np.flatnonzero(np.logical_and.reduce([feature.valid for feature in features])) if features else ()
    if not len(valid_rows):
        return np.empty(0, np.int64)
    rows: Ints = np.sort(rng.choice(valid_rows, max(1, round(fraction * len(valid_rows))), replace=False))
    return rows


def _measure_derived(cache: Cache, group: EncoderGroup, rows: Ints, device: str) -> Iterator[Drift]:
    features = _valid_features(group)
    names = [feature.feature for feature in features]
    differences: Sequence[str] = ()
    derived: Mapping[str, Sequence[Array | ItemError]] = {}
    note = ""
    try:
        opened = reopen_derivation(cache, group, names, device=device)
        differences = name_differences(group.fingerprint, opened.fingerprint)
        derived = opened.apply(opened.reader.open_rows(rows))
    except EmbedcacheError as error:
        note = str(error)
    for feature in features:
        yield _compare(feature, rows, derived.get(feature.feature, []), differences=differences, note=note)


def _measure_encoded(
    cache: Cache, source: Source | None, group: EncoderGroup, rows: Ints, device: str
) -> Iterator[Drift]:
    features = _valid_features(group)
    names = [feature.feature for feature in features]
    encoders = reopen_encoders(cache, group, names, source, device=device, allows_changes=True)
    differences = name_differences(group.fingerprint, encoders.folders[0].fingerprint)
    encoded: dict[str, list[Array | None]] = {name: [] for name in names}
    num_changed = 0
    chunks = rows // cache.info.chunk_size
    for chunk in np.unique(chunks).tolist():
        offsets = (rows[chunks == chunk] - chunk * cache.info.chunk_size).tolist()
        commit = group.commit(chunk)
        assert commit is not None  # its rows are valid
        again = encoders.encode_rows(chunk, offsets)[group.name]
        num_changed += sum(again.hashes[offset] not in (None, commit.hashes[offset]) for offset in offsets)
        for name in names:
            encoded[name] += [again.items[name][offset] for offset in offsets]
    for feature in features:
        yield _compare(feature, rows, encoded[feature.feature], differences=differences, num_changed=num_changed)


def _compare(
    feature: Feature,
    rows: Ints,
    items: Sequence[Array | ItemError | None],
    *,
    differences: Sequence[str] = (),
    num_changed: int = 0,
    note: str = "",
) -> Drift:
    """Compare the stored items of some rows with new ones, None where one could not be read; with none of no rows."""
    again = [item for item in items if item is not None]
    rows_read = rows[np.array([item is not None for item in items], bool)] if items else rows[:0]
    stored = feature.gather_tokens(rows_read)
    return Drift(
        feature=feature.name,
        rows=rows_read,
        cosines=np.array([_cosine(*pair) for pair in zip(stored, again, strict=True)], np.float32),
        num_unreadable=len(items) - len(again),
        num_changed=num_changed,
        differences=differences,
        note=note,
    )


def _cosine(stored: Array, encoded: Array | ItemError) -> float:
    """Return the cosine between two features of one item, of tokens over all of them; -1 for other shapes."""
    if isinstance(encoded, ItemError) or stored.shape != encoded.shape:
        return -1.0
    if np.array_equal(stored, encoded.astype(stored.dtype)):  # zeros have no direction
        return 1.0
    if stored.dtype.kind == "i":  # labels are equal or not
        return float((stored == encoded).mean())
    left, right = (normalize(array.astype(np.float32).reshape(1, -1)) for array in (stored, encoded))
    return float((left * right).sum())
