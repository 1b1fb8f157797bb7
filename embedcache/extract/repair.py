"""Verifying a cache beyond its checksums: encode damaged and missing chunks again, and a sample to compare."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np

from embedcache.arrays import Array, Floats, Ints, distinct, normalize
from embedcache.derive.derive import derivation_depth, reopen_derivation
from embedcache.errors import CorruptError, EmbedcacheError, ItemError, pluralize, summary
from embedcache.extract.encode import Encoders, reopen_encoders, view_fingerprint
from embedcache.extract.settings import VerifySettings
from embedcache.files import AnyPath, remove_partials
from embedcache.processes import AUTO
from embedcache.progress import AnyProgress, NullProgress, Progress, to_progress
from embedcache.provenance import check_same, name_differences
from embedcache.settings import merge_settings
from embedcache.store.cache import Cache
from embedcache.store.feature import EncoderGroup, Feature, open_group
from embedcache.store.producer import OneByOne, Producer, fill_all
from embedcache.store.verify import Finding, verify
from embedcache.store.writer import add_feature, withdraw

if TYPE_CHECKING:
    from embedcache.options import VerifyOptions

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
    rows: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    cosines: Floats = field(default_factory=lambda: np.empty(0, np.float32))
    num_unreadable: int = 0
    num_changed: int = 0
    differences: Sequence[str] = ()
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


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Result of verifying a cache.

    Args:
        detected: problems before any repair.
        repaired: one line per encoder that encoded damaged or missing chunks, or whose metadata were written again.
        findings: problems that remain.
        drifts: comparison of each feature with a sample that was encoded again, if requested.
        was_repair: whether a repair was requested, after which nothing may be missing.

    Example:
        >>> _ = Path("cache/image/open_example/vector/c/0/0").write_bytes(b"damaged")
        >>> report = embedcache.verify_cache("cache")
        >>> report.num_damaged, report.is_sound
        (1, False)
        >>> embedcache.verify_cache("cache", repair=True).is_sound
        True
    """

    cache: Path
    detected: Sequence[Finding]
    repaired: Sequence[str]
    findings: Sequence[Finding]
    drifts: Sequence[Drift]
    was_repair: bool = False

    @property
    def num_damaged(self) -> int:
        """Number of damaged chunks and tables that remain."""
        return sum(finding.is_damage for finding in self.findings)

    @property
    def is_sound(self) -> bool:
        """Whether nothing is damaged and nothing drifted; missing chunks are no damage, but a repair leaves none."""
        num_wrong = len(self.findings) if self.was_repair else self.num_damaged
        return not num_wrong and not any(drift.is_bad for drift in self.drifts)

    __repr__ = summary

    def lines(self) -> list[str]:
        """Return a summary: a line per problem, then the totals, then a line per drift."""
        num_missing = len(self.findings) - self.num_damaged
        damaged = pluralize(self.num_damaged, "damaged chunk or table", "damaged chunks or tables")
        totals = f"{damaged}, {pluralize(num_missing, 'chunk')} not extracted yet"
        problems = [finding.line() for finding in self.detected]
        return [*problems, *self.repaired, f"{self.cache}: {totals}", *(drift.line() for drift in self.drifts)]


