"""Extraction: encode the items of a source with frozen encoders and store the features in a cache.

Its plan estimates the items, bytes, memory and time before it is run.
"""

import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from itertools import chain, product
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Unpack

from embedcache.encoders.base import Modality
from embedcache.encoders.open import EncoderSpec, check_spec
from embedcache.encoders.views import View, open_view
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
"""Bytes per item in a commit: its hash, and the reason if it failed."""


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
        source: the raw samples: an open source, or any location that `open_source` accepts. The path of the cache
            itself stands for the samples in it. Its source is then opened for items in files only, and is not compared
            with the cache.
        cache: path or URL of a new folder, or of a cache of this source.
        image_encoder: one or several encoders of images, as `family:model`.
        text_encoder: one or several encoders of captions.
        encoder: modality -> encoders, for any modality.
        settings: how features are extracted and stored.
        options: settings by their names on the command line, which replace the values in `settings`. If the source is
            not open yet, they may include `source_type` and the fields of `SourceSettings`.
        progress: shows the number of encoded items.

    Returns:
        One report per encoder and view.

    Raises:
        SettingError: no encoder is named, or the cache was imported or merged and is not the source itself.
        UnknownNameError: a modality, encoder or feature is unknown.
        SourceError: the source cannot be indexed, lacks a modality, or none of its items can be read.
        FingerprintError: the cache contains other samples, or features of a different encoder of that name.
        DiskFullError: the disk is full. Committed chunks stay valid, so run again with more space.

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
        _add_reports(outcome, reports)

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

    producers = []
    for opened in open_encoders(job, job_devices(job.settings)[0]):
        if opened.source is None:
            continue
        # One producer per folder, as each has its own failed rows.
        for folder in opened.folders:
            producers.append(replace(opened, folders=[folder]))

    with _record(job, "retry") as outcome:
        reports = fill_all(producers, rows="failed", progress=progress)
        _add_reports(outcome, reports)
    return reports


def open_source_or_cache(
    location: object, cache: AnyPath, *, kind: str | None = None, settings: SourceSettings | None = None
) -> Source:
    """Open a source. If its location is the cache itself, open the source that the cache recorded.

    Raises:
        SettingError: a kind or settings are given for a source that the cache recorded.
        PathError, SourceError, UnknownNameError: as in `open_source`.
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
    """Return modality -> encoders in the order of `MODALITIES`, without modalities that have none."""
    specs_by_name: dict[str, tuple[str, ...]] = {"image": _specs(image_encoder), "text": _specs(text_encoder)}
    if not isinstance(encoder, Mapping | None):
        raise SettingError(f"encoder: expected encoders by modality, such as audio=SPEC, got {encoder!r}")
    for modality, specs in (encoder or {}).items():
        if modality not in MODALITIES:
            raise unknown_name("modality", modality, MODALITIES)
        specs_by_name[modality] = (*specs_by_name.get(modality, ()), *_specs(specs))

    encoders: dict[ModalityName, tuple[str, ...]] = {}
    for name, kind in MODALITIES.items():
        if specs_by_name.get(name):
            encoders[kind.name] = specs_by_name[name]
    return encoders


def _specs(specs: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(specs, str):
        return (specs,)

    listed = tuple(specs) if isinstance(specs, Iterable) else (specs,)
    if not all(isinstance(spec, str) for spec in listed):
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
        options: settings by their names on the command line, including settings of a source that is not open yet.
        accept_replaced: whether items that failed before may have changed in the source.

    Raises:
        SettingError: no encoder is named, a name is invalid, two encoders would be stored as one, the cache has no
            such source, or it is its own source and should get more samples.
        PathError, SourceError: the source, or the one that the cache recorded, cannot be opened.
        UnknownNameError: a view is unknown.
        MissingExtraError: the package that decodes items of a modality is not installed.
    """
    source_names = {_SOURCE_TYPE, *(item.name for item in flat_settings(SourceSettings))}
    source_options: dict[str, Any] = {}
    extract_options: dict[str, Any] = {}
    for name, value in (options or {}).items():
        if name in source_names:
            source_options[name] = value
        else:
            extract_options[name] = value

    if not isinstance(source, Source):
        kind = source_options.pop(_SOURCE_TYPE, None)
        source_settings = from_flat(SourceSettings, source_options)
        source = open_source_or_cache(source, cache, kind=kind, settings=source_settings)
    elif source_options:
        raise SettingError(f"{min(source_options)}: expected a location, got an open source; open it with settings")
    source = below_named(source)
    settings = merge_settings(ExtractSettings, settings, extract_options)

    # All mistakes are reported before the source is indexed, which may take hours.
    _check_encoders(encoders, settings)
    if isinstance(source, PrototypesSource):
        for modality in encoders:
            if modality != "text":
                step = f"expected none, as prototypes are rows of {source.spec.text}; omit it"
                raise SettingError(f"{modality}_encoder: {step}")
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

    # The user passed the source as an object, so this process may open it again.
    trust_code(described["type"])
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
    """Check a cache that is extracted into itself, and open its source if an encoder reads files."""
    for name, is_given in (("extend", settings.extend), ("limit", settings.limit is not None)):
        if is_given:
            raise SettingError(f"{name}: expected a source of more samples, got the cache itself; name its source")

    info = open_indexed(path, chunk_size=settings.chunk_size)
    reads_files = False
    for modality in encoders:
        if MODALITIES[modality].kind != "files" or not info.num_items.get(modality):
            continue
        reads_files = True

        # Hashes of imported vectors cannot be compared with hashes of files.
        groups = Cache(path).encoders(modality)
        if info.source.get("type") == IMPORTED_SOURCE or any(group.is_imported for group in groups):
            step = f"extract the {noun(modality)} into a new folder"
            raise SettingError(f"{path} has imported vectors of {noun(modality)}: encode its captions only; {step}")

    if reads_files:
        try:
            _ = source.opened
        except PathError as error:
            if SUBSET in info.source:
                raise
            raise PathError(f"{error}; if the source of {path} has moved, name it in place of the cache") from None


