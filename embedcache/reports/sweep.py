"""What a sweep found, and as JSON.

report.html of a study: one page that holds everything it shows.

A study's plots as SVG text, to be placed inside a page.
"""

import math
import shlex
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.distributions import CategoricalDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from embedcache.files import is_remote
from embedcache.provenance import digest_file, to_record, write_json
from embedcache.reports.base import BAD, COLORS, INK, SOFT, label, svg, write_page
from embedcache.reports.retrieval import retrieval_json, retrieval_table
from embedcache.sweep.best import Best
from embedcache.sweep.study import Study
from embedcache.sweep.trials import Trials, outcome_of, reason_of, score_of
from embedcache.train.data import TrainData
from embedcache.train.settings import command_line

_FEWEST_FOR_IMPORTANCE = 4


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a sweep found.

    Args:
        study: what it asked.
        trials: finished: complete, pruned or failed, by number.
        best: the best configurations; first comes what validation picks.
        left_out: trials that would be among them, but fail with another seed -> why.
        importance: swept setting -> its share of what makes scores differ, the largest first; empty where too few
            trials tell.
        command: trains the winner again, to the same weights.
        weights: SHA-256 of the winner's weights.
    """

    study: Study
    trials: Sequence[FrozenTrial]
    best: Sequence[Best]
    left_out: Mapping[int, str]
    importance: Mapping[str, float]
    command: str
    weights: str

    @property
    def winner(self) -> Best:
        """The configuration that validation picks."""
        return self.best[0]

    def of(self, state: TrialState) -> list[FrozenTrial]:
        """List the trials that ended in one way."""
        return [trial for trial in self.trials if trial.state == state]

    def counts(self) -> dict[str, int]:
        """Count the trials by how they ended."""
        return {
            "complete": len(self.of(TrialState.COMPLETE)),
            "pruned": len(self.of(TrialState.PRUNED)),
            "failed": len(self.of(TrialState.FAIL)),
        }


def find(
    path: Path, study: Study, data: TrainData, trials: Trials, best: Sequence[Best], left_out: Mapping[int, str]
) -> Findings:
    """Put together what a sweep found."""
    return Findings(
        study=study,
        trials=trials.finished(),
        best=best,
        left_out=left_out,
        importance=_importance(trials),
        command=_command(path, data, best[0]),
        weights=digest_file(best[0].run_paths[0] / "model.safetensors"),
    )


def write_figures(path: Path, findings: Findings) -> None:
    """Write all figures of the page as JSON."""
    write_json(
        path,
        {
            "study": to_record(findings.study),
            "counts": findings.counts(),
            "winner": {
                "trial": findings.winner.number,
                "run": str(findings.winner.run_paths[0]),
                "weights": findings.weights,
                "command": findings.command,
            },
            "best": [_best_json(best) for best in findings.best],
            "left_out": {str(number): reason for number, reason in findings.left_out.items()},
            "importance": {name: round(share, 5) for name, share in findings.importance.items()},
            "trials": [_trial_json(trial) for trial in findings.trials],
        },
    )


def _importance(trials: Trials) -> dict[str, float]:
    """Share out the variance of scores by fANOVA, which orders settings better than Optuna's default on 60 trials."""
    complete = [trial for trial in trials.finished() if trial.state == TrialState.COMPLETE]
    if len(complete) < _FEWEST_FOR_IMPORTANCE or len({trial.value for trial in complete}) == 1:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shares = get_param_importances(trials.optuna, evaluator=FanovaImportanceEvaluator(seed=0))
    return {name: float(share) for name, share in shares.items()}


def _command(path: Path, data: TrainData, winner: Best) -> str:
    caches = [str(cache.path if is_remote(cache.path) else cache.path.resolve()) for cache in data.caches]
    sides = ["--image-feature", data.image.feature, "--text-feature", data.text.feature]
    run = str(path.resolve() / "winner")
    return shlex.join(["embedcache", "train", *caches, run, *sides, *command_line(winner.settings)])


def _best_json(best: Best) -> dict[str, Any]:
    return {
        "trial": best.number,
        "params": dict(best.params),
        "score": round(best.score, 5),
        "validation": {
            "mean": round(best.mean_score, 5),
            "lowest": round(min(best.scores), 5),
            "highest": round(max(best.scores), 5),
            "scores": [round(score, 5) for score in best.scores],
        },
        "num_parameters": best.outcome.num_parameters,
        "flops_a_pair": best.outcome.flops_a_pair,
        "num_pairs": best.outcome.num_pairs,
        "runs": [str(run_path) for run_path in best.run_paths],
        "test": {cache: retrieval_json(report) for cache, report in best.test.items()},
    }


