"""Leaks in words and numbers: for a terminal and a page."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embedcache.cache.cache import Cache
from embedcache.curate.duplicates.leaks import Leak, Leaks
from embedcache.pages.sections import Table


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


def line(leaks: Leaks) -> str:
    """Say in a line how many samples leak."""
    count, num_samples = len(leaks.leaked_samples), leaks.test.info.num_samples
    share = 100 * count / max(1, num_samples)
    return f"{count:,} of {num_samples:,} samples of {leaks.test.path} ({share:.1f} %) are in {leaks.train.path}"


def notes(leaks: Leaks) -> list[str]:
    """Say where only copies could be looked for, and why."""
    return [f"{leak.modality}s: only copies were looked for: {leak.reason}" for leak in leaks.leaks if leak.reason]


def leak_rows(leaks: Leaks) -> Table:
    """Count, for each modality, the test samples that are copied, or nearly, and the training samples that leak."""
    return (
        ["compared", "feature", "limit", "test samples copied", "copied or near", "training samples", "highest cosine"],
        [_leak_row(leak) for leak in leaks.leaks],
    )


def _leak_row(leak: Leak) -> list[str]:
    return [
        f"{len(leak.test.rows):,} × {len(leak.train.rows):,} {leak.modality}s",
        leak.feature or "hashes alone",
        f"{leak.cosine:g}" if leak.feature else "",
        f"{len(leak.copied_samples):,}",
        f"{len(leak.leaked_samples):,}" if leak.feature else "not known",
        f"{len(leak.train_samples):,}",
        "" if leak.highest is None else f"{leak.highest:.4f}",
    ]


def worst_pairs(leaks: Leaks, leak: Leak, most: int) -> list[Pair]:
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