def _check_has_a_source(cache_path: Path) -> None:
    """Check that an existing cache was extracted from raw samples, not imported or cut or merged from other caches."""
    if not info_path(cache_path).is_file():
        return

    source = read_info(cache_path).source
    if source.get("type") == IMPORTED_SOURCE:
        origin = "imported from"
        items = "captions"
    elif SUBSET in source:
        origin = "cut or merged from caches of"
        items = "samples"
    else:
        return
    command = f"embedcache extract {quoted(cache_path)} {quoted(cache_path)}"
    raise SettingError(f"{cache_path} was {origin} {source['path']}; to encode its {items}: {command}")


def _record_location(described: Mapping[str, Any], cache_path: Path, info: CacheInfo, progress: Progress) -> None:
    """Record the present location of a cache's source if it has moved.

    Rows and digests stay as they are. A cache that cannot be written keeps the old location.
    """
    source = dict(described)
    stored = info.source
    if source["type"] != stored.get("type") or source["path"] == stored.get("path"):
        return

    with suppress(OSError), locked(cache_path):
        # Another process may have appended samples.
        info = read_info(cache_path)
        write_info(cache_path, replace_fields(info, source=source))
        progress.note(f"the source of {cache_path} is now {source['path']}; it was {stored.get('path')}")


def _check_encoders(encoders: Mapping[ModalityName, Sequence[str]], settings: ExtractSettings) -> None:
    """Check that items can be decoded, that views suit the encoders, and that each of them has a separate folder.

    Encoders that this process opens must belong to known families, and their files must exist.
    """
    if not encoders:
        raise SettingError("expected at least one encoder, got none; name one: --text-encoder st:all-MiniLM-L6-v2")

    # Ray's tasks open encoders on machines that may have other packages and files.
    if settings.engine == "local":
        for spec in chain.from_iterable(encoders.values()):
            check_spec(spec)
    for modality in encoders:
        package = MODALITIES[modality].package
        if package:
            require(package, extra="media")

    views = list(map(open_view, settings.views))
    for view in views:
        if view.modality not in encoders:
            raise SettingError(
                f"view {view.name} applies to {noun(view.modality)}, but no {view.modality} encoder is named"
            )
    _check_folders(encoders, views)


def _check_folders(encoders: Mapping[ModalityName, Sequence[str]], views: Sequence[View]) -> None:
    """Check that no two encoders or views of a modality are stored in one folder."""
    for modality, specs in encoders.items():
        suffixes = [""]
        for view in views:
            if view.modality == modality:
                suffixes.append(view.suffix)

        folders = Counter[str]()
        for spec, suffix in product(specs, suffixes):
            folders[EncoderSpec.parse(spec).folder + suffix] += 1
        for folder, count in folders.most_common(1):
            if count > 1:
                raise SettingError(f"{count} {modality} encoders or views would be stored as {folder}; name each once")