def _trial_json(trial: FrozenTrial) -> dict[str, Any]:
    values: dict[str, Any] = {
        "trial": trial.number,
        "state": {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}.get(trial.state, "failed"),
        "score": None if trial.value is None else round(trial.value, 5),
        "params": trial.params,
    }
    if trial.state == TrialState.COMPLETE:
        return {**values, **asdict(outcome_of(trial))}
    return {**values, "reason": reason_of(trial)} if trial.state == TrialState.FAIL else values


def write_report(path: Path, findings: Findings) -> None:
    """Write the page. It asks for nothing from outside."""
    write_page(
        path,
        "sweep.html.j2",
        findings=findings,
        counts=findings.counts(),
        best=best_rows(findings.best),
        tests=test_tables(findings.best),
        winner_test=next(iter(findings.winner.test.values())),
        failed=[
            *((f"{number}, another seed", reason) for number, reason in findings.left_out.items()),
            *((str(trial.number), reason_of(trial)) for trial in findings.of(TrialState.FAIL)),
        ],
        history=history(findings.trials),
        importance=importance_bars(findings.importance) if findings.importance else "",
        parallel=parallel_coordinates(findings.trials),
        costs=costs(findings.trials),
    )


def best_rows(best: Sequence[Best]) -> tuple[list[str], list[list[str]]]:
    """Lay out the best configurations: what each tries, and its validation recall.

    Returns:
        The column names, and the rows of text.
    """
    names = list(best[0].params)
    columns = ["trial", *names, "parameters", "pairs seen", "trial's score", "mean of seeds [lowest, highest]"]
    return columns, [[str(one.number), *_cells(one, names)] for one in best]


