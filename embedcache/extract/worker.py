"""A worker: the open encoders of one process, and the chunks it encodes."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from embedcache.devices import AUTO
from embedcache.encoders.base import Encoder, Modality
from embedcache.encoders.open import EncoderSpec, open_encoder, recorded_settings
from embedcache.encoders.settings import EncoderSettings
from embedcache.errors import SourceError, first_few
from embedcache.extract.feature_writer import (
    ChunkTask,
    CpuGate,
    FeatureWriter,
    check_features,
    choose_features,
    create_writer,
    lease_chunk,
    lease_free_chunks,
)
from embedcache.extract.loop import encode_chunks
from embedcache.extract.settings import ExtractJob
from embedcache.extract.views import open_view
from embedcache.files import is_remote, open_path
from embedcache.locks import divided_work
from embedcache.modalities import noun, option_of
from embedcache.processes import num_cores
from embedcache.progress import NullProgress, Progress
from embedcache.registry import trust_files
from embedcache.sources import Source, reopen_source
from embedcache.sources.files import TABLE_SUFFIXES, has_suffix
from embedcache.store.cache import Cache
from embedcache.store.group import find_group


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What one or more processes encoded for one feature writer.

    Args:
        encoder: name of its folder.
        chunks: chunk -> rows at its start that were stored already and not encoded again.
    """

    modality: str
    encoder: str
    features: tuple[str, ...]
    chunks: Mapping[int, int]


def merge_reports(reports: Iterable[ShardReport]) -> list[ShardReport]:
    """Merge the reports of several processes into one per feature writer, in the order of first appearance."""
    merged: dict[tuple[str, str], ShardReport] = {}
    for report in reports:
        earlier = merged.get((report.modality, report.encoder), report)
        merged[report.modality, report.encoder] = replace(report, chunks={**earlier.chunks, **report.chunks})
    return list(merged.values())


class Worker:
    """The encoders of a job on one device, which encode its chunks.

    Args:
        source: the job's source, if this process has it open already; None opens it.

    Raises:
        SourceError: the source lacks a modality.
        UnknownNameError: an encoder, feature or view is unknown.
        FingerprintError: the cache holds features of another encoder of that name.
    """

    def __init__(self, job: ExtractJob, *, source: Source | None = None, device: str = "cpu") -> None:
        self.cache = Cache(job.cache)
        if source is None:
            with trust_files():  # the process that made the job has opened this source
                source = reopen_source(job.source)
        self.source = source
        self.settings = job.settings
        self.writers = _open_writers(self.cache, job, device)

    def missing(self, modality: Modality) -> list[int]:
        """Return the chunks of this shard that lack a feature."""
        return [chunk for chunk in self._chunks(modality) if any(w.missing(chunk) for w in self.writers[modality])]

    def _chunks(self, modality: Modality) -> list[int]:
        return list(filter(self.settings.is_in_shard, range(self.cache.info.num_chunks(modality))))

    def run(self, progress: Progress | None = None) -> list[ShardReport]:
        """Encode every missing chunk of the shard."""
        progress = progress or NullProgress()
        self._take_part()
        reports = self.empty_reports()
        for modality in self.writers:
            chunks = self.missing(modality)
            if chunks:
                progress.start(step_name(modality), self.cache.info.count_items(modality, chunks), noun(modality))
                reports += self.encode(modality, chunks, progress)
                progress.finish()
        return merge_reports(reports)

    def _take_part(self) -> None:
        """Take part in the work on every folder that lacks a chunk, so that nobody deletes one before its turn."""
        with divided_work(is_divided=self.settings.is_divided):
            for modality, writers in self.writers.items():
                chunks = self._chunks(modality)
                for writer in writers:
                    if any(map(writer.missing, chunks)):
                        writer.leases.take_part()

    def encode(self, modality: Modality, chunks: Sequence[int], progress: Progress) -> list[ShardReport]:
        """Encode chunks: first those that no other process works on, then those that other processes did not finish."""
        writers, encoded = self.writers[modality], defaultdict[str, dict[int, int]](dict)

        def encode_all(tasks: Iterable[ChunkTask]) -> None:
            recorded = _record_chunks(tasks, encoded)
            encode_chunks(self.cache, self.source, modality, recorded, progress, threads=self.settings.num_threads)

        with divided_work(is_divided=self.settings.is_divided):
            encode_all(lease_free_chunks(writers, chunks))
            for chunk in chunks:
                for writer in writers:
                    if writer.missing(chunk, refresh=True):
                        encode_all([lease_chunk(writer, chunk)])
        return [_report(writer, encoded[writer.group.name]) for writer in writers]

    def empty_reports(self) -> list[ShardReport]:
        """Return one report per feature writer, without chunks."""
        return [_report(writer, {}) for writers in self.writers.values() for writer in writers]


