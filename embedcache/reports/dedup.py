"""The presentation of duplicates: one to choose a cosine by, one of what is removed."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import pairwise

import numpy as np

from embedcache.arrays import Array, Ints, distinct
from embedcache.curate.dedup import LEVELS, DedupAnalysis, DedupReport
from embedcache.curate.pixels import NO_DISTANCE, SAME_PICTURE
from embedcache.neighbors.pairs import cosine_limit
from embedcache.reports.figures import histogram
from embedcache.reports.items import ItemRenderer, QueryExample
from embedcache.reports.render import Presentation, Section, Table, format_count, format_fraction, format_percent

_EXAMPLES_PER_BAND = 5
_NUM_BORDERLINE = 10
_NUM_GROUPS = 24
_MAX_SHOWN_PER_GROUP = 8


def threshold_table(analysis: DedupAnalysis) -> Table:
    """Return how many samples are removed as copies only, and at each cosine."""
    num_samples = len(analysis.samples)
    rows = []
    for level in analysis.levels():
        row = [
            "copies only" if level.cosine is None else f"{level.cosine:g}",
            "" if level.num_near is None else format_count(level.num_near),
        ]
        # Pairs below the limit of the search are unknown, so their samples are not counted.
        if level.num_gone is None:
            row += ["too many pairs", "", ""]
        else:
            num_kept = num_samples - level.num_gone
            row += [format_count(level.num_gone), format_count(num_kept), format_percent(level.num_gone / num_samples)]
        rows.append(row)
    return ["cosine", "items with a near-duplicate", "removed", "kept", "removed of all"], rows


def present_thresholds(analysis: DedupAnalysis) -> Presentation:
    """Return the presentation to choose a cosine by: similarities, removed samples per cosine, and example pairs."""
    renderer = ItemRenderer(analysis.cache, analysis.feature.modality)
    thresholds = Section(
        title="What each cosine would remove",
        notes=["A sample is removed if each of its items is that close to an item of a sample that is kept."],
        table=threshold_table(analysis),
    )
    return Presentation(
        title="Duplicates: choose a cosine",
        lines=[analysis.line()],
        sections=[_similarity_section(analysis, None), thresholds, *_pair_sections(analysis, renderer)],
        record=lambda: {**analysis.to_json(), "levels": list(map(asdict, analysis.levels()))},
        notes=["choose a cosine, then: embedcache curate dedup CACHE OUT.parquet --cosine …"],
        renderers=[renderer],
    )


def present_dedup(result: DedupReport) -> Presentation:
    """Return the presentation of the samples that are removed: counts, borderline cases, and random groups."""
    analysis = result.analysis
    removed = result.removed
    renderer = ItemRenderer(analysis.cache, analysis.feature.modality)

    counts = [
        "copies only" if result.cosine is None else f"{result.cosine:g}",
        format_count(len(removed)),
        format_count(int(removed["is_copy"].sum())),
        format_count(int((removed["distance"] <= SAME_PICTURE).sum())),
        format_count(len(analysis.samples) - len(removed)),
    ]
    sections = [
        Section(title="Removed samples", table=(["cosine", "removed", "copies", "by pixels", "kept"], [counts]))
    ]
    # Copies are found by their hashes, so nothing was compared if only copies are removed.
    if analysis.near is not None:
        sections.append(_similarity_section(analysis, result.cosine))

    near = np.flatnonzero(~removed["is_copy"])
    borderline = near[np.argsort(removed["cosine"][near], kind="stable")][:_NUM_BORDERLINE]
    rng = np.random.default_rng(analysis.settings.seed)
    originals = np.sort(rng.permutation(distinct(removed["kept"]))[:_NUM_GROUPS])
    sections += [
        Section(
            title="Borderline cases",
            notes=["The removed samples closest to the threshold; left what is kept, right what is removed."],
            examples=lambda: [_group_example(analysis, removed[[position]], renderer) for position in borderline],
        ),
        Section(
            title="Drawn at random",
            notes=["Left what is kept, right what is removed as its duplicate."],
            examples=lambda: _group_examples(analysis, removed, originals, renderer),
        ),
    ]
    return Presentation(
        title="Duplicates",
        lines=result.lines(),
        sections=sections,
        record=result.to_json,
        renderers=[renderer],
    )


def duplicate_section(analysis: DedupAnalysis, renderer: ItemRenderer) -> Section:
    """Return the section of all copies side by side, and below them the most similar of all other pairs."""
    assert analysis.near is not None
    removed = analysis.removed(None)
    originals = distinct(removed["kept"])[:_NUM_GROUPS]
    note = f"{analysis.line()}."
    if len(originals) == _NUM_GROUPS:
        note += f" The first {_NUM_GROUPS} of them are shown."
    note += (
        " Below: the most similar of all other pairs, which may be duplicates or not. Left what would be kept, right "
        "what would be removed."
    )

    pairs = analysis.near.pairs
    different = pairs[pairs["distance"] > SAME_PICTURE]
    closest = different[np.argsort(-different["cosine"], kind="stable")[:_EXAMPLES_PER_BAND]]
    return Section(
        title="Duplicates",
        notes=[note],
        table=threshold_table(analysis),
        num_printed=0,
        examples=lambda: [
            *_group_examples(analysis, removed, originals, renderer),
            *_pair_examples(analysis, closest, renderer),
        ],
    )


def _similarity_section(analysis: DedupAnalysis, limit: float | None) -> Section:
    return Section(
        title="Similarity",
        notes=["Each item's largest cosine to another item; equal bytes are counted once. The axis is logarithmic."],
        figures=lambda: [_similarity_histogram(analysis, limit)],
    )


def _similarity_histogram(analysis: DedupAnalysis, limit: float | None) -> str:
    return histogram(np.minimum(analysis.similarities, 1), x="largest cosine to another item", y="items", limit=limit)


def _pair_sections(analysis: DedupAnalysis, renderer: ItemRenderer) -> Iterator[Section]:
    """Iterate over sections of pairs: the same picture, then one for each band of cosines, the closest first."""
    assert analysis.near is not None
    pairs = analysis.near.pairs
    pairs_by_title = {"The same picture": analysis.duplicates(None)}
    for low, high in reversed(list(pairwise((*LEVELS, np.inf)))):
        # The search had found too many pairs below its limit.
        if low >= analysis.near.limit:
            is_within = (pairs["cosine"] >= cosine_limit(low)) & (pairs["cosine"] < cosine_limit(high))
            pairs_by_title[f"Pairs with a cosine of {low:g} to {min(high, 1):g}"] = pairs[is_within]

    # One generator for all sections: a draw depends on the sections above.
    rng = np.random.default_rng(analysis.settings.seed)
    for title, similar in pairs_by_title.items():
        sampled = np.sort(rng.permutation(len(similar))[:_EXAMPLES_PER_BAND])
        if len(sampled):
            yield Section(
                title=title,
                notes=[f"{len(sampled)} of {len(similar):,}, drawn at random."],
                examples=partial(_pair_examples, analysis, similar[sampled], renderer),
            )


def _pair_examples(analysis: DedupAnalysis, pairs: Array, renderer: ItemRenderer) -> list[QueryExample]:
    """Return pairs of similar items side by side."""
    examples = []
    for pair in pairs:
        rows = analysis.copies.unique_rows[[pair["left"], pair["right"]]]
        outcome = _similarity_text(pair.reshape(1), is_copy=bool(pair["distance"] <= SAME_PICTURE))
        examples.append(_side_by_side(renderer, rows, outcome))
    return examples


def _group_examples(
    analysis: DedupAnalysis, removed: Array, originals: Ints, renderer: ItemRenderer
) -> list[QueryExample]:
    """Return kept samples, each beside the samples that are removed as its duplicates."""
    return [_group_example(analysis, removed[removed["kept"] == sample], renderer) for sample in originals.tolist()]


def _group_example(analysis: DedupAnalysis, removed: Array, renderer: ItemRenderer) -> QueryExample:
    """Return a kept sample beside the samples that are removed as its duplicates."""
    similarity = _similarity_text(removed, is_copy=bool(removed["is_copy"].all()))
    count = f", {len(removed):,} removed" if len(removed) > 1 else ""

    closest = removed[np.argsort(-removed["cosine"], kind="stable")][:_MAX_SHOWN_PER_GROUP]
    samples = [removed["kept"][0], *closest["sample"]]
    rows = analysis.copies.item_rows[np.searchsorted(analysis.copies.samples, samples)]
    return _side_by_side(renderer, rows, similarity + count)


def _similarity_text(pairs: Array, *, is_copy: bool) -> str:
    """Describe how similar one or more items are to another item, and whether all of them are its copies."""
    cosines = pairs["cosine"]
    distances = pairs["distance"]
    # Captions, and images that cannot be read, have no distance of pixels.
    distances = distances[distances < NO_DISTANCE]
    if is_copy and not len(distances):
        return "equal bytes"

    # A cosine of float16 vectors can exceed 1 a little.
    lowest = format_fraction(min(cosines.min(), 1))
    highest = format_fraction(min(cosines.max(), 1))
    similarity = f"cosine {highest}" if len(cosines) == 1 else f"cosine {lowest} to {highest}"
    if len(distances):
        similarity += f", hash distance {distances.max()}"
    return f"same picture, {similarity}" if is_copy else similarity


def _side_by_side(renderer: ItemRenderer, rows: Ints, outcome: str) -> QueryExample:
    """Return the item of the first row beside the items of the other rows."""
    query, *results = map(renderer.render, rows.tolist())
    return QueryExample(query=query, outcome=outcome, is_correct=True, results=results)
