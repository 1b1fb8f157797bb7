"""Report of a sweep: the page of a study with its tables and plots, and the tables that the command prints."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from embedcache.errors import pluralize
from embedcache.evaluate.retrieval import RetrievalReport
from embedcache.provenance import read_json
from embedcache.reports.figures import BAD, COLORS, INK, SOFT, label, open_axes, svg
from embedcache.reports.render import Presentation, Section, Table, format_count, format_fraction
from embedcache.reports.retrieval import recall_tiles, retrieval_table

_BLUE, _ORANGE = COLORS[0], COLORS[3]
_SHADES = colormaps["viridis_r"]
_SCORE = "validation recall, mean of six"
_MAX_LABEL_LENGTH = 14

State = Literal["complete", "pruned", "failed"]


@dataclass(frozen=True, kw_only=True)
class SweepParameter:
    """A swept setting: its choices, or a range of numbers, which may be logarithmic."""

    name: str
    choices: Sequence[Any] | None
    is_log: bool


@dataclass(frozen=True, kw_only=True)
class SweepTrial:
    """A finished trial; only a complete one has counts, only a failed one a reason.

    Args:
        score: validation recall; the last one reported if it was pruned, None if there is none.
        params: values of the swept settings.
        num_parameters: number of trained parameters.
        num_pairs: number of pairs seen in training.
    """

    number: int
    state: State
    score: float | None
    params: Mapping[str, Any]
    num_parameters: int = 0
    num_pairs: int = 0
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The configuration of a top trial, retrained with several seeds.

    Args:
        score: score of the trial.
        num_pairs: number of pairs that the trial saw in training.
        scores: validation recall of each seed, the trial's own seed first.
        run_paths: one run per seed.
        test: cache -> retrieval on its test part, over all seeds.
        kept_initialization: whether it was trained, and no epoch of any seed was better on validation than none.
    """

    number: int
    params: Mapping[str, Any]
    score: float
    num_parameters: int
    num_pairs: int
    scores: Sequence[float]
    run_paths: Sequence[Path]
    test: Mapping[str, RetrievalReport]
    kept_initialization: bool

    @property
    def mean_score(self) -> float:
        """Mean validation recall over the seeds."""
        return fmean(self.scores)


@dataclass(frozen=True, kw_only=True)
class SweepFindings:
    """All results of a sweep.

    Args:
        features: modality -> name of its feature.
        best: the top configurations, the best one on validation first.
        left_out: number of a top trial whose configuration fails with another seed -> reason.
        importance: swept setting -> fraction of the variance of scores, the largest first; empty with too few trials.
        command: command that trains the winner again, to the same weights.
    """

    features: Mapping[str, str]
    sampler: str
    pruner: str
    seed: int
    parameters: Sequence[SweepParameter]
    trials: Sequence[SweepTrial]
    best: Sequence[SweepConfig]
    left_out: Mapping[int, str]
    importance: Mapping[str, float]
    command: str

    @property
    def winner(self) -> SweepConfig:
        return self.best[0]

    @property
    def warning(self) -> str:
        """Warning that the winner is not a result of its settings of training; empty if it is one."""
        if not self.winner.kept_initialization:
            return ""
        return (
            f"trial {self.winner.number} kept its initialization with every seed: no epoch was better on validation, "
            "so that settings of its training, such as lr, decided nothing"
        )

    def counts(self) -> dict[str, int]:
        """Return the number of trials by state."""
        counts = Counter(trial.state for trial in self.trials)
        return {state: counts[state] for state in ("complete", "pruned", "failed")}


def present_sweep(findings: SweepFindings, json_path: Path) -> Presentation:
    """Return the presentation of a study, whose JSON values are in a file."""
    winner, counts = findings.winner, findings.counts()
    num_seeds = pluralize(len(winner.scores), "seed")
    return Presentation(
        title="embedcache sweep",
        lines=[
            f"{' and '.join(findings.features.values())}, aligned {len(findings.trials)} times; sampler "
            f"{findings.sampler}, pruner {findings.pruner}, seed {findings.seed}"
        ],
        warnings=[findings.warning] if findings.warning else [],
        tiles=[
            (str(counts["complete"]), f"trials complete, {counts['pruned']} pruned, {counts['failed']} failed"),
            (
                format_fraction(winner.mean_score),
                f"validation recall of the winner, trial {winner.number}, mean of {num_seeds}",
            ),
            *recall_tiles(next(iter(winner.test.values()))),
        ],
        sections=_sections(findings, num_seeds),
        record=lambda: read_json(json_path),
        notes=[
            f"best run: {winner.run_paths[0]}",
            f"to train it again: {findings.command}",
            f"results: {json_path}",
            f"open {json_path.with_suffix('.html')} in a browser",
        ],
    )


