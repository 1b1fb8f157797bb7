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
        rows: (M,) int64, the items that could be read.
        cosines: (M,) float32, cosine between the stored and the new feature, over all tokens of token features.
        num_unreadable: number of items that can no longer be read.
        num_changed: number of items whose bytes have changed.
        differences: fields of the encoder's fingerprint that have changed.
        note: why nothing was compared, or empty.
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
            if self.cosines.min() < AGREEMENT_COSINE:
                parts.append(f"in row {self.rows[self.cosines.argmin()]:,}")

        if self.num_unreadable:
            parts.append(f"{pluralize(self.num_unreadable, 'item')} can no longer be read")
        if self.num_changed:
            parts.append(f"the bytes of {pluralize(self.num_changed, 'item')} have changed")
        if self.differences:
            parts.append(f"the encoder has changed: {'; '.join(self.differences)}")
        return ("DRIFT " if self.is_bad else "") + ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Result of verifying a cache.

    Args:
        detected: problems before any repair.
        repaired: one line per encoder whose chunks were encoded again or whose metadata was written again.
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
        """Whether nothing is damaged and no feature drifted. Missing chunks count only after a repair."""
        num_wrong = len(self.findings) if self.was_repair else self.num_damaged
        return not num_wrong and not any(drift.is_bad for drift in self.drifts)

    __repr__ = summary

    def lines(self) -> list[str]:
        """Return a summary: a line per problem, then the totals, then a line per drift."""
        num_missing = len(self.findings) - self.num_damaged
        damaged = pluralize(self.num_damaged, "damaged chunk or table", "damaged chunks or tables")
        totals = f"{damaged}, {pluralize(num_missing, 'chunk')} not extracted yet"
        problem_lines = list(map(Finding.line, self.detected))
        drift_lines = list(map(Drift.line, self.drifts))
        return [*problem_lines, *self.repaired, f"{self.cache}: {totals}", *drift_lines]


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

    detected = verify(cache, progress=progress)
    findings = detected
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
    """Encode damaged and missing chunks again with the encoders that computed them, and restore damaged metadata.

    Damaged chunks are withdrawn first, so that the same command finishes a repair that was killed. Derived features are
    computed again by their rule or run, after the features that they are derived from. Findings that cannot be repaired
    this way are skipped.

    Args:
        cache: the cache.
        findings: the result of `verify`.
        device: torch device of encoders and runs.
        progress: shows the number of items.

    Returns:
        One line per encoder.

    Raises:
        FingerprintError: an encoder, rule or run has changed; its features are not modified.
        SettingError: a rule is custom code, and the cache is not trusted.
        CorruptError: a table is damaged, so the rows of the chunks are unknown; nothing is modified.
    """
    for finding in findings:
        if finding.is_damage and not finding.encoder:
            raise CorruptError(f"expected intact tables, got {finding.line()}")

    progress = progress or NullProgress()
    # A repair that was killed leaves partial files.
    remove_partials(cache.path)

    repairable: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        if finding.can_repair:
            repairable[finding.modality, finding.encoder].append(finding)

    # Derived features come after their inputs. Imported vectors, which end a repair, come last.
    groups = [open_group(cache.path, *key, cache.info) for key in sorted(repairable)]
    groups.sort(key=lambda group: (derivation_depth(cache, group), group.is_imported))
    lines = []
    for group in groups:
        # A finding about a feature's metadata has no chunk.
        chunk_findings: list[Finding] = []
        metadata_names: set[str] = set()
        for finding in repairable[group.modality, group.name]:
            if finding.chunk < 0:
                metadata_names.add(finding.name)
            else:
                chunk_findings.append(finding)

        # Chunks are written into an array, so its metadata is restored first.
        for name in sorted(metadata_names):
            feature = Feature(group, name)
            add_feature(group, name, feature.item_shape, feature.dtype, axis=feature.axis)
            lines.append(f"{feature.name}: wrote its zarr.json again")
        if chunk_findings:
            lines.append(_repair_chunks(cache, group, chunk_findings, device, progress))
    return lines


