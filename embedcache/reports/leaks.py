"""Leaks in words and numbers: for a terminal and a page.

Leaks as one page: counts, and test items beside what they are closest to in training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedcache.curate.leaks import LeakReport, ModalityLeaks
from embedcache.reports.base import Case, Section, Table, write_sections
from embedcache.reports.thumbnails import Showing, credit
from embedcache.store.cache import Cache


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A test item and what it is closest to in training.

    Args:
        test_row: of the test item.
        train_row: of the training item.
        test: the key of its sample; the text itself of a text.
        train: alike.
        said: `equal` or the cosine.
    """

    test_row: int
    train_row: int
    test: str
    train: str
    said: str


def line(leaks: LeakReport) -> str:
    """Say in a line how many samples leak."""
    count, num_samples = len(leaks.leaked_samples), leaks.test.info.num_samples
    share = 100 * count / max(1, num_samples)
    return f"{count:,} of {num_samples:,} samples of {leaks.test.path} ({share:.1f} %) are in {leaks.train.path}"


def notes(leaks: LeakReport) -> list[str]:
    """Say where only copies could be looked for, and why."""
    return [f"{leak.modality}s: only copies were looked for: {leak.reason}" for leak in leaks.leaks if leak.reason]


def leak_rows(leaks: LeakReport) -> Table:
    """Count, for each modality, the test samples that are copied, or nearly, and the training samples that leak."""
    return (
        ["compared", "feature", "limit", "test samples copied", "copied or near", "training samples", "highest cosine"],
        [_leak_row(leak) for leak in leaks.leaks],
    )


def _leak_row(leak: ModalityLeaks) -> list[str]:
    return [
        f"{len(leak.test.rows):,} × {len(leak.train.rows):,} {leak.modality}s",
        leak.feature or "hashes alone",
        f"{leak.cosine:g}" if leak.feature else "",
        f"{len(leak.copied_samples):,}",
        f"{len(leak.leaked_samples):,}" if leak.feature else "not known",
        f"{len(leak.train_samples):,}",
        "" if leak.highest is None else f"{leak.highest:.4f}",
    ]


def worst_pairs(leaks: LeakReport, leak: ModalityLeaks, most: int) -> list[Pair]:
    """Give the test items that are closest to training, copies first, each with what it is closest to.

    Args:
        leaks: the caches.
        leak: of one modality.
        most: how many; fewer where fewer leak.
    """
    leaked = np.flatnonzero(leak.is_leaked)
    order = leaked[np.lexsort((leaked, -leak.cosines[leaked], ~leak.is_copy[leaked]))][:most]
    test, train = _Names(leaks.test, leak.modality), _Names(leaks.train, leak.modality)
    return [
        Pair(
            test_row=int(leak.test.rows[place]),
            train_row=int(leak.train_rows[place]),
            test=test.of(int(leak.test.rows[place])),
            train=train.of(int(leak.train_rows[place])),
            said="equal" if leak.is_copy[place] else f"{min(1, leak.cosines[place]):.4f}",
        )
        for place in order.tolist()
    ]


def pair_rows(pairs: Sequence[Pair]) -> Table:
    """Give the keys and cosines of pairs."""
    return ["test", "train", "cosine"], [[pair.test, pair.train, pair.said] for pair in pairs]


class _Names:
    def __init__(self, cache: Cache, modality: str) -> None:
        self._keys, self._items = cache.samples["key"], cache.items(modality)
        self._is_text = modality == "text"

    def of(self, row: int) -> str:
        if self._is_text:
            return str(self._items["text"][row])
        return str(self._keys[self._items["sample"][row].as_py()])


_MOST_PAIRS = 40


def write_leaks(path: Path, leaks: LeakReport) -> None:
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


def _worst(leaks: LeakReport, leak: ModalityLeaks, test: Showing, train: Showing) -> Section:
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