def verify_cache(
    cache: AnyPath,
    settings: VerifySettings | None = None,
    *,
    progress: AnyProgress = None,
    **options: Unpack["VerifyOptions"],
) -> VerifyReport:
    """Check every chunk of a cache against its checksum.

    On request, damaged and missing chunks are encoded again, and a sample of the items is encoded again to compare.

    Args:
        cache: path or URL of the cache.
        settings: steps beyond comparing checksums.
        progress: progress in chunks and items.
        options: settings by their names on the command line, which replace those of `settings`.

    Raises:
        FingerprintError: an encoder that is needed for a repair has changed.
        CorruptError: a table is damaged, so that nothing can be repaired.

    Example:
        >>> report = embedcache.verify_cache("cache", reencode=0.5)
        >>> report.is_sound, len(report.findings)
        (True, 0)
        >>> [drift.feature for drift in report.drifts]
        ['open_example/vector', 'open_example/vector']
    """
    cache = Cache(cache)
    settings = merge_settings(VerifySettings, settings, options)
    progress = to_progress(progress)
    detected = findings = verify(cache, progress=progress)
    repaired: list[str] = []
    if settings.repair:
        repaired = repair(cache, detected, device=settings.device, progress=progress)
        findings = verify(cache, progress=progress)
    drifts: list[Drift] = []
    if settings.reencode is not None:
        drifts = measure_drift(cache, settings.reencode, device=settings.device, progress=progress)
    return VerifyReport(
        cache=cache.path,
        detected=detected,
        repaired=repaired,
        findings=findings,
        drifts=drifts,
        was_repair=settings.repair,
    )


def repair(
    cache: Cache,
    findings: Sequence[Finding],
    *,
    device: str = AUTO,
    progress: Progress | None = None,
) -> list[str]:
    """Encode damaged and missing chunks again with the encoders that computed them, and write metadata that follow.

    What is damaged is withdrawn first, so that the same command finishes a repair that was killed. Derived features are
    computed again by their rule or run, after the features that they are derived from. Findings of `verify` that cannot
    be repaired this way are skipped.

    Args:
        cache: the cache.
        findings: what `verify` found.
        device: torch device of encoders and runs.
        progress: shows the number of items.

    Returns:
        One line per encoder.

    Raises:
        FingerprintError: an encoder, rule or run has changed; its features are not modified.
        SettingError: a rule is custom code, and the cache is not trusted.
        CorruptError: a table is damaged, so the rows of the chunks are unknown; nothing is modified.
    """
    tables = [finding for finding in findings if finding.is_damage and not finding.encoder]
    if tables:
        raise CorruptError(f"expected intact tables, got {tables[0].line()}")
    progress = progress or NullProgress()
    remove_partials(cache.path)  # of a repair that was killed
    repairable: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        if finding.can_repair:
            repairable[finding.modality, finding.encoder].append(finding)

    # Features come after those that they are derived from, and imported vectors, which end a repair, after others.
    groups = [open_group(cache.path, *key, cache.info) for key in sorted(repairable)]
    groups.sort(key=lambda group: (derivation_depth(cache, group), group.is_imported))
    lines = []
    for group in groups:
        damaged = repairable[group.modality, group.name]
        for name in sorted({finding.name for finding in damaged if finding.chunk < 0}):
            feature = Feature(group, name)
            add_feature(group, name, feature.item_shape, feature.dtype, axis=feature.axis)
            lines.append(f"{feature.name}: wrote its zarr.json again")
        chunks = [finding for finding in damaged if finding.chunk >= 0]
        if chunks:
            lines.append(_repair_chunks(cache, group, chunks, device, progress))
    return lines


def _repair_chunks(
    cache: Cache, group: EncoderGroup, findings: Sequence[Finding], device: str, progress: Progress
) -> str:
    """Compute damaged and missing chunks again; a `FingerprintError` says that what computed them has changed."""
    names = sorted({finding.name for finding in findings})
    producer: Producer
    if group.is_derived:
        derivation = reopen_derivation(cache, group, names, device=device)
        group.check_same(derivation.fingerprint)
        producer = OneByOne(group, derivation)
    else:
        producer = reopen_encoders(cache, group, names, device=device)
        check_same(
            f"encoder {group.path}",
            group.fingerprint,
            view_fingerprint(producer.folders[0].encoder, producer.folders[0].view),
            next_step="restore the versions and files it was written with, or extract into a new folder",
        )

    for finding in findings:
        if finding.is_damage:
            withdraw(group, finding.chunk, [finding.name])
    (report,) = fill_all([producer], progress=progress)
    return report.line()


