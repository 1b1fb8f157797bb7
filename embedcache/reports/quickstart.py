"""The page of results that the quickstart writes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from embedcache.dataset.thumbnails import Thumbnails, credit
from embedcache.evaluate.ranking import rank
from embedcache.evaluate.retrieval import RetrievalReport
from embedcache.evaluate.runs import load_runs
from embedcache.reports.base import COLORS, INK, label, open_axes, svg, write_page
from embedcache.reports.retrieval import query_sections, recall_bars, retrieval_table
from embedcache.search.hits import Hit
from embedcache.store.cache import Cache


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One finished stage of the quickstart, the shell command that does the same, and its result in one line."""

    name: str
    command: str
    seconds: float
    outcome: str


@dataclass(frozen=True, kw_only=True)
class QuickstartReport:
    """Results of the quickstart.

    Args:
        retrieval: recalls of the trained runs, which come first, of the closed form and of the shuffled control.
        run_paths: trained runs; the page shows queries of the first.
        hits: query -> hits of the index.
    """

    stages: Sequence[Stage]
    retrieval: Mapping[str, RetrievalReport]
    run_paths: Sequence[Path]
    hits: Mapping[str, Sequence[Hit]]
    peak_memory_bytes: int
    page_path: Path
    metrics_path: Path


def write_quickstart_page(report: QuickstartReport, cache: Cache) -> None:
    """Write the page at `report.page_path`; it is self-contained."""
    trained = next(iter(report.retrieval.values()))
    recalls = {name: result.recalls for name, result in report.retrieval.items()}
    thumbnails, queries = Thumbnails(cache), query_sections(cache, rank(cache, load_runs(report.run_paths[:1])[0]))[0]
    write_page(
        report.page_path,
        "quickstart.html.j2",
        report=report,
        trained=trained,
        table=retrieval_table(report.retrieval),
        bars=recall_bars({**recalls, "chance": trained.chance}),
        curves=_training_curves(report.run_paths),
        queries=queries,
        hits={
            query: [(thumbnails.data_url(hit.row), ", ".join(hit.captions), hit.score) for hit in hits]
            for query, hits in report.hits.items()
        },
        credit=credit(cache),
    )


def _training_curves(run_paths: Sequence[Path]) -> str:
    """Draw training loss by step and validation recall by epoch, one line per run, as an SVG element."""
    loss_axes, recall_axes = open_axes(3, ncols=2)
    for path, color in zip(run_paths, COLORS, strict=False):
        lines = [json.loads(line) for line in (path / "losses.jsonl").read_text().splitlines()]
        losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        recalls = [(line["epoch"], fmean(line["validation"].values())) for line in lines if "validation" in line]
        loss_axes.plot(*zip(*losses, strict=True), color=color, label=path.name)
        recall_axes.plot(*zip(*recalls, strict=True), color=color, marker=".", label=path.name)
    label(loss_axes, "step", "training loss")
    label(recall_axes, "epoch (0: closed form)", "validation recall, mean of R@1, 5, 10")
    loss_axes.legend(frameon=False, labelcolor=INK)
    return svg(loss_axes.figure)
