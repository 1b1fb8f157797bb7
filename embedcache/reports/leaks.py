"""The presentation of test samples that leaked into training."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from embedcache.curate.leaks import LeakReport, ModalityLeaks, write_clean_selection
from embedcache.modalities import noun, one_noun
from embedcache.reports.items import ItemRenderer, QueryExample
from embedcache.reports.render import Presentation, Section, Table, format_count, format_fraction
from embedcache.store.cache import RowReader
from embedcache.store.layout import SAMPLES

_MAX_PAIRS = 40


@dataclass(frozen=True, kw_only=True)
class LeakedPair:
    """A test item and the training item closest to it: rows, and the keys of their samples or the texts themselves."""

    test_row: int
    train_row: int
    test: str
    train: str
    similarity: str


def leak_notes(leaks: LeakReport) -> list[str]:
    """Return the modalities in which only copies were searched, and why, or only clusters, and how completely."""
    return [f"{noun(leak.modality)}: {note}" for leak in leaks.leaks if (note := _search_note(leak))]


def _search_note(leak: ModalityLeaks) -> str | None:
    if leak.reason:
        return f"searched for copies only: {leak.reason}"
    if leak.near is None or leak.near.recall is None:
        return None
    recall = leak.near.recall
    pairs = f"found {recall.num_found:,} of the {recall.num_pairs:,} pairs of {recall.num_items:,} sampled test items"
    return f"{leak.near.num_clusters:,} clusters {pairs}"


def leak_table(leaks: LeakReport) -> Table:
    """Return the number of test samples with copies or near-duplicates in training, one row per modality."""
    columns = ["compared", "feature", "cosine", "test samples copied", "copied or near", "training samples to remove"]
    rows = [
        [
            f"{len(leak.test.rows):,} × {len(leak.train.rows):,} {noun(leak.modality)}",
            leak.feature or "hashes only",
            f"{leak.cosine:g}" if leak.feature else "",
            format_count(len(leak.copied_samples)),
            format_count(len(leak.leaked_samples)) if leak.feature else "unknown",
            format_count(len(leak.train_samples)),
            format_fraction(leak.highest),
        ]
        for leak in leaks.leaks
    ]
    return [*columns, "highest cosine besides copies"], rows


def closest_pairs(leaks: LeakReport, leak: ModalityLeaks, num_pairs: int) -> list[LeakedPair]:
    """Return the leaked test items closest to training, copies first, each with its closest training item."""
    leaked = np.flatnonzero(leak.is_leaked)
    order = leaked[np.lexsort((leaked, -leak.cosines[leaked], ~leak.is_copy[leaked]))][:num_pairs]
    items = [(leaks.test, leak.test.rows[order]), (leaks.train, leak.train_rows[order])]
    names = []
    for cache, rows in items:
        found = RowReader(cache, leak.modality).take(rows)
        if leak.modality != "text":
            found = RowReader(cache, SAMPLES, ["key"]).take(found["sample"].to_numpy())
        names.append(found["text" if leak.modality == "text" else "key"].to_pylist())
    return [
        LeakedPair(
            test_row=int(leak.test.rows[position]),
            train_row=int(leak.train_rows[position]),
            test=test,
            train=train,
            similarity="equal" if leak.is_copy[position] else format_fraction(min(1, leak.cosines[position])),
        )
        for position, test, train in zip(order.tolist(), *names, strict=True)
    ]


def leaked_pair_table(pairs: Sequence[LeakedPair]) -> Table:
    """Return the keys and cosines of pairs."""
    return ["test", "train", "cosine"], [[pair.test, pair.train, pair.similarity] for pair in pairs]


def present_leaks(leaks: LeakReport, out: Path | None = None) -> Presentation:
    """Return the presentation of the number of leaked samples and the closest pairs of each modality.

    `out` is the selection of training samples without leaks, which is written after the report was shown.
    """
    num_clean = len(leaks.clean_selection().rows) if out else 0
    modalities = [leak.modality for leak in leaks.leaks]
    renderers = [(ItemRenderer(leaks.test, modality), ItemRenderer(leaks.train, modality)) for modality in modalities]
    such = " or ".join(map(one_noun, modalities if {*modalities} - {"image", "text"} else ("image", "text")))
    note = f"Samples with at least one such {such}. A copy has equal bytes, or equal text."
    return Presentation(
        title="Leaks",
        lines=[leaks.line(), *leak_notes(leaks)],
        sections=[
            Section(title="Leaked samples", notes=[note], table=leak_table(leaks)),
            *(_pair_section(leaks, leak, *pair) for leak, pair in zip(leaks.leaks, renderers, strict=True)),
        ],
        record=leaks.to_json,
        notes=[f"{out}: {num_clean:,} of {leaks.num_train_samples:,} samples are kept"] if out else [],
        finish=partial(write_clean_selection, out, leaks) if out else tuple,
        renderers=[renderer for pair in renderers for renderer in pair],
    )


def _pair_section(leaks: LeakReport, leak: ModalityLeaks, test: ItemRenderer, train: ItemRenderer) -> Section:
    pairs = closest_pairs(leaks, leak, _MAX_PAIRS)
    return Section(
        title=f"Leaked {noun(leak.modality)}",
        notes=[f"{len(pairs)} of {int(leak.is_leaked.sum()):,}, the closest first: left test, right training."],
        table=leaked_pair_table(pairs) if pairs else None,
        num_printed=10,
        examples=lambda: [
            QueryExample(
                query=test.render(pair.test_row),
                outcome=pair.similarity if pair.similarity == "equal" else f"cosine {pair.similarity}",
                is_correct=False,
                results=[train.render(pair.train_row)],
            )
            for pair in pairs
        ],
    )
