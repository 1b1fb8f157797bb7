"""Encoding a sample of a cache again: does the same still come out?"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from embedcache.arrays import Array, Floats, Ints, normalize
from embedcache.artifact import name_differences
from embedcache.cache.cache import Cache
from embedcache.cache.feature import Feature
from embedcache.cache.group import EncoderGroup
from embedcache.cores import num_cores
from embedcache.errors import SettingError
from embedcache.extract.load import Loaded, load_image, load_texts
from embedcache.extract.loop import Outputs
from embedcache.extract.reopen import reopen_target
from embedcache.extract.target import Target, view_fingerprint
from embedcache.progress import Progress, Silent
from embedcache.sources import ImageItem, Source, reopen_source

MIN_COSINE = 0.999
"""Below it something changed: float16 at rest costs 1e-6, and another library's order of sums about as much."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far a feature that is encoded again lies from what is stored.

    Args:
        feature: `encoder/feature`.
        rows: (n,) int64, the items that could be read.
        cosines: (n,) float32, one an item; of token features over all tokens together.
        num_gone: items that cannot be read any more.
        num_changed: items whose bytes are others now.
        differences: fields of the encoder's fingerprint that are others now.
    """

    feature: str
    rows: Ints
    cosines: Floats
    num_gone: int
    num_changed: int
    differences: Sequence[str]

    @property
    def is_bad(self) -> bool:
        """Whether something else comes out, or goes in."""
        return bool(self.num_gone or self.num_changed or (self.cosines < MIN_COSINE).any())

    def line(self) -> str:
        """Say it in one line."""
        parts = [f"{self.feature}: {len(self.cosines):,} items encoded again"]
        if len(self.cosines):
            parts.append(f"cosine to what is stored: mean {self.cosines.mean():.6f}, least {self.cosines.min():.6f}")
            parts += [f"in row {self.rows[self.cosines.argmin()]:,}"] * bool(self.cosines.min() < MIN_COSINE)
        parts += [f"{self.num_gone:,} items cannot be read any more"] * bool(self.num_gone)
        parts += [f"{self.num_changed:,} items have other bytes now"] * bool(self.num_changed)
        parts += [f"the encoder is another: {'; '.join(self.differences)}"] * bool(self.differences)
        return ("DRIFT " if self.is_bad else "") + ", ".join(parts)


def measure_drift(
    cache: Cache, share: float, *, device: str = "cpu", seed: int = 0, progress: Progress | None = None
) -> list[Drift]:
    """Encode a random share of the items of every feature again and compare.

    A changed library, preprocessing, weight or source shows.

    Args:
        cache: the cache; its source and encoders must be there still.
        share: of the items of each modality, above 0 and at most 1; at least one item is taken.
        device: a torch device.
        seed: of the choice.
        progress: told about encoders.

    Raises:
        SettingError: a share of nothing.
    """
    check_share(share)
    progress = progress or Silent()
    source = reopen_source(cache.info.source)
    groups = [group for modality in cache.info.num_items for group in cache.encoders(modality)]
    progress.start("encoding a sample again", len(groups), "encoders")
    found = []
    for group in groups:
        found += list(_drift(cache, source, group, share, device, np.random.default_rng(seed)))
        progress.advance(1)
    progress.finish()
    return found


def check_share(share: float) -> None:
    """Refuse a share of nothing, or of more than there is.

    Raises:
        SettingError: says what is allowed.
    """
    if not 0 < share <= 1:
        raise SettingError(f"the share to encode again is {share:g}; it must be above 0 and at most 1, as 0.1%")


def _drift(
    cache: Cache, source: Source, group: EncoderGroup, share: float, device: str, rng: np.random.Generator
) -> Iterator[Drift]:
    features = [feature for feature in (Feature(group, name) for name in group.features) if feature.valid.any()]
    if not features:
        return
    rows_there = np.flatnonzero(np.logical_and.reduce([feature.valid for feature in features]))
    if not len(rows_there):
        return
    rows = np.sort(rng.choice(rows_there, max(1, round(share * len(rows_there))), replace=False))
    target = reopen_target(group, [feature.feature for feature in features], device=device)
    hashes, loaded = _load(cache, source, target, rows)
    output = Outputs(target, target.features, len(rows))
    for position, item in enumerate(loaded):
        if item.failure is None:
            output.add(position, item.inputs[0])
    output.flush()
    differences = name_differences(group.fingerprint, view_fingerprint(target.encoder, target.view))
    is_read = np.array([item.failure is None for item in loaded])
    for feature in features:
        again = [item for item in output.features[feature.feature] if item is not None]
        stored = feature.gather_tokens(rows[is_read]) if feature.is_ragged else list(feature.gather(rows[is_read]))
        yield Drift(
            feature=feature.name,
            rows=rows[is_read],
            cosines=np.array([_cosine(*pair) for pair in zip(stored, again, strict=True)], np.float32),
            num_gone=int((~is_read).sum()),
            num_changed=sum(
                item.hash is not None and item.hash != then for item, then in zip(loaded, hashes, strict=True)
            ),
            differences=differences,
        )


def _load(cache: Cache, source: Source, target: Target, rows: Ints) -> tuple[list[bytes | None], list[Loaded]]:
    """Load items of any rows, chunk by chunk; give the hashes they had, and what they are now."""
    hashes: list[bytes | None] = []
    loaded: list[Loaded] = []
    size, modality = cache.info.chunk_size, target.encoder.modality
    with ThreadPoolExecutor(num_cores()) as executor:
        for chunk in np.unique(rows // size).tolist():
            offsets = (rows[rows // size == chunk] - chunk * size).tolist()
            commit = target.group.commit(chunk)
            assert commit is not None  # its rows are valid
            hashes += [commit.hashes[offset] for offset in offsets]
            table = cache.items(modality, chunk=chunk).take(offsets)
            if modality == "text":
                loaded += load_texts(table["text"].to_pylist(), [target])
            else:
                items = [ImageItem(**row) for row in table.drop_columns("sample").to_pylist()]
                loaded += executor.map(lambda item: load_image(source, item, [target]), items)
    return hashes, loaded


def _cosine(stored: Array, again: Array) -> float:
    if stored.shape != again.shape:
        return -1.0
    if np.array_equal(stored, again.astype(stored.dtype)):  # of zeros, too
        return 1.0
    one, other = (normalize(array.astype(np.float32).reshape(1, -1)) for array in (stored, again))
    return float((one * other).sum())
