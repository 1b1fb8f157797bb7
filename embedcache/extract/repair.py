"""Repairing a cache: verify it, encode damaged and missing chunks again, and retry failed items."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from embedcache.derive.derive import derivation_depth, reopen_derivation
from embedcache.devices import AUTO
from embedcache.errors import CorruptError, pluralize
from embedcache.extract.drift import Drift, measure_drift
from embedcache.extract.encode import reopen_item_source
from embedcache.extract.engines import job_devices, open_encoders, reopen_encoders
from embedcache.extract.extract import join_encoders, open_job, open_request, record_job
from embedcache.extract.settings import ExtractSettings, VerifySettings
from embedcache.files import AnyPath, remove_partials
from embedcache.progress import AnyProgress, NullProgress, Progress, to_progress
from embedcache.provenance import check_same
from embedcache.samples import Source
from embedcache.settings import merge_settings
from embedcache.store.cache import Cache
from embedcache.store.feature import Feature
from embedcache.store.group import EncoderGroup, open_group
from embedcache.store.producer import FillReport, fill, fill_all
from embedcache.store.verify import Finding, verify
from embedcache.store.writer import add_feature, withdraw


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Result of verifying a cache.

    Args:
        detected: problems before any repair.
        repaired: one line per encoder that encoded damaged or missing chunks, or whose metadata were written again.
        findings: problems that remain.
        was_repair: whether a repair was requested, after which nothing may be missing.
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

    def lines(self) -> list[str]:
        """Return a summary: a line per problem, then the totals, then a line per drift."""
        num_missing = len(self.findings) - self.num_damaged
        damaged = pluralize(self.num_damaged, "damaged chunk or table", "damaged chunks or tables")
        totals = f"{damaged}, {pluralize(num_missing, 'chunk')} not extracted yet"
        problems = [finding.line() for finding in self.detected]
        return [*problems, *self.repaired, f"{self.cache}: {totals}", *(drift.line() for drift in self.drifts)]


def verify_cache(
    cache: AnyPath, settings: VerifySettings | None = None, *, progress: AnyProgress = None, **options: Any
) -> VerifyReport:
    """Check every chunk of a cache against its checksum; on request repair it and encode a sample again.

    Raises:
        FingerprintError: an encoder that is needed for a repair has changed.
        CorruptError: a table is damaged, so that nothing can be repaired.
    """
    cache, settings = Cache(cache), merge_settings(VerifySettings, settings, options)
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
    groups = {key: open_group(cache.path, *key, cache.info) for key in repairable}
    lines = []
    for (modality, encoder), group in sorted(groups.items(), key=lambda item: _turn(cache, item[1])):
        of_arrays = {finding.name for finding in repairable[modality, encoder] if finding.chunk < 0}
        for name in sorted(of_arrays):
            feature = Feature(group, name)
            add_feature(group, name, feature.item_shape, feature.dtype, axis=feature.axis)
            lines.append(f"{feature.name}: wrote its zarr.json again")
        of_chunks = [finding for finding in repairable[modality, encoder] if finding.chunk >= 0]
        if of_chunks:
            lines.append(_repair_chunks(cache, group, of_chunks, device, progress))
    return lines


def _turn(cache: Cache, group: EncoderGroup) -> tuple[int, bool]:
    """Sort features after those that they are derived from, and imported vectors, which end a repair, after others."""
    return derivation_depth(cache, group), group.is_imported


def _repair_chunks(
    cache: Cache, group: EncoderGroup, findings: Sequence[Finding], device: str, progress: Progress
) -> str:
    """Compute damaged and missing chunks again; a `FingerprintError` says that what computed them has changed."""
    names = sorted({finding.name for finding in findings})
    if group.is_derived:
        derivation = reopen_derivation(cache, group, names, device=device)
        group.check_same(derivation.fingerprint)
    else:
        encoders = reopen_encoders(cache, group, names, reopen_item_source(cache, group.modality), device=device)
        check_same(
            f"encoder {group.path}",
            group.fingerprint,
            encoders.folders[0].fingerprint,
            next_step="restore the versions and files it was written with, or extract into a new folder",
        )
    for finding in findings:
        if finding.is_damage:
            withdraw(group, finding.chunk, [finding.name])
    if group.is_derived:
        return fill(group, derivation, progress=progress).line()
    (report,) = fill_all([encoders], progress=progress)
    return report.line()


def retry_failed(
    source: Source | object,
    cache: AnyPath,
    *,
    image_encoder: str | Sequence[str] = (),
    text_encoder: str | Sequence[str] = (),
    encoder: Mapping[str, str | Sequence[str]] | None = None,
    settings: ExtractSettings | None = None,
    progress: AnyProgress = None,
    **options: Any,
) -> list[FillReport]:
    """Retry the files that failed, after one was replaced or a network came back; all other rows stay unchanged.

    Captions that failed are blank and remain failed, because captions are part of the item table. The arguments and
    errors are those of `extract`.
    """
    progress = to_progress(progress)
    source, settings = open_request(source, cache, settings, options)
    specs = join_encoders(image_encoder, text_encoder, encoder)
    job = open_job(source, cache, specs, settings=settings, repair_items=True, progress=progress)
    opened = Cache(job.cache)
    producers = [
        replace(encoders, folders=[folder])  # each tries its own failed rows
        for encoders in open_encoders(job, source, job_devices(job.settings)[0])
        if encoders.source is not None
        for folder in encoders.folders
    ]
    with record_job(opened, job, "retry") as outcome:
        reports = fill_all(producers, rows="failed", progress=progress)
        if any(report.computed for report in reports):
            outcome["encoders"] = [vars(report) for report in reports]
    return reports
