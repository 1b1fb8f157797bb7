"""Correlate the metrics of encoder pairs before training with their recall after training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from embedcache.arrays import Array
from embedcache.evaluate.encoder_pairs import METRICS, PairsReport
from embedcache.metrics import Estimate
from embedcache.reports.render import Table, format_fraction

UNDEFINED = "all equal"
"""Cell of a correlation in which all values of one side are equal."""
Pair = tuple[str, str]
"""An image feature and a text feature."""


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Metrics of encoder pairs before training, and their recalls after training.

    Args:
        measured: reports of the same pairs, one per split; their values are averaged.
        recalls: recipe -> pair -> test R@10, averaged over directions and seeds.
    """

    measured: Sequence[PairsReport]
    recalls: Mapping[str, Mapping[Pair, float]]

    @property
    def pairs(self) -> list[Pair]:
        """All pairs, by descending recall with the first recipe."""
        first = next(iter(self.recalls.values()))
        return sorted(first, key=lambda pair: -first[pair])

    def metric(self, name: str) -> Array:
        """Return one of `METRICS` for each of `pairs`: (M,) float64."""
        values = [
            {tuple(pair.features.values()): pair.value(name) for pair in report.pairs} for report in self.measured
        ]
        return np.array([np.mean([value[pair] for value in values]) for pair in self.pairs])

    def recall(self, recipe: str) -> Array:
        """Return the recall of each of `pairs`: (M,) float64."""
        return np.array([self.recalls[recipe][pair] for pair in self.pairs])


def correlation_table(outcomes: Outcomes) -> Table:
    """Return the rank correlations with their intervals, one row per recipe and metric.

    The last two columns are the recall of the pair with the highest metric, and the best recall of any pair. If all
    pairs are equal, no correlation is defined and no pair is chosen.
    """
    rows = []
    for recipe in outcomes.recalls:
        recalls = outcomes.recall(recipe)
        for metric, name in METRICS.items():
            values = outcomes.metric(metric)
            best = format_fraction(recalls.max())

            # Equal values neither rank nor choose.
            if min(np.ptp(values), np.ptp(recalls)) == 0:
                rows.append([name, recipe, UNDEFINED, UNDEFINED, best])
                continue

            correlation = str(rank_correlation(values, recalls))
            rows.append([name, recipe, correlation, format_fraction(recalls[values.argmax()]), best])
    return ["metric", "training", "Spearman", "recall of its choice", "best recall"], rows


def pair_table(outcomes: Outcomes) -> Table:
    """Return the recall of each pair with each recipe, and its metrics before training."""
    columns = [*(f"test R@10, {recipe}" for recipe in outcomes.recalls), *METRICS.values()]
    measures = [*map(outcomes.recall, outcomes.recalls), *map(outcomes.metric, METRICS)]
    rows = []
    for row, pair in enumerate(outcomes.pairs):
        rows.append([*pair, *(format_fraction(values[row]) for values in measures)])
    return ["image", "text", *columns], rows


def rank_correlation(x_M: Array, y_M: Array, *, num_draws: int = 1000, seed: int = 0) -> Estimate:
    """Compute Spearman's rho, with a 95% percentile interval from resampling the M rows.

    Rows are treated as independent. Resamples in which one measure is constant are left out.

    Args:
        x_M: (M,) float.
        y_M: (M,) float.
        num_draws: number of resamples.
        seed: random seed of the resampling.
    """
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(x_M), size=(num_draws, len(x_M)))

    # A constant measure has no correlation.
    usable = [draw for draw in draws if min(len(np.unique(x_M[draw])), len(np.unique(y_M[draw]))) > 1]

    def spearman(x: Array, y: Array) -> float:
        return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])

    low, high = np.quantile([spearman(x_M[draw], y_M[draw]) for draw in usable], [0.025, 0.975])
    return Estimate(spearman(x_M, y_M), float(low), float(high))