def run_job(job: ExtractJob, progress: Progress) -> list[FillReport]:
    """Encode all missing chunks in this process, in one process per device, or as Ray tasks.

    Each process opens the encoders and fills the cache, as several commands on one cache do. An error in one process
    ends the others. Ray repeats the tasks of a lost machine.

    Raises:
        UnfinishedError: all worker processes died, or one that had separate chunks.
        MissingExtraError: Ray is not installed.
    """
    if job.settings.engine == "ray":
        return _run_ray(job, progress)

    devices = job_devices(job.settings)
    for device in devices:
        announce_device(device)
    return _fill_cache(job, devices[0], progress) if len(devices) == 1 else _run_devices(job, devices, progress)


def job_devices(settings: ExtractSettings) -> tuple[str, ...]:
    """Return the devices that share the work on this machine: the requested devices, by default all GPUs.

    If onnxruntime is the backend, the default is the CPU.
    """
    if settings.devices not in ((), (AUTO,)):
        return settings.devices
    return ("cpu",) if settings.encoder.backend == "onnxruntime" else all_devices()


def _fill_cache(job: ExtractJob, device: str, progress: Progress) -> list[FillReport]:
    """Encode the missing chunks of a shard on one device."""
    return fill_all(open_encoders(job, device), shard=job.settings.shard_numbers, progress=progress)


