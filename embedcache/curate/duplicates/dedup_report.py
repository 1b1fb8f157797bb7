"""Duplicates in words and numbers: for a terminal, a page and a file."""

from dataclasses import asdict
from typing import Any

from embedcache.curate.duplicates.dedup import Compared, Deduplicated, Level
from embedcache.curate.duplicates.histogram import histogram
from embedcache.pages.sections import Table


def level_rows(compared: Compared) -> Table:
    """Say what copies alone and each cosine would do."""
    return (
        ["cosine", "have a near-duplicate", "samples that go", "stay", "share that goes"],
        [_level_row(level, compared.cache.info.num_samples) for level in compared.levels()],
    )


def _level_row(level: Level, num_samples: int) -> list[str]:
    name = "copies only" if level.cosine is None else f"{level.cosine:g}"
    near = "" if level.num_near is None else f"{level.num_near:,}"
    if level.num_gone is None:
        return [name, near, "too many pairs", "", ""]
    share = f"{100 * level.num_gone / num_samples:.1f} %"
    return [name, near, f"{level.num_gone:,}", f"{num_samples - level.num_gone:,}", share]


def how_compared(compared: Compared) -> str:
    """Say in a sentence what was compared, and how well."""
    near, contents = compared.near, compared.contents
    what = f"{len(contents.contents):,} {compared.side.modality}s of {compared.side.name}"
    copies = f"{contents.num_copies:,} are copies, byte for byte"
    if near is None:
        return f"{what}; {copies}"
    if near.recall is None:
        return f"{what}; {copies}; every pair was compared"
    recall = near.recall
    found = f"{recall.num_found:,} of the {recall.num_pairs:,} pairs of {recall.num_items:,} drawn items were found"
    return f"{what}; {copies}; {near.num_clusters:,} clusters: {found}"


def bars(compared: Compared) -> list[str]:
    """Draw how close each item lies to its nearest other, a line a bin; none where only copies were looked for."""
    if compared.near is None:
        return []
    return ["largest cosine of an item to another; bars are logarithms", *histogram(compared.near.best).bars()]


def look_json(compared: Compared) -> dict[str, Any]:
    """Give the histogram and what each cosine would do as JSON values."""
    assert compared.near is not None
    counted = histogram(compared.near.best)
    lows = [round(float(low), 4) for low in counted.lows]
    return {
        **compared.about(),
        "histogram": {"lows": lows, "width": counted.width, "counts": counted.counts.tolist()},
        "levels": [asdict(level) for level in compared.levels()],
    }


def dedup_line(done: Deduplicated) -> str:
    """Say in a line what goes."""
    num_gone, num_samples = len(done.removed.samples), done.compared.cache.info.num_samples
    return (
        f"{done.path}: {num_samples - num_gone:,} of {num_samples:,} samples stay; {num_gone:,} go, of these "
        f"{int(done.removed.is_copy.sum()):,} copies; who they duplicate is in {done.removed_path}"
    )
