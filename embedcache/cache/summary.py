"""A cache in words, for people."""

from pathlib import Path

from embedcache.cache.cache import Cache
from embedcache.cache.feature import Feature


def describe_spine(cache: Cache) -> str:
    """Say what the cache numbers, in one line."""
    items = ", ".join(f"{count:,} {modality}s" for modality, count in cache.info.num_items.items())
    source = f"{cache.info.source.get('type')} {cache.info.source.get('path', '')}".strip()
    return (
        f"{cache.path}: {cache.info.num_samples:,} samples with {items}, from {source}; "
        f"chunks of {cache.info.chunk_size:,}, format {cache.info.format}"
    )


def describe_feature(feature: Feature) -> list[str]:
    """Give a feature's name, modality, shape, dtype, committed chunks, failed items and bytes on disk."""
    committed = [commit for commit in feature.commits if commit is not None]
    shape = " × ".join("any" if size < 0 else f"{size:,}" for size in feature.shape)
    return [
        feature.name,
        feature.modality,
        shape,
        feature.dtype,
        f"{len(committed)}/{len(feature.commits)}",
        f"{len(feature.failures):,}",
        f"{_num_bytes(feature.group.path / feature.feature):,}",
    ]


def failure_reasons(feature: Feature) -> dict[str, list[int]]:
    """Give the reasons of failed items, each with its rows, the most frequent first."""
    rows: dict[str, list[int]] = {}
    for row, reason in feature.failures.items():
        rows.setdefault(reason, []).append(row)
    return dict(sorted(rows.items(), key=lambda item: -len(item[1])))


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
