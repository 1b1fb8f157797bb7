"""The report of a sweep, as JSON and as a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from embedcache.errors import pluralize, summary
from embedcache.evaluate.retrieval import RetrievalReport
from embedcache.provenance import read_json
from embedcache.reports.render import Presentation, Section, Table, format_count, format_fraction, round_json
from embedcache.reports.retrieval import recall_tiles, retrieval_json, retrieval_table
from embedcache.runs import Run

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The configuration of a top trial, retrained with several seeds.

    Args:
        score: score of the trial.
        num_pairs: number of pairs that the trial saw in training.
        scores: validation recall of each seed, the trial's own seed first.
        run_paths: one run per seed.
        test: cache -> retrieval on its test part, over all seeds.
        kept_initialization: whether it was trained, but the initialization was best on validation with every seed.
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
class SweepReport:
    """Result of a sweep.

    Args:
        path: folder of the study.
        study: content of `study.json`.
        trials: Optuna's finished trials, of which complete ones have their counts as attributes.
        best: the top configurations, the best one on validation first.
        left_out: number of a top trial whose configuration fails with another seed -> reason.
        importance: swept setting -> fraction of the variance of scores, the largest first. Empty with too few trials.
        command: command that trains the winner again, to the same weights.

    Example:
        >>> settings = embedcache.SweepSettings(sampler="grid", top_configs=1, seeds_per_config=1)
        >>> report = embedcache.sweep_projectors("cache", "study", "space.toml", settings=settings)
        >>> len(report.trials), len(report.best), report.page_path.name
        (2, 1, 'report.html')
        >>> report.winner.mean_score == sum(report.winner.scores) / len(report.winner.scores)
        True
    """

    path: Path
    study: Mapping[str, Any]
    trials: Sequence["FrozenTrial"]
    best: Sequence[SweepConfig]
    left_out: Mapping[int, str]
    importance: Mapping[str, float]
    command: str

    @property
    def page_path(self) -> Path:
        """Path of the page."""
        return self.path / "report.html"

    @property
    def json_path(self) -> Path:
        """Path of the report."""
        return self.path / "report.json"

    @property
    def winner(self) -> SweepConfig:
        """The best configuration on validation."""
        return self.best[0]

    @property
    def warning(self) -> str:
        """Warning that the training settings of the winner had no effect. It is empty if they had one."""
        if not self.winner.kept_initialization:
            return ""

        return (
            f"trial {self.winner.number} kept its initialization with every seed: no epoch was better on validation, "
            "so that settings of its training, such as lr, decided nothing"
        )

    __repr__ = summary

    def line(self) -> str:
        """Summarize the study in one line."""
        features = " and ".join(side["feature"] for side in self.study["sides"].values())
        return (
            f"{features}, aligned {len(self.trials)} times; sampler {self.study['sampler']}, pruner "
            f"{self.study['pruner']}, seed {self.study['seed']}"
        )

    def counts(self) -> dict[str, int]:
        """Return the number of trials by state."""
        counts = dict.fromkeys(_STATES.values(), 0)
        for trial in self.trials:
            counts[_STATES[trial.state.name]] += 1
        return counts


def get_reason(trial: "FrozenTrial") -> str:
    """Return the reason why a trial failed."""
    # A killed process records no reason, and its trial fails once it is not tried again.
    return str(trial.user_attrs.get("reason", "its process was killed every time"))


def sweep_json(report: SweepReport) -> dict[str, Any]:
    """Return all values on the page as JSON values."""
    winner = report.winner
    # Names in JSON are strings.
    left_out = {str(number): reason for number, reason in report.left_out.items()}
    importance = {name: round_json(fraction) for name, fraction in report.importance.items()}

    return {
        "study": report.study,
        "counts": report.counts(),
        "winner": {
            "trial": winner.number,
            "run": str(winner.run_paths[0]),
            "weights": Run.open(winner.run_paths[0]).info.weights,
            "command": report.command,
        },
        "best": list(map(_config_json, report.best)),
        "left_out": left_out,
        "importance": importance,
        "trials": list(map(_trial_json, report.trials)),
    }


def _config_json(config: SweepConfig) -> dict[str, Any]:
    return {
        "trial": config.number,
        "params": dict(config.params),
        "score": round_json(config.score),
        "mean_score": round_json(config.mean_score),
        "scores": list(map(round_json, config.scores)),
        "num_parameters": config.num_parameters,
        "num_pairs": config.num_pairs,
        "runs": list(map(str, config.run_paths)),
        "test": {cache: retrieval_json(test) for cache, test in config.test.items()},
    }


def _trial_json(trial: "FrozenTrial") -> dict[str, Any]:
    return {
        "trial": trial.number,
        "state": _STATES[trial.state.name],
        "score": round_json(trial.value),
        "params": trial.params,
        **trial.user_attrs,
    }


def present_sweep(report: SweepReport, figures: Sequence[str] = ()) -> Presentation:
    """Return the presentation of a study, with the figures of `draw_study`."""
    winner = report.winner
    counts = report.counts()
    num_seeds = pluralize(len(winner.scores), "seed")

    # The tiles show one cache only, while the sections compare all caches.
    first_test = next(iter(winner.test.values()))
    return Presentation(
        title="embedcache sweep",
        lines=[report.line()],
        warnings=[report.warning] if report.warning else [],
        tiles=[
            (str(counts["complete"]), f"trials complete, {counts['pruned']} pruned, {counts['failed']} failed"),
            (
                format_fraction(winner.mean_score),
                f"validation recall of the winner, trial {winner.number}, mean of {num_seeds}",
            ),
            *recall_tiles(first_test),
        ],
        sections=_sections(report, num_seeds, figures),
        record=lambda: read_json(report.json_path),
        notes=[
            f"best run: {winner.run_paths[0]}",
            f"to train it again: {report.command}",
            f"results: {report.json_path}",
            f"open {report.page_path} in a browser",
        ],
    )


def _sections(report: SweepReport, num_seeds: str, figures: Sequence[str]) -> list[Section]:
    winner = report.winner
    left_out = f", without {len(report.left_out)} that another seed fails on" if report.left_out else ""
    best = Section(
        title="Best configurations",
        notes=[
            f"The top {len(report.best) + len(report.left_out)} configurations by the score of their trial, "
            f"retrained with {num_seeds} on the same split and ordered by the mean of the seeds{left_out}. Scores are "
            "validation recall: the mean of R@1, R@5 and R@10 in both directions, at the best epoch. The score of a "
            "trial is the best of many attempts and therefore too high; the mean of the seeds is less biased, and the "
            "test part is not biased at all."
        ],
        table=best_table(report.best),
    )

    tests = []
    for cache, table in test_tables(report.best).items():
        notes = [
            "Validation selected the configurations; the test part was used only now. In brackets: the 95% "
            "interval over groups of near-duplicates; for chance, the range of 95% of random orders.",
            f"{winner.test[cache].line()}.",
        ]
        tests.append(Section(title=f"Retrieval on test: {cache}", notes=notes, table=table))

    again = Section(
        title="Train the winner again",
        notes=[f"With its first seed; the weights are identical to those of {winner.run_paths[0]}."],
        code=report.command,
    )

    fractions = []
    for name, fraction in report.importance.items():
        fractions.append([name, f"{fraction:.2f}"])
    importance = Section(
        title="Which settings matter",
        notes=[
            "How much of the variance of the complete trials' scores each setting explains (fANOVA). With few trials, "
            "this is only a hint."
            if report.importance
            else "There are too few complete trials, or their scores are too similar, to tell which setting matters."
        ],
        table=(["setting", "fraction"], fractions),
        num_printed=0,
    )

    trials = Section(
        title="All trials",
        notes=["Scores in order of trials, then each complete trial as a line through its settings; darker is better."],
        figures=lambda: figures,
    )
    sections = [best, *tests, again, importance, trials]

    # A configuration fails as a trial, or with another seed when it is retrained.
    failures = []
    for number, reason in report.left_out.items():
        failures.append([f"{number}, another seed", reason])
    for trial in report.trials:
        if trial.state.name == "FAIL":
            failures.append([str(trial.number), get_reason(trial)])
    if failures:
        sections.append(Section(title="Failures", table=(["trial", "reason"], failures), num_printed=0))
    return sections


def best_table(best: Sequence[SweepConfig]) -> Table:
    """Return a table of the top configurations: their settings and their validation recall."""
    names = list(best[0].params)
    rows = []
    for config in best:
        row = [str(config.number)]
        # The columns have the order of the best trial.
        for name in names:
            value = config.params[name]
            row.append(f"{value:.4g}" if isinstance(value, float) else str(value))
        row += [
            format_count(config.num_parameters),
            format_count(config.num_pairs),
            format_fraction(config.score),
            f"{config.mean_score:.3f} [{min(config.scores):.3f}, {max(config.scores):.3f}]",
        ]
        rows.append(row)

    columns = ["trial", *names, "parameters", "pairs seen", "score of the trial", "mean of seeds [min, max]"]
    return columns, rows


def test_tables(best: Sequence[SweepConfig]) -> dict[str, Table]:
    """Return a table of test retrieval per cache: one row per configuration, and the chance level."""
    tables = {}
    for cache in best[0].test:
        reports = {f"trial {config.number}": config.test[cache] for config in best}
        tables[cache] = retrieval_table(reports)
    return tables
