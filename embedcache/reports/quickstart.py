"""report.html: one page that holds everything it shows.

Curves and bars as SVG text, to be placed inside a page.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from embedcache.evaluate.retrieval import RetrievalReport, rank
from embedcache.evaluate.runs import load_runs
from embedcache.reports.base import COLORS, INK, label, svg, write_page
from embedcache.reports.retrieval import query_sections, recall_bars, retrieval_table
from embedcache.reports.thumbnails import Thumbnails, credit
from embedcache.search.search import Hit
from embedcache.store.cache import Cache


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One thing that was done.

    Args:
        name: in a word or two.
        command: what does the same from a shell.
        seconds: how long it took.
        outcome: what came of it, in one line.
    """

    name: str
    command: str
    seconds: float
    outcome: str


@dataclass(frozen=True, kw_only=True)
class PageContent:
    """What the page shows.

    Args:
        stages: what was done, in order.
        reports: name -> figures; the first is the trained runs.
        run_paths: the trained runs; the gallery shows the first.
        hits: query -> what the index found.
        peak_memory_bytes: of the whole process.

    """

    stages: Sequence[Stage]
    reports: Mapping[str, RetrievalReport]
    run_paths: Sequence[Path]
    hits: Mapping[str, Sequence[Hit]]
    peak_memory_bytes: int


def write_report(path: Path, cache: Cache, content: PageContent) -> None:
    """Write the page. It asks for nothing from outside."""
    columns, rows = retrieval_table(content.reports)
    trained = next(iter(content.reports.values()))
    ranking = rank(cache, load_runs(content.run_paths[:1])[0])
    pictures = Thumbnails(cache)
    write_page(
        path,
        "quickstart.html.j2",
        content=content,
        credit=credit(cache),
        total_seconds=sum(stage.seconds for stage in content.stages),
        trained=trained,
        columns=columns,
        rows=rows,
        curves=curves(content.run_paths),
        bars=recall_bars(
            {
                **{name: report.recalls for name, report in content.reports.items()},
                "chance": trained.chance,
            }
        ),
        queries=query_sections(cache, ranking),
        hits=[
            (query, [(pictures.data_url(hit.row), hit.captions, hit.score) for hit in found])
            for query, found in content.hits.items()
        ],
    )


def curves(run_paths: Sequence[Path]) -> str:
    """Draw the training loss by step and the validation recall by epoch, one line a run."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    loss_axes, recall_axes = figure.subplots(1, 2)
    for path, color in zip(run_paths, COLORS, strict=False):
        lines = [json.loads(line) for line in (path / "losses.jsonl").read_text().splitlines()]
        losses = [line for line in lines if "loss" in line]
        recalls = [line for line in lines if "validation" in line]
        loss_axes.plot(
            [line["step"] for line in losses],
            [line["loss"] for line in losses],
            color=color,
            label=path.name,
        )
        recall_axes.plot(
            [line["epoch"] for line in recalls],
            [_mean_recall(line["validation"]) for line in recalls],
            color=color,
            marker=".",
            label=path.name,
        )
    label(loss_axes, "step", "training loss")
    label(recall_axes, "epoch; 0 is the closed form; mean of R@1, 5, 10", "validation recall")
    loss_axes.legend(frameon=False, labelcolor=INK)
    return svg(figure)


def _mean_recall(recalls: Mapping[str, float]) -> float:
    return sum(recalls.values()) / len(recalls)
