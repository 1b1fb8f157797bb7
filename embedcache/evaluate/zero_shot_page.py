"""Zero-shot classification as one page: figures, and images to look at."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from embedcache.cache.cache import Cache
from embedcache.evaluate.plots import accuracy_bars, class_bars, confusion_map
from embedcache.evaluate.zero_shot import Classified, ZeroShotReport
from embedcache.evaluate.zero_shot_report import confused_rows, zero_shot_rows
from embedcache.pages.pictures import Pictures, credit
from embedcache.pages.sections import Case, Section, Shown, write_sections

_NUM_EACH = 6


def write_zero_shot(
    path: Path, cache: Cache, reports: Mapping[str, ZeroShotReport], classified: Classified, *, seed: int = 0
) -> None:
    """Write the page of some reports; classes and images are those of the first.

    Args:
        path: of the page.
        cache: that was measured.
        reports: a name -> figures, the first is the one to look at.
        classified: whose images are shown.
        seed: of drawing them.
    """
    first = next(iter(reports.values()))
    bars = {name: report.accuracies["acc1"] for name, report in reports.items()}
    write_sections(
        path,
        credit=credit(cache),
        title="Zero-shot classification",
        lead=f"{cache.path.name}, {first.line()}.",
        warnings=[f"{name}: {report.warning}" for name, report in reports.items() if report.warning],
        sections=[
            Section(
                title="Accuracy",
                notes=[
                    "In brackets the 95 % interval; for chance, where 95 % of random guesses lie.",
                    *(f"{name}: {report.overlap.line()}." for name, report in reports.items() if report.overlap),
                ],
                table=zero_shot_rows(reports),
                figures=[accuracy_bars(bars, chance=first.chance["acc1"].value)],
            ),
            Section(
                title="Classes",
                figures=[class_bars(first.names, first.by_class, chance=first.chance["acc1"].value)],
            ),
            Section(
                title="Confusions",
                notes=["All runs together."],
                table=confused_rows(first),
                figures=[confusion_map(first.names, first.confusion)],
            ),
            _images(cache, classified, seed),
        ],
    )


def _images(cache: Cache, classified: Classified, seed: int) -> Section:
    pictures, rng = Pictures(cache), np.random.default_rng(seed)
    is_right = classified.predicted[:, 0] == classified.labels
    drawn = [place for kind in (is_right, ~is_right) for place in rng.permutation(np.flatnonzero(kind))[:_NUM_EACH]]
    return Section(
        title="Images",
        notes=["Drawn at random: first images whose top class is right, then images whose top class is wrong."],
        cases=[_case(classified, pictures, int(place)) for place in drawn],
    )


def _case(classified: Classified, pictures: Pictures, place: int) -> Case:
    true, best = int(classified.labels[place]), classified.predicted[place].tolist()
    rank = int(classified.ranks[place])
    return Case(
        query=Shown(picture=pictures.data_url(int(classified.items.rows[place])), text=classified.names[true]),
        said="right at rank 1" if best[0] == true else f"its class at rank {rank:,}",
        is_right=best[0] == true,
        shown=[Shown(text=classified.names[number], is_right=number == true) for number in best],
        answer=None if true in best else Shown(text=classified.names[true], is_right=True),
    )
