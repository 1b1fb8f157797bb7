"""report.html of a study: one page that holds everything it shows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from embedcache.evaluate.report import retrieval_rows
from embedcache.pages.write import write_page
from embedcache.sweep.best import Best
from embedcache.sweep.plots import costs, history, importance_bars, parallel_coordinates
from embedcache.sweep.report import Findings
from embedcache.sweep.trials import reason_of


def write_report(path: Path, findings: Findings) -> None:
    """Write the page. It asks for nothing from outside."""
    write_page(
        path,
        "sweep",
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
    return {cache: retrieval_rows({f"trial {one.number}": one.test[cache] for one in best}) for cache in best[0].test}


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
