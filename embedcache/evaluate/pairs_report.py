"""Encoder pairs side by side: what was measured of each, and what decided it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from embedcache.evaluate.report import format_estimate, format_share
from embedcache.metrics.intervals import Estimate

ROWS = "each item scaled to length 1, then the mean over a sample's images and over its captions"
"""How a sample becomes one row of a side; the paper averages five captions too, and does not scale images first."""

METRICS: Mapping[str, str] = {
    "probe": "probe R@10",
    "mutual_knn": "mutual kNN",
    "debiased_cka": "debiased CKA",
    "linear_cka": "linear CKA",
}
"""Metric -> what it is called in tables and figures."""


@dataclass(frozen=True, kw_only=True)
class PairFigures:
    """What was measured of one image feature and one text feature.

    Args:
        image: `encoder/feature`.
        text: alike.
        i2t: recall at 10 of the probe, image to text.
        t2i: text to image.
        mutual_knn: share of nearest neighbours in common.
        debiased_cka: linear CKA from unbiased HSIC.
        linear_cka: linear CKA as the paper has it.
        shuffled_cka: what linear CKA is expected to be with shuffled pairs.
    """

    image: str
    text: str
    i2t: Estimate
    t2i: Estimate
    mutual_knn: Estimate
    debiased_cka: Estimate
    linear_cka: Estimate
    shuffled_cka: float

    @property
    def probe(self) -> float:
        """Recall at 10, mean of both ways."""
        return (self.i2t.value + self.t2i.value) / 2

    def value(self, metric: str) -> float:
        """Get the value of one of `METRICS`."""
        found = getattr(self, metric)
        return float(found.value if isinstance(found, Estimate) else found)


@dataclass(frozen=True, kw_only=True)
class PairsReport:
    """All pairs of a cache's features, the best probe first, and what decided the figures.

    Args:
        pairs: the figures.
        pooling: feature -> how its encoder made one vector, or several that were averaged.
        num_drawn: samples that were drawn from the cache.
        num_compared: those of them outside the split's test part, which all metrics are of.
        num_trained: those that the probe was fitted on.
        num_held: those that it was measured on.
        num_groups: groups of near-duplicates that intervals are over.
        split: how the parts were cut, in words.
        language: of the captions; None is all.
        k: neighbours of mutual kNN.
        seed: of the drawing and the split.
        knn_chance: mutual kNN of sides that have nothing in common.
        chance: of the probe: `i2t`, `t2i`.
        skipped: a line for each feature that was left out.
    """

    pairs: Sequence[PairFigures]
    pooling: Mapping[str, str]
    num_drawn: int
    num_compared: int
    num_trained: int
    num_held: int
    num_groups: int
    split: str
    language: str | None
    k: int
    seed: int
    knn_chance: float
    chance: Mapping[str, Estimate]
    skipped: Sequence[str] = ()

    def line(self) -> str:
        """Say what was measured, in one line."""
        language = "" if self.language is None else f" in {self.language}"
        return (
            f"{self.num_compared:,} samples outside the test part of {self.num_drawn:,} drawn (seed {self.seed}), "
            f"split {self.split}; rows: {ROWS}{language}; CKA centred; kNN by cosine, k {self.k}; probe: CCA fitted "
            f"on {self.num_trained:,} samples, ranked on {self.num_held:,} others; 95 % intervals over "
            f"{self.num_groups:,} groups of near-duplicates"
        )


def pairs_rows(report: PairsReport) -> tuple[list[str], list[list[str]]]:
    """Lay a report out as a table: a row a pair, the best probe first, and a last row of what chance gives.

    Returns:
        The column names, and the rows of text: `value [low, high]`.
    """
    columns = ["image × text", "probe i2t R@10", "probe t2i R@10", "mutual kNN", "debiased CKA", "linear CKA"]
    columns.append("shuffled")
    rows = [[f"{pair.image} × {pair.text}", *_cells(pair)] for pair in report.pairs]
    chance = [format_estimate(report.chance[way]) for way in ("i2t", "t2i")]
    return columns, [*rows, ["chance", *chance, format_share(report.knn_chance), format_share(0.0), "as shuffled", ""]]


def pairs_json(report: PairsReport) -> dict[str, Any]:
    """Give a report as JSON values: all its fields, and `rows`, how a sample became a row; estimates with intervals."""
    return {**asdict(report), "rows": ROWS, "centred": True}


def _cells(pair: PairFigures) -> list[str]:
    estimates = (pair.i2t, pair.t2i, pair.mutual_knn, pair.debiased_cka, pair.linear_cka)
    return [*(format_estimate(estimate) for estimate in estimates), format_share(pair.shuffled_cka)]
