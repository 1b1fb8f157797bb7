"""Extraction: encode the items of a source with frozen encoders and store the features in a cache.

Its plan estimates the items, bytes, memory and time before it is run.
"""

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Unpack

from embedcache.encoders.base import Modality
from embedcache.encoders.open import EncoderSpec, check_spec
from embedcache.encoders.views import open_view
from embedcache.errors import DiskFullError, PathError, SettingError, SourceError, UnfinishedError, quoted
from embedcache.extract.encode import Encoders, open_encoders
from embedcache.extract.prototypes import PrototypesSource, store_rows
from embedcache.extract.settings import ExtractJob, ExtractSettings
from embedcache.files import AnyPath, has_locks, is_remote, locked, open_path, remove_partials
from embedcache.modalities import IMPORTED_SOURCE, MODALITIES, ModalityName, Source, noun
from embedcache.processes import (
    AUTO,
    all_devices,
    announce_device,
    connected,
    num_cores,
    run_processes,
    run_ray_tasks,
    torch_device,
)
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.provenance import new_record_path, record_stage
from embedcache.registry import require, trust_code, unknown_name
from embedcache.settings import flat_settings, format_bytes, from_flat, merge_settings, replace_fields
from embedcache.sources.open import RecordedSource, SourceSettings, below_named, open_source, remember
from embedcache.store.cache import Cache
from embedcache.store.commits import has_failed
from embedcache.store.feature import open_group
from embedcache.store.indexing import index, open_indexed
from embedcache.store.layout import SUBSET, CacheInfo, info_path, is_cache_at, is_description, read_info, write_info
from embedcache.store.producer import FillReport, Target, add_features, count_filled, fill_all, find_unfinished
from embedcache.store.writer import ChunkFeatures

if TYPE_CHECKING:
    from embedcache.options import ExtractOptions

_SOURCE_TYPE = "source_type"

_PROBE_BATCHES = 4
_COMMIT_BYTES = 24
"""Per item in a commit: its hash, and sometimes the reason of a failure."""


def extract(
    source: Source | object,
    cache: AnyPath,
    *,
    image_encoder: str | Sequence[str] = (),
    text_encoder: str | Sequence[str] = (),
    encoder: Mapping[str, str | Sequence[str]] | None = None,
    settings: ExtractSettings | None = None,
    progress: AnyProgress = None,
    **options: Unpack["ExtractOptions"],
) -> list[FillReport]:
    """Encode the items of a source once and store the features in a cache.

    Committed chunks are not computed again, so an interrupted extraction resumes where it stopped, and several
    processes on one cache share the work. An item that cannot be read becomes a row with a reason.

    Args:
        source: the raw samples: a source, or what `open_source` takes. The path of the cache itself stands for the
            samples that it has: its source is not compared with them, and is opened for items in files only.
        cache: path or URL of a new folder, or of a cache of this source.
        image_encoder: one encoder of images or several, as `family:model`.
        text_encoder: encoders of texts.
        encoder: modality -> encoders, of any modality.
        settings: how features are extracted and stored.
        options: settings by their names on the command line, which replace those of `settings`;
            also those of `SourceSettings` and `source_type`, if the source is not open yet.
        progress: shows the number of encoded items.

    Returns:
        One report per encoder and view.

    Raises:
        SettingError: no encoder is named, or the cache was imported or merged and is not the source itself.
        UnknownNameError: a modality, encoder or feature is unknown.
        SourceError: the source cannot be indexed, lacks a modality, or none of its items can be read.
        FingerprintError: the cache holds other samples, or features of a different encoder of that name.
        DiskFullError: the disk is full; committed chunks stay valid, so run again with more space.

    Example:
        >>> encoder = "embedcache.testing.examples:open_example"  # needs no weights
        >>> embedcache.extract_features("photos", "photos-cache", image_encoder=encoder, text_encoder=encoder)[0]
        open_example (vector): encoded 12 images, reused 0, failed 0
        >>> embedcache.Cache("photos-cache").feature("image").load().shape
        (12, 48)
    """
    progress = to_progress(progress)
    encoders = join_encoders(image_encoder, text_encoder, encoder)
    job = open_job(source, cache, encoders, settings=settings, options=options, progress=progress)
    with _record(job, "extract") as outcome:
        reports = run_job(job, progress)
        if isinstance(job.opened, PrototypesSource):
            reports.append(store_rows(Cache(job.cache), job.opened, dtype=job.settings.dtype, progress=progress))
        if any(report.computed for report in reports):
            outcome["encoders"] = [vars(report) for report in reports]
    _check_any_encoded(job, reports)
    return reports


