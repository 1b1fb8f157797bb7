"""Repairing a cache: verify it, encode damaged and missing chunks again, and retry failed items."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedcache.derive.derive import derivation_depth, derive_again, reopen_derivation
from embedcache.devices import AUTO
from embedcache.encoders.base import Modality
from embedcache.errors import CorruptError, pluralize
from embedcache.extract.drift import Drift, measure_drift
from embedcache.extract.engines import Worker, job_devices
from embedcache.extract.extract import join_encoders, open_job, open_request, record_job
from embedcache.extract.feature_writer import FeatureWriter, check_unchanged, lease_chunk, reopen_writer
from embedcache.extract.loop import (
    BatchBuffer,
    LoadedItem,
    add_loaded,
    check_length,
    encode_chunks,
    load_items,
    reopen_item_source,
)
from embedcache.extract.settings import ExtractSettings, VerifySettings
from embedcache.files import AnyPath, remove_file, remove_partials
from embedcache.modalities import MODALITIES, noun
from embedcache.processes import num_cores
from embedcache.progress import AnyProgress, NullProgress, Progress, to_progress
from embedcache.settings import merge_settings
from embedcache.sources.base import Source
from embedcache.store.cache import Cache
from embedcache.store.commits import PENDING, has_failed
from embedcache.store.compacted import compacted_path
from embedcache.store.feature import Feature
from embedcache.store.group import EncoderGroup, open_group
from embedcache.store.tables import to_file_item
from embedcache.store.verify import Finding, verify
from embedcache.store.writer import add_feature, commit_chunk, withdraw


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

    One chunk is withdrawn at a time, so that the same command finishes a repair that was killed. Derived features are
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
        if (table := compacted_path(group.path)).name in of_arrays:
            of_arrays.remove(table.name)
            remove_file(table, missing_ok=True)
            lines.append(f"{group.name}: deleted {table.name}, which the next extract or derive writes again")
        for name in sorted(of_arrays):
            feature = Feature(group, name)
            add_feature(group, name, feature.item_shape, feature.dtype, axis=feature.axis)
            lines.append(f"{feature.name}: wrote its zarr.json again")
        of_chunks = [finding for finding in repairable[modality, encoder] if finding.chunk >= 0]
        names = sorted({finding.name for finding in of_chunks})
        if of_chunks and group.is_derived:
            opened = reopen_derivation(cache, group, names, device=device)
            lines.append(derive_again(opened, of_chunks, progress))
        elif of_chunks:
            writer = reopen_writer(group, names, device=device)
            check_unchanged(writer)
            lines.append(_encode_again(cache, writer, of_chunks, progress))
    return lines


def _turn(cache: Cache, group: EncoderGroup) -> tuple[int, bool]:
    """Sort features after those that they are derived from, and imported vectors, which end a repair, after others."""
    return derivation_depth(cache, group), group.is_imported


def _encode_again(cache: Cache, writer: FeatureWriter, findings: Sequence[Finding], progress: Progress) -> str:
    """Encode damaged and missing chunks, one at a time: a killed repair has withdrawn one chunk at most."""
    group, source = writer.group, reopen_item_source(cache, writer.group.modality)
    chunks = sorted({finding.chunk for finding in findings})
    progress.start(f"repairing {group.name}", cache.info.count_items(group.modality, chunks), noun(group.modality))
    for chunk in chunks:
        writer.leases.acquire(chunk, wait=True)
        withdraw(group, chunk, [finding.name for finding in findings if finding.chunk == chunk and finding.is_damage])
        task = lease_chunk(writer, chunk)
        if task.missing:
            encode_chunks(cache, source, group.modality, [task], progress, threads=num_cores())
    progress.finish()
    return f"{group.name} ({', '.join(writer.features)}): encoded {pluralize(len(chunks), 'chunk')} again"


@dataclass(kw_only=True)
class RetryReport:
    """Result of retrying the failed items of one encoder; `reasons` counts the items that failed again by kind."""

    modality: str
    encoder: str
    num_tried: int = 0
    num_recovered: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        """Return a summary in one line."""
        failed = "; ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        recovered = pluralize(self.num_recovered, "has", "have")
        return (
            f"{self.encoder}: retried {self.num_tried:,} failed {noun(self.modality)}, {recovered} features now, "
            f"{self.num_tried - self.num_recovered:,} failed again{': ' + failed if failed else ''}"
        )

    def to_json(self) -> dict[str, object]:
        """Return the record as JSON values."""
        return {
            "encoder": self.encoder,
            "num_tried": self.num_tried,
            "num_recovered": self.num_recovered,
            "reasons": dict(self.reasons),
        }


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
) -> list[RetryReport]:
    """Retry the files that failed, after one was replaced or a network came back; all other rows stay unchanged.

    Captions that failed are blank and remain failed, because captions are part of the item table. The arguments and
    errors are those of `extract`.
    """
    progress = to_progress(progress)
    source, settings = open_request(source, cache, settings, options)
    specs = join_encoders(image_encoder, text_encoder, encoder)
    job = open_job(source, cache, specs, settings=settings, repair_items=True, progress=progress)
    worker = Worker(job, source=source, device=job_devices(job.settings)[0])
    reports: list[RetryReport] = []
    with record_job(worker.cache, job, "retry") as outcome, ThreadPoolExecutor(job.settings.num_threads) as executor:
        for modality, writers in worker.writers.items():
            if MODALITIES[modality].kind == "files":
                reports += _retry_modality(worker, modality, writers, executor, progress)
        if any(report.num_tried for report in reports):
            outcome["encoders"] = [report.to_json() for report in reports]
    return reports


def _retry_modality(
    worker: Worker,
    modality: Modality,
    writers: Sequence[FeatureWriter],
    executor: ThreadPoolExecutor,
    progress: Progress,
) -> list[RetryReport]:
    reports = [RetryReport(modality=modality, encoder=writer.group.name) for writer in writers]
    num_chunks = worker.cache.info.num_chunks(modality)
    progress.start(f"looking for failed {noun(modality)}", num_chunks, "chunks")
    for chunk in range(num_chunks):
        _retry_chunk(worker, writers, reports, chunk, executor)
        progress.advance(1)
    progress.finish()
    return reports


def _retry_chunk(
    worker: Worker,
    writers: Sequence[FeatureWriter],
    reports: Sequence[RetryReport],
    chunk: int,
    executor: ThreadPoolExecutor,
) -> None:
    rows = sorted(set().union(*(_failed_rows(writer, chunk) for writer in writers)))
    if not rows:
        return
    items = worker.cache.items(writers[0].group.modality, chunk=chunk).take(rows)
    loaded = dict(zip(rows, load_items(worker.source, items, writers, executor), strict=True))
    for item, row in zip(items.to_pylist(), rows, strict=True):
        check_length(to_file_item(item), loaded[row], writers[0].group.modality)
    for number, (writer, report) in enumerate(zip(writers, reports, strict=True)):
        writer.leases.acquire(chunk, wait=True)
        retried = {row: loaded[row] for row in rows if row in _failed_rows(writer, chunk)}
        failures = [item.failures[number] for item in retried.values()]
        reasons = [failure.partition(":")[0] for failure in failures if failure is not None]
        report.num_tried += len(retried)
        report.num_recovered += len(retried) - len(reasons)
        report.reasons.update(reasons)
        if len(reasons) < len(retried):
            _rewrite_chunk(writer, chunk, retried, number)
        writer.leases.release(chunk)


def _failed_rows(writer: FeatureWriter, chunk: int) -> set[int]:
    """Return the rows of a chunk, counted from its start, that were tried and have no feature."""
    commit = writer.group.commit(chunk)
    if commit is None:
        return set()
    reasons = [commit.failures[name] for name in writer.features if writer.group.has(commit, name)]
    return {row for failures in reasons for row, reason in enumerate(failures) if has_failed(reason)}


def _rewrite_chunk(writer: FeatureWriter, chunk: int, retried: Mapping[int, LoadedItem], number: int) -> None:
    """Write a chunk again, with the features of the retried rows; `number` is the writer's position in their inputs."""
    commit = writer.group.commit(chunk)
    assert commit is not None  # some of its rows failed
    features = [name for name in writer.features if writer.group.has(commit, name)]
    buffer = BatchBuffer(writer, features, len(commit.hashes))
    add_loaded(buffer, retried.items(), number)
    items = [retried.get(row) for row in range(len(commit.hashes))]
    hashes = [None if item is None else item.hash for item in items]
    failures = [PENDING if item is None else item.failures[number] for item in items]
    commit_chunk(writer.group, chunk, buffer.features, hashes, dict.fromkeys(features, failures), overwrite_failed=True)
