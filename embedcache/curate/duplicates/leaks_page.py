"""Leaks as one page: counts, and test items beside what they are closest to in training."""

from pathlib import Path

from embedcache.curate.duplicates.leaks import Leak, Leaks
from embedcache.curate.duplicates.leaks_report import leak_rows, line, notes, pair_rows, worst_pairs
from embedcache.curate.shown import Showing
from embedcache.pages.pictures import credit
from embedcache.pages.sections import Case, Section, write_sections

_MOST_PAIRS = 40


def write_leaks(path: Path, leaks: Leaks) -> None:
    """Write the page.

    Args:
        path: of the page.
        leaks: what was found.
    """
    showings = [(Showing(leaks.test, leak.modality), Showing(leaks.train, leak.modality)) for leak in leaks.leaks]
    sections = [
        Section(
            title="What leaks",
            notes=[
                "Samples with at least one such image or text. A copy has equal bytes, or equal text.",
                *notes(leaks),
            ],
            table=leak_rows(leaks),
        ),
        *(_worst(leaks, leak, *showing) for leak, showing in zip(leaks.leaks, showings, strict=True)),
    ]
    warnings = {warning for pair in showings for showing in pair for warning in showing.warnings()}
    write_sections(
        path,
        title="Leaks",
        lead=f"{line(leaks)}.",
        warnings=sorted(warnings),
        sections=sections,
        credit=" ".join(dict.fromkeys(filter(None, (credit(leaks.test), credit(leaks.train))))),
    )


def _worst(leaks: Leaks, leak: Leak, test: Showing, train: Showing) -> Section:
    pairs = worst_pairs(leaks, leak, _MOST_PAIRS)
    count = int(leak.is_leaked.sum())
    return Section(
        title=f"The {leak.modality}s that leak",
        notes=[f"{len(pairs)} of {count:,}, the closest first: left of test, right of training."],
        table=pair_rows(pairs) if leak.modality == "image" and pairs else None,
        cases=[
            Case(
                query=test.item(pair.test_row),
                said=pair.said if pair.said == "equal" else f"cosine {pair.said}",
                is_right=False,
                shown=[train.item(pair.train_row)],
            )
            for pair in pairs
        ],
    )
