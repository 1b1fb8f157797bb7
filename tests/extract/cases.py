"""Caches extracted with toy encoders, and what their files hold."""

import hashlib
from pathlib import Path

from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from embedcache.store.producer import FillReport
from tests.recorded import RecordedProgress
from tests.toy import IMAGE, TEXT

FEATURES = ("cls", "patches", "tokens")
NUM_IMAGES = 60
"""Images in caches that several processes extract."""


def run(source: Path, cache: Path, **settings: object) -> list[FillReport]:
    """Extract with the toy encoders."""
    return extract(
        open_source(source),
        cache,
        image_encoder=[IMAGE],
        text_encoder=[TEXT],
        settings=ExtractSettings(**settings),  # type: ignore[arg-type]
    )


def lines(source: Path, cache: Path, **settings: object) -> list[str]:
    """Extract and return the report as lines."""
    return [report.line() for report in run(source, cache, **settings)]


def tree(cache: Path) -> dict[str, str]:
    """Return every file with its SHA-256, except for locks and the records of runs, which hold times."""
    return {
        str(path.relative_to(cache)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.relative_to(cache).parts[0] != "records" and path.name not in (".lock", ".claims")
    }


def extract_slowly(
    source: Path, cache: Path, progress: RecordedProgress, *, delay_ms: int, image: str = IMAGE, **settings: object
) -> list[str]:
    reports = extract(
        open_source(source),
        cache,
        image_encoder=[f"{image},delay_ms={delay_ms}"],
        text_encoder=[TEXT],
        settings=ExtractSettings(features=FEATURES, chunk_size=8, **settings),  # type: ignore[arg-type]
        progress=progress,
    )
    return [report.line() for report in reports]


def same_bytes(one: Path, other: Path) -> bool:
    """Compare caches whose encoders differ only in `delay_ms`, which is part of the spec."""
    trees = [
        {name: sha for name, sha in tree(cache).items() if name != "image/open_toy/zarr.json"} for cache in (one, other)
    ]
    return trees[0] == trees[1]
