"""Duplicates in words and numbers: for a terminal, a page and a file.

Duplicates as one page: how close items lie, what each cosine would do, and pairs to look at.
"""

from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Ints
from embedcache.curate.dedup import LEVELS, DedupAnalysis, DedupLevel, DedupReport
from embedcache.curate.keep import RemovedSamples
from embedcache.curate.links import histogram
from embedcache.reports.base import Case, Section, Table, count_bars, write_sections
from embedcache.reports.thumbnails import Showing, credit


def level_rows(analysis: DedupAnalysis) -> Table:
    """Say what copies alone and each cosine would do."""
    return (
        ["cosine", "have a near-duplicate", "samples that go", "stay", "share that goes"],
        [_level_row(level, analysis.cache.info.num_samples) for level in analysis.levels()],
    )


def _level_row(level: DedupLevel, num_samples: int) -> list[str]:
    name = "copies only" if level.cosine is None else f"{level.cosine:g}"
    near = "" if level.num_near is None else f"{level.num_near:,}"
    if level.num_gone is None:
        return [name, near, "too many pairs", "", ""]
    share = f"{100 * level.num_gone / num_samples:.1f} %"
    return [name, near, f"{level.num_gone:,}", f"{num_samples - level.num_gone:,}", share]


def how_compared(analysis: DedupAnalysis) -> str:
    """Say in a sentence what was compared, and how well."""
    near, contents = analysis.near, analysis.contents
    what = f"{len(contents.contents):,} {analysis.side.modality}s of {analysis.side.name}"
    copies = f"{contents.num_copies:,} are copies, byte for byte"
    if near is None:
        return f"{what}; {copies}"
    if near.recall is None:
        return f"{what}; {copies}; every pair was compared"
    recall = near.recall
    found = f"{recall.num_found:,} of the {recall.num_pairs:,} pairs of {recall.num_items:,} drawn items were found"
    return f"{what}; {copies}; {near.num_clusters:,} clusters: {found}"


def bars(analysis: DedupAnalysis) -> list[str]:
    """Draw how close each item lies to its nearest other, a line a bin; none where only copies were looked for."""
    if analysis.near is None:
        return []
    return ["largest cosine of an item to another; bars are logarithms", *histogram(analysis.near.best).bars()]


def look_json(analysis: DedupAnalysis) -> dict[str, Any]:
    """Give the histogram and what each cosine would do as JSON values."""
    assert analysis.near is not None
    counted = histogram(analysis.near.best)
    lows = [round(float(low), 4) for low in counted.lows]
    return {
        **analysis.about(),
        "histogram": {"lows": lows, "width": counted.width, "counts": counted.counts.tolist()},
        "levels": [asdict(level) for level in analysis.levels()],
    }


def dedup_line(done: DedupReport) -> str:
    """Say in a line what goes."""
    num_gone, num_samples = len(done.removed.samples), done.analysis.cache.info.num_samples
    return (
        f"{done.path}: {num_samples - num_gone:,} of {num_samples:,} samples stay; {num_gone:,} go, of these "
        f"{int(done.removed.is_copy.sum()):,} copies; who they duplicate is in {done.removed_path}"
    )


_NUM_EACH = 5
_NUM_GROUPS = 24
_MOST_SHOWN = 8


def write_look(path: Path, analysis: DedupAnalysis) -> None:
    """Write the page to choose a cosine by.

    Args:
        path: of the page.
        analysis: what `analyze` gave.
    """
    showing = Showing(analysis.cache, analysis.side.modality)
    sections = [
        _closeness(analysis, None),
        Section(
            title="What each cosine would do",
            notes=["A sample goes where each of its items is that close to an item of a sample that stays."],
            table=level_rows(analysis),
        ),
        *_examples(analysis, showing),
    ]
    _write(path, analysis, "Duplicates: choose a cosine", showing, sections)