def _sections(findings: SweepFindings, num_seeds: str) -> list[Section]:
    winner, complete = findings.winner, [trial for trial in findings.trials if trial.state == "complete"]
    failed = [[str(trial.number), trial.reason] for trial in findings.trials if trial.state == "failed"]
    failed = [*([f"{number}, another seed", reason] for number, reason in findings.left_out.items()), *failed]
    left_out = f", without {len(findings.left_out)} that another seed fails on" if findings.left_out else ""
    best = Section(
        title="Best configurations",
        notes=[
            f"The top {len(findings.best) + len(findings.left_out)} configurations by the score of their trial, "
            f"retrained with {num_seeds} on the same split and ordered by the mean of the seeds{left_out}. Scores are "
            "validation recall: the mean of R@1, R@5 and R@10 in both directions, at the best epoch. The score of a "
            "trial is the best of many attempts and therefore too high; the mean of the seeds is less biased, and the "
            "test part is not biased at all."
        ],
        table=best_table(findings.best),
    )
    tests = [
        Section(
            title=f"Retrieval on test: {cache}",
            notes=[
                "Validation selected the configurations; the test part was used only now. In brackets: the 95% "
                "interval over groups of near-duplicates; for chance, the range of 95% of random orders.",
                f"{winner.test[cache].line()}.",
            ],
            table=table,
        )
        for cache, table in test_tables(findings.best).items()
    ]
    again = Section(
        title="Train the winner again",
        notes=[f"With its first seed; the weights are identical to those of {winner.run_paths[0]}."],
        code=findings.command,
    )
    importance = Section(
        title="Which settings matter",
        notes=[
            "How much of the variance of the complete trials' scores each setting explains. With few trials, this is "
            "only a hint."
            if findings.importance
            else "There are too few complete trials, or their scores are too similar, to tell which setting matters."
        ],
        figures=lambda: [_importance_bars(findings.importance)] if findings.importance else [],
    )
    parallel = Section(
        title="All settings together",
        notes=["Each line is a complete trial; darker is better."],
        figures=lambda: [_parallel_coordinates(findings.parameters, complete)],
    )
    costs = Section(
        title="Costs",
        notes=[
            "Score against the number of trained parameters, and against the number of pairs seen in training, "
            "repetitions included. No trial is both better and cheaper than those on the line."
        ],
        figures=lambda: [_costs(complete)],
    )
    failures = Section(title="Failures", table=(["trial", "reason"], failed), num_printed=0)
    return [
        best,
        *tests,
        again,
        Section(title="History", figures=lambda: [_history(findings.trials)]),
        importance,
        parallel,
        costs,
        *([failures] if failed else []),
    ]


def best_table(best: Sequence[SweepConfig]) -> Table:
    """Return a table of the top configurations: their settings and their validation recall."""
    names, rows = list(best[0].params), []
    for config in best:
        values = [config.params[name] for name in names]
        rows.append(
            [
                str(config.number),
                *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values),
                format_count(config.num_parameters),
                format_count(config.num_pairs),
                format_fraction(config.score),
                f"{config.mean_score:.3f} [{min(config.scores):.3f}, {max(config.scores):.3f}]",
            ]
        )
    columns = ["trial", *names, "parameters", "pairs seen", "score of the trial", "mean of seeds [min, max]"]
    return columns, rows


def test_tables(best: Sequence[SweepConfig]) -> dict[str, Table]:
    """Return a table of test retrieval per cache: one row per configuration, and the chance level."""
    return {
        cache: retrieval_table({f"trial {config.number}": config.test[cache] for config in best})
        for cache in best[0].test
    }


def _history(trials: Sequence[SweepTrial]) -> str:
    """Draw the score of every trial by its number, and the best score so far; mark pruned and failed trials."""
    axes = open_axes(3.2)
    complete = [trial for trial in trials if trial.state == "complete"]
    axes.scatter(_numbers(complete), _scores(complete), s=16, color=_BLUE, label="complete", zorder=3)
    best_so_far = [max(_scores(complete[: position + 1])) for position in range(len(complete))]
    axes.step(_numbers(complete), best_so_far, where="post", color=_BLUE, label="best so far")
    pruned = [trial for trial in trials if trial.state == "pruned" and trial.score is not None]
    if pruned:
        axes.scatter(_numbers(pruned), _scores(pruned), s=22, color=_ORANGE, marker="x", label="pruned, its last score")
    failed = [trial for trial in trials if trial.state == "failed"]
    if failed:
        at_bottom: dict[str, Any] = {"transform": axes.get_xaxis_transform()}  # since they have no score
        axes.scatter(_numbers(failed), [0.03] * len(failed), s=22, color=BAD, marker="^", label="failed", **at_bottom)
    label(axes, "trial", _SCORE)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.figure.legend(frameon=False, labelcolor=INK, loc="outside upper right", ncols=4)
    return svg(axes.figure)


