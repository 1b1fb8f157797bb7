"""Run an extraction: in this process, in one process per device, or as Ray tasks.

Each process opens the encoders and fills the cache, as several commands on one cache do: processes of one machine lease
chunks, and Ray tasks have shards. Ray repeats the tasks of a machine that was lost.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from math import ceil
from typing import Any

from embedcache.axis import Axis
from embedcache.devices import AUTO, all_devices, announce_device
from embedcache.encoders.base import Encoder, EncoderSettings, Modality
from embedcache.encoders.open import EncoderSpec, auto_precision, open_encoder, recorded_settings
from embedcache.encoders.views import View, open_view, reopen_view
from embedcache.errors import SourceError, UnfinishedError, first_few
from embedcache.extract.encode import Encoders, FolderEncoder, open_gate, view_fingerprint
from embedcache.extract.settings import ExtractJob, ExtractSettings
from embedcache.files import open_path
from embedcache.locks import has_locks
from embedcache.modalities import MODALITIES, encoder_option
from embedcache.processes import connected, num_cores, run_processes, run_ray_tasks
from embedcache.progress import Progress
from embedcache.registry import names_from, trust_files, unknown_name
from embedcache.settings import replace_fields
from embedcache.sources.open import open_below, reopen_source
from embedcache.store.cache import Cache
from embedcache.store.feature import EncoderGroup, Feature, create_group, find_group, open_group
from embedcache.store.producer import FillReport, Output, Target, count_filled, fill_all

_DERIVED_FEATURES = (
    "a model may also offer grid:K, K × K averages of its patches, kmeans:K, averages of K clusters of them, "
    "and layerN.NAME, computed from the state after block N"
)


def run_job(job: ExtractJob, progress: Progress) -> list[FillReport]:
    """Encode all missing chunks with the engine named in the settings; an error in one process ends the others.

    Raises:
        UnfinishedError: all worker processes died, or one that had chunks of its own.
        MissingExtraError: Ray is not installed.
    """
    if job.settings.engine == "ray":
        return _run_ray(job, progress)
    devices = job_devices(job.settings)
    for device in devices:
        announce_device(device)
    if len(devices) == 1:
        return _fill_cache(job, devices[0], progress)
    return _run_devices(job, devices, progress)


def job_devices(settings: ExtractSettings) -> tuple[str, ...]:
    """Return the devices that share the work on this machine: those named, else all GPUs; onnxruntime is on the CPU."""
    if settings.devices not in ((), (AUTO,)):
        return settings.devices
    return ("cpu",) if settings.encoder.backend == "onnxruntime" else all_devices()


def _fill_cache(job: ExtractJob, device: str, progress: Progress) -> list[FillReport]:
    """Encode the missing chunks of a shard on one device."""
    settings = job.settings
    encoders = open_encoders(job, device)
    return fill_all(encoders, shard=settings.shard_numbers, progress=progress)


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
        raise UnfinishedError(
            f"{num_died} of {count} worker processes died; finished chunks are stored; run the same command again"
        )
    if num_died:
        progress.note(f"{num_died} of {count} worker processes died; the others finished their chunks")
    return _join_reports(job, reports)


def _run_ray(job: ExtractJob, progress: Progress) -> list[FillReport]:
    """Encode on a cluster whose machines all see the cache and the source; each task opens its own source."""
    with connected(job.settings.address) as ray:
        count = _count_tasks(ray, job.settings)
        has_gpus = _num_gpus(ray) > 0
        threads = max(1, num_cores() // ceil(count / _num_nodes(ray)))
        tasks = [(part, "cuda" if has_gpus else "cpu", threads) for part in _split_job(job, count)]
        reports = run_ray_tasks(ray, _run_part, tasks, progress, num_gpus=int(has_gpus))
    return _join_reports(job, reports)


def _count_tasks(ray: Any, settings: ExtractSettings) -> int:
    return settings.actors or _num_gpus(ray) or _num_nodes(ray)


def _num_gpus(ray: Any) -> int:
    return int(ray.cluster_resources().get("GPU", 0))


def _num_nodes(ray: Any) -> int:
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    return max(1, len(nodes))


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


def open_encoders(job: ExtractJob, device: str) -> list[Encoders]:
    """Open the encoders of a job on a device, and create their folders: one producer per modality.

    Raises:
        SourceError: the source lacks a modality.
        UnknownNameError: an encoder, feature or view is unknown.
        FingerprintError: the cache holds features of another encoder of that name.
    """
    cache = Cache(job.cache)
    settings = job.settings
    source = job.opened
    if source is None and any(MODALITIES[modality].kind == "files" for modality in job.encoders):
        with trust_files():  # the process that made the job has opened this source
            source = open_below(job.source, job.places)
    for modality in job.encoders:
        _check_has_items(cache, modality)

    opened: dict[Modality, list[tuple[EncoderSpec, Encoder]]] = {}
    for modality, texts in job.encoders.items():
        opened[modality] = []
        for spec in map(EncoderSpec.parse, texts):
            encoder_settings = _encoder_settings(cache, settings, modality, spec, device)
            opened[modality].append((spec, open_encoder(spec, modality=modality, settings=encoder_settings)))
    known = {name for encoders in opened.values() for _, encoder in encoders for name in encoder.features}
    for name in settings.features:
        if name not in known:
            raise unknown_name("feature", name, known, hint=_DERIVED_FEATURES)

    views = [open_view(name) for name in settings.views]
    gate = open_gate(device, settings.num_threads)
    producers = []
    for modality, encoders in opened.items():
        folders = []
        for spec, encoder in encoders:
            executor = ThreadPoolExecutor(1, thread_name_prefix=spec.folder)
            for view in [None, *(view for view in views if view.modality == modality)]:
                target = _create_target(cache, spec, encoder, view, settings)
                folders.append(FolderEncoder(encoder=encoder, target=target, view=view, executor=executor, gate=gate))
        producers.append(
            Encoders(
                cache=cache,
                modality=modality,
                source=source if MODALITIES[modality].kind == "files" else None,
                folders=folders,
                threads=settings.num_threads,
            )
        )
    return producers


def _check_has_items(cache: Cache, modality: Modality) -> None:
    if not cache.info.num_items.get(modality):
        names = cache.columns[1:]
        columns = f"; columns without a role are {first_few(names, 10)}" if names else ""
        raise SourceError(
            f"{cache.path} has no {modality} items; omit {encoder_option(modality)}, or check the source{columns}"
        )


def _encoder_settings(
    cache: Cache, job_settings: ExtractSettings, modality: Modality, spec: EncoderSpec, device: str
) -> EncoderSettings:
    """Return how an encoder runs: what is `auto` is as recorded with its features, or else as the job says."""
    settings = replace_fields(job_settings.encoder, device=device, features=job_settings.features)
    stored = find_group(cache.path, modality, spec.folder, cache.info)
    if stored is None:
        recorded = {"backend": AUTO, "device": device, "precision": auto_precision(spec, device)}
    else:
        recorded = recorded_settings(stored.fingerprint, device)
    if settings.backend == AUTO:
        settings = replace_fields(settings, backend=recorded["backend"], device=recorded["device"])
    return replace_fields(settings, precision=recorded["precision"]) if settings.precision == AUTO else settings


def _create_target(
    cache: Cache, spec: EncoderSpec, encoder: Encoder, view: View | None, settings: ExtractSettings
) -> Target:
    """Create an encoder's folder in a cache, or open it; a folder of another encoder raises a `FingerprintError`.

    Its features are the requested ones that the encoder has, or else its first feature, or those it names as defaults.
    """
    group = create_group(
        cache.path,
        encoder.modality,
        spec.folder + ("" if view is None else view.suffix),
        cache.info,
        spec=spec.absolute.text,
        fingerprint=view_fingerprint(encoder, view),
        view="" if view is None else view.location,
    )
    names = [name for name in dict.fromkeys(settings.features) if name in encoder.features]
    outputs = {}
    for name in names or getattr(encoder, "defaults", None) or [next(iter(encoder.features))]:
        dtype: str = getattr(encoder, "dtypes", {}).get(name, settings.dtype)
        axis: Axis | None = getattr(encoder, "axes", {}).get(name)
        if axis is not None and view is not None:  # a crop or a flip: the grid no longer covers the stored box
            axis = replace_fields(axis, box=None)
        outputs[name] = Output(encoder.features[name], dtype, axis)
    return Target(group=group, outputs=outputs)


def reopen_encoders(
    cache: Cache,
    group: EncoderGroup,
    features: Sequence[str],
    *,
    device: str,
    allows_changes: bool = False,
) -> Encoders:
    """Open the encoder and the view of an existing folder, with the precision and backend recorded there."""
    is_text = MODALITIES[group.modality].kind == "texts"
    source = None if is_text else reopen_source(cache.info.source, cache.info.index_digest)
    fingerprint: Mapping[str, Any] = group.fingerprint
    settings = EncoderSettings(**recorded_settings(fingerprint, device), features=tuple(features))
    with names_from(group.path):
        encoder = open_encoder(group.spec, modality=MODALITIES[group.modality].name, settings=settings)
    view = reopen_view(fingerprint["view"], group.view) if "view" in fingerprint else None
    target = Target(group=group, outputs={name: Output.of(Feature(group, name)) for name in features})
    folder = FolderEncoder(
        encoder=encoder, target=target, view=view, executor=ThreadPoolExecutor(1), gate=nullcontext()
    )
    return Encoders(
        cache=cache,
        modality=group.modality,
        source=source,
        folders=[folder],
        threads=num_cores(),
        allows_changes=allows_changes,
    )