def step_name(modality: Modality) -> str:
    """Return the name under which progress of a modality is reported."""
    return f"encoding {noun(modality)}"


def _report(writer: FeatureWriter, chunks: Mapping[int, int]) -> ShardReport:
    return ShardReport(
        modality=writer.group.modality,
        encoder=writer.group.name,
        features=tuple(writer.features),
        chunks=dict(chunks),
    )


def _record_chunks(tasks: Iterable[ChunkTask], encoded: Mapping[str, dict[int, int]]) -> Iterator[ChunkTask]:
    """Iterate over tasks, and record each chunk and its stored rows for its encoder's folder."""
    for task in tasks:
        for writer in task.missing:
            encoded[writer.group.name][task.chunk] = task.num_stored
        if task.missing:
            yield task


def _other_source(cache: Cache, job: ExtractJob, modality: Modality) -> str:
    """Return what to do about a source that lacks items: a column, a table in its folder, or the file as one."""
    columns = [name for name in cache.columns if name != "key"]
    if job.source["type"] == "table" and columns:
        option = f"--{'caption' if modality == 'text' else modality}-column"
        return f"name the column that holds them with {option}; columns without a role are {first_few(columns, 10)}"
    if job.source["type"] == "texts":
        return f"if the file is a table, extract table:{job.source['path']} into a new folder"
    if job.source["type"] == "folder" and not is_remote(open_path(job.source["path"])):
        for path in sorted(Path(job.source["path"]).iterdir()):
            if has_suffix(path.name, TABLE_SUFFIXES):
                return f"use the table in that folder as the source: {path}"
    return "check the source"


def _open_writers(cache: Cache, job: ExtractJob, device: str) -> dict[Modality, list[FeatureWriter]]:
    specs: Mapping[Modality, Sequence[EncoderSpec]] = {
        modality: [EncoderSpec.parse(spec) for spec in requested] for modality, requested in job.encoders.items()
    }
    for modality in specs:
        if not cache.info.num_items.get(modality):
            option = option_of(modality, "encoder", "SPEC")
            step = _other_source(cache, job, modality)
            raise SourceError(f"cache {cache.path} has no {modality} items; omit {option}, or {step}")
    encoders: dict[Modality, list[Encoder]] = {
        modality: [
            open_encoder(spec, modality=modality, settings=_encoder_settings(cache, job, modality, spec, device))
            for spec in requested
        ]
        for modality, requested in specs.items()
    }
    check_features([encoder for group in encoders.values() for encoder in group], job.settings.features)
    gate = CpuGate(device, cores=min(num_cores(), job.settings.num_threads))
    dtype = job.settings.dtype
    views = [open_view(name) for name in job.settings.views]
    writers: dict[Modality, list[FeatureWriter]] = {}
    for modality, modality_encoders in encoders.items():
        writers[modality] = []
        for spec, encoder in zip(specs[modality], modality_encoders, strict=True):
            features = choose_features(encoder, job.settings.features)
            executor = ThreadPoolExecutor(1, thread_name_prefix=spec.folder)  # shared by the encoder's views
            writers[modality] += [
                create_writer(cache, spec, encoder, features, dtype, view=view, executor=executor, gate=gate)
                for view in [None, *(view for view in views if view.modality == modality)]
            ]
    return writers


def _encoder_settings(
    cache: Cache, job: ExtractJob, modality: Modality, spec: EncoderSpec, device: str
) -> EncoderSettings:
    """Return how an encoder runs: what is `auto` is as recorded with its features, or else as the job says."""
    settings = replace(job.settings.encoder, device=device, features=job.settings.features)
    stored = find_group(cache.path, modality, spec.folder, cache.info)
    if stored is None:
        return replace(settings, precision=job.precisions.get((modality, spec.folder), settings.precision))
    recorded = recorded_settings(stored.fingerprint, device)
    if settings.backend == AUTO:
        settings = replace(settings, backend=recorded["backend"], device=recorded["device"])
    return replace(settings, precision=recorded["precision"]) if settings.precision == AUTO else settings