def retry_failed(
    source: Source | object,
    cache: AnyPath,
    *,
    image_encoder: str | Sequence[str] = (),
    text_encoder: str | Sequence[str] = (),
    encoder: Mapping[str, str | Sequence[str]] | None = None,
    settings: ExtractSettings | None = None,
    progress: AnyProgress = None,
    **options: Unpack["ExtractOptions"],
) -> list[FillReport]:
    """Retry the files that failed, after one was replaced or a network came back. All other rows stay unchanged.

    Chunks of files that are missing, as after a kill, are also encoded. Captions that failed are blank and remain
    failed, because captions are part of the item table. Arguments and errors are the same as for `extract_features`.

    Example:
        >>> encoder = "embedcache.testing.examples:open_example"
        >>> embedcache.extract_features("downloads", "downloads-cache", image_encoder=encoder)[0].failures
        {'empty file': 1}
        >>> _ = Path("downloads/00003.png").write_bytes(Path("photos/00003.png").read_bytes())
        >>> embedcache.retry_failed("downloads", "downloads-cache", image_encoder=encoder)[0]
        open_example (vector): encoded 1 image, reused 11, failed 0
    """
    progress = to_progress(progress)
    encoders = join_encoders(image_encoder, text_encoder, encoder)
    job = open_job(source, cache, encoders, settings=settings, options=options, accept_replaced=True, progress=progress)
    producers = [
        replace(opened, folders=[folder])  # each tries its own failed rows
        for opened in open_encoders(job, job_devices(job.settings)[0])
        if opened.source is not None
        for folder in opened.folders
    ]
    with _record(job, "retry") as outcome:
        reports = fill_all(producers, rows="failed", progress=progress)
        if any(report.computed for report in reports):
            outcome["encoders"] = [vars(report) for report in reports]
    return reports


def open_source_or_cache(
    location: object, cache: AnyPath, *, kind: str | None = None, settings: SourceSettings | None = None
) -> Source:
    """Open a source; at the location of the cache that it is extracted into, the one that the cache recorded.

    Raises:
        SettingError: a kind or settings of a source that the cache recorded.
        PathError, SourceError, UnknownNameError: as `open_source`.
    """
    if not (isinstance(location, str | os.PathLike) and is_cache_at(location, cache)):
        return open_source(location, kind=kind, settings=settings)
    if kind is not None:
        raise SettingError(f"source_type: expected none, as the source is the cache itself, got {kind!r}; omit it")
    (settings or SourceSettings()).check_supported("cache")
    info = read_info(open_path(cache))
    return RecordedSource(info.source, info.index_digest)


def join_encoders(
    image_encoder: str | Sequence[str],
    text_encoder: str | Sequence[str],
    encoder: Mapping[str, str | Sequence[str]] | None,
) -> dict[ModalityName, tuple[str, ...]]:
    """Return modality -> encoders, in the order of the table of modalities, without modalities that have none."""
    named: dict[str, tuple[str, ...]] = {"image": _specs(image_encoder), "text": _specs(text_encoder)}
    if not isinstance(encoder, Mapping | None):
        raise SettingError(f"encoder: expected encoders by modality, such as audio=SPEC, got {encoder!r}")
    for modality, specs in (encoder or {}).items():
        if modality not in MODALITIES:
            raise unknown_name("modality", modality, MODALITIES)
        named[modality] = (*named.get(modality, ()), *_specs(specs))
    return {modality.name: named[name] for name, modality in MODALITIES.items() if named.get(name)}


def _specs(specs: str | Sequence[str]) -> tuple[str, ...]:
    listed = (specs,) if isinstance(specs, str) else tuple(specs) if isinstance(specs, Iterable) else None
    if listed is None or not all(isinstance(spec, str) for spec in listed):
        raise SettingError(f"expected the name of an encoder, such as st:all-MiniLM-L6-v2, or several, got {specs!r}")
    return listed


