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
from embedcache.curate.dedup import LEVELS, Compared, Deduplicated, Level
from embedcache.curate.keep import Removed
from embedcache.curate.links import histogram
from embedcache.reports.base import Case, Section, Table, count_bars, write_sections
from embedcache.reports.thumbnails import Showing, credit


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


_NUM_EACH = 5
_NUM_GROUPS = 24
_MOST_SHOWN = 8


def write_look(path: Path, compared: Compared) -> None:
    """Write the page to choose a cosine by.

    Args:
        path: of the page.
        compared: what `look` gave.
    """
    showing = Showing(compared.cache, compared.side.modality)
    sections = [
        _closeness(compared, None),
        Section(
            title="What each cosine would do",
            notes=["A sample goes where each of its items is that close to an item of a sample that stays."],
            table=level_rows(compared),
        ),
        *_examples(compared, showing),
    ]
    _write(path, compared, "Duplicates: choose a cosine", showing, sections)


def write_dedup(path: Path, done: Deduplicated) -> None:
    """Write the page of what goes.

    Args:
        path: of the page.
        done: what `dedup` gave.
    """
    compared, removed = done.compared, done.removed
    showing = Showing(compared.cache, compared.side.modality)
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
                        f"{compared.cache.info.num_samples - len(removed.samples):,}",
                    ]
                ],
            ),
        ),
        *([] if compared.near is None else [_closeness(compared, done.cosine)]),
        Section(
            title="Near the limit",
            notes=["The samples that went by the least; left what stays, right what goes."],
            cases=list(_near_limit(compared, removed, showing)),
        ),
        Section(
            title="Drawn at random",
            notes=["Left what stays, right what goes for it."],
            cases=list(_groups(compared, removed, showing)),
        ),
    ]
    _write(path, compared, "Duplicates", showing, sections)


def _write(path: Path, compared: Compared, title: str, showing: Showing, sections: list[Section]) -> None:
    write_sections(
        path,
        title=title,
        lead=f"{compared.cache.path.name}: {how_compared(compared)}.",
        warnings=showing.warnings(),
        sections=sections,
        credit=credit(compared.cache),
    )


def _closeness(compared: Compared, limit: float | None) -> Section:
    assert compared.near is not None
    counted = histogram(compared.near.best)
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


def _examples(compared: Compared, showing: Showing) -> Iterator[Section]:
    """Give a section for each band of cosines that has pairs, the closest first."""
    assert compared.near is not None
    rng = np.random.default_rng(compared.settings.seed)
    for low, high in reversed(list(pairwise((*LEVELS, np.inf)))):
        if low < compared.near.limit:
            continue
        links = compared.near.links.between(low, high)
        drawn = np.sort(rng.permutation(len(links.left))[:_NUM_EACH])
        rows = compared.contents.rows
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


def _near_limit(compared: Compared, removed: Removed, showing: Showing) -> Iterator[Case]:
    near = np.flatnonzero(~removed.is_copy)
    for place in near[np.argsort(removed.cosines[near], kind="stable")][: 2 * _NUM_EACH].tolist():
        yield _case(compared, removed, np.array([place]), showing)


def _groups(compared: Compared, removed: Removed, showing: Showing) -> Iterator[Case]:
    rng = np.random.default_rng(compared.settings.seed)
    for sample in np.sort(rng.permutation(np.unique(removed.kept))[:_NUM_GROUPS]).tolist():
        yield _case(compared, removed, np.flatnonzero(removed.kept == sample), showing)


def _case(compared: Compared, removed: Removed, places: Ints, showing: Showing) -> Case:
    shown = places[np.argsort(-removed.cosines[places], kind="stable")][:_MOST_SHOWN]
    if removed.is_copy[places].all():
        said = "equal bytes"
    else:
        least, most = removed.cosines[places].min(), removed.cosines[places].max()
        said = f"cosine {most:.4f}" if len(places) == 1 else f"cosine {least:.4f} to {most:.4f}"
    many = f", {len(places):,} go" if len(places) > 1 else ""
    return Case(
        query=showing.item(_first_row(compared, int(removed.kept[places[0]]))),
        said=said + many,
        is_right=True,
        shown=[showing.item(_first_row(compared, sample)) for sample in removed.samples[shown].tolist()],
    )


def _first_row(compared: Compared, sample: int) -> int:
    """Find the row of a sample's first usable item."""
    return int(compared.contents.item_rows[np.searchsorted(compared.contents.samples, sample)])