def _repair_chunks(
    cache: Cache, group: EncoderGroup, findings: Sequence[Finding], device: str, progress: Progress
) -> str:
    """Compute damaged and missing chunks again.

    Raises:
        FingerprintError: the encoder, rule or run that computed the chunks has changed.
    """
    names = sorted({finding.name for finding in findings})
    producer: Producer

    # Chunks of a changed encoder would not match the intact chunks, so this is checked before any is withdrawn.
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
    """Encode a random sample of the items of every feature again, and compare them with the stored features.

    This detects changes in libraries, preprocessing, weights and source. At least one item per modality is encoded.
    Derived features are computed again from the stored features. A note explains why a feature was not compared: its
    rule or run cannot be opened, or it was imported and its encoder is unknown.
    """
    progress = progress or NullProgress()
    groups: list[EncoderGroup] = []
    for modality in cache.info.num_items:
        groups += cache.encoders(modality)
    progress.start("encoding a sample again", len(groups), "encoders")

    drifts: list[Drift] = []
    for group in groups:
        features = []
        for name in group.features:
            feature = Feature(group, name)
            if feature.valid.any():
                features.append(feature)

        # With one seed for all encoders of a modality, they encode the same items if they have the same rows.
        rows = _sample_rows(features, fraction, np.random.default_rng(seed))
        if len(rows):
            drifts += _measure_group(cache, group, features, rows, device)
        progress.advance(1)
    progress.finish()
    return drifts


def _sample_rows(features: Sequence[Feature], fraction: float, rng: np.random.Generator) -> Ints:
    """Draw a fraction of the rows that have all features of an encoder, at least one, ascending."""
    if not features:
        return np.empty(0, np.int64)

    is_valid_N = np.logical_and.reduce([feature.valid for feature in features])
    valid_rows = np.flatnonzero(is_valid_N)
    if not len(valid_rows):
        return valid_rows

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
        # Items that can no longer be read have no new feature to compare.
        encoded_rows = []
        encoded_items = []
        for row, item in zip(rows.tolist(), items[feature.feature], strict=True):
            if item is not None:
                encoded_rows.append(row)
                encoded_items.append(item)

        rows_M = np.array(encoded_rows, np.int64)
        pairs = zip(feature.gather_tokens(rows_M), encoded_items, strict=True)
        cosines = [_cosine(stored, item) for stored, item in pairs]
        drifts.append(
            Drift(
                feature=feature.name,
                rows=rows_M,
                cosines=np.array(cosines, np.float32),
                num_unreadable=len(rows) - len(rows_M),
                num_changed=num_changed,
                differences=differences,
            )
        )
    return drifts


def _encode_again(
    encoders: Encoders, group: EncoderGroup, names: Sequence[str], rows: Ints
) -> tuple[Mapping[str, Sequence[Array | ItemError | None]], int]:
    """Encode some rows: feature -> an item per row, None if it cannot be read, and the number with changed bytes."""
    items: dict[str, list[Array | ItemError | None]] = defaultdict(list)
    num_changed = 0
    chunks, offsets = np.divmod(rows, group.info.chunk_size)
    for chunk in distinct(chunks).tolist():
        chunk_offsets = offsets[chunks == chunk].tolist()
        commit = group.commit(chunk)
        assert commit is not None  # its rows are valid
        encoded = encoders.encode_rows(chunk, chunk_offsets)[group.name]

        for offset in chunk_offsets:
            num_changed += encoded.hashes[offset] not in (None, commit.hashes[offset])
            for name in names:
                items[name].append(encoded.items[name][offset])
    return items, num_changed


def _cosine(stored: Array, encoded: Array | ItemError) -> float:
    """Return the cosine between two features of one item, over all tokens. It is -1 if their shapes differ."""
    if isinstance(encoded, ItemError) or stored.shape != encoded.shape:
        return -1.0

    # Zero vectors have no direction, but may be equal.
    if np.array_equal(stored, encoded.astype(stored.dtype)):
        return 1.0
    # Labels have no direction either; each is equal or not.
    if stored.dtype.kind == "i":
        return float((stored == encoded).mean())

    stored_1D = normalize(stored.astype(np.float32).reshape(1, -1))
    encoded_1D = normalize(encoded.astype(np.float32).reshape(1, -1))
    return float((stored_1D * encoded_1D).sum())