def open_job(
    source: Source | object,
    cache: AnyPath,
    encoders: Mapping[ModalityName, tuple[str, ...]],
    *,
    settings: ExtractSettings | None = None,
    options: Mapping[str, Any] | None = None,
    accept_replaced: bool = False,
    progress: Progress,
) -> ExtractJob:
    """Open the source, check the request, then index the source, or check that the cache's index matches it.

    Args:
        options: settings by their names on the command line; also those of the source, if it is not open yet.
        accept_replaced: whether items that failed before may have changed in the source.

    Raises:
        SettingError: no encoder is named, a name is invalid, or two would be stored as one; or the cache has no such
            source, or is its own source and should get more samples.
        PathError, SourceError: the source, or the one that the cache recorded, cannot be opened.
        UnknownNameError: a view is unknown.
        MissingExtraError: the package that decodes items of a modality is not installed.
    """
    options = options or {}
    of_source = {_SOURCE_TYPE, *(item.name for item in flat_settings(SourceSettings))} & options.keys()
    if not isinstance(source, Source):
        chosen = {name: options[name] for name in of_source - {_SOURCE_TYPE}}
        source_settings = from_flat(SourceSettings, chosen)
        source = open_source_or_cache(source, cache, kind=options.get(_SOURCE_TYPE), settings=source_settings)
    elif of_source:
        raise SettingError(f"{min(of_source)}: expected a location, got an open source; open it with settings")
    source = below_named(source)
    of_extract = {name: value for name, value in options.items() if name not in of_source}
    settings = merge_settings(ExtractSettings, settings, of_extract)

    _check_encoders(encoders, settings)
    if isinstance(source, PrototypesSource) and (other := [name for name in encoders if name != "text"]):
        raise SettingError(f"{other[0]}_encoder: expected none, as prototypes are rows of {source.spec.text}; omit it")
    for device in job_devices(settings) if settings.engine == "local" else settings.devices:
        torch_device(device)
    path = open_path(cache)
    if isinstance(source, RecordedSource):
        _check_recorded(source, path, encoders, settings)
    else:
        _index(source, path, settings, accept_replaced=accept_replaced, progress=progress)
    remove_partials(path)
    reads_files = any(MODALITIES[modality].kind == "files" for modality in encoders)
    return ExtractJob(
        cache=str(path),
        source=source.describe(),
        encoders=encoders,
        settings=settings,
        places=getattr(source, "places", None) if reads_files else None,
        opened=source,
    )


def _index(source: Source, path: Path, settings: ExtractSettings, *, accept_replaced: bool, progress: Progress) -> None:
    """Index the source, or check that the cache's index matches it."""
    _check_has_a_source(path)
    described = source.describe()
    if not is_description(described):
        raise SourceError(f"{type(source).__name__}.describe: expected a type and a path, got {described!r}")
    trust_code(described["type"])  # the user gave it as an object, so this process may open it again
    info = index(
        source,
        path,
        chunk_size=settings.chunk_size,
        limit=settings.limit,
        extend=settings.extend,
        accept_replaced=accept_replaced,
        progress=progress,
    )
    remember(described, info.index_digest)
    _record_location(described, path, info, progress)
    if info.num_samples == settings.limit:
        progress.note(
            f"the cache has the first {info.num_samples:,} samples (--limit); --extend with a larger --limit, or none, "
            "appends the next ones"
        )


def _check_recorded(
    source: RecordedSource,
    path: Path,
    encoders: Mapping[ModalityName, Sequence[str]],
    settings: ExtractSettings,
) -> None:
    """Check that a cache has the items that the encoders ask for, as far as its source has to be read."""
    for name, is_given in (("extend", settings.extend), ("limit", settings.limit is not None)):
        if is_given:
            raise SettingError(f"{name}: expected a source of more samples, got the cache itself; name its source")
    info = open_indexed(path, chunk_size=settings.chunk_size)
    in_files = [each for each in encoders if MODALITIES[each].kind == "files" and info.num_items.get(each)]
    for modality in in_files:  # hashes of imported vectors and of files cannot be compared
        groups = Cache(path).encoders(modality)
        if info.source.get("type") == IMPORTED_SOURCE or any(group.is_imported for group in groups):
            step = f"extract the {noun(modality)} into a new folder"
            raise SettingError(f"{path} has imported vectors of {noun(modality)}: encode its captions only; {step}")
    if in_files:
        try:
            _ = source.opened
        except PathError as error:
            if SUBSET in info.source:
                raise
            raise PathError(f"{error}; if the source of {path} has moved, name it in place of the cache") from None


