"""Findings of a sweep, and their presentation."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from embedcache.errors import pluralize
from embedcache.evaluate.retrieval import RetrievalReport
from embedcache.provenance import read_json
from embedcache.reports.render import Presentation, Section, Table, format_count, format_fraction
from embedcache.reports.retrieval import recall_tiles, retrieval_table

State = Literal["complete", "pruned", "failed"]


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


def present_sweep(findings: SweepFindings, json_path: Path, figures: Sequence[str] = ()) -> Presentation:
    """Return the presentation of a study, whose JSON values are in a file, with the figures of `draw_study`."""
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
        sections=_sections(findings, num_seeds, figures),
        record=lambda: read_json(json_path),
        notes=[
            f"best run: {winner.run_paths[0]}",
            f"to train it again: {findings.command}",
            f"results: {json_path}",
            f"open {json_path.with_suffix('.html')} in a browser",
        ],
    )


def _sections(findings: SweepFindings, num_seeds: str, figures: Sequence[str]) -> list[Section]:
    winner = findings.winner
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
            "How much of the variance of the complete trials' scores each setting explains (fANOVA). With few trials, "
            "this is only a hint."
            if findings.importance
            else "There are too few complete trials, or their scores are too similar, to tell which setting matters."
        ],
        table=(["setting", "fraction"], [[name, f"{each:.2f}"] for name, each in findings.importance.items()]),
        num_printed=0,
    )
    trials = Section(
        title="All trials",
        notes=["Scores in order of trials, then each complete trial as a line through its settings; darker is better."],
        figures=lambda: figures,
    )
    failures = Section(title="Failures", table=(["trial", "reason"], failed), num_printed=0)
    return [
        best,
        *tests,
        again,
        importance,
        trials,
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
