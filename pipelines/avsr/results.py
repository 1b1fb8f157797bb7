"""Tables of word error rates over seeds, by the level of noise.

A measure of a result is a view of the sound; its values are the errors of each word, in clusters of words that are
drawn together.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from embedcache.dataset.inputs import PLAIN
from embedcache.metrics import Estimate, interval_of
from embedcache.reports.render import Table
from pipelines.results import Results

_LEVEL = re.compile(r"(-?\d+(\.\d+)?)dB$")


def snr_db(view: str) -> float:
    """Return the signal-to-noise ratio of a view by its name, such as `babble-5dB`; infinite for `plain`."""
    if view == PLAIN:
        return np.inf

    match = _LEVEL.search(view)
    assert match is not None, view
    return float(match[1])


def level_name(view: str) -> str:
    """Return the signal-to-noise ratio of a view as text, such as `clean` or `-5 dB`."""
    level = snr_db(view)
    return "clean" if np.isinf(level) else f"{level:g} dB"


def views_of(results: Results, test_set: str) -> list[str]:
    """Return the views in which a test set was recognized, least noise first."""
    first = results.models(test_set)[0]
    return sorted(results.seeds(first, test_set)[0].measures, key=snr_db, reverse=True)


def measured(results: Results, models: Iterable[str], test_set: str) -> list[str]:
    """Return the models that have results in a test set."""
    available = results.models(test_set)
    return [model for model in models if model in available]


def word_error_rate(results: Results, model: str, test_set: str, view: str) -> Estimate:
    """Return the word error rate of a model, mean over seeds, with a 95% interval over clusters of words and seeds."""
    rate = results.estimate(model, test_set, view)
    assert rate is not None, view
    return rate


def rate_table(results: Results, models: Iterable[str], test_set: str) -> Table:
    """Return error rates in percent with intervals: one row per model, one column per level of noise."""
    views = views_of(results, test_set)
    rows = []
    for model in measured(results, models, test_set):
        rates = [word_error_rate(results, model, test_set, view) for view in views]
        cells = [f"{100 * rate.value:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]" for rate in rates]
        rows.append([model, *cells])
    return ["WER in %", *map(level_name, views)], rows


def gain_table(results: Results, models: Iterable[str], singles: Sequence[str], test_set: str) -> Table:
    """Compare models with the better of two single streams at each level, paired, in points of the error rate."""
    views = views_of(results, test_set)
    rows = []
    for model in measured(results, models, test_set):
        cells = []
        for view in views:
            rates = {name: word_error_rate(results, name, test_set, view).value for name in singles}
            better = min(singles, key=lambda name: rates[name])

            # Both models are evaluated on the same words, so the same draws compare them with less noise.
            means_R2 = results.resample([(model, test_set), (better, test_set)], view)
            gap = interval_of(means_R2[:, 0] - means_R2[:, 1])
            cells.append(f"{100 * gap.value:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]")
        rows.append([model, *cells])
    return ["points above the better stream", *map(level_name, views)], rows
