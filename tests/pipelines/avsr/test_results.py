"""Tables of word error rates over seeds."""

import numpy as np
import pytest

from embedcache.metrics.intervals import MetricValues
from pipelines.avsr.results import gain_table, rate_table
from pipelines.results import Result, Results

VIEWS = ["plain", *(f"babble{level}dB" for level in (10, 5, 0, -5, -10))]
RATES = {"audio": (5, 13, 22, 50, 86, 98), "video": (35,) * 6, "fusion": (3, 6, 10, 17, 30, 31)}
"""Percent of wrong words per level."""


def make_result(model: str, rates: tuple[float, ...], seed: int) -> Result:
    """A result in which that percentage of 200 words is wrong at each level, and one point more with the next seed."""
    places = np.arange(200) / 2
    errors = {
        view: MetricValues(places < rate + seed, np.arange(200) // 5) for view, rate in zip(VIEWS, rates, strict=True)
    }
    return Result(model=model, question="A", seed=seed, num_examples=40, measures=errors)


def test_tables_are_means_over_seeds_by_the_level_of_noise() -> None:
    results = Results(make_result(model, rates, seed) for model, rates in RATES.items() for seed in (1, 0))
    columns, rows = rate_table(results, [*RATES, "missing"], "A")
    assert columns == ["WER in %", "clean", "10 dB", "5 dB", "0 dB", "-5 dB", "-10 dB"]
    assert [row[0] for row in rows] == [*RATES]
    assert [cell.split()[0] for cell in rows[0][1:]] == ["5.5", "13.5", "22.5", "50.5", "86.5", "98.5"]
    _, rows = gain_table(results, ["fusion"], ["audio", "video"], "A")
    gains = [float(cell.split()[0]) for cell in rows[0][1:]]
    assert gains == pytest.approx([-2, -7, -12, -18, -5, -4], abs=0.01)
