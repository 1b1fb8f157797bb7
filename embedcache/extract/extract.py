"""A source and some encoders in, a cache out."""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from embedcache.artifact import run_record
from embedcache.cache.cache import Cache
from embedcache.cache.feature import Feature
from embedcache.cache.spine import index
from embedcache.disk import remove_partials
from embedcache.encoders.contract import Modality
from embedcache.encoders.open import EncoderSpec, open_encoder
from embedcache.errors import SettingError, SourceError
from embedcache.extract.loop import encode_images, encode_texts
from embedcache.extract.settings import ExtractSettings
from embedcache.extract.target import Target, check_features, open_target
from embedcache.progress import Progress, Silent
from embedcache.sources.contract import Source


@dataclass(frozen=True, kw_only=True)
class EncoderReport:
    """What an extraction did for one encoder.

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
    progress: Progress | None = None,
) -> list[EncoderReport]:
    """Run frozen encoders over a source, once, and keep what they give in a cache.

    Chunks that are committed are not made again, so a run that was stopped goes on where it was. An item that
    cannot be read is a row with a reason.

    Args:
        source: the raw samples.
        cache_path: a new folder, or a cache of this source.
        image: encoders of images, as `family:model`.
        text: encoders of texts.
        settings: how features are made and stored.
        progress: told about items.

    Returns:
        One report an encoder.

    Raises:
        SettingError: no encoder is named.
        UnknownNameError: an encoder or feature is unknown.
        SourceError: the source cannot be numbered, lacks a modality, or no item of it can be read.
        FingerprintError: the cache holds other samples, or features of another encoder of that name.
        DiskFullError: what is committed stays; run again with more space.
    """
    cache_path = Path(cache_path)
    settings = settings or ExtractSettings()
    progress = progress or Silent()
    specs = {
        "image": [EncoderSpec.parse(spec) for spec in image],
        "text": [EncoderSpec.parse(spec) for spec in text],
    }
    if not image and not text:
        raise SettingError(
            "no encoder is named; give at least one with --image or --text, such as --text st:all-MiniLM-L6-v2"
        )
    index(source, cache_path, chunk_size=settings.chunk_size, progress=progress)
    cache = Cache(cache_path)
    remove_partials(cache_path)
    started = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    about = {
        "source": source.describe(),
        "image": list(image),
        "text": list(text),
        "dtype": settings.dtype,
    }
    with run_record(cache_path / "records" / f"extract-{started}.json", "extract", about) as outcome:
        targets = _open_targets(cache, specs, settings)
        reports = [
            report
            for modality in targets
            for report in _run(cache, source, modality, targets[modality], settings, progress)
        ]
        outcome["encoders"] = [vars(report) for report in reports]
    _require_some(cache, reports)
    return reports


def _require_some(cache: Cache, reports: Sequence[EncoderReport]) -> None:
    for report in reports:
        num_items = cache.info.num_items[report.modality]
        if sum(report.failures.values()) == num_items:
            reasons = "; ".join(f"{count} {reason}" for reason, count in report.failures.items())
            raise SourceError(
                f"all {num_items} {report.modality}s failed: {reasons}; mend the source and extract into a new folder"
            )


def _open_targets(
    cache: Cache, specs: dict[str, list[EncoderSpec]], settings: ExtractSettings
) -> dict[Modality, list[Target]]:
    modalities: tuple[Modality, ...] = ("image", "text")
    wanted = [(modality, spec) for modality in modalities for spec in specs[modality]]
    for modality, _ in wanted:
        if not cache.info.num_items.get(modality):
            raise SourceError(
                f"cache {cache.path} has no {modality} items; leave --{modality} out, or check the source"
            )
    encoders = [open_encoder(spec, modality=modality, settings=settings.encoder) for modality, spec in wanted]
    check_features(encoders, settings.features)
    targets: dict[Modality, list[Target]] = {}
    for (modality, spec), encoder in zip(wanted, encoders, strict=True):
        target = open_target(cache, spec, encoder, settings.features, settings.dtype)
        targets.setdefault(modality, []).append(target)
    return targets


def _run(
    cache: Cache,
    source: Source,
    modality: Modality,
    targets: Sequence[Target],
    settings: ExtractSettings,
    progress: Progress,
) -> list[EncoderReport]:
    mine = [chunk for chunk in range(cache.info.num_chunks(modality)) if settings.takes(chunk)]
    missing = [{chunk for chunk in mine if target.missing(chunk)} for target in targets]
    chunks = sorted(set().union(*missing))
    if chunks:
        progress.start(f"encoding {modality}s", _count(cache, modality, set(chunks)), f"{modality}s")
        with ThreadPoolExecutor(settings.threads or os.cpu_count()) as executor:
            if modality == "image":
                encode_images(cache, source, targets, chunks, executor, progress)
            else:
                encode_texts(cache, targets, chunks, executor, progress)
        progress.finish()
    return [
        _report(cache, target, _count(cache, modality, done)) for target, done in zip(targets, missing, strict=True)
    ]


def _count(cache: Cache, modality: str, chunks: set[int]) -> int:
    rows = [cache.info.chunk_rows(modality, chunk) for chunk in chunks]
    return sum(row.stop - row.start for row in rows)


def _report(cache: Cache, target: Target, encoded: int) -> EncoderReport:
    modality = target.encoder.modality
    feature = Feature(target.group, target.features[0])
    committed = {commit.chunk for commit in feature.commits if commit is not None}
    return EncoderReport(
        modality=modality,
        encoder=target.group.name,
        features=list(target.features),
        encoded=encoded,
        reused=_count(cache, modality, committed) - encoded,
        failures=dict(Counter(reason.partition(":")[0] for reason in feature.failures.values()).most_common()),
    )
