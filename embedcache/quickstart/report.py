"""The presentation of the quickstart."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache as once
from pathlib import Path
from statistics import fmean

from embedcache.evaluate.retrieval import Ranking, RetrievalReport, rank
from embedcache.evaluate.runs import load_runs
from embedcache.provenance import read_json
from embedcache.reports.figures import COLORS, INK, label, open_axes, svg
from embedcache.reports.items import ItemRenderer, PageItem, QueryExample
from embedcache.reports.render import Presentation, Section, format_fraction
from embedcache.reports.retrieval import query_sections, recall_bars, recall_tiles, retrieval_table
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
    cache_path: Path
    peak_memory_bytes: int
    page_path: Path
    metrics_path: Path


def present_quickstart(report: QuickstartReport) -> Presentation:
    """Return the presentation of the quickstart: recalls, training, queries, hits and stages."""
    cache, trained = Cache(report.cache_path), next(iter(report.retrieval.values()))
    recalls = {name: result.recalls for name, result in report.retrieval.items()}
    renderer = ItemRenderer(cache, "image")
    retrieval = Section(
        title="Retrieval on the test split",
        notes=[
            f"Evaluated: {trained.line()}. Near-duplicate groups are never divided between training and test. Training "
            "starts from the closed form. The control is trained on shuffled pairs and must score at chance level. In "
            "brackets the 95% interval; for chance, the range that holds 95% of random rankings."
        ],
        table=retrieval_table(report.retrieval),
        figures=lambda: [recall_bars({**recalls, "chance": trained.chance})],
    )
    queries, renderers = query_sections(cache, ("image", "text"), once(lambda: _rank_first(report, cache)))
    search = Section(
        title="Search",
        notes=["Top results with their cosine. The index holds all images, including those seen in training."],
        examples=lambda: [_hits_example(query, hits, renderer) for query, hits in report.hits.items()],
    )
    stages = [[stage.name, f"{stage.seconds:.1f}", stage.command, stage.outcome] for stage in report.stages]
    return Presentation(
        title="embedcache quickstart",
        lines=["two frozen encoders, trained independently, aligned by a small projector trained on cached features"],
        tiles=[
            (f"{sum(stage.seconds for stage in report.stages):.0f} s", "total time"),
            (f"{report.peak_memory_bytes / 1e9:.2f} GB", "peak memory"),
            *recall_tiles(trained),
        ],
        sections=[
            retrieval,
            Section(title="Training", figures=lambda: [_training_curves(report.run_paths)]),
            *queries,
            search,
            Section(title="Stages", table=(["stage", "seconds", "command", "outcome"], stages), num_printed=0),
        ],
        record=lambda: read_json(report.metrics_path),
        notes=[f"metrics: {report.metrics_path}", f"open {report.page_path} in a browser"],
        renderers=[renderer, *renderers],
    )


def _rank_first(report: QuickstartReport, cache: Cache) -> Ranking:
    return rank(cache, load_runs(report.run_paths[:1])[0])


def _hits_example(query: str, hits: Sequence[Hit], renderer: ItemRenderer) -> QueryExample:
    results = [replace(renderer.render(hit.row), text=format_fraction(hit.score)) for hit in hits]
    return QueryExample(query=PageItem(text=query), outcome="", is_correct=True, results=results)


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
