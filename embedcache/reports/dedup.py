"""Duplicates as tables, lines of text, JSON and two pages: one to choose a cosine by, one of what is removed."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Array, Floats, Ints, distinct
from embedcache.curate.dedup import LEVELS, DedupAnalysis, DedupReport
from embedcache.curate.pixels import NO_DISTANCE, SAME_PICTURE
from embedcache.dataset.thumbnails import credit
from embedcache.errors import pluralize
from embedcache.modalities import count_items
from embedcache.neighbors.pairs import cosine_limit
from embedcache.reports.base import (
    QueryExample,
    Section,
    Table,
    count_histogram,
    format_count,
    format_fraction,
    format_percent,
    write_report,
)
from embedcache.reports.items import ItemRenderer

_EXAMPLES_PER_BAND = 5
_NUM_BORDERLINE = 10
_NUM_GROUPS = 24
_MAX_SHOWN_PER_GROUP = 8
_BIN_WIDTHS = (0.005, 0.01, 0.02, 0.05, 0.1)
_MAX_BINS = 32
_BIN_ROUNDING = 1e-4  # of a bin: 0.95 in float32 is a hundred-thousandth of one below the bin that begins there


def threshold_table(analysis: DedupAnalysis) -> Table:
    """Return what removing copies only, and removing at each cosine, would do."""
    num_samples = len(analysis.samples)
    rows = []
    for level in analysis.levels():
        row = ["copies only" if level.cosine is None else f"{level.cosine:g}"]
        row.append("" if level.num_near is None else format_count(level.num_near))
        if level.num_gone is None:
            row += ["too many pairs", "", ""]
        else:
            row += [format_count(level.num_gone), format_count(num_samples - level.num_gone)]
            row.append(format_percent(level.num_gone / num_samples))
        rows.append(row)
    return ["cosine", "items with a near-duplicate", "removed", "kept", "removed of all"], rows


def comparison_line(analysis: DedupAnalysis) -> str:
    """Return what was compared, and how completely, in one line."""
    near, item_copies = analysis.near, analysis.copies
    items = f"{count_items(len(item_copies.content_ids), analysis.feature.modality)} of {analysis.feature.name}"
    copies = pluralize(item_copies.num_copies, "is a byte-identical copy", "are byte-identical copies")
    if near is None:
        return f"{items}; {copies}"
    if analysis.num_same_picture is not None:
        copies += f"; {pluralize(analysis.num_same_picture, 'pair')} of others show the same picture"
    if near.recall is None:
        return f"{items}; {copies}; every pair was compared"
    recall = near.recall
    pairs = f"found {recall.num_found:,} of the {recall.num_pairs:,} pairs of {recall.num_items:,} sampled items"
    return f"{items}; {copies}; {pluralize(near.num_clusters, 'cluster')} {pairs}"


def threshold_json(analysis: DedupAnalysis) -> dict[str, Any]:
    """Return the histogram and what each cosine would do as JSON values."""
    assert analysis.near is not None
    counted = histogram(analysis.similarities)
    lows = [round(float(low), 4) for low in counted.lows]
    return {
        **analysis.to_json(),
        "histogram": {"lows": lows, "width": counted.width, "counts": counted.counts.tolist()},
        "levels": [asdict(level) for level in analysis.levels()],
    }


def dedup_line(result: DedupReport) -> str:
    """Return how many samples are kept and removed, in one line."""
    num_removed, num_samples = len(result.removed), len(result.analysis.samples)
    copies = pluralize(int(result.removed["is_copy"].sum()), "is a copy", "are copies")
    return (
        f"{result.path}: kept {num_samples - num_removed:,} of {num_samples:,} samples; removed {num_removed:,}, of "
        f"which {copies}; {result.removed_path} names what each one duplicates"
    )


def write_threshold_page(path: Path, analysis: DedupAnalysis) -> None:
    """Write a page to choose a cosine by: similarities, what each cosine would remove, and example pairs."""
    renderer = ItemRenderer(analysis.cache, analysis.feature.modality)
    thresholds = Section(
        title="What each cosine would remove",
        notes=["A sample is removed if each of its items is that close to an item of a sample that is kept."],
        table=threshold_table(analysis),
    )
    sections = [_similarity_section(analysis, None), thresholds, *_pair_sections(analysis, renderer)]
    _write(path, analysis, "Duplicates: choose a cosine", renderer, sections)


def write_dedup_page(path: Path, result: DedupReport) -> None:
    """Write a page of the samples that are removed: counts, borderline cases, and random groups."""
    analysis, removed = result.analysis, result.removed
    renderer = ItemRenderer(analysis.cache, analysis.feature.modality)
    num_removed = len(removed)
    near = np.flatnonzero(~removed["is_copy"])
    borderline = near[np.argsort(removed["cosine"][near], kind="stable")][:_NUM_BORDERLINE].tolist()
    rng = np.random.default_rng(analysis.settings.seed)
    kept = np.sort(rng.permutation(distinct(removed["kept"]))[:_NUM_GROUPS]).tolist()
    groups = [np.flatnonzero(removed["kept"] == sample) for sample in kept]
    counts = [
        "copies only" if result.cosine is None else f"{result.cosine:g}",
        format_count(num_removed),
        format_count(int(removed["is_copy"].sum())),
        format_count(int((removed["distance"] <= SAME_PICTURE).sum())),
        format_count(len(analysis.samples) - num_removed),
    ]
    sections = [
        Section(title="Removed samples", table=(["cosine", "removed", "copies", "by pixels", "kept"], [counts])),
        *([] if analysis.near is None else [_similarity_section(analysis, result.cosine)]),
        Section(
            title="Borderline cases",
            notes=["The removed samples closest to the threshold; left what is kept, right what is removed."],
            examples=[_example(analysis, removed[[position]], renderer) for position in borderline],
        ),
        Section(
            title="Drawn at random",
            notes=["Left what is kept, right what is removed as its duplicate."],
            examples=[_example(analysis, removed[positions], renderer) for positions in groups],
        ),
    ]
    _write(path, analysis, "Duplicates", renderer, sections)


def _write(path: Path, analysis: DedupAnalysis, title: str, renderer: ItemRenderer, sections: list[Section]) -> None:
    write_report(
        path,
        title=title,
        summary=f"{analysis.cache.path.name}: {comparison_line(analysis)}.",
        warnings=renderer.warnings(),
        sections=sections,
        credit=credit(analysis.cache),
    )


def _similarity_section(analysis: DedupAnalysis, limit: float | None) -> Section:
    assert analysis.near is not None
    counted = histogram(analysis.similarities)
    figure = count_histogram(
        counted.lows, counted.width, counted.counts, x="largest cosine to another item", y="items", limit=limit
    )
    note = "Each item's largest cosine to another item; equal bytes are counted once. The count axis is logarithmic."
    return Section(title="Similarity", notes=[note], figures=[figure])


def _pair_sections(analysis: DedupAnalysis, renderer: ItemRenderer) -> Iterator[Section]:
    """Iterate over sections of pairs: the same picture, then one for each band of cosines, the closest first."""
    assert analysis.near is not None
    pairs = analysis.near.pairs
    titled = {"The same picture": analysis.duplicates(None)}
    for low, high in reversed(list(pairwise((*LEVELS, np.inf)))):
        if low >= analysis.near.limit:
            titled[f"Pairs with a cosine of {low:g} to {min(high, 1):g}"] = pairs[
                (pairs["cosine"] >= cosine_limit(low)) & (pairs["cosine"] < cosine_limit(high))
            ]
    rng = np.random.default_rng(analysis.settings.seed)
    for title, similar in titled.items():
        sampled = np.sort(rng.permutation(len(similar))[:_EXAMPLES_PER_BAND])
        if len(sampled):
            yield Section(
                title=title,
                notes=[f"{len(sampled)} of {len(similar):,}, drawn at random."],
                examples=[_pair_example(analysis, pair, renderer) for pair in similar[sampled]],
            )


def _pair_example(analysis: DedupAnalysis, pair: Array, renderer: ItemRenderer) -> QueryExample:
    """Return two similar items side by side."""
    rows = analysis.copies.unique_rows[[pair["left"], pair["right"]]]
    outcome = _similarity_text(pair.reshape(1), is_copy=bool(pair["distance"] <= SAME_PICTURE))
    return _side_by_side(renderer, rows, outcome)


def _example(analysis: DedupAnalysis, removed: Array, renderer: ItemRenderer) -> QueryExample:
    """Return a kept sample beside the samples that are removed as its duplicates."""
    shown = removed[np.argsort(-removed["cosine"], kind="stable")][:_MAX_SHOWN_PER_GROUP]
    similarity = _similarity_text(removed, is_copy=bool(removed["is_copy"].all()))
    count = f", {len(removed):,} removed" if len(removed) > 1 else ""
    samples = [removed["kept"][0], *shown["sample"]]
    rows = analysis.copies.item_rows[np.searchsorted(analysis.copies.samples, samples)]
    return _side_by_side(renderer, rows, similarity + count)


def _similarity_text(pairs: Array, *, is_copy: bool) -> str:
    """Describe how similar one or more items are to another, of which they all are copies or not."""
    cosines = pairs["cosine"]
    distances = pairs["distance"]
    known = distances[distances < NO_DISTANCE]
    if is_copy and not len(known):
        return "equal bytes"
    lowest, highest = (format_fraction(min(cosine, 1)) for cosine in (cosines.min(), cosines.max()))
    similarity = f"cosine {highest}" if len(cosines) == 1 else f"cosine {lowest} to {highest}"
    if len(known):
        similarity += f", hash distance {known.max()}"
    return f"same picture, {similarity}" if is_copy else similarity


def _side_by_side(renderer: ItemRenderer, rows: Ints, outcome: str) -> QueryExample:
    """Return the item of the first row beside those of the others."""
    first, *others = [renderer.render(row) for row in rows.tolist()]
    return QueryExample(query=first, outcome=outcome, is_correct=True, results=others)


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of cosines, in bins of one width; the last includes its upper bound, 1."""

    lows: Floats  # (H,) lower bound of each bin, ascending
    width: float
    counts: Ints  # (H,)


def histogram(cosines_N: Floats) -> Histogram:
    """Count each item's largest cosine in at most 32 bins that end at 1; the first bin includes all below it."""
    below_one_N = 1 - np.maximum(cosines_N.astype(np.float64), -1)
    width = next(width for width in _BIN_WIDTHS if below_one_N.max(initial=0) / width - _BIN_ROUNDING <= _MAX_BINS)
    bins_N = np.maximum(np.ceil(below_one_N / width - _BIN_ROUNDING), 1).astype(np.int64) - 1  # counted from the top
    num_bins = 1 + int(bins_N.max(initial=0))
    lows = (1 - width * np.arange(num_bins, 0, -1)).astype(np.float32)
    counts = np.bincount(num_bins - 1 - bins_N, minlength=num_bins).astype(np.int64)
    return Histogram(lows=lows, width=width, counts=counts)