def _check_has_a_source(cache_path: Path) -> None:
    """Check that a cache, if there is one, was made of raw samples, not of vectors or of other caches."""
    if not info_path(cache_path).is_file():
        return
    source = read_info(cache_path).source
    is_imported = source.get("type") == IMPORTED_SOURCE
    if is_imported or SUBSET in source:
        made, items = ("imported from", "captions") if is_imported else ("cut or merged from caches of", "samples")
        command = f"embedcache extract {quoted(cache_path)} {quoted(cache_path)}"
        raise SettingError(f"{cache_path} was {made} {source['path']}; to encode its {items}: {command}")


def _record_location(described: Mapping[str, Any], cache_path: Path, info: CacheInfo, progress: Progress) -> None:
    """Record where the source of a cache is now, if it is elsewhere than the cache says.

    Rows and digests stay as they are. A cache that cannot be written keeps the old place.
    """
    found = dict(described)
    stored = info.source
    if found["type"] != stored.get("type") or found["path"] == stored.get("path"):
        return
    with suppress(OSError), locked(cache_path):
        info = read_info(cache_path)  # read again: another process may have appended samples
        write_info(cache_path, replace_fields(info, source=found))
        progress.note(f"the source of {cache_path} is now {found['path']}; it was {stored.get('path')}")


def _check_encoders(encoders: Mapping[ModalityName, Sequence[str]], settings: ExtractSettings) -> None:
    """Check, before hours of indexing, that items can be decoded, views suit the encoders, and each has its folder.

    Encoders that this process opens must be of known families, and their files exist.
    """
    if not encoders:
        raise SettingError("expected at least one encoder, got none; name one: --text-encoder st:all-MiniLM-L6-v2")
    for spec in [spec for specs in encoders.values() for spec in specs if settings.engine == "local"]:
        check_spec(spec)
    for package in filter(None, (MODALITIES[modality].package for modality in encoders)):
        require(package, extra="media")
    views = [open_view(name) for name in settings.views]
    for view in views:
        if view.modality not in encoders:
            raise SettingError(
                f"view {view.name} applies to {noun(view.modality)}, but no {view.modality} encoder is named"
            )
    for modality, specs in encoders.items():
        suffixes = ["", *(view.suffix for view in views if view.modality == modality)]
        folders = Counter(EncoderSpec.parse(spec).folder + suffix for spec in specs for suffix in suffixes)
        folder, count = max(folders.items(), key=lambda item: item[1], default=("", 0))
        if count > 1:
            raise SettingError(f"{count} {modality} encoders or views would be stored as {folder}; name each once")


def run_job(job: ExtractJob, progress: Progress) -> list[FillReport]:
    """Encode all missing chunks: in this process, in one process per device, or as Ray tasks.

    Each process opens the encoders and fills the cache, as several commands on one cache do. An error in one ends the
    others; Ray repeats the tasks of a machine that was lost.

    Raises:
        UnfinishedError: all worker processes died, or one that had chunks of its own.
        MissingExtraError: Ray is not installed.
    """
    if job.settings.engine == "ray":
        return _run_ray(job, progress)
    devices = job_devices(job.settings)
    for device in devices:
        announce_device(device)
    return _fill_cache(job, devices[0], progress) if len(devices) == 1 else _run_devices(job, devices, progress)


def job_devices(settings: ExtractSettings) -> tuple[str, ...]:
    """Return the devices that share the work on this machine: those named, else all GPUs; onnxruntime is on the CPU."""
    if settings.devices not in ((), (AUTO,)):
        return settings.devices
    return ("cpu",) if settings.encoder.backend == "onnxruntime" else all_devices()


def _fill_cache(job: ExtractJob, device: str, progress: Progress) -> list[FillReport]:
    """Encode the missing chunks of a shard on one device."""
    return fill_all(open_encoders(job, device), shard=job.settings.shard_numbers, progress=progress)


