"""A source and some encoders in, a cache out.

What to extract, so that any process on any machine can take part; and what was done.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from embedcache.encoders.backends import torch_device
from embedcache.encoders.open import EncoderSpec
from embedcache.errors import SettingError, SourceError
from embedcache.extract.engines import ENGINES
from embedcache.extract.job import Done, Job
from embedcache.extract.settings import ExtractSettings
from embedcache.extract.views import open_view
from embedcache.files import open_path, remove_partials
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import run_record
from embedcache.sources.base import IMPORTED, Source
from embedcache.store.cache import Cache
from embedcache.store.group import open_group
from embedcache.store.indexing import index
from embedcache.store.layout import info_path, read_info


@dataclass(frozen=True, kw_only=True)
class EncoderReport:
    """What an extraction did for one encoder, or one view of it.

    Args:
        modality: `image` or `text`.
        encoder: name of its folder in the cache.
        features: what is stored.
        encoded: items in the chunks worked on now.
        reused: items in the chunks that were there before.
        failures: kind of reason -> number of items, over the whole cache.
    """

    modality: str
    encoder: str
    features: Sequence[str]
    encoded: int
    reused: int
    failures: dict[str, int]

    def line(self) -> str:
        """Say it in one line."""
        failed = "; ".join(f"{count} {reason}" for reason, count in self.failures.items())
        return (
            f"{self.encoder} ({', '.join(self.features)}): encoded {self.encoded:,} {self.modality}s, "
            f"reused {self.reused:,}, failed {sum(self.failures.values()):,}" + (f": {failed}" if failed else "")
        )


def extract(
    source: Source,
    cache_path: Path | str,
    *,
    image: Sequence[str] = (),
    text: Sequence[str] = (),
    settings: ExtractSettings | None = None,
    extends: bool = False,
    progress: Progress | None = None,
) -> list[EncoderReport]:
    """Run frozen encoders over a source, once, and keep what they give in a cache.

    Chunks that are committed are not made again, so a run that was stopped goes on where it was, and several processes
    on one cache share the work. An item that cannot be read is a row with a reason.

    Args:
        source: the raw samples.
        cache_path: a new folder, or a cache of this source; or its URL.
        image: encoders of images, as `family:model`.
        text: encoders of texts.
        settings: how features are made and stored.
        extends: number samples that were added to the source behind those that the cache has.
        progress: told about items.

    Returns:
        One report an encoder and view.

    Raises:
        SettingError: no encoder is named, or the cache was imported.
        UnknownNameError: an encoder or feature is unknown.
        SourceError: the source cannot be numbered, lacks a modality, or no item of it can be read.
        FingerprintError: the cache holds other samples, or features of another encoder of that name.
        DiskFullError: what is committed stays; run again with more space.
    """
    progress = progress or NullProgress()
    job = open_job(source, cache_path, image=image, text=text, settings=settings, extends=extends, progress=progress)
    cache = Cache(job.cache)
    remove_partials(cache.path)
    with record(cache, job, "extract") as outcome:
        done = ENGINES.load(job.settings.engine)(job, source, progress)
        reports = [_report(cache, one) for one in done]
        outcome["encoders"] = [vars(report) for report in reports]
    _require_some(cache, reports)
    return reports


def open_job(
    source: Source,
    cache_path: Path | str,
    *,
    image: Sequence[str],
    text: Sequence[str],
    settings: ExtractSettings | None = None,
    extends: bool = False,
    mends: bool = False,
    progress: Progress,
) -> Job:
    """Number the source, or check that the cache numbers it, and say what is to be done there.

    Raises:
        SettingError: no encoder is named, a name is none, or two would be stored as one; or the cache was imported.
        UnknownNameError: a view or an engine is unknown.
    """
    settings = settings or ExtractSettings()
    if not image and not text:
        raise SettingError(
            "expected at least one encoder, got none; name one such as --text-encoder st:all-MiniLM-L6-v2"
        )
    _check_asked(image, text, settings)
    path = open_path(cache_path)
    _refuse_imported(path)
    index(source, path, chunk_size=settings.chunk_size, extends=extends, mends=mends, progress=progress)
    return Job(cache=str(path), source=source.describe(), image=tuple(image), text=tuple(text), settings=settings)


def _refuse_imported(cache_path: Path) -> None:
    """Refuse a cache of vectors that were imported: it numbers rows of those, and has nothing to encode."""
    if info_path(cache_path).is_file():
        source = read_info(cache_path).source
        if source.get("type") == IMPORTED:
            raise SettingError(
                f"{cache_path} was imported from {source['path']}: it has vectors, and no images or texts to encode; "
                "extract the images and captions themselves into a new folder"
            )


def _check_asked(image: Sequence[str], text: Sequence[str], settings: ExtractSettings) -> None:
    """Refuse what cannot be meant before hours of numbering."""
    views = [open_view(name) for name in settings.views]
    asked = {"image": image, "text": text}
    for view in views:
        if not asked[view.modality]:
            raise SettingError(
                f"the view {view.name} is of {view.modality}s, and no encoder of {view.modality}s is named"
            )
    for modality, specs in asked.items():
        suffixes = ["", *(view.suffix for view in views if view.modality == modality)]
        folders = Counter(EncoderSpec.parse(spec).folder + suffix for spec in specs for suffix in suffixes)
        for folder, count in folders.items():
            if count > 1:
                raise SettingError(
                    f"{count} {modality} encoders or views would be stored as {folder}; name each once, and extract "
                    "the others into a cache of their own"
                )
    ENGINES.load(settings.engine)
    for device in settings.devices:
        torch_device(device)


def record(cache: Cache, job: Job, stage: str) -> AbstractContextManager[dict[str, Any]]:
    """Keep who did what with a cache in its folder `records`."""
    started = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    about = {
        "source": job.source,
        "image": list(job.image),
        "text": list(job.text),
        "features": list(job.settings.features),
        "views": list(job.settings.views),
        "dtype": job.settings.dtype,
    }
    return run_record(cache.path / "records" / f"{stage}-{started}.json", stage, about)


def _report(cache: Cache, done: Done) -> EncoderReport:
    """Count over the commits, one at a time: at 20 million items they do not fit in memory together."""
    group = open_group(cache.path, done.modality, done.encoder, cache.info)
    encoded = reused = 0
    failures: Counter[str] = Counter()
    for chunk in range(cache.info.num_chunks(done.modality)):
        commit = group.commit(chunk)
        if not group.has(commit, done.features[0]):
            continue
        assert commit is not None
        if chunk in done.chunks:
            encoded += len(commit.hashes)
        else:
            reused += len(commit.hashes)
        reasons = commit.failures[done.features[0]]
        failures.update(reason.partition(":")[0] for reason in reasons if reason is not None)
    return EncoderReport(
        modality=done.modality,
        encoder=done.encoder,
        features=list(done.features),
        encoded=encoded,
        reused=reused,
        failures=dict(failures.most_common()),
    )


def _require_some(cache: Cache, reports: Sequence[EncoderReport]) -> None:
    for report in reports:
        num_items = cache.info.num_items[report.modality]
        if sum(report.failures.values()) == num_items:
            reasons = "; ".join(f"{count} {reason}" for reason, count in report.failures.items())
            raise SourceError(
                f"all {num_items} {report.modality}s failed: {reasons}; mend the source and extract into a new folder"
            )