def _importance_bars(importance: Mapping[str, float]) -> str:
    """Draw the fraction of the variance of scores that each setting explains."""
    axes = open_axes(0.6 + 0.36 * len(importance))
    for position, fraction in enumerate(importance.values()):
        axes.barh(position, fraction, color=_BLUE, height=0.6)
        _annotate(axes, f"{fraction:.2f}", fraction, position, color=INK)
    axes.set_yticks(range(len(importance)), list(importance))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(importance.values()))
    label(axes, "fraction of the variance of scores (fANOVA)", "")
    return svg(axes.figure)


def _parallel_coordinates(parameters: Sequence[SweepParameter], complete: Sequence[SweepTrial]) -> str:
    """Draw every complete trial as a line through its settings to its score; good ones are dark and in front."""
    trials = sorted(complete, key=lambda trial: trial.score or 0.0)
    scores_T = _scores(trials)
    columns = [_column(parameter, [trial.params[parameter.name] for trial in trials]) for parameter in parameters]
    columns.append(_column(SweepParameter(name="", choices=None, is_log=False), scores_T))
    axes = open_axes(4, width=max(9, 1.5 * len(columns)))
    low, high = min(scores_T), max(scores_T)
    colors = _SHADES(Normalize(*((low, high) if high > low else (low - 1, high)))(scores_T))
    for position, color in enumerate(colors):
        heights = [heights[position] for heights, _ in columns]
        axes.plot(range(len(columns)), heights, color=color, linewidth=1.3, alpha=0.8)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8}
    for position, (_, ticks) in enumerate(columns):
        axes.axvline(position, color=SOFT, linewidth=0.8, zorder=0)
        for height, text in ticks:
            _annotate(axes, text, position, height, color="#1f2933", fontsize=8, bbox=box)
    axes.set_xticks(range(len(columns)), [*(parameter.name for parameter in parameters), "validation\nrecall"])
    axes.set_xlim(-0.15, len(columns) - 0.5)
    label(axes, "", "")
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    return svg(axes.figure)


def _column(parameter: SweepParameter, values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Place values on a vertical axis from 0 to 1: numbers to scale, other values evenly; return heights and ticks."""
    if parameter.choices is not None:
        positions = {
            choice: position / max(1, len(parameter.choices) - 1) for position, choice in enumerate(parameter.choices)
        }
        return [positions[value] for value in values], [(y, _format_choice(choice)) for choice, y in positions.items()]
    scaled = [math.log(value) if parameter.is_log else float(value) for value in values]
    low, high = min(scaled), max(scaled)
    heights = [(value - low) / (high - low) if high > low else 0.5 for value in scaled]
    middle = math.exp((low + high) / 2) if parameter.is_log else (low + high) / 2
    ends = [(0.0, min(values)), (0.5, middle), (1.0, max(values))] if high > low else [(0.5, values[0])]
    return heights, [(height, _format_short(value)) for height, value in ends]


def _costs(complete: Sequence[SweepTrial]) -> str:
    """Draw each complete trial's score against its costs, and the line of trials that none beats at lower cost."""
    costs = {
        "parameters": [trial.num_parameters for trial in complete],
        "pairs seen in training": [trial.num_pairs for trial in complete],
    }
    for axes, (name, costs_T) in zip(open_axes(3.4, ncols=2, sharey=True), costs.items(), strict=True):
        axes.scatter(costs_T, _scores(complete), s=16, color=_BLUE, label="trial")
        front = pareto_front(zip(costs_T, _scores(complete), strict=True))
        axes.plot(*zip(*front, strict=True), color=_ORANGE, marker=".", label="best for its cost", zorder=3)
        if min(costs_T) > 0 and max(costs_T) > 10 * min(costs_T):
            axes.set_xscale("log")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(lambda value, _: _format_short(value))
        label(axes, name, _SCORE if name == "parameters" else "")
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles, labels, frameon=False, labelcolor=INK, loc="outside upper right", ncols=2)
    return svg(axes.figure)


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the (cost, score) points that no other point reaches at the same cost or less, the cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return front


def _annotate(axes: Any, text: str, x: float, y: float, **style: Any) -> None:
    axes.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", va="center", **style)


def _format_choice(value: Any) -> str:
    text = _format_short(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
    return text if len(text) <= _MAX_LABEL_LENGTH else f"{text[: _MAX_LABEL_LENGTH - 1]}…"


def _format_short(value: float) -> str:
    """Return a number in a few characters: 0.0012, 0.421, 3.2k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.3g}"


def _numbers(trials: Sequence[SweepTrial]) -> list[int]:
    return [trial.number for trial in trials]


def _scores(trials: Sequence[SweepTrial]) -> list[float]:
    return [trial.score for trial in trials if trial.score is not None]
