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
    values = report.quantiles(*_BANDS)
    return [f"{fraction:.0%}" for fraction in _BANDS], [[f"{value:.4g}" for value in values]]


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
    order = np.argsort(report.scores_S, kind="stable")[: int(np.isfinite(report.scores_S).sum())]
    edges = np.round(np.array(_BANDS) * len(order)).astype(np.int64)
    for low, high, start, stop in reversed(list(zip(_BANDS, _BANDS[1:], edges, edges[1:], strict=False))):
        samples = order[start:stop]
        if not len(samples):
            continue
        shown = samples[np.unique(np.linspace(0, len(samples) - 1, _PER_BAND).astype(np.int64))]
        scores = report.scores_S[samples]
        yield QueryExample(
            query=PageItem(text=f"{low:.0%} to {high:.0%}"),
            outcome=f"{report.name} {scores[0]:.4g} to {scores[-1]:.4g}",
            is_correct=True,
            results=[renderer.render(int(report.rows_S[sample])) for sample in shown.tolist()],
        )


def outlier_notes(report: OutlierReport) -> list[str]:
    """Return one line per score beside typicality."""
    notes = []
    if report.labels is not None:
        labeled = int(np.isfinite(report.scores[MARGIN]).sum())
        count = format_part(int(report.is_mislabeled.sum()), labeled)
        notes.append(f"likely mislabels: {count} of the labeled samples")
    if PAIR_COSINE in report.scores:
        num_pairs = int(np.isfinite(report.scores[PAIR_COSINE]).sum())
        notes.append(f"pairs: {num_pairs:,} samples with {name_pair(_pair(report))}")
    return notes


def threshold_table(report: OutlierReport) -> Table:
    """Return for fractions of the samples with a score the values of it that leave so many out, fewer where some tie.

    Their number is that of samples with an item that was compared; fewer have a label, or both items of a pair.
    """
    sorted_scores = [np.sort(values_S[np.isfinite(values_S)]) for values_S in report.scores.values()]
    rows, num_compared = [], len(sorted_scores[0])
    for fraction in _FRACTIONS:
        limits = [
            "" if not len(sorted_M) else _floor(sorted_M[round(fraction * len(sorted_M))]) for sorted_M in sorted_scores
        ]
        rows.append([f"{fraction:.1%}", format_count(round(fraction * num_compared)), *limits])
    return ["left out", "samples at most", *(f"{name} of at least" for name in report.scores)], rows


def _floor(value: float) -> str:
    """Return a number with three decimals, rounded down unless it is nearly the next one."""
    return f"{np.floor(1000 * (value + _NEARLY)) / 1000:.3f}"


def present_outliers(report: OutlierReport, out: Path | None) -> Presentation:
    """Return the presentation of odd samples, and of the table of their scores `out`, if one was written."""
    renderer = ItemRenderer(report.cache, report.vectors.modality)
    modalities = _pair(report) if PAIR_COSINE in report.scores else []
    nouns = pair_nouns(modalities) if modalities else ()
    pair = [
        renderer if modality == report.vectors.modality else ItemRenderer(report.cache, modality)
        for modality in modalities
    ]

    def show_lowest(name: str) -> list[QueryExample]:
        samples = report.lowest(name, _NUM_EXAMPLES)
        if name == PAIR_COSINE:
            return _pair_examples(report, samples, *pair)
        samples = samples[report.is_mislabeled[samples]] if name == MARGIN else samples
        return [_beside_neighbors(report, name, sample, renderer) for sample in samples.tolist()]

    thresholds = Section(
        title="What a threshold leaves out",
        notes=["A sample is judged by the best of its items."],
        table=threshold_table(report),
        figures=lambda: [_histogram(values_S, name) for name, values_S in report.scores.items()],
    )
    lowest = [
        Section(
            title=_TITLES[name].format(*nouns).capitalize(),
            notes=[_NOTES[name].format(*nouns)],
            examples=partial(show_lowest, name),
        )
        for name in report.scores
    ]
    return Presentation(
        title="Outliers",
        lines=[report.line(), *outlier_notes(report)],
        sections=[thresholds, *lowest],
        record=report.to_json,
        notes=[f"wrote {out}: {', '.join(report.scores)} of {report.num_samples:,} samples"] if out else [],
        renderers=[renderer, *pair],
    )


def _beside_neighbors(report: OutlierReport, name: str, sample: int, renderer: ItemRenderer) -> QueryExample:
    row = int(report.rows_S[sample])
    outcome = f"{name.replace('_', ' ')} {report.scores[name][sample]:.3f}"
    if name == MARGIN and report.labels is not None:
        own, suggested = (report.labels.names[of[sample]] for of in (report.labels.numbers, report.suggested_S))
        outcome = f"{own}, its neighbors {suggested}; {outcome}"
    near = report.neighbors_of(row)[:_NUM_NEIGHBORS]
    return QueryExample(
        query=renderer.render(row),
        outcome=outcome,
        is_correct=True,
        results=[renderer.render(int(other)) for other in near],
    )


def _pair(report: OutlierReport) -> Sequence[str]:
    """Return the modalities of the pairs that the run compares."""
    assert report.vectors.run is not None
    return report.vectors.run.modalities


def _pair_examples(
    report: OutlierReport, samples: Ints, first: ItemRenderer, second: ItemRenderer
) -> list[QueryExample]:
    """Return the first item of some samples beside their items of the other modality, such as an image and captions."""
    (rows, _), (starts, counts) = (RowReader(report.cache, modality).find(samples) for modality in _pair(report))
    return [
        QueryExample(
            query=first.render(row),
            outcome=f"pair cosine {report.scores[PAIR_COSINE][sample]:.3f}",
            is_correct=True,
            results=[second.render(other) for other in range(start, start + min(count, _NUM_NEIGHBORS))],
        )
        for sample, row, start, count in np.stack([samples, rows, starts, counts], axis=1).tolist()
    ]


def _histogram(values_S: Floats, name: str) -> str:
    return histogram(values_S, x=name.replace("_", " "), y="samples")
