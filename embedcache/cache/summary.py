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


def caption_error_lines(cache: Cache, *, num_shown: int = 5) -> list[str]:
    """Say which samples have captions that could not be read; no line where all could."""
    if "caption_error" not in cache.columns:
        return []
    errors = cache.samples.select(["key", "caption_error"]).to_pylist()
    broken = [row for row in errors if row["caption_error"] is not None]
    if not broken:
        return []
    lines = [f"{len(broken):,} samples have captions that cannot be read, and count as having none"]
    lines += [f"  key {row['key']}: {row['caption_error']}" for row in broken[:num_shown]]
    return [*lines, f"  … and {len(broken) - num_shown:,} more"] if len(broken) > num_shown else lines


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


def failure_lines(cache: Cache, feature: Feature, *, num_shown: int = 5) -> list[str]:
    """Say why items failed: a line a kind of reason, the most frequent first, and below it some of the items."""
    rows: dict[str, list[int]] = {}
    for row, reason in feature.failures.items():
        rows.setdefault(reason.partition(":")[0], []).append(row)
    lines = []
    for kind, members in sorted(rows.items(), key=lambda item: -len(item[1])):
        lines.append(f"  {len(members):,} failed: {kind}")
        lines += [f"    {_name(cache, feature, row)}: {feature.failures[row]}" for row in members[:num_shown]]
        if len(members) > num_shown:
            lines.append(f"    … and {len(members) - num_shown:,} more")
    return lines


def _name(cache: Cache, feature: Feature, row: int) -> str:
    item = cache.items(feature.modality).slice(row, 1).to_pylist()[0]
    key = cache.samples["key"][item["sample"]].as_py()
    return f"row {row}, key {key}" + (f", {item['path']}" if "path" in item else "")


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