def _run_devices(job: ExtractJob, devices: Sequence[str], progress: Progress) -> list[FillReport]:
    """Encode in one process per device.

    They lease chunks one by one, and finish the chunks of one that was killed. Behind a URL, and where locks are
    skipped, nothing can be leased, and each has a fixed part of the chunks instead.
    """
    count = len(devices)
    threads = max(1, num_cores() // count)
    is_split = not has_locks(open_path(job.cache))
    parts = _split_job(job, count) if is_split else [replace(job, opened=None)] * count
    tasks = [(part, device, threads) for part, device in zip(parts, devices, strict=True)]
    reports, num_died = run_processes(_run_part, tasks, progress, is_shared=True)
    if num_died and (is_split or not reports):
        raise UnfinishedError(f"{num_died} of {count} worker processes died; finished chunks are stored; run it again")
    if num_died:
        progress.note(f"{num_died} of {count} worker processes died; the others finished their chunks")
    return _join_reports(job, reports)


def _run_ray(job: ExtractJob, progress: Progress) -> list[FillReport]:
    """Encode on a cluster whose machines all see the cache and the source; each task opens its own source."""
    with connected(job.settings.address) as ray:
        num_gpus = int(ray.cluster_resources().get("GPU", 0))
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        num_nodes = max(1, len(nodes))
        count = job.settings.actors or num_gpus or num_nodes

        threads = max(1, num_cores() // ceil(count / num_nodes))
        tasks = [(part, "cuda" if num_gpus else "cpu", threads) for part in _split_job(job, count)]
        reports = run_ray_tasks(ray, _run_part, tasks, progress, num_gpus=min(num_gpus, 1))
    return _join_reports(job, reports)


def _split_job(job: ExtractJob, count: int) -> list[ExtractJob]:
    return [replace(job, settings=job.settings.split_shard(number, count), opened=None) for number in range(count)]


def _run_part(task: tuple[ExtractJob, str, int], progress: Progress) -> list[FillReport]:
    """Run in another process: encode on one device with a fixed number of threads."""
    import torch

    job, device, threads = task
    torch.set_num_threads(threads)  # also for encoders that stay on the CPU; Ray allows one per requested CPU
    settings = replace_fields(job.settings, threads=job.settings.threads or threads)
    return _fill_cache(replace(job, settings=settings), device, progress)


def _join_reports(job: ExtractJob, reports: Iterable[Sequence[FillReport]]) -> list[FillReport]:
    """Join the reports of several processes into one per folder."""
    cache = Cache(job.cache)
    num_computed = Counter[tuple[str, str, tuple[str, ...]]]()
    for report in chain.from_iterable(reports):
        num_computed[report.modality, report.encoder, tuple(report.features)] += report.computed
    return [
        count_filled(open_group(cache.path, modality, encoder, cache.info), "encoded", features, count)
        for (modality, encoder, features), count in num_computed.items()
    ]


def _record(job: ExtractJob, stage: str) -> AbstractContextManager[dict[str, Any]]:
    """Record a stage on a cache in its folder `records`."""
    request = {"source": job.source, "encoders": job.encoders, "settings": job.settings.to_json()}
    return record_stage(new_record_path(open_path(job.cache), stage), stage, request)


def _check_any_encoded(job: ExtractJob, reports: Sequence[FillReport]) -> None:
    cache = Cache(job.cache)
    for report in reports:
        failures = {kind: count for kind, count in report.failures.items() if has_failed(kind)}
        if failures and sum(report.failures.values()) == cache.info.num_items[report.modality]:
            reasons = "; ".join(f"{count} {reason}" for reason, count in failures.items())
            items = f"{sum(failures.values())} {noun(report.modality)}"
            step = f"embedcache inspect {quoted(cache.path)} names them; extract into a new folder"
            raise SourceError(f"all {items} failed: {reasons}; {step}")


@dataclass(frozen=True, kw_only=True)
class PlannedFeature:
    """Estimated size of one feature.

    Args:
        num_items: number of items in the chunks that lack it.
        item_bytes: bytes on disk per item; the mean of the probe where items differ in length.
    """

    name: str
    modality: Modality
    num_items: int
    item_bytes: float

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return round(self.num_items * (self.item_bytes + _COMMIT_BYTES))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Estimated size, memory and time of an extraction.

    Args:
        features: the features to compute; empty if nothing is missing.
        rates: modality -> items per second with all its encoders together, measured on one device.
        free_bytes: free space on the cache's disk, or None behind a URL.

    Example:
        >>> encoder = "embedcache.testing.examples:open_example"
        >>> plan = embedcache.plan_extraction("photos", "planned-cache", image_encoder=encoder)
        >>> plan.num_bytes, plan.memory_bytes
        (1440, 393216)
        >>> plan.check_space()  # raises DiskFullError if the disk is too small
    """

    cache: Path
    features: Sequence[PlannedFeature]
    rates: dict[Modality, float]
    num_processes: int
    free_bytes: int | None
    chunk_size: int

    @property
    def memory_bytes(self) -> int:
        """Memory for the outputs of two chunks: one is being encoded while the other is committed."""
        totals = [
            sum(feature.item_bytes for feature in self.features if feature.modality == modality)
            for modality in self.rates
        ]
        return round(2 * self.chunk_size * max(totals, default=0))

    @property
    def num_bytes(self) -> int:
        """Bytes on disk of everything that is missing."""
        return sum(feature.num_bytes for feature in self.features)

    def hours(self, modality: Modality) -> float:
        """Return the estimated time for one modality on all devices."""
        num_items = max(feature.num_items for feature in self.features if feature.modality == modality)
        return num_items / self.rates[modality] / self.num_processes / 3600

    def check_space(self) -> None:
        """Check that the disk can hold the features, or raise a `DiskFullError`."""
        if self.free_bytes is not None and self.num_bytes > self.free_bytes:
            needed = format_bytes(self.num_bytes)
            free = format_bytes(self.free_bytes)
            raise DiskFullError(f"{self.cache}: expected {needed} of free disk space, got {free}; store fewer features")


def plan(
    source: Source | object,
    cache: AnyPath,
    *,
    image_encoder: str | Sequence[str] = (),
    text_encoder: str | Sequence[str] = (),
    encoder: Mapping[str, str | Sequence[str]] | None = None,
    settings: ExtractSettings | None = None,
    progress: AnyProgress = None,
    **options: Unpack["ExtractOptions"],
) -> Plan:
    """Estimate the size and the time of an extraction, before hours are spent on it.

    The source is indexed, the encoders are opened, and a few batches are encoded without storing their outputs.
    Arguments and errors are the same as for `extract_features`.

    Example:
        >>> encoder = "embedcache.testing.examples:open_example"
        >>> plan = embedcache.plan_extraction("photos", "planned-cache", image_encoder=encoder)
        >>> [(feature.name, feature.num_items, feature.item_bytes) for feature in plan.features]
        [('open_example/vector', 12, 96.0)]
    """
    progress = to_progress(progress)
    requested = join_encoders(image_encoder, text_encoder, encoder)
    job = open_job(source, cache, requested, settings=settings, options=options, progress=progress)
    path = open_path(job.cache)
    features: list[PlannedFeature] = []
    rates: dict[Modality, float] = {}
    devices = job_devices(job.settings)
    for encoders in open_encoders(job, devices[0]):
        modality = MODALITIES[encoders.modality].name
        for target in encoders.targets:
            add_features(target)
        chunks = find_unfinished(encoders, shard=job.settings.shard_numbers)
        if chunks:
            rates[modality], encoded = _probe(encoders, min(chunks))
            for target in encoders.targets:
                features += _plan_features(target, chunks, encoded[target.group.name])
    return Plan(
        cache=path,
        features=features,
        rates=rates,
        num_processes=len(devices) if job.settings.engine == "local" else job.settings.actors or 1,
        free_bytes=None if is_remote(path) else shutil.disk_usage(path).free,
        chunk_size=Cache(path).info.chunk_size,
    )


def _plan_features(
    target: Target, chunks: Mapping[int, Mapping[str, Sequence[str]]], encoded: ChunkFeatures
) -> Iterator[PlannedFeature]:
    """Iterate over the features that one folder lacks in chunks; `encoded` are those of the first items."""
    group = target.group
    for name in target.outputs:
        missing_chunks = [chunk for chunk, missing in chunks.items() if name in missing.get(group.name, ())]
        num_items = group.info.count_items(group.modality, missing_chunks)
        sizes = [item.nbytes for item in encoded.items[name] if item is not None]
        yield PlannedFeature(
            name=f"{group.name}/{name}",
            modality=MODALITIES[group.modality].name,
            num_items=num_items,
            item_bytes=fmean(sizes or [0]),
        )


def _probe(encoders: Encoders, chunk: int) -> tuple[float, Mapping[str, ChunkFeatures]]:
    """Encode the first batches of a chunk; return items per second, without the first batch, and the features."""
    batch_size = max(folder.encoder.batch_size for folder in encoders.folders)
    num_items = min(_PROBE_BATCHES * batch_size, encoders.cache.info.count_items(encoders.modality, [chunk]))
    num_warmup = max(1, num_items // _PROBE_BATCHES)
    encoded = encoders.encode_rows(chunk, range(num_warmup))
    started = time.perf_counter()
    if num_items > num_warmup:
        encoded = encoders.encode_rows(chunk, range(num_warmup, num_items))
    rate = max(num_items - num_warmup, 1) / max(time.perf_counter() - started, 1e-9)
    return rate, encoded
