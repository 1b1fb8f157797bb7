"""Encoder pairs as a page: the table, a heat map for each metric, and what decided the figures."""

from pathlib import Path

from embedcache.evaluate.pair_plots import heat_map
from embedcache.evaluate.pairs_report import METRICS, PairsReport, pairs_rows
from embedcache.pages.sections import Section, write_sections

_NOTES = {
    "probe": "Recall at 10, mean of both ways, of a CCA that was fitted on the training part and ranks the validation "
    "part: the start of training, and the only one of these that learns a map.",
    "mutual_knn": "The share of a sample's nearest neighbours that both sides agree on (The Platonic Representation "
    "Hypothesis, ICML 2024). It depends on k and on the number of samples.",
    "debiased_cka": "Linear CKA from unbiased estimates: 0 for sides that have nothing in common, whatever their "
    "width.",
    "linear_cka": "CKA as it is mostly reported. It grows with the width of the features over the number of samples; "
    "the column 'shuffled' of the table is how much of it would be there with shuffled pairs.",
}


def write_pairs(path: Path, report: PairsReport) -> None:
    """Write the page. It asks for nothing from outside."""
    best = report.pairs[0]
    maps = [
        Section(title=name, notes=[_NOTES[metric]], figures=[heat_map(report, metric)])
        for metric, name in METRICS.items()
    ]
    pooling = [[feature, words] for feature, words in report.pooling.items()]
    sections = [
        Section(title="All pairs, best probe first", notes=[report.line()], table=pairs_rows(report)),
        *maps,
        Section(title="How each encoder made its vectors", table=(["feature", "pooling"], pooling)),
    ]
    write_sections(
        path,
        title="Encoder pairs",
        lead=f"Before any training: {best.image} × {best.text} has the best probe, R@10 {best.probe:.3f}, of "
        f"{len(report.pairs)} pairs.",
        warnings=list(report.skipped),
        sections=sections,
    )