def _run_devices(job: ExtractJob, devices: Sequence[str], progress: Progress) -> list[FillReport]:
    """Encode in one process per device.

    The processes lease chunks one by one, and finish the chunks of a process that was killed. Without locks, as behind
    a URL, no chunk can be leased, and each process gets a fixed part of the chunks instead.
    """
    count = len(devices)
    threads = max(1, num_cores() // count)
    is_split = not has_locks(open_path(job.cache))

    # An open source stays in this process; the others open it again.
    parts = _split_job(job, count) if is_split else [replace(job, opened=None)] * count
    tasks = list(zip(parts, devices, [threads] * count, strict=True))
    reports, num_died = run_processes(_run_part, tasks, progress, is_shared=True)

    # Leased chunks of a process that died are finished by the others, but no process has its fixed part.
    if num_died and (is_split or not reports):
        raise UnfinishedError(f"{num_died} of {count} worker processes died; finished chunks are stored; run it again")
    if num_died:
        progress.note(f"{num_died} of {count} worker processes died; the others finished their chunks")
    return _join_reports(job, reports)


def _run_ray(job: ExtractJob, progress: Progress) -> list[FillReport]:
    """Encode on a cluster of machines that can all read the cache and the source. Each task opens the source."""
    with connected(job.settings.address) as ray:
        num_gpus = int(ray.cluster_resources().get("GPU", 0))
        num_nodes = 0
        for node in ray.nodes():
            num_nodes += node["Alive"] and node["Resources"].get("CPU", 0) >= 1
        num_nodes = max(1, num_nodes)

        # Tasks on one machine share its cores.
        count = job.settings.actors or num_gpus or num_nodes
        threads = max(1, num_cores() // ceil(count / num_nodes))
        device = "cuda" if num_gpus else "cpu"
        tasks = [(part, device, threads) for part in _split_job(job, count)]
        reports = run_ray_tasks(ray, _run_part, tasks, progress, num_gpus=min(num_gpus, 1))
    return _join_reports(job, reports)


def _split_job(job: ExtractJob, count: int) -> list[ExtractJob]:
    return [replace(job, settings=job.settings.split_shard(number, count), opened=None) for number in range(count)]


def _run_part(task: tuple[ExtractJob, str, int], progress: Progress) -> list[FillReport]:
    """Encode on one device with a fixed number of threads, in a worker process."""
    import torch

    job, device, threads = task
    # Encoders that stay on the CPU also use these threads. Ray allows one per requested CPU.
    torch.set_num_threads(threads)
    settings = replace_fields(job.settings, threads=job.settings.threads or threads)
    return _fill_cache(replace(job, settings=settings), device, progress)


def _join_reports(job: ExtractJob, reports: Iterable[Sequence[FillReport]]) -> list[FillReport]:
    """Join the reports of several processes into one per folder."""
    cache = Cache(job.cache)
    num_computed = Counter[tuple[str, str, tuple[str, ...]]]()
    for report in chain.from_iterable(reports):
        num_computed[report.modality, report.encoder, tuple(report.features)] += report.computed

    joined = []
    for (modality, encoder, features), count in num_computed.items():
        group = open_group(cache.path, modality, encoder, cache.info)
        joined.append(count_filled(group, "encoded", features, count))
    return joined


def _record(job: ExtractJob, stage: str) -> AbstractContextManager[dict[str, Any]]:
    """Record a stage in the folder `records` of a cache."""
    request = {"source": job.source, "encoders": job.encoders, "settings": job.settings.to_json()}
    return record_stage(new_record_path(open_path(job.cache), stage), stage, request)


def _add_reports(outcome: dict[str, Any], reports: Sequence[FillReport]) -> None:
    """Add the reports to the record of a stage if any item was encoded."""
    if any(report.computed for report in reports):
        outcome["encoders"] = list(map(vars, reports))


def _check_any_encoded(job: ExtractJob, reports: Sequence[FillReport]) -> None:
    cache = Cache(job.cache)
    for report in reports:
        reasons = []
        num_failed = 0
        # Removed and pending items did not fail.
        for reason, count in report.failures.items():
            if has_failed(reason):
                reasons.append(f"{count} {reason}")
                num_failed += count

        if reasons and sum(report.failures.values()) == cache.info.num_items[report.modality]:
            items = f"{num_failed} {noun(report.modality)}"
            step = f"embedcache inspect {quoted(cache.path)} names them; extract into a new folder"
            raise SourceError(f"all {items} failed: {'; '.join(reasons)}; {step}")


@dataclass(frozen=True, kw_only=True)
class PlannedFeature:
    """Estimated size of one feature.

    Args:
        num_items: number of items in the chunks that lack it.
        item_bytes: bytes on disk per item, the mean over the encoded sample.
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
        features: the features to compute, empty if nothing is missing.
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
        """Memory for the outputs of two chunks: one is encoded while the other is committed."""
        totals: dict[Modality, float] = defaultdict(float)
        for feature in self.features:
            totals[feature.modality] += feature.item_bytes
        return round(2 * self.chunk_size * max(totals.values(), default=0))

    @property
    def num_bytes(self) -> int:
        """Bytes on disk of all missing features."""
        return sum(feature.num_bytes for feature in self.features)

    def hours(self, modality: Modality) -> float:
        """Return the estimated time for one modality on all devices."""
        num_items = max(feature.num_items for feature in self.features if feature.modality == modality)
        return num_items / self.rates[modality] / self.num_processes / 3600

    def check_space(self) -> None:
        """Raise a `DiskFullError` if the features do not fit on the disk."""
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
    devices = job_devices(job.settings)

    features: list[PlannedFeature] = []
    rates: dict[Modality, float] = {}
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
    """Iterate over the features that one folder lacks in chunks. `encoded` contains the features of the first items."""
    group = target.group
    for name in target.outputs:
        chunks_without = []
        for chunk, features_by_folder in chunks.items():
            if name in features_by_folder.get(group.name, ()):
                chunks_without.append(chunk)
        num_items = group.info.count_items(group.modality, chunks_without)

        # Items of some features differ in length, and items that failed have none.
        sizes = [item.nbytes for item in encoded.items[name] if item is not None]
        yield PlannedFeature(
            name=f"{group.name}/{name}",
            modality=MODALITIES[group.modality].name,
            num_items=num_items,
            item_bytes=fmean(sizes or [0]),
        )


def _probe(encoders: Encoders, chunk: int) -> tuple[float, Mapping[str, ChunkFeatures]]:
    """Encode the first batches of a chunk. Return items per second, without the first batch, and the features."""
    batch_size = max(folder.encoder.batch_size for folder in encoders.folders)
    num_items = min(_PROBE_BATCHES * batch_size, encoders.cache.info.count_items(encoders.modality, [chunk]))

    # The first batch warms the encoder up and is not timed.
    num_warmup = max(1, num_items // _PROBE_BATCHES)
    encoded = encoders.encode_rows(chunk, range(num_warmup))

    started = time.perf_counter()
    if num_items > num_warmup:
        encoded = encoders.encode_rows(chunk, range(num_warmup, num_items))
    rate = max(num_items - num_warmup, 1) / max(time.perf_counter() - started, 1e-9)
    return rate, encoded