def test_tables(best: Sequence[Best]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Lay out each cache's test figures: a row a configuration, and what chance gives."""
    return {cache: retrieval_table({f"trial {one.number}": one.test[cache] for one in best}) for cache in best[0].test}


def _cells(best: Best, names: Sequence[str]) -> list[str]:
    return [
        *(_text(best.params[name]) for name in names),
        f"{best.outcome.num_parameters:,}",
        f"{best.outcome.num_pairs:,}",
        f"{best.score:.4f}",
        f"{best.mean_score:.4f} [{min(best.scores):.4f}, {max(best.scores):.4f}]",
    ]


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_BLUE, _ORANGE = COLORS[0], COLORS[3]
_SHADES = colormaps["viridis_r"]
_SCORE = "validation recall, mean of six"
_MOST_LABEL = 14


def history(trials: Sequence[FrozenTrial]) -> str:
    """Draw every trial's score by its number, and the best so far; pruned and failed trials are marked."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    complete = _of(trials, TrialState.COMPLETE)
    axes.scatter(_numbers(complete), _scores(complete), s=16, color=_BLUE, label="complete", zorder=3)
    axes.step(_numbers(complete), _best_so_far(_scores(complete)), where="post", color=_BLUE, label="best so far")
    pruned = [trial for trial in _of(trials, TrialState.PRUNED) if trial.value is not None]
    if pruned:
        axes.scatter(_numbers(pruned), _scores(pruned), s=22, color=_ORANGE, marker="x", label="pruned, its last score")
    failed = _of(trials, TrialState.FAIL)
    if failed:
        at_the_foot = axes.get_xaxis_transform()  # as they have no score
        axes.scatter(
            _numbers(failed),
            [0.03] * len(failed),
            s=22,
            color=BAD,
            marker="^",
            transform=at_the_foot,
            label="failed",
        )
    label(axes, "trial", _SCORE)
    figure.legend(frameon=False, labelcolor=INK, loc="outside upper right", ncols=4)
    return svg(figure)


def importance_bars(importance: Mapping[str, float]) -> str:
    """Draw each setting's share of what makes scores differ."""
    figure = Figure(figsize=(9, 0.6 + 0.36 * len(importance)), layout="constrained")
    axes = figure.subplots()
    for position, share in enumerate(importance.values()):
        axes.barh(position, share, color=_BLUE, height=0.6)
        axes.annotate(
            f"{share:.2f}",
            (share, position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=INK,
        )
    axes.set_yticks(range(len(importance)), list(importance))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(importance.values()))
    label(axes, "share of the variance of scores (fANOVA)", "")
    return svg(figure)


def parallel_coordinates(trials: Sequence[FrozenTrial]) -> str:
    """Draw every complete trial as a line through its settings to its score; good ones are dark and in front."""
    complete = sorted(_of(trials, TrialState.COMPLETE), key=score_of)
    names = list(complete[0].params)
    columns = [_Column.of([trial.params[name] for trial in complete], name, complete) for name in names]
    columns.append(_Column.of(_scores(complete), "", complete))
    figure = Figure(figsize=(max(9, 1.5 * len(columns)), 4), layout="constrained")
    axes = figure.subplots()
    colors = _SHADES(Normalize(*_range_of(_scores(complete)))(_scores(complete)))
    for place, color in enumerate(colors):
        heights = [column.heights[place] for column in columns]
        axes.plot(range(len(columns)), heights, color=color, linewidth=1.3, alpha=0.8)
    for position, column in enumerate(columns):
        axes.axvline(position, color=SOFT, linewidth=0.8, zorder=0)
        for height, text in column.ticks:
            axes.annotate(
                text,
                (position, height),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color="#1f2933",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
            )
    axes.set_xticks(range(len(columns)), [*names, "validation\nrecall"])
    axes.set_xlim(-0.15, len(columns) - 0.5)
    label(axes, "", "")
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    return svg(figure)


def costs(trials: Sequence[FrozenTrial]) -> str:
    """Draw each complete trial's score against what it cost, with the line of those that none is better and cheaper."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    complete = _of(trials, TrialState.COMPLETE)
    prices = {
        "parameters": [outcome_of(trial).num_parameters for trial in complete],
        "pairs seen in training": [outcome_of(trial).num_pairs for trial in complete],
    }
    for axes, (name, prices_T) in zip(figure.subplots(1, 2, sharey=True), prices.items(), strict=True):
        axes.scatter(prices_T, _scores(complete), s=16, color=_BLUE, label="trial")
        front = pareto_front(zip(prices_T, _scores(complete), strict=True))
        axes.plot(*zip(*front, strict=True), color=_ORANGE, marker=".", label="best for its price", zorder=3)
        if min(prices_T) > 0 and max(prices_T) > 10 * min(prices_T):
            axes.set_xscale("log")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(lambda value, _: _short(value))
        label(axes, name, _SCORE if name == "parameters" else "")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, labelcolor=INK, loc="outside upper right", ncols=2)
    return svg(figure)


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Get the (price, score) points that no other reaches at the same price or less, the cheapest first.

    Example:
        >>> pareto_front([(1, 0.5), (2, 0.4), (3, 0.7), (1, 0.3)])
        [(1, 0.5), (3, 0.7)]
    """
    front: list[tuple[float, float]] = []
    for price, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((price, score))
    return front


class _Column:
    """One upright axis of the parallel coordinates.

    Args:
        heights: of each trial, 0 to 1.
        ticks: height and text.
    """

    def __init__(self, heights: list[float], ticks: list[tuple[float, str]]) -> None:
        self.heights, self.ticks = heights, ticks

    @staticmethod
    def of(values: Sequence[Any], name: str, trials: Sequence[FrozenTrial]) -> "_Column":
        """Place numbers by size, by their logarithm where they are drawn so, and other values evenly."""
        distribution = trials[0].distributions.get(name)
        if isinstance(distribution, CategoricalDistribution):
            choices = distribution.choices
            places = {choice: place / max(1, len(choices) - 1) for place, choice in enumerate(choices)}
            return _Column([places[value] for value in values], [(y, _shown(choice)) for choice, y in places.items()])
        is_log = bool(getattr(distribution, "log", False))
        scaled = [math.log(value) if is_log else float(value) for value in values]
        low, high = min(scaled), max(scaled)
        heights = [(value - low) / (high - low) if high > low else 0.5 for value in scaled]
        middle = math.exp((low + high) / 2) if is_log else (low + high) / 2
        ends = [(0.0, min(values)), (0.5, middle), (1.0, max(values))] if high > low else [(0.5, values[0])]
        return _Column(heights, [(height, _short(value)) for height, value in ends])


def _shown(value: Any) -> str:
    text = _short(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
    return text if len(text) <= _MOST_LABEL else f"{text[: _MOST_LABEL - 1]}…"


def _short(value: float) -> str:
    """Write a number in a few letters: 0.0012, 0.421, 3.2k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.3g}"


def _of(trials: Sequence[FrozenTrial], state: TrialState) -> list[FrozenTrial]:
    return [trial for trial in trials if trial.state == state]


def _numbers(trials: Sequence[FrozenTrial]) -> list[int]:
    return [trial.number for trial in trials]


def _scores(trials: Sequence[FrozenTrial]) -> list[float]:
    return [score_of(trial) for trial in trials]


def _best_so_far(scores: Sequence[float]) -> list[float]:
    return [max(scores[: place + 1]) for place in range(len(scores))]


def _range_of(scores: Sequence[float]) -> tuple[float, float]:
    low, high = min(scores), max(scores)
    return (low, high) if high > low else (low - 1, high)