def measure_drift(
    cache: Cache, fraction: float, *, device: str = AUTO, seed: int = 0, progress: Progress | None = None
) -> list[Drift]:
    """Encode a random sample of the items of every feature again and compare with what is stored.

    This detects changes in libraries, preprocessing, weights and source. At least one item per modality is encoded.
    Derived features are computed again from the stored ones. Those whose rule or run cannot be opened, and imported
    vectors, whose encoder is unknown, have a note.
    """
    progress = progress or NullProgress()
    groups = [group for modality in cache.info.num_items for group in cache.encoders(modality)]
    progress.start("encoding a sample again", len(groups), "encoders")
    drifts: list[Drift] = []
    for group in groups:
        features = [feature for feature in (Feature(group, name) for name in group.features) if feature.valid.any()]
        rows = _sample_rows(features, fraction, np.random.default_rng(seed))
        if len(rows):
            drifts += _measure_group(cache, group, features, rows, device)
        progress.advance(1)
    progress.finish()
    return drifts


def _sample_rows(features: Sequence[Feature], fraction: float, rng: np.random.Generator) -> Ints:
    """Draw a fraction of the rows that have all features of an encoder, at least one, ascending."""
    valid_rows = np.flatnonzero(np.logical_and.reduce([feature.valid for feature in features])) if features else ()
    if not len(valid_rows):
        return np.empty(0, np.int64)
    rows: Ints = np.sort(rng.choice(valid_rows, max(1, round(fraction * len(valid_rows))), replace=False))
    return rows


def _measure_group(
    cache: Cache, group: EncoderGroup, features: Sequence[Feature], rows: Ints, device: str
) -> list[Drift]:
    """Compute some rows of the features of one folder again, and compare them with the stored ones."""
    names = [feature.feature for feature in features]
    items: Mapping[str, Sequence[Array | ItemError | None]] = {}
    num_changed = 0
    note = ""
    if group.is_imported:
        note = "its vectors were imported, and their encoder is unknown"
    elif group.is_derived:
        try:
            derivation = reopen_derivation(cache, group, names, device=device)
            items = derivation.apply(derivation.reader.open_rows(rows))
            fingerprint = derivation.fingerprint
        except EmbedcacheError as error:
            note = str(error)
    else:
        encoders = reopen_encoders(cache, group, names, device=device, allows_changes=True)
        items, num_changed = _encode_again(encoders, group, names, rows)
        fingerprint = view_fingerprint(encoders.folders[0].encoder, encoders.folders[0].view)
    if note:
        return [Drift(feature=feature.name, note=note) for feature in features]

    differences = name_differences(group.fingerprint, fingerprint)
    drifts = []
    for feature in features:
        computed = items[feature.feature]
        is_read = np.array([item is not None for item in computed], bool)
        read = [item for item in computed if item is not None]
        pairs = zip(feature.gather_tokens(rows[is_read]), read, strict=True)
        drifts.append(
            Drift(
                feature=feature.name,
                rows=rows[is_read],
                cosines=np.array([_cosine(stored, item) for stored, item in pairs], np.float32),
                num_unreadable=len(computed) - len(read),
                num_changed=num_changed,
                differences=differences,
            )
        )
    return drifts


def _encode_again(
    encoders: Encoders, group: EncoderGroup, names: Sequence[str], rows: Ints
) -> tuple[Mapping[str, Sequence[Array | ItemError | None]], int]:
    """Encode some rows: feature -> an item per row, None if it could not be read; and how many have other bytes."""
    items: dict[str, list[Array | ItemError | None]] = {name: [] for name in names}
    num_changed = 0
    chunks, offsets = np.divmod(rows, group.info.chunk_size)
    for chunk in distinct(chunks).tolist():
        chosen = offsets[chunks == chunk].tolist()
        commit = group.commit(chunk)
        assert commit is not None  # its rows are valid
        encoded = encoders.encode_rows(chunk, chosen)[group.name]
        num_changed += sum(encoded.hashes[offset] not in (None, commit.hashes[offset]) for offset in chosen)
        for name in names:
            items[name] += [encoded.items[name][offset] for offset in chosen]
    return items, num_changed


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
