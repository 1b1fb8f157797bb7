"""The presentation of scores of samples: scores by a head or by texts, and scores of odd samples."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from embedcache.arrays import Floats, Ints
from embedcache.curate.outliers import MARGIN, PAIR_COSINE, TYPICALITY, OutlierReport
from embedcache.curate.score import ScoreReport
from embedcache.modalities import name_pair, pair_nouns
from embedcache.reports.figures import histogram
from embedcache.reports.items import ItemRenderer, PageItem, QueryExample
from embedcache.reports.render import Presentation, Section, Table, format_count, format_part
from embedcache.store.cache import RowReader

_PER_BAND = 8
_BANDS = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
_FRACTIONS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)
_NUM_EXAMPLES = 24
_NEARLY = 1e-6  # 0.7 in float32 is a little less
_NUM_NEIGHBORS = 5
_TITLES = {
    TYPICALITY: "Least typical",
    MARGIN: "Likely mislabels",
    PAIR_COSINE: "{} and {} that match least",
}
_NOTES = {
    TYPICALITY: "Left an item, right its nearest neighbors. The typicality is the mean cosine to all of its nearest "
    "neighbors: items that resemble each other more often than that are typical, however odd they are.",
    MARGIN: "Left an item with its label, right its nearest neighbors. The margin is the fraction of its nearest "
    "neighbors that have its label less the fraction that have the most frequent other label.",
    PAIR_COSINE: "The best cosine of a sample's {} and {}, by the run. Pairs that the run was trained on match better "
    "than others.",
}


def score_table(report: ScoreReport) -> Table:
    """Return quantiles of the scores."""
    return list(map("{:.0%}".format, _BANDS)), [list(map("{:.4g}".format, report.quantiles(*_BANDS)))]


def present_scores(report: ScoreReport) -> Presentation:
    """Return the presentation to choose a threshold by: the distribution of the scores, and items of each part."""
    renderer = ItemRenderer(report.cache, report.modality)
    distribution = Section(
        title="Distribution",
        notes=["Quantiles of the samples' scores: a column says below which score so many of them are."],
        table=score_table(report),
        figures=lambda: [_histogram(report.scores_S, report.name)],
    )
    bands = Section(
        title="Items of each part",
        notes=["From each part a few items at equal distances, the lowest first."],
        examples=lambda: list(_bands(report, renderer)),
    )
    return Presentation(
        title=f"Scores: {report.name}",
        lines=[report.line()],
        sections=[distribution, bands],
        record=report.to_json,
        renderers=[renderer],
    )


def _bands(report: ScoreReport, renderer: ItemRenderer) -> Iterator[QueryExample]:
    """Iterate over the parts between quantiles, highest first, each with a few items."""
    # Samples without a score are NaN, which sorts last.
    order = np.argsort(report.scores_S, kind="stable")[: int(np.isfinite(report.scores_S).sum())]
    edges = np.round(np.array(_BANDS) * len(order)).astype(np.int64)

    for number in reversed(range(len(_BANDS) - 1)):
        samples = order[edges[number] : edges[number + 1]]
        # Few samples leave narrow parts empty.
        if not len(samples):
            continue
        examples = samples[np.unique(np.linspace(0, len(samples) - 1, _PER_BAND).astype(np.int64))]
        scores = report.scores_S[samples]
        yield QueryExample(
            query=PageItem(text=f"{_BANDS[number]:.0%} to {_BANDS[number + 1]:.0%}"),
            outcome=f"{report.name} {scores[0]:.4g} to {scores[-1]:.4g}",
            is_correct=True,
            results=list(map(renderer.render, report.rows_S[examples].tolist())),
        )


def outlier_notes(report: OutlierReport) -> list[str]:
    """Return one line for each score other than typicality."""
    notes = []
    if report.labels is not None:
        num_labeled = int(np.isfinite(report.scores[MARGIN]).sum())
        count = format_part(int(report.is_mislabeled.sum()), num_labeled)
        notes.append(f"likely mislabels: {count} of the labeled samples")
    if PAIR_COSINE in report.scores:
        num_pairs = int(np.isfinite(report.scores[PAIR_COSINE]).sum())
        notes.append(f"pairs: {num_pairs:,} samples with {name_pair(_pair(report))}")
    return notes


def threshold_table(report: OutlierReport) -> Table:
    """Return for some fractions of the samples the value of each score that leaves so many out, fewer if some tie.

    The second column counts samples with an item that was compared. Fewer have a label, or both items of a pair.
    """
    sorted_scores = [np.sort(values_S[np.isfinite(values_S)]) for values_S in report.scores.values()]
    # Typicality comes first, and every compared sample has one.
    num_compared = len(sorted_scores[0])

    rows = []
    for fraction in _FRACTIONS:
        row = [f"{fraction:.1%}", format_count(round(fraction * num_compared))]
        for sorted_M in sorted_scores:
            row.append(_floor(sorted_M[round(fraction * len(sorted_M))]) if len(sorted_M) else "")
        rows.append(row)
    return ["left out", "samples at most", *map("{} of at least".format, report.scores)], rows


def _floor(value: float) -> str:
    """Return a number with three decimals, rounded down unless it is nearly the next one."""
    return f"{np.floor(1000 * (value + _NEARLY)) / 1000:.3f}"


def present_outliers(report: OutlierReport, out: Path | None) -> Presentation:
    """Return the presentation of odd samples, and of the table of their scores `out`, if one was written."""
    renderer = ItemRenderer(report.cache, report.vectors.modality)
    pair = []
    nouns: Sequence[str] = ()
    if PAIR_COSINE in report.scores:
        nouns = pair_nouns(_pair(report))
        for modality in _pair(report):
            # Items of one renderer count once in its warnings and its limit of bytes.
            is_same = modality == report.vectors.modality
            pair.append(renderer if is_same else ItemRenderer(report.cache, modality))

    def show_lowest(name: str) -> list[QueryExample]:
        samples = report.lowest(name, _NUM_EXAMPLES)
        if name == PAIR_COSINE:
            return _pair_examples(report, samples, *pair)
        if name == MARGIN:
            samples = samples[report.is_mislabeled[samples]]
        return [_example_with_neighbors(report, name, sample, renderer) for sample in samples.tolist()]

    thresholds = Section(
        title="What a threshold leaves out",
        notes=["A sample is judged by the best of its items."],
        table=threshold_table(report),
        figures=lambda: [_histogram(values_S, name) for name, values_S in report.scores.items()],
    )
    sections = [thresholds]
    for name in report.scores:
        sections.append(
            Section(
                title=_TITLES[name].format(*nouns).capitalize(),
                notes=[_NOTES[name].format(*nouns)],
                examples=partial(show_lowest, name),
            )
        )

    return Presentation(
        title="Outliers",
        lines=[report.line(), *outlier_notes(report)],
        sections=sections,
        record=report.to_json,
        notes=[f"wrote {out}: {', '.join(report.scores)} of {report.num_samples:,} samples"] if out else [],
        renderers=[renderer, *pair],
    )


def _example_with_neighbors(report: OutlierReport, name: str, sample: int, renderer: ItemRenderer) -> QueryExample:
    outcome = f"{name.replace('_', ' ')} {report.scores[name][sample]:.3f}"
    if name == MARGIN and report.labels is not None:
        label = report.labels.names[report.labels.numbers[sample]]
        suggestion = report.labels.names[report.suggested_S[sample]]
        outcome = f"{label}, its neighbors {suggestion}; {outcome}"

    row = int(report.rows_S[sample])
    neighbors = report.neighbors_of(row)[:_NUM_NEIGHBORS]
    return QueryExample(
        query=renderer.render(row),
        outcome=outcome,
        is_correct=True,
        results=list(map(renderer.render, neighbors.tolist())),
    )


def _pair(report: OutlierReport) -> Sequence[str]:
    """Return the modalities of the pairs that the run compares."""
    assert report.vectors.run is not None
    return report.vectors.run.modalities


def _pair_examples(
    report: OutlierReport, samples: Ints, first: ItemRenderer, second: ItemRenderer
) -> list[QueryExample]:
    """Return the first item of some samples with their items of the other modality, such as an image and captions."""
    first_modality, second_modality = _pair(report)
    rows, _ = RowReader(report.cache, first_modality).find(samples)
    starts, counts = RowReader(report.cache, second_modality).find(samples)
    # The items of a sample are consecutive.
    stops = starts + np.minimum(counts, _NUM_NEIGHBORS)

    examples = []
    for sample, row, start, stop in np.stack([samples, rows, starts, stops], axis=1).tolist():
        examples.append(
            QueryExample(
                query=first.render(row),
                outcome=f"pair cosine {report.scores[PAIR_COSINE][sample]:.3f}",
                is_correct=True,
                results=list(map(second.render, range(start, stop))),
            )
        )
    return examples


def _histogram(values_S: Floats, name: str) -> str:
    return histogram(values_S, x=name.replace("_", " "), y="samples")
