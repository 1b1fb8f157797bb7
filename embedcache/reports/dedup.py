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
    """Return what removing copies only, and removing at each cosine, would do."""
    num_samples = len(analysis.samples)
    rows = []
    for level in analysis.levels():
        row = ["copies only" if level.cosine is None else f"{level.cosine:g}"]
        row.append("" if level.num_near is None else format_count(level.num_near))
        if level.num_gone is None:
            row += ["too many pairs", "", ""]
        else:
            row += [format_count(level.num_gone), format_count(num_samples - level.num_gone)]
            row.append(format_percent(level.num_gone / num_samples))
        rows.append(row)
    return ["cosine", "items with a near-duplicate", "removed", "kept", "removed of all"], rows


def present_thresholds(analysis: DedupAnalysis) -> Presentation:
    """Return the presentation to choose a cosine by: similarities, what each would remove, and example pairs."""
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
        record=lambda: {**analysis.to_json(), "levels": [asdict(level) for level in analysis.levels()]},
        notes=["choose a cosine, then: embedcache curate dedup CACHE OUT.parquet --cosine …"],
        renderers=[renderer],
    )


def present_dedup(result: DedupReport) -> Presentation:
    """Return the presentation of the samples that are removed: counts, borderline cases, and random groups."""
    analysis, removed = result.analysis, result.removed
    renderer = ItemRenderer(analysis.cache, analysis.feature.modality)
    near = np.flatnonzero(~removed["is_copy"])
    borderline = near[np.argsort(removed["cosine"][near], kind="stable")][:_NUM_BORDERLINE].tolist()
    rng = np.random.default_rng(analysis.settings.seed)
    kept = np.sort(rng.permutation(distinct(removed["kept"]))[:_NUM_GROUPS]).tolist()
    counts = [
        "copies only" if result.cosine is None else f"{result.cosine:g}",
        format_count(len(removed)),
        format_count(int(removed["is_copy"].sum())),
        format_count(int((removed["distance"] <= SAME_PICTURE).sum())),
        format_count(len(analysis.samples) - len(removed)),
    ]
    sections = [
        Section(title="Removed samples", table=(["cosine", "removed", "copies", "by pixels", "kept"], [counts])),
        *([] if analysis.near is None else [_similarity_section(analysis, result.cosine)]),
        Section(
            title="Borderline cases",
            notes=["The removed samples closest to the threshold; left what is kept, right what is removed."],
            examples=lambda: [_example(analysis, removed[[position]], renderer) for position in borderline],
        ),
        Section(
            title="Drawn at random",
            notes=["Left what is kept, right what is removed as its duplicate."],
            examples=lambda: [_example(analysis, removed[removed["kept"] == sample], renderer) for sample in kept],
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
    kept = distinct(removed["kept"])[:_NUM_GROUPS].tolist()
    pairs = analysis.near.pairs
    others = pairs[pairs["distance"] > SAME_PICTURE]
    closest = others[np.argsort(-others["cosine"], kind="stable")[:_EXAMPLES_PER_BAND]]
    shown = f" The first {len(kept)} of them are shown." if len(kept) == _NUM_GROUPS else ""
    note = (
        f"{analysis.line()}.{shown} Below: the most similar of all other pairs, which may be duplicates or "
        "not. Left what would be kept, right what would be removed."
    )
    return Section(
        title="Duplicates",
        notes=[note],
        table=threshold_table(analysis),
        num_printed=0,
        examples=lambda: [
            *(_example(analysis, removed[removed["kept"] == sample], renderer) for sample in kept),
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
    titled = {"The same picture": analysis.duplicates(None)}
    for low, high in reversed(list(pairwise((*LEVELS, np.inf)))):
        if low >= analysis.near.limit:
            titled[f"Pairs with a cosine of {low:g} to {min(high, 1):g}"] = pairs[
                (pairs["cosine"] >= cosine_limit(low)) & (pairs["cosine"] < cosine_limit(high))
            ]
    rng = np.random.default_rng(analysis.settings.seed)
    for title, similar in titled.items():
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


def _example(analysis: DedupAnalysis, removed: Array, renderer: ItemRenderer) -> QueryExample:
    """Return a kept sample beside the samples that are removed as its duplicates."""
    shown = removed[np.argsort(-removed["cosine"], kind="stable")][:_MAX_SHOWN_PER_GROUP]
    similarity = _similarity_text(removed, is_copy=bool(removed["is_copy"].all()))
    count = f", {len(removed):,} removed" if len(removed) > 1 else ""
    samples = [removed["kept"][0], *shown["sample"]]
    rows = analysis.copies.item_rows[np.searchsorted(analysis.copies.samples, samples)]
    return _side_by_side(renderer, rows, similarity + count)


def _similarity_text(pairs: Array, *, is_copy: bool) -> str:
    """Describe how similar one or more items are to another, of which they all are copies or not."""
    cosines = pairs["cosine"]
    distances = pairs["distance"]
    known = distances[distances < NO_DISTANCE]
    if is_copy and not len(known):
        return "equal bytes"
    lowest, highest = (format_fraction(min(cosine, 1)) for cosine in (cosines.min(), cosines.max()))
    similarity = f"cosine {highest}" if len(cosines) == 1 else f"cosine {lowest} to {highest}"
    if len(known):
        similarity += f", hash distance {known.max()}"
    return f"same picture, {similarity}" if is_copy else similarity


def _side_by_side(renderer: ItemRenderer, rows: Ints, outcome: str) -> QueryExample:
    """Return the item of the first row beside those of the others."""
    first, *others = [renderer.render(row) for row in rows.tolist()]
    return QueryExample(query=first, outcome=outcome, is_correct=True, results=others)
