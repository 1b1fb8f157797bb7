"""Duplicates as one page: how close items lie, what each cosine would do, and pairs to look at."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from embedcache.arrays import Ints
from embedcache.curate.duplicates.dedup import LEVELS, Compared, Deduplicated
from embedcache.curate.duplicates.dedup_report import how_compared, level_rows
from embedcache.curate.duplicates.histogram import histogram
from embedcache.curate.duplicates.keeping import Removed
from embedcache.curate.shown import Showing
from embedcache.pages.figures import count_bars
from embedcache.pages.pictures import credit
from embedcache.pages.sections import Case, Section, write_sections

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
