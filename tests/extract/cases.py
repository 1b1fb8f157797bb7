"""Caches extracted with toy encoders, and what their files hold."""

import hashlib
from pathlib import Path

from embedcache.extract.extract import EncoderReport, extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from tests.toy import IMAGE, TEXT

FEATURES = ("cls", "patches", "tokens")


def run(source: Path, cache: Path, **settings: object) -> list[EncoderReport]:
    """Extract with the toy encoders."""
    return extract(
        open_source(source),
        cache,
        image_encoders=[IMAGE],
        text_encoders=[TEXT],
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
