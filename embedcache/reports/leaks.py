"""The presentation of test samples that leaked into training."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from embedcache.arrays import Ints
from embedcache.curate.leaks import LeakReport, ModalityLeaks, write_clean_selection
from embedcache.modalities import noun, one_noun
from embedcache.reports.items import ItemRenderer, QueryExample
from embedcache.reports.render import Presentation, Section, Table, format_count, format_fraction
from embedcache.store.cache import Cache, RowReader
from embedcache.store.layout import SAMPLES

_MAX_PAIRS = 40


@dataclass(frozen=True, kw_only=True)
class LeakedPair:
    """A test item and the training item closest to it.

    Args:
        test_row: row of the test item.
        train_row: row of the training item.
        test: key of the test sample, or the caption itself.
        train: key of the training sample, or the caption itself.
        similarity: `equal`, or the cosine.
    """

    test_row: int
    train_row: int
    test: str
    train: str
    similarity: str


def leak_notes(leaks: LeakReport) -> list[str]:
    """Return one line per modality that was not searched completely: why not, or how many pairs were found."""
    notes = []
    for leak in leaks.leaks:
        if note := _search_note(leak):
            notes.append(f"{noun(leak.modality)}: {note}")
    return notes


def _search_note(leak: ModalityLeaks) -> str | None:
    """Return why only copies were searched, or how many pairs an approximate search found."""
    if leak.reason:
        return f"searched for copies only: {leak.reason}"

    # An exhaustive search has no recall to report.
    if leak.near is None or leak.near.recall is None:
        return None
    recall = leak.near.recall
    pairs = f"found {recall.num_found:,} of the {recall.num_pairs:,} pairs of {recall.num_items:,} sampled test items"
    return f"{leak.near.num_clusters:,} clusters {pairs}"


def leak_table(leaks: LeakReport) -> Table:
    """Return the number of test samples with copies or near-duplicates in training, one row per modality."""
    columns = [
        "compared",
        "feature",
        "cosine",
        "test samples copied",
        "copied or near",
        "training samples to remove",
        "highest cosine besides copies",
    ]
    rows = []
    for leak in leaks.leaks:
        # Without a feature only hashes were compared.
        rows.append(
            [
                f"{len(leak.test.rows):,} × {len(leak.train.rows):,} {noun(leak.modality)}",
                leak.feature or "hashes only",
                f"{leak.cosine:g}" if leak.feature else "",
                format_count(len(leak.copied_samples)),
                format_count(len(leak.leaked_samples)) if leak.feature else "unknown",
                format_count(len(leak.train_samples)),
                format_fraction(leak.highest),
            ]
        )
    return columns, rows


def closest_pairs(leaks: LeakReport, leak: ModalityLeaks, num_pairs: int) -> list[LeakedPair]:
    """Return the leaked test items closest to training, copies first, each with its closest training item."""
    leaked = np.flatnonzero(leak.is_leaked)
    # The last key of lexsort counts most: copies, then cosines, then rows.
    order = leaked[np.lexsort((leaked, -leak.cosines[leaked], ~leak.is_copy[leaked]))][:num_pairs]
    test_rows = leak.test.rows[order]
    train_rows = leak.train_rows[order]
    test_names = _item_names(leaks.test, leak.modality, test_rows)
    train_names = _item_names(leaks.train, leak.modality, train_rows)

    pairs = []
    for number, position in enumerate(order):
        cosine = format_fraction(min(1, leak.cosines[position]))
        pairs.append(
            LeakedPair(
                test_row=int(test_rows[number]),
                train_row=int(train_rows[number]),
                test=test_names[number],
                train=train_names[number],
                similarity="equal" if leak.is_copy[position] else cosine,
            )
        )
    return pairs


def _item_names(cache: Cache, modality: str, rows: Ints) -> list[str]:
    """Return the caption in each row, or for other modalities the key of its sample."""
    items = RowReader(cache, modality).take(rows)
    if modality == "text":
        captions: list[str] = items["text"].to_pylist()
        return captions
    samples = RowReader(cache, SAMPLES, ["key"]).take(items["sample"].to_numpy())
    keys: list[str] = samples["key"].to_pylist()
    return keys


def leaked_pair_table(pairs: Sequence[LeakedPair]) -> Table:
    """Return the keys and cosines of pairs."""
    return ["test", "train", "cosine"], [[pair.test, pair.train, pair.similarity] for pair in pairs]


def present_leaks(leaks: LeakReport, out: Path | None = None) -> Presentation:
    """Return the presentation of the number of leaked samples and the closest pairs of each modality.

    `out` is the selection of training samples without leaks, which is written after the report was shown.
    """
    sections = [Section(title="Leaked samples", notes=[_leak_note(leaks)], table=leak_table(leaks))]
    renderers = []
    for leak in leaks.leaks:
        test = ItemRenderer(leaks.test, leak.modality)
        train = ItemRenderer(leaks.train, leak.modality)
        sections.append(_pair_section(leaks, leak, test, train))
        renderers += [test, train]

    notes = []
    if out:
        num_clean = len(leaks.clean_selection().rows)
        notes.append(f"{out}: {num_clean:,} of {leaks.num_train_samples:,} samples are kept")
    return Presentation(
        title="Leaks",
        lines=[leaks.line(), *leak_notes(leaks)],
        sections=sections,
        record=leaks.to_json,
        notes=notes,
        finish=partial(write_clean_selection, out, leaks) if out else tuple,
        renderers=renderers,
    )


def _leak_note(leaks: LeakReport) -> str:
    modalities = [leak.modality for leak in leaks.leaks]
    # One of both modalities may have been skipped; other modalities are named as they are.
    if {*modalities} <= {"image", "text"}:
        modalities = ["image", "text"]
    items = " or ".join(map(one_noun, modalities))
    return f"Samples with at least one such {items}. A copy has equal bytes, or equal text."


def _pair_section(leaks: LeakReport, leak: ModalityLeaks, test: ItemRenderer, train: ItemRenderer) -> Section:
    pairs = closest_pairs(leaks, leak, _MAX_PAIRS)

    def show_pairs() -> list[QueryExample]:
        examples = []
        for pair in pairs:
            examples.append(
                QueryExample(
                    query=test.render(pair.test_row),
                    outcome=pair.similarity if pair.similarity == "equal" else f"cosine {pair.similarity}",
                    is_correct=False,
                    results=[train.render(pair.train_row)],
                )
            )
        return examples

    return Section(
        title=f"Leaked {noun(leak.modality)}",
        notes=[f"{len(pairs)} of {int(leak.is_leaked.sum()):,}, the closest first: left test, right training."],
        table=leaked_pair_table(pairs) if pairs else None,
        num_printed=10,
        examples=show_pairs,
    )