def write_dedup(path: Path, done: DedupReport) -> None:
    """Write the page of what goes.

    Args:
        path: of the page.
        done: what `dedup` gave.
    """
    analysis, removed = done.analysis, done.removed
    showing = Showing(analysis.cache, analysis.side.modality)
    limit = "copies only" if done.cosine is None else f"cosine {done.cosine:g}"
    sections = [
        Section(
            title="What goes",
            table=(
                ["limit", "samples that go", "of these copies", "stay"],
                [
                    [
                        limit,
                        f"{len(removed.samples):,}",
                        f"{int(removed.is_copy.sum()):,}",
                        f"{analysis.cache.info.num_samples - len(removed.samples):,}",
                    ]
                ],
            ),
        ),
        *([] if analysis.near is None else [_closeness(analysis, done.cosine)]),
        Section(
            title="Near the limit",
            notes=["The samples that went by the least; left what stays, right what goes."],
            cases=list(_near_limit(analysis, removed, showing)),
        ),
        Section(
            title="Drawn at random",
            notes=["Left what stays, right what goes for it."],
            cases=list(_groups(analysis, removed, showing)),
        ),
    ]
    _write(path, analysis, "Duplicates", showing, sections)


def _write(path: Path, analysis: DedupAnalysis, title: str, showing: Showing, sections: list[Section]) -> None:
    write_sections(
        path,
        title=title,
        lead=f"{analysis.cache.path.name}: {how_compared(analysis)}.",
        warnings=showing.warnings(),
        sections=sections,
        credit=credit(analysis.cache),
    )


def _closeness(analysis: DedupAnalysis, limit: float | None) -> Section:
    assert analysis.near is not None
    counted = histogram(analysis.near.best)
    return Section(
        title="How close items lie",
        notes=[
            "Each item's largest cosine to another; copies are counted once. The scale of the counts is logarithmic."
        ],
        figures=[
            count_bars(
                counted.lows, counted.width, counted.counts, x="largest cosine to another", y="items", limit=limit
            )
        ],
    )


def _examples(analysis: DedupAnalysis, showing: Showing) -> Iterator[Section]:
    """Give a section for each band of cosines that has pairs, the closest first."""
    assert analysis.near is not None
    rng = np.random.default_rng(analysis.settings.seed)
    for low, high in reversed(list(pairwise((*LEVELS, np.inf)))):
        if low < analysis.near.limit:
            continue
        links = analysis.near.links.between(low, high)
        drawn = np.sort(rng.permutation(len(links.left))[:_NUM_EACH])
        rows = analysis.contents.rows
        if len(drawn):
            yield Section(
                title=f"Pairs of cosine {low:g} to {min(high, 1):g}",
                notes=[f"{len(drawn)} of {len(links.left):,}, drawn at random."],
                cases=[
                    Case(
                        query=showing.item(int(rows[links.left[pair]])),
                        said=f"cosine {min(links.cosines[pair], 1):.4f}",
                        is_right=True,
                        shown=[showing.item(int(rows[links.right[pair]]))],
                    )
                    for pair in drawn.tolist()
                ],
            )


def _near_limit(analysis: DedupAnalysis, removed: RemovedSamples, showing: Showing) -> Iterator[Case]:
    near = np.flatnonzero(~removed.is_copy)
    for place in near[np.argsort(removed.cosines[near], kind="stable")][: 2 * _NUM_EACH].tolist():
        yield _case(analysis, removed, np.array([place]), showing)


def _groups(analysis: DedupAnalysis, removed: RemovedSamples, showing: Showing) -> Iterator[Case]:
    rng = np.random.default_rng(analysis.settings.seed)
    for sample in np.sort(rng.permutation(np.unique(removed.kept))[:_NUM_GROUPS]).tolist():
        yield _case(analysis, removed, np.flatnonzero(removed.kept == sample), showing)


def _case(analysis: DedupAnalysis, removed: RemovedSamples, places: Ints, showing: Showing) -> Case:
    shown = places[np.argsort(-removed.cosines[places], kind="stable")][:_MOST_SHOWN]
    if removed.is_copy[places].all():
        said = "equal bytes"
    else:
        least, most = removed.cosines[places].min(), removed.cosines[places].max()
        said = f"cosine {most:.4f}" if len(places) == 1 else f"cosine {least:.4f} to {most:.4f}"
    many = f", {len(places):,} go" if len(places) > 1 else ""
    return Case(
        query=showing.item(_first_row(analysis, int(removed.kept[places[0]]))),
        said=said + many,
        is_right=True,
        shown=[showing.item(_first_row(analysis, sample)) for sample in removed.samples[shown].tolist()],
    )


def _first_row(analysis: DedupAnalysis, sample: int) -> int:
    """Find the row of a sample's first usable item."""
    return int(analysis.contents.item_rows[np.searchsorted(analysis.contents.samples, sample)])
